"""Triton kernels of `qk_norm_stats`: sums of squares over a token's heads and their gradient, launched for q and for k.

Bytes per element, in units of its dtype, the fewest possible. Forward: 1. Backward: 2. Beside them a sum for a token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import forward_tile, load_pairs, of_q_and_k, row_offsets, store_pairs, strides_of


@triton.jit
def qk_norm_stats_fwd_kernel(
    x_ptr, stats_ptr, x_stride_b, x_stride_s, x_stride_h, stats_stride_b, stats_stride_s, S,
    H: tl.constexpr, E: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A program has one token, read once."""
    b, s = tl.program_id(0) // S, tl.program_id(0) % S
    heads = tl.arange(0, HEADS)
    offsets = row_offsets(b, s, heads, x_stride_b, x_stride_s, x_stride_h, E)
    x, y = load_pairs(x_ptr, offsets, heads < H, E, 0, PAIRS, True)
    at = b.to(tl.int64) * stats_stride_b + s.to(tl.int64) * stats_stride_s
    tl.store(stats_ptr + at, tl.sum(tl.sum(x * x + y * y, 1), 0))


@triton.jit
def qk_norm_stats_bwd_kernel(
    dstats_ptr, x_ptr, dx_ptr, dstats_stride_b, dstats_stride_s, x_stride_b, x_stride_s, x_stride_h, S,
    H: tl.constexpr, E: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A program has one token; dx is dense."""
    row = tl.program_id(0)
    b, s = row // S, row % S
    heads = tl.arange(0, HEADS)
    factor = 2.0 * tl.load(dstats_ptr + b.to(tl.int64) * dstats_stride_b + s.to(tl.int64) * dstats_stride_s)
    offsets = row_offsets(b, s, heads, x_stride_b, x_stride_s, x_stride_h, E)
    x, y = load_pairs(x_ptr, offsets, heads < H, E, 0, PAIRS, True)
    offsets = (row.to(tl.int64) * H + heads) * E
    store_pairs(dx_ptr, offsets, x * factor, y * factor, heads < H, E, 0, PAIRS, True)


def qk_norm_stats_fwd(q, k, stats) -> None:
    for x, sums in zip((q, k), of_q_and_k(stats, q, k), strict=True):
        if x.numel() == 0:
            sums.zero_()
            continue
        B, S, H, E = x.shape
        config = forward_tile(H, E, True)
        qk_norm_stats_fwd_kernel[(B * S,)](x, sums, *strides_of(x), *sums.stride(), S, H=H, E=E, **config)


def qk_norm_stats_bwd(dstats, q, k, dq, dk) -> None:
    for x, dx, dsums in zip((q, k), (dq, dk), of_q_and_k(dstats, q, k), strict=True):
        if dx is None or x.numel() == 0:
            continue
        B, S, H, E = x.shape
        config = forward_tile(H, E, True)
        qk_norm_stats_bwd_kernel[(B * S,)](dsums, x, dx, *dsums.stride(), *strides_of(x), S, H=H, E=E, **config)
