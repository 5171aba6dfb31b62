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


def centred(x: Tensor) -> Tensor:
    """x minus its mean, twice: what rounding leaves of the mean of a row far from zero is more than its spread."""
    x = x - x.mean(-1, keepdim=True)
    return x - x.mean(-1, keepdim=True)


def normalize(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    x = accumulate(x)
    if norm == "layer":
        x = centred(x)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    x = x if weight is None else x * accumulate(weight)
    return x if bias is None else x + accumulate(bias)


def rounded(t: Tensor | float, x: Tensor, host: int) -> Tensor | float:
    """t as it is after a store in x's dtype, where the host makes one."""
    return accumulate(t.to(x.dtype)) if host and isinstance(t, Tensor) else t


def norm_modulate(
    x, shift, scale, *, norm="layer", weight=None, bias=None, shift_table=None, scale_table=None, eps=1e-6, host=0
) -> Tensor:
    """host: bit 0, the norm is rounded; bit 1, so are 1 + scale and its product; bit 2, so is gate · y below."""
    n = rounded(normalize(x, norm, weight, bias, eps), x, host & 1)
    n = rounded(n * rounded(1 + rows(scale, scale_table, x), x, host & 2), x, host & 2)
    return (n + rows(shift, shift_table, x)).to(x.dtype)


def gate_residual(x, y, gate, *, gate_table=None, host=0) -> Tensor:
    return (accumulate(x) + rounded(rows(gate, gate_table, x) * accumulate(y), x, host & 4)).to(x.dtype)


def gate_residual_norm_modulate(
    x, y, gate, shift, scale, *, norm="layer", weight=None, bias=None,
    gate_table=None, shift_table=None, scale_table=None, eps=1e-6, host=0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = gate_residual(x, y, gate, gate_table=gate_table, host=host)
    kwargs = dict(weight=weight, bias=bias, shift_table=shift_table, scale_table=scale_table, eps=eps, host=host)
    return x, norm_modulate(x, shift, scale, norm=norm, **kwargs)
