"""Triton primitives shared by the families. Everything is fp32 between the load and the store.

Grids have one axis, which may be 2^31 - 1 programs long; the others end at 65535. What is counted along several axes is
divided out of the program's number, and what is multiplied by a stride that may be long is widened to 64 bits first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._kept import kept as kept


@triton.jit
def load_rows(ptr, offsets, cols, mask):
    """Rows at `offsets` (in elements) of a tensor dense in its last axis, as fp32 [rows, cols]; 0 outside the mask."""
    return tl.load(ptr + offsets[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, offsets, cols, values, mask):
    """The counterpart of `load_rows`: rounds once, to the tensor's dtype."""
    tl.store(ptr + offsets[:, None] + cols[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def rounded(x, ptr):
    """fp32 values as they would be after a store to `ptr`."""
    return x.to(ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def load_vector(ptr, cols, D, default: tl.constexpr):
    """An optional parameter `[D]` as fp32; `default` everywhere if it is absent."""
    if ptr is None:
        return tl.full(cols.shape, default, tl.float32)
    else:
        return tl.load(ptr + cols, mask=cols < D, other=default).to(tl.float32)


@triton.jit
def where_asked(mask, wanted, BITS: tl.constexpr):
    """The mask, or nothing of it where `wanted`, which `wanted_of` gives, has none of these bits."""
    return mask & ((tl.full(mask.shape, BITS, tl.int32) & wanted) != 0)


@triton.jit
def standardize(x, mask, D, eps, RMS: tl.constexpr):
    """(x̂, 1/σ) of each row of x [rows, cols], masked columns being 0. Two passes over registers: no E[x²] − mean².

    The second also sums what rounding left of the mean: of a row far from zero that is more than its spread.
    """
    left = 0.0
    if not RMS:
        mean = tl.sum(x, 1) / D
        x = tl.where(mask, x - mean[:, None], 0.0)
        left = tl.sum(x, 1) / D
    variance = tl.sum(x * x, 1) / D
    if not RMS:
        variance = tl.maximum(variance - left * left, 0.0)
        x = tl.where(mask, x - left[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    return x * rstd[:, None], rstd


@triton.jit
def multiply_add(a, b, acc):
    """acc + a·b; of fp32 in fp32, the product of a block added up by itself.

    Plain cores multiply in one chain of additions, and a chain of thousands gathers the rounding of each.
    """
    if a.dtype == tl.float32:  # the last argument keeps the compiler from making one chain of the product and the sum
        return acc + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def zeros(ROWS: tl.constexpr, PARTS: tl.constexpr):
    """fp32 sums of ROWS rows whose columns are held in one or two parts."""
    FIRST: tl.constexpr = PARTS[0]  # triton 3.6 takes no element of a tuple as the side of a block
    if len(PARTS) == 1:
        return (tl.zeros([ROWS, FIRST], tl.float32),)
    else:
        SECOND: tl.constexpr = PARTS[1]
        return (tl.zeros([ROWS, FIRST], tl.float32), tl.zeros([ROWS, SECOND], tl.float32))


@triton.jit
def sum_partials_kernel(
    partial_ptr, out_ptr, stride_out, stride_row, stride_count, count, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out[row, :] = Σ_k partial[row, k, :] in a fixed order: the end of every reduction over tokens."""
    blocks = tl.cdiv(D, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    k = tl.arange(0, BLOCK_N)
    partial_ptr += row * stride_row
    for start in range(0, count, BLOCK_N):
        mask = (k < count - start)[:, None] & (cols < D)[None, :]
        total += tl.sum(load_rows(partial_ptr, k.to(tl.int64) * stride_count, cols, mask), 0)
        partial_ptr += tl.cast(BLOCK_N, tl.int64) * stride_count
    tl.store(out_ptr + row * stride_out + cols, total.to(out_ptr.dtype.element_ty), mask=cols < D)


def sum_partials(partial, out) -> None:
    """Reduce fp32 `partial` [rows, count, D] over count into `out` [rows, D] of any float dtype."""
    rows, count, D = partial.shape
    block_d = min(128, triton.next_power_of_2(D))
    sum_partials_kernel[(rows * triton.cdiv(D, block_d),)](
        partial, out, out.stride(0), partial.stride(0), partial.stride(1), count, D,
        BLOCK_N=min(64, triton.next_power_of_2(count)), BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip


def wanted_of(*gradients: torch.Tensor | None) -> int:
    """A bit for each gradient that is asked for.

    A kernel is told so at run time: compiled without a store, it would lay out its tiles, and add, in another way, and
    a gradient's bits would depend on which others are wanted.
    """
    return sum(1 << bit for bit, t in enumerate(gradients) if t is not None)


def or_nothing(gradient: torch.Tensor | None, operand: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient of `operand`, or of one that is not asked for an empty tensor; None without an operand."""
    return operand.new_empty(0) if gradient is None and operand is not None else gradient


def partials(gradient: torch.Tensor | None, operand: torch.Tensor | None, *shape: int) -> torch.Tensor | None:
    """The same of fp32 partials of this shape."""
    if operand is None:
        return None
    return torch.empty((0,) if gradient is None else shape, dtype=torch.float32, device=operand.device)


def frames_of(*rows: torch.Tensor | None) -> int:
    """The F of a call, from what a kernel is given."""
    return max([t.shape[1] for t in rows if t is not None and t.ndim == 3], default=1)


def row_strides(*tensors: torch.Tensor | None) -> list[int]:
    """(batch, row) of each, in elements; 0 where a row serves all, and for None. Tokens [B, S, D] have theirs too."""
    found = []
    for t in tensors:
        outer = () if t is None else t.stride()[:-1]
        batch = outer[0] if outer else 0
        found += [batch, outer[1] if len(outer) == 2 and t.shape[1] > 1 else 0]
    return found
