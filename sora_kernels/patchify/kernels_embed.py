"""Triton kernels of `patch_embed3d`: an implicit GEMM whose rows are gathered from the video, with any five strides.

Bytes, in units of the output's B·S·D elements (the video, K/D of it, and the weight stay in L2): forward 1, the write.
Backward 1 for everything but dvideo, which reads dout once more. pos and dpos add their own size. That is the fewest
possible, but for dvideo together with the others (2 instead of 1), and for more than 256 features a patch, 128 for
dvideo, where programs side by side read the same dout for each block of them.

A weight of video's dtype meets it on the tensor cores as it is. Another is not rounded to it: both are widened to fp32
and multiplied, beside a 16-bit video as bf16 halves, of which 16 bits of each operand survive.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton import load_rows, load_vector, or_nothing, partials, store_rows, sum_partials, wanted_of, where_asked
from .kernels import dot, feature_offsets, token_offsets

PROGRAMS = 1024  # of the forward, at least, where there is work for them; each gathers its block of tokens anew
REDUCERS = 256  # of dweight: two per SM of a large GPU, and the bound of its fp32 partials: that many tiles


@triton.jit
def load_patches(
    video_ptr, tokens, k, live, stride_c, stride_t, stride_h, stride_w,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """Features k (ordered c, i, j, k as in a Conv3d's weight) of the patches at `tokens`, in the video's dtype."""
    AREA: tl.constexpr = PT * PH * PW
    features = feature_offsets(k // AREA, k % AREA, stride_c, stride_t, stride_h, stride_w, PH, PW)
    return tl.load(video_ptr + tokens[:, None] + features[None, :], live[:, None] & (k < C * AREA)[None, :], 0.0)


@triton.jit
def load_features(ptr, k, cols, K: tl.constexpr, D, TURNED: tl.constexpr):
    """Features k of the columns of the weight [D, K], or of [K, D] where TURNED: [k, cols] in its own dtype."""
    mask = (k < K)[:, None] & (cols < D)[None, :]
    if TURNED:
        return tl.load(ptr + k.to(tl.int64)[:, None] * D + cols[None, :], mask, 0.0)
    else:
        return tl.load(ptr + cols.to(tl.int64)[None, :] * K + k[:, None], mask, 0.0)


@triton.jit
def patch_embed3d_fwd_kernel(
    video_ptr, weight_ptr, bias_ptr, pos_ptr, out_ptr, stride_b, stride_c, stride_t, stride_h, stride_w, pos_stride_b,
    rows, S, grid_h, grid_w, D, blocks, blocks_per_program,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_S tokens and several blocks of D. Patches that fit one block of K are gathered once."""
    K: tl.constexpr = C * PT * PH * PW
    TURNED: tl.constexpr = video_ptr.dtype.element_ty == tl.float32
    programs = tl.cdiv(blocks, blocks_per_program)
    first = tl.program_id(0) % programs * blocks_per_program
    row = tl.program_id(0) // programs * BLOCK_S + tl.arange(0, BLOCK_S)
    live = row < rows
    b, s = row // S, row % S
    tokens = token_offsets(b, s, stride_b, stride_t, stride_h, stride_w, grid_h, grid_w, PT, PH, PW)
    k = tl.arange(0, BLOCK_K)
    if K <= BLOCK_K:
        patches = load_patches(video_ptr, tokens, k, live, stride_c, stride_t, stride_h, stride_w, C, PT, PH, PW)
    for i in range(blocks_per_program):
        cols = (first + i) * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
        if K <= BLOCK_K:
            w = load_features(weight_ptr, k, cols, K, D, TURNED)
            acc = dot(patches, w, acc, video_ptr.dtype.element_ty)
        else:
            for start in range(0, K, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                patches = load_patches(
                    video_ptr, tokens, k, live, stride_c, stride_t, stride_h, stride_w, C, PT, PH, PW
                )
                w = load_features(weight_ptr, k, cols, K, D, TURNED)
                acc = dot(patches, w, acc, video_ptr.dtype.element_ty)
        mask = live[:, None] & (cols < D)[None, :]
        acc += load_vector(bias_ptr, cols, D, 0.0)[None, :]
        if pos_ptr is not None:
            acc += load_rows(pos_ptr, b.to(tl.int64) * pos_stride_b + s.to(tl.int64) * D, cols, mask)
        store_rows(out_ptr, row.to(tl.int64) * D, cols, acc, mask)


@triton.jit
def patch_embed3d_dvideo_kernel(
    dout_ptr, weight_ptr, dvideo_ptr, dout_stride_b, dout_stride_s,
    stride_b, stride_c, stride_t, stride_h, stride_w, rows, S, grid_h, grid_w, D,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dout · weight, scattered: an element of the video belongs to one patch, so that nothing is written twice."""
    AREA: tl.constexpr = PT * PH * PW
    blocks_k: tl.constexpr = (C * AREA + BLOCK_K - 1) // BLOCK_K  # they share their tokens' dout in L2
    row = tl.program_id(0) // blocks_k * BLOCK_S + tl.arange(0, BLOCK_S)
    k = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    live = row < rows
    b, s = row // S, row % S
    dout = dout_ptr + (b.to(tl.int64) * dout_stride_b + s.to(tl.int64) * dout_stride_s)[:, None]
    acc = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        g = tl.load(dout + cols[None, :], live[:, None] & (cols < D)[None, :], 0.0)
        w = weight_ptr + cols.to(tl.int64)[:, None] * (C * AREA) + k[None, :]
        w = tl.load(w, (cols < D)[:, None] & (k < C * AREA)[None, :], 0.0)
        acc = dot(g, w, acc, dout_ptr.dtype.element_ty)
    tokens = token_offsets(b, s, stride_b, stride_t, stride_h, stride_w, grid_h, grid_w, PT, PH, PW)
    features = feature_offsets(k // AREA, k % AREA, stride_c, stride_t, stride_h, stride_w, PH, PW)
    mask = live[:, None] & (k < C * AREA)[None, :]
    tl.store(dvideo_ptr + tokens[:, None] + features[None, :], acc.to(dvideo_ptr.dtype.element_ty), mask)


@triton.jit
def video_tile(tile, j, summed, stop, tiles_per_video, S, BLOCK_S: tl.constexpr):
    """(video, token, whether it is there) of a tile in the j-th of the videos that are summed."""
    s = tile % tiles_per_video * BLOCK_S + tl.arange(0, BLOCK_S)
    return tile // tiles_per_video * summed + j + tl.zeros([BLOCK_S], tl.int32), s, s < tl.where(tile < stop, S, 0)


@triton.jit
def load_gradient(ptr, b, s, live, stride_b, stride_s, cols, D):
    offsets = b.to(tl.int64) * stride_b + s.to(tl.int64) * stride_s
    return tl.load(ptr + offsets[:, None] + cols[None, :], live[:, None] & (cols < D)[None, :], 0.0)


@triton.jit(do_not_specialize=["wanted"])
def patch_embed3d_dweight_kernel(
    dout_ptr, video_ptr, dweight_ptr, dbias_ptr, dpos_ptr, wanted, dout_stride_b, dout_stride_s,
    stride_b, stride_c, stride_t, stride_h, stride_w, S, grid_h, grid_w, D,
    summed, tiles, tiles_per_video, tiles_per_program,
    C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """doutᵀ · patches, Σ dout, and dout summed over the batch where pos was shared by it: all in one read of dout.

    A program has a block of D, a block of K, and a chunk of the tiles of tokens; its sums go to row `chunk` of the
    partials. The `summed` videos that share a row of pos follow each other at each tile, and their sum is that of pos.
    Bits of `wanted` say which of the three to write; a pointer is None only where there is no such operand. The first
    block of K multiplies even where no weight's gradient is asked for: a mask of its loads spilled.
    """
    K: tl.constexpr = C * PT * PH * PW
    blocks_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K if dweight_ptr is not None else 1
    blocks_d = tl.cdiv(D, BLOCK_D)
    block_k = tl.program_id(0) % blocks_k
    k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    cols = tl.program_id(0) // blocks_k % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk = (tl.program_id(0) // blocks_k // blocks_d).to(tl.int64)
    own = cols < tl.where(block_k == 0, D, 0)  # the other blocks of K leave bias and pos to the first
    acc = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    lanes = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)

    # A step is a video's tile. The next step's dout waits in registers: a buffer of Triton's pipeline is not swizzled
    # where a tile is wanted in two layouts, and each ldmatrix would take eight wavefronts a matrix.
    first = chunk.to(tl.int32) * tiles_per_program
    stop = tl.minimum(first + tiles_per_program, tl.where((wanted & 1) + (block_k == 0) != 0, tiles, 0))
    b, s, live = video_tile(first, 0, summed, stop, tiles_per_video, S, BLOCK_S)
    g = load_gradient(dout_ptr, b, s, live, dout_stride_b, dout_stride_s, cols, D)
    dpos = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for step in range(tiles_per_program * summed):
        tile, j = first + step // summed, step % summed
        b, s, live = video_tile(tile, j, summed, stop, tiles_per_video, S, BLOCK_S)
        if dbias_ptr is not None:
            lanes += g.to(tl.float32)
        if dpos_ptr is not None:
            dpos = tl.where(j == 0, 0.0, dpos) + g.to(tl.float32)
            row = (tile // tiles_per_video).to(tl.int64) * S + s
            done = live & (s < tl.where(j == summed - 1, S, 0))
            store_rows(dpos_ptr, row * D, cols, dpos, where_asked(done, wanted, 1 << 2)[:, None] & own[None, :])
        dout = g
        next_b, next_s, next_live = video_tile(
            first + (step + 1) // summed, (step + 1) % summed, summed, stop, tiles_per_video, S, BLOCK_S
        )
        g = load_gradient(dout_ptr, next_b, next_s, next_live, dout_stride_b, dout_stride_s, cols, D)
        if dweight_ptr is not None:
            tokens = token_offsets(b, s, stride_b, stride_t, stride_h, stride_w, grid_h, grid_w, PT, PH, PW)
            patches = load_patches(video_ptr, tokens, k, live, stride_c, stride_t, stride_h, stride_w, C, PT, PH, PW)
            acc = dot(tl.trans(dout), patches, acc, video_ptr.dtype.element_ty)

    if dweight_ptr is not None:
        at = (chunk * D + cols) * K
        rows = where_asked(cols < D, wanted, 1)
        tl.store(dweight_ptr + at[:, None] + k[None, :], acc, rows[:, None] & (k < K)[None, :])
    if dbias_ptr is not None:
        tl.store(dbias_ptr + chunk * D + cols, tl.sum(lanes, 0), where_asked(own, wanted, 1 << 1))


def tile(K: int, dtype: torch.dtype) -> dict[str, int]:
    """Constexprs of the forward. Gathering a wide patch takes registers; fp32 products hold their operands in them."""
    if dtype == torch.float32:
        return dict(BLOCK_S=64, BLOCK_D=32, BLOCK_K=16, num_warps=8)
    block = min(max(triton.next_power_of_2(K), 16), 64)
    return dict(BLOCK_S=128 if K <= block else 64, BLOCK_D=64, BLOCK_K=block, num_warps=8)


def dvideo_tile(K: int, dtype: torch.dtype) -> dict[str, int]:
    """Constexprs of dvideo: whole patches in one block, as far as 128 features go."""
    block = min(max(triton.next_power_of_2(K), 16), 128)
    if dtype == torch.float32:
        return dict(BLOCK_S=32, BLOCK_D=32, BLOCK_K=min(block, 64), num_warps=8)
    return dict(BLOCK_S=64, BLOCK_D=64, BLOCK_K=block, num_warps=8)


def dweight_tile(K: int, dtype: torch.dtype) -> dict[str, int]:
    """Constexprs of dweight: whole patches in one block, as far as 256 features go."""
    block = min(max(triton.next_power_of_2(K), 16), 256)
    if dtype == torch.float32:
        return dict(BLOCK_S=32, BLOCK_D=32, BLOCK_K=min(block, 64), num_warps=8)
    return dict(BLOCK_S=64, BLOCK_D=128 if block <= 64 else 64, BLOCK_K=block, num_warps=8)


def _layout(video, weight) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid in tokens, and the constexprs of the patch."""
    C, pt, ph, pw = weight.shape[1:]
    _, _, T, H, W = video.shape
    return (T // pt, H // ph, W // pw), dict(C=C, PT=pt, PH=ph, PW=pw)


def patch_embed3d_fwd(video, weight, bias, pos, out):
    if out.numel() == 0:
        return
    B, S, D = out.shape
    grid, patch = _layout(video, weight)
    config = tile(weight[0].numel(), video.dtype)
    blocks, tiles = triton.cdiv(D, config["BLOCK_D"]), triton.cdiv(B * S, config["BLOCK_S"])
    per_program = triton.cdiv(blocks, triton.cdiv(PROGRAMS, tiles))
    if video.dtype == torch.float32:
        weight = weight.flatten(1).t().contiguous()  # plain cores read columns side by side, or from one bank
    pos_stride = pos.stride(0) if pos is not None and pos.shape[0] > 1 else 0
    patch_embed3d_fwd_kernel[(tiles * triton.cdiv(blocks, per_program),)](
        video, weight, bias, pos, out, *video.stride(), pos_stride, B * S, S, *grid[1:], D, blocks, per_program,
        **patch, **config,
    )  # fmt: skip


def patch_embed3d_bwd(dout, video, weight, bias, pos, dvideo, dweight, dbias, dpos):
    B, S, D = dout.shape
    grid, patch = _layout(video, weight)
    if dout.numel() == 0:
        for t in (dvideo, dweight, dbias, dpos):
            if t is not None:
                t.zero_()
        return
    K = weight[0].numel()
    if K == 0:
        dvideo = dweight = None  # nothing to write
    strides = dout.stride()[:2]
    if dvideo is not None:
        config = dvideo_tile(K, dout.dtype)
        programs = triton.cdiv(B * S, config["BLOCK_S"]) * triton.cdiv(K, config["BLOCK_K"])
        patch_embed3d_dvideo_kernel[(programs,)](
            dout, weight, dvideo, *strides, *dvideo.stride(), B * S, S, *grid[1:], D, **patch, **config
        )
    if dweight is None and dbias is None and dpos is None:
        return
    config = dweight_tile(K, dout.dtype)
    summed = B if pos is not None and pos.shape[0] == 1 else 1
    tiles_per_video = triton.cdiv(S, config["BLOCK_S"])
    tiles = B // summed * tiles_per_video
    blocks_d, blocks_k = triton.cdiv(D, config["BLOCK_D"]), triton.cdiv(K, config["BLOCK_K"])
    per_program = triton.cdiv(tiles, max(1, REDUCERS // (blocks_d * max(blocks_k, 1))))
    programs = blocks_d * max(blocks_k, 1)
    chunks = triton.cdiv(tiles, per_program)
    dweights = partials(dweight, weight if K else None, chunks, D, K)
    dbiases = partials(dbias, bias, 1, chunks, D)
    patch_embed3d_dweight_kernel[(chunks * programs,)](
        dout, video, dweights, dbiases, or_nothing(dpos, pos), wanted_of(dweight, dbias, dpos),
        *strides, *video.stride(), S, *grid[1:], D,
        summed, tiles, tiles_per_video, per_program, **patch, **config,
    )  # fmt: skip
    if dweight is not None:
        sum_partials(dweights.transpose(0, 1), dweight.view(D, K))
    if dbias is not None:
        sum_partials(dbiases, dbias.view(1, D))
