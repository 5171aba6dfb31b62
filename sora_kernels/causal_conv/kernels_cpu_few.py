"""Convolutions of few products on a CPU, as of a toy or of one tile: their time is that of calls, so it makes few.

Measured on one core of an AVX2 machine, µs of processor time for 16 channels and 3x3x3 taps, by aten, which leaves a
single small clip to a product of matrices, and by oneDNN:

    products         0.1e6      0.4e6      1.3e6      6.6e6
    aten, oneDNN  110, 151   183, 181   396, 256  1602, 716

Zeros around x take 15 µs as padding and 100 margin by margin. The gradients of images as products of matrices, of 6
images of 16x16, take 930, and 1600 by oneDNN in as many parts as err no more. So it is, with AVX2, of the weight
gradients of larger images, ms as a product and by parts; with AVX-512 that is not measured, and parts stay.

    images, channels      4 of 32x48, 128   by 2   1 of 48x80, 96   4 of 64x64, 32   4 of 48x80, 96
    product, parts             73, 93     31, 47        29, 37           18, 22          147, 128
"""

from __future__ import annotations

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import one_channel, repeated

FEWEST = 500_000  # products up to which aten does a single clip in no more time than oneDNN
COLUMNS = 1 << 23  # values read by a weight gradient, one for each tap of a pixel, of which a copy is worth its time
PIXELS = 2048  # from which on a product of matrices costs few channels more than oneDNN's parts


def packed(x: Tensor, cache: Tensor | None, front: tuple[int, int, int], back: tuple[int, int] = (0, 0)) -> Tensor:
    """x in fp32 with `front` frames, rows and columns before it, the frames those of a cache, and `back` after it."""
    past, top, left = front
    if past and cache is not None:
        x, past = torch.cat([cache[:, :, cache.shape[2] - past :], x], 2), 0
    if past or top or left or back != (0, 0):
        x = F.pad(x, (left, back[1], top, back[0], past, 0))
    return one_channel(x.float())


def images_backward(dout: Tensor, x: Tensor, weight: Tensor, stride, padding, data: bool, taps: bool):
    """The gradients of a convolution of images as products of matrices."""
    weight = weight.contiguous(memory_format=torch.channels_last)  # as dout and x are; of other strides it is refused
    size, mask = weight.shape[2:], [data, taps, False]
    return torch.ops.aten._slow_conv2d_backward.output_mask(dout, x, weight, size, stride, padding, mask)[:2]


def _interpolated(x: Tensor, factor) -> bool:
    """Whether one call, an interpolation, repeats x or sums its gradient: the places of powers of two are exact."""
    return x.numel() > 0 and not any(f & (f - 1) for f in factor)


def upsampled(x: Tensor, factor) -> Tensor:
    """`repeated`."""
    if not _interpolated(x, factor):
        return repeated(x, factor)
    return torch.ops.aten.upsample_nearest3d.vec(x, None, [float(f) for f in factor])


def summed(t: Tensor, factor) -> Tensor:
    """The adjoint of `repeated`."""
    if _interpolated(t, factor):
        size = [n // f for n, f in zip(t.shape, (1, 1, *factor), strict=True)]
        return torch.ops.aten.upsample_nearest3d_backward(t, t.shape[2:], size, *map(float, factor))
    ft, fh, fw = factor
    t = _sum([t[..., i::fw] for i in range(fw)])
    t = _sum([t[..., i::fh, :] for i in range(fh)])
    return _sum([t[:, :, i::ft] for i in range(ft)])


def _sum(parts: list[Tensor]) -> Tensor:
    return functools.reduce(operator.add, parts)
