"""What our implementations are measured against: eager PyTorch, `torch.compile`, and installed libraries.

A baseline takes the arguments of our public function, so that every candidate sees the same tensors. A peer
is a loader `(inputs, mode) -> such a function`, which raises `Missing` with the exact reason where it cannot
be measured.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import machine


class Missing(RuntimeError):
    """This peer cannot be measured here. The message says why."""


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of an eager baseline, for these static shapes, without a graph break."""
    import torch._functorch.config as functorch

    torch._dynamo.reset()
    functorch.donated_buffer = False  # backward is timed again and again over one graph
    return torch.compile(fn, fullgraph=True, dynamic=False)


def version(name: str) -> str | None:
    """The version of the library behind a candidate, or None where it is torch or our own."""
    distribution = {
        "liger": "liger-kernel",
        "quack": "quack-kernels",
        "comfy": "comfy-kitchen",
        "diffusers": "diffusers",
        "flash-attn-4": "flash-attn-4",
        "flashinfer": "flashinfer-python",
        "fastvideo": "fastvideo-kernel",
        "natten": "natten",
    }
    return machine.installed(distribution[name]) if name in distribution else None


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{package} is not usable here: {error}") from error
    except Exception as error:  # a peer that breaks while it is imported must not end the run
        raise Missing(f"{package} breaks while it is imported: {type(error).__name__}: {error}") from error


def _per_frame(x: Tensor, row: Tensor) -> Tensor:
    """x `[B,S,D]` so that it broadcasts against `_row`: `[B,F,S/F,D]` where F frames have a row each."""
    frames = row.shape[1]
    return x if frames in (1, x.shape[1]) else x.unflatten(1, (frames, -1))


def _row(row: Tensor, table: Tensor | None, x: Tensor) -> Tensor:
    row = row if table is None else row + table
    return row if row.shape[1] in (1, x.shape[1]) else row[:, :, None]


def normalised(
    x: Tensor, norm: str, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    width = (x.shape[-1],)
    return F.layer_norm(x, width, weight, bias, eps) if norm == "layer" else F.rms_norm(x, width, weight, eps)


def norm_modulate(
    x, shift, scale, *, norm="layer", weight=None, bias=None, shift_table=None, scale_table=None, eps=1e-6
):
    normed = _per_frame(normalised(x, norm, weight, bias, eps), scale)
    out = normed * (1 + _row(scale, scale_table, x)) + _row(shift, shift_table, x)
    return out.reshape(x.shape).to(x.dtype)


def gate_residual(x, y, gate, *, gate_table=None):
    return (_per_frame(x, gate) + _per_frame(y, gate) * _row(gate, gate_table, x)).reshape(x.shape).to(x.dtype)


def gate_residual_norm_modulate(x, y, gate, shift, scale, *, gate_table=None, **kwargs):
    x = gate_residual(x, y, gate, gate_table=gate_table)
    return x, norm_modulate(x, shift, scale, **kwargs)


def _needs_cuda(package: str, inputs: Mapping[str, Any]) -> None:
    if not inputs["x"].is_cuda:
        raise Missing(f"{package} runs on a CUDA device only")


def _diffusers_norm_modulate(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    """The lines of WanTransformerBlock around its FP32LayerNorm: everything in fp32, rounded at the end."""
    modules = _import("diffusers.models.normalization", "diffusers")
    if inputs["norm"] != "layer":
        raise Missing("diffusers' Wan block has a layer norm only")
    layer = modules.FP32LayerNorm(inputs["x"].shape[-1], inputs.get("eps", 1e-6), elementwise_affine=False)

    def norm_modulate(x, shift, scale, *, norm, shift_table=None, scale_table=None):
        normed = _per_frame(layer(x.float()), scale)
        out = normed * (1 + _row(scale.float(), scale_table, x)) + _row(shift.float(), shift_table, x)
        return out.reshape(x.shape).type_as(x)

    return norm_modulate


def _diffusers_gate_residual(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    _import("diffusers", "diffusers")

    def gate_residual(x, y, gate, *, gate_table=None):
        out = _per_frame(x.float(), gate) + _per_frame(y.float(), gate) * _row(gate.float(), gate_table, x)
        return out.reshape(x.shape).type_as(x)

    return gate_residual


def _diffusers_both(inputs: Mapping[str, Any], mode: str) -> Callable[..., tuple[Tensor, Tensor]]:
    gated, normed = _diffusers_gate_residual(inputs, mode), _diffusers_norm_modulate(inputs, mode)

    def both(x, y, gate, shift, scale, *, norm, gate_table=None, **tables):
        x = gated(x, y, gate, gate_table=gate_table)
        return x, normed(x, shift, scale, norm=norm, **tables)

    return both


def _liger_norm_modulate(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    module = _import("liger_kernel.ops.modulated_rms_norm", "liger-kernel")
    _needs_cuda("liger-kernel's modulated_rms_norm", inputs)
    if inputs["norm"] != "rms":
        raise Missing("liger-kernel modulates an RMS norm only")
    apply = module.LigerModulatedRMSNormFunction.apply
    weight = torch.ones(inputs["x"].shape[-1], device=inputs["x"].device, dtype=inputs["x"].dtype)

    def norm_modulate(x, shift, scale, *, norm, shift_table=None, scale_table=None):
        B, S, D = x.shape
        rows = [r if t is None else r + t for r, t in ((scale, scale_table), (shift, shift_table))]
        if rows[0].shape[1] not in (1, S):  # it shares a row among consecutive tokens, which flattening keeps
            rows = [r.reshape(-1, D) for r in rows]
        elif rows[0].shape[1] == 1:
            rows = [r[:, 0] for r in rows]
        return apply(x, weight, *rows, 1e-6, 0.0, "llama", False)

    return norm_modulate


def _quack_norm_modulate(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    """quack normalises; the modulation that follows is eager PyTorch, since quack has none."""
    module = _import("quack", "quack-kernels")
    _needs_cuda("quack", inputs)
    if inputs["norm"] != "rms":
        raise Missing("quack's trainable norm is an RMS norm")
    weight = torch.ones(inputs["x"].shape[-1], device=inputs["x"].device)

    def norm_modulate(x, shift, scale, *, norm, shift_table=None, scale_table=None):
        normed = _per_frame(module.rmsnorm(x, weight, eps=1e-6), scale)
        out = normed * (1 + _row(scale, scale_table, x)) + _row(shift, shift_table, x)
        return out.reshape(x.shape).to(x.dtype)

    return norm_modulate


def _comfy_norm_modulate(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    module = _import("comfy_kitchen", "comfy-kitchen")
    _needs_cuda("comfy-kitchen's adaln", inputs)
    if mode == "bwd":
        raise Missing("comfy-kitchen's adaln has no backward")
    fn = module.adaln if inputs["norm"] == "layer" else module.rms_adaln

    def norm_modulate(x, shift, scale, *, norm, shift_table=None, scale_table=None):
        rows = [_row(r, t, x).to(x.dtype) for r, t in ((scale, scale_table), (shift, shift_table))]
        return fn(_per_frame(x, scale), *rows, 1e-6).reshape(x.shape)

    return norm_modulate


NORM_MODULATE = {
    "diffusers": _diffusers_norm_modulate,
    "liger": _liger_norm_modulate,
    "quack": _quack_norm_modulate,
    "comfy": _comfy_norm_modulate,
}
GATE_RESIDUAL = {"diffusers": _diffusers_gate_residual}
GATE_RESIDUAL_NORM_MODULATE = {"diffusers": _diffusers_both}
