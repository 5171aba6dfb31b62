"""Modulation rows, as every family that modulates takes them: [D], [B, D], [B, 1, D], [B, F, D] or [B, S, D].

Token s of S reads row s // (S / F) of its clip; rows with 1 in the place of B are those of every clip. Kernels take one
F > 1 for all rows of a call, beside single rows.
With an index [B, S] the rows are [D], [R, D] or [B, R, D], and token s of clip b reads row index[b, s]: F is R then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._operands import dense

LAYOUTS = "[D], [B, D], [B, 1, D], [B, F, D] or [B, S, D]"
INDEXED = "[D], [R, D] or [B, R, D]"
INTEGERS = (torch.int32, torch.int64)


def check(op: str, x: Tensor, **modulations: Tensor | None) -> int:
    """Each given modulation is a row layout of x [B, S, D], on x's device.

    Returns the one F that serves all: the finest given, or S where no given F is a multiple of the others.
    """
    (B, S, D), device = x.shape, x.device
    finest, given = 1, []
    for name, t in modulations.items():
        if t is None:
            continue
        try:
            known, shape = t.layout is _check.STRIDED and t.dtype in _check.FLOATS and type(t) in _check.OWN, t.shape
        except (AttributeError, RuntimeError):  # as in `_check.exact`
            known = False
        if not known:
            _check.tensor(op, name, t, LAYOUTS)
        F = shape[1] if len(shape) == 3 else 1
        if shape != (B, F, D) and shape != (B, D) and shape != (D,) and shape != (1, F, D) and shape != (1, D):
            raise ValueError(
                f"{op}: {name} must be {LAYOUTS} with B={B} (or 1, for all clips), S={S}, D={D} from x; "
                f"got {_check.shape_of(t)}"
            )
        if F != S and (F == 0 or S % F):
            raise ValueError(
                f"{op}: {name} has F={F} rows, which must divide S={S}, the number of tokens in x; "
                f"got shape {_check.shape_of(t)}"
            )
        if t.device != device:
            _check.same_device(op, x, {name: t})
        if F != finest:
            given.append(F)
            finest = max(finest, F)
    return S if given and any([F == 0 or finest % F for F in given]) else finest


def chosen(op: str, x: Tensor, index: Tensor, **modulations: Tensor | None) -> tuple[int, list[Tensor | None]]:
    """As `check`, of rows that an index chooses: R, and the modulations, those that clips share as [1, R, D]."""
    (B, _, D), count = x.shape, None
    for name, t in modulations.items():
        if t is None:
            continue
        _check.tensor(op, name, t, INDEXED)
        if t.ndim > 1:
            count = t.shape[-2] if count is None else count
        if t.shape != (D,) and (count == 0 or (t.shape != (count, D) and t.shape != (B, count, D))):
            raise ValueError(
                f"{op}: {name} must be {INDEXED} beside an index, with B={B}, D={D} from x and one R ≥ 1 for all rows"
                f"{'' if count is None else f', here {count}'}; got {_check.shape_of(t)}"
            )
        _check.same_device(op, x, {name: t})
    if count is None:
        among = ", ".join(modulations)
        raise ValueError(f"{op}: index must choose among rows [R, D] or [B, R, D] of {among}; got none")
    _check_index(op, x, index, count)
    return count, [t[None] if t is not None and t.ndim == 2 else t for t in modulations.values()]


def _check_index(op: str, x: Tensor, index: Tensor, count: int) -> None:
    """Values are looked at on the CPU only, and where there are any to look at."""
    if not isinstance(index, Tensor) or index.dtype not in INTEGERS or not _check.plain(index):
        got = _check.format_of(index) if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{op}: index must be an int32 or int64 tensor [B, S]; got {got}")
    if index.shape != x.shape[:2]:
        raise ValueError(
            f"{op}: index must be [B, S] = {_check.shape_of(x[:, :, 0])}, a row for each token; got "
            f"{_check.shape_of(index)}; one for all clips can be expanded"
        )
    _check.same_device(op, x, {"index": index})
    symbolic = torch.compiler.is_compiling() or type(index) is not Tensor
    if symbolic or torch._C._functorch.is_functorch_wrapped_tensor(index) or not index.is_cpu or not index.numel():
        return
    least, most = [int(n) for n in index.aminmax()]
    if least < 0 or most >= count:
        raise ValueError(f"{op}: index must lie between 0 and R-1={count - 1}; got {least} to {most}")


def index_of(index: Tensor | None, *rows: Tensor | None) -> Tensor | None:
    """The index, where there are rows it chooses among."""
    return index if any([t is not None for t in rows]) else None


def operand(t: Tensor | None, x: Tensor, frames: int) -> Tensor | None:
    """t as a forward takes it: as it is, unless it is not dense in D, that of one clip for all or has another number
    F > 1 of rows."""
    if t is None or t.ndim == 1:
        return dense(t)
    rows = t.shape[1] if t.ndim == 3 else 1
    return dense(t) if rows in (1, frames) and t.shape[0] == x.shape[0] else view(t, x, frames)


def view(t: Tensor | None, x: Tensor, frames: int) -> Tensor | None:
    """t as a view [B, frames, D], as its gradient is; copied as `operand` copies."""
    if t is None:
        return None
    t = dense(t)
    t = t.unsqueeze(1) if t.ndim == 2 else t
    shape = t.shape
    B, _, D = x.shape
    if shape == (B, frames, D):
        return t
    if len(shape) == 3 and (F := shape[1]) not in (1, frames):
        t = t[:, :, None].expand(-1, F, frames // F, D).reshape(shape[0], frames, D)
    return t.expand(B, frames, D)


def like(t: Tensor | None, wanted: bool, x: Tensor, frames: int) -> Tensor | None:
    """A destination [B, F, D] for the gradient of t: in its dtype where nothing is left to sum, else in fp32.

    There is one, too, that is not wanted, where t does not tell its dtype: kernels would be others without it.
    """
    if t is None:
        return None
    B, _, D = x.shape
    if t.shape == (B, frames, D):
        return torch.empty_like(t, memory_format=torch.contiguous_format) if wanted else None
    final = t.numel() == B * frames * D
    dtype = t.dtype if final else torch.promote_types(t.dtype, torch.float32)
    return x.new_empty((B, frames, D), dtype=dtype) if wanted or dtype != t.dtype else None


def told_by(t: Tensor | None, other: Tensor | None) -> bool:
    """Whether what a backward must know of t, its rows and dtype, it knows of `other`, which it is given."""
    return t is None or (other is not None and t.dtype == other.dtype)


def sum_to(grad: Tensor | None, t: Tensor | None) -> Tensor | None:
    """The gradient [B, F, D] summed down to the shape of t and rounded once to its dtype."""
    if grad is None or grad.shape == t.shape:
        return grad
    if t.ndim == 1:
        grad = grad.sum((0, 1)) if grad.shape[0] * grad.shape[1] != 1 else grad.reshape(t.shape)
    elif t.ndim == 2 or t.shape[1] == 1:
        grad = grad.sum(1) if grad.shape[1] != 1 else grad
    elif t.shape[1] != grad.shape[1]:
        grad = grad.unflatten(1, (t.shape[1], -1)).sum(2)
    if t.ndim > 1 and t.shape[0] != grad.shape[0]:  # rows of all clips
        grad = grad.sum(0)
    grad = grad.reshape(t.shape)
    return grad if grad.dtype == t.dtype else grad.to(t.dtype)
