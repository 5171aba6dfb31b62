"""Triton passes before and after a convolution of another library: its input laid out, its result finished.

pack      x after the frames before it, with zeros around: x is read and written once. The channels and pixels of a row
          are one dense axis, so no lane is idle whatever the channels are.
epilogue  bias, residual, RMS norm and SiLU: the result and the residual are read once, out and raw written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton import load_vector
from .kernels_norm import blocks, channels, pixel_strides, place, programs, sigmoid, sizes, tile

LAST = torch.channels_last_3d


@triton.jit
def pack_kernel(
    x_ptr, cache_ptr, out_ptr, x_stride_b, x_stride_t, x_stride_h, cache_stride_b, cache_stride_t, cache_stride_h,
    T, H, past, top, frames, height, begin, end, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of out, `width` values: from `begin` to `end` those of a row of x or cache, zeros around them."""
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    h = row % height - top
    t = row // height % frames - past
    b = (row // height // frames).to(tl.int64)
    live = (h >= 0) & (h < H)
    source = x_ptr + b * x_stride_b + t.to(tl.int64) * x_stride_t + h.to(tl.int64) * x_stride_h
    if cache_ptr is None:
        live = live & (t >= 0)
    else:
        earlier = cache_ptr + b * cache_stride_b + (t + past).to(tl.int64) * cache_stride_t
        source = tl.where(t < 0, earlier + h.to(tl.int64) * cache_stride_h, source)
    inside = (at >= begin) & (at < tl.where(live, end, 0))
    values = tl.load(source + (at - begin), mask=inside, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * width + at, values, mask=at < width)


@triton.jit
def epilogue_kernel(
    h_ptr, bias_ptr, residual_ptr, norm_weight_ptr, out_ptr, raw_ptr, h_stride_b,
    residual_stride_b, residual_stride_c, residual_stride_s, out_stride_b, out_stride_c, out_stride_s, C, S, eps,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y = h + bias + residual; raw = y; out = y or, with a norm, SiLU(y / rms(y) · norm_weight) over a pixel."""
    index, block, b = place(tl.cdiv(S, BLOCK_S), C, CHUNKS, BLOCK_C)
    first = index.to(tl.int64) * BLOCK_S
    ys = ()
    squares = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for k in tl.static_range(CHUNKS):
        c = channels(block + k, BLOCK_C)
        offsets, mask = tile(b, c, first, h_stride_b, 1, C, C, S, BLOCK_S)
        y = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + load_vector(bias_ptr, c, C, 0.0)[:, None]
        if residual_ptr is not None:
            offsets, mask = tile(
                b, c, first, residual_stride_b, residual_stride_c, residual_stride_s, C, S, BLOCK_S
            )  # fmt: skip
            y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        squares += y * y
        ys = ys + (y,)
    if norm_weight_ptr is not None:
        rstd = (1.0 / tl.sqrt_rn(tl.sum(squares, 0) / C + eps))[None, :]
    for k in tl.static_range(CHUNKS):
        c = channels(block + k, BLOCK_C)
        offsets, mask = tile(b, c, first, out_stride_b, out_stride_c, out_stride_s, C, S, BLOCK_S)
        y = ys[k]
        if raw_ptr is not None:
            tl.store(raw_ptr + offsets, y.to(raw_ptr.dtype.element_ty), mask=mask)
        if norm_weight_ptr is not None:
            z = y * rstd * load_vector(norm_weight_ptr, c, C, 0.0)[:, None]
            y = z * sigmoid(z)
        tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


def _rows(video: torch.Tensor) -> torch.Tensor:
    """The video with the channels and pixels of a row as one dense axis: itself or a copy."""
    C, W = video.shape[1], video.shape[4]
    dense = (C == 1 or video.stride(1) == 1) and (W == 1 or video.stride(4) == C)
    return video if dense else video.contiguous(memory_format=LAST)


def pack(x, cache, front, back=(0, 0)) -> torch.Tensor:
    """x, channels last and dense, with `front` frames, rows and columns before it and `back` rows and columns after it.

    Zeros, save that the frames before it are those of `cache` where there is one. Where nothing is added, x itself.
    """
    past, top, left = front
    if past == top == left == sum(back) == 0:
        return x.contiguous(memory_format=LAST)
    B, C, T, H, W = x.shape
    frames, height, width = past + T, top + H + back[0], left + W + back[1]
    out = torch.empty((B, C, frames, height, width), dtype=x.dtype, device=x.device, memory_format=LAST)
    x, cache = _rows(x), cache if cache is None else _rows(cache)
    places = [0 if v is None else v.stride(axis) for v in (x, cache) for axis in (0, 2, 3)]
    block = min(4096, triton.next_power_of_2(width * C))
    pack_kernel[(B * frames * height * triton.cdiv(width * C, block),)](
        x, cache, out, *places, T, H, past, top, frames, height, left * C, (left + W) * C, width * C,
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def epilogue(h, out, bias=None, residual=None, norm_weight=None, eps=0.0, raw=None) -> None:
    """out = h + bias + residual, or of it, which is raw, the norm.

    h [B, O, T, H, W]  channels last, each clip dense. out, residual, in either memory format, dense; raw like out.
    """
    _, C, S = sizes(h)
    config = blocks(h, norm_weight is not None, 4096)
    epilogue_kernel[programs(h, config)](
        h, bias, residual, norm_weight, out, raw, h.stride(0),
        *((0, 0, 0) if residual is None else pixel_strides(residual)), *pixel_strides(out), C, S, eps, **config,
    )  # fmt: skip
