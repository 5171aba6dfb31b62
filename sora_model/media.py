"""Video files in and out, frame by frame: memory does not grow with the length of a clip. On PyAV (FFmpeg).

    write_video("ball.mp4", frames, fps=8)          # frames: any iterable of uint8 [H,W,3], a generator too
    for frame in read_video("ball.mp4"): ...        # uint8 [H,W,3]
    probe("ball.mp4")                               # VideoInfo(width=64, height=64, frames=17, fps=8.0, ...)

Files are never trusted. They are opened by Python and handed to FFmpeg as bytes, so that no name can reach
FFmpeg's protocols ("concat:", "http:", a NUL byte); sizes are checked in the header before a frame is decoded
and again in every frame; and whatever the decoder raises arrives as ``MediaError``.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

__all__ = ["MAX_FRAMES", "MAX_PIXELS", "MediaError", "VideoInfo", "probe", "read_video", "write_video"]

MAX_PIXELS = 4096 * 2304
MAX_FRAMES = 7200
_MAX_SIDE = 16384
_MAX_STREAMS = 16
_SIZE_TAG = "sora_size"
_UNSPECIFIED = 2
# x264's output depends on its number of threads, which by default is that of the machine.
_ENCODER_THREADS = "4"
_CONTAINERS = ((4, b"ftyp", "mp4"), (0, b"\x1a\x45\xdf\xa3", "matroska"), (8, b"AVI ", "avi"))


class MediaError(ValueError):
    """A video file cannot be read or written; the message says which, why, and what to do."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file's header says; ``frames`` is None when it is not recorded, ``duration`` in seconds."""

    width: int
    height: int
    frames: int | None
    fps: float
    duration: float
    codec: str


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float = 8, *, crf: int = 18) -> Path:
    """Write frames to an H.264 MP4 (4:2:0, BT.709 limited range, tagged so) and return its path.

    frames: iterable of uint8 [H,W,3] sRGB, all of one size; consumed one at a time. fps > 0, kept as an exact
    fraction. crf: x264's quality, 0 (best) to 51.

    The file appears whole or not at all: it is written beside ``path`` and renamed over it at the end. When
    ``frames`` raises, or the run is interrupted, nothing stays behind, an older file at ``path`` is as it
    was, and the exception goes on unchanged. The path is tried before the first frame is asked for. The bytes
    of the file are not promised: x264 was seen to give another file for the same frames, once in a dozen runs.

    Odd sizes: 4:2:0 chroma needs even sides, and the 4:4:4 profile that does not plays in few browsers and
    phones. So an odd side is stored one pixel longer, the edge repeated, with the true size in the file's
    metadata: every player shows the clip, ``read_video`` and ``probe`` give back the size that was written.

    Raises MediaError for a path that cannot be written, no frames, or a failing encoder; ValueError or
    TypeError for other bad arguments.
    """
    rate = _rate(fps)
    if isinstance(crf, bool) or not isinstance(crf, int) or not 0 <= crf <= 51:
        raise ValueError(f"crf must be a whole number from 0 to 51, got {crf!r}")
    with _replacing(_target(path)) as (target, part):
        source = iter(frames)
        first = next(source, None)
        if first is None:
            raise MediaError(f"no frames to write to {_show(target)}; give at least one")
        _encode(target, part, _frame(first, None, 0), source, rate, crf)
    return target


def read_video(
    path: str | os.PathLike, *, max_pixels: int = MAX_PIXELS, max_frames: int = MAX_FRAMES
) -> Iterator[np.ndarray]:
    """Frames of a local video file (MP4, MOV, WebM, MKV, AVI), uint8 [H,W,3] sRGB, decoded as asked for.

    The file is opened and its header checked at the call. max_pixels (width x height) and max_frames are
    refusals, not truncations: a header that announces more raises before anything is decoded, a stream that
    brings more than announced raises there. Raises MediaError, also for a file that is cut short, too damaged
    to decode, or not a video.
    """
    _limit("max_pixels", max_pixels)
    _limit("max_frames", max_frames)
    file, container = _open(path, max_pixels)
    try:
        info = _inspect(path, file, container, max_pixels, max_frames)
    except BaseException:
        container.close()
        file.close()
        raise
    return _decode(path, file, container, info, max_pixels, max_frames)


def probe(path: str | os.PathLike) -> VideoInfo:
    """What the header of a video file says; no frame is decoded. Raises MediaError as ``read_video`` does."""
    file, container = _open(path, MAX_PIXELS)
    with file, container:
        return _inspect(path, file, container, None, None)


def _encode(target: Path, part: Path, first: np.ndarray, rest: Iterator[np.ndarray], rate: Fraction, crf: int) -> None:
    height, width = first.shape[:2]
    odd = height % 2, width % 2
    flags = "+faststart+use_metadata_tags" if any(odd) else "+faststart"
    failed = f"cannot write {_show(target)}: the encoder or the disk refused"
    with _as_media_error(failed):
        container = av.open(str(part), "w", format="mp4", options={"movflags": flags, "fflags": "+bitexact"})
    try:
        if any(odd):
            container.metadata[_SIZE_TAG] = f"{width}x{height}"
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "threads": _ENCODER_THREADS})
        stream.width, stream.height, stream.pix_fmt = width + odd[1], height + odd[0], "yuv420p"
        codec = stream.codec_context
        # 1 is BT.709 for the first three and limited range for the last, in the numbering of ITU-T H.273.
        codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1
        for index, image in enumerate(itertools.chain([first], rest)):
            image = np.pad(_frame(image, first, index), ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
            with _as_media_error(failed):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                picture.pts, picture.time_base = index, 1 / rate
                container.mux(stream.encode(picture))
        with _as_media_error(failed):
            container.mux(stream.encode())
            container.close()
    except BaseException:
        # Closing writes the end of a file that is about to be removed; the first failure is the one to tell.
        with suppress(Exception):
            container.close()
        raise


def _decode(path, file: BinaryIO, container, info: VideoInfo, max_pixels: int, max_frames: int) -> Iterator[np.ndarray]:
    with file, container:
        stream = container.streams.video[0]
        # The header may understate the size: the decoder itself refuses a larger picture.
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        stored, count = None, 0
        source = container.decode(stream)
        while True:
            with _as_media_error(f"cannot read {_show(path)}: it is damaged, or larger than max_pixels={max_pixels}"):
                picture = next(source, None)
                if picture is None:
                    break
                size = picture.width, picture.height
                if picture.is_corrupt:
                    raise MediaError(f"cannot read {_show(path)}: frame {count} is damaged")
                if size != (stored or size):
                    raise MediaError(
                        f"cannot read {_show(path)}: frame {count} is {size[0]}x{size[1]}, earlier ones are "
                        f"{stored[0]}x{stored[1]}"
                    )
                if count >= max_frames:
                    raise MediaError(f"{_show(path)} holds more than max_frames={max_frames} frames; raise the limit")
                stored = size
                untagged = picture.colorspace == _UNSPECIFIED and picture.height >= 720
                image = picture.to_ndarray(
                    format="rgb24", **({"src_colorspace": Colorspace.ITU709} if untagged else {})
                )
            count += 1
            yield np.ascontiguousarray(image[: info.height, : info.width])
        if count == 0:
            raise MediaError(f"cannot read {_show(path)}: it holds no frame that can be decoded")


def _open(path: str | os.PathLike, max_pixels: int):
    try:
        name = os.fspath(path)
    except TypeError:
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}") from None
    try:
        # O_NONBLOCK: opening a named pipe would otherwise wait for its writer, before it can be refused.
        handle = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise MediaError(f"cannot read {_show(path)}: {reason}; give the path of a local video file") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise MediaError(f"cannot read {_show(path)}: it is not a regular file")
    file = os.fdopen(handle, "rb")
    try:
        head = file.read(16)
        file.seek(0)
        kind = next((k for at, magic, k in _CONTAINERS if head[at : at + len(magic)] == magic), None)
        if kind is None:
            raise MediaError(
                f"cannot read {_show(path)}: "
                + ("it is empty" if not head else "it is not an MP4, MOV, WebM, MKV or AVI video")
            )
        with _as_media_error(f"cannot read {_show(path)}: it is cut short or damaged"):
            # FFmpeg decodes a few pictures to learn what the streams hold: they are under the limit too.
            return file, av.open(file, format=kind, stream_options=[{"max_pixels": str(max_pixels)}] * _MAX_STREAMS)
    except BaseException:
        file.close()
        raise


def _inspect(path, file: BinaryIO, container, max_pixels: int | None, max_frames: int | None) -> VideoInfo:
    with _as_media_error(f"cannot read {_show(path)}: its header is damaged"):
        if not container.streams.video:
            raise MediaError(f"cannot read {_show(path)}: it holds no video stream")
        stream = container.streams.video[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        if width < 1 or height < 1:
            raise MediaError(f"cannot read {_show(path)}: its header gives a size of {width}x{height}")
        if max_pixels is not None and width * height > max_pixels:
            raise MediaError(
                f"{_show(path)} is {width}x{height}, {width * height} pixels; the limit is "
                f"max_pixels={max_pixels}; raise it, or scale the video down"
            )
        frames = stream.frames or None
        if max_frames is not None and frames is not None and frames > max_frames:
            raise MediaError(
                f"{_show(path)} holds {frames} frames, the limit is max_frames={max_frames}; raise it, or cut the video"
            )
        end = os.fstat(file.fileno()).st_size
        if any(entry.pos + entry.size > end for entry in stream.index_entries):
            raise MediaError(f"cannot read {_show(path)}: it is cut short, its index points beyond its {end} bytes")
        rate = stream.average_rate or stream.guessed_rate
        fps = float(rate) if rate else 0.0
        if stream.duration and stream.time_base:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = container.duration / av.time_base if container.duration else 0.0
        tag = re.fullmatch(r"(\d{1,5})x(\d{1,5})", container.metadata.get(_SIZE_TAG, ""))
        if tag and 0 <= width - int(tag[1]) <= 1 and 0 <= height - int(tag[2]) <= 1:
            width, height = int(tag[1]), int(tag[2])
        return VideoInfo(width, height, frames, fps, duration, stream.codec_context.name)


def _rate(fps: float) -> Fraction:
    if isinstance(fps, bool) or not isinstance(fps, Real):
        raise TypeError(f"fps must be a number, got {type(fps).__name__}")
    if not math.isfinite(fps) or not 0.01 <= fps <= 1000:
        raise ValueError(f"fps must lie between 0.01 and 1000, got {fps}")
    return Fraction(fps).limit_denominator(1001)


def _limit(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")


def _frame(image, first: np.ndarray | None, index: int) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise TypeError(f"frame {index} must be uint8, got {image.dtype}; scale to 0..255 and round first")
    if image.ndim != 3 or image.shape[2] != 3 or not all(1 <= n <= _MAX_SIDE for n in image.shape[:2]):
        raise ValueError(
            f"frame {index} must be [H,W,3] with sides from 1 to {_MAX_SIDE}, got shape {list(image.shape)}"
        )
    if first is not None and image.shape != first.shape:
        raise ValueError(
            f"frame {index} is {image.shape[1]}x{image.shape[0]}, the first one is "
            f"{first.shape[1]}x{first.shape[0]}; all frames of a clip have one size"
        )
    return image


def _target(path: str | os.PathLike) -> Path:
    try:
        target = Path(os.fspath(path))
    except TypeError:
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}") from None
    if target.suffix.lower() != ".mp4":
        raise MediaError(f"cannot write {_show(path)}: the name must end in .mp4")
    if "\0" in str(target):
        raise MediaError(f"cannot write {_show(path)}: the name holds a NUL character")
    if not target.parent.is_dir():
        raise MediaError(f"cannot write {_show(path)}: there is no folder {str(target.parent)!r}; create it first")
    if target.exists() and not target.is_file():
        raise MediaError(f"cannot write {_show(path)}: something that is not a regular file is in its place")
    return target


@contextmanager
def _replacing(target: Path) -> Iterator[tuple[Path, Path]]:
    """A new file beside ``target``: takes its place when the block ends well, vanishes when it does not."""
    # An absolute path, so that no part of the name can be taken for a protocol.
    part = Path(os.path.abspath(target.parent)) / f".{secrets.token_hex(8)}.part"
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as e:
        raise MediaError(f"cannot write {_show(target)}: {e.strerror}") from None
    try:
        yield target, part
        try:
            os.replace(part, target)
        except OSError as e:
            raise MediaError(f"cannot write {_show(target)}: {e.strerror}") from None
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


@contextmanager
def _as_media_error(message: str) -> Iterator[None]:
    """FFmpeg's errors, and what else PyAV raises on damaged files (IndexError, ...), as MediaError."""
    try:
        yield
    except MediaError:
        raise
    except Exception as e:
        raise MediaError(f"{message} ({type(e).__name__}: {e})") from e


def _show(path) -> str:
    return repr(os.fspath(path))
