"""What is done to a file to hide what made it, or to have it taken for what it is not. In a folder and with a key of
its own: nothing of the user's is touched."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ... import media, world
from .. import certificates, credentials, store, watermark
from ..credentials import ALTERED, NONE, TRUSTED, Input, Origin

ATTACKS: dict[tuple[str, str], Callable[[], str]] = {}


def _attack(group: str) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    def kept(attack: Callable[[Path], str]) -> Callable[[Path], str]:
        @functools.wraps(attack)
        def run() -> str:
            with _elsewhere() as folder:
                return attack(folder)

        ATTACKS[group, attack.__name__.replace("_", " ")] = run
        return attack

    return kept


@contextlib.contextmanager
def _elsewhere() -> Iterator[Path]:
    before, own = os.environ.get(certificates.VARIABLE), certificates._own
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        home = Path(folder) / "home"
        home.mkdir()
        (home / "watermark.key").write_bytes(b"red team" * 4)  # what comes of it is no matter of chance
        (home / "watermark.key").chmod(0o600)
        os.environ[certificates.VARIABLE] = str(home)
        certificates.use(None)
        try:
            yield Path(folder)
        finally:
            certificates._own = own
            os.environ.pop(certificates.VARIABLE)
            if before is not None:
                os.environ[certificates.VARIABLE] = before


@functools.lru_cache(8)
def _frames(seed: int) -> np.ndarray:
    return np.asarray(world.sample(seed, frames=9, size=(128, 128)).video)


def _signed(folder: Path, seed: int = 1) -> Path:
    origin = Origin.of(None, prompt="a ball", seed=seed)
    return media.write_video(folder / f"{seed}.mp4", _frames(seed), origin=origin)


def _read(path: Path) -> np.ndarray:
    return np.stack(list(media.read_video(path)))


def _told(held: bool, what: object) -> str:
    return f"{'held' if held else 'through'}: {what}"


def _found(frames: np.ndarray, seed: int = 1) -> str:
    """Whether the record is found again by the pixels."""
    mark = watermark.detect(frames)
    identity = mark.identity(store.identities())
    wanted = Origin.of(None, prompt="a ball", seed=seed).identity
    return _told(identity == wanted, f"z {mark.z:.1f}, " + ("its record" if identity == wanted else "no record"))


def _stripped(change: Callable[[np.ndarray], np.ndarray], crf: int = 23) -> Callable[[Path], str]:
    def attack(folder: Path) -> str:
        made = _read(_signed(folder))
        _signed(folder, 2)
        path = media.write_video(folder / "stripped.mp4", change(made), crf=crf)
        if (answer := credentials.verify(path).answer) != NONE:
            return _told(False, answer)
        return _found(_read(path))

    return attack


for _name, _change, _crf in (
    ("encoded anew", lambda f: f, 23),
    ("encoded coarsely", lambda f: f, 30),
    ("cut", lambda f: f[:, 10:-10, 10:-10], 23),
    ("mirrored", lambda f: f[:, :, ::-1], 23),
    ("darkened", lambda f: f // 2, 23),
    ("every third frame", lambda f: f[::3], 23),
    ("half the size", lambda f: np.ascontiguousarray(f[:, ::2, ::2]), 23),
    ("turned by a quarter", lambda f: f.swapaxes(1, 2), 23),
):
    _stripped_attack = _stripped(_change, _crf)
    _stripped_attack.__name__ = _name
    _attack("stripped")(_stripped_attack)


def _altered(path: Path) -> Path:
    """The same file, with another last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


@_attack("forged")
def one_byte_of_the_picture(folder: Path) -> str:
    path = _altered(_signed(folder))
    answer = credentials.verify(path).answer
    return _told(answer == ALTERED, answer)


@_attack("forged")
def another_seed_in_the_record(folder: Path) -> str:
    path = _signed(folder)
    data = path.read_bytes()
    at = data.index(b"seed")
    path.write_bytes(data[: at + 4] + bytes([data[at + 4] ^ 3]) + data[at + 5 :])
    answer = credentials.verify(path).answer
    return _told(answer == ALTERED, answer)


@_attack("forged")
def a_record_on_another_clip(folder: Path) -> str:
    one, other = (_signed(folder, seed).read_bytes() for seed in (1, 2))
    box = one.index(b"uuid") - 4
    size = int.from_bytes(one[box : box + 4], "big")
    there = other.index(b"uuid") - 4
    own = int.from_bytes(other[there : there + 4], "big")
    path = folder / "spliced.mp4"
    path.write_bytes(other[:there] + one[box : box + size] + other[there + own :])
    answer = credentials.verify(path).answer
    return _told(answer == ALTERED, answer)


@_attack("forged")
def signed_by_another(folder: Path) -> str:
    anchors = certificates.current().anchors  # made where there is none
    os.environ[certificates.VARIABLE] = str(folder / "stranger")
    path = _signed(folder)
    answer = credentials.verify(path, anchors=anchors).answer
    return _told(answer == credentials.UNKNOWN, answer)


@_attack("forged")
def bytes_behind_the_end(folder: Path) -> str:
    path = _signed(folder)
    path.write_bytes(path.read_bytes() + (16).to_bytes(4, "big") + b"freehidden!!")
    answer = credentials.verify(path).answer
    return _told(answer != TRUSTED, answer)


@_attack("forged")
def the_mark_of_many_clips_on_a_stranger(folder: Path) -> str:
    rest = sum(_read(_signed(folder, seed)).astype(float) - _frames(seed) for seed in range(3, 9)) / 6
    other = np.clip(_frames(20) + rest.mean(0), 0, 255).astype(np.uint8)
    found = watermark.detect(other)
    return _told(not found.present, f"z {found.z:.1f}, taken for ours" if found.present else f"z {found.z:.1f}")


@_attack("forged")
def a_parent_that_was_altered(folder: Path) -> str:
    parent = _altered(_signed(folder))
    child = media.write_video(folder / "child.mp4", _frames(2), origin=Origin({"seed": 2}, (Input.of(parent),)))
    altered = [one.name for one in credentials.verify(child).altered_inputs()]
    return _told(altered == ["1.mp4"], f"altered: {', '.join(altered) or 'none'}")


@_attack("forged")
def the_history_inside_a_signed_file(folder: Path) -> str:
    child = media.write_video(folder / "a.mp4", _frames(2), origin=Origin({"seed": 2}, (Input.of(_signed(folder)),)))
    source = b"trainedAlgorithmicMedia"  # of the parent: the child's is a composite
    child.write_bytes(child.read_bytes().replace(b"/" + source, b"/" + b"digitalCapture".ljust(len(source), b"_")))
    answer = credentials.verify(child).answer
    return _told(answer == ALTERED, answer)


@_attack("forged")
def a_parent_that_was_swapped(folder: Path) -> str:
    parent = _signed(folder)
    given = Input.of(parent)
    _signed(folder, 2).replace(parent)
    child = media.write_video(folder / "child.mp4", _frames(3), origin=Origin({"seed": 3}, (given,)))
    verdict = credentials.verify(child)
    named = [one["sha256"] for one in verdict.actions[-1]["parameters"]["inputs"]]
    return _told(not verdict.inputs and named == [given.sha256], f"{len(verdict.inputs)} inputs, by hash {len(named)}")


@_attack("forged")
def signed_again_without_its_history(folder: Path) -> str:
    """Whoever has the key can leave the history out."""
    parent = _signed(folder)
    child = media.write_video(folder / "child.mp4", media.read_video(parent), origin=Origin({"seed": 9}))
    verdict = credentials.verify(child)
    return _told(bool(verdict.inputs) or verdict.answer != TRUSTED, f"{verdict.answer}, {len(verdict.inputs)} inputs")


@_attack("forged")
def an_unmarked_clip(folder: Path) -> str:
    found = watermark.detect(_frames(1))
    return _told(not found.present, f"z {found.z:.1f}")
