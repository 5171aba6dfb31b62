"""diffusers' AutoencoderKLWan through our operations: each norm does its SiLU as well."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_kl_wan as host
from torch import Tensor, nn

from ... import layers
from ..patch import How, Plan, bind, is_hooked, why_not_rebind
from .common import draw, why_not_read

_OWNERS = {  # which norms of these hand their output to the SiLU
    host.WanResidualBlock: ("norm1", "norm2"),
    host.WanEncoder3d: ("norm_out",),
    host.WanDecoder3d: ("norm_out",),
}


def plan(model: nn.Module, how: How) -> tuple[list[Plan], tuple[str, ...]]:
    plans = [
        _norms(name, module, cls, norms, how)
        for name, module in model.named_modules()
        for cls, norms in _OWNERS.items()
        if isinstance(module, cls)
    ]
    kept = "convolutions and resampling: their caches between chunks are diffusers' own"
    return plans, (kept, "attention of a single head over a frame: PyTorch's own")


def example(model: nn.Module, grid: tuple[int, int, int] | None = None) -> tuple[Any, ...]:
    """A small random clip; the grid is that of a transformer's tokens."""
    side = 2 * model.spatial_compression_ratio
    return (draw(model.encoder.conv_in, 1, 3, 5, side, side, generator=torch.Generator().manual_seed(0)).tanh(),)


def sample(model: nn.Module, steps: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    return None


def _norms(name: str, module: nn.Module, cls: type, norms: tuple[str, ...], how: How) -> Plan:
    """Each norm does its SiLU as well, and the SiLU that follows hands its input on."""
    fused = tuple(getattr(module, child) for child in (*norms, "nonlinearity"))
    swaps = [bind(norm, _norm_silu, how.impl, fused) for norm in fused[:-1]]
    reason = _why_not_pair(module, cls, norms)
    return how.step(name, ("norm_silu",), reason, *swaps, bind(fused[-1], _already_activated, fused))


def _why_not_pair(module: nn.Module, cls: type, norms: tuple[str, ...]) -> str | None:
    if type(module).forward is not cls.forward:
        return f"{type(module).__name__} has a forward of its own, not that of {cls.__name__}"
    kinds = {name: host.WanRMS_norm for name in norms} | {"nonlinearity": nn.SiLU}
    if reason := why_not_read(module, **{name: (kind,) for name, kind in kinds.items()}):
        return reason
    reasons = [reason for name, kind in kinds.items() if (reason := why_not_rebind(getattr(module, name), kind))]
    return reasons[0] if reasons else None


def _norm_silu(norm: nn.Module, impl: str, fused: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    return type(norm).forward(norm, x) if any(map(is_hooked, fused)) else layers.activate(norm, x, impl)


def _already_activated(silu: nn.Module, fused: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    return type(silu).forward(silu, x) if any(map(is_hooked, fused)) else x
