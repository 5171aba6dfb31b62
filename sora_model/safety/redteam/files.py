"""Files that are no files, and names that lead elsewhere: each is to end in one error, and nothing else."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from ... import media
from ...checkpoint import CheckpointError, read_tensors
from ...files import WriteError, write_bytes
from ...verbs import _read as read_given
from .. import limits
from ..limits import Limits

ATTACKS: dict[tuple[str, str], Callable[[], str]] = {}
_CLIP = np.zeros((5, 32, 32, 3), np.uint8)
_MUTANTS = 60


@contextlib.contextmanager
def _inside() -> Iterator[Path]:
    """A new folder, as the working one."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def _refused(group: str, name: str, *errors: type[Exception]) -> Callable[[Callable[[Path], object]], None]:
    """An attack that is to raise one of `errors`."""

    def kept(attack: Callable[[Path], object]) -> None:
        def run() -> str:
            with _inside() as folder:
                try:
                    attack(folder)
                except errors as error:
                    return f"held: {type(error).__name__}"
                except Exception as error:
                    return f"through: {type(error).__name__}: {error}"
                return "through: taken"

        ATTACKS[group, name] = run

    return kept


def _video(path: Path) -> list[np.ndarray]:
    return list(media.read_video(path))


def _named(name: str) -> Callable[[Path], object]:
    def attack(folder: Path) -> object:
        media.write_video(folder / "a.mp4", _CLIP)
        return _video(name)

    return attack


for _name in ("concat:a.mp4|a.mp4", "file:a.mp4", "a.mp4\0.txt", "http://127.0.0.1/a.mp4", "/dev/zero", "."):
    _refused("names", repr(_name), media.MediaError)(_named(_name))


@_refused("disguised", "a list of files as MP4", media.MediaError)
def _list(folder: Path) -> object:
    media.write_video(folder / "a.mp4", _CLIP)
    (folder / "b.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    return _video(folder / "b.mp4")


@_refused("disguised", "a playlist as MP4", media.MediaError)
def _playlist(folder: Path) -> object:
    (folder / "b.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")
    return _video(folder / "b.mp4")


@_refused("disguised", "PostScript as an image", media.MediaError)
def _postscript(folder: Path) -> object:
    (folder / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return read_given(folder / "a.png", 8)


@_refused("disguised", "a pickle as safetensors", CheckpointError)
def _pickle(folder: Path) -> object:
    class Payload:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(folder / "run"),)

    (folder / "a.safetensors").write_bytes(pickle.dumps(Payload()))
    try:
        return read_tensors(folder / "a.safetensors")
    finally:
        if (folder / "run").exists():
            raise RuntimeError("its code was run")


@_refused("bombs", "a picture of 10^9 pixels", media.MediaError)
def _picture(folder: Path) -> object:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (32_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    lines = chunk(b"IDAT", zlib.compress(bytes(4001)))
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + lines + chunk(b"IEND", b""))
    return read_given(folder / "a.png", 8)


@_refused("bombs", "a video larger than its header says", media.MediaError)
def _header(folder: Path) -> object:
    path = media.write_video(folder / "a.mp4", np.zeros((2, 512, 512, 3), np.uint8))
    limits.use(Limits(read_pixels=128 * 128))
    data = path.read_bytes()
    path.write_bytes(data.replace((512).to_bytes(2, "big") * 2, (64).to_bytes(2, "big") * 2))
    try:
        return _video(path)
    finally:
        limits.use(None)


@_refused("bombs", "a zip of zeros as MP4", media.MediaError)
def _zip(folder: Path) -> object:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(1 << 20))
    (folder / "a.mp4").write_bytes(held.getvalue())
    return _video(folder / "a.mp4")


@_refused("bombs", "safetensors that promise 2^62 bytes", CheckpointError)
def _promise(folder: Path) -> object:
    header = b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}'
    (folder / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return read_tensors(folder / "a.safetensors")


@_refused("bombs", "safetensors of NaN", CheckpointError)
def _nan(folder: Path) -> object:
    safetensors.torch.save_file({"a": torch.full((4,), float("nan"))}, folder / "a.safetensors")
    return read_tensors(folder / "a.safetensors")


def _escaping(name: str) -> Callable[[Path], object]:
    def attack(folder: Path) -> object:
        (folder / "in").mkdir()
        (folder / "in" / "link").symlink_to(folder)
        (folder / "in" / "file").symlink_to(folder / "target")
        limits.use(Limits(folder=folder / "in"))
        try:
            return write_bytes(folder / "in" / name, b"")
        finally:
            limits.use(None)

    return attack


for _name in ("../a", "link/a", "file", "/tmp/sora-redteam", "link/in/../b", "a\0b"):
    _refused("outside of the folder", repr(_name), WriteError, ValueError)(_escaping(_name))


def _mutants(make: Callable[[Path], Path], read: Callable[[Path], object], error: type[Exception]) -> None:
    """Random changes of a good file: read all the same, or refused by one error."""
    drawn = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = make(Path(folder))
        whole = path.read_bytes()
        for _ in range(_MUTANTS):
            data = bytearray(whole)
            for _ in range(drawn.randint(1, 8)):
                data[drawn.randrange(len(data))] = drawn.randrange(256)
            path.write_bytes(data[: drawn.randrange(1, len(data))] if drawn.random() < 0.3 else data)
            with contextlib.suppress(error):
                read(path)


def _mutated(name: str, make: Callable, read: Callable, error: type[Exception]) -> None:
    def run() -> str:
        try:
            _mutants(make, read, error)
        except Exception as other:
            return f"through: {type(other).__name__}: {other}"
        return f"held: {_MUTANTS} of them read or refused"

    ATTACKS["mutated", name] = run


def _tensors(folder: Path) -> Path:
    safetensors.torch.save_file({"a": torch.zeros(4, 4), "b": torch.ones(3)}, folder / "a.safetensors")
    return folder / "a.safetensors"


_mutated("MP4", lambda folder: media.write_video(folder / "a.mp4", _CLIP), _video, media.MediaError)
_mutated("safetensors", _tensors, read_tensors, CheckpointError)
