"""Triton kernels of norm_silu: a video is read where it lies, channels last or channels first, and never copied.

A tile is `[channels, pixels]`, whichever of the two is dense: all channels where a pixel is normalised, and several
pixels where they are few. No element's place is divided out: a program knows its clip, its channels and its pixels.

Passes over memory, each a tensor of x's size, at x's dtype:

            forward                               backward
    rms     2: x, out                             3: x, dout, dx
    group   3: x (statistics); x, out             6: x (statistics); x, dout (sums); x, dout, dx

Statistics of a group: every place of a tile keeps a running mean and a sum of squared deviations (Welford) of x minus
a value of its group; places, channels and parts are then merged around their common mean (Chan). Parts are cut
by the sizes alone and added in their order: a run repeats bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton import load_vector, or_nothing, wanted_of, where_asked

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
PROGRAMS = 1024  # of a reduction: about 8 per SM of a large GPU, and the bound of the fp32 partials


@triton.jit
def sigmoid(z):
    """Without the special cases of subnormal numbers, which took half of all instructions."""
    if INTERPRET:
        return 1.0 / (1.0 + tl.exp(-z))
    else:
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [z * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def tile(b, c, first, stride_b, stride_c, stride_s, C, S, BLOCK_S: tl.constexpr):
    """(offsets, mask) of BLOCK_S pixels from `first` on (64-bit, as b) in channels c of clip b."""
    s = tl.arange(0, BLOCK_S)
    start = b * stride_b + first * stride_s
    offsets = start + (c.to(tl.int64) * stride_c)[:, None] + (s * stride_s)[None, :]
    return offsets, (c < C)[:, None] & (first + s < S)[None, :]


@triton.jit
def channels(block, BLOCK_C: tl.constexpr):
    return block * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def place(tiles, C, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of a program: which of a clip's `tiles` (or parts), its first block of channels, and the clip, in 64 bits."""
    rest = tl.program_id(0) // tiles
    blocks = tl.cdiv(C, CHUNKS * BLOCK_C)
    return tl.program_id(0) % tiles, rest % blocks * CHUNKS, (rest // blocks).to(tl.int64)


@triton.jit
def load_clip(ptr, b, c, C, default: tl.constexpr):
    """Row b of an fp32 [B, C]; `default` everywhere if it is absent."""
    if ptr is None:
        return tl.full(c.shape, default, tl.float32)
    else:
        return tl.load(ptr + b * C + c, mask=c < C, other=default)


@triton.jit
def norm_silu_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, out_ptr, stride_b, stride_c, stride_s, C, S, eps,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out = SiLU(x̂·weight + bias). Without statistics of each channel, x̂ is RMS-normed over the channels of a pixel."""
    index, block, b = place(tl.cdiv(S, BLOCK_S), C, CHUNKS, BLOCK_C)
    first = index.to(tl.int64) * BLOCK_S
    xs = ()
    squares = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    for k in tl.static_range(CHUNKS):
        offsets, mask = tile(b, channels(block + k, BLOCK_C), first, stride_b, stride_c, stride_s, C, S, BLOCK_S)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        squares += x * x
        xs = xs + (x,)
    rms = tl.sqrt_rn(tl.sum(squares, 0) / C + eps)
    for k in tl.static_range(CHUNKS):
        c = channels(block + k, BLOCK_C)
        offsets, mask = tile(b, c, first, stride_b, stride_c, stride_s, C, S, BLOCK_S)
        scale = load_vector(weight_ptr, c, C, 0.0)[:, None]
        bias = load_vector(bias_ptr, c, C, 0.0)[:, None]
        if mean_ptr is None:
            z = xs[k] * (1.0 / rms)[None, :] * scale + bias
        else:
            scale *= load_clip(rstd_ptr, b, c, C, 0.0)[:, None]
            z = (xs[k] - load_clip(mean_ptr, b, c, C, 0.0)[:, None]) * scale + bias
        tl.store(out_ptr + offsets, (z * sigmoid(z)).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def middle(ptr, mask, at0, at1, at2):
    """Of three elements: it lies near the mean even where one of them does not."""
    a = tl.load(ptr + at0, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(ptr + at1, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(ptr + at2, mask=mask, other=0.0).to(tl.float32)
    return tl.maximum(tl.minimum(a, b), tl.minimum(tl.maximum(a, b), c))


@triton.jit
def moments_kernel(
    x_ptr, mean_ptr, m2_ptr, stride_b, stride_c, stride_s, at0, at1, at2, C, S, width, part_tiles,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean and Σ(x − mean)² of each channel over one part of a clip, of x minus a value of its group."""
    parts = tl.cdiv(tl.cdiv(S, BLOCK_S), part_tiles)
    part, block, b = place(parts, C, CHUNKS, BLOCK_C)
    c = channels(block, BLOCK_C)
    begin = part.to(tl.int64) * part_tiles * BLOCK_S
    origin = (c // width * width).to(tl.int64) * stride_c
    centre = middle(x_ptr + b * stride_b + origin, c < C, at0, at1, at2)
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
    row = (b * parts + part) * C + c
    tl.store(mean_ptr + row, merged, mask=c < C)
    tl.store(m2_ptr + row, tl.sum(m2, 1), mask=c < C)


@triton.jit
def statistics_kernel(
    x_ptr, part_mean_ptr, part_m2_ptr, mean_ptr, rstd_ptr, stride_b, stride_c, at0, at1, at2,
    C, S, width, parts, part_pixels, eps, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and 1/σ of one group of a clip, written for each of its channels: merges its parts and channels."""
    groups = C // width
    group = tl.program_id(0) % groups
    b = (tl.program_id(0) // groups).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    row = b * parts * C + group * width + c[None, :]
    size = S * 1.0 * width
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_N):
        part = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask = (part < parts) & (c < width)[None, :]
        pixels = tl.minimum(S - part * part_pixels, part_pixels).to(tl.float32)
        total += tl.load(part_mean_ptr + row + part * C, mask=mask, other=0.0) * pixels
    mean = tl.sum(total) / size
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_N):
        part = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask = (part < parts) & (c < width)[None, :]
        pixels = tl.minimum(S - part * part_pixels, part_pixels).to(tl.float32)
        deviation = tl.load(part_mean_ptr + row + part * C, mask=mask, other=0.0) - mean
        m2 = tl.load(part_m2_ptr + row + part * C, mask=mask, other=0.0)
        total += tl.where(mask, m2 + pixels * deviation * deviation, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(total) / size + eps)
    centre = middle(x_ptr + b * stride_b + (group * width).to(tl.int64) * stride_c, True, at0, at1, at2)
    channel = b * C + group * width + c
    tl.store(mean_ptr + channel, tl.zeros([BLOCK_C], tl.float32) + (centre + mean), mask=c < width)
    tl.store(rstd_ptr + channel, tl.zeros([BLOCK_C], tl.float32) + rstd, mask=c < width)


@triton.jit(do_not_specialize=["wanted"])
def norm_silu_bwd_kernel(
    dout_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, mean_dy_ptr, mean_dy_xhat_ptr,
    dx_ptr, sum_dz_ptr, sum_dz_xhat_ptr, wanted, stride_b, stride_c, stride_s, C, S, part_tiles, eps,
    CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Over one part of a clip, with z = x̂·weight + bias, dz = dout·SiLU'(z), dy = dz·weight:

    dx = (dy − mean(dy) − x̂·mean(dy·x̂)) / σ, the means over the group, or over the channels of a pixel without mean(dy);
    Σ dz and Σ dz·x̂ of each channel. Bits of `wanted` say which of dx and the sums to write; pointers are None in the
    pass of a group norm that finds only the other.
    """
    parts = tl.cdiv(tl.cdiv(S, BLOCK_S), part_tiles)
    part, block, b = place(parts, C, CHUNKS, BLOCK_C)
    begin = part.to(tl.int64) * part_tiles * BLOCK_S
    zeros = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
    sums = (zeros,) * (2 * CHUNKS)
    weights, biases = (), ()
    for k in tl.static_range(CHUNKS):
        weights = weights + (load_vector(weight_ptr, channels(block + k, BLOCK_C), C, 0.0)[:, None],)
        biases = biases + (load_vector(bias_ptr, channels(block + k, BLOCK_C), C, 0.0)[:, None],)
    for i in range(part_tiles):
        first = begin + i * BLOCK_S
        xs, douts, squares = (), (), zeros
        for k in tl.static_range(CHUNKS):
            offsets, mask = tile(b, channels(block + k, BLOCK_C), first, stride_b, stride_c, stride_s, C, S, BLOCK_S)
            x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            squares += x * x
            xs = xs + (x,)
            douts = douts + (tl.load(dout_ptr + offsets, mask=mask, other=0.0).to(tl.float32),)
        pixel_rstd = (1.0 / tl.sqrt_rn(tl.sum(squares, 0) / C + eps))[None, :]
        x_hats, dys, products, totals = (), (), zeros, ()
        for k in tl.static_range(CHUNKS):
            c = channels(block + k, BLOCK_C)
            if mean_ptr is None:
                x_hat = xs[k] * pixel_rstd
            else:
                x_hat = xs[k] - load_clip(mean_ptr, b, c, C, 0.0)[:, None]
                x_hat *= load_clip(rstd_ptr, b, c, C, 0.0)[:, None]
            z = x_hat * weights[k] + biases[k]
            s = sigmoid(z)
            dz = douts[k] * (s * (1.0 + z * (1.0 - s)))
            totals = totals + (sums[2 * k] + dz, sums[2 * k + 1] + dz * x_hat)
            products += dz * weights[k] * x_hat
            x_hats = x_hats + (x_hat,)
            dys = dys + (dz * weights[k],)
        sums = totals
        if dx_ptr is not None:
            pixel_dot = (tl.sum(products, 0) / C)[None, :]
            for k in tl.static_range(CHUNKS):
                c = channels(block + k, BLOCK_C)
                offsets, mask = tile(b, c, first, stride_b, stride_c, stride_s, C, S, BLOCK_S)
                if mean_ptr is None:
                    dx = (dys[k] - x_hats[k] * pixel_dot) * pixel_rstd
                else:
                    dx = dys[k] - load_clip(mean_dy_ptr, b, c, C, 0.0)[:, None]
                    dx -= x_hats[k] * load_clip(mean_dy_xhat_ptr, b, c, C, 0.0)[:, None]
                    dx *= load_clip(rstd_ptr, b, c, C, 0.0)[:, None]
                tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=where_asked(mask, wanted, 1))
    if sum_dz_ptr is not None:
        for k in tl.static_range(CHUNKS):
            c = channels(block + k, BLOCK_C)
            row = (b * parts + part) * C + c
            own = where_asked(c < C, wanted, 2)
            tl.store(sum_dz_ptr + row, tl.sum(sums[2 * k], 1), mask=own)
            tl.store(sum_dz_xhat_ptr + row, tl.sum(sums[2 * k + 1], 1), mask=own)


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


def pixel_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of clips, channels and pixels in a video whose T, H and W lie as in one axis."""
    _, C, T, H, W = x.shape
    return (C * T * H * W, 1, C) if _is_last(x) else (C * T * H * W, T * H * W, 1)


def sizes(x: torch.Tensor) -> tuple[int, int, int]:
    B, C, T, H, W = x.shape
    return B, C, T * H * W


def blocks(x: torch.Tensor, whole: bool, elements: int, per_thread: int = 32, chunks: int = 7) -> dict[str, int]:
    """Constexprs of a kernel over tiles of about `elements`; `whole`: a program holds every channel of its pixels.

    Those are then cut into up to `chunks` blocks of a power of two, so that of 96, 192 or 384 channels no lane is idle.
    Channels-first tiles of them read runs of 32 pixels (64 bytes of bf16), shorter ones where C is large.
    """
    _, C, S = sizes(x)
    last, padded, pixels = _is_last(x), triton.next_power_of_2(C), triton.next_power_of_2(S)
    block_c = C & -C  # the largest power of two that divides C
    block_c = block_c if block_c >= 32 and C // block_c <= chunks else padded
    if whole or last:
        least = 1 if last else min(32, 4 * elements // padded)
        block_s = min(max(elements // (padded if whole else block_c), least, 1), pixels)
    else:
        block_s = min(elements, pixels)
        block_c = min(padded, elements // block_s)
    chunks = triton.cdiv(C, block_c) if whole else 1
    warps = max(1, min(32, block_c * block_s // (32 * 8), chunks * block_c * block_s // (32 * per_thread)))
    return dict(CHUNKS=chunks, BLOCK_C=block_c, BLOCK_S=block_s, num_warps=1 << (warps.bit_length() - 1))


def programs(x: torch.Tensor, config: dict[str, int], per_clip: int | None = None) -> tuple[int]:
    """The grid of `per_clip` programs for each clip and block of channels: by default as many as tiles of pixels."""
    B, C, S = sizes(x)
    per_clip = triton.cdiv(S, config["BLOCK_S"]) if per_clip is None else per_clip
    return (per_clip * triton.cdiv(C, config["CHUNKS"] * config["BLOCK_C"]) * B,)


def _parts(x: torch.Tensor, config: dict[str, int]) -> tuple[int, int]:
    """(parts, tiles of a part) that each clip's pixels are cut into, so many that PROGRAMS programs remain."""
    B, C, S = sizes(x)
    channel_blocks = triton.cdiv(C, config["CHUNKS"] * config["BLOCK_C"])
    tiles = triton.cdiv(S, config["BLOCK_S"])
    part_tiles = triton.cdiv(tiles, max(1, PROGRAMS // (B * channel_blocks)))
    return triton.cdiv(tiles, part_tiles), part_tiles


def _pair(*shape: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.empty(shape, dtype=torch.float32, device=like.device) for _ in range(2))


def _statistics(x, groups, eps) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Mean and 1/σ `[B, C]` of each channel's group; None for the RMS norm, which finds its own."""
    if not groups:
        return None, None
    B, C, S = sizes(x)
    config = blocks(x, False, 2048)
    parts, part_tiles = _parts(x, config)
    part_moments, statistics = _pair(B, parts, C, like=x), _pair(B, C, like=x)
    strides, width = pixel_strides(x), C // groups
    sampled = [pixel * strides[2] for pixel in (S // 3, S * 3 // 7, S * 5 // 8)]
    moments_kernel[programs(x, config, parts)](x, *part_moments, *strides, *sampled, C, S, width, part_tiles, **config)
    statistics_kernel[(groups * B,)](
        x, *part_moments, *statistics, *strides[:2], *sampled,
        C, S, width, parts, part_tiles * config["BLOCK_S"], eps, **_columns(width, parts),
    )  # fmt: skip
    return statistics


def _columns(width: int, parts: int) -> dict[str, int]:
    """Constexprs of a kernel that adds `parts` rows of `width` columns."""
    block = triton.next_power_of_2(width)
    return dict(BLOCK_N=min(triton.next_power_of_2(parts), max(1, 8192 // block)), BLOCK_C=block, num_warps=16)


def norm_silu_fwd(x, weight, bias, groups, eps, out):
    if x.numel() == 0:
        return
    _, C, S = sizes(x)
    mean, rstd = _statistics(x, groups, eps)
    config = blocks(x, not groups, 4096)
    norm_silu_fwd_kernel[programs(x, config)](x, weight, bias, mean, rstd, out, *pixel_strides(x), C, S, eps, **config)


def norm_silu_bwd(dout, x, weight, bias, groups, eps, dx, dweight, dbias):
    if x.numel() == 0:
        for t in (dweight, dbias):
            if t is not None:
                t.zero_()
        return
    B, C, S = sizes(x)
    mean, rstd = _statistics(x, groups, eps)
    config = blocks(x, not groups, 2048, per_thread=16, chunks=3)
    if config["CHUNKS"] > 1 and _is_last(x):
        config["maxnreg"] = 200  # enough, and five programs of two warps fit an SM instead of four
    parts, part_tiles = _parts(x, config)

    def launch(means, dx, sums, wanted) -> None:
        scalars = *pixel_strides(x), C, S, part_tiles, eps
        norm_silu_bwd_kernel[programs(x, config, parts)](
            dout, x, weight, bias, mean, rstd, *means, dx, *sums, wanted, *scalars, **config
        )

    none, summed = (None, None), groups or dweight is not None or dbias is not None
    sums = _pair(B, parts if summed else 0, C, like=x)
    wanted = wanted_of(None if groups else dx, sums if summed else None)
    launch(none, None if groups else or_nothing(dx, x), sums, wanted)
    if not summed:
        return
    width = C // groups if groups else min(C, 16)
    means = _pair(B, C, like=x) if groups else none
    dweight = torch.empty_like(weight) if dweight is None else dweight  # a few values more, and one compiled kernel
    dbias = torch.empty_like(bias) if dbias is None and bias is not None else dbias
    sums_kernel[(triton.cdiv(C, width),)](
        *sums, weight, *means, dweight, dbias, B, C, S, width, parts, **_columns(width, parts)
    )
    if groups and dx is not None:
        launch(means, dx, none, 1)
