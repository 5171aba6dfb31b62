"""A video file through the VAE: to latents, or to latents and back, chunk by chunk, however long it is.

    vae = load_vae("toy")
    for mean in encode_file(vae, "in.mp4"): ...      # [1, z_dim, 1, H/8, W/8]
    reconstruct(vae, "in.mp4", "out.mp4").psnr       # what the VAE loses, in dB
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import estimate, machine, media, wan
from .checkpoint import CheckpointError, read_json, read_part
from .frames import to_pixels, to_video
from .machine import TooLargeError, choose_device, gib
from .pipeline import TOY
from .safety import filters, limits
from .safety.credentials import Input, Origin
from .tiling import Tile
from .vae import CausalVAE, VAEConfig

EXTRA = ("refuse", "pad", "trim")


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` wrote; `psnr` in dB over all frames, infinite where they are the same.

    `left_out` names what of the source is not in it, such as ("1 audio stream",).
    """

    path: Path
    frames: int
    psnr: float
    left_out: tuple[str, ...] = ()


def load_vae(source: str | os.PathLike[str] = "toy", *, device: str | torch.device | None = None) -> CausalVAE:
    """The VAE of a checkpoint folder, "toy" or one that `Sora.from_pretrained` takes; no other part is read.

    In fp32, without gradients. Raises `CheckpointError` for what is missing, damaged or of another model.
    """
    folder, device = TOY if os.fspath(source) == "toy" else Path(source), choose_device(device)
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}; give one that holds model_index.json, or 'toy'")
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind not in ("Sora", *wan.PIPELINES):
        raise CheckpointError(f"{folder} is a checkpoint of {kind!r}; supported are 'Sora' and those of Wan")
    own = kind == "Sora"
    vae = read_part(folder / "vae", CausalVAE, VAEConfig) if own else CausalVAE.from_wan(folder / "vae")
    vae.folder = folder
    return vae.to(device, torch.float32).eval().requires_grad_(False)


def remarks(path: str | os.PathLike[str], vae: CausalVAE, source: str | os.PathLike[str]) -> Iterator[str]:
    """What is worth knowing of a video file before it is sent through the VAE of the checkpoint `source`."""
    info, folder = media.probe(path), TOY if os.fspath(source) == "toy" else Path(source)
    if read_json(folder / "model_index.json").get("_class_name") == "Sora":
        yield "this VAE was trained on clips of the procedural world alone; real footage comes back badly"
    if info.left_out:
        yield f"not in it: {', '.join(info.left_out)}"
    duration = estimate.coding_seconds(vae, info.frames, info.height, info.width) if info.frames else 0
    if duration > estimate.LONG:
        yield f"this takes {estimate.in_words(duration)} on this machine, guessed from its rate of multiplication"


def encode_file(
    vae: CausalVAE, path: str | os.PathLike[str], *, extra: str = "refuse", chunk: int = 1
) -> Iterator[Tensor]:
    """The mean latents of a video file, `chunk` latent frames at a time: [1, z_dim, chunk, H/8, W/8].

    extra  what becomes of frames beyond 4n+1: "refuse" the file, "pad" it with its last frame, or "trim" it

    Latents have no times: `media.read_video(path, times=True)` tells those of the frames. Each frame is read as it is
    needed and forgotten; frames too large for the memory are encoded in tiles. The size and, where the file has it, the
    number of frames are checked at the call. Raises `media.MediaError` for a damaged
    file, ValueError for one that does not fit, with the sizes or counts that would, `TooLargeError` for want of memory.
    """
    if extra not in EXTRA:
        raise ValueError(f"extra must be one of {', '.join(EXTRA)}; got {extra!r}")
    info = media.probe(path)
    (tile,) = _tiles(vae, path, info, "encode")
    if extra == "refuse" and info.frames is not None:
        _check_frames(vae, path, info.frames)
    pieces = _pieces(vae, path, media.read_video(path), extra)
    return _means(vae, pieces, chunk, tile)


@torch.no_grad()
def reconstruct(
    vae: CausalVAE,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    progress: Callable[[int, int | None], None] | None = None,
) -> Reconstruction:
    """`source` encoded and decoded into `target`, an MP4 of as many frames, written whole or not at all.

    A clip of other than 4n+1 frames is coded with its last frame repeated; what that adds is cut off again. Each frame
    keeps its time and the shape of its pixels; a turn that the source asks of players is made. Sound and whatever else
    is no part of the video stream is left out. `progress` is told the frames done, none before the first, and to do
    where they are counted.
    Errors: as `encode_file`; `media.write_video`'s for a target that cannot be written.
    """
    info, clock = media.probe(source), limits.Clock()
    encode, decode = _tiles(vae, source, info, "encode", "decode")
    if progress is not None:
        progress(0, info.frames)
    original: deque[np.ndarray] = deque()  # the frames between the two: those of one chunk
    times: deque[Fraction] = deque()
    done = error = 0

    def kept() -> Iterator[np.ndarray]:
        for time, frame in media.read_video(source, times=True):
            filters.check(frame[None], "source")
            original.append(frame)
            times.append(time)
            yield frame

    def decoded() -> Iterator[np.ndarray]:
        nonlocal done, error
        latents = _means(vae, _pieces(vae, source, kept(), "pad"), 1, encode)
        for video in vae.decode_stream(latents, clamp=False, tile=decode):
            pixels = to_pixels(video, vae.impl)[: len(original)]
            if len(pixels):
                filters.check(pixels, "what was made")
            for frame in pixels:
                error += int(np.square(frame.astype(np.int32) - original.popleft()).sum())
                done += 1
                clock()
                yield frame
            if progress is not None:
                progress(done, info.frames)

    shown = iter(times.popleft, None)
    with machine.own_dtypes(vae.quant_conv.weight.device):
        path = media.write_video(
            target, decoded(), info.fps or 24, times=shown, pixel_aspect=info.pixel_aspect,
            origin=Origin.of(getattr(vae, "folder", None), inputs=(Input.of(source),)),
        )  # fmt: skip
    mean = error / (done * info.height * info.width * 3)
    psnr = 10 * math.log10(255**2 / mean) if mean else math.inf
    return Reconstruction(path, done, psnr, info.left_out)


@torch.no_grad()
def _means(vae: CausalVAE, pieces: Iterator[Tensor], chunk: int, tile: Tile) -> Iterator[Tensor]:
    means = vae.encode_stream(pieces, chunk=chunk, tile=tile)
    while True:
        with machine.own_dtypes(vae.quant_conv.weight.device):
            mean = next(means, None)
        if mean is None:
            return
        yield mean[0]


def _pieces(
    vae: CausalVAE, path: str | os.PathLike[str], frames: Iterable[np.ndarray], extra: str
) -> Iterator[Tensor]:
    """uint8 frames as [1, 3, 1, H, W] in [-1, 1], then as many at a time as become one latent frame."""
    step, weight = vae.config.temporal_factor, vae.quant_conv.weight
    group: list[np.ndarray] = []
    wanted, count = 1, 0
    for frame in frames:
        group.append(frame)
        count += 1
        if len(group) == wanted:
            yield to_video(np.stack(group)[None]).to(weight)
            group, wanted = [], step
    if group and extra == "refuse":
        _check_frames(vae, path, count)
    if group and extra == "pad":
        yield to_video(np.stack([*group, *[group[-1]] * (step - len(group))])[None]).to(weight)


def _check_frames(vae: CausalVAE, path: str | os.PathLike[str], frames: int) -> None:
    try:
        vae.config.latent_shape(frames, vae.config.spatial_factor, vae.config.spatial_factor)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}; extra='pad' or 'trim' makes it fit") from None


def _tiles(
    vae: CausalVAE, path: str | os.PathLike[str], info: media.VideoInfo, *kinds: str
) -> list[tuple[int, int]]:
    """A tile for each of the streams that run at once; ValueError for frames that do not fit, or not in memory."""
    free, factor = machine.available(vae.quant_conv.weight.device), vae.config.spatial_factor

    def fit(height: int, width: int) -> tuple[list[tuple[int, int]], int]:
        fits = [vae.fit_tile(kind, height, width, free // len(kinds)) for kind in kinds]
        return [tile for tile, _ in fits], sum(needed for _, needed in fits)

    try:
        tiles, needed = fit(info.height, info.width)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is {info.width}x{info.height}: {error}") from None
    if needed <= free:
        return tiles
    smaller = ((info.height >> k, info.width >> k) for k in range(1, 14))
    smaller = ((h // factor * factor, w // factor * factor) for h, w in smaller if min(h, w) >= factor)
    offer = next((f"; {w}x{h} would fit" for h, w in smaller if fit(h, w)[1] <= free), "")
    raise TooLargeError(
        f"{os.fspath(path)!r} is {info.width}x{info.height}, for which the VAE needs about {gib(needed)}, and "
        f"{machine.left(free)}{offer}; scale the video down"
    )
