"""The convolutions by Triton: each op as launches of `kernels_conv.convolve` and `kernels_dweight.weight_gradient`.

A gradient of data is a convolution transposed, and so is an upsampled convolution: x[q] meets, in output pixel y,
those taps j of the weight for which (y + j - front) // f = q. Summed, they are one tap of `boxed`,

    boxed[i] = Σ_r weight[i - (f-1) + r],  r = 0 .. f-1        out[y] = Σ boxed[i] x[(y + i - front - (f-1)) / f]

over the i that divide. For 3 taps and f = 2 that is 2 of 4 taps, in two dimensions 4 products instead of 9. Its
gradients are those of the convolution with stride f that it transposes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch, _library
from .._operands import bias_gradient, box, dense_taps, parameter, unbox, video_format, zero
from .kernels_conv import convolve, convolve_phases, last, whole
from .kernels_dweight import weight_gradient


def _last(*videos: Tensor | None) -> list[Tensor | None]:
    return [v if v is None else last(v) for v in videos]


def _norm(direction: str, x: Tensor):
    """The op norm_silu_{direction} for tensors like x."""
    impl = "reference" if _dispatch.why_not("norm_silu", "triton", x.device.type, x.dtype, True) else "triton"
    return _library.call(f"norm_silu_{direction}", impl)


# A convolution as it is, strided or not: out[p] = Σ_j weight[j] x[stride·p + j - front]


def _bwd(dout, x, weight, cache, stride, front, dx, dweight, dbias, dcache) -> None:
    if dout.numel() == 0:
        return zero(dx, dweight, dbias, dcache)
    dout, x, cache = _last(dout, x, cache)
    bias_gradient(dout, dbias)
    if dweight is not None:
        weight_gradient([(dout, x, cache, [-n for n in front])], dweight, stride=stride)
    transposed = dense_taps(weight, x).transpose(0, 1)
    for data, first in ((dx, front), (dcache, [front[0] - (0 if cache is None else cache.shape[2]), *front[1:]])):
        if data is not None:
            convolve_phases(dout, None, transposed, data, stride=stride, offset=first, step=-1)


# causal_conv3d


def causal_front(weight: Tensor, bordered: bool = False) -> list[int]:
    kt, kh, kw = weight.shape[2:]
    return [kt - 1, 0, 0] if bordered else [kt - 1, kh // 2, kw // 2]


def causal_conv3d_fwd(x, weight, bias, cache, residual, norm_weight, stride, bordered, norm_eps, out, pre) -> None:
    if out.numel() == 0:
        return
    x, cache = _last(x, cache)
    bias, norm_weight = parameter(bias), parameter(norm_weight)
    call = dict(stride=stride, offset=[-n for n in causal_front(weight, bordered)], bias=bias, residual=residual)
    if norm_weight is None:
        convolve(x, cache, dense_taps(weight, x), out, **call)
    elif whole(weight, x):
        convolve(x, cache, dense_taps(weight, x), out, **call, norm_weight=norm_weight, eps=norm_eps, raw=pre)
    else:
        raw = out if pre is None else pre
        convolve(x, cache, dense_taps(weight, x), raw, **call)
        _norm("fwd", x)(raw, norm_weight, None, 0, norm_eps, out)


def through_norm(dout, draw, pre, norm_weight, eps, dresidual, dnorm_weight) -> Tensor:
    """The gradient of `pre`, which the norm read and which was given out as well; it is that of the residual, too."""
    pre = last(pre)
    dout = dout.contiguous(memory_format=video_format(pre))
    dpre = torch.empty_like(pre)
    _norm("bwd", pre)(dout, pre, norm_weight.contiguous(), None, 0, eps, dpre, dnorm_weight, None)
    dpre = dpre if draw is None else dpre.add_(draw)
    if dresidual is not None:
        dresidual.copy_(dpre)
    return dpre


def causal_conv3d_bwd(
    dout, draw, x, weight, cache, norm_weight, pre, stride, bordered, norm_eps,
    dx, dweight, dbias, dcache, dresidual, dnorm_weight,
) -> None:  # fmt: skip
    if dout.numel() == 0:
        return zero(dx, dweight, dbias, dcache, dresidual, dnorm_weight)
    if norm_weight is not None:
        dout = through_norm(dout, draw, pre, norm_weight, norm_eps, dresidual, dnorm_weight)
    _bwd(dout, x, weight, cache, stride, causal_front(weight, bordered), dx, dweight, dbias, dcache)


# downsample_conv3d


def downsample_front(weight: Tensor, factor) -> list[int]:
    past, *spare = (k - f for k, f in zip(weight.shape[2:], factor, strict=True))
    return [past, *(n // 2 for n in spare)]


def downsample_conv3d_fwd(x, weight, bias, cache, factor, out) -> None:
    x, cache = _last(x, cache)
    offset = [-n for n in downsample_front(weight, factor)]
    convolve(x, cache, dense_taps(weight, x), out, stride=factor, offset=offset, bias=parameter(bias))


def downsample_conv3d_bwd(dout, x, weight, cache, factor, dx, dweight, dbias, dcache) -> None:
    _bwd(dout, x, weight, cache, factor, downsample_front(weight, factor), dx, dweight, dbias, dcache)


# upsample_conv3d


def _behind(weight: Tensor, factor) -> list[int]:
    return [front + f - 1 for front, f in zip(causal_front(weight), factor, strict=True)]


def upsample_conv3d_fwd(x, weight, bias, cache, factor, out) -> None:
    if out.numel() == 0:
        return
    x, cache = _last(x, cache)
    offset = [-n for n in _behind(weight, factor)]
    boxed = dense_taps(box(weight, factor), x)
    convolve_phases(x, cache, boxed, out, stride=factor, offset=offset, step=1, bias=parameter(bias))


def upsample_conv3d_bwd(dout, x, weight, cache, factor, dx, dweight, dbias, dcache) -> None:
    if dout.numel() == 0:
        return zero(dx, dweight, dbias, dcache)
    dout, x, cache = _last(dout, x, cache)
    bias_gradient(dout, dbias)
    offset = _behind(weight, factor)
    past = 0 if cache is None else cache.shape[2]
    earlier = [offset[0] - factor[0] * past, *offset[1:]]
    if dweight is not None:
        taps = [k + f - 1 for k, f in zip(weight.shape[2:], factor, strict=True)]
        dboxed = torch.empty((*weight.shape[1::-1], *taps), dtype=torch.float32, device=weight.device)
        terms = [(x, dout, None, offset)] + ([] if cache is None else [(cache, dout, None, earlier)])
        weight_gradient(terms, dboxed, stride=factor, step=-1)
        dweight.copy_(unbox(dboxed, factor).transpose(0, 1))
    if dx is None and dcache is None:
        return
    transposed = dense_taps(box(weight, factor), x).transpose(0, 1)
    for data, first in ((dx, offset), (dcache, earlier)):
        if data is not None:
            convolve(dout, None, transposed, data, stride=factor, offset=first, step=-1)
