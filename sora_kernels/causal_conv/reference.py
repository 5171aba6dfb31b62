"""The specification of the causal_conv family in plain torch: fp32 mathematics (fp64 for fp64), rounded once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Triple = tuple[int, int, int]


def accumulate(x: Tensor) -> Tensor:
    """x in the dtype the mathematics is done in: fp64 stays fp64, everything else becomes fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: str = "rms", groups: int = 32, eps: float = 1e-6
) -> Tensor:
    """SiLU(norm(x) * weight + bias): RMS over the channels of a pixel, or layer norm over a group of channels."""
    y = accumulate(x)
    if norm == "rms":
        y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + eps)
    else:
        grouped = y.unflatten(1, (groups, -1))
        var, mean = torch.var_mean(grouped, dim=(2, 3, 4, 5), keepdim=True, correction=0)
        y = ((grouped - mean) * torch.rsqrt(var + eps)).flatten(1, 2)
    y = y * weight.to(y.dtype).view(-1, 1, 1, 1)
    if bias is not None:
        y = y + bias.to(y.dtype).view(-1, 1, 1, 1)
    return (y * torch.sigmoid(y)).to(x.dtype)  # F.silu has no second derivative by forward mode


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = (1, 1, 1),
    padding: str = "zeros",
    cache: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """conv3d of cache + x along time, "same" in H and W; then + residual; then SiLU(rms(.) * norm_weight)."""
    if padding == "replicate":
        x, cache = replicated(x, cache, weight)
    y = conv(*causal_input(x, weight, cache, padding == "replicate"), weight, bias, stride)
    if residual is not None:
        y = y + residual.to(y.dtype)
    if norm_weight is not None:
        y = norm_silu(y, norm_weight, eps=norm_eps)
    return y.to(x.dtype)


def upsample_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, factor: Triple = (1, 2, 2), cache: Tensor | None = None
) -> Tensor:
    """conv3d, causal in T and "same" in H and W, of x with every frame, row and column repeated."""
    return conv(*upsample_input(x, weight, cache, factor), weight, bias).to(x.dtype)


def downsample_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, factor: Triple = (1, 2, 2), cache: Tensor | None = None
) -> Tensor:
    """conv3d with stride; k - f zeros per axis, in T all in front, in H and W halved with the odd one at the end."""
    return conv(*downsample_input(x, weight, cache, factor), weight, bias, factor).to(x.dtype)


def conv(padded: Tensor, padding: Triple, weight: Tensor, bias: Tensor | None, stride: Triple = (1, 1, 1)) -> Tensor:
    x = one_channel(accumulate(padded))
    return F.conv3d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding)


def one_channel(t: Tensor) -> Tensor:
    """Of one channel both formats are one memory; with the strides of channels last oneDNN reads beyond narrow rows."""
    return t[:, 0].unsqueeze(1) if t.shape[1] == 1 else t


def causal_input(x: Tensor, weight: Tensor, cache: Tensor | None, bordered: bool = False) -> tuple[Tensor, Triple]:
    """What the convolution reads (x after its past), and the symmetric zero padding that it adds itself."""
    kt, kh, kw = weight.shape[2:]
    return _after(cache, kt - 1, x), (0, 0, 0) if bordered else (0, kh // 2, kw // 2)


def replicated(x: Tensor, cache: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x and the frames before it, without a cache repeats of its first one, with repeats of their borders around."""
    kt, kh, kw = weight.shape[2:]
    past = x[:, :, :1].expand(-1, -1, kt - 1, -1, -1) if cache is None else cache
    border = (kw // 2, kw // 2, kh // 2, kh // 2, 0, 0)
    return F.pad(x, border, mode="replicate"), F.pad(past, border, mode="replicate") if kt > 1 else past


def upsample_input(x: Tensor, weight: Tensor, cache: Tensor | None, factor: Triple) -> tuple[Tensor, Triple]:
    kt, kh, kw = weight.shape[2:]
    past = upsample_past(kt, factor[0])
    y = repeated(_after(cache, past, x), factor)
    return y[:, :, upsample_spare(kt, factor[0]) :], (0, kh // 2, kw // 2)


def repeated(x: Tensor, factor: Triple) -> Tensor:
    """Nearest upsampling: every frame, row and column as often as `factor` says."""
    for axis, f in enumerate(factor, 2):
        x = x.repeat_interleave(f, axis) if f > 1 else x
    return x


def downsample_input(x: Tensor, weight: Tensor, cache: Tensor | None, factor: Triple) -> tuple[Tensor, Triple]:
    kt, kh, kw = weight.shape[2:]
    y = _after(cache, downsample_past(kt, factor[0]), x)
    h, w = kh - factor[1], kw - factor[2]
    if h % 2 == w % 2 == 0:
        return y, (0, h // 2, w // 2)
    return F.pad(y, (w // 2, w - w // 2, h // 2, h - h // 2)), (0, 0, 0)


def upsample_past(kt: int, factor: int) -> int:
    """How many frames before x the convolution of `kt` upsampled frames reads: the length of its cache."""
    return -(-(kt - 1) // factor)


def upsample_spare(kt: int, factor: int) -> int:
    """How many of these frames, once they are repeated, it does not reach."""
    return upsample_past(kt, factor) * factor - (kt - 1)


def downsample_past(kt: int, factor: int) -> int:
    return kt - factor


def next_cache(x: Tensor, cache: Tensor) -> Tensor:
    """The last frames of cache + x, as many as `cache` has; in memory of its own, so that x can be freed."""
    past, frames = cache.shape[2], x.shape[2]
    last = x[:, :, frames - past :] if frames >= past else torch.cat([cache[:, :, frames:], x], 2)
    return torch.empty_like(cache).copy_(last)  # with the strides of `cache`, chunk after chunk


def _after(cache: Tensor | None, past: int, x: Tensor) -> Tensor:
    if past == 0:
        return x
    return F.pad(x, (0, 0, 0, 0, past, 0)) if cache is None else torch.cat([cache.to(x.dtype), x], 2)
