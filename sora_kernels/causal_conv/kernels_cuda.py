"""What csrc/cuda/causal_conv.cu takes: a convolution of stride 1 of a channels-last video, with its epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from .._operands import dense_taps
from . import config

LAST = torch.channels_last_3d
NORMED = 128  # channels, at most, of a pixel that is normalised: those of a tile whose epilogue finds registers
TALLEST = 9  # kernel: more rows around a tile than shared memory holds


def why_not(
    x: Tensor, weight: Tensor, cache: Tensor | None, residual: Tensor | None, normed: bool, stride: tuple[int, int, int]
) -> str | None:
    """Why the kernel does not take these arguments."""
    (N, C, kt, kh, kw), capability = weight.shape, config.capability(x.device)
    if capability != 90:
        return f"cuda needs a GPU of compute capability 9.0; got {capability / 10}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"cuda takes bfloat16 or float16; got {x.dtype}"
    if C % 8 or N % 8:
        return f"cuda takes channels in multiples of 8; got {C} to {N}"
    if stride != (1, 1, 1) or kh > TALLEST or max(kt, kw) > 256:
        return f"cuda takes stride 1 and kernels of up to (256, {TALLEST}, 256); got {stride} and {(kt, kh, kw)}"
    if normed and N > NORMED:
        return f"cuda normalises pixels of up to {NORMED} channels; got {N}"
    if x.numel() == 0:
        return f"cuda takes no empty tensors; got x of {tuple(x.shape)}"
    for name, t in (("x", x), ("cache", cache), ("residual", residual)):
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
