"""The specification of the modulation family in plain torch: any dtype, any row layout, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(x: Tensor) -> Tensor:
    """x in the dtype the mathematics is done in: fp64 stays fp64, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def rows(t: Tensor | None, table: Tensor | None, x: Tensor, index: Tensor | None = None) -> Tensor | float:
    """A modulation `[D]`, `[B,D]` or `[B,F,D]` (F divides S), plus its table `[D]`, broadcastable to x `[B,S,D]`.

    With index `[B,S]`, rows `[R,D]` or `[B,R,D]` of which token s of clip b has number index[b, s]; zeros beyond R.
    """
    out: Tensor | float = 0.0
    if t is not None:
        B, S, D = x.shape
        if index is not None and t.ndim > 1:
            t = t.expand(B, *t.shape[-2:])
            known = (index >= 0) & (index < t.shape[1])
            at = index.where(known, 0).long()[..., None].expand(B, S, D)
            t = t.gather(1, at).where(known[..., None], 0)
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
    x, shift, scale, *, norm="layer", weight=None, bias=None, shift_table=None, scale_table=None, index=None, eps=1e-6,
    host=0,
) -> Tensor:  # fmt: skip
    """host: bit 0, the norm is rounded; bit 1, so are 1 + scale and its product; bit 2, so is gate · y below."""
    n = rounded(normalize(x, norm, weight, bias, eps), x, host & 1)
    n = rounded(n * rounded(1 + rows(scale, scale_table, x, index), x, host & 2), x, host & 2)
    return (n + rows(shift, shift_table, x, index)).to(x.dtype)


def gate_residual(x, y, gate, *, gate_table=None, y_norm=None, index=None, eps=1e-6, host=0) -> Tensor:
    y = accumulate(y) if y_norm is None else normalize(y, y_norm, None, None, eps)
    gated = y if gate is None else rows(gate, gate_table, x, index) * y
    return (accumulate(x) + rounded(gated, x, host & 4)).to(x.dtype)


def gate_residual_norm_modulate(
    x, y, gate, shift, scale, *, norm="layer", y_norm=None, weight=None, bias=None,
    gate_table=None, shift_table=None, scale_table=None, index=None, eps=1e-6, host=0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = gate_residual(x, y, gate, gate_table=gate_table, y_norm=y_norm, index=index, eps=eps, host=host)
    kwargs = dict(weight=weight, bias=bias, shift_table=shift_table, scale_table=scale_table, index=index)
    return x, norm_modulate(x, shift, scale, norm=norm, eps=eps, host=host, **kwargs)
