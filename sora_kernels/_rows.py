"""Modulation rows, as every family that modulates takes them: [D], [B, D], [B, 1, D], [B, F, D] or [B, S, D].

Token s of S reads row s // (S / F) of its clip. Kernels take one F > 1 for all rows of a call, beside single rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._operands import dense

LAYOUTS = "[D], [B, D], [B, 1, D], [B, F, D] or [B, S, D]"


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
            known, shape = t.layout is _check.STRIDED and t.dtype in _check.FLOATS, t.shape
        except (AttributeError, RuntimeError):  # as in `_check.exact`
            known = False
        if not known:
            _check.tensor(op, name, t, LAYOUTS)
        F = shape[1] if len(shape) == 3 else 1
        if shape != (B, F, D) and shape != (B, D) and shape != (D,):
            raise ValueError(
                f"{op}: {name} must be {LAYOUTS} with B={B}, S={S}, D={D} from x; got {_check.shape_of(t)}"
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


def operand(t: Tensor | None, x: Tensor, frames: int) -> Tensor | None:
    """t as a forward takes it: as it is, unless it is not dense in D or has another number F > 1 of rows."""
    return dense(t) if t is None or t.ndim < 3 or t.shape[1] in (1, frames) else view(t, x, frames)


def view(t: Tensor | None, x: Tensor, frames: int) -> Tensor | None:
    """t as a view [B, frames, D], as its gradient is; copied as `operand` copies."""
    if t is None:
        return None
    t = dense(t)
    t = t.unsqueeze(1) if t.ndim == 2 else t
    shape = t.shape
    if len(shape) == 3 and shape[1] == frames:
        return t
    B, _, D = x.shape
    if len(shape) == 3 and (F := shape[1]) != 1:
        t = t[:, :, None].expand(B, F, frames // F, D).reshape(B, frames, D)
    return t.expand(B, frames, D)


def like(t: Tensor | None, wanted: bool, x: Tensor, frames: int) -> Tensor | None:
    """A destination [B, F, D] for the gradient of t: in its dtype where nothing is left to sum, else in fp32."""
    if not wanted:
        return None
    shape = t.shape
    if len(shape) == 3 and shape[1] == frames:
        return torch.empty_like(t, memory_format=torch.contiguous_format)
    B, _, D = x.shape
    final = t.numel() == B * frames * D
    dtype = t.dtype if final else torch.promote_types(t.dtype, torch.float32)
    return torch.empty((B, frames, D), dtype=dtype, device=x.device)


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
    grad = grad.reshape(t.shape)
    return grad if grad.dtype == t.dtype else grad.to(t.dtype)
