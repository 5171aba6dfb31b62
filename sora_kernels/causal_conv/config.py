"""Tiles of the convolutions: pixels and channels of a program, and which boxes of a frame the pixels are."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from .._triton import capability

__all__ = ["Tile", "choose_box", "forward", "parts", "weight_gradient", "capability"]

Box = tuple[int, int, int]


@dataclass(frozen=True)
class Tile:
    """Pixels of a program, its output channels in one or two powers of two, input channels of a step of its loop."""

    pixels: int
    columns: tuple[int, ...]
    channels: int
    warps: int
    stages: int


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def parts(width: int, most: int) -> tuple[int, ...]:
    """One or two powers of two, 16 at the least, that hold `width` or, several times over, share it: 96 -> (64, 32)."""
    blocks = -(-width // most)
    share = max(16, -(-width // blocks))
    whole = _power(share)
    rest = max(16, _power(share - whole // 2))
    return (whole,) if whole == 16 or rest >= whole // 2 else (whole // 2, rest)


@functools.cache
def choose_box(pixels: int, frames: int, height: int, width: int) -> Box:
    """The box of this many pixels, a power of two each way, that covers the video in the fewest boxes.

    Among equals one of a single frame, then the one with the smallest rim: its neighbours' pixels are read too.
    """
    sides = [1 << n for n in range(pixels.bit_length())]
    boxes = [(pixels // (h * w), h, w) for h in sides for w in sides if h * w <= pixels]

    def cost(box: Box) -> tuple:
        count = math.prod(-(-n // side) for n, side in zip((frames, height, width), box, strict=True))
        return count, box[0], box[1] + box[2], -box[2]

    return min(boxes, key=cost)


# Found by compiling for each GPU within its registers and shared memory (tests/test_compile_only.py); speed not yet
# measured on any.


def forward(C: int, O: int, dtype: torch.dtype, capability: int) -> Tile:  # noqa: E741
    """Of a convolution of C channels to O, forward or the gradient of its data."""
    block = min(64, max(16, _power(C)))
    if C % block and C > 32:
        block = 32  # 96 = 3 · 32
    if dtype == torch.float32:
        return Tile(64, parts(O, 64), min(block, 16), 8, 1)
    return Tile(128, parts(O, 256), block, 8, 3)


def weight_gradient(C: int, O: int, dtype: torch.dtype, capability: int) -> Tile:  # noqa: E741
    """Of the sums over pixels of O values times C: `channels` are those of O, `columns` those of C."""
    if dtype == torch.float32:
        return Tile(32, parts(C, 32), 32, 8, 1)
    return Tile(64, parts(C, 128), 128 if O > 64 else 64, 8, 3)
