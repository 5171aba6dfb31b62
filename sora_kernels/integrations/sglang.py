"""A plugin of SGLang-diffusion: its adaLN norms and gated residuals run on ours.

    pip install sora-kernels            # an entry point of the group sglang.multimodal_gen.plugins: nothing else to do
    SGLANG_PLUGINS=other,names          # loads those plugins only: without the name "sora" ours is left out
    sora_kernels.integrations.sglang.register()  # what the entry point calls, for who loads plugins by hand
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modulation import gate_residual_norm_modulate, norm_modulate
from . import _host

LAYERS = "sglang.multimodal_gen.runtime.layers.layernorm"


def register() -> None:
    """Put our operations around the forwards of SGLang-diffusion's norms, on CPU and CUDA, with its HookRegistry.

    `_ScaleResidualNormScaleShift` (residual + gate · x, its norm, scale and shift: one pass) and `_NormScaleShift`,
    layer and RMS norms alike. The gate may be a number; scale, shift and gate [D], [B, 1, D], [B, S, D] or
    [B, F, 1, D]. What else comes is left to the host's own forward. Statistics and sums are fp32 and rounded once.
    Classes are changed when the host applies its hooks; importing this changes nothing.

    Raises ImportError where sglang is missing or older than 0.5.23, the first with this door.
    """
    module = "sglang.multimodal_gen.runtime.platforms.plugins"
    plugins = _host.require(module, "sglang", "0.5.23", "a plugin of its diffusion models")
    for device in ("cpu", "cuda"):
        for cls, hook in (("_ScaleResidualNormScaleShift", _gated), ("_NormScaleShift", _modulated)):
            plugins.HookRegistry.register(f"{LAYERS}.{cls}.forward_{device}", hook, plugins.HookType.AROUND)


def _gated(original, self, residual, x, gate, shift, scale):
    """(norm(residual + gate · x) · (1 + scale) + shift, residual + gate · x), in the host's order of results."""
    rows = [_row(t, x) for t in (gate, shift, scale)]
    if any(row is None for row in rows) or not _served(residual, x) or residual.shape != x.shape:
        return original(self, residual, x, gate, shift, scale)
    summed, out = gate_residual_norm_modulate(residual, x, *rows, **_norm(self))
    return out, summed


def _modulated(original, self, x, shift, scale):
    """norm(x) · (1 + scale) + shift"""
    rows = [_row(t, x) for t in (shift, scale)]
    if any(row is None for row in rows) or not _served(x):
        return original(self, x, shift, scale)
    return norm_modulate(x, *rows, **_norm(self))


def _norm(layer) -> dict[str, object]:
    affine = {name: getattr(layer.norm, name, None) for name in ("weight", "bias")}
    return {"norm": layer.norm_type, "eps": layer.eps, **affine}


def _served(*tensors: Tensor) -> bool:
    dtypes = {t.dtype for t in tensors}
    return all(t.ndim == 3 for t in tensors) and len(dtypes) == 1 and tensors[0].is_floating_point()


def _row(t: Tensor | float, x: Tensor) -> Tensor | None:
    """A modulation of the host as a row that `norm_modulate` takes; None where it is of another form."""
    if isinstance(t, int | float):
        return torch.full(x.shape[-1:], float(t), device=x.device)
    if not isinstance(t, Tensor) or x.ndim != 3:
        return None
    B, S, D = x.shape
    if t.ndim == 4 and t.shape[2] == 1 and t.shape[1] and S % t.shape[1] == 0:               # [B, F, 1, D]
        t = t.squeeze(2)
    elif t.numel() in (1, D):
        t = t.reshape(-1)
    elif t.ndim != 3 or t.shape[1] not in (1, S):
        return None
    if t.shape[-1] not in (1, D) or (t.ndim == 3 and t.shape[0] not in (1, B)):
        return None
    return t.expand(B, -1, D) if t.ndim == 3 else t.expand(D)
