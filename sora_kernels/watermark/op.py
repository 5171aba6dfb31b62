"""A mark that a key has drawn, in the pixels of the frames of a file."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check, _dispatch, _library
from .._autograd import derive, transformed
from .._operands import parameter
from . import reference


def embed_watermark(frames: Tensor, tile: Tensor, *, impl: str = "auto") -> Tensor:
    """out[b, t, h, w, c] = clamp(frames[b, t, h, w, c] + round(gain · tile[h mod P, w mod Q]), 0, 255),
    gain = 1 + min(σ / 8, 1) / 2

    frames   uint8 [B, T, H, W, 3], any strides (copied once where a line's bytes do not lie side by side)
    tile     [P, Q], float32, bfloat16, float16 (float64 in `reference`): the mark in levels of 255, repeated over each
             frame from its first pixel on, and the same in its three colours; any strides
    σ        the standard deviation of the green of the pixel's block of 8 × 8, counted from a frame's first pixel on
             and cut off at its edges: texture hides up to half as much again

    Returns uint8 [B, T, H, W, 3], dense. The sums of a block are whole numbers and exact; square root, quotient and
    product are fp32, each rounded, the product then to a whole number, halves to even: all implementations give the
    same bits. |round(...)| is at most 255; a NaN in the tile becomes 0. Reads and writes each byte once. Whatever draws
    a tile is the caller's: `sora_model.safety.watermark` has one, and its reader. Not differentiable: integers have no
    gradient, and none is recorded; a tile with a tangent is a TypeError.

    Raises TypeError or ValueError naming the argument; `Unavailable` where an explicit impl cannot run.
    Source: additive spread spectrum in repeated tiles, Kalker et al., JAWS, 1999.
    """
    op = "embed_watermark"
    if not isinstance(frames, Tensor) or frames.dtype is not torch.uint8 or not _check.plain(frames):
        came = _check.format_of(frames) if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"{op}: frames must be a plain strided uint8 tensor [B, T, H, W, 3]; got {came}")
    if frames.ndim != 5 or frames.shape[4] != 3:
        raise ValueError(f"{op}: frames must be [B, T, H, W, 3]; got shape {_check.shape_of(frames)}")
    _check.tensor(op, "tile", tile, "[P, Q]", ndim=2)
    if 0 in tile.shape:
        raise ValueError(f"{op}: tile [P, Q] must have at least one row and one column; got {_check.shape_of(tile)}")
    _check.same_device(op, frames, {"tile": tile}, "frames")
    impl = _dispatch.choose(op, impl, tile)
    if transformed():
        return derive(_embed_watermark, _formula, frames, tile, impl)
    return _embed_watermark(frames, tile.detach(), impl)


_library.define(
    "embed_watermark_fwd",
    "(Tensor frames, Tensor tile, Tensor(a!) out) -> ()",
    reference=lambda frames, tile, out: out.copy_(reference.embed_watermark(frames, tile)),
    impls={"triton": ".watermark.kernels:embed_watermark_fwd", "cpu": None},
)


def _embed_watermark(frames, tile, impl) -> Tensor:
    if frames.stride()[3:] != (3, 1):
        frames = frames.contiguous()
    out = frames.new_empty(frames.shape)
    _library.call("embed_watermark_fwd", impl)(frames, parameter(tile), out)
    return out


def _formula(frames, tile, *_) -> Tensor:
    if torch.autograd.forward_ad._current_level >= 0:
        raise TypeError(
            "embed_watermark: integers have no tangent; got a tile that has one, or may, inside torch.func.jvp or a "
            "dual level; mark frames outside of it"
        )
    return reference.embed_watermark(frames, tile)
