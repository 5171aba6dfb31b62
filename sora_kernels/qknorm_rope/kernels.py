"""Triton kernels of `qk_norm_rope`: one forward and one backward, each launched for q and for k.

Bytes per element, in units of its dtype. Forward: 2, the fewest possible: x is read once and the result written once.
Backward: 3, the fewest with a norm (x, the incoming gradient, dx), or 2 without. Weights, biases, angles' steps and the
bounded fp32 partials of the parameters' gradients (PROGRAMS rows at most) do not grow with the clip; tables given as
freqs are read once per token and block of heads, or once where each head has its own.

A channel pair (a, b) that turns together lies in one thread, whichever way the pairs are laid out: a token's heads are
two tiles `[HEADS, PAIRS]`. Angles are fixed-point fractions of a turn in 64 bits: position · step wraps around exactly
where an angle does, so their precision does not depend on the position, and no slow path of cos and sin is compiled.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .._triton import kept, or_nothing, partials, rounded, sum_partials, wanted_of, where_asked

PROGRAMS = 1024  # of the backward: about 8 per SM of a large GPU, and the bound of the fp32 partials


@triton.jit
def row_offsets(b, s, heads, stride_b, stride_s, stride_h, E: tl.constexpr):
    """Of a token's heads, in 64 bits; stride_h is None where they follow each other."""
    offset = b.to(tl.int64) * stride_b + s.to(tl.int64) * stride_s
    if stride_h is None:
        return offset + heads * E
    else:
        return offset + heads.to(tl.int64) * stride_h


@triton.jit
def channel_pairs(E: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr):
    """Channels a, b `[PAIRS]` of split halves, and which exist: N rotary pairs, then the channels that do not turn."""
    j = tl.arange(0, PAIRS)
    REST: tl.constexpr = (E - 2 * N + 1) // 2
    a = tl.where(j < N, j, N + j)
    b = tl.where(j < N, N + j, N + REST + j)
    return a, b, j < N + REST, (j < N + REST) & (b < E)


@triton.jit
def load_pairs(ptr, offsets, live, E: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Heads at `offsets` as two fp32 tiles `[heads, PAIRS]`; 0 where there is no channel or no head."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * PAIRS)
        x = tl.load(ptr + offsets[:, None] + cols[None, :], live[:, None] & (cols < E)[None, :], 0.0)
        return tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], PAIRS, 2)))
    else:
        a, b, is_a, is_b = channel_pairs(E, N, PAIRS)
        x = tl.load(ptr + offsets[:, None] + a[None, :], live[:, None] & is_a[None, :], 0.0).to(tl.float32)
        y = tl.load(ptr + offsets[:, None] + b[None, :], live[:, None] & is_b[None, :], 0.0).to(tl.float32)
        return x, y


@triton.jit
def store_pairs(
    ptr, offsets, x, y, live, E: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The counterpart of `load_pairs`: rounds once, to the tensor's dtype."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * PAIRS)
        z = tl.reshape(tl.join(x, y), (x.shape[0], 2 * PAIRS)).to(ptr.dtype.element_ty)
        tl.store(ptr + offsets[:, None] + cols[None, :], z, live[:, None] & (cols < E)[None, :])
    else:
        a, b, is_a, is_b = channel_pairs(E, N, PAIRS)
        x, y = x.to(ptr.dtype.element_ty), y.to(ptr.dtype.element_ty)
        tl.store(ptr + offsets[:, None] + a[None, :], x, live[:, None] & is_a[None, :])
        tl.store(ptr + offsets[:, None] + b[None, :], y, live[:, None] & is_b[None, :])


@triton.jit
def cos_sin(position, step):
    """cos and sin of position · step, where 2^64 steps are one turn: fp32, to an error of 1e-7 at any position.

    The upper 31 bits of the product are split into a quadrant and a rest of at most an eighth of a turn, for which the
    minimax polynomials of single precision serve (Cephes, S. Moshier).
    """
    phase = ((position * step) >> 33).to(tl.int32)
    quadrant = (phase + (1 << 28)) >> 29
    x = (phase - (quadrant << 29)).to(tl.float32) * 2.9258361585343195e-9  # 2 pi / 2^31
    z = x * x
    s = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    odd = (quadrant & 1) != 0
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where(((quadrant + 1) & 2) != 0, -cos, cos), tl.where((quadrant & 2) != 0, -sin, sin)


@triton.jit
def rotation(
    b, s, heads, cos_ptr, sin_ptr, steps_ptr, cos_stride_b, cos_stride_s, cos_stride_h, first, tokens, start, grid_h,
    grid_w, origin_t, origin_h, origin_w,
    SPLIT_T: tl.constexpr, SPLIT_H: tl.constexpr, N: tl.constexpr, BY_HEAD: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """cos and sin of token s, given or from its coordinates, and which pairs turn: none of text.

    `[1, PAIRS]`, or, given for each of BY_HEAD heads, `[heads, PAIRS]`. Rows of given ones follow each other where
    their strides are None; that of the clips is None where all share them. start: of the grid's tokens, the first here.
    """
    j = tl.arange(0, PAIRS)
    s = s - first
    live = j < tl.where((s >= 0) & (s < tokens), N, 0)
    if cos_stride_b is not None:
        cos_ptr, sin_ptr = cos_ptr + b.to(tl.int64) * cos_stride_b, sin_ptr + b.to(tl.int64) * cos_stride_b
    if BY_HEAD:
        if cos_stride_s is None:
            at = (s.to(tl.int64) * BY_HEAD + heads)[:, None] * N + j[None, :]
        else:
            at = (s.to(tl.int64) * cos_stride_s + heads.to(tl.int64) * cos_stride_h)[:, None] + j[None, :]
        live = live[None, :] & (heads < BY_HEAD)[:, None]
        return tl.load(cos_ptr + at, live, 1.0), tl.load(sin_ptr + at, live, 0.0), live
    else:
        if cos_ptr is not None:
            at = s * N if cos_stride_s is None else s.to(tl.int64) * cos_stride_s
            cos, sin = tl.load(cos_ptr + at + j, live, 1.0), tl.load(sin_ptr + at + j, live, 0.0)
        else:
            if start is not None:
                s += start
            row = s // grid_w
            t, h, w = row // grid_h + origin_t, row % grid_h + origin_h, s % grid_w + origin_w
            position = tl.where(j < SPLIT_T, t, tl.where(j < SPLIT_T + SPLIT_H, h, w)).to(tl.int64)
            cos, sin = cos_sin(position, tl.load(steps_ptr + j, live, 0))
        return cos[None, :], sin[None, :], live[None, :]


@triton.jit
def turn(x, y, cos, sin, turns):
    """What does not turn keeps its value, and to itself: as a product it would share a NaN with its partner."""
    return tl.where(turns, x * cos - y * sin, x), tl.where(turns, x * sin + y * cos, y)


@triton.jit
def mean(x, count, WIDTH: tl.constexpr):
    """Over each head `[heads, 1]`, or over all of them."""
    per_head = tl.sum(x, 1) / count
    if WIDTH:
        return tl.sum(per_head, 0)
    else:
        return per_head[:, None]


@triton.jit
def standardize_pairs(a, b, live, eps, NORM: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
                      N: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """(x̂, 1/σ) by two passes over registers, channels and heads that do not exist being 0.

    The second also sums what rounding left of the mean: of values far from zero that is more than their spread.
    """
    count: tl.constexpr = H * E if WIDTH else E
    if NORM == 2:
        PAIRS: tl.constexpr = a.shape[1]
        if INTERLEAVED:
            j = tl.arange(0, PAIRS)
            is_a, is_b = 2 * j < E, 2 * j + 1 < E
        else:
            _, _, is_a, is_b = channel_pairs(E, N, PAIRS)
        is_a, is_b = live[:, None] & is_a[None, :], live[:, None] & is_b[None, :]
        centre = mean(a + b, count, WIDTH)
        a, b = tl.where(is_a, a - centre, 0.0), tl.where(is_b, b - centre, 0.0)
        left = mean(a + b, count, WIDTH)
        variance = tl.maximum(mean(a * a + b * b, count, WIDTH) - left * left, 0.0)
        a, b = tl.where(is_a, a - left, 0.0), tl.where(is_b, b - left, 0.0)
    else:
        variance = mean(a * a + b * b, count, WIDTH)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    return a * rstd, b * rstd, rstd


@triton.jit
def given_rstd(stats_ptr, stride_b, stride_s, b, s, live, channels, eps):
    """1/σ of a token of whose heads, on all ranks, the sum of squares is known."""
    squares = tl.load(stats_ptr + b.to(tl.int64) * stride_b + s.to(tl.int64) * stride_s, live, 0.0)
    return 1.0 / tl.sqrt_rn(squares / channels + eps)


@triton.jit
def load_parameter(ptr, heads, live, E: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr,
                   INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """A weight or bias, `[1, PAIRS]` shared by the heads, or `[heads, PAIRS]` across the width."""
    if WIDTH:
        return load_pairs(ptr, heads * E, live, E, N, PAIRS, INTERLEAVED)
    else:
        zero = tl.zeros([1], tl.int32)
        return load_pairs(ptr, zero, zero == 0, E, N, PAIRS, INTERLEAVED)


@triton.jit
def qk_norm_rope_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, stats_ptr, cos_ptr, sin_ptr, steps_ptr, out_ptr, x_stride_b, x_stride_s, x_stride_h,
    out_stride_b, out_stride_s, out_stride_h, stats_stride_b, stats_stride_s, channels, cos_stride_b, cos_stride_s,
    cos_stride_h, S, first, tokens, start, grid_h, grid_w, origin_t, origin_h, origin_w, eps, H: tl.constexpr,
    E: tl.constexpr, N: tl.constexpr, BY_HEAD: tl.constexpr, SPLIT_T: tl.constexpr, SPLIT_H: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
    HOST: tl.constexpr,
):  # fmt: skip
    """A program has HEADS heads of one token, read and written once. Its angles are computed once for all of them.

    stats_ptr: where heads lie on several ranks, of each token the sum of squares over all of them; else None.
    """
    BLOCKS: tl.constexpr = (H + HEADS - 1) // HEADS
    row = tl.program_id(0) // BLOCKS
    heads = tl.program_id(0) % BLOCKS * HEADS + tl.arange(0, HEADS)
    live = heads < H
    s = row % S
    offsets = row_offsets(row // S, s, heads, x_stride_b, x_stride_s, x_stride_h, E)
    x, y = load_pairs(x_ptr, offsets, live, E, N, PAIRS, INTERLEAVED)
    if NORM:
        if stats_ptr is None:
            x, y, _ = standardize_pairs(x, y, live, eps, NORM, WIDTH, H, E, N, INTERLEAVED)
        else:
            rstd = given_rstd(stats_ptr, stats_stride_b, stats_stride_s, row // S, s, True, channels, eps)
            x, y = x * rstd, y * rstd
        if weight_ptr is not None:
            u, v = load_parameter(weight_ptr, heads, live, E, N, PAIRS, INTERLEAVED, WIDTH)
            x, y = x * u, y * v
        if bias_ptr is not None:
            u, v = load_parameter(bias_ptr, heads, live, E, N, PAIRS, INTERLEAVED, WIDTH)
            x, y = x + u, y + v
        if HOST:
            x, y = rounded(x, out_ptr), rounded(y, out_ptr)
    if N:
        cos, sin, turns = rotation(
            row // S, s, heads, cos_ptr, sin_ptr, steps_ptr, cos_stride_b, cos_stride_s, cos_stride_h, first, tokens,
            start, grid_h, grid_w, origin_t, origin_h, origin_w, SPLIT_T, SPLIT_H, N, BY_HEAD, PAIRS,
        )  # fmt: skip
        x, y = turn(x, y, cos, sin, turns)
    if out_stride_b is None:
        offsets = (row.to(tl.int64) * H + heads) * E
    else:
        offsets = row_offsets(row // S, s, heads, out_stride_b, out_stride_s, out_stride_h, E)
    store_pairs(out_ptr, offsets, x, y, live, E, N, PAIRS, INTERLEAVED)


@triton.jit
def store_partial(ptr, program, heads, x, y, wanted, BIT: tl.constexpr, H: tl.constexpr, E: tl.constexpr,
                  N: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """A program's fp32 row of a parameter's gradient: summed over its heads, or its heads' part of the width."""
    if WIDTH:
        store_pairs(ptr, (program * H + heads) * E, x, y, where_asked(heads < H, wanted, BIT), E, N, PAIRS, INTERLEAVED)
    else:
        offset = program * E + tl.zeros([1], tl.int32)
        live = where_asked(offset >= 0, wanted, BIT)
        store_pairs(ptr, offset, tl.sum(x, 0)[None, :], tl.sum(y, 0)[None, :], live, E, N, PAIRS, INTERLEAVED)


@triton.jit(do_not_specialize=["wanted"])
def qk_norm_rope_bwd_kernel(
    dout_ptr, x_ptr, weight_ptr, stats_ptr, cos_ptr, sin_ptr, steps_ptr, dx_ptr, dweight_ptr, dbias_ptr, dstats_ptr,
    wanted, dout_stride_b, dout_stride_s, dout_stride_h, x_stride_b, x_stride_s, x_stride_h, stats_stride_b,
    stats_stride_s, channels, dstats_stride_b, cos_stride_b, cos_stride_s, cos_stride_h, rows, rows_per_program, S,
    first, tokens, start, grid_h, grid_w, origin_t, origin_h, origin_w, eps, H: tl.constexpr, E: tl.constexpr,
    N: tl.constexpr, BY_HEAD: tl.constexpr, SPLIT_T: tl.constexpr, SPLIT_H: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A program has HEADS heads of several tokens, and leaves the sums of g·x̂ and of g over them in rows of its own.

    g is dout turned back. x̂ and 1/σ are computed again from x: x and dout are read, dx is written once. Bits of
    `wanted` say which of dweight and dbias to write; a pointer is None only without the parameter. dx is written even
    even where nobody asked: a mask of it took a third more registers.

    With sums of squares over all ranks, dx is what it is beside them, and each token's gradient of its sum is a result.
    """
    BLOCKS: tl.constexpr = (H + HEADS - 1) // HEADS
    program = tl.program_id(0)
    first_row = program // BLOCKS * rows_per_program
    heads = program % BLOCKS * HEADS + tl.arange(0, HEADS)
    count: tl.constexpr = H * E if WIDTH else E
    dweight_x = tl.zeros([HEADS, PAIRS], tl.float32)
    dweight_y = tl.zeros([HEADS, PAIRS], tl.float32)
    dbias_x = tl.zeros([HEADS, PAIRS], tl.float32)
    dbias_y = tl.zeros([HEADS, PAIRS], tl.float32)

    for i in range(rows_per_program):
        row = first_row + i
        live = heads < tl.where(row < rows, H, 0)
        b, s = row // S, row % S
        offsets = row_offsets(b, s, heads, dout_stride_b, dout_stride_s, dout_stride_h, E)
        x, y = load_pairs(dout_ptr, offsets, live, E, N, PAIRS, INTERLEAVED)
        if N:
            cos, sin, turns = rotation(
                b, s, heads, cos_ptr, sin_ptr, steps_ptr, cos_stride_b, cos_stride_s, cos_stride_h, first, tokens,
                start, grid_h, grid_w, origin_t, origin_h, origin_w, SPLIT_T, SPLIT_H, N, BY_HEAD, PAIRS,
            )  # fmt: skip
            x, y = turn(x, y, cos, -sin, turns)
        if NORM:
            offsets = row_offsets(b, s, heads, x_stride_b, x_stride_s, x_stride_h, E)
            x_hat, y_hat = load_pairs(x_ptr, offsets, live, E, N, PAIRS, INTERLEAVED)
            if stats_ptr is None:
                x_hat, y_hat, rstd = standardize_pairs(x_hat, y_hat, live, eps, NORM, WIDTH, H, E, N, INTERLEAVED)
            else:
                rstd = given_rstd(stats_ptr, stats_stride_b, stats_stride_s, b, s, row < rows, channels, eps)
                x_hat, y_hat = x_hat * rstd, y_hat * rstd
            dweight_x += x * x_hat
            dweight_y += y * y_hat
            if dbias_ptr is not None:
                dbias_x += x
                dbias_y += y
            if weight_ptr is not None:
                u, v = load_parameter(weight_ptr, heads, heads < H, E, N, PAIRS, INTERLEAVED, WIDTH)
                x, y = x * u, y * v
            if stats_ptr is None:
                along = mean(x * x_hat + y * y_hat, count, WIDTH)
                shift = mean(x + y, count, WIDTH) if NORM == 2 else 0.0
                x, y = (x - shift - x_hat * along) * rstd, (y - shift - y_hat * along) * rstd
            else:
                along = tl.sum(tl.sum(x * x_hat + y * y_hat, 1), 0)
                at = b.to(tl.int64) * dstats_stride_b + s + tl.zeros([1], tl.int32)
                dstats = -0.5 * rstd * rstd / channels * along
                tl.store(dstats_ptr + at, dstats, where_asked(row + 0 * at < rows, wanted, 4))
                x, y = x * rstd, y * rstd
        # freshly allocated by the caller: dense [B, S, H, E]
        store_pairs(dx_ptr, (row.to(tl.int64) * H + heads) * E, x, y, live, E, N, PAIRS, INTERLEAVED)

    if dweight_ptr is not None:
        store_partial(dweight_ptr, program, heads, dweight_x, dweight_y, wanted, 1, H, E, N, PAIRS, INTERLEAVED, WIDTH)
    if dbias_ptr is not None:
        store_partial(dbias_ptr, program, heads, dbias_x, dbias_y, wanted, 2, H, E, N, PAIRS, INTERLEAVED, WIDTH)


def tile(H: int, E: int, width: bool) -> dict[str, int]:
    """Constexprs of the backward: a token's heads, or a part of them of 512 to 2048 channels; 16 channels a thread."""
    block = triton.next_power_of_2(max(E, 2))
    heads = triton.next_power_of_2(H)
    if not width:
        divisor = min(H & -H, max(1, 2048 // block))
        heads = divisor if divisor * block >= 512 else min(heads, max(1, 512 // block))
    return dict(HEADS=heads, PAIRS=block // 2, num_warps=min(max(heads * block // 512, 1), 16))


def forward_tile(H: int, E: int, width: bool) -> dict[str, int]:
    """Constexprs of the forward: those of the backward, but across the width 64 channels a thread.

    Its threads turn the same pairs of several heads, and compute an angle once for all: with 16, on sm_90, 43 and 50
    instructions of SASS a channel for 12 and 40 heads of 128, where an H200 can issue about 28 while it copies one;
    with 64 they are 16 and 20. Heads beyond H, which are known, are left out.
    """
    config = tile(H, E, width)
    return config | (dict(num_warps=min(max(config["HEADS"] * config["PAIRS"] // 1024, 1), 16)) if width else {})


@kept
def steps(split: tuple[int, ...], theta: float, device: torch.device) -> torch.Tensor:
    """theta^(-j/n) / 2π of the n pairs of each axis, as int64 in units of 2^-64 of a turn."""
    exponents = [-torch.arange(n, dtype=torch.float64, device=device) / max(n, 1) for n in split]
    turns = theta ** torch.cat(exponents) / (2 * math.pi)
    return ((turns - turns.round()).clamp(max=0.5 - 2.0**-53) * 2.0**64).to(torch.int64)


def _settings(x, cos, sin, axes, theta, first, eps) -> tuple[tuple, list, tuple, dict]:
    """The pointers of the angles, the strides of given ones, the scalars, and the constexprs of the rotation."""
    T, H, W, *split, origin_t, origin_h, origin_w = (axes or (0, 1, 1, 0, 0, 0, 0, 0, 0))[:9]
    start, stop = (axes or ())[9:] or (None, T * H * W)
    tokens, heads, pairs, *strides = stop - (start or 0), 1, sum(split), None, None, None
    if cos is not None:
        tokens, heads, pairs, *strides = _rows(cos)
    table = steps(tuple(split), theta, x.device) if pairs and cos is None else None
    rotary = dict(N=pairs, BY_HEAD=heads if heads > 1 else 0, SPLIT_T=split[0], SPLIT_H=split[1])
    return (cos, sin, table), strides, (first, tokens, start, H, W, origin_t, origin_h, origin_w, eps), rotary


def _rows(cos) -> tuple[int | None, ...]:
    """Tokens, heads, pairs, and the strides of clips, tokens and heads as `rotation` takes them."""
    shape, stride = tuple(cos.shape), cos.stride()
    if cos.ndim == 2:
        shape, stride = (shape[0], 1, shape[1]), (stride[0], 0, 1)
    of_clip = stride[0] if len(shape) == 4 and shape[0] > 1 else None
    (tokens, heads, pairs), (of_token, of_head) = shape[-3:], stride[-3:-1]
    if of_token == heads * pairs and (heads == 1 or of_head == pairs):
        of_token = of_head = None
    return tokens, heads, pairs, of_clip, of_token, of_head


def strides_of(x) -> tuple[int, int, int | None]:
    return *x.stride()[:2], None if x.stride(2) == x.shape[3] else x.stride(2)


def of_q_and_k(stats, q, k) -> tuple:
    """The part of each of [B, tokens of q and of k]."""
    return (None, None) if stats is None else stats.split((q.shape[1], k.shape[1]), 1)


def _sums(stats, channels) -> tuple:
    """Strides and channels, or None three times."""
    return (None, None, None) if stats is None else (*stats.stride(), channels)


def qk_norm_rope_fwd(
    q, k, q_weight, k_weight, q_bias, k_bias, stats, cos, sin, k_cos, k_sin, norm, width, axes, theta, first,
    interleaved, eps, q_channels, k_channels, host, q_out, k_out,
):  # fmt: skip
    of_q = _settings(q, cos, sin, axes, theta, first, eps)
    of_k = of_q if k_cos is None else _settings(k, k_cos, k_sin, axes, theta, first, eps)
    q_stats, k_stats = of_q_and_k(stats, q, k)
    for x, weight, bias, sums, channels, out, (angles, strides, scalars, rotary) in (
        (q, q_weight, q_bias, q_stats, q_channels, q_out, of_q), (k, k_weight, k_bias, k_stats, k_channels, k_out, of_k)
    ):  # fmt: skip
        if x.numel() == 0:
            continue
        B, S, H, E = x.shape
        config = forward_tile(H, E, width)
        of_out = (None, None, None) if out.is_contiguous() else strides_of(out)
        qk_norm_rope_fwd_kernel[(B * S * triton.cdiv(H, config["HEADS"]),)](
            x, weight, bias, sums, *angles, out, *strides_of(x), *of_out, *_sums(sums, channels), *strides, S, *scalars,
            H=H, E=E, **rotary, INTERLEAVED=interleaved or not rotary["N"], NORM=norm, WIDTH=width, HOST=host, **config,
        )  # fmt: skip


def qk_norm_rope_bwd(
    dq_out, dk_out, q, k, q_weight, k_weight, q_bias, k_bias, stats, cos, sin, k_cos, k_sin, norm, width, axes, theta,
    first, interleaved, eps, q_channels, k_channels, dq, dk, dq_weight, dk_weight, dq_bias, dk_bias, dstats,
):  # fmt: skip
    settings_q = _settings(q, cos, sin, axes, theta, first, eps)
    settings_k = settings_q if k_cos is None else _settings(k, k_cos, k_sin, axes, theta, first, eps)
    (q_sums, k_sums), (dq_sums, dk_sums) = of_q_and_k(stats, q, k), of_q_and_k(dstats, q, k)
    tokens = None if stats is None else stats.shape[1]  # a row of dstats, which is dense
    of_q = settings_q, q_channels, dq_out, q, q_weight, q_bias, q_sums, dq, dq_weight, dq_bias, dq_sums
    of_k = settings_k, k_channels, dk_out, k, k_weight, k_bias, k_sums, dk, dk_weight, dk_bias, dk_sums
    for settings, channels, dout, x, weight, bias, given, dx, *parameters, dgiven in (of_q, of_k):
        angles, strides, scalars, rotary = settings
        wanted = wanted_of(*parameters, dgiven)
        if dx is None and not wanted:
            continue
        if x.numel() == 0:
            for t in (*parameters, dgiven):
                if t is not None:
                    t.zero_()
            continue
        B, S, H, E = x.shape
        config = tile(H, E, width)
        blocks = triton.cdiv(H, config["HEADS"])
        rows = triton.cdiv(B * S, max(1, PROGRAMS // blocks))
        programs = triton.cdiv(B * S, rows) * blocks
        width_or_head = H * E if width else E
        sums = [partials(d, t, 1, programs, width_or_head) for d, t in zip(parameters, (weight, bias), strict=True)]
        qk_norm_rope_bwd_kernel[(programs,)](
            dout, x, weight, given, *angles, x.new_empty(x.shape) if dx is None else dx, *sums,
            or_nothing(dgiven, given), wanted, *strides_of(dout), *strides_of(x), *_sums(given, channels), tokens,
            *strides, B * S, rows, S, *scalars, H=H, E=E, **rotary, INTERLEAVED=interleaved or not rotary["N"],
            NORM=norm, WIDTH=width, **config,
        )  # fmt: skip
        for partial, t in zip(sums, parameters, strict=True):
            if t is not None:
                sum_partials(partial, t.view(1, -1))
