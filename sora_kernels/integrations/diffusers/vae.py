"""What the VAEs of diffusers share: a norm and the SiLU after it as one operation, inputs, autocast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..patch import How, Plan, bind, is_hooked, why_not_rebind
from .common import why_not_read

Activate = Callable[[nn.Module, Tensor, str], Tensor]  # SiLU(norm(x)) of a host's norm, x and impl


def example(model: nn.Module, grid: tuple[int, int, int] | None = None) -> tuple[Any, ...]:
    """A small random clip; the grid is that of a transformer's tokens."""
    side = 4 * getattr(model, "spatial_compression_ratio", 8)
    clip = torch.randn((1, 3, 5, side, side), generator=torch.Generator().manual_seed(0))
    return (clip.tanh().to(next(model.parameters())),)


def sample(model: nn.Module, steps: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


def pair(
    where: str,
    owner: nn.Module,
    cls: type[nn.Module],
    norms: Mapping[str, type[nn.Module]],
    activation: str,
    activate: Activate,
    how: How,
) -> Plan:
    """Each of these norms of `owner`, a `cls`, does its SiLU as well, and the SiLU that follows hands its input on."""
    fused = tuple(owner.get_submodule(child) for child in (*norms, activation))
    swaps = [bind(norm, _norm_silu, activate, how.impl, fused) for norm in fused[:-1]]
    reason = _why_not(owner, cls, {**norms, activation: nn.SiLU})
    return how.step(where, ("norm_silu",), reason, *swaps, bind(fused[-1], _already_activated, fused))


def _why_not(owner: nn.Module, cls: type[nn.Module], kinds: Mapping[str, type[nn.Module]]) -> str | None:
    if type(owner).forward is not cls.forward:
        return f"{type(owner).__name__} has a forward of its own, not that of {cls.__name__}"
    if reason := why_not_read(owner, **{name: (kind,) for name, kind in kinds.items()}):
        return reason
    reasons = [reason for name, kind in kinds.items() if (reason := why_not_rebind(getattr(owner, name), kind))]
    return reasons[0] if reasons else None


def _norm_silu(norm: nn.Module, activate: Activate, impl: str, fused: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    return type(norm).forward(norm, x) if _any_hooked(fused) else activate(norm, x, impl)


def _already_activated(silu: nn.Module, fused: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    done = x.ndim == 5 and not _any_hooked(fused)  # an embedding of a time passes the same SiLU
    return x if done else type(silu).forward(silu, x)


def _any_hooked(fused: tuple[nn.Module, ...]) -> bool:
    """Of these or, where a norm holds another, of theirs."""
    return any(is_hooked(module) for outer in fused for module in outer.modules())
