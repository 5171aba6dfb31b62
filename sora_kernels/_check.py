"""Argument checks shared by the families: one error that names the argument, what was expected, what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape_of(t: Tensor) -> str:
    return str(list(t.shape))


def tensor(op: str, name: str, t: Tensor, dims: str, *, ndim: int | None = None) -> None:
    """`t` is a floating-point tensor of the rank that `dims`, such as "[B, S, D]", says."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {dims}; got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64; got {t.dtype}")
    if ndim is not None and t.ndim != ndim:
        raise ValueError(f"{op}: {name} must be {dims}; got shape {shape_of(t)}")


def exact(op: str, name: str, t: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """`t` has exactly this shape; `meaning` says where the numbers come from."""
    if isinstance(t, Tensor) and t.shape == shape and t.dtype in FLOATS:
        return
    tensor(op, name, t, meaning)
    if t.shape != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {list(shape)} ({meaning}); got {shape_of(t)}")


def like(op: str, name: str, t: Tensor, x: Tensor, x_name: str = "x") -> None:
    """`t` has the shape, dtype and device of `x`."""
    if isinstance(t, Tensor) and t.shape == x.shape and t.dtype == x.dtype and t.device == x.device:
        return
    tensor(op, name, t, f"of the shape of {x_name}")
    if t.shape != x.shape:
        exact(op, name, t, x.shape, f"the shape of {x_name}")
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must have {x_name}'s dtype {x.dtype}; got {t.dtype}; cast it with .to()")
    same_device(op, x, {name: t}, x_name)


def same_device(op: str, x: Tensor, others: dict[str, Tensor | None], x_name: str = "x") -> None:
    device = x.device
    for name, t in others.items():
        if t is not None and t.device != device:
            raise ValueError(f"{op}: {name} must be on {x_name}'s device {device}; got {t.device}; move it with .to()")


def choice(op: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def positive(op: str, name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{op}: {name} must be positive; got {value}")


def triple(op: str, name: str, value: object, *, least: int = 1) -> tuple[int, int, int]:
    """Three integers of at least `least`, as given."""
    if not (isinstance(value, (tuple, list)) and len(value) == 3 and all([isinstance(v, int) for v in value])):
        raise ValueError(f"{op}: {name} must be three integers (t, h, w); got {value!r}")
    if min(value) < least:
        raise ValueError(f"{op}: every entry of {name} must be at least {least}; got {tuple(value)}")
    return tuple(value)
