"""Triton kernels of norm_silu: a video is read where it lies, channels last or channels first, and never copied.

A tile is `[channels, pixels]`, whichever of the two is dense; whole channels where a pixel is normalised, several pixels
at once where they are few. No element's place is divided out: a program knows its clip and its pixels.

Passes over memory, each a tensor of x's size, at x's dtype:

            forward                               backward
    rms     2: x, out                             3: x, dout, dx
    group   3: x (statistics); x, out             6: x (statistics); x, dout (sums); x, dout, dx

Statistics of a group: every place of a tile keeps a running mean and a sum of squared deviations (Welford) of x minus the
first value of its group; places, channels and parts are then merged around their common mean (Chan). Parts are cut by
the sizes alone and added in their order: a run repeats bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton import load_vector

PROGRAMS = 1024  # of a reduction: about 8 per SM of a large GPU, and the bound of the fp32 partials


@triton.jit
def silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def silu_slope(z):
    s = 1.0 / (1.0 + tl.exp(-z))
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def tile(b, c, first, stride_b, stride_c, stride_s, C, S, BLOCK_S: tl.constexpr):
    """(offsets, mask) of BLOCK_S pixels from `first` on (64-bit, as b) in channels c of clip b."""
    s = tl.arange(0, BLOCK_S)
    start = b * stride_b + first * stride_s
    offsets = start + (c.to(tl.int64) * stride_c)[:, None] + (s * stride_s)[None, :]
    return offsets, (c < C)[:, None] & (first + s < S)[None, :]


@triton.jit
def load_clip(ptr, b, c, C, default: tl.constexpr):
    """Row b of an fp32 [B, C]; `default` everywhere if it is absent."""
    if ptr is None:
        return tl.full(c.shape, default, tl.float32)
    else:
        return tl.load(ptr + b * C + c, mask=c < C, other=default)


@triton.jit
def reciprocal_rms(x, C, eps):
    """Of the channels of each pixel, masked ones being 0: [1, pixels]."""
    return (1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / C + eps))[None, :]


@triton.jit
def norm_silu_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, out_ptr, stride_b, stride_c, stride_s, C, S, eps,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out = SiLU(x̂·weight + bias). Without statistics of each channel, x̂ is RMS-normed over the channels of a pixel."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_S
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    offsets, mask = tile(b, c, first, stride_b, stride_c, stride_s, C, S, BLOCK_S)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    scale = load_vector(weight_ptr, c, C, 0.0)
    if mean_ptr is None:
        x *= reciprocal_rms(x, C, eps)
    else:
        x -= load_clip(mean_ptr, b, c, C, 0.0)[:, None]
        scale *= load_clip(rstd_ptr, b, c, C, 0.0)
    z = x * scale[:, None] + load_vector(bias_ptr, c, C, 0.0)[:, None]
    tl.store(out_ptr + offsets, silu(z).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def moments_kernel(
    x_ptr, mean_ptr, m2_ptr, stride_b, stride_c, stride_s, C, S, width, part_tiles,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean and Σ(x − mean)² of each channel over one part of a clip, of x minus the first value of its group."""
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    begin = part.to(tl.int64) * part_tiles * BLOCK_S
    origin = (c // width * width).to(tl.int64) * stride_c
    centre = tl.load(x_ptr + b * stride_b + origin, mask=c < C, other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    m2 = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for i in range(part_tiles):
        offsets, mask = tile(b, c, begin + i * BLOCK_S, stride_b, stride_c, stride_s, C, S, BLOCK_S)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        share = 1.0 / (i + 1)
        deviation = tl.where(mask, x - centre[:, None] - mean, 0.0)
        mean += deviation * share
        m2 += deviation * deviation * (1.0 - share)
    pixels = tl.minimum(S - begin, part_tiles * BLOCK_S)
    count = (tl.maximum(pixels - tl.arange(0, BLOCK_S) + BLOCK_S - 1, 0) // BLOCK_S).to(tl.float32)[None, :]
    merged = tl.sum(mean * count, 1) / pixels
    m2 += count * (mean - merged[:, None]) * (mean - merged[:, None])
    row = (b * tl.num_programs(0) + part) * C + c
    tl.store(mean_ptr + row, merged, mask=c < C)
    tl.store(m2_ptr + row, tl.sum(m2, 1), mask=c < C)


@triton.jit
def statistics_kernel(
    x_ptr, part_mean_ptr, part_m2_ptr, mean_ptr, rstd_ptr, stride_b, stride_c, C, S, width, parts, part_pixels, eps,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and 1/σ of one group of a clip, written for each of its channels: merges its parts and channels."""
    group = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    row = b * parts * C + group * width + c[None, :]
    size = S * 1.0 * width
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_N):
        part = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask = (part < parts) & (c < width)[None, :]
        pixels = tl.minimum(S - part * part_pixels, part_pixels).to(tl.float32)
        total += tl.load(part_mean_ptr + row + part * C, mask=mask, other=0.0) * pixels
    mean = tl.sum(tl.sum(total, 1), 0) / size
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_N):
        part = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask = (part < parts) & (c < width)[None, :]
        pixels = tl.minimum(S - part * part_pixels, part_pixels).to(tl.float32)
        deviation = tl.load(part_mean_ptr + row + part * C, mask=mask, other=0.0) - mean
        m2 = tl.load(part_m2_ptr + row + part * C, mask=mask, other=0.0)
        total += tl.where(mask, m2 + pixels * deviation * deviation, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(total, 1), 0) / size + eps)
    centre = tl.load(x_ptr + b * stride_b + (group * width).to(tl.int64) * stride_c).to(tl.float32)
    channel = b * C + group * width + c
    tl.store(mean_ptr + channel, tl.zeros([BLOCK_C], tl.float32) + (centre + mean), mask=c < width)
    tl.store(rstd_ptr + channel, tl.zeros([BLOCK_C], tl.float32) + rstd, mask=c < width)


@triton.jit
def norm_silu_bwd_kernel(
    dout_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, mean_dy_ptr, mean_dy_xhat_ptr,
    dx_ptr, sum_dz_ptr, sum_dz_xhat_ptr, stride_b, stride_c, stride_s, C, S, part_tiles, eps,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Over one part of a clip, with z = x̂·weight + bias, dz = dout·SiLU'(z), dy = dz·weight:

    dx = (dy − mean(dy) − x̂·mean(dy·x̂)) / σ, the means over the group, or over the channels of a pixel without mean(dy);
    Σ dz and Σ dz·x̂ of each channel, where they are wanted.
    """
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    begin = part.to(tl.int64) * part_tiles * BLOCK_S
    weight = load_vector(weight_ptr, c, C, 0.0)[:, None]
    bias = load_vector(bias_ptr, c, C, 0.0)[:, None]
    mean = load_clip(mean_ptr, b, c, C, 0.0)[:, None]
    rstd = load_clip(rstd_ptr, b, c, C, 0.0)[:, None]
    mean_dy = load_clip(mean_dy_ptr, b, c, C, 0.0)[:, None]
    mean_dy_xhat = load_clip(mean_dy_xhat_ptr, b, c, C, 0.0)[:, None]
    sum_dz = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    sum_dz_xhat = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for i in range(part_tiles):
        offsets, mask = tile(b, c, begin + i * BLOCK_S, stride_b, stride_c, stride_s, C, S, BLOCK_S)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        reciprocal = reciprocal_rms(x, C, eps) if mean_ptr is None else rstd
        x_hat = (x - mean) * reciprocal
        dz = dout * silu_slope(x_hat * weight + bias)
        if sum_dz_ptr is not None:
            sum_dz += dz
            sum_dz_xhat += dz * x_hat
        if dx_ptr is not None:
            dy = dz * weight
            dot = (tl.sum(dy * x_hat, 0) / C)[None, :] if mean_ptr is None else mean_dy_xhat
            dx = (dy - mean_dy - x_hat * dot) * reciprocal
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if sum_dz_ptr is not None:
        row = (b * tl.num_programs(0) + part) * C + c
        tl.store(sum_dz_ptr + row, tl.sum(sum_dz, 1), mask=c < C)
        tl.store(sum_dz_xhat_ptr + row, tl.sum(sum_dz_xhat, 1), mask=c < C)


@triton.jit
def sums_kernel(
    sum_dz_ptr, sum_dz_xhat_ptr, weight_ptr, mean_dy_ptr, mean_dy_xhat_ptr, dweight_ptr, dbias_ptr,
    B, C, S, width, parts, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of `width` channels: dbias = Σ dz and dweight = Σ dz·x̂ over clips and parts, and the means over each clip."""
    channel = tl.program_id(0) * width + tl.arange(0, BLOCK_C)
    inside = (tl.arange(0, BLOCK_C) < width) & (channel < C)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    size = S * 1.0 * width
    dbias = tl.zeros([BLOCK_C], tl.float32)
    dweight = tl.zeros([BLOCK_C], tl.float32)
    for b in range(B):
        dz = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        dz_xhat = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for start in range(0, parts, BLOCK_N):
            part = start + tl.arange(0, BLOCK_N)
            row = (b * parts + part).to(tl.int64)[:, None] * C + channel[None, :]
            mask = (part < parts)[:, None] & inside[None, :]
            dz += tl.load(sum_dz_ptr + row, mask=mask, other=0.0)
            dz_xhat += tl.load(sum_dz_xhat_ptr + row, mask=mask, other=0.0)
        clip_dz, clip_dz_xhat = tl.sum(dz, 0), tl.sum(dz_xhat, 0)
        dbias += clip_dz
        dweight += clip_dz_xhat
        if mean_dy_ptr is not None:
            mean_dy = tl.zeros([BLOCK_C], tl.float32) + tl.sum(clip_dz * weight, 0) / size
            mean_dy_xhat = tl.zeros([BLOCK_C], tl.float32) + tl.sum(clip_dz_xhat * weight, 0) / size
            tl.store(mean_dy_ptr + b * C + channel, mean_dy, mask=inside)
            tl.store(mean_dy_xhat_ptr + b * C + channel, mean_dy_xhat, mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + channel, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + channel, dweight.to(dweight_ptr.dtype.element_ty), mask=inside)


def _is_last(x: torch.Tensor) -> bool:
    """Whether the channels of a pixel lie side by side; the one channel of a video does not."""
    return x.shape[1] > 1 and x.stride(1) == 1


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of clips, channels and pixels in a video whose T, H and W lie as in one axis."""
    _, C, T, H, W = x.shape
    return (C * T * H * W, 1, C) if _is_last(x) else (C * T * H * W, T * H * W, 1)


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:
    B, C, T, H, W = x.shape
    return B, C, T * H * W


def blocks(x: torch.Tensor, whole: bool, elements: int) -> dict[str, int]:
    """Constexprs of a kernel over tiles of about `elements`; `whole`: a tile holds every channel of its pixels.

    Channels-first tiles of whole channels read runs of 32 pixels (64 bytes of bf16), fewer where C exceeds 512.
    """
    _, C, S = _sizes(x)
    block_c, last = triton.next_power_of_2(C), _is_last(x)
    if not (whole or last):
        block_s = min(elements, triton.next_power_of_2(S))
        block_c = min(block_c, elements // block_s)
    else:
        least = 1 if last else min(32, 4 * elements // block_c)
        block_s = min(max(elements // block_c, least, 1), triton.next_power_of_2(S))
    warps = max(1, min(32, block_c * block_s // 1024))
    return dict(BLOCK_C=block_c, BLOCK_S=block_s, num_warps=warps)


def _parts(x: torch.Tensor, config: dict[str, int]) -> tuple[tuple[int, int, int], int]:
    """(grid, tiles of a part): each clip's pixels in parts, so many that PROGRAMS programs remain."""
    B, C, S = _sizes(x)
    channel_blocks = triton.cdiv(C, config["BLOCK_C"])
    tiles = triton.cdiv(S, config["BLOCK_S"])
    part_tiles = triton.cdiv(tiles, max(1, PROGRAMS // (B * channel_blocks)))
    return (triton.cdiv(tiles, part_tiles), channel_blocks, B), part_tiles


def _pair(*shape: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.empty(shape, dtype=torch.float32, device=like.device) for _ in range(2))


def _statistics(x, groups, eps) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Mean and 1/σ `[B, C]` of each channel's group; None for the RMS norm, which finds its own."""
    if not groups:
        return None, None
    B, C, S = _sizes(x)
    config = blocks(x, False, 2048)
    grid, part_tiles = _parts(x, config)
    part_moments, statistics = _pair(B, grid[0], C, like=x), _pair(B, C, like=x)
    moments_kernel[grid](x, *part_moments, *_strides(x), C, S, C // groups, part_tiles, **config)
    statistics_kernel[(groups, B)](
        x, *part_moments, *statistics, *_strides(x)[:2], C, S, C // groups, grid[0], part_tiles * config["BLOCK_S"],
        eps, **_columns(C // groups, grid[0]),
    )  # fmt: skip
    return statistics


def _columns(width: int, parts: int) -> dict[str, int]:
    """Constexprs of a kernel that adds `parts` rows of `width` columns."""
    block = triton.next_power_of_2(width)
    return dict(
        BLOCK_N=min(triton.next_power_of_2(parts), max(1, 16384 // block)), BLOCK_C=block, num_warps=8
    )


def norm_silu_fwd(x, weight, bias, groups, eps, out):
    if x.numel() == 0:
        return
    B, C, S = _sizes(x)
    mean, rstd = _statistics(x, groups, eps)
    config = blocks(x, not groups, 4096)
    grid = triton.cdiv(S, config["BLOCK_S"]), triton.cdiv(C, config["BLOCK_C"]), B
    norm_silu_fwd_kernel[grid](x, weight, bias, mean, rstd, out, *_strides(x), C, S, eps, **config)


def norm_silu_bwd(dout, x, weight, bias, groups, eps, dx, dweight, dbias):
    parameters = [t for t in (dweight, dbias) if t is not None]
    if x.numel() == 0:
        for t in parameters:
            t.zero_()
        return
    B, C, S = _sizes(x)
    mean, rstd = _statistics(x, groups, eps)
    config = blocks(x, not groups, 2048)
    grid, part_tiles = _parts(x, config)
    means = _pair(B, C, like=x) if groups and dx is not None else (None, None)
    sums = _pair(B, grid[0], C, like=x) if parameters or groups else (None, None)

    def launch(means, dx, sums) -> None:
        norm_silu_bwd_kernel[grid](
            dout, x, weight, bias, mean, rstd, *means, dx, *sums, *_strides(x), C, S, part_tiles, eps, **config
        )

    launch((None, None), None if groups else dx, sums)
    if sums[0] is not None:
        width = C // groups if groups else min(C, 16)
        sums_kernel[(triton.cdiv(C, width),)](
            *sums, weight, *means, dweight, dbias, B, C, S, width, grid[0], **_columns(width, grid[0])
        )
    if groups and dx is not None:
        launch(means, dx, (None, None))
