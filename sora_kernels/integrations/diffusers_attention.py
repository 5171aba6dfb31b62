"""An attention backend "sora" for diffusers: `spacetime_attention` for every model that dispatches its attention.

    from sora_kernels.integrations import diffusers_attention
    diffusers_attention.register()
    pipe.transformer.set_attention_backend("sora")  # or: with diffusers.attention_backend("sora"), or the environment

`DIFFUSERS_ATTN_BACKEND=sora` works where `register()` runs before the first model of diffusers is imported.
"""

from __future__ import annotations

import importlib
import sys

import torch
from torch import Tensor

from ..attention import attention_backward, attention_forward, spacetime_attention
from . import _host
from ._masks import real_keys_first

NAME = "sora"
_DISPATCH = "diffusers.models.attention_dispatch"
_RING_TRAINS = (0, 41)  # earlier releases compute the gradients of their ring from one block's keys


def register() -> None:
    """Make "sora" an attention backend of diffusers, one that takes part in context parallelism. Twice is once.

    Forward and deterministic backward on CPU and GPU in fp32, bf16 and fp16, under `torch.compile(fullgraph=True)`.
    Context parallelism by ring, Ulysses and both: where ring needs the log-sum-exp, which the host's own backend does
    not give on a CPU or in fp32.

    Served: any scale; fewer key heads than query heads; is_causal with as many keys as queries; boolean masks of keys,
    [B, Sk] or [B, 1, 1, Sk], wherever the padding lies (k and v are copied once, real keys first). Refused by
    ValueError: masks that differ between queries or heads or are added to scores, dropout, masks under context
    parallelism, and ring with gradients below diffusers 0.41, which computes them wrong.

    Raises ImportError where diffusers is missing or older than 0.36.
    """
    constants = _host.require("diffusers.utils.constants", "diffusers", "0.36", "an attention backend")
    from_environment = constants.DIFFUSERS_ATTN_BACKEND == NAME and _DISPATCH not in sys.modules
    if from_environment:  # the host looks it up among its own names while it is imported
        constants.DIFFUSERS_ATTN_BACKEND = "native"
    dispatch = importlib.import_module(_DISPATCH)
    registry = dispatch._AttentionBackendRegistry
    name = _member(dispatch.AttentionBackendName)
    if name not in registry._backends:
        registry.register(name, supports_context_parallel=True)(_attention)
    if from_environment:
        constants.DIFFUSERS_ATTN_BACKEND = NAME
        registry._active_backend = name


def _member(names: type) -> object:
    """`AttentionBackendName.SORA`, made at run time: the enumeration is closed to subclasses, not to its own maps."""
    if NAME in names._value2member_map_:
        return names(NAME)
    member = str.__new__(names, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    member._sort_order_ = len(names._member_names_)
    type.__setattr__(names, member._name_, member)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = names._value2member_map_[NAME] = member
    return member


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: object = None,
) -> Tensor | tuple[Tensor, Tensor]:
    if dropout_p:
        raise ValueError(f"backend 'sora': dropout_p must be 0; got {dropout_p}. Use another backend in training")
    if _parallel_config is not None:
        return _parallel(query, key, value, attn_mask, is_causal, scale, enable_gqa, return_lse, _parallel_config)
    how = {"scale": scale}
    if is_causal:
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                "backend 'sora': is_causal needs as many keys as queries; "
                f"got {key.shape[1]} and {query.shape[1]}. Use the backend 'native' for this model"
            )
        how |= {"grid": (key.shape[1], 1, 1), "causal": "frame"}
    if attn_mask is not None:
        key, value, how["kv_lens"] = real_keys_first(_of_keys(attn_mask, key, is_causal), key, value)
    if not return_lse:
        return spacetime_attention(query, key, value, **how)
    out, lse = spacetime_attention(query, key, value, return_lse=True, **how)
    return out, lse.transpose(1, 2)  # [B, S, H] is the host's layout


def _of_keys(mask: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    """A mask that all queries and heads share, as [B or 1, Sk]."""
    B, Sk = key.shape[:2]
    of_keys = tuple(mask.shape) if mask.ndim == 2 else (mask.shape[0], mask.shape[-1])
    flat = mask.ndim == 2 or (mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1)
    if is_causal or mask.dtype != torch.bool or not flat or of_keys not in ((B, Sk), (1, Sk)):
        raise ValueError(
            f"backend 'sora': attn_mask must be boolean, one for all queries and heads ([{B}, {Sk}] or "
            f"[{B}, 1, 1, {Sk}], is_causal=False); got {mask.dtype} {list(mask.shape)}, is_causal={is_causal}. "
            "Use the backend 'native' for this model"
        )
    return mask.view(of_keys)


# Context parallelism, by the host's own schedules


def _parallel(query, key, value, attn_mask, is_causal, scale, enable_gqa, return_lse, config):
    if attn_mask is not None:
        raise ValueError("backend 'sora': attn_mask must be None under context parallelism; use 'native' with Ulysses")
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if grad and _ring(config) and _host.release("diffusers") < _RING_TRAINS:
        raise ValueError(
            "backend 'sora': ring attention has wrong gradients before diffusers 0.41; "
            f"found {'.'.join(map(str, _host.release('diffusers')))}. Train with ulysses_degree, or upgrade diffusers"
        )
    schedule = sys.modules[_DISPATCH]._templated_context_parallel_attention
    inputs = query, key, value, None, 0.0, is_causal, scale, enable_gqa, return_lse
    return schedule(*inputs, forward_op=_forward_op, backward_op=_backward_op, _parallel_config=config)


def _ring(config) -> bool:
    return config.context_parallel_config.ring_degree > 1


def _forward_op(
    ctx, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
    return_lse=False, _save_ctx=True, _parallel_config=None,
):  # fmt: skip
    out, lse = attention_forward(query, key, value, scale=scale)
    if _save_ctx:  # a ring keeps the merged out and lse itself
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, *(() if _ring(_parallel_config) else (out, lse.transpose(1, 2))))
    return (out, lse.transpose(1, 2)) if return_lse else out


def _backward_op(ctx, grad_out, *_, query=None, key=None, value=None, out=None, lse=None):
    if query is None:
        query, key, value, out, lse = ctx.saved_tensors
    return attention_backward(grad_out, query, key, value, out, lse.transpose(1, 2), scale=ctx.scale)
