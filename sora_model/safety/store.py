"""The records of what was signed here, by the identity of its mark: a file that lost its record is found again.

SQLite, manifests.sqlite in `certificates.folder()`. It holds what the files themselves hold, and their names.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone

from . import certificates


@dataclass(frozen=True)
class Record:
    """A signed file: its `title`, when it was `made` (UTC), and its `manifest`, C2PA."""

    title: str
    made: str
    manifest: bytes


def keep(identity: int, title: str, manifest: bytes) -> None:
    """Raises `CredentialsError`, as all here do, where the store cannot be used."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with _opened() as store, store:
        store.execute("INSERT INTO records VALUES (?, ?, ?, ?)", (identity, title, now, manifest))


def identities() -> set[int]:
    with _opened() as store:
        return {identity for (identity,) in store.execute("SELECT DISTINCT identity FROM records")}


def find(identity: int) -> list[Record]:
    """The newest first: equal requests have one identity."""
    with _opened() as store:
        rows = store.execute(
            "SELECT title, made, manifest FROM records WHERE identity = ? ORDER BY rowid DESC", (identity,)
        )
        return [Record(*row) for row in rows]


@contextmanager
def _opened() -> Iterator[sqlite3.Connection]:
    folder = certificates.folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / "manifests.sqlite"
    try:
        with closing(sqlite3.connect(path, timeout=30)) as store:
            store.execute("CREATE TABLE IF NOT EXISTS records (identity INTEGER, title TEXT, made TEXT, manifest BLOB)")
            store.execute("CREATE INDEX IF NOT EXISTS by_identity ON records (identity)")
            yield store
    except sqlite3.Error as error:
        raise certificates.CredentialsError(
            f"cannot use the store of records {os.fspath(path)!r}: {error}; where it is damaged, move it away, and "
            "another is begun"
        ) from error
