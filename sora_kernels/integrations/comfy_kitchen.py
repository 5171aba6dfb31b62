"""A backend "sora" for comfy-kitchen, ComfyUI's registry of kernels: its Wan then runs on ours, without node or patch.

    from sora_kernels.integrations import comfy_kitchen
    comfy_kitchen.register()
    out = torch.ops.comfy_kitchen.adaln(x, scale, shift, 1e-6)  # ours, and it trains

Once in a process, before or after ComfyUI is imported: in a custom node's `__init__.py`, say.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch import Tensor

from ..modulation import norm_modulate
from ..qknorm_rope import qk_norm_rope
from . import _host

NAME = "sora"
_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})


def register() -> None:
    """Serve comfy-kitchen's adaln, rms_adaln, rms_rope and rms_rope_split_half, before its other backends.

    Afterwards these operations also have gradients (of everything but freqs_cis), whichever backend ran the forward:
    those of `norm_modulate` and `qk_norm_rope`, deterministic, which compute the forward once more. `torch.compile`,
    `comfy_kitchen.use_backend` and `disable_backend("sora")` work as with the host's own. Twice is once.

    x of any shape [..., D] in fp32, bf16 or fp16 on CPU and GPU; scale and shift as they broadcast against it.
    rms_rope: q, k [B, S, H, E] with freqs_cis [1, S, 1, E/2, 2, 2], or [B, H, S, E] with [1, 1, S, E/2, 2, 2] (S may be
    1), whose matrices are rotations, as the host makes them; any other form goes on to the next backend. Rounded once,
    where the host rounds after the norm as well.

    Raises ImportError where comfy-kitchen is missing or older than 0.2.40.
    """
    kitchen = _host.require("comfy_kitchen", "comfy-kitchen", "0.2.40", "a backend of ComfyUI's kernels")
    registry = kitchen.registry
    if registry.is_available(NAME):
        return
    from comfy_kitchen.constraints import FunctionConstraints, ParamConstraint, ValidationResult

    def rotates(arguments) -> ValidationResult:
        reason = _why_not_rope(**arguments)
        return ValidationResult.fail("freqs_cis", reason) if reason else ValidationResult.ok()

    floats, names = ParamConstraint(dtypes=_FLOATS), {}
    for function in (adaln, rms_adaln):
        names[function] = FunctionConstraints({name: floats for name in ("x", "scale", "shift")})
    for function in (rms_rope, rms_rope_split_half):
        names[function] = FunctionConstraints({"q": floats, "k": floats}, call_rules=(rotates,))
    backend = types.SimpleNamespace(**{function.__name__: _host_layout(function) for function in names})
    registry.register(NAME, backend, {function.__name__: constraints for function, constraints in names.items()})
    registry.set_priority([NAME, *(other for other in registry._priority if other != NAME)])
    for function in names:
        operation = f"comfy_kitchen::{function.__name__}"
        torch.library.register_autograd(operation, _backward(function), setup_context=_save)


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, norm: str = "layer") -> Tensor:
    """layer_norm(x) · (1 + scale) + shift over the last axis: `norm_modulate`."""
    tokens = x.reshape(1, -1, x.shape[-1])
    return norm_modulate(tokens, _rows(shift, x), _rows(scale, x), norm=norm, eps=eps).view(x.shape)


def rms_adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """rms_norm(x) · (1 + scale) + shift over the last axis: `norm_modulate`."""
    return adaln(x, scale, shift, eps, norm="rms")


def _rows(t: Tensor, x: Tensor) -> Tensor:
    """What broadcasts against x [..., D] as one row for each block of consecutive tokens of x as [1, N, D]."""
    *axes, D = x.shape
    t = t.reshape((1,) * (x.ndim - t.ndim) + tuple(t.shape))
    kept = max((i + 1 for i in range(len(axes)) if t.shape[i] != 1), default=0)
    return t.expand(*axes[:kept], *t.shape[kept:-1], D).reshape(1, -1, D)


def rms_rope(q, k, freqs_cis, q_scale, k_scale=None, epsilon=1e-6, interleaved=True, rot_dim=0):
    """rms_norm(q) · q_scale and that of k, rotated in pairs (2i, 2i+1): `qk_norm_rope`."""
    if reason := _why_not_rope(q, k, freqs_cis, q_scale, rot_dim=rot_dim):  # where another backend ran the forward
        raise ValueError(f"comfy_kitchen::rms_rope: no gradient, {reason}")
    heads_first = freqs_cis.shape[1] == 1
    q, k = (t.transpose(1, 2) if heads_first else t for t in (q, k))
    angles = freqs_cis[0].squeeze(0 if heads_first else 1).expand(q.shape[1], -1, 2, 2)      # [S, E/2, 2, 2]
    how = {"freqs": (angles[..., 0, 0], angles[..., 1, 0]), "interleaved": interleaved, "eps": epsilon}
    results = qk_norm_rope(q, k, q_weight=q_scale, k_weight=q_scale if k_scale is None else k_scale, **how)
    return tuple(t.transpose(1, 2) if heads_first else t for t in results)


def rms_rope_split_half(q, k, freqs_cis, q_scale, k_scale=None, epsilon=1e-6, rot_dim=0):
    """As `rms_rope` in pairs (i, i + rot_dim/2) of the first rot_dim channels (0: of all)."""
    return rms_rope(q, k, freqs_cis, q_scale, k_scale, epsilon, interleaved=False, rot_dim=rot_dim)


def _why_not_rope(q, k, freqs_cis, q_scale, k_scale=None, epsilon=1e-6, rot_dim=0) -> str | None:
    pairs = (rot_dim or q.shape[-1]) // 2
    served = [(1, S, 1, pairs, 2, 2) for S in {1, q.shape[1]}] + [(1, 1, S, pairs, 2, 2) for S in {1, q.shape[2]}]
    if q.ndim != 4 or tuple(freqs_cis.shape) not in served:
        return f"sora takes one rotation for each token of q {list(q.shape)}; got {list(freqs_cis.shape)}"
    tokens = 2 if freqs_cis.shape[1] == 1 else 1
    if k.ndim != 4 or any(k.shape[axis] != q.shape[axis] for axis in (0, tokens, 3)) or k.dtype != q.dtype:
        return f"sora takes k like q {list(q.shape)} but for its heads; got {list(k.shape)}"
    return None


def _host_layout(function: Callable) -> Callable:
    """The function without a graph, its results with the strides that the host's fakes promise: those of x, q, k."""

    def run(**arguments):
        with torch.no_grad():
            results = function(**arguments)
        pairs = zip((results,) if isinstance(results, Tensor) else results, arguments.values(), strict=False)
        kept = tuple(r if r.stride() == (e := torch.empty_like(t)).stride() else e.copy_(r) for r, t in pairs)
        return kept[0] if isinstance(results, Tensor) else kept

    return run


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*(t if isinstance(t, Tensor) else None for t in inputs))
    ctx.constants = [None if isinstance(t, Tensor) else t for t in inputs]


def _backward(function: Callable) -> Callable:
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            leaves = [t if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
            inputs = [c if t is None else t for t, c in zip(leaves, ctx.constants, strict=True)]
            results = function(*inputs)
            results = (results,) if isinstance(results, Tensor) else results
            found = torch.autograd.grad(results, [leaves[i] for i in wanted], grads, materialize_grads=True)
        found = dict(zip(wanted, found, strict=True))
        return tuple(found.get(i) for i in range(len(tensors)))

    return backward
