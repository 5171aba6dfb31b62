"""What csrc/cuda takes of the family: convolutions of stride 1 of a channels-last video, with an epilogue, and of an
upsampled one (causal_conv.cu); an RMS norm (causal_conv_norm.cu)."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .._operands import box, dense_taps, video_format
from . import config

LAST = torch.channels_last_3d
NORMED = 128  # channels, at most, of a pixel that is normalised: those of a tile whose epilogue finds registers
TALLEST = 9  # kernel: more rows around a tile than shared memory holds
PHASES = 8  # of an upsampling: a descriptor each
CHANNELS = 1024  # of a pixel that norm_silu normalises

Triple = tuple[int, int, int]


def why_not(
    x: Tensor, weight: Tensor, cache: Tensor | None, residual: Tensor | None, normed: bool, stride: Triple
) -> str | None:
    """Why the kernel does not take these arguments of causal_conv3d."""
    (N, _, kt, kh, kw) = weight.shape
    if stride != (1, 1, 1) or kh > TALLEST or max(kt, kw) > 256:
        return f"cuda takes stride 1 and kernels of up to (256, {TALLEST}, 256); got {stride} and {(kt, kh, kw)}"
    if normed and N > NORMED:
        return f"cuda normalises pixels of up to {NORMED} channels; got {N}"
    return _why_not(weight, x=x, cache=cache, residual=residual)


def why_not_upsample(x: Tensor, weight: Tensor, cache: Tensor | None, factor: Triple) -> str | None:
    """Why the kernel does not take these arguments of upsample_conv3d."""
    taps = tuple(weight.shape[2:])
    if math.prod(factor) > PHASES or any((k - 1) % f for k, f in zip(taps, factor, strict=True)):
        return (
            f"cuda takes factors of up to {PHASES} pixels, each of which divides its k - 1; got factor={factor} and "
            f"kernels of {taps}"
        )
    kt, kh, kw = ((k - 1) // f + 1 for k, f in zip(taps, factor, strict=True))
    if kh > TALLEST or max(kt, kw) > 256:
        return f"cuda takes up to (256, {TALLEST}, 256) taps of a phase; got {(kt, kh, kw)}"
    reason = _why_not(weight, x=x, cache=cache)
    if reason is None and video_format(x) != LAST:  # of one pixel: x is either, its result is not
        return f"cuda takes channels-last videos of more than one pixel; got x of {tuple(x.shape)}"
    return reason


def why_not_norm(x: Tensor, groups: int) -> str | None:
    """Why the kernel does not take these arguments of norm_silu."""
    if groups:
        return 'cuda takes norm="rms", one pass; got norm="group"'
    C, pixels, vec = x.shape[1], x.shape[2:].numel(), 16 // x.element_size()
    if C > CHANNELS:
        return f"cuda takes at most {CHANNELS} channels; got {C}"
    if video_format(x) == LAST or pixels == 1:
        if C % vec:
            return f"cuda takes channels in multiples of {vec} in channels-last videos of {x.dtype}; got {C}"
    elif pixels % vec:
        return f"cuda takes T·H·W in multiples of {vec} in channels-first videos of {x.dtype}; got {pixels}"
    if x.storage_offset() % vec:
        return f"cuda takes storage offsets that are multiples of {vec}; got {x.storage_offset()}"
    return None


def _why_not(weight: Tensor, **videos: Tensor | None) -> str | None:
    """Why the kernel takes no convolution of these videos, the first of which is x."""
    (N, C), x = weight.shape[:2], videos["x"]
    capability = config.capability(x.device)
    if capability != 90:
        return f"cuda needs a GPU of compute capability 9.0; got {capability / 10}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"cuda takes bfloat16 or float16; got {x.dtype}"
    if C % 8 or N % 8:
        return f"cuda takes channels in multiples of 8; got {C} to {N}"
    if x.numel() == 0:
        return f"cuda takes no empty tensors; got x of {tuple(x.shape)}"
    for name, t in videos.items():
        if t is None or t.numel() == 0:
            continue
        outer = [t.stride(axis) for axis in (0, 2, 3, 4) if t.shape[axis] > 1]
        if t.stride(1) != 1 or t.storage_offset() % 8 or any(step <= 0 or step % 8 for step in outer):
            return (
                "cuda takes channels-last videos (.to(memory_format=torch.channels_last_3d)) with strides and offsets "
                f"that are multiples of 8 elements; got {name} with strides {t.stride()} and offset "
                f"{t.storage_offset()}"
            )
    return None


def operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None, norm_weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """As the kernel reads them: videos channels last, taps dense in their input channels, vectors in fp32."""
    x, cache = (v if v is None or v.stride(1) == 1 else v.contiguous(memory_format=LAST) for v in (x, cache))
    bias, norm_weight = (v if v is None else v.float() for v in (bias, norm_weight))
    return x, dense_taps(weight, x), bias, cache, norm_weight


def parameters(weight: Tensor, bias: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of norm_silu, both of x's dtype or both fp32, at multiples of 16 bytes."""
    given = [t for t in (weight, bias) if t is not None]
    dtype = x.dtype if all(t.dtype == x.dtype for t in given) else torch.float32
    found = [t.to(dtype).contiguous() for t in given]
    found = [t.clone() if t.storage_offset() % (16 // t.element_size()) else t for t in found]
    return found[0], found[1] if len(found) > 1 else None


def phases(weight: Tensor, factor: Triple, x: Tensor) -> Tensor:
    """[phases·O, C, taps of a phase] for x: of each phase (t, h, w), the last fastest, the sums of the taps that meet
    the same pixel (`kernels_triton`)."""
    kt, kh, kw = weight.shape[2:]
    last = [front + f - 1 for front, f in zip((kt - 1, kh // 2, kw // 2), factor, strict=True)]
    boxed, (ft, fh, fw) = box(weight, factor), factor
    found = []
    for place in itertools.product(*map(range, factor)):
        t, h, w = ((n - r) % f for n, r, f in zip(last, place, factor, strict=True))
        found.append(boxed[:, :, t::ft, h::fh, w::fw])
    return dense_taps(torch.cat(found), x)
