"""What csrc/cuda/causal_conv.cu takes: a convolution of stride 1 of a channels-last video, with a bias."""

from __future__ import annotations

import torch
from torch import Tensor

from .._operands import dense_taps
from . import config

TALLEST = 9  # kernel: more rows around a tile than shared memory holds


def why_not(
    x: Tensor, weight: Tensor, cache: Tensor | None, stride: tuple[int, int, int], epilogue: dict[str, bool]
) -> str | None:
    """Why the kernel does not take these arguments. epilogue: argument -> whether it is asked for."""
    (N, C, kt, kh, kw), capability = weight.shape, config.capability(x.device)
    if capability != 90:
        return f"cuda needs a GPU of compute capability 9.0; got {capability / 10}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"cuda takes bfloat16 or float16; got {x.dtype}"
    if C % 8 or N % 8:
        return f"cuda takes channels in multiples of 8; got {C} to {N}"
    if stride != (1, 1, 1) or kh > TALLEST or max(kt, kw) > 256:
        return f"cuda takes stride 1 and kernels of up to (256, {TALLEST}, 256); got {stride} and {(kt, kh, kw)}"
    if asked := [name for name, wanted in epilogue.items() if wanted]:
        return f"cuda takes a bias and no {', '.join(asked)}"
    if x.numel() == 0:
        return f"cuda takes no empty tensors; got x of {tuple(x.shape)}"
    for name, t in (("x", x), ("cache", cache)):
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
    x: Tensor, weight: Tensor, bias: Tensor | None, cache: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As the kernel reads them: taps dense in their input channels, the bias in fp32."""
    return x, dense_taps(weight, x), bias if bias is None else bias.float(), cache
