"""A keyed mark in the frames of a clip of a public model, a chunk of 4 of them, as the writer of a file embeds it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.watermark import reference

from .shapes import Shape
from .suite import Benchmark, Inputs

TILE, FRAMES = 64, 4


def _size(shape: Shape) -> tuple[int, int]:
    """8 times as high and wide as the latents."""
    (_, H, W), (_, ph, pw) = shape.grid, shape.model.patch
    return 8 * ph * H, 8 * pw * W


def _inputs(shape: Shape, dtype: torch.dtype, draw: Callable[..., Tensor]) -> Inputs:
    levels = draw(shape.batch, FRAMES, *_size(shape), 3, dtype=torch.float32)
    return {"tile": 1.5 * draw(TILE, TILE), "frames": (128 + 40 * levels).clamp(0, 255).to(torch.uint8)}


def _eager(tile, frames) -> Tensor:
    """By means over pooled blocks, in fp32."""
    H, W = frames.shape[2:4]
    shown = frames.flatten(0, 1).float()
    green = shown[..., 1].unsqueeze(1)
    mean, square = (F.avg_pool2d(x, 8, ceil_mode=True).squeeze(1) for x in (green, green * green))
    busy = (square - mean * mean).clamp(min=0).sqrt().div(8).clamp(max=1)
    gain = (1 + busy / 2).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :H, :W]
    mark = tile.float().repeat(-(-H // TILE), -(-W // TILE))[:H, :W]
    return (shown + (gain * mark).unsqueeze(-1)).round().clamp(0, 255).to(torch.uint8).view(frames.shape)


def _flops(shape: Shape, mode: str) -> int:
    """Of a pixel the green's square and two sums, a product, two bounds and a rounding, and a sum of each colour."""
    H, W = _size(shape)
    return 10 * shape.batch * FRAMES * H * W


BENCHMARKS = [
    Benchmark(
        "embed_watermark",
        inputs=_inputs,
        reference=reference.embed_watermark,
        eager=_eager,
        differentiable=(),
        backward_reads=(),
        backward_writes=(),
        flops=_flops,
    ),
]
