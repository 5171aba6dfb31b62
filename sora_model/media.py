"""Video files in and out, frame by frame: memory does not grow with the length of a clip. On PyAV (FFmpeg).

    write_video("ball.mp4", frames, fps=8)          # frames: any iterable of uint8 [H,W,3], a generator too
    for frame in read_video("ball.mp4"): ...        # uint8 [H,W,3]
    probe("ball.mp4")                               # VideoInfo(width=64, height=64, frames=17, fps=8.0, ...)

Writing is here, reading in `reader`.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from .files import check_writable, write_atomically
from .reader import SIZE_TAG, MediaError, VideoInfo, as_media_error, probe, read_video, show
from .safety.credentials import Origin, mark, sealer

__all__ = ["MediaError", "VideoInfo", "check_target", "probe", "read_video", "video_bytes", "write_video"]

_MAX_SIDE = 16384
# x264's output depends on its number of threads, which by default is that of the machine.
_ENCODER_THREADS = "4"


def write_video(
    path: str | os.PathLike,
    frames: Iterable[np.ndarray],
    fps: float = 8,
    *,
    crf: int = 18,
    times: Iterable[Fraction | float] | None = None,
    pixel_aspect: Fraction | float = 1,
    origin: Origin | None = None,
) -> Path:
    """Write frames to an H.264 MP4 (4:2:0, BT.709 limited range, tagged so) and return its path.

    frames        iterable of uint8 [H,W,3] sRGB, all of one size; consumed one at a time
    fps           > 0, kept as an exact fraction: frame i is shown at i / fps
    crf           x264's quality, 0 (best) to 51
    times         for a rate that varies: the seconds of each frame, increasing, read along with the frames (an item
                  after its frame); what is finer than 1/90000 s and off the grid of fps is rounded. The last frame
                  stays for 1 / fps
    pixel_aspect  the width of a pixel over its height, for a player to stretch the picture by
    origin        what made it: the file is signed with that (`safety.credentials`), last of all, and the frames of a
                  model are marked with it (`safety.watermark`)

    The file appears whole or not at all, as `files.write_atomically` has it: when ``frames`` raises, or the run is
    interrupted, nothing stays behind, an older file at ``path`` is as it was, and the exception goes on unchanged. The
    path is tried before the first frame is asked for. The bytes of the file are not promised: x264 was seen to give
    another file for the same frames, once in a dozen runs.

    Odd sizes: 4:2:0 chroma needs even sides, and the 4:4:4 profile that does not plays in few browsers and
    phones. So an odd side is stored one pixel longer, the edge repeated, with the true size in the file's
    metadata: every player shows the clip, ``read_video`` and ``probe`` give back the size that was written.

    Raises `files.WriteError` for a path that cannot be written, MediaError for a name that is no MP4's, no frames, or
    a failing encoder; ValueError or TypeError for other bad arguments.
    """
    rate, aspect = _rate(fps), _aspect(pixel_aspect)
    if isinstance(crf, bool) or not isinstance(crf, Integral) or not 0 <= crf <= 51:
        raise ValueError(f"crf must be a whole number from 0 to 51, got {crf!r}")
    check_target(path)
    with write_atomically(path) as part:
        _write(path, part, frames, rate, crf, times, aspect, origin)
    return Path(path)


def video_bytes(frames: Iterable[np.ndarray], fps: float = 8, *, origin: Origin | None = None) -> bytes:
    """What `write_video` would write, for a page."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "clip.mp4"
        _write(part, part, frames, _rate(fps), 18, None, Fraction(1), origin)
        return part.read_bytes()


def _write(path, part: Path, frames, rate: Fraction, crf: int, times, aspect: Fraction, origin: Origin | None) -> None:
    seal = None if origin is None else sealer(Path(os.fsdecode(path)).name)
    source = iter(frames)
    first = next(source, None)
    if first is None:
        raise MediaError(f"no frames to write to {show(path)}; give at least one")
    shape = _frame(first, None, 0).shape
    images = (_frame(image, shape, i) for i, image in enumerate(itertools.chain([first], source)))
    _encode(path, part, shape, mark(images, origin), _stamps(rate, times), rate, crf, aspect)
    if seal is not None:
        seal(part, origin)


def check_target(path: str | os.PathLike) -> None:
    """Raises what `write_video` does for a path that it cannot write, before there are frames."""
    check_writable(path)
    if not os.fsdecode(path).lower().endswith(".mp4"):
        raise MediaError(f"cannot write {show(path)}: the name must end in .mp4")


def _encode(path, part: Path, shape, images, stamps, rate: Fraction, crf: int, aspect: Fraction) -> None:
    height, width = shape[:2]
    odd = height % 2, width % 2
    tick, stamps = stamps
    flags = "+faststart+use_metadata_tags" if any(odd) else "+faststart"
    failed = f"cannot write {show(path)}: the encoder or the disk refused"
    with as_media_error(failed):
        container = av.open(str(part), "w", format="mp4", options={"movflags": flags, "fflags": "+bitexact"})
    try:
        if any(odd):
            container.metadata[SIZE_TAG] = f"{width}x{height}"
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "threads": _ENCODER_THREADS})
        stream.width, stream.height, stream.pix_fmt = width + odd[1], height + odd[0], "yuv420p"
        codec = stream.codec_context
        codec.time_base, codec.sample_aspect_ratio = tick, aspect
        # 1 is BT.709 for the first three and limited range for the last, in the numbering of ITU-T H.273.
        codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1
        for image in images:
            image = np.pad(image, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
            stamp = next(stamps)
            with as_media_error(failed):
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                picture.pts, picture.time_base = stamp, tick
                container.mux(stream.encode(picture))
        with as_media_error(failed):
            container.mux(stream.encode())
            container.close()
    except BaseException:
        # Closing writes the end of a file that is about to be removed; the first failure is the one to tell.
        with suppress(Exception):
            container.close()
        raise


def _stamps(rate: Fraction, times: Iterable[Fraction | float] | None) -> tuple[Fraction, Iterator[int]]:
    """(unit, whole numbers of it): when each frame is shown."""
    if times is None:
        return 1 / rate, itertools.count()
    tick = Fraction(1, rate.numerator * -(-90_000 // rate.numerator))

    def stamps() -> Iterator[int]:
        last, index = -1, -1
        for index, time in enumerate(times):
            if isinstance(time, bool) or not isinstance(time, Real) or not 0 <= time < 1e6:
                raise ValueError(f"times: that of frame {index} must be seconds from 0 to 1e6, got {time!r}")
            stamp = round(Fraction(time) / tick)
            if stamp <= last:
                raise ValueError(f"times must increase, but frame {index} comes at {float(time)} s, not after the last")
            yield (last := stamp)
        raise ValueError(f"times holds {index + 1} times, and there are more frames")

    return tick, stamps()


def _rate(fps: float) -> Fraction:
    if isinstance(fps, bool) or not isinstance(fps, Real):
        raise TypeError(f"fps must be a number, got {type(fps).__name__}")
    if not math.isfinite(fps) or not 0.01 <= fps <= 1000:
        raise ValueError(f"fps must lie between 0.01 and 1000, got {fps}")
    return Fraction(float(fps)).limit_denominator(1001)


def _aspect(value: Fraction | float) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"pixel_aspect must be a number, got {type(value).__name__}")
    if not 0.01 <= value <= 100:
        raise ValueError(f"pixel_aspect must lie between 0.01 and 100, got {value}")
    return Fraction(value).limit_denominator(500)


def _frame(image, shape: tuple[int, ...] | None, index: int) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise TypeError(f"frame {index} must be uint8, got {image.dtype}; scale to 0..255 and round first")
    if image.ndim != 3 or image.shape[2] != 3 or not all(1 <= n <= _MAX_SIDE for n in image.shape[:2]):
        raise ValueError(
            f"frame {index} must be [H,W,3] with sides from 1 to {_MAX_SIDE}, got shape {list(image.shape)}"
        )
    if shape is not None and image.shape != shape:
        raise ValueError(
            f"frame {index} is {image.shape[1]}x{image.shape[0]}, the first one is "
            f"{shape[1]}x{shape[0]}; all frames of a clip have one size"
        )
    return image
