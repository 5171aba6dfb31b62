"""Triton kernel of `embed_watermark`: programs have whole blocks of 8 x 8 pixels, so each byte is read once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["Q"])
def embed_watermark_kernel(
    frames_ptr, tile_ptr, out_ptr, stride_b, stride_t, stride_h, T, H, W, P, Q, BLOCKS: tl.constexpr
):
    """A program marks 8 lines of BLOCKS neighbouring blocks; the tile's lines are P, at least 8.

    A lane has single pixels, not neighbours, which would lie 3 bytes apart: hence a Q of which nothing is known. The
    bounds between product and sum keep them from being fused: the product must be rounded first. The sum with 1.5·2^23
    rounds to even and leaves the integer in the last bits. The maximum of a NaN is the other operand.
    """
    across, down = tl.cdiv(W, 8 * BLOCKS), tl.cdiv(H, 8)
    first = tl.program_id(0) % across * BLOCKS
    band, frame = tl.program_id(0) // across % down, tl.program_id(0) // across // down
    block = (first + tl.arange(0, BLOCKS))[None, :, None]
    row, column = (band * 8 + tl.arange(0, 8))[:, None, None], block * 8 + tl.arange(0, 8)[None, None, :]
    mask = (row < H) & (column < W)
    start = (frame // T).to(tl.int64) * stride_b + (frame % T).to(tl.int64) * stride_t
    pixel = frames_ptr + start + row.to(tl.int64) * stride_h + column * 3
    red = tl.load(pixel, mask=mask, other=0).to(tl.int32)
    green = tl.load(pixel + 1, mask=mask, other=0).to(tl.int32)
    blue = tl.load(pixel + 2, mask=mask, other=0).to(tl.int32)

    total = tl.sum(tl.sum(green, 0, keep_dims=True), 2, keep_dims=True)
    square = tl.sum(tl.sum(green * green, 0, keep_dims=True), 2, keep_dims=True)
    count = tl.maximum(tl.minimum(W - block * 8, 8), 1) * tl.minimum(H - band * 8, 8)
    spread = tl.sqrt_rn((count * square - total * total).to(tl.float32))
    gain = 1.0 + tl.minimum(tl.div_rn(spread, (8 * count).to(tl.float32)), 1.0) * 0.5

    line = band * 8 % P + tl.arange(0, 8)[:, None, None]
    line = tl.where(line < P, line, line - P).to(tl.int64)
    mark = tl.load(tile_ptr + line * Q + column % Q, mask=mask, other=0.0).to(tl.float32)
    scaled = tl.minimum(tl.maximum(gain * mark, -255.0), 255.0)
    levels = (scaled + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    marked = out_ptr + ((frame.to(tl.int64) * H + row) * W + column) * 3
    tl.store(marked, tl.minimum(tl.maximum(red + levels, 0), 255).to(tl.uint8), mask=mask)
    tl.store(marked + 1, tl.minimum(tl.maximum(green + levels, 0), 255).to(tl.uint8), mask=mask)
    tl.store(marked + 2, tl.minimum(tl.maximum(blue + levels, 0), 255).to(tl.uint8), mask=mask)


def embed_watermark_fwd(frames, tile, out):
    if out.numel() == 0:
        return
    B, T, H, W, _ = frames.shape
    tile = tile if tile.shape[0] >= 8 else tile.repeat(8, 1)
    blocks = 16
    embed_watermark_kernel[(B * T * triton.cdiv(H, 8) * triton.cdiv(W, 8 * blocks),)](
        frames, tile, out, *frames.stride()[:3], T, H, W, *tile.shape, BLOCKS=blocks, num_warps=4
    )
