"""Triton kernels of the modulation family: one forward and one backward kernel serve its three functions.

Bytes per element of x (in units of its dtype; modulation rows shared by many tokens cost nothing):
forward 2 (norm_modulate), 3 (gate_residual), 4 (fused); backward 3, 3 and up to 6. Each tensor is touched once.

With an index the backward reads the tokens in the order of their rows: a run is what a program has of one row's tokens.
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
    rounded,
    row_strides,
    standardize,
    store_rows,
    sum_partials,
    wanted_of,
    where_asked,
)

PROGRAMS = 512  # of the backward: about 4 per SM of a large GPU, and the bound of the fp32 partials


@triton.jit
def modulation_fwd_kernel(
    x_ptr, y_ptr, x_new_ptr, out_ptr,
    gate_ptr, shift_ptr, scale_ptr, gate_table_ptr, shift_table_ptr, scale_table_ptr, weight_ptr, bias_ptr, index_ptr,
    x_stride_b, x_stride_s, y_stride_b, y_stride_s, x_new_stride_b, x_new_stride_s, out_stride_b, out_stride_s,
    gate_stride_b, gate_stride_f, shift_stride_b, shift_stride_f, scale_stride_b, scale_stride_f,
    index_stride_b, index_stride_s, total_rows, S, F, tokens_per_frame, eps, D: tl.constexpr,
    RMS: tl.constexpr, Y_RMS: tl.constexpr, NORM: tl.constexpr, HOST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x_new = x + gate·y (where there is a y);  out = norm(x_new)·(1 + scale) + shift (where NORM).

    Y_RMS, where it is not None: of an RMS norm of y, or a layer norm. Bits of HOST: the norm is rounded; 1 + scale and
    its product; gate·y. A token whose index is no number of a row has rows of zeros.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (row < total_rows)[:, None] & (cols < D)[None, :]
    b = row // S
    s = row % S
    if index_ptr is None:
        f = s // tokens_per_frame
        has_row = mask
    else:
        f = tl.load(index_ptr + b * index_stride_b + s * index_stride_s, row < total_rows, 0).to(tl.int64)
        has_row = mask & ((f >= 0) & (f < F))[:, None]

    x = load_rows(x_ptr, b * x_stride_b + s * x_stride_s, cols, mask)
    if y_ptr is not None:
        gate = load_vector(gate_table_ptr, cols, D, 0.0 if gate_ptr is not None else 1.0)[None, :]
        if gate_ptr is not None:
            gate += load_rows(gate_ptr, b * gate_stride_b + f * gate_stride_f, cols, has_row)
        y = load_rows(y_ptr, b * y_stride_b + s * y_stride_s, cols, mask)
        if Y_RMS is not None:
            y, _ = standardize(y, mask, D, eps, Y_RMS)
        gated = rounded(gate * y, x_ptr) if HOST & 4 else gate * y
        x_new = (x + gated).to(x_new_ptr.dtype.element_ty)
        store_rows(x_new_ptr, b * x_new_stride_b + s * x_new_stride_s, cols, x_new, mask)
        x = x_new.to(tl.float32)  # the norm sees what was stored

    if NORM:
        x_hat, _ = standardize(x, mask, D, eps, RMS)
        weight = load_vector(weight_ptr, cols, D, 1.0)[None, :]
        n = x_hat * weight + load_vector(bias_ptr, cols, D, 0.0)[None, :]
        scale = load_vector(scale_table_ptr, cols, D, 0.0)[None, :] + 1.0
        shift = load_vector(shift_table_ptr, cols, D, 0.0)[None, :]
        if scale_ptr is not None:
            scale += load_rows(scale_ptr, b * scale_stride_b + f * scale_stride_f, cols, has_row)
        if shift_ptr is not None:
            shift += load_rows(shift_ptr, b * shift_stride_b + f * shift_stride_f, cols, has_row)
        if HOST & 1:
            n = rounded(n, x_ptr)
        if HOST & 2:
            n, scale = rounded(n * rounded(scale, x_ptr), x_ptr), 1.0
        store_rows(out_ptr, b * out_stride_b + s * out_stride_s, cols, n * scale + shift, mask)


@triton.jit(do_not_specialize=["wanted"])
def modulation_bwd_kernel(
    dout_ptr, dx_new_ptr, x_ptr, y_ptr, dx_ptr, dy_ptr,
    gate_ptr, scale_ptr, gate_table_ptr, scale_table_ptr, weight_ptr, bias_ptr,
    order_ptr, group_ptr, starts_ptr, run_ptr,
    dgate_ptr, dshift_ptr, dscale_ptr,
    total_dgate_ptr, total_dshift_ptr, total_dscale_ptr, total_dweight_ptr, total_dbias_ptr, wanted,
    dout_stride_b, dout_stride_s, dx_new_stride_b, dx_new_stride_s, x_stride_b, x_stride_s, y_stride_b, y_stride_s,
    gate_stride_b, gate_stride_f, scale_stride_b, scale_stride_f,
    frames, F, S, D, frames_per_program, chunks, tokens_per_frame, tokens_per_chunk, total_rows, eps,
    RMS: tl.constexpr, Y_RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of the forward kernel. x is x_new where there is a y; statistics are computed again from it.

    A program owns either one chunk of one frame's tokens, or several whole frames (chunks = 1). Over the tokens of a
    frame it sums P = Σ dout, Q = Σ dout·x̂ and R = Σ dx·y, from which every reduced gradient follows:
        dshift = P,  dscale = weight·Q + bias·P,  dgate = R,  dweight = (1+scale)·Q,  dbias = (1+scale)·P.
    dshift, dscale, dgate go to row (frame, chunk) of their destination; what is summed over all frames as well
    (tables, weight, bias) goes to row `program` of the total_* partials. No two programs write the same row. Bits of
    `wanted`, in the order of the pointers, say which of the gradients to write; None has no operand.

    With an index, frames are its rows, and a program owns the runs in one chunk of the tokens as `Runs` orders them.
    What it sums of a run goes to row frame + program: both grow along the order. Of a y with a norm, R = Σ dx·ŷ.
    """
    program = tl.program_id(0).to(tl.int64)  # 64-bit: so is every row and offset below
    first_frame = (program // chunks) * frames_per_program
    chunk = program % chunks
    cols = tl.arange(0, BLOCK_D)
    live = cols < D
    weight = load_vector(weight_ptr, cols, D, 1.0)
    bias = load_vector(bias_ptr, cols, D, 0.0)
    gate_table = load_vector(gate_table_ptr, cols, D, 0.0 if gate_ptr is not None else 1.0)
    scale_table = load_vector(scale_table_ptr, cols, D, 0.0)
    total_dgate = tl.zeros([BLOCK_D], tl.float32)
    total_dshift = tl.zeros([BLOCK_D], tl.float32)
    total_dscale = tl.zeros([BLOCK_D], tl.float32)
    total_dweight = tl.zeros([BLOCK_D], tl.float32)
    total_dbias = tl.zeros([BLOCK_D], tl.float32)

    if order_ptr is not None:
        start = program * tokens_per_chunk
        end = tl.minimum(start + tokens_per_chunk, total_rows)
        runs = tl.load(run_ptr + end - 1) - tl.load(run_ptr + start) + 1
    # Bounds that are 1 are compile-time constants to Triton: the loop folds away, and with it the registers it carries.
    for i in range(frames_per_program if order_ptr is None else runs):
        if order_ptr is None:
            frame = first_frame + i
        else:
            frame = tl.load(group_ptr + start)
            stop = tl.minimum(tl.load(starts_ptr + frame + 1), end)
        inside = cols < tl.where(frame < frames, D, 0)
        b = frame // F
        f = frame % F
        scale = 1.0 + scale_table
        if scale_ptr is not None:
            scale += tl.load(scale_ptr + b * scale_stride_b + f * scale_stride_f + cols, inside, 0.0).to(tl.float32)
        gate = gate_table
        if gate_ptr is not None:
            gate += tl.load(gate_ptr + b * gate_stride_b + f * gate_stride_f + cols, inside, 0.0).to(tl.float32)
        P = tl.zeros([BLOCK_D], tl.float32)
        Q = tl.zeros([BLOCK_D], tl.float32)
        R = tl.zeros([BLOCK_D], tl.float32)

        # a chunk is a multiple of ROWS
        for j in range(0, tokens_per_chunk if order_ptr is None else stop - start, ROWS):
            if order_ptr is None:
                t = chunk * tokens_per_chunk + j + tl.arange(0, ROWS)
                clip = b
                s = f * tokens_per_frame + t
                mask = (t < tokens_per_frame)[:, None] & inside[None, :]
            else:
                t = start + j + tl.arange(0, ROWS)
                token = tl.load(order_ptr + t, t < stop, 0)
                clip = token // S
                s = token % S
                mask = (t < stop)[:, None] & live[None, :]
            dx = tl.zeros([ROWS, BLOCK_D], tl.float32)
            if dout_ptr is not None:
                x = load_rows(x_ptr, clip * x_stride_b + s * x_stride_s, cols, mask)
                dout = load_rows(dout_ptr, clip * dout_stride_b + s * dout_stride_s, cols, mask)
                x_hat, rstd = standardize(x, mask, D, eps, RMS)
                P += tl.sum(dout, 0)
                Q += tl.sum(dout * x_hat, 0)
                dx_hat = dout * (scale * weight)[None, :]
                dx = dx_hat - x_hat * (tl.sum(dx_hat * x_hat, 1) / D)[:, None]
                if not RMS:
                    dx -= (tl.sum(dx_hat, 1) / D)[:, None]
                dx *= rstd[:, None]
            if dx_new_ptr is not None:
                dx += load_rows(dx_new_ptr, clip * dx_new_stride_b + s * dx_new_stride_s, cols, mask)
            # dx and dy are freshly allocated by the caller: dense [B, S, D]
            dense = (clip * S + s) * D
            to_dy = where_asked(mask, wanted, 1 << 1)
            if dx_ptr is not None:
                store_rows(dx_ptr, dense, cols, dx, where_asked(mask, wanted, 1 << 0))
            if dy_ptr is not None and Y_RMS is None:
                store_rows(dy_ptr, dense, cols, gate[None, :] * dx, to_dy)
            if y_ptr is not None:
                from_y = mask if Y_RMS is not None else where_asked(mask, wanted, 1 << 2 | 1 << 5)
                y = load_rows(y_ptr, clip * y_stride_b + s * y_stride_s, cols, from_y)
                dx = tl.where(mask, dx, 0.0)
                if Y_RMS is not None:
                    y, y_rstd = standardize(y, mask, D, eps, Y_RMS)
                    dn = gate[None, :] * dx
                    dy = dn - y * (tl.sum(dn * y, 1) / D)[:, None]
                    if not Y_RMS:
                        dy -= (tl.sum(dn, 1) / D)[:, None]
                    if dy_ptr is not None:
                        store_rows(dy_ptr, dense, cols, dy * y_rstd[:, None], to_dy)
                R += tl.sum(dx * y, 0)

        dscale = weight * Q + bias * P
        if order_ptr is None:
            row = (frame * chunks + chunk) * D + cols
        else:
            row = (frame + program) * D + cols
            start = stop
        if dgate_ptr is not None:
            tl.store(dgate_ptr + row, R.to(dgate_ptr.dtype.element_ty), where_asked(inside, wanted, 1 << 2))
        if dshift_ptr is not None:
            tl.store(dshift_ptr + row, P.to(dshift_ptr.dtype.element_ty), where_asked(inside, wanted, 1 << 3))
        if dscale_ptr is not None:
            tl.store(dscale_ptr + row, dscale.to(dscale_ptr.dtype.element_ty), where_asked(inside, wanted, 1 << 4))
        total_dgate += R
        total_dshift += P
        total_dscale += dscale
        total_dweight += scale * Q
        total_dbias += scale * P

    row = program * D + cols
    if total_dgate_ptr is not None:
        tl.store(total_dgate_ptr + row, total_dgate, where_asked(live, wanted, 1 << 5))
    if total_dshift_ptr is not None:
        tl.store(total_dshift_ptr + row, total_dshift, where_asked(live, wanted, 1 << 6))
    if total_dscale_ptr is not None:
        tl.store(total_dscale_ptr + row, total_dscale, where_asked(live, wanted, 1 << 7))
    if total_dweight_ptr is not None:
        tl.store(total_dweight_ptr + row, total_dweight, where_asked(live, wanted, 1 << 8))
    if total_dbias_ptr is not None:
        tl.store(total_dbias_ptr + row, total_dbias, where_asked(live, wanted, 1 << 9))


@triton.jit
def sum_runs_kernel(
    partial_ptr, starts_ptr, out_ptr, stride_out, tokens_per_chunk, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out[frame] = Σ partial[frame + chunk] over the chunks that have tokens of the frame, in their order."""
    blocks = tl.cdiv(D, BLOCK_D)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(starts_ptr + frame)
    stop = tl.load(starts_ptr + frame + 1)
    chunk = start // tokens_per_chunk
    count = tl.where(start < stop, (stop - 1) // tokens_per_chunk + 1 - chunk, 0)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, count, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        mask = (k < count)[:, None] & (cols < D)[None, :]
        total += tl.sum(load_rows(partial_ptr, (frame + chunk + k) * D, cols, mask), 0)
    tl.store(out_ptr + frame * stride_out + cols, total.to(out_ptr.dtype.element_ty), mask=cols < D)


class Runs:
    """The tokens [B, S] in the order of their rows: those of row r of clip b, which is g = b·R + r, are
    order[starts[g] : starts[g + 1]], where group is g.

    Last come those whose index is no row. Computed on the device, without a word to the host.
    """

    def __init__(self, index: torch.Tensor, R: int) -> None:
        (B, _), device = index.shape, index.device
        row = index + R * torch.arange(B, device=device).unsqueeze(1)
        row = torch.where((index >= 0) & (index < R), row, B * R)
        self.group, self.order = row.flatten().sort(stable=True)
        self.starts = torch.searchsorted(self.group, torch.arange(B * R + 2, device=device))
        self.run = (self.group.diff(prepend=self.group[:1]) != 0).cumsum(0)  # number of the run that a token is in


def tile(D: int, rows: int) -> dict[str, int]:
    """Constexprs of the backward: whole rows, several at once where they are short, ~8 to 32 elements a thread."""
    block = triton.next_power_of_2(D)
    return dict(
        ROWS=min(max(1, 1024 // block), triton.next_power_of_2(rows)),
        BLOCK_D=block,
        num_warps=4 if block <= 1024 else 8 if block <= 4096 else 16,
    )


def forward_tile(D: int, rows: int) -> dict[str, int]:
    """Constexprs of the forward: 32 elements of a long row a thread.

    With 8, divisions, reductions and roots were most of what a thread does: 60 instructions of SASS an element at
    D = 1536 on sm_90, where an H200 can issue about 28 while it copies one; with 32 they are 26. D is known to the
    compiler, which leaves out the parts of BLOCK_D beyond it.
    """
    config = tile(D, rows) | dict(D=D)
    warps = min(max(config["BLOCK_D"] // 1024, 2), 16)
    return config | (dict(num_warps=warps) if config["BLOCK_D"] >= 1024 else {})  # shorter: tables in 16 bytes a lane


def _forward(
    x, y, x_new, out, gate, shift, scale, gate_table, shift_table, scale_table, weight, bias, index,
    rms, y_rms, eps, host, norm,
):  # fmt: skip
    B, S, D = x.shape
    if x.numel() == 0:
        return
    frames = frames_of(gate, shift, scale)
    config = forward_tile(D, B * S)
    modulation_fwd_kernel[(triton.cdiv(B * S, config["ROWS"]),)](
        x, y, x_new, out, gate, shift, scale, gate_table, shift_table, scale_table, weight, bias, index,
        *row_strides(x, y, x_new, out, gate, shift, scale), *((0, 0) if index is None else index.stride()),
        B * S, S, frames, S // frames, eps, RMS=rms, Y_RMS=y_rms, NORM=norm, HOST=host, **config,
    )  # fmt: skip


def _backward(
    dout, dx_new, x, y, gate, scale, gate_table, scale_table, weight, bias, index, rms, y_rms, eps, norm, dx, dy,
    frame_grads: tuple, total_grads: tuple,
):  # fmt: skip
    """frame_grads: those of gate, shift, scale [B, F, D]. total_grads: of their tables, of weight and of bias [D].

    Of what is not asked for an empty tensor takes the place, so that one compiled kernel serves all choices. Of shift
    and its table nothing is given here: they are taken for what scale and its table are.
    """
    wanted = wanted_of(dx, dy, *frame_grads, *total_grads)
    B, S, D = x.shape
    if x.numel() == 0:
        for t in (*frame_grads, *total_grads):
            if t is not None:
                t.zero_()
        return
    F = frames_of(gate, scale, *frame_grads)
    frames, tokens = B * F, B * S if index is not None else S // F
    config = tile(D, tokens)
    rows = config["ROWS"]
    # One row of partials per program: frames are split into chunks, or gathered, until PROGRAMS remain.
    share = PROGRAMS if index is not None else max(1, PROGRAMS // frames)
    tokens_per_chunk = triton.cdiv(triton.cdiv(tokens, share), rows) * rows
    chunks = triton.cdiv(tokens, tokens_per_chunk)
    frames_per_program = triton.cdiv(frames, PROGRAMS) if chunks == 1 else 1
    programs = chunks if index is not None else triton.cdiv(frames, frames_per_program) * chunks
    runs = None if index is None else Runs(index, F)

    shift, shift_table = (x if scale is None else scale) if norm else None, total_grads[1]
    shift_table = scale_table if shift_table is None else shift_table
    of_frames = list(zip(frame_grads, (gate, shift, scale), strict=True))
    of_totals = zip(total_grads, (gate_table, shift_table, scale_table, weight, bias), strict=True)
    if runs:
        by_chunk = [partials(*pair, frames + programs - 1, D) for pair in of_frames]
    else:
        by_chunk = [or_nothing(*pair) if chunks == 1 else partials(*pair, frames, chunks, D) for pair in of_frames]
    by_program = [partials(*pair, 1, programs, D) for pair in of_totals]
    ordered = (runs.order, runs.group, runs.starts, runs.run) if runs else [None] * 4
    modulation_bwd_kernel[(programs,)](
        dout, dx_new, x, y, or_nothing(dx, x if norm else None), or_nothing(dy, y),
        gate, scale, gate_table, scale_table, weight, bias, *ordered,
        *by_chunk, *by_program, wanted, *row_strides(dout, dx_new, x, y, gate, scale),
        frames, F, S, D, frames_per_program, chunks, tokens, tokens_per_chunk, B * S, eps,
        RMS=rms, Y_RMS=y_rms, **config,
    )  # fmt: skip
    if runs or chunks > 1:
        for partial, grad in zip(by_chunk, frame_grads, strict=True):
            if grad is not None and runs:
                sum_runs(partial, runs.starts, tokens_per_chunk, grad.view(frames, D))
            elif grad is not None:
                sum_partials(partial, grad.view(frames, D))
    for partial, grad in zip(by_program, total_grads, strict=True):
        if grad is not None:
            sum_partials(partial, grad.view(1, D))


def sum_runs(partial, starts, tokens_per_chunk, out) -> None:
    frames, D = out.shape
    block_d = min(128, triton.next_power_of_2(D))
    sum_runs_kernel[(frames * triton.cdiv(D, block_d),)](
        partial, starts, out, out.stride(0), tokens_per_chunk, D, BLOCK_N=32, BLOCK_D=block_d, num_warps=4
    )


def norm_modulate_fwd(x, shift, scale, weight, bias, shift_table, scale_table, index, rms, eps, host, out):
    tables = None, shift_table, scale_table
    _forward(x, None, None, out, None, shift, scale, *tables, weight, bias, index, rms, None, eps, host, True)


def norm_modulate_bwd(
    dout, x, scale, weight, bias, scale_table, index, rms, eps,
    dx, dshift, dscale, dweight, dbias, dshift_table, dscale_table,
):  # fmt: skip
    _backward(
        dout, None, x, None, None, scale, None, scale_table, weight, bias, index, rms, None, eps, True, dx, None,
        (None, dshift, dscale), (None, dshift_table, dscale_table, dweight, dbias),
    )  # fmt: skip


def gate_residual_fwd(x, y, gate, gate_table, index, y_rms, eps, host, out):
    nothing = [None] * 4
    _forward(x, y, out, None, gate, None, None, gate_table, *nothing, index, False, y_rms, eps, host, False)


def gate_residual_bwd(dout, y, gate, gate_table, index, y_rms, eps, dy, dgate, dgate_table):
    _backward(
        None, dout, y, y, gate, None, gate_table, None, None, None, index, False, y_rms, eps, False, None, dy,
        (dgate, None, None), (dgate_table, None, None, None, None),
    )  # fmt: skip


def gate_residual_norm_modulate_fwd(
    x, y, gate, shift, scale, weight, bias, gate_table, shift_table, scale_table, index, rms, y_rms, eps, host,
    x_new, out,
):  # fmt: skip
    tables = gate_table, shift_table, scale_table
    _forward(x, y, x_new, out, gate, shift, scale, *tables, weight, bias, index, rms, y_rms, eps, host, True)


def gate_residual_norm_modulate_bwd(
    dx_new, dout, x_new, y, gate, scale, weight, bias, gate_table, scale_table, index, rms, y_rms, eps,
    dx, dy, dgate, dshift, dscale, dweight, dbias, dgate_table, dshift_table, dscale_table,
):  # fmt: skip
    _backward(
        dout, dx_new, x_new, y, gate, scale, gate_table, scale_table, weight, bias, index, rms, y_rms, eps, True,
        dx, dy, (dgate, dshift, dscale), (dgate_table, dshift_table, dscale_table, dweight, dbias),
    )  # fmt: skip
