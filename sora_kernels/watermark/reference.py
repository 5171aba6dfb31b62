"""A mark in the pixels of frames in plain PyTorch: the specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, FULL = 8, 8.0  # pixels of a block's side; the deviation from which on texture hides no more


def accumulate(x: Tensor) -> Tensor:
    """x in the dtype the mathematics is done in: fp64 stays fp64, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def deviation(plane: Tensor, dtype: torch.dtype) -> Tensor:
    """Of whole numbers `[N, H, W]`, that of each block of 8 x 8, and of what is left of it at the edges.

    n sum(x^2) - sum(x)^2 is a whole number of at most 28 bits: exact, in whatever order it is summed.
    """
    H, W = plane.shape[1:]
    blocks = F.pad(plane.int(), (0, -W % BLOCK, 0, -H % BLOCK)).unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    total, square = (x.sum((2, 4), dtype=torch.int32) for x in (blocks, blocks * blocks))
    rows, columns = ((n - torch.arange(0, n, BLOCK, device=plane.device)).clamp(max=BLOCK) for n in (H, W))
    count = (rows[:, None] * columns).int()
    return (count * square - total * total).to(dtype).sqrt() / count


def embed_watermark(frames: Tensor, tile: Tensor) -> Tensor:
    """`[B, T, H, W, 3]` uint8 -> the same: `clamp(frames + round((1 + min(deviation / 8, 1) / 2) * tile))`."""
    B, T, H, W, _ = frames.shape
    tile, (P, Q) = accumulate(tile), tile.shape
    busy = (deviation(frames[..., 1].flatten(0, 1), tile.dtype) / FULL).clamp(max=1)
    gain = (1 + busy / 2).repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :H, :W]
    mark = tile.repeat(-(-H // P), -(-W // Q))[:H, :W]
    levels = (gain * mark).clamp(-255, 255).nan_to_num(-255.0).round().to(torch.int16)
    return (frames + levels.view(B, T, H, W, 1)).clamp(0, 255).to(torch.uint8)
