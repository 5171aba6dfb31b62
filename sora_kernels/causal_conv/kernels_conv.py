"""Triton kernel of the convolutions: one implicit GEMM for all of them and for the gradients of their data.

    out[p, n] = bias[n] + Σ_taps Σ_c x[stride·p + offset ± tap, c] · weight[n, c, tap]        p = (t, h, w)

Rows of the product are a box of output pixels, columns output channels, and the sum runs over taps and input channels.
A row is read where it lies: its coordinates are computed once, each tap shifts them and compares. Frames before x lie
in `cache`, which is not copied together with it, and what is outside of the frame is zero. Frames that are zeros for
the whole box are not visited: the first frame of a clip takes a third of the work of 3x3x3 taps.

x is read channels last with any other strides (and made so once where it is not), weights channels last, as they are
where they lie so and in x's dtype.

Work: 2·C·N·taps flops a pixel. Bytes: x, out and the weight once, 2·(C + N) a pixel in 16 bits, so for 3x3x3 taps of
96 channels 1296 flops a byte: bound by the tensor cores by far (an H200 does 184 per byte that it copies). What comes
next is L2. For the 2·pixels·C·columns flops of a tap a program reads pixels·C values of x and C·columns of the weight:
55 flops a byte with 128 pixels and 96 columns, 70 with 256. The taps of a frame read nearly the same pixels, so x goes
through L1, which holds them (16x16 pixels with their rim, 96 channels: 61 KiB): 256 flops a byte are left, the
weight's. A result of 3 channels is bound by these reads alone.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from .._triton import load_vector, multiply_add, zeros
from . import config

# Sizes and places: one kernel serves all clips, chunks, phases and positions of a tile.
SIZES = (
    "T", "H", "W", "past", "frames", "height", "width", "offset_t", "offset_h", "offset_w",
    "tiles_t", "tiles_h", "tiles_w",
)  # fmt: skip


@triton.jit
def box_pixels(tile, tiles_t, tiles_h, tiles_w, BOX: tl.constexpr):
    """(b, t, h, w) of the pixels of box `tile`; of one frame, t is a scalar. Beyond an edge they count on."""
    j = tl.arange(0, BOX[0] * BOX[1] * BOX[2])
    w = tile % tiles_w * BOX[2] + j % BOX[2]
    h = tile // tiles_w % tiles_h * BOX[1] + j // BOX[2] % BOX[1]
    t = tile // tiles_w // tiles_h % tiles_t * BOX[0]
    if BOX[0] > 1:
        t += j // (BOX[1] * BOX[2])
    return tile // tiles_w // tiles_h // tiles_t, t, h, w


@triton.jit
def at_pixels(ptr, b, t, h, w, stride_b, stride_t, stride_h, stride_w, WIDE: tl.constexpr):
    """Pointers to pixels (t, h, w) of video b. Offsets within a frame take 32 bits, or, WIDE, 64."""
    if WIDE:
        h, w = h.to(tl.int64), w.to(tl.int64)
    return ptr + b * stride_b + t.to(tl.int64) * stride_t + (h * stride_h + w * stride_w)


@triton.jit
def load_pixels(
    x_ptr, cache_ptr, t, h, w, first, T, H, W, past,
    x_stride_t, x_stride_h, x_stride_w, cache_stride_t, cache_stride_h, cache_stride_w,
    C: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """WIDTH channels from `first` of the pixels (t, h, w) of a video, before whose frames lie the `past` of cache."""
    c = first + tl.arange(0, WIDTH)
    frame = x_ptr + t.to(tl.int64) * x_stride_t
    stride_h, stride_w = x_stride_h, x_stride_w
    if cache_ptr is None:
        rows = tl.where((t >= 0) & (t < T), H, 0)
    else:
        before = t < 0
        rows = tl.where((t >= -past) & (t < T), H, 0)
        frame = tl.where(before, cache_ptr + (t + past).to(tl.int64) * cache_stride_t, frame)
        stride_h = tl.where(before, cache_stride_h, x_stride_h)
        stride_w = tl.where(before, cache_stride_w, x_stride_w)
    mask = ((h >= 0) & (h < rows) & (w >= 0) & (w < W))[:, None]
    if WIDE:
        h, w = h.to(tl.int64), w.to(tl.int64)
    pixels = frame + (h * stride_h + w * stride_w)
    if C % WIDTH != 0:
        mask = mask & (c < C)[None, :]
    return tl.load(pixels[:, None] + c[None, :], mask, 0.0, cache_modifier=".ca")  # the next taps read it again


@triton.jit
def load_weight(
    ptr, c, n, stride_c, stride_n, C: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """[BLOCK input channels from c, WIDTH output channels from n] of one tap."""
    c, n = c + tl.arange(0, BLOCK), n + tl.arange(0, WIDTH)
    mask = (n < N)[None, :]
    if C % BLOCK != 0:
        mask = mask & (c < C)[:, None]
    return tl.load(ptr + c[:, None] * stride_c + n[None, :] * stride_n, mask, 0.0)


@triton.jit
def add_product(
    acc, x, ptr, c, n, stride_c, stride_n,
    C: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """acc + x · weight, for each part of the output channels."""
    w = load_weight(ptr, c, n, stride_c, stride_n, C, N, BLOCK, PARTS[0])
    head = multiply_add(x, w, acc[0])
    if len(PARTS) == 1:
        return (head,)
    else:
        w = load_weight(ptr, c, n + PARTS[0], stride_c, stride_n, C, N, BLOCK, PARTS[1])
        return (head, multiply_add(x, w, acc[1]))


@triton.jit
def next_tap(i, j, k, c, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr):
    """The next block of channels, and with the first of them the next tap: counting, where // and % would divide."""
    c += BLOCK
    full = c >= C
    c = tl.where(full, 0, c)
    k += full.to(tl.int32)
    full = k == KW
    k = tl.where(full, 0, k)
    j += full.to(tl.int32)
    full = j == KH
    return i + full.to(tl.int32), tl.where(full, 0, j), k, c


@triton.jit
def finish(acc, bias_ptr, pixels, n, mask, stride_c, N: tl.constexpr):
    """acc + bias + what the residual has at `pixels`."""
    acc += load_vector(bias_ptr, n, N, 0.0)[None, :]
    if pixels is not None:
        acc += tl.load(pixels[:, None] + n[None, :] * stride_c, mask, 0.0).to(tl.float32)
    return acc


@triton.jit
def norm_silu(acc, norm_weight_ptr, n, rstd, N: tl.constexpr):
    y = acc * rstd[:, None] * load_vector(norm_weight_ptr, n, N, 0.0)[None, :]
    return y / (1.0 + tl.exp(-y))


@triton.jit
def store(pixels, n, values, mask, stride_c):
    tl.store(pixels[:, None] + n[None, :] * stride_c, values.to(pixels.dtype.element_ty), mask)


@triton.jit(do_not_specialize=SIZES)
def conv_kernel(
    x_ptr, cache_ptr, weight_ptr, bias_ptr, residual_ptr, norm_weight_ptr, out_ptr, raw_ptr,
    x_stride_b, x_stride_t, x_stride_h, x_stride_w,
    cache_stride_b, cache_stride_t, cache_stride_h, cache_stride_w,
    weight_stride_n, weight_stride_c, weight_stride_t, weight_stride_h, weight_stride_w,
    residual_stride_b, residual_stride_c, residual_stride_t, residual_stride_h, residual_stride_w,
    out_stride_b, out_stride_c, out_stride_t, out_stride_h, out_stride_w,
    T, H, W, past, frames, height, width, offset_t, offset_h, offset_w, tiles_t, tiles_h, tiles_w, eps,
    C: tl.constexpr, N: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, STEP: tl.constexpr,
    BOX: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A box of pixels of out and a block of its channels. STEP: +1, or -1 where taps go backwards through x.

    (frames, height, width) is the size of out, (T, H, W) that of x. raw has out's strides.
    """
    COLUMNS: tl.constexpr = PARTS[0] + (PARTS[1] if len(PARTS) == 2 else 0)
    BLOCKS: tl.constexpr = (N + COLUMNS - 1) // COLUMNS  # side by side: they share their pixels in L2
    ROWS: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    first = tl.program_id(0) % BLOCKS * COLUMNS
    tile = tl.program_id(0) // BLOCKS
    b, t, h, w = box_pixels(tile, tiles_t, tiles_h, tiles_w, BOX)
    b = b.to(tl.int64)
    x_ptr += b * x_stride_b
    earliest = 0
    if cache_ptr is not None:
        cache_ptr += b * cache_stride_b
        earliest = -past
    x_t, x_h, x_w = t * ST + offset_t, h * SH + offset_h, w * SW + offset_w

    x_first = (tile // tiles_w // tiles_h % tiles_t) * (BOX[0] * ST) + offset_t
    x_last = x_first + (BOX[0] - 1) * ST
    if STEP == 1:
        i, end = tl.maximum(earliest - x_last, 0), tl.minimum(T - x_first, KT)
    else:
        i, end = tl.maximum(x_first - T + 1, 0), tl.minimum(x_last - earliest + 1, KT)
    j, k, c = 0, 0, 0
    acc = zeros(ROWS, PARTS)
    for _ in range((end - i) * (KH * KW * ((C + BLOCK_C - 1) // BLOCK_C))):
        x = load_pixels(
            x_ptr, cache_ptr, x_t + STEP * i, x_h + STEP * j, x_w + STEP * k, c, T, H, W, past,
            x_stride_t, x_stride_h, x_stride_w, cache_stride_t, cache_stride_h, cache_stride_w, C, BLOCK_C, WIDE,
        )  # fmt: skip
        tap = weight_ptr + i * weight_stride_t + j * weight_stride_h + k * weight_stride_w
        acc = add_product(acc, x, tap, c, first, weight_stride_c, weight_stride_n, C, N, BLOCK_C, PARTS)
        i, j, k, c = next_tap(i, j, k, c, C, KH, KW, BLOCK_C)

    live = (h < tl.where(t < frames, height, 0)) & (w < width)
    if WIDE:
        out_stride_c, residual_stride_c = tl.cast(out_stride_c, tl.int64), tl.cast(residual_stride_c, tl.int64)
    pixels = at_pixels(out_ptr, b, t, h, w, out_stride_b, out_stride_t, out_stride_h, out_stride_w, WIDE)
    skip = None
    if residual_ptr is not None:
        skip = at_pixels(
            residual_ptr, b, t, h, w,
            residual_stride_b, residual_stride_t, residual_stride_h, residual_stride_w, WIDE,
        )  # fmt: skip
    n = first + tl.arange(0, PARTS[0])
    mask = live[:, None] & (n < N)[None, :]
    head = finish(acc[0], bias_ptr, skip, n, mask, residual_stride_c, N)
    square = tl.sum(head * head, 1)
    if len(PARTS) == 2:
        n_2 = first + PARTS[0] + tl.arange(0, PARTS[1])
        mask_2 = live[:, None] & (n_2 < N)[None, :]
        tail = finish(acc[1], bias_ptr, skip, n_2, mask_2, residual_stride_c, N)
        square += tl.sum(tail * tail, 1)
    if raw_ptr is not None:
        raw = at_pixels(raw_ptr, b, t, h, w, out_stride_b, out_stride_t, out_stride_h, out_stride_w, WIDE)
        store(raw, n, head, mask, out_stride_c)
        if len(PARTS) == 2:
            store(raw, n_2, tail, mask_2, out_stride_c)
    if norm_weight_ptr is not None:
        rstd = 1.0 / tl.sqrt_rn(square / N + eps)
        head = norm_silu(head, norm_weight_ptr, n, rstd, N)
        if len(PARTS) == 2:
            tail = norm_silu(tail, norm_weight_ptr, n_2, rstd, N)
    store(pixels, n, head, mask, out_stride_c)
    if len(PARTS) == 2:
        store(pixels, n_2, tail, mask_2, out_stride_c)


def last(t):
    """t with its channels side by side in memory: itself or a copy. Its other strides are the kernels' business."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous(memory_format=torch.channels_last_3d)


def strides_of(*videos) -> list[int]:
    """Of b, t, h and w; 0 for a video that is None."""
    return [0 if v is None else v.stride(axis) for v in videos for axis in (0, 2, 3, 4)]


def is_wide(*videos) -> bool:
    """Whether offsets within a frame of one of them need 64 bits."""
    frames = [v for v in videos if v is not None]
    return any(sum((v.shape[axis] - 1) * v.stride(axis) for axis in (1, 3, 4)) >= 2**31 for v in frames)


def whole(weight, x) -> bool:
    """Whether one program has all channels of its pixels, as a norm in its epilogue needs."""
    N, C = weight.shape[:2]
    return N <= sum(config.forward(C, N, x.dtype, config.capability(x.device)).columns)


def convolve(
    x, cache, weight, out, *, stride=(1, 1, 1), offset=(0, 0, 0), step=1,
    bias=None, residual=None, norm_weight=None, eps=0.0, raw=None,
) -> None:  # fmt: skip
    """out[p] = Σ_taps weight[tap] x[stride·p + offset + step·tap], and the epilogue.

    x, cache  channels last (`last`); weight a view [N, C, kt, kh, kw] dense in N or in C, of x's dtype.
    out       [B, N, ...], any strides, as residual; its size says which pixels there are. raw has its strides.
    """
    if out.numel() == 0:
        return
    if x.dtype == torch.float32 and weight.stride(0) != 1:  # plain cores read columns side by side, or from one bank
        weight = weight.movedim(0, -1).contiguous().movedim(-1, 0)
    N, C, kt, kh, kw = weight.shape
    frames, height, width = out.shape[2:]
    tile = config.forward(C, N, x.dtype, config.capability(x.device))
    box = config.choose_box(tile.pixels, frames, height, width)
    tiles = [triton.cdiv(size, side) for size, side in zip((frames, height, width), box, strict=True)]
    programs = out.shape[0] * tiles[0] * tiles[1] * tiles[2] * triton.cdiv(N, sum(tile.columns))
    conv_kernel[(programs,)](
        x, cache, weight, bias, residual, norm_weight, out, raw, *strides_of(x, cache), *weight.stride(),
        *((0,) * 5 if residual is None else residual.stride()), *out.stride(),
        *x.shape[2:], 0 if cache is None else cache.shape[2], frames, height, width, *offset, *tiles, eps,
        C=C, N=N, KT=kt, KH=kh, KW=kw, ST=stride[0], SH=stride[1], SW=stride[2], STEP=step,
        BOX=box, PARTS=tile.columns, BLOCK_C=tile.channels, WIDE=is_wide(x, cache, out, residual),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def convolve_phases(x, cache, weight, out, *, stride, offset, step, bias=None) -> None:
    """out[p] = Σ weight[tap] x[(p + offset + step·tap) / stride] over the taps that divide: a convolution transposed.

    Pixels of one phase, p mod stride, meet the same taps, every stride-th one; a convolution each.
    """
    for phase in itertools.product(*map(range, stride)):
        first = [-step * (p + front) % s for p, front, s in zip(phase, offset, stride, strict=True)]
        (ft, fh, fw), (at, ah, aw), (st, sh, sw) = first, phase, stride
        shifts = [(p + front + step * f) // s for p, front, f, s in zip(phase, offset, first, stride, strict=True)]
        convolve(
            x, cache, weight[:, :, ft::st, fh::sh, fw::sw], out[:, :, at::st, ah::sh, aw::sw],
            offset=shifts, step=step, bias=bias,
        )  # fmt: skip
