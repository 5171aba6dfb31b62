"""Triton kernels of `final_layer`: one forward, which the backward runs again for its statistics, and one backward.

Bytes, in units of x's B·S·D elements (the video is N/D of it, the weight and shared rows stay in L2):
forward 1, the fewest possible: x is read once, by one loop that feeds the statistics and the product alike. Backward 3
where 2 would do: x for the statistics, x again beside the write of dx. Rows of one token each add 2 to the forward and
5 to the backward, where 4 would do: scale for the statistics, both rows, both gradients. More features than BLOCK_N
read x again for every block of them.

How one read is enough. With p the mean of a row's first block, z = norm(x)·(1 + scale) Wᵀ is
    (((x − p)·(1 + scale)) Wᵀ − m·((1 + scale) Wᵀ)) / σ,    m = mean(x − p),  σ² = mean((x − p)²) − m²,
and every sum is over columns as they come. Nothing cancels: Σ(x − mean)² over that block alone shows
|m| ≤ σ·√(D/block), whatever the row, so that the difference costs σ² at most a factor D/block of fp32's rounding.

Before its product on tensor cores a tile of a bf16 x, like the rows of scale and shift, is rounded to bf16; plain
PyTorch rounds three times on the way there. fp16 could overflow, as nothing is normalised yet: it takes three products
of bf16 halves, as does a weight of another dtype. fp32 is multiplied in fp32. The backward rounds x̂ to x's dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton import (
    frames_of,
    load_rows,
    load_vector,
    or_nothing,
    partials,
    row_strides,
    store_rows,
    sum_partials,
    wanted_of,
    where_asked,
)
from .kernels import dot, feature_offsets, token_offsets, unpatchify3d_bwd
from .reference import patch_of

MOD_ROWS = tl.constexpr(16)  # half of scale, half of shift: the narrowest operand of every tensor core
PROGRAMS = 256  # of the backward: two per SM of a large GPU, and the bound of the fp32 partials where it can be kept


@triton.jit
def load_weight(ptr, n, cols, N: tl.constexpr, D, TURNED: tl.constexpr):
    """Columns of the weight [N, D], transposed, or of [D, N] where TURNED: [cols, n] in its own dtype."""
    at = ptr + cols[:, None] * N + n[None, :] if TURNED else ptr + n[None, :] * D + cols[:, None]
    return tl.load(at, (n < N)[None, :] & (cols < D)[:, None], 0.0)


@triton.jit
def folded(x, COLUMNS: tl.constexpr):
    """Sums of columns side by side: [rows, COLUMNS]."""
    if x.shape[1] == COLUMNS:
        return x
    else:
        return tl.sum(tl.reshape(x, [x.shape[0], COLUMNS, x.shape[1] // COLUMNS]), 2)


@triton.jit
def final_layer_fwd_kernel(
    x_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr, out_ptr, dy_ptr, mean_ptr, rstd_ptr, centre_ptr, along_ptr,
    x_stride_b, x_stride_s, shift_stride_b, shift_stride_f, scale_stride_b, scale_stride_f,
    stride_b, stride_c, stride_t, stride_h, stride_w,
    S, grid_h, grid_w, tokens_per_frame, tokens_per_group, tiles, D, eps,
    N: tl.constexpr, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    RMS: tl.constexpr, PER_TOKEN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """out = unpatchify(z + shift·Wᵀ + bias); or, given dy, the statistics of each token for the backward:
    mean and 1/σ of x, centre = dy·((1 + scale)Wᵀ) / D and along = dy·z / D, which are the means of dx̂ and of dx̂·x̂.

    A program has BLOCK_S tokens of one group. A group is a frame, whose tokens share a row of scale and shift (their
    product with the weight is one tile of MOD_ROWS, half of them scale, half shift), or, PER_TOKEN, the batch.
    """
    group = tl.program_id(0) // tiles
    t = tl.program_id(0) % tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    live = t < tokens_per_group
    row = group * tokens_per_group + t
    x_row = (row // S).to(tl.int64) * x_stride_b + (row % S).to(tl.int64) * x_stride_s
    TOKENS: tl.constexpr = x_ptr.dtype.element_ty
    SAME: tl.constexpr = TOKENS == tl.bfloat16 and weight_ptr.dtype.element_ty == tl.bfloat16
    OPERAND: tl.constexpr = tl.bfloat16 if SAME else tl.float32
    # Where wgmma reads the weight's tile for the tokens it must for these rows too, with 64 rows on the left: beside a
    # copy of the tile in registers Triton counts a buffer too few, and prefetches into what wgmma still reads.
    WEIGHT_FIRST: tl.constexpr = SAME and BLOCK_S >= 64
    SHIFTED: tl.constexpr = shift_ptr is not None and out_ptr is not None
    if PER_TOKEN:
        mod_row, mod_live = row, live
    else:
        mod_row = group * tokens_per_group + tl.zeros([1], tl.int32)
        mod_live = mod_row >= 0
    video, frame = (mod_row // S).to(tl.int64), (mod_row % S // tokens_per_frame).to(tl.int64)
    shift_row = video * shift_stride_b + frame * shift_stride_f
    scale_row = video * scale_stride_b + frame * scale_stride_f
    lanes = tl.arange(0, BLOCK_D)
    copies = tl.arange(0, MOD_ROWS)
    width = tl.maximum(D, 1)  # of x without any width the bias is left
    pivot = tl.zeros([BLOCK_S], tl.float32)
    if not RMS:
        block = load_rows(x_ptr, x_row, lanes, live[:, None] & (lanes < D)[None, :])
        pivot = tl.sum(block, 1) / tl.minimum(width, BLOCK_D)
    centre = tl.zeros([BLOCK_S], tl.float32)
    along = tl.zeros([BLOCK_S], tl.float32)

    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        x_sum = tl.zeros([BLOCK_S, SUMS], tl.float32)
        x_square = tl.zeros([BLOCK_S, SUMS], tl.float32)
        z = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
        from_rows = tl.zeros([BLOCK_N, MOD_ROWS] if WEIGHT_FIRST else [MOD_ROWS, BLOCK_N], tl.float32)
        from_scale = tl.zeros([BLOCK_S if PER_TOKEN else 1, BLOCK_N], tl.float32)
        from_shift = from_scale
        if D > 0:  # else zeros that go past the loop meet sums in flight, and ptxas waits after every single wgmma
            for start in range(0, D, BLOCK_D):
                cols = start + lanes
                mask = live[:, None] & (cols < D)[None, :]
                mod_mask = mod_live[:, None] & (cols < D)[None, :]
                x = load_rows(x_ptr, x_row, cols, mask)
                w = load_weight(weight_ptr, n, cols, N, D, TOKENS == tl.float32)
                if not RMS:
                    x = tl.where(mask, x - pivot[:, None], 0.0)
                    x_sum += folded(x, SUMS)
                x_square += folded(x * x, SUMS)
                scale = tl.full([1, 1], 1.0, tl.float32)
                if scale_ptr is not None:
                    scale += load_rows(scale_ptr, scale_row, cols, mod_mask)
                z = dot((x * scale).to(OPERAND), w, z, TOKENS)
                if PER_TOKEN and not RMS:
                    of_scale = tl.broadcast_to(scale.to(OPERAND), [BLOCK_S, BLOCK_D])
                    from_scale = dot(of_scale, w, from_scale, TOKENS)
                shift = tl.zeros([1, 1], tl.float32)
                if SHIFTED:
                    shift = load_rows(shift_ptr, shift_row, cols, mod_mask)
                if PER_TOKEN and SHIFTED:
                    from_shift = dot(shift.to(OPERAND), w, from_shift, TOKENS)
                if not PER_TOKEN and (SHIFTED or not RMS):
                    rows = tl.where((copies < MOD_ROWS // 2)[:, None], scale, shift).to(OPERAND)
                    rows = tl.broadcast_to(rows, [MOD_ROWS, BLOCK_D])
                    if WEIGHT_FIRST:
                        from_rows = dot(tl.trans(w), tl.trans(rows), from_rows, TOKENS)
                    else:
                        from_rows = dot(rows, w, from_rows, TOKENS)

        if not PER_TOKEN:
            if not WEIGHT_FIRST:
                from_rows = tl.trans(from_rows)
            from_scale = tl.sum(tl.where((copies == 0)[None, :], from_rows, 0.0), 1)[None, :]
            from_shift = tl.sum(tl.where((copies == MOD_ROWS - 1)[None, :], from_rows, 0.0), 1)[None, :]
        mean = tl.sum(x_sum, 1) / width
        rstd = 1.0 / tl.sqrt_rn(tl.maximum(tl.sum(x_square, 1) / width - mean * mean, 0.0) + eps)
        z = (z - mean[:, None] * from_scale) * rstd[:, None]
        if out_ptr is not None:
            z += from_shift + load_vector(bias_ptr, n, N, 0.0)[None, :]
            b, s = row // S, row % S
            tokens = token_offsets(b, s, stride_b, stride_t, stride_h, stride_w, grid_h, grid_w, PT, PH, PW)
            features = feature_offsets(n % C, n // C, stride_c, stride_t, stride_h, stride_w, PH, PW)
            mask = live[:, None] & (n < N)[None, :]
            tl.store(out_ptr + tokens[:, None] + features[None, :], z.to(out_ptr.dtype.element_ty), mask)
        else:
            dy = load_rows(dy_ptr, row.to(tl.int64) * N, n, live[:, None] & (n < N)[None, :])
            along += tl.sum(dy * z, 1) / width
            centre += tl.sum(dy * from_scale, 1) / width
            tl.store(mean_ptr + row, pivot + mean, live)
            tl.store(rstd_ptr + row, rstd, live)

    if out_ptr is None:
        tl.store(centre_ptr + row, centre, live)
        tl.store(along_ptr + row, along, live)


@triton.jit
def tokens_of(tile, group, tokens_per_group, BLOCK_S: tl.constexpr):
    """(row, whether it is there) of the tokens of a group's tile; below 0 there is none."""
    t = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    return group * tokens_per_group + t, (t >= 0) & (t < tokens_per_group)


@triton.jit
def load_tokens(ptr, row, live, S, each, stride_b, stride_s, cols, D):
    """Columns of what tokens have in [B, S / each, D], in its own dtype: [rows, cols]; a zero without one."""
    if ptr is None:
        return tl.zeros([1, 1], tl.float32)
    else:
        offsets = (row // S).to(tl.int64) * stride_b + (row % S // each).to(tl.int64) * stride_s
        return tl.load(ptr + offsets[:, None] + cols[None, :], live[:, None] & (cols < D)[None, :], 0.0)


@triton.jit(do_not_specialize=["wanted"])
def final_layer_bwd_kernel(
    dy_ptr, x_ptr, shift_ptr, scale_ptr, weight_ptr, mean_ptr, rstd_ptr, centre_ptr, along_ptr,
    dx_ptr, dshift_ptr, dscale_ptr, dweight_ptr, dbias_ptr, wanted,
    x_stride_b, x_stride_s, shift_stride_b, shift_stride_f, scale_stride_b, scale_stride_f,
    S, tokens_per_frame, tokens_per_group, tiles, chunks, tiles_per_program, D,
    N: tl.constexpr, RMS: tl.constexpr, PER_TOKEN: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All gradients, from dy, x and the statistics that the forward kernel left; bits of `wanted` say which to write.

    A program has a block of D and a chunk of a group's tokens. Over a frame's tokens it sums P = Σ dy and Q = Σ dyᵀx̂,
    from which every reduced gradient follows:
        dshift = P·W,  dscale = Σ_n Q·W,  dweight = (1 + scale)·Q + shift·P,  dbias = P.
    PER_TOKEN, Q is Σ dyᵀh with h the modulated x̂, which is dweight; dshift = dh and dscale = dh·x̂ are written as they
    are. Programs and the tiles of each go backwards: the last tokens are those that the statistics left in L2.
    Where N exceeds BLOCK_N a program has one block of it for its sums; the first block's programs write dx.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    blocks_d = tl.cdiv(D, BLOCK_D)
    cols = program % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    block_n = program // blocks_d % blocks_n
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = program // blocks_d // blocks_n % chunks
    group = program // blocks_d // blocks_n // chunks
    inside = cols < D
    w = load_weight(weight_ptr, n, cols, N, D, False)
    scale, shift = tl.full([BLOCK_D], 1.0, tl.float32), tl.zeros([BLOCK_D], tl.float32)
    scales_ptr, shifts_ptr = None, None
    if PER_TOKEN:
        scales_ptr, shifts_ptr = scale_ptr, shift_ptr
    else:
        frame = (group * tokens_per_group).to(tl.int64)
        video, frame = frame // S, frame % S // tokens_per_frame
        if scale_ptr is not None:
            scale_ptr += video * scale_stride_b + frame * scale_stride_f
            scale += load_vector(scale_ptr, cols, D, 0.0)
        if shift_ptr is not None:
            shift_ptr += video * shift_stride_b + frame * shift_stride_f
            shift += load_vector(shift_ptr, cols, D, 0.0)
    P = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    Q = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # The next tile of x and of rows of one token each waits in registers: a buffer of Triton's pipeline is not swizzled
    # where a tile is wanted in two layouts, and each ldmatrix would take eight wavefronts a matrix.
    row, live = tokens_of(tiles - 1 - chunk, group, tokens_per_group, BLOCK_S)
    x = load_tokens(x_ptr, row, live, S, 1, x_stride_b, x_stride_s, cols, D)
    scales = load_tokens(scales_ptr, row, live, S, tokens_per_frame, scale_stride_b, scale_stride_f, cols, D)
    shifts = load_tokens(shifts_ptr, row, live, S, tokens_per_frame, shift_stride_b, shift_stride_f, cols, D)
    for i in range(tiles_per_program):
        tile = tiles - 1 - (i * chunks + chunk)
        row, live = tokens_of(tile, group, tokens_per_group, BLOCK_S)
        mask = live[:, None] & inside[None, :]
        x_hat = x.to(tl.float32)
        if not RMS:
            x_hat -= tl.load(mean_ptr + row, live, 0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, live, 0.0)[:, None]
        x_hat *= rstd
        next_row, next_live = tokens_of(tile - chunks, group, tokens_per_group, BLOCK_S)
        x = load_tokens(x_ptr, next_row, next_live, S, 1, x_stride_b, x_stride_s, cols, D)
        factor, h = scale[None, :], x_hat
        if scales_ptr is not None:
            factor += scales.to(tl.float32)
            h *= factor
        if shifts_ptr is not None:
            h += shifts.to(tl.float32)
        place = next_row, next_live, S, tokens_per_frame
        scales = load_tokens(scales_ptr, *place, scale_stride_b, scale_stride_f, cols, D)
        shifts = load_tokens(shifts_ptr, *place, shift_stride_b, shift_stride_f, cols, D)
        dy_rows = dy_ptr + row.to(tl.int64)[:, None] * N
        dy = tl.load(dy_rows + n[None, :], live[:, None] & (n < N)[None, :], 0.0)
        P += dy.to(tl.float32)
        Q = dot(tl.trans(dy), h.to(dy.dtype), Q, dy.dtype)

        if blocks_n == 1 or block_n == 0:
            dh = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
            if blocks_n == 1:
                dh = dot(dy, tl.trans(w), dh, dy.dtype)
            else:
                for first in range(0, N, BLOCK_N):
                    m = first + tl.arange(0, BLOCK_N)
                    dy_block = tl.load(dy_rows + m[None, :], live[:, None] & (m < N)[None, :], 0.0)
                    dh = dot(dy_block, tl.trans(load_weight(weight_ptr, m, cols, N, D, False)), dh, dy.dtype)
            # dx and rows of one token each are freshly allocated: dense [B, S, D]
            if PER_TOKEN and dshift_ptr is not None:
                store_rows(dshift_ptr, row.to(tl.int64) * D, cols, dh, where_asked(mask, wanted, 1 << 1))
            if PER_TOKEN and dscale_ptr is not None:
                store_rows(dscale_ptr, row.to(tl.int64) * D, cols, dh * x_hat, where_asked(mask, wanted, 1 << 2))
            dx = dh * factor - x_hat * tl.load(along_ptr + row, live, 0.0)[:, None]
            if not RMS:
                dx -= tl.load(centre_ptr + row, live, 0.0)[:, None]
            store_rows(dx_ptr, row.to(tl.int64) * D, cols, dx * rstd, where_asked(mask, wanted, 1 << 0))

    dbias = tl.sum(P, 0)
    part = (group * chunks + chunk).to(tl.int64)
    if not PER_TOKEN:
        P = dbias[:, None]
        wide = tl.trans(w).to(tl.float32)
        at = (part * blocks_n + block_n) * D + cols
        if dshift_ptr is not None:
            tl.store(dshift_ptr + at, tl.sum(P * wide, 0), where_asked(inside, wanted, 1 << 1))
        if dscale_ptr is not None:
            tl.store(dscale_ptr + at, tl.sum(Q * wide, 0), where_asked(inside, wanted, 1 << 2))
        Q = Q * scale[None, :] + P * shift[None, :]
    at = (part * N + n) * D
    inside = where_asked(inside, wanted, 1 << 3)
    tl.store(dweight_ptr + at[:, None] + cols[None, :], Q, (n < N)[:, None] & inside[None, :])
    if dbias_ptr is not None:
        own = where_asked(n < tl.where(program % blocks_d == 0, N, 0), wanted, 1 << 4)
        tl.store(dbias_ptr + part * N + n, dbias, own)


def tile(N: int, dtype: torch.dtype, split: bool, per_token: bool) -> dict[str, int]:
    """Constexprs of the forward: as many tokens share a tile of the weight as the registers hold sums for.

    SUMS columns hold those of x: the 8 that a thread loads at once are added first where a thread has several such.
    Rows of one token each take no pipeline, whose buffers would not be swizzled, as in the backward; each of the two
    programs that an SM of sm_90 then holds loads while the other multiplies (an estimate, not yet measured).
    """
    block = min(max(triton.next_power_of_2(N), 16), 256)
    if dtype == torch.float32:
        return dict(BLOCK_S=64, BLOCK_D=16, BLOCK_N=min(block, 64), SUMS=16, num_warps=8)
    if block > 64:
        wide, block = (32, min(block, 128)) if split else (64, block)
        return dict(BLOCK_S=32, BLOCK_D=wide, BLOCK_N=block, SUMS=wide, num_warps=8)
    if split or per_token:
        return dict(BLOCK_S=64, BLOCK_D=32, BLOCK_N=block, SUMS=32, num_warps=8, num_stages=1 if per_token else 3)
    return dict(BLOCK_S=128, BLOCK_D=64, BLOCK_N=64, SUMS=8, num_warps=8, num_stages=4)


def backward_tile(N: int, dtype: torch.dtype, split: bool) -> dict[str, int]:
    """Constexprs of the backward: all features, and as much of D as the fp32 sums of dweight leave room for."""
    block = min(max(triton.next_power_of_2(N), 16), 128)
    if dtype == torch.float32:
        return dict(BLOCK_S=32, BLOCK_D=32, BLOCK_N=min(block, 32), num_warps=8)
    if split or block > 64:
        return dict(BLOCK_S=32, BLOCK_D=64, BLOCK_N=min(block, 64) if split else block, num_warps=8, num_stages=2)
    return dict(BLOCK_S=32, BLOCK_D=128, BLOCK_N=block, num_warps=8)


def _groups(x, rows, most: int) -> tuple[int, int, int, bool]:
    """(groups, tokens of each, tokens of a frame, whether rows go by token): frames, if few and large enough."""
    B, S, _ = x.shape
    frames = frames_of(*rows)
    if B * frames > most or (frames > 1 and S // frames < 64):
        return 1, B * S, S // frames, True
    return B * frames, S // frames, S // frames, False


def final_layer_fwd(x, shift, scale, weight, bias, T, H, W, rms, eps, out):
    _forward(x, shift, scale, weight, bias, H, W, patch_of(out, (T, H, W)), rms, eps, out, None, [None] * 4)


def _forward(x, shift, scale, weight, bias, grid_h, grid_w, patch, rms, eps, out, dy, statistics):
    N, D = weight.shape
    B, S, _ = x.shape
    if B * S == 0:
        return
    if x.dtype == torch.float32:
        weight = weight.t().contiguous()  # plain cores read features side by side, or from one bank
    split = x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16
    groups, tokens, frame, per_token = _groups(x, (shift, scale), B * S)
    config = tile(N, x.dtype, split, per_token)
    tiles = triton.cdiv(tokens, config["BLOCK_S"])
    final_layer_fwd_kernel[(groups * tiles,)](
        x, shift, scale, weight, bias, out, dy, *statistics, *row_strides(x, shift, scale),
        *((0,) * 5 if out is None else out.stride()),
        S, grid_h, grid_w, frame, tokens, tiles, D, eps,
        N=N, C=N // (patch[0] * patch[1] * patch[2]), PT=patch[0], PH=patch[1], PW=patch[2],
        RMS=rms, PER_TOKEN=per_token, **config,
    )  # fmt: skip


def final_layer_bwd(dout, x, shift, scale, weight, bias, T, H, W, rms, eps, dx, dshift, dscale, dweight, dbias):
    N, D = weight.shape
    B, S, _ = x.shape

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=x.device)

    dy = empty(B, S, N, dtype=dout.dtype)
    unpatchify3d_bwd(dout, T, H, W, dy)
    if x.numel() == 0:
        for t in (dx, dshift, dscale, dweight):
            if t is not None:
                t.zero_()
        if dbias is not None:
            dbias.copy_(dy.sum((0, 1), dtype=torch.float32))
        return
    statistics = [empty(B * S) for _ in range(4)]
    _forward(x, shift, scale, weight, bias, H, W, patch_of(dout, (T, H, W)), rms, eps, None, dy, statistics)

    config = backward_tile(N, x.dtype, weight.dtype != x.dtype)
    groups, tokens, frame, per_token = _groups(x, (shift, scale, dshift, dscale), PROGRAMS)
    blocks_n = triton.cdiv(N, config["BLOCK_N"])
    blocks = triton.cdiv(D, config["BLOCK_D"]) * blocks_n
    tiles = triton.cdiv(tokens, config["BLOCK_S"])
    per_program = triton.cdiv(tiles, max(1, PROGRAMS // (groups * blocks)))
    chunks = triton.cdiv(tiles, per_program)
    parts = groups * chunks

    shape = (B * S // frame, frame, D) if per_token else (groups, chunks * blocks_n, D)
    dshifts, dscales = (
        or_nothing(grad, rows) if per_token and frame == 1 else partials(grad, rows, *shape)
        for grad, rows in ((dshift, shift), (dscale, scale))
    )
    dweights, dbiases = partials(dweight, weight, parts, N, D), partials(dbias, bias, 1, parts, N)
    final_layer_bwd_kernel[(parts * blocks,)](
        dy, x, shift, scale, weight, *statistics, or_nothing(dx, x),
        dshifts, dscales, dweights, dbiases, wanted_of(dx, dshift, dscale, dweight, dbias),
        *row_strides(x, shift, scale), S, frame, tokens, tiles, chunks, per_program, D,
        N=N, RMS=rms, PER_TOKEN=per_token, **config,
    )  # fmt: skip
    for partial, grad in ((dshifts, dshift), (dscales, dscale)):
        if grad is not None and partial is not grad:
            sum_partials(partial, grad.view(-1, D))
    if dweight is not None:
        sum_partials(dweights.transpose(0, 1), dweight)
    if dbias is not None:
        sum_partials(dbiases, dbias.view(1, N))
