"""Triton kernels of `gate_heads`: each head of an attention's output times scale · sigmoid(its gate).

Bytes per element, in units of its dtype, the fewest possible. Forward: 2. Backward: 3 (x, dout, dx). Beside them
a gate for each head.
"""

from __future__ import annotations

import triton
import triton.language as tl

ELEMENTS = 4096  # of a program: 32 a thread


@triton.jit
def load_heads(x_ptr, stride_b, stride_s, stride_h, b, s, h, live, E: tl.constexpr, COLS: tl.constexpr):
    """Heads `[ROWS, COLS]` in fp32, dense in E."""
    cols = tl.arange(0, COLS)
    offset = b.to(tl.int64) * stride_b + s.to(tl.int64) * stride_s + h.to(tl.int64) * stride_h
    mask = live[:, None] & (cols < E)[None, :]
    return tl.load(x_ptr + offset[:, None] + cols[None, :], mask, 0.0).to(tl.float32)


@triton.jit
def store_heads(ptr, row, values, live, E: tl.constexpr, COLS: tl.constexpr):
    """A dense `[B, S, H, E]`."""
    cols = tl.arange(0, COLS)
    mask = live[:, None] & (cols < E)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * E + cols[None, :], values.to(ptr.dtype.element_ty), mask)


@triton.jit
def load_share(gate_ptr, stride_b, stride_s, stride_h, b, s, h, live):
    """sigmoid(gate) of each head."""
    at = b.to(tl.int64) * stride_b + s.to(tl.int64) * stride_s + h.to(tl.int64) * stride_h
    return tl.sigmoid(tl.load(gate_ptr + at, live, 0.0).to(tl.float32))


@triton.jit
def gate_heads_fwd_kernel(
    x_ptr, gate_ptr, out_ptr, x_stride_b, x_stride_s, x_stride_h, gate_stride_b, gate_stride_s, gate_stride_h,
    rows, S, scale, H: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program has ROWS heads, of one token after another."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    b, s, h = row // H // S, row // H % S, row % H
    x = load_heads(x_ptr, x_stride_b, x_stride_s, x_stride_h, b, s, h, live, E, COLS)
    share = load_share(gate_ptr, gate_stride_b, gate_stride_s, gate_stride_h, b, s, h, live)
    store_heads(out_ptr, row, x * (scale * share)[:, None], live, E, COLS)


@triton.jit(do_not_specialize=["dx_rows", "dgate_rows"])
def gate_heads_bwd_kernel(
    dout_ptr, x_ptr, gate_ptr, dx_ptr, dgate_ptr, dout_stride_b, dout_stride_s, dout_stride_h,
    x_stride_b, x_stride_s, x_stride_h, gate_stride_b, gate_stride_s, gate_stride_h,
    dx_rows, dgate_rows, rows, S, scale, H: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx = dout · scale σ,  dgate = Σ dout · x · scale σ (1 − σ), of as many rows as are wanted of each: all or none.

    One compiled kernel, so that dgate has the same bits beside dx and without it: another would lay out its tiles, and
    add, in another way.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    b, s, h = row // H // S, row // H % S, row % H
    dout = load_heads(dout_ptr, dout_stride_b, dout_stride_s, dout_stride_h, b, s, h, live, E, COLS)
    share = load_share(gate_ptr, gate_stride_b, gate_stride_s, gate_stride_h, b, s, h, live)
    store_heads(dx_ptr, row, dout * (scale * share)[:, None], row < dx_rows, E, COLS)
    live = row < dgate_rows
    x = load_heads(x_ptr, x_stride_b, x_stride_s, x_stride_h, b, s, h, live, E, COLS)
    dgate = tl.sum(dout * x, 1) * (scale * share * (1.0 - share))
    tl.store(dgate_ptr + row, dgate.to(dgate_ptr.dtype.element_ty), live)


def _launch(x) -> tuple[int, tuple[int, int], dict]:
    """Programs, (heads in all, S), and the constexprs."""
    B, S, H, E = x.shape
    cols = triton.next_power_of_2(E)
    rows = max(1, ELEMENTS // cols)
    return triton.cdiv(B * S * H, rows), (B * S * H, S), dict(H=H, E=E, ROWS=rows, COLS=cols, num_warps=4)


def gate_heads_fwd(x, gate, scale, out) -> None:
    if x.numel() == 0:
        return
    programs, sizes, config = _launch(x)
    gate_heads_fwd_kernel[(programs,)](x, gate, out, *x.stride()[:3], *gate.stride(), *sizes, scale, **config)


def gate_heads_bwd(dout, x, gate, scale, dx, dgate) -> None:
    if x.numel() == 0:
        if dgate is not None:
            dgate.zero_()
        return
    programs, sizes, config = _launch(x)
    wanted = [0 if t is None else sizes[0] for t in (dx, dgate)]
    dx, dgate = (like.new_empty(0) if t is None else t for t, like in ((dx, x), (dgate, gate)))
    gate_heads_bwd_kernel[(programs,)](
        dout, x, gate, dx, dgate, *dout.stride()[:3], *x.stride()[:3], *gate.stride(), *wanted, *sizes, scale, **config
    )
