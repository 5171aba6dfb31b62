"""Video files in, frame by frame: what `media` offers as `probe` and `read_video`, and what both halves share.

Files are never trusted. They are opened by Python and handed to FFmpeg as bytes, so that no name can reach
FFmpeg's protocols ("concat:", "http:", a NUL byte); sizes are checked in the header before a frame is decoded
and again in every frame; `containers.Tally` compares what comes with what the container promises; and whatever the
decoder raises arrives as ``MediaError``.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any, BinaryIO

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video.reformatter import Colorspace

from .containers import DamagedError, Tally
from .safety import limits

SIZE_TAG = "sora_size"
_UNSPECIFIED = 2
_PICTURE = Disposition.attached_pic | Disposition.timed_thumbnails
_CONTAINERS = ((4, b"ftyp", "mp4"), (0, b"\x1a\x45\xdf\xa3", "matroska"), (8, b"AVI ", "avi"))


class MediaError(ValueError):
    """A video file cannot be read or written; the message says which, why, and what to do."""


class NoVideoError(MediaError):
    """A file is none of the containers that are read."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds. Width and height are those of the frames, after the turn that the file asks for.

    frames        None where the file does not count them
    fps           the average, 0 where there is none; duration in seconds
    pixel_aspect  a pixel's width over its height
    left_out      what is not read: ("1 cover picture", "2 audio streams", ...)
    """

    width: int
    height: int
    frames: int | None
    fps: float
    duration: float
    codec: str
    pixel_aspect: Fraction = Fraction(1)
    left_out: tuple[str, ...] = ()


def read_video(
    path: str | os.PathLike, *, max_pixels: int | None = None, max_frames: int | None = None, times: bool = False
) -> Iterator[Any]:
    """Frames of a local video file (MP4, MOV, WebM, MKV, AVI), uint8 [H,W,3] sRGB, decoded as asked for.

    Of several video streams the one marked as default is read, else the first; a cover picture never. The quarter
    turns and mirrors that the file asks of a player are applied. Pixels that are not square stay as they are stored
    (`VideoInfo.pixel_aspect`), and so do frame rates that vary: with ``times``, what comes is (seconds, frame), the
    seconds a Fraction from the first frame on. Times that are as even as the file can tell are exactly even; a frame
    without one, or not later than the one before, follows that at 1 / `VideoInfo.fps`.

    The file is opened, its header checked and its first picture decoded at the call. max_pixels (width x height) and
    max_frames, by default `safety.limits.Limits.read_pixels` and `read_frames`, are refusals, not truncations: a header
    that announces more raises before anything is decoded, a stream that brings more than announced raises there.
    Raises MediaError, also for a file that is cut short, too damaged
    to decode, or not a video: at the call, or where the damage is met, at the latest after the last frame.
    """
    most = limits.current()
    max_pixels = most.read_pixels if max_pixels is None else max_pixels
    max_frames = most.read_frames if max_frames is None else max_frames
    _limit("max_pixels", max_pixels)
    _limit("max_frames", max_frames)
    source = _Source(path, max_pixels, max_frames)
    return source.frames() if times else (frame for _, frame in source.frames())


def probe(path: str | os.PathLike) -> VideoInfo:
    """What a video file holds: its header is read, and its first picture. Raises MediaError as ``read_video`` does."""
    source = _Source(path, limits.current().read_pixels, None)
    source.close()
    return source.info


class _Source:
    """An open video file, its first picture decoded."""

    def __init__(self, path: str | os.PathLike, max_pixels: int, max_frames: int | None) -> None:
        self.path, self.max_pixels, self.max_frames = path, max_pixels, max_frames
        self.file, self.container, kind = _open(path, max_pixels)
        try:
            with self.errors("its header is damaged"):
                self.stream = _choose(path, self.container)
                self.check_size(self.stream.codec_context.width, self.stream.codec_context.height)
                self.tally = Tally(self.file.fileno(), kind, self.container, self.stream)
                if max_frames is not None and (self.tally.frames or 0) > max_frames:
                    raise MediaError(
                        f"{show(path)} holds {self.tally.frames} frames, the limit is max_frames={max_frames}; raise "
                        "it, or cut the video"
                    )
                rate = self.stream.average_rate or self.stream.guessed_rate
                self.interval = 1 / rate if rate else Fraction(1, 24)
                self.times: deque[int] = deque()
                # In an AVI only the order of decoding has times, one for each picture.
                self.untimed = kind == "avi"
            self.pictures = self.decode()
            self.first = next(self.pictures, None)
            if self.first is None:
                raise MediaError(f"cannot read {show(path)}: it holds no frame that can be decoded")
            with self.errors("its header is damaged"):
                self.turn = _turn(self.first)
                self.info = self.describe(float(rate or 0))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.container.close()
        self.file.close()

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        with as_media_error(f"cannot read {show(self.path)}: {what}"):
            try:
                yield
            except DamagedError as e:
                raise MediaError(f"cannot read {show(self.path)}: it is {e}") from None

    def check_size(self, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise MediaError(f"cannot read {show(self.path)}: its header gives a size of {width}x{height}")
        if width * height > self.max_pixels:
            raise MediaError(
                f"{show(self.path)} is {width}x{height}, {width * height} pixels; the limit is "
                f"max_pixels={self.max_pixels}; raise it, or scale the video down"
            )

    def describe(self, fps: float) -> VideoInfo:
        container, stream = self.container, self.stream
        width, height = stream.codec_context.width, stream.codec_context.height
        tag = re.fullmatch(r"(\d{1,5})x(\d{1,5})", container.metadata.get(SIZE_TAG, ""))
        if tag and 0 <= width - int(tag[1]) <= 1 and 0 <= height - int(tag[2]) <= 1:
            width, height = int(tag[1]), int(tag[2])
        self.stored = height, width
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        if not Fraction(1, 100) <= aspect <= 100:
            raise MediaError(f"cannot read {show(self.path)}: its header gives pixels of the shape {aspect}")
        if self.turn[0]:
            width, height, aspect = height, width, 1 / aspect
        if stream.duration and stream.time_base:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = container.duration / av.time_base if container.duration else 0.0
        name = stream.codec_context.name
        return VideoInfo(width, height, self.tally.frames, fps, duration, name, aspect, _left_out(container, stream))

    def decode(self) -> Iterator[av.VideoFrame]:
        """The stream's pictures, each checked, and the end of the stream."""
        # The header may understate the size: the decoder itself refuses a larger picture.
        self.stream.codec_context.options = {"max_pixels": str(self.max_pixels)}
        size, count, interlaced, packets = None, 0, False, self.container.demux(self.stream)
        while True:
            with self.errors(f"it is damaged, or larger than max_pixels={self.max_pixels}"):
                packet = next(packets, None)
                if packet is None:
                    break
                if self.tally.add(packet) and self.untimed and packet.dts is not None:
                    self.times.append(packet.dts)
                pictures = packet.decode()
            for picture in pictures:
                if picture.is_corrupt:
                    raise MediaError(f"cannot read {show(self.path)}: frame {count} is damaged")
                now = picture.width, picture.height
                if now != (size or now):
                    raise MediaError(
                        f"cannot read {show(self.path)}: frame {count} is {now[0]}x{now[1]}, earlier ones are "
                        f"{size[0]}x{size[1]}"
                    )
                if self.max_frames is not None and count >= self.max_frames:
                    raise MediaError(
                        f"{show(self.path)} holds more than max_frames={self.max_frames} frames; raise the limit"
                    )
                size, interlaced = now, interlaced or picture.interlaced_frame
                count += 1
                yield picture
        with self.errors("it is damaged"):
            self.tally.check(count, interlaced)

    def frames(self) -> Iterator[tuple[Fraction, np.ndarray]]:
        """(seconds, frame) of each picture."""
        start = last = None
        with self.file, self.container:
            for picture in itertools.chain([self.first], self.pictures):
                self.first = None
                stamp = self.times.popleft() if self.untimed and self.times else picture.pts
                with self.errors("it is damaged"):
                    image = self.image(picture)
                del picture
                if start is None:
                    start = stamp or 0
                seconds = self.even(None if stamp is None else (stamp - start) * self.stream.time_base, last)
                yield seconds, image
                last = seconds

    def even(self, seconds: Fraction | None, last: Fraction | None) -> Fraction:
        """A time that lies within the file's own rounding of the even grid is put on it."""
        if last is None:
            return Fraction(0)
        if seconds is not None:
            on_grid = round(seconds / self.interval) * self.interval
            if abs(on_grid - seconds) <= self.stream.time_base and on_grid > last:
                return on_grid
        return seconds if seconds is not None and seconds > last else last + self.interval

    def image(self, picture: av.VideoFrame) -> np.ndarray:
        untagged = picture.colorspace == _UNSPECIFIED and picture.height >= 720
        image = picture.to_ndarray(format="rgb24", **({"src_colorspace": Colorspace.ITU709} if untagged else {}))
        image = image[: self.stored[0], : self.stored[1]]
        transpose, down, right = self.turn
        if transpose:
            image = image.swapaxes(0, 1)
        return np.ascontiguousarray(image[::down, ::right])


def _open(path: str | os.PathLike, max_pixels: int) -> tuple[BinaryIO, Any, str]:
    try:
        name = os.fspath(path)
    except TypeError:
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}") from None
    try:
        # O_NONBLOCK: opening a named pipe would otherwise wait for its writer, before it can be refused.
        handle = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise MediaError(f"cannot read {show(path)}: {reason}; give the path of a local video file") from None
    found, most = os.fstat(handle), limits.current().read_bytes
    if not stat.S_ISREG(found.st_mode) or found.st_size > most:
        os.close(handle)
        what = "is not a regular file" if not stat.S_ISREG(found.st_mode) else (
            f"has {found.st_size} bytes, and the limits allow read_bytes={most}"
        )
        raise MediaError(f"cannot read {show(path)}: it {what}")
    file = os.fdopen(handle, "rb")
    try:
        head = file.read(16)
        file.seek(0)
        kind = next((k for at, magic, k in _CONTAINERS if head[at : at + len(magic)] == magic), None)
        if kind is None:
            if not head:
                raise MediaError(f"cannot read {show(path)}: it is empty")
            raise NoVideoError(f"cannot read {show(path)}: it is not an MP4, MOV, WebM, MKV or AVI video")
        with as_media_error(f"cannot read {show(path)}: it is cut short or damaged"):
            # FFmpeg decodes a few pictures to learn what the streams hold: those of every stream are under the limit.
            return file, av.open(file, format=kind, options={"max_pixels": str(max_pixels)}), kind
    except BaseException:
        file.close()
        raise


def _choose(path, container):
    """The stream to read: the video marked as default, else the first one; never a picture that is attached."""
    videos = [s for s in container.streams.video if not s.disposition & _PICTURE]
    if not videos:
        holds = "only a cover picture" if container.streams.video else "no video stream"
        raise MediaError(f"cannot read {show(path)}: it holds {holds}")
    return next((s for s in videos if s.disposition & Disposition.default), videos[0])


def _left_out(container, chosen) -> tuple[str, ...]:
    """What else a file holds: ("1 cover picture", "2 audio streams", ...)."""
    kinds = Counter(
        "cover picture" if s.type == "video" and s.disposition & _PICTURE else f"{s.type or 'unknown'} stream"
        for s in container.streams
        if s.index != chosen.index
    )
    return tuple(f"{count} {kind}{'s' * (count > 1)}" for kind, count in kinds.items())


def _turn(picture: av.VideoFrame) -> tuple[bool, int, int]:
    """(whether to transpose, the step down, the step to the right) that a picture's display matrix asks for."""
    data = next((d for d in picture.side_data if d.type == SideDataType.DISPLAYMATRIX), None)
    if data is None:
        return False, 1, 1
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    most = max(map(abs, (a, b, c, d)))
    a, b, c, d = (0 if abs(value) <= most / 1000 else 1 if value > 0 else -1 for value in (a, b, c, d))
    if a and d and not (b or c):
        return False, d, a
    if b and c and not (a or d):
        return True, b, c
    raise DamagedError(f"to be turned by {abs(picture.rotation)} degrees, and only quarter turns can be; transcode it")


def _limit(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")


@contextmanager
def as_media_error(message: str) -> Iterator[None]:
    """FFmpeg's errors, and what else PyAV raises on damaged files (IndexError, ...), as MediaError."""
    try:
        yield
    except MediaError:
        raise
    except Exception as e:
        raise MediaError(f"{message} ({type(e).__name__}: {e})") from e


def show(path) -> str:
    return repr(os.fspath(path))
