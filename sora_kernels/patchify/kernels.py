"""Triton kernels of the patchify family: the video layout they share, and `unpatchify3d`.

`kernels_embed` and `kernels_final` build on the primitives here. Tokens are counted in 32 bits, elements in 64.

`unpatchify3d` moves each value once, 2 elements of traffic a value, the fewest possible, forward and backward.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .._triton import multiply_add
from .reference import patch_of

# fp32 operands on tensor cores as three products of their bf16 halves: 16 bits of each operand, and bf16's range.
# The interpreter knows no such pass and multiplies in fp32.
SPLIT = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "bf16x3")


@triton.jit
def dot(a, b, acc, TOKENS: tl.constexpr):
    """acc + a·b beside tokens of dtype TOKENS: two operands of one 16-bit dtype as they are, all others as fp32."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, acc)
    elif TOKENS == tl.float32:
        return multiply_add(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=SPLIT)


@triton.jit
def token_offsets(
    b, s, stride_b, stride_t, stride_h, stride_w, grid_h, grid_w,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """Of the first element of the patches of tokens s in videos b."""
    t, h, w = s // grid_w // grid_h * PT, s // grid_w % grid_h * PH, s % grid_w * PW
    offset = b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t
    return offset + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w


@triton.jit
def feature_offsets(c, within, stride_c, stride_t, stride_h, stride_w, PH: tl.constexpr, PW: tl.constexpr):
    """Of channel c at place `within` = (i·PH + j)·PW + k of a patch, from the patch's first element."""
    i, j, k = within // PW // PH, within // PW % PH, within % PW
    offset = c.to(tl.int64) * stride_c + i.to(tl.int64) * stride_t
    return offset + j.to(tl.int64) * stride_h + k.to(tl.int64) * stride_w


@triton.jit
def unpatchify3d_kernel(
    tokens_ptr, video_ptr, tokens_stride_b, tokens_stride_s, tokens_stride_n,
    stride_b, stride_c, stride_t, stride_h, stride_w, frames, height, columns, grid_h, grid_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, INVERSE: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """A program moves a line of the video, or a part of it, in several channels: a tile `[channels, x]`.

    Channels are neighbours in a token and columns are in the video: each side is read or written in its own order,
    and the tile turns in shared memory between them. ALIGN divides the width and every stride but that of x.
    """
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    blocks_x = tl.cdiv(columns * ALIGN, BLOCK_X)
    c = tl.program_id(0) % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    x = tl.program_id(0) // BLOCKS_C % blocks_x * BLOCK_X + tl.arange(0, BLOCK_X)
    line = tl.program_id(0) // BLOCKS_C // blocks_x
    mask = (c < C)[:, None] & (x < columns * ALIGN)[None, :]
    y, t, b = line % height, line // height % frames, (line // height // frames).to(tl.int64)
    s = (t // PT * grid_h + y // PH) * grid_w + x // PW
    n = ((t % PT * PH + y % PH) * PW + x % PW) * C
    token = b * tokens_stride_b + s.to(tl.int64) * tokens_stride_s + n.to(tl.int64) * tokens_stride_n
    tokens = tokens_ptr + token[None, :] + (c.to(tl.int64) * tokens_stride_n)[:, None]
    start = tl.multiple_of(b * stride_b + t.to(tl.int64) * stride_t + y.to(tl.int64) * stride_h, ALIGN)
    channels = tl.multiple_of(c.to(tl.int64) * stride_c, [ALIGN])
    video = video_ptr + start + (x.to(tl.int64) * stride_w)[None, :] + channels[:, None]
    if INVERSE:
        tl.store(tokens, tl.load(video, mask), mask)
    else:
        tl.store(video, tl.load(tokens, mask), mask)


def _move(tokens, video, grid, inverse) -> None:
    if tokens.numel() == 0:
        return
    B, channels, frames, height, width = video.shape
    pt, ph, pw = patch_of(video, grid)
    block_c = min(triton.next_power_of_2(channels), 64)
    block_x = min(triton.next_power_of_2(width), max(2048 // block_c, 32))
    align = math.gcd(16, width, *video.stride()[:4])
    programs = B * frames * height * triton.cdiv(width, block_x) * triton.cdiv(channels, block_c)
    unpatchify3d_kernel[(programs,)](
        tokens, video, *tokens.stride(), *video.stride(), frames, height, width // align, grid[1], grid[2],
        C=channels, PT=pt, PH=ph, PW=pw, INVERSE=inverse, ALIGN=align,
        BLOCK_C=block_c, BLOCK_X=block_x, num_warps=4,
    )  # fmt: skip


def unpatchify3d_fwd(tokens, T, H, W, out):
    _move(tokens, out, (T, H, W), inverse=False)


def unpatchify3d_bwd(dout, T, H, W, dtokens):
    _move(dtokens, dout, (T, H, W), inverse=True)
