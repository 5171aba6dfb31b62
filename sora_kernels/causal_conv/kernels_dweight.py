"""Triton kernel of the weight's gradient, of every convolution of the family.

    grad[tap, n, c] = Σ_p y[p, n] · x[stride·p + offset ± tap, c]        p = (b, t, h, w) of y

A product over pixels for each tap, y and x read in place as in `kernels_conv`. The pixels are divided into chunks, each
program sums one chunk for one tap and one tile of n and c, and the fp32 partials of the chunks are added in their order
by `sum_partials`: no atomics, the same bits in every run. There are as many chunks as fill the GPU and no more, so the
partials are at most `PROGRAMS` tiles, or one gradient in fp32.

Work: 2·N·C·taps flops a pixel, as forward. Bytes: y and x once for each tile of the other's channels and, where L2 does
not hold a chunk, for each tap; a tile of 128 x 96 has 55 flops a byte. Bound by the tensor cores, then by L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton import multiply_add, sum_partials, zeros
from . import config
from .kernels_conv import SIZES, at_pixels, box_pixels, is_wide, load_pixels, strides_of

PROGRAMS = 512  # at least, where there is work for them: four per SM of a large GPU
CHUNKS = ("tiles", "tiles_per_program")


@triton.jit(do_not_specialize=SIZES + CHUNKS)
def dweight_kernel(
    y_ptr, x_ptr, cache_ptr, partial_ptr, y_stride_b, y_stride_t, y_stride_h, y_stride_w,
    x_stride_b, x_stride_t, x_stride_h, x_stride_w, cache_stride_b, cache_stride_t, cache_stride_h, cache_stride_w,
    partial_stride_n, partial_stride_c, partial_stride_t, partial_stride_h, partial_stride_w, partial_stride_chunk,
    T, H, W, past, frames, height, width, offset_t, offset_h, offset_w, tiles_t, tiles_h, tiles_w,
    tiles, tiles_per_program,
    N: tl.constexpr, C: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, STEP: tl.constexpr,
    BOX: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tap of one tile of the gradient over one chunk of boxes. Names as in `conv_kernel`; y is of out's size.

    Programs side by side have the same chunk: what they read of it is in L2.
    """
    COLUMNS: tl.constexpr = PARTS[0] + (PARTS[1] if len(PARTS) == 2 else 0)
    BLOCKS_C: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program % BLOCKS_C * COLUMNS
    n = program // BLOCKS_C % BLOCKS_N * BLOCK_N + tl.arange(0, BLOCK_N)
    tap = program // BLOCKS_C // BLOCKS_N
    k, j, i = tap % KW, tap // KW % KH, tap // KW // KH % KT
    chunk = tap // KW // KH // KT
    earliest = 0
    if cache_ptr is not None:
        earliest = -past
    shift = offset_t + STEP * i  # a tap that meets no frame has nothing to sum
    meets = (shift + (frames - 1) * ST >= earliest) & (shift < T)
    begin = chunk * tiles_per_program
    end = tl.where(meets, tl.minimum(begin + tiles_per_program, tiles), begin)
    c = first + tl.arange(0, PARTS[0])
    acc = zeros(BLOCK_N, PARTS)

    for tile in range(begin, end):
        b, t, h, w = box_pixels(tile, tiles_t, tiles_h, tiles_w, BOX)
        b = b.to(tl.int64)
        live = (h < tl.where(t < frames, height, 0)) & (w < width)
        pixels = at_pixels(y_ptr, b, t, h, w, y_stride_b, y_stride_t, y_stride_h, y_stride_w, WIDE)
        mask = live[:, None]
        if N % BLOCK_N != 0:
            mask = mask & (n < N)[None, :]
        y = tl.trans(tl.load(pixels[:, None] + n[None, :], mask, 0.0))
        x_t, x_h, x_w = t * ST + shift, h * SH + offset_h + STEP * j, w * SW + offset_w + STEP * k
        video = x_ptr + b * x_stride_b
        earlier = None
        if cache_ptr is not None:
            earlier = cache_ptr + b * cache_stride_b
        x = load_pixels(
            video, earlier, x_t, x_h, x_w, first, T, H, W, past,
            x_stride_t, x_stride_h, x_stride_w, cache_stride_t, cache_stride_h, cache_stride_w, C, PARTS[0], WIDE,
        )  # fmt: skip
        head = multiply_add(y, x, acc[0])
        if len(PARTS) == 2:
            x = load_pixels(
                video, earlier, x_t, x_h, x_w, first + PARTS[0], T, H, W, past,
                x_stride_t, x_stride_h, x_stride_w, cache_stride_t, cache_stride_h, cache_stride_w, C, PARTS[1], WIDE,
            )  # fmt: skip
            acc = (head, multiply_add(y, x, acc[1]))
        else:
            acc = (head,)

    rows = partial_ptr + chunk.to(tl.int64) * partial_stride_chunk + n * partial_stride_n
    rows += i * partial_stride_t + j * partial_stride_h + k * partial_stride_w
    tl.store(rows[:, None] + c[None, :] * partial_stride_c, acc[0], (n < N)[:, None] & (c < C)[None, :])
    if len(PARTS) == 2:
        c = first + PARTS[0] + tl.arange(0, PARTS[1])
        tl.store(rows[:, None] + c[None, :] * partial_stride_c, acc[1], (n < N)[:, None] & (c < C)[None, :])


def weight_gradient(terms, out, *, stride=(1, 1, 1), step=1) -> None:
    """out[n, c, tap] = Σ over terms (y, x, cache, offset) of Σ_p y[p, n] x[stride·p + offset + step·tap, c].

    y, x, cache channels last; out [N, C, kt, kh, kw], dense in some order of its axes, of any float dtype.
    """
    N, C, kt, kh, kw = out.shape
    launches, chunks = [], 0
    for y, x, cache, offset in terms:
        if y.numel() == 0:
            continue
        tile = config.weight_gradient(C, N, y.dtype, config.capability(y.device))
        box = config.choose_box(tile.pixels, *y.shape[2:])
        counts = [triton.cdiv(n, side) for n, side in zip(y.shape[2:], box, strict=True)]
        tiles = y.shape[0] * counts[0] * counts[1] * counts[2]
        programs = triton.cdiv(N, tile.channels) * triton.cdiv(C, sum(tile.columns)) * kt * kh * kw
        each = triton.cdiv(tiles, max(1, triton.cdiv(PROGRAMS, programs)))
        launches.append((y, x, cache, offset, tile, box, counts, tiles, programs, each, chunks))
        chunks += triton.cdiv(tiles, each)
    if chunks == 0:
        out.zero_()
        return
    partials = torch.empty((1, chunks, out.numel()), dtype=torch.float32, device=out.device)
    for y, x, cache, offset, tile, box, counts, tiles, programs, each, begin in launches:
        dweight_kernel[(triton.cdiv(tiles, each) * programs,)](
            y, x, cache, partials[:, begin:], *strides_of(y, x, cache), *out.stride(), out.numel(),
            *x.shape[2:], 0 if cache is None else cache.shape[2], *y.shape[2:], *offset, *counts, tiles, each,
            N=N, C=C, KT=kt, KH=kh, KW=kw, ST=stride[0], SH=stride[1], SW=stride[2], STEP=step,
            BOX=box, PARTS=tile.columns, BLOCK_N=tile.channels, WIDE=is_wide(y, x, cache),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    sum_partials(partials, out.as_strided((1, out.numel()), (out.numel(), 1)))
