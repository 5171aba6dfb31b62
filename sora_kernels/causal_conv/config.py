"""Tiles of the convolutions: pixels and channels of a program, and which boxes of a frame the pixels are; and where
they are known to be faster than cuDNN."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from .._gpu import asynchronous, capability, small

__all__ = ["Tile", "choose_box", "fastest", "forward", "parts", "weight_gradient", "capability"]

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
    """One or two powers of two from 16 to 128, of which blocks of at most `most` cover `width` with little to spare.

    96 -> (64, 32); 384 -> (128, 64), twice. A further block reads the pixels again: counted as 32 columns.
    """
    candidates = []
    for blocks in range(-(-width // most), -(-width // 16) + 1):
        share = max(16, -(-width // blocks))
        whole = min(_power(share), 256)
        rest = max(16, _power(share - whole // 2))
        columns = (whole,) if whole <= 128 and (whole == 16 or rest >= whole // 2) else (whole // 2, rest)
        candidates.append((blocks * (sum(columns) + 32), blocks, columns))
    return min(candidates)[2]


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
# measured on any. More pixels a program read the weight less often from L2, the bound that is next to the products.


def _block(C: int) -> int:
    """Channels of a step: 64, or what divides a multiple of 32."""
    block = min(64, max(16, _power(C)))
    return 32 if C > 32 and C % block else block


def forward(C: int, N: int, dtype: torch.dtype, capability: int) -> Tile:
    """Of a convolution of C channels to N, forward or the gradient of its data."""
    if dtype == torch.float32:  # products in full precision run on plain cores
        return Tile(64, parts(N, 96), 16, 8, 1)
    if not asynchronous(capability):
        columns = parts(N, 192)
        if sum(columns) > 128 and small(capability):
            return Tile(128, columns, min(32, _block(C)), 8, 2)
        return Tile(128, columns, _block(C), 8, 3)
    columns = parts(N, 256)
    if sum(columns) > 128:
        return Tile(128, columns, _block(C), 8, 3)
    if columns == (128,):  # on sm_90 the sums of 8 warps would leave a few words without a register
        return Tile(256, columns, _block(C), 16 if capability == 90 else 8, 3)
    return Tile(256, columns, _block(C), 8, 4)


def weight_gradient(C: int, N: int, dtype: torch.dtype, capability: int) -> Tile:
    """Of the sums over pixels of N values times C: `channels` are those of N, `columns` those of C."""
    block = 128 if N > 64 else 64 if N > 16 else 16
    if dtype == torch.float32:
        return Tile(32, parts(C, 32), min(block, 32), 8, 1)
    if not asynchronous(capability):
        return Tile(32, parts(C, 128), block, 8, 3)
    return Tile(64, parts(C, 256), block, 8, 3)


# Compute capability -> {(operation, whether its backward follows): the fewest channels, in and out, from which on
# "auto" takes triton for 16-bit videos; below, and where nothing is said, it leaves the products to cudnn. Empty: not
# yet measured on any GPU. `python -m benchmarks.run --op NAME` times both in turns on layers of public models and names
# those where triton is faster. An entry is the channels of the narrowest of them, if triton is faster on all wider ones
# as well: forward alone, or forward + backward together.
TRITON_FROM: dict[int, dict[tuple[str, bool], int]] = {}


def fastest(op: str, x: torch.Tensor, weight: torch.Tensor, grad: bool) -> str | None:
    """What "auto" takes first on a GPU: cuDNN's products, until ours are known to win. fp32 stays with triton."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return None
    least = TRITON_FROM.get(capability(x.device), {}).get((op, grad))
    return None if least is not None and min(weight.shape[0], weight.shape[1]) >= least else "cudnn"
