"""The convolutions on a CPU: oneDNN in fp32 on channels-last videos, whatever the size of the batch.

`F.conv3d` leaves oneDNN for an unrolled matrix product where a single small clip comes in, as every chunk of a stream
is; the operators below are asked for by name instead. Measured on one core of an AVX-512 machine, 3x3x3 taps:

    F.conv3d, 4 frames of 64x64      C = 32: 16 GFLOP/s    C = 96:  95
    oneDNN, contiguous                       99                     104
    oneDNN, channels last                    107                    110     (no reordering of x and of the result)

The result is added by oneDNN to what the destination holds (zeros or the residual), so it is written where it belongs.
Of few products the calls are what takes time, and aten's own choice is the faster one (kernels_cpu_few.py).
Half precision is widened on the way in: without bf16 instructions a bf16 convolution is many times slower than fp32.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _library
from .._operands import bias_gradient, unpack, zero
from . import kernels_cpu_few as few
from .reference import one_channel, upsample_past, upsample_spare

LAST = torch.channels_last_3d
ONE = (1, 1, 1)
FEW = 4_000_000  # products that take about as long as a call of oneDNN
_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
RUN, PARTS = 512, 16  # of the sum over pixels that a weight gradient is: so many at least, so many parts at most


def _wide(t: Tensor) -> Tensor:
    """A video in fp32, channels last: itself or a copy."""
    return one_channel(t.to(torch.float32, memory_format=LAST).contiguous(memory_format=LAST))


def _float(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.float()


def _is_wide(t: Tensor) -> bool:
    return t.dtype == torch.float32 and t.is_contiguous(memory_format=LAST)


def _empty(shape) -> Tensor:
    return one_channel(torch.empty(shape, dtype=torch.float32, memory_format=LAST))


def _packed(x: Tensor, cache: Tensor | None, front: tuple[int, int, int], back: tuple[int, int] = (0, 0)) -> Tensor:
    """One fp32 copy of x with `front` frames, rows and columns before it and `back` rows and columns after it.

    Zeros, save that the frames of `cache` lie before those of x.
    """
    past, top, left = front
    if past == top == left == sum(back) == 0:
        return _wide(x)
    B, C, T, H, W = x.shape
    packed = _empty((B, C, past + T, top + H + back[0], left + W + back[1]))
    zeros = [packed[..., :top, :], packed[..., top + H :, :], packed[..., :left], packed[..., left + W :]]
    if cache is None:
        zeros.append(packed[:, :, :past])
    for margin in zeros:
        if margin.numel():
            margin.zero_()
    inside = packed[..., top : top + H, left : left + W]
    inside[:, :, past:] = x
    if past and cache is not None:
        inside[:, :, :past] = cache[:, :, cache.shape[2] - past :]
    return packed


def _add(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding) -> None:
    """out += conv3d(x, weight, bias, stride, padding); all fp32, videos channels last and dense."""
    torch.ops.mkldnn._convolution_pointwise_.binary(
        out, x, weight, bias, padding, stride, ONE, 1, "add", 1.0, None, [], None
    )


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding) -> Tensor:
    """The convolution of fp32 videos or images, channels last, as a tensor of its own: a sum with zeros is dearer."""
    ones = ONE[: len(stride)]
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, ones, 1, "none", [], "")


def _convolved_few(out: Tensor, x: Tensor, cache, front, back, weight: Tensor, bias, stride, padding) -> Tensor:
    """The convolution of x after its past, in fp32 and of the shape of `out`, in few calls."""
    x, weight, front = _of_one_frame(x, weight, cache, front)
    x = few.packed(x, cache, front, back)
    if weight.shape[2] == stride[0] == 1:
        return _clips(torch.conv2d(_images(x), weight.squeeze(2), bias, stride[1:], padding[1:]), out.shape[0])
    if x.shape[0] == 1 and _products(out, weight) >= few.FEWEST:
        return _convolved(_wide(x), weight, bias, stride, padding)
    return torch.conv3d(x, weight, bias, stride, padding)


def _of_one_frame(x: Tensor, weight: Tensor, cache: Tensor | None, front):
    """(x, weight, front) without the taps that a single frame, before which lie zeros, does not meet."""
    past = front[0]
    if past and cache is None and x.shape[2] == 1:
        return x, weight[:, :, past:], (0, *front[1:])
    return x, weight, front


def _add_causal(out: Tensor, x: Tensor, cache: Tensor | None, weight: Tensor, bias: Tensor | None, padding) -> None:
    """out += the convolution of x after its past, which is not copied together with it.

    The first kt - 1 frames read the past; the others read x in place. Without a cache the taps on frames of zeros are
    left out. x is copied after its past for a batch, whose chunks are not dense in memory, and where that costs less
    than several calls: it is smaller than the weight, which oneDNN reorders in each, or few products would be left out.
    """
    past = weight.shape[2] - 1
    head = min(past, out.shape[2])
    if cache is not None:
        copied = x[:, :, head:].numel() < weight.numel()
    else:
        copied = out.shape[2] > 1 and _few(out[:, :, :1], weight)
    if past and (out.shape[0] > 1 or copied):
        return _add(out, _packed(x, cache, (past, 0, 0)), weight, bias, ONE, padding)
    x = _wide(x)
    if cache is None:
        for t in range(head):
            _add(out[:, :, t : t + 1], x[:, :, : t + 1], weight[:, :, past - t :], bias, ONE, padding)
    elif head:
        _add(out[:, :, :head], _packed(x[:, :, :head], cache, (past, 0, 0)), weight, bias, ONE, padding)
    if out.shape[2] > head:
        _add(out[:, :, head:], x, weight, bias, ONE, padding)


def _products(result: Tensor, weight: Tensor) -> int:
    return result.numel() * (weight.numel() // weight.shape[0])


def _few(result: Tensor, weight: Tensor, calls: int = 1) -> bool:
    """Whether the convolution takes no longer than so many calls."""
    return _products(result, weight) < FEW * calls


def _backward(dout: Tensor, x: Tensor, weight: Tensor, stride, padding, mask, opaque: bool):
    """aten's convolution_backward; opaque tensors keep oneDNN in charge where aten would leave it, and copy."""
    inputs = [t.to_mkldnn() if opaque else t for t in (dout, x)]
    dims = len(stride)
    grads = torch.ops.aten.convolution_backward(
        *inputs, weight, None, stride, padding, (1,) * dims, False, (0,) * dims, 1, [*mask, False]
    )
    return [g.to_dense() if g is not None and g.is_mkldnn else g for g in grads[:2]]


def _images_backward(dout: Tensor, x: Tensor, weight: Tensor, stride, padding, data: bool, taps: bool):
    """The gradients of a convolution of images, None where not asked for."""
    if _few(dout, weight) and dout.numel() <= few.PIXELS * dout.shape[1]:
        return few.images_backward(dout, x, weight, stride, padding, data, taps)
    if taps and not _AVX512 and _products(dout, weight) <= few.COLUMNS * dout.shape[1]:
        dx = _backward(dout, x, weight, stride, padding, [True, False], opaque=False)[0] if data else None
        return dx, few.images_backward(dout, x, weight, stride, padding, False, True)[1]
    blocks = list(_blocks(dout, x, weight, stride, padding)) if taps else []
    if len(blocks) == 1:
        return _backward(dout, x, weight, stride, padding, [data, True], opaque=False)
    dx = _backward(dout, x, weight, stride, padding, [True, False], opaque=False)[0] if data else None
    if not taps:
        return dx, None
    dweight = torch.zeros_like(weight)
    for block in blocks:
        dweight += _backward(*block, [False, True], opaque=False)[1]
    return dx, dweight


def _blocks(dout: Tensor, x: Tensor, weight: Tensor, stride, padding) -> Iterator[tuple]:
    """Images, or rows of one, in at most about PARTS blocks: the weight gradient is the sum of theirs.

    oneDNN adds pixel after pixel, and a sum of n so errs as √n, of 5000 four times as much as a product of matrices. A
    part costs a call, which many pixels do not notice. One block are taps of one pixel, which are such a product, and
    with AVX-512 several images of 16 channels or more, of which oneDNN sums the rows first.
    """
    (N, C), (H, W) = x.shape[:2], dout.shape[2:]
    by_rows = N > 1 and C >= 16 and max(stride) == 1 and _AVX512
    if by_rows or weight.shape[2:] == (1, 1):
        yield dout, x, weight, stride, padding
        return
    rows = max(1, max(RUN, N * H * W // PARTS) // W)
    if rows >= H:
        for d, r in zip(dout.split(rows // H), x.split(rows // H), strict=True):
            yield d, r, weight, stride, padding
        return
    (step, _), (border, side), kernel = stride, padding, weight.shape[2]
    x = F.pad(x, (0, 0, border, border))
    for d, r in zip(dout.split(1), x.split(1), strict=True):
        for h in range(0, H, rows):
            last = min(h + rows, H) - 1
            yield d[:, :, h : h + rows], r[:, :, h * step : last * step + kernel], weight, stride, (0, side)


def _gradients(dout: Tensor, x: Tensor, weight: Tensor, stride, padding, data: bool, taps: bool):
    """The gradients of conv3d for x and weight, None where not asked for.

    oneDNN's 3D backward takes 2 to 5 times as long as its 2D one on channels-last tensors, forward they are alike. So
    the frames are a batch of images, one convolution per tap in time; the data of several taps are left to the 3D
    kernel on opaque tensors, which is as fast and errs half as much as a sum over taps. Of few products one call takes
    a third of the time of so many.
    """
    B, _, frames = dout.shape[:3]
    if weight.shape[2] == 1 and stride[0] == 1:
        images = _images(dout), _images(x), weight.squeeze(2)
        dx, dweight = _images_backward(*images, stride[1:], padding[1:], data, taps)
        return _clips(dx, B) if data else None, dweight.unsqueeze(2) if taps else None
    if _few(dout, weight):
        return _backward(dout, x, weight, stride, padding, [data, taps], opaque=False)
    dx = _backward(dout, x, weight, stride, padding, [True, False], opaque=True)[0] if data else None
    if not taps:
        return dx, None
    dweight, dout = torch.empty_like(weight), _images(dout)
    for i in range(weight.shape[2]):
        read = _images(x[:, :, i : i + (frames - 1) * stride[0] + 1 : stride[0]])
        dweight[:, :, i] = _images_backward(dout, read, weight[:, :, i], stride[1:], padding[1:], False, True)[1]
    return dx, dweight


def _images(x: Tensor) -> Tensor:
    """The frames of a batch as a batch of images [B T, C, H, W], channels last."""
    x = x.contiguous(memory_format=LAST)
    return x.squeeze(2) if x.shape[2] == 1 else x.transpose(1, 2).flatten(0, 1)


def _clips(images: Tensor, batch: int) -> Tensor:
    """`_images` undone."""
    if images.shape[0] == batch:
        return images.unsqueeze(2)
    return images.unflatten(0, (batch, -1)).transpose(1, 2)


@functools.cache
def _norm_op(direction: str):
    impl = "reference" if _dispatch.why_not("norm_silu", "cpu", "cpu") else "cpu"
    return _library.call(f"norm_silu_{direction}", impl)


# causal_conv3d


def causal_conv3d_fwd(x, weight, bias, cache, residual, norm_weight, stride, bordered, norm_eps, out, pre) -> None:
    if out.numel() == 0:
        return
    weight, bias, padding = weight.float(), _float(bias), _same(weight, bordered)
    front = (weight.shape[2] - 1, 0, 0)
    if _few(out, weight):
        total = _convolved_few(out, x, cache, front, (0, 0), weight, bias, stride, padding)
        if norm_weight is None:
            return out.copy_(total) if residual is None else torch.add(total, residual, out=out)
        total = _wide(total if residual is None else total.add_(residual))
    else:
        total = next((t for t in (pre, out) if t is not None and _is_wide(t)), None)  # where the convolution adds up
        total = _empty(out.shape) if total is None else total
        total.zero_() if residual is None else total.copy_(residual)
        if tuple(stride) == ONE:
            _add_causal(total, x, cache, weight, bias, padding)
        else:
            _add(total, _packed(x, cache, front), weight, bias, stride, padding)
    if pre is not None and pre is not total:
        pre.copy_(total)
    if norm_weight is not None:
        normed = out if out.is_contiguous(memory_format=LAST) else torch.empty_like(total)
        _norm_op("fwd")(total, norm_weight, None, 0, norm_eps, normed)
        total = normed
    if total is not out:
        out.copy_(total)


def causal_conv3d_bwd(
    dout, draw, x, weight, cache, norm_weight, pre, stride, bordered, norm_eps,
    dx, dweight, dbias, dcache, dresidual, dnorm_weight,
) -> None:  # fmt: skip
    if dout.numel() == 0:
        return zero(dx, dweight, dbias, dcache, dresidual, dnorm_weight)
    dout = _wide(dout)
    if norm_weight is not None:
        dpre = _empty(dout.shape)
        _norm_op("bwd")(dout, _wide(pre), norm_weight, None, 0, norm_eps, dpre, dnorm_weight, None)
        dout = dpre if draw is None else dpre.add_(draw)
        if dresidual is not None:
            dresidual.copy_(dout)
    front = (weight.shape[2] - 1, 0, 0)
    _conv_bwd(dout, x, weight, cache, stride, front, (0, 0), _same(weight, bordered), dx, dweight, dbias, dcache)


def _same(weight: Tensor, bordered: bool = False) -> tuple[int, int, int]:
    return (0, 0, 0) if bordered else (0, weight.shape[3] // 2, weight.shape[4] // 2)


def _conv_bwd(dout, x, weight, cache, stride, front, back, padding, dx, dweight, dbias, dcache) -> None:
    data = dx is not None or dcache is not None
    bias_gradient(dout, dbias)
    if not data and dweight is None:
        return
    x, wide, front = _of_one_frame(x, weight.float(), cache, front)
    packed = (few.packed if _few(dout, wide) else _packed)(x, cache, front, back)
    dpacked, taps = _gradients(dout, packed, wide, stride, padding, data, dweight is not None)
    if dweight is not None:
        if unread := dweight.shape[2] - taps.shape[2]:
            dweight[:, :, :unread].zero_()
            dweight = dweight[:, :, unread:]
        dweight.copy_(taps)
    unpack(dpacked, front, dx, dcache)


# downsample_conv3d


def _downsample_padding(weight: Tensor, factor):
    """(front, back, padding): symmetric padding is oneDNN's own, the other is copied."""
    past, *spare = (k - f for k, f in zip(weight.shape[2:], factor, strict=True))
    half = tuple(n // 2 for n in spare)
    if all(n % 2 == 0 for n in spare):
        return (past, 0, 0), (0, 0), (0, *half)
    return (past, *half), tuple(n - n // 2 for n in spare), (0, 0, 0)


def downsample_conv3d_fwd(x, weight, bias, cache, factor, out) -> None:
    if out.numel() == 0:
        return
    front, back, padding = _downsample_padding(weight, factor)
    weight, bias = weight.float(), _float(bias)
    if _few(out, weight):
        return out.copy_(_convolved_few(out, x, cache, front, back, weight, bias, factor, padding))
    packed = _packed(x, cache, front, back)
    if weight.shape[2] == factor[0] == 1:  # strided, oneDNN's 2D kernels are the faster ones
        images = _convolved(_images(packed), weight.squeeze(2), bias, factor[1:], padding[1:])
        out.copy_(_clips(images, out.shape[0]))
    else:
        out.copy_(_convolved(packed, weight, bias, factor, padding))


def downsample_conv3d_bwd(dout, x, weight, cache, factor, dx, dweight, dbias, dcache) -> None:
    if dout.numel() == 0:
        return zero(dx, dweight, dbias, dcache)
    front, back, padding = _downsample_padding(weight, factor)
    _conv_bwd(_wide(dout), x, weight, cache, factor, front, back, padding, dx, dweight, dbias, dcache)


# upsample_conv3d
#
# Output f*i + a of an axis reads x[i + (a + j - front) // f] through tap j: for each a, the "phase", this is a
# convolution of x itself, whose taps are sums of those that meet on one element. For three taps and a factor of 2 in
# height and width that is 4 convolutions of 2x2 taps instead of one of 3x3 on four times the pixels: 4/9 of the work.
# Where there is little of it, the calls take longer than it saves, and x is repeated. On one core of an AVX2 machine:
#
#     products of the one convolution     0.6e6         4.7e6         38e6          85e6
#     phases, x repeated               966, 253 µs  1037, 380 µs  1581, 1825 µs  2227, 4225 µs


@dataclass(frozen=True)
class _Axis:
    """One phase along one axis: tap j of the weight adds to tap taps[j]; `before` and `after` elements are padded."""

    phase: int
    taps: tuple[int, ...]
    before: int
    after: int


def _axis(kernel: int, factor: int, front: int) -> list[_Axis]:
    axes = []
    for phase in range(factor):
        offsets = [(phase + j - front) // factor for j in range(kernel)]
        taps = tuple(o - offsets[0] for o in offsets)
        axes.append(_Axis(phase, taps, -offsets[0], offsets[-1]))
    return axes


def _phases(weight: Tensor, factor) -> Iterator[tuple[_Axis, _Axis, _Axis]]:
    kt, kh, kw = weight.shape[2:]
    fronts = (kt - 1, kh // 2, kw // 2)
    return itertools.product(*(_axis(k, f, front) for k, f, front in zip((kt, kh, kw), factor, fronts, strict=True)))


def _phase_weight(weight: Tensor, axes) -> Tensor:
    """The sums of taps, added in order, channels last."""
    weight = weight.permute(0, 2, 3, 4, 1).contiguous()
    for dim, axis in enumerate(axes, 1):
        if axis.taps != tuple(range(len(axis.taps))):
            summed = weight.new_zeros([axis.taps[-1] + 1 if d == dim else n for d, n in enumerate(weight.shape)])
            for j, tap in enumerate(axis.taps):
                summed.select(dim, tap).add_(weight.select(dim, j))
            weight = summed
    return weight.permute(0, 4, 1, 2, 3)


def _phase_padding(axes):
    """(padding, window): oneDNN pads both ends alike; of its result the window is the phase."""
    padding = tuple(max(axis.before, axis.after) for axis in axes[1:])
    return (0, *padding), tuple(p - axis.before for p, axis in zip(padding, axes[1:], strict=True))


def _of_phase(t: Tensor, axes, factor) -> Tensor:
    (at, ah, aw), (ft, fh, fw) = (axis.phase for axis in axes), factor
    return t[:, :, at::ft, ah::fh, aw::fw]


def upsample_conv3d_fwd(x, weight, bias, cache, factor, out) -> None:
    if out.numel() == 0:
        return
    if _few(out, weight, math.prod(factor)):
        x, cache = (t if t is None else few.upsampled(t, factor) for t in (x, cache))
        return causal_conv3d_fwd(x, weight, bias, cache, None, None, ONE, False, 0.0, out, None)
    weight, bias, x = weight.float(), _float(bias), _wide(x)
    B, _, T, H, W = x.shape
    for axes in _phases(weight, factor):
        padding, (top, left) = _phase_padding(axes)
        taps = _phase_weight(weight, axes)
        rows, columns = (n + 2 * p - k + 1 for n, p, k in zip((H, W), padding[1:], taps.shape[3:], strict=True))
        total = _empty((B, weight.shape[0], T, rows, columns)).zero_()
        _add_causal(total, x, cache, taps, bias, padding)
        _of_phase(out, axes, factor).copy_(total[..., top : top + H, left : left + W])


def _phase_gradients(dout: Tensor, packed: Tensor, weight: Tensor, factor, past: int, data: bool, taps: bool):
    """The gradients of `packed`, x after `past` frames, and of the weight; zeros where not asked for."""
    dpacked, dweight = torch.zeros_like(packed), torch.zeros_like(weight)
    H, W = packed.shape[3:]
    for axes in _phases(weight, factor):
        padding, (top, left) = _phase_padding(axes)
        summed = _phase_weight(weight, axes)
        rows, columns = (n + 2 * p - k + 1 for n, p, k in zip((H, W), padding[1:], summed.shape[3:], strict=True))
        dphase = _packed(_of_phase(dout, axes, factor), None, (0, top, left), (rows - top - H, columns - left - W))
        first = past - axes[0].before
        dread, dsummed = _gradients(dphase, packed[:, :, first:], summed, ONE, padding, data, taps)
        if data:
            dpacked[:, :, first:] += dread
        if taps:
            for dim, axis in enumerate(axes, 2):
                dsummed = dsummed.index_select(dim, torch.tensor(axis.taps))
            dweight += dsummed
    return dpacked, dweight


def upsample_conv3d_bwd(dout, x, weight, cache, factor, dx, dweight, dbias, dcache) -> None:
    if dout.numel() == 0:
        return zero(dx, dweight, dbias, dcache)
    bias_gradient(dout, dbias)
    data = dx is not None or dcache is not None
    if not data and dweight is None:
        return
    kt, ft, wide = weight.shape[2], factor[0], weight.float()
    front = (upsample_past(kt, ft), 0, 0)
    packed = _packed(x, cache, front)
    if _few(dout, weight, math.prod(factor)):
        spare = upsample_spare(kt, ft)
        read = _wide(few.upsampled(packed, factor)[:, :, spare:])
        dread, dtaps = _gradients(_wide(dout), read, wide, ONE, _same(weight), data, dweight is not None)
        dpacked = few.summed(few.packed(dread, None, (spare, 0, 0)), factor) if data else None
    else:
        dpacked, dtaps = _phase_gradients(dout, packed, wide, factor, front[0], data, dweight is not None)
    if dweight is not None:
        dweight.copy_(dtaps)
    unpack(dpacked, front, dx, dcache)
