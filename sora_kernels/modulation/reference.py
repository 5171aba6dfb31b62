"""The specification of the modulation family in plain torch: any dtype, any row layout, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(x: Tensor) -> Tensor:
    """x in the dtype the mathematics is done in: fp64 stays fp64, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def rows(t: Tensor | None, table: Tensor | None, x: Tensor) -> Tensor | float:
    """A modulation `[D]`, `[B,D]` or `[B,F,D]` (F divides S), plus its table `[D]`, broadcastable to x `[B,S,D]`."""
    out: Tensor | float = 0.0
    if t is not None:
        B, S, D = x.shape
        t = t[:, None] if t.ndim == 2 else t
        frames = t.shape[1] if t.ndim == 3 else 1
        if frames > 1 and frames != S:
            t = t[:, :, None].expand(B, frames, S // frames, D).reshape(B, S, D)
        out = accumulate(t)
    return out if table is None else out + accumulate(table)


def normalize(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    x = accumulate(x)
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    x = x if weight is None else x * accumulate(weight)
    return x if bias is None else x + accumulate(bias)


def norm_modulate(
    x, shift, scale, *, norm="layer", weight=None, bias=None, shift_table=None, scale_table=None, eps=1e-6
) -> Tensor:
    n = normalize(x, norm, weight, bias, eps)
    return (n * (1 + rows(scale, scale_table, x)) + rows(shift, shift_table, x)).to(x.dtype)


def gate_residual(x, y, gate, *, gate_table=None) -> Tensor:
    return (accumulate(x) + rows(gate, gate_table, x) * accumulate(y)).to(x.dtype)


def gate_residual_norm_modulate(
    x, y, gate, shift, scale, *, norm="layer", weight=None, bias=None,
    gate_table=None, shift_table=None, scale_table=None, eps=1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = gate_residual(x, y, gate, gate_table=gate_table)
    kwargs = dict(weight=weight, bias=bias, shift_table=shift_table, scale_table=scale_table, eps=eps)
    return x, norm_modulate(x, shift, scale, norm=norm, **kwargs)
