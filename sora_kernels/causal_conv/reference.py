"""Plain torch: what the causal_conv family computes. Half precisions are computed in fp32 and rounded once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Triple = tuple[int, int, int]


def norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: str = "rms", groups: int = 32, eps: float = 1e-6
) -> Tensor:
    """SiLU(norm(x) * weight + bias); norm over the channels of each pixel, or over each group of channels."""
    wide = accumulate(x)
    if norm == "rms":
        y = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    else:
        grouped = wide.unflatten(1, (groups, -1))
        var, mean = torch.var_mean(grouped, dim=(2, 3, 4, 5), keepdim=True, correction=0)
        y = ((grouped - mean) * torch.rsqrt(var + eps)).flatten(1, 2)
    y = y * _per_channel(weight.to(wide.dtype))
    if bias is not None:
        y = y + _per_channel(bias.to(wide.dtype))
    return F.silu(y).to(x.dtype)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = (1, 1, 1),
    cache: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """conv3d of (cache or zeros) + x, "same" in H and W; then + residual; then SiLU(rms(.) * norm_weight)."""
    padded, padding = causal_input(x, weight, cache)
    y = _conv(padded, weight, bias, stride, padding)
    if residual is not None:
        y = y + residual.to(y.dtype)
    if norm_weight is not None:
        y = norm_silu(y, norm_weight, eps=norm_eps)
    return y.to(x.dtype)


def upsample_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, factor: Triple = (1, 2, 2), cache: Tensor | None = None
) -> Tensor:
    """conv3d of x with every frame, row and column repeated; causal in T, "same" in H and W."""
    padded, padding = upsample_input(x, weight, cache, factor)
    return _conv(padded, weight, bias, (1, 1, 1), padding).to(x.dtype)


def downsample_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, factor: Triple = (1, 2, 2), cache: Tensor | None = None
) -> Tensor:
    """Strided conv3d; k - f zeros split over each spatial axis with the odd one at its end, all before x in T."""
    padded, padding = downsample_input(x, weight, cache, factor)
    return _conv(padded, weight, bias, factor, padding).to(x.dtype)


def causal_input(x: Tensor, weight: Tensor, cache: Tensor | None) -> tuple[Tensor, Triple]:
    """The tensor that the convolution reads, and the symmetric padding that it adds itself."""
    kt, kh, kw = weight.shape[2:]
    return _after(x, cache, kt - 1), (0, kh // 2, kw // 2)


def upsample_input(x: Tensor, weight: Tensor, cache: Tensor | None, factor: Triple) -> tuple[Tensor, Triple]:
    kt, kh, kw = weight.shape[2:]
    past = past_frames("upsample", kt, factor[0])
    y = _after(x, cache, past)
    for axis, f in enumerate(factor, 2):
        y = y.repeat_interleave(f, axis) if f > 1 else y
    return y[:, :, past * factor[0] - (kt - 1) :], (0, kh // 2, kw // 2)


def downsample_input(x: Tensor, weight: Tensor, cache: Tensor | None, factor: Triple) -> tuple[Tensor, Triple]:
    kt, kh, kw = weight.shape[2:]
    y = _after(x, cache, past_frames("downsample", kt, factor[0]))
    (top, bottom), (left, right) = (((k - f) // 2, (k - f + 1) // 2) for k, f in ((kh, factor[1]), (kw, factor[2])))
    if (top, left) == (bottom, right):
        return y, (0, top, left)
    return F.pad(y, (left, right, top, bottom)), (0, 0, 0)


def past_frames(kind: str, kt: int, factor: int) -> int:
    """How many frames before x a convolution of temporal size `kt` reads: the length of its cache."""
    if kind == "upsample":
        return -(-(kt - 1) // factor)
    return kt - factor


def next_cache(x: Tensor, cache: Tensor) -> Tensor:
    """The last frames of cache + x, as many as `cache` has; memory of its own, so that x can be freed."""
    past, frames = cache.shape[2], x.shape[2]
    if frames >= past:
        return x[:, :, frames - past :].clone()
    return torch.cat([cache[:, :, frames:], x], 2)


def _after(x: Tensor, cache: Tensor | None, past: int) -> Tensor:
    if past == 0:
        return x
    if cache is None:
        return F.pad(x, (0, 0, 0, 0, past, 0))
    return torch.cat([cache.to(x.dtype), x], 2)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple, padding: Triple) -> Tensor:
    x = accumulate(x)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv3d(x, weight.to(x.dtype), bias, stride, padding)


def accumulate(x: Tensor) -> Tensor:
    """x in the dtype the mathematics is done in: fp64 stays fp64, everything else becomes fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_channel(row: Tensor) -> Tensor:
    return row.view(-1, 1, 1, 1)
