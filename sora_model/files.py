"""Files that appear whole or not at all, and folders that one process at a time works in.

    with write_atomically("out/clip.mp4") as part:      # beside the target, under the target's own name
        part.write_bytes(...)

A file is written in a hidden folder beside its target, synced to the disk and renamed over it. However the writing
ends, that folder goes: at an exception at once, after a kill or a power cut with the next file that is written beside
it. Locks tell what is left from what is being written; the system takes them back from a process that has ended.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .safety import limits

_PREFIX, _SUFFIX, _LOCK = ".sora-", ".part", ".lock"


class WriteError(OSError):
    """A file that cannot be written; the message says which, why and what to do."""


class _Enough(Exception):
    pass


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the path of an empty file that takes the place of `path` when the block ends well, and vanishes otherwise.

    A link is followed to its target, and an older file's permissions are kept. Raises `WriteError` where there is no
    folder, no permission or no space, for a write-protected file, and for what is no regular file; TypeError or
    ValueError for what is no path. What the block raises goes on unchanged.
    """
    target, mode = _target(path)
    _sweep(target.parent)
    with naming(path):
        folder, lock = _work_folder(target.parent)
    try:
        part = folder / target.name
        with naming(path):
            part.touch(0o666, exist_ok=False)
            mode = stat.S_IMODE(part.stat().st_mode) if mode is None else mode
        yield part
        with naming(path):
            part.chmod(mode)
            _sync(part)
            part.replace(target)
        with suppress(OSError):  # not every filesystem syncs folders
            _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises what `write_atomically` would at once: for the time before there is anything to write."""
    with suppress(_Enough), write_atomically(path):
        raise _Enough


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file, atomically: errors as `write_atomically`."""
    with write_atomically(path) as part, naming(path):
        part.write_bytes(data)


def make_folder(path: str | os.PathLike[str]) -> None:
    """Makes a folder and those above it, where they are missing: errors as `write_atomically`."""
    _confined(path, Path(os.path.realpath(path)))
    with naming(path):
        Path(path).mkdir(parents=True, exist_ok=True)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """The system's errors as a `WriteError` that names the file."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"cannot write {os.fspath(path)!r}: {error.strerror or error}") from error


@contextmanager
def exclusive(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Holds a folder, made where it is missing, against every other process and thread that asks for it so.

    Raises `WriteError` at once where another holds it. Where the filesystem knows no locks, nothing is held.
    """
    folder = Path(folder)
    make_folder(folder)
    with naming(folder):
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _take(lock) is False:
            raise WriteError(f"{os.fspath(folder)!r} is in use by another run; wait for it, or use another folder")
        _sweep(folder)
        yield
    finally:
        os.close(lock)


def _confined(path: str | os.PathLike[str], target: Path) -> None:
    if (reason := limits.outside(path, target)) is not None:
        raise WriteError(f"cannot write there: {reason}")


def _target(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """Where to write, links followed, and the permissions of what is there; None where nothing is."""
    try:
        name = os.fsdecode(path)
    except TypeError:
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}") from None
    if not name or "\0" in name:
        raise ValueError(f"cannot write {name!r}: the name {'holds a NUL character' if name else 'is empty'}")
    target = Path(os.path.realpath(name))
    _confined(name, target)
    with naming(name):
        try:
            found = os.stat(name)  # not of the target: a pipe's name in /proc leads nowhere
        except FileNotFoundError:
            if not target.parent.is_dir():
                given = Path(name).parent
                folder = os.fspath(target.parent if given.is_dir() else given)  # a link leads elsewhere
                raise WriteError(f"cannot write {name!r}: there is no folder {folder!r}; create it first") from None
            return target, None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise WriteError(f"cannot write {name!r}: what is there is {kind}; give the name of a file")
    if not os.access(target, os.W_OK):
        raise WriteError(f"cannot write {name!r}: it is write-protected; allow writing, or give another name")
    return target, stat.S_IMODE(found.st_mode)


def _work_folder(parent: Path) -> tuple[Path, int]:
    """A new folder to write in, and the open lock that keeps others from sweeping it away."""
    while True:
        folder = parent / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        folder.mkdir(0o700)
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # swept before it was locked
            continue
        if _take(lock) is not False and (folder / _LOCK).exists():
            return folder, lock
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Removes what processes that have ended left in a folder."""
    with suppress(OSError):
        for folder in list(parent.glob(f"{_PREFIX}*{_SUFFIX}")):
            with suppress(OSError):
                lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    if _take(lock):
                        shutil.rmtree(folder)
                finally:
                    os.close(lock)


def _take(lock: int) -> bool | None:
    """Whether the lock of an open file is now ours; None where the filesystem has no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
