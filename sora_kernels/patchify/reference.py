"""Patch embedding, its inverse layout and the final layer in plain PyTorch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulate(x: Tensor) -> Tensor:
    """x in the dtype the mathematics is done in: fp64 stays fp64, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def patch_of(video: Tensor, grid: Sequence[int]) -> list[int]:
    """The patch of which `grid` make the video `[B, C, T*pt, H*ph, W*pw]`."""
    return [size // n for size, n in zip(video.shape[2:], grid, strict=True)]


def patchify3d(video: Tensor, patch: Sequence[int]) -> Tensor:
    """`[B, C, T*pt, H*ph, W*pw]` -> `[B, T*H*W, pt*ph*pw*C]`: a row of features, ordered (pt, ph, pw, C), per patch."""
    pt, ph, pw = patch
    x = video.unflatten(2, (-1, pt)).unflatten(4, (-1, ph)).unflatten(6, (-1, pw))
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)


def unpatchify3d(tokens: Tensor, grid: Sequence[int], patch: Sequence[int], channels: int) -> Tensor:
    """The inverse: `[B, T*H*W, pt*ph*pw*C]` -> `[B, C, T*pt, H*ph, W*pw]`."""
    x = tokens.unflatten(1, tuple(grid)).unflatten(4, (*patch, channels))
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)


def video_to_uint8(video: Tensor, patch: Sequence[int] = (1, 1, 1)) -> Tensor:
    """`[B, C*pt*pw*ph, T, H, W]` in [-1, 1] -> `[B, T*pt, H*ph, W*pw, C]` in 0 ... 255; features (C, pt, pw, ph)."""
    pt, ph, pw = patch
    x = video.unflatten(1, (video.shape[1] // (pt * ph * pw), pt, pw, ph)).permute(0, 5, 2, 6, 4, 7, 3, 1)
    x = accumulate(x.flatten(5, 6).flatten(3, 4).flatten(1, 2)).clamp(-1, 1)
    return x.nan_to_num(-1.0).add(1).mul(127.5).round().to(torch.uint8)


def patch_embed3d(video: Tensor, weight: Tensor, bias: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
    """`tokens[b, s] = weight . patch[b, s] + bias + pos[s]`, patches in (t, h, w) order."""
    x = accumulate(patchify3d(video, weight.shape[2:]))
    y = x @ accumulate(weight).permute(2, 3, 4, 1, 0).flatten(0, 3)
    for term in (bias, pos):
        y = y if term is None else y + accumulate(term)
    return y.to(video.dtype)


def rows(t: Tensor | None, x: Tensor) -> Tensor | float:
    """Modulation `[D]`, `[B,D]` or `[B,F,D]` (F divides S) as it broadcasts against x `[B,S,D]`."""
    if t is None:
        return 0.0
    t = accumulate(t[:, None] if t.ndim == 2 else t)
    return t if t.ndim == 1 else t.repeat_interleave(x.shape[1] // max(t.shape[1], 1), 1)


def centred(x: Tensor) -> Tensor:
    """x minus its mean, twice: what rounding leaves of the mean of a row far from zero is more than its spread."""
    x = x - x.mean(-1, keepdim=True)
    return x - x.mean(-1, keepdim=True)


def final_layer(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor | None = None, *,
    grid: Sequence[int], patch: Sequence[int], norm: str = "layer", eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """`unpatchify(linear(norm(x) * (1 + scale) + shift))`, rounded once, at the end."""
    h = accumulate(x)
    if norm == "layer":
        h = centred(h)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h * (1 + rows(scale, x)) + rows(shift, x)
    y = h @ accumulate(weight).T
    y = y if bias is None else y + accumulate(bias)
    pt, ph, pw = patch
    return unpatchify3d(y, grid, patch, weight.shape[0] // (pt * ph * pw)).to(x.dtype)
