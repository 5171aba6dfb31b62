"""Tiles: how many tokens a program holds, and which boxes of the video they are."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._gpu import asynchronous, capability, small

__all__ = ["Tile", "backward_keys", "backward_queries", "capability", "choose_boxes", "fastest", "forward", "parts"]

Box = tuple[int, int, int]
# Estimates, not yet measured
MASKED_COST = 1.5  # of a tile that asks the coordinates, in units of one that does not
LOAD_COST = 128  # of a token's k and v (or q and dO), in pairs computed: what L2 gives against what tensor cores take


def choose_boxes(clips, own: Sequence[int | Box], visit: int | Box) -> tuple[Box, Box, list[int]]:
    """Boxes of `own` and `visit` tokens that compute least over the clips; the most boxes an owner of each clip visits.

    clips   `plan.Clip`s on the CPU. A triple instead of a number is taken as it is.
    own     alternatives. Large tiles load a visited token for more owners; but where an owner sees fewer tokens than
            its tile holds, as along time alone, a tile of half the size computes half the pairs
    """
    axes = list(zip(*(clip.axes for clip in clips), strict=True))
    flat = [all(max(lo.shape[0], keys) <= 1 for lo, _, keys in axis) for axis in axes]

    def candidates(tile: int | Box) -> list[Box]:
        if not isinstance(tile, int):
            return [tuple(tile)]
        if not clips:
            return [(1, 1, tile)]
        sides = [1 << n for n in range(tile.bit_length())]
        boxes = [(tile // (h * w), h, w) for w in reversed(sides) for h in sides if h * w <= tile]
        return [box for box in boxes if all(side == 1 for side, f in zip(box[:2], flat, strict=False) if f)]

    @functools.cache
    def along(clip: int, axis: int, own_side: int, visit_side: int) -> tuple[int, int, int]:
        """Visits along one axis summed over the owners, those seen whole, and the most of one owner."""
        some, past, every, short = spans(clip, own_side)[axis]
        visits = ((past - some).clamp_min(0) + visit_side - 1) // visit_side
        whole = ((short - some) // visit_side + (some - every) // visit_side).clamp_min(0)
        return int(visits.sum()), int(whole.sum()), int(visits.max()) if visits.numel() else 0

    @functools.cache
    def spans(clip: int, side: int):
        return clips[clip].spans((side, side, side))

    def product(clip: int, boxes: tuple[Box, Box], what: int) -> int:
        return math.prod(along(clip, axis, *(box[axis] for box in boxes))[what] for axis in range(3))

    def cost(boxes: tuple[Box, Box]) -> float:
        totals = (MASKED_COST * product(c, boxes, 0) - (MASKED_COST - 1) * product(c, boxes, 1) for c in unique)
        return sum(total * n for total, n in zip(totals, unique.values(), strict=True))

    def time(boxes: tuple[Box, Box]) -> float:
        own_tile, visit_tile = map(math.prod, boxes)
        loaded = 0
        for c, n in unique.items():
            owners = math.prod(spans(c, side)[axis][0].shape[0] for axis, side in enumerate(boxes[0]))
            loaded += n * (own_tile * owners + visit_tile * product(c, boxes, 0))
        return own_tile * visit_tile * cost(boxes) + LOAD_COST * loaded

    sizes: dict[tuple, int] = {}
    unique: dict[int, int] = {}
    for i, clip in enumerate(clips):
        first = sizes.setdefault(clip.size, i)
        unique[first] = unique.get(first, 0) + 1
    boxes = min((min(itertools.product(candidates(tile), candidates(visit)), key=cost) for tile in own), key=time)
    return *boxes, [product(sizes[clip.size], boxes, 2) for clip in clips]


@dataclass(frozen=True)
class Tile:
    """Tokens of a program's queries and keys, warps, stages of the pipeline, and how visited tiles are loaded.

    Warps are not specialised: a kernel of two loops, whole tiles and then masked ones, stops the compiler for Hopper
    (`tl.range(..., warp_specialize=True)` of triton 3.6 and 3.9); that for Blackwell takes it, with boxes only.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False  # as boxes through the TMA of Hopper and later

    def halves(self, own: int) -> tuple[int, ...]:
        """Alternatives for the owner's tokens: half as many on half the warps, but no less than wgmma takes."""
        return (own, own // 2) if own >= 128 else (own,)


def parts(E: int) -> tuple[int, ...]:
    """Powers of two that hold a head of width E, two where that is less: 72 -> (64, 16).

    A product takes 16 at least; beside 128, less than 64 made the compiler spill thousands of bytes.
    """
    whole = max(16, 1 << max(E - 1, 0).bit_length())
    rest = max(64 if whole > 128 else 16, 1 << max(E - whole // 2 - 1, 0).bit_length())
    return (whole,) if rest >= whole // 2 else (whole // 2, rest)


# Found by compiling for each GPU within its registers and shared memory (tests/test_compile_only.py); speed not yet
# measured on any. A masked loop (`planned`) holds a few more registers than a dense one.


def forward(E: int, dtype: torch.dtype, capability: int, planned: bool) -> Tile:
    if dtype == torch.float32:  # products in full precision run on plain cores
        if E > 128:
            return Tile(16, 16, 4, 1)
        if E > 64 and capability >= 90:  # on sm_100 a single stage leaves 40 bytes without a register
            return Tile(32, 64, 8, 2 if 100 <= capability < 120 else 1)
        return Tile(64, 32, 8, 1)
    if E > 128:
        return Tile(64, 16 if planned and not asynchronous(capability) else 32, 8, 2)
    if planned and E > 64 and not asynchronous(capability):
        return Tile(64 if small(capability) else 128, 32, 8, 3)
    return Tile(128, 64, 8, 3)


def backward_queries(E: int, dtype: torch.dtype, capability: int, planned: bool) -> Tile:
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1) if E <= 64 else Tile(16, 16, 4, 1)
    if E > 128:
        return Tile(32, 32, 8, 1)
    if asynchronous(capability):
        return Tile(128, 32, 8, 2) if planned else Tile(128, 64, 8, 2)
    return Tile(64, 64 if len(parts(E)) == 1 else 32, 8, 2)


def backward_keys(E: int, dtype: torch.dtype, capability: int, planned: bool) -> Tile:
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1) if E <= 64 else Tile(16, 16, 4 if E <= 128 else 8, 1)  # 4 spill 96 bytes on sm_90
    if E > 128:
        return Tile(32, 32, 8, 1)
    if asynchronous(capability):
        return Tile(32, 128, 8, 2)
    whole = len(parts(E)) == 1
    if planned and (E <= 64 or not whole):  # 32 queries spill up to 2520 bytes (E = 96 on sm_80)
        return Tile(16, 128 if E <= 64 else 64, 8, 2)
    return Tile(32, 128 if E <= 64 else 64 if whole else 32, 8, 2)


# Compute capability -> the head widths of which `python -m benchmarks.run --op spacetime_attention` has found triton
# faster than PyTorch's own kernel, dense, forward and backward together. Empty: not yet measured on any GPU.
TRITON_FASTER: dict[int, frozenset[int]] = {}


def fastest(q: torch.Tensor) -> str | None:
    """What "auto" takes first for attention without a mask on a GPU: PyTorch's kernel, until ours is known to win."""
    return None if q.shape[-1] in TRITON_FASTER.get(capability(q.device), ()) else "sdpa"
