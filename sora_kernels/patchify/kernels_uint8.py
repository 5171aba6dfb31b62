"""Triton kernel of `video_to_uint8`: each value is read once and leaves as one byte."""

from __future__ import annotations

import math

import triton
import triton.language as tl


@triton.jit
def video_to_uint8_kernel(
    video_ptr, out_ptr, stride_b, stride_f, stride_t, stride_h, stride_w, T, H, W, C, FEATURES,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A program turns a part of one line of the video into parts of the PT·PH lines of frames that it makes.

    FLAT: the one feature is a line of frames, byte for byte; ALIGN divides the length of such a line.
    The sum with 2^23 rounds to even and leaves the integer in the last bits; the minimum before it also keeps it from
    being fused with the product, which must be rounded first. Maximum and minimum of a NaN are the other operand.
    """
    blocks_w, blocks_f = tl.cdiv(W, BLOCK_W), tl.cdiv(FEATURES, BLOCK_F)
    w = tl.program_id(0) % blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)
    f = tl.program_id(0) // blocks_w % blocks_f * BLOCK_F + tl.arange(0, BLOCK_F)
    line = tl.program_id(0) // blocks_w // blocks_f
    mask = (f < FEATURES)[:, None] & (w < W)[None, :]
    h, t, b = line % H, line // H % T, (line // H // T).to(tl.int64)
    start = b * stride_b + t.to(tl.int64) * stride_t + h.to(tl.int64) * stride_h
    offsets = start + (f.to(tl.int64) * stride_f)[:, None] + (w.to(tl.int64) * stride_w)[None, :]
    x = tl.load(video_ptr + offsets, mask=mask).to(tl.float32)
    scaled = tl.minimum((tl.maximum(x, -1.0) + 1.0) * 127.5, 255.0)
    byte = (scaled + 8388608.0).to(tl.int32, bitcast=True).to(tl.uint8)
    width = W * PW * C  # of a line of frames
    start = tl.multiple_of(((b * T + t) * PT * H + h) * PH * width, ALIGN)
    if FLAT:
        tl.store(out_ptr + start + w[None, :], byte, mask=mask)
    else:
        c, i, k, j = f // (PT * PW * PH), f // (PW * PH) % PT, f // PH % PW, f % PH
        place = (i * H * PH + j).to(tl.int64) * width + k * C + c
        tl.store(out_ptr + start + place[:, None] + (w * (PW * C))[None, :], byte, mask=mask)


def video_to_uint8_fwd(video, patch, out):
    if out.numel() == 0:
        return
    B, features, T, H, W = video.shape
    stride_b, stride_f, stride_t, stride_h, stride_w = video.stride()
    flat = math.prod(patch) == 1 and stride_f == 1 and stride_w == features  # already in the order of the frames
    if flat:
        features, W, stride_f, stride_w = 1, W * features, 0, 1
    block_f = min(triton.next_power_of_2(features), 64)
    block_w = min(triton.next_power_of_2(W), 2048 // block_f)
    video_to_uint8_kernel[(B * T * H * triton.cdiv(W, block_w) * triton.cdiv(features, block_f),)](
        video, out, stride_b, stride_f, stride_t, stride_h, stride_w, T, H, W, features // math.prod(patch), features,
        PT=patch[0], PH=patch[1], PW=patch[2], FLAT=flat, ALIGN=math.gcd(16, W) if flat else 1,
        BLOCK_F=block_f, BLOCK_W=block_w, num_warps=4,
    )  # fmt: skip
