"""What kernels are given: operands in layouts they read, and fresh destinations for the gradients that are wanted."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(t: Tensor | None) -> Tensor | None:
    """t with a dense last axis; its other strides are the kernel's business."""
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def parameter(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A contiguous parameter; fp32 in place of fp64, which kernels do not read, unless x is fp64 itself."""
    return t if t is None else (t.float() if t.dtype == torch.float64 != x.dtype else t).contiguous()


def table(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A contiguous table in the dtype that the mathematics on x is done in."""
    return t if t is None else t.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def like(t: Tensor | None, wanted: bool) -> Tensor | None:
    """A contiguous destination for the gradient of t, where it is wanted."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device) if wanted else None
