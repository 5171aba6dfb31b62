"""Attention "sora" for ComfyUI: `spacetime_attention` by its register of attention functions, or for one model.

    from sora_kernels.integrations import comfyui  # in a custom node
    comfyui.register()  # "sora" is then an attention function that nodes and layers can ask for by name
    model.model_options["transformer_options"]["optimized_attention_override"] = comfyui.override  # or this model only
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from ..attention import spacetime_attention
from ._masks import real_keys_first

NAME = "sora"


def register() -> None:
    """Register "sora" with ComfyUI. The first owner of a name keeps it, so twice is once.

    Served: both layouts of the host ([B, S, H·E], and [B, H, S, E] with skip_reshape), scale, enable_gqa, boolean
    masks of keys ([B, 1, Sk] or [B, 1, 1, Sk]), tensors in single-owner containers; scores and sums are fp32 whatever
    attn_precision says. Any other mask, and what else `spacetime_attention` refuses, goes to the host's own
    `attention_pytorch` (an override: to the function it stands for), with one warning for each reason.

    Raises ImportError outside of ComfyUI, or where it is too old to have the register.
    """
    host = _host()
    if NAME not in getattr(host, "REGISTERED_ATTENTION_FUNCTIONS", {}):
        host.register_attention_function(NAME, host.wrap_attn(attention_sora))


def override(original, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False,
             **kwargs: Any) -> Tensor:  # fmt: skip
    """`optimized_attention_override`: ours where it serves the call, `original` where it does not."""
    q, k, v = (t if isinstance(t, Tensor) else t.take() for t in (q, k, v))
    if reason := _why_not(q, k, mask, heads, skip_reshape):
        _warn_once(reason)
        layout = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        return original(q, k, v, heads, mask=mask, attn_precision=attn_precision, **layout, **kwargs)
    if skip_reshape:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    else:
        q, k, v = (t.unflatten(-1, (-1, q.shape[-1] // heads)) for t in (q, k, v))           # [B, S, H, E]
    how = {"scale": kwargs.get("scale")}
    if mask is not None:
        k, v, how["kv_lens"] = real_keys_first(mask.reshape(mask.shape[0], mask.shape[-1]), k, v)
    out = spacetime_attention(q, k, v, **how)
    return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)


def attention_sora(*args: Any, **kwargs: Any) -> Tensor:
    """An attention function of ComfyUI's signature; the host's own serves what ours does not."""
    return override(_host().attention_pytorch, *args, **kwargs)


def _why_not(q: Tensor, k: Tensor, mask: Tensor | None, heads: int, heads_first: bool) -> str | None:
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or k.dtype != q.dtype:
        return f"q and k of {q.dtype} and {k.dtype}"
    if not heads_first and q.shape[-1] % heads:
        return f"a width of {q.shape[-1]} for {heads} heads"
    if mask is None:
        return None
    B, Sk = k.shape[0], k.shape[-2]
    shapes = [shape for n in {1, B} for shape in ((n, 1, Sk), (n, 1, 1, Sk))]  # two axes are [Sq, Sk] to the host
    if mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        return f"masks of {mask.dtype} {list(mask.shape)}, which differ between queries or are added to scores"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    logging.warning("sora_kernels: attention of %s is left to ComfyUI", reason)


def _host():
    needed = "sora_kernels needs ComfyUI's register of attention functions (comfy.ldm.modules.attention)"
    try:
        host = importlib.import_module("comfy.ldm.modules.attention")
    except ImportError as error:
        remedy = f"{error}: call it in a custom node of ComfyUI, where the package comfy is importable"
        raise ImportError(f"{needed}; {remedy}", name="comfy") from error
    for name in ("register_attention_function", "wrap_attn", "attention_pytorch"):
        if not hasattr(host, name):
            raise ImportError(f"{needed}; this ComfyUI is older than {name}: update it", name="comfy")
    return host
