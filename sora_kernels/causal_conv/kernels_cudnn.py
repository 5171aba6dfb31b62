"""The convolutions by cuDNN on channels-last videos, and the passes before and after them by `kernels_passes`.

It is given no bias: PyTorch adds that, and a residual, in passes of their own. All that follows the products is one
pass here, which reads their result and the residual and writes out.

Before them, x is read where it lies if cuDNN's own zeros will do, as many on either side in space. Zeros on one side,
and frames before x, are a copy: 4C bytes a pixel in 16 bits for 54·C² flops of 3x3x3 taps, so with C = 192 2592 flops
for each byte copied, of which an H200 does 184 in that time. cuDNN's zeros in time would lie behind x as well: kt - 1
more frames of products, half as many again for a chunk of 4. Of a clip's first frames, taps that meet zeros alone are
left out: of a single frame all but the last, and then nothing is copied.

An upsampled convolution is one transposed convolution with the boxed weight of `kernels_triton`, so its gradients are
those of a strided one. Its phases one by one would read x as often as there are phases, and a further pass would lay
their results into each other. They are the same products if cuDNN's kernel visits no tap that does not divide, as one
for the data of a strided convolution should: not yet measured.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from .._operands import bias_gradient, box, dense_taps, parameter, unbox, unpack, video_format, zero
from . import reference
from .kernels_passes import LAST, epilogue, pack
from .kernels_triton import causal_front, downsample_front, through_norm

_SETTINGS = threading.Lock()


@contextlib.contextmanager
def _settings(dtype: torch.dtype) -> Iterator[None]:
    """cuDNN as the contract asks: deterministic, chosen without trials, fp32 in full.

    The settings are the process's, so one thread at a time has them. torch.backends.cudnn.flags would fail where fp32
    is set by `conv.fp32_precision`, and leave TF32 on where torch.backends.fp32_precision asks for it.
    """
    cudnn = torch.backends.cudnn
    wanted = [(cudnn, "enabled", True), (cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    if dtype == torch.float32:
        wanted.append((cudnn.conv, "fp32_precision", "ieee"))
    with _SETTINGS:
        before = [(part, name, getattr(part, name)) for part, name, _ in wanted]
        try:
            for setting in wanted:
                setattr(*setting)
            yield
        finally:
            for setting in before:
                setattr(*setting)


def _run(function, videos, weight, stride, padding, transposed, *rest):
    """`function` of aten. Frames that do not meet are a batch of images: cuDNN has more kernels for these."""
    if weight.shape[2] == stride[0] == 1:
        videos = [v.transpose(1, 2).flatten(0, 1) for v in videos]
        weight, stride, padding = weight[:, :, 0], stride[1:], padding[1:]
    ones, zeros = (1,) * len(stride), (0,) * len(stride)
    with _settings(weight.dtype):
        return function(*videos, weight, None, stride, padding, ones, transposed, zeros, 1, *rest)


def _video(y: Tensor, like: Tensor) -> Tensor:
    """A result of `_run` as a video, channels last: cuDNN's is, and stays where it is."""
    y = y if y.ndim == 5 else y.unflatten(0, (like.shape[0], -1)).transpose(1, 2)
    return y.contiguous(memory_format=LAST)


def _convolution(x, weight, stride, padding, transposed=False) -> Tensor:
    return _video(_run(torch.ops.aten.convolution, [x], weight, stride, padding, transposed), x)


def _gradients(dout, x, weight, stride, padding, data: bool, taps: bool, transposed=False):
    """Of x and of the weight, None where not asked for."""
    mask = [data, taps, False]
    dx, dweight, _ = _run(
        torch.ops.aten.convolution_backward, [dout, x], weight, stride, padding, transposed, mask
    )  # fmt: skip
    return _video(dx, x) if data else None, dweight.reshape(weight.shape) if taps else None


def _read(x, cache, front, back) -> tuple[Tensor, tuple[int, ...]]:
    """What cuDNN reads, and the zeros that it adds on both sides itself."""
    if list(front[1:]) == list(back):
        return pack(x, cache, (front[0], 0, 0)), (0, *back)
    return pack(x, cache, front, back), (0, 0, 0)


def _backward(dout, x, cache, weight, stride, front, back, dx, dweight, dbias, dcache) -> None:
    dout = dout.contiguous(memory_format=LAST)
    bias_gradient(dout, dbias)
    data = dx is not None or dcache is not None
    if not data and dweight is None:
        return
    read, padding = _read(x, cache, front, back)
    dread, dtaps = _gradients(dout, read, dense_taps(weight, x), stride, padding, data, dweight is not None)
    if dweight is not None:
        dweight.copy_(dtaps)
    top, left = front[1] - padding[1], front[2] - padding[2]
    unpack(dread, (front[0], top, left), dx, dcache)


# causal_conv3d


def _first_tap(weight: Tensor, x: Tensor, cache: Tensor | None) -> int:
    """The taps before it meet zeros alone."""
    return 0 if cache is not None else max(weight.shape[2] - x.shape[2], 0)


def causal_conv3d_fwd(x, weight, bias, cache, residual, norm_weight, stride, bordered, norm_eps, out, pre) -> None:
    if out.numel() == 0:
        return
    weight = weight[:, :, _first_tap(weight, x, cache) :]
    front = causal_front(weight, bordered)
    read, padding = _read(x, cache, front, front[1:])
    h = _convolution(read, dense_taps(weight, x), stride, padding)
    residual = residual if residual is None else residual.contiguous(memory_format=video_format(residual))
    epilogue(h, out, parameter(bias), residual, parameter(norm_weight), norm_eps, pre)


def causal_conv3d_bwd(
    dout, draw, x, weight, cache, norm_weight, pre, stride, bordered, norm_eps,
    dx, dweight, dbias, dcache, dresidual, dnorm_weight,
) -> None:  # fmt: skip
    if dout.numel() == 0:
        return zero(dx, dweight, dbias, dcache, dresidual, dnorm_weight)
    if norm_weight is not None:
        dout = through_norm(dout, draw, pre, norm_weight, norm_eps, dresidual, dnorm_weight)
    first = _first_tap(weight, x, cache)
    if dweight is not None:
        dweight[:, :, :first] = 0
        dweight = dweight[:, :, first:]
    weight = weight[:, :, first:]
    front = causal_front(weight, bordered)
    _backward(dout, x, cache, weight, stride, front, front[1:], dx, dweight, dbias, dcache)


# downsample_conv3d


def _downsample_sides(weight: Tensor, factor):
    front = downsample_front(weight, factor)
    back = [k - f - n for k, f, n in zip(weight.shape[3:], factor[1:], front[1:], strict=True)]
    return front, back


def downsample_conv3d_fwd(x, weight, bias, cache, factor, out) -> None:
    if out.numel() == 0:
        return
    read, padding = _read(x, cache, *_downsample_sides(weight, factor))
    epilogue(_convolution(read, dense_taps(weight, x), factor, padding), out, parameter(bias))


def downsample_conv3d_bwd(dout, x, weight, cache, factor, dx, dweight, dbias, dcache) -> None:
    if dout.numel() == 0:
        return zero(dx, dweight, dbias, dcache)
    _backward(dout, x, cache, weight, factor, *_downsample_sides(weight, factor), dx, dweight, dbias, dcache)


# upsample_conv3d: its transposed convolution drops causal_front(weight) elements at either end of each axis


def _transposed(weight: Tensor, x: Tensor, factor) -> Tensor:
    """[C, O, ...]: the boxed taps in the order of a transposed convolution."""
    return dense_taps(box(weight, factor).flip(2, 3, 4).transpose(0, 1), x)


def upsample_conv3d_fwd(x, weight, bias, cache, factor, out) -> None:
    if out.numel() == 0:
        return
    kt, ft = weight.shape[2], factor[0]
    read = pack(x, cache, (reference.upsample_past(kt, ft), 0, 0))
    h = _convolution(read, _transposed(weight, x, factor), factor, causal_front(weight), transposed=True)
    epilogue(h[:, :, reference.upsample_spare(kt, ft) :], out, parameter(bias))


def upsample_conv3d_bwd(dout, x, weight, cache, factor, dx, dweight, dbias, dcache) -> None:
    if dout.numel() == 0:
        return zero(dx, dweight, dbias, dcache)
    bias_gradient(dout, dbias)
    data = dx is not None or dcache is not None
    if not data and dweight is None:
        return
    kt, ft = weight.shape[2], factor[0]
    past, spare = reference.upsample_past(kt, ft), reference.upsample_spare(kt, ft)
    read, dh = pack(x, cache, (past, 0, 0)), pack(dout, None, (spare, 0, 0))
    taps, padding = _transposed(weight, x, factor), causal_front(weight)
    dread, dtaps = _gradients(dh, read, taps, factor, padding, data, dweight is not None, transposed=True)
    if dweight is not None:
        dweight.copy_(unbox(dtaps.float().flip(2, 3, 4), factor).transpose(0, 1))
    unpack(dread, (past, 0, 0), dx, dcache)
