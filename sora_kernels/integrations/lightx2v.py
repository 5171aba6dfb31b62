"""Attention, norms and rotary embedding "sora" for LightX2V, in its registers of weight classes.

    from sora_kernels.integrations import lightx2v
    lightx2v.register()  # before a model is built; then in the JSON config:
    {"self_attn_1_type": "sora", "rms_norm_type": "sora", "layer_norm_type": "sora", "rope_type": "sora"}
"""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor

from .. import layers
from ..attention import spacetime_attention
from ..qknorm_rope import qk_norm_rope
from . import _host

NAME = "sora"


def register() -> None:
    """Add "sora" to ATTN_WEIGHT_REGISTER, RMS_WEIGHT_REGISTER, LN_WEIGHT_REGISTER and ROPE_REGISTER. Twice is once.

    Each class is a child of the host's own in PyTorch, so that loading, offloading and LoRA stay the host's.
    attention   q, k, v [S, H, E] or [B, S, H, E], causal and softmax_scale served → [B·S, H·E]; `apply_with_lse` for
                the host's ring. Refused by ValueError: attn_mask, drop_rate, and packed sequences of several lengths
    norms       rounded once, where the host rounds after the norm as well
    rope        q and k by complex frequencies or (cos, sin) of each token; other forms go on to the host's class

    Raises ImportError where lightx2v is missing or does not import.
    """
    needed = "lightx2v", "0.1", "its registers of weight classes", "github.com/ModelTC/LightX2V"
    _host.require("lightx2v.common.ops", *needed)  # which fills them
    registers = _host.require("lightx2v.utils.registry_factory", *needed)
    parents = {
        "ATTN_WEIGHT_REGISTER": ("torch_sdpa", _attention),
        "RMS_WEIGHT_REGISTER": ("torch", _rms_norm),
        "LN_WEIGHT_REGISTER": ("torch", _layer_norm),
        "ROPE_REGISTER": ("torch_complex_rope", _rope),
    }
    for register_name, (parent, methods) in parents.items():
        table = getattr(registers, register_name)
        if NAME not in table:
            name = "Sora" + table[parent].__name__
            table(NAME)(types.new_class(name, (table[parent],), exec_body=lambda body, m=methods: body.update(m())))


def _attention() -> dict[str, Any]:
    def apply(self, q, k, v, drop_rate=0, attn_mask=None, causal=False, cu_seqlens_q=None, cu_seqlens_kv=None,
              max_seqlen_q=None, max_seqlen_kv=None, softmax_scale=None, **kwargs) -> Tensor:  # fmt: skip
        if drop_rate or attn_mask is not None:
            raise ValueError("attention 'sora' serves neither drop_rate nor attn_mask; use 'torch_sdpa' for this layer")
        q, k, v = (t.unsqueeze(0) if t.ndim == 3 else t for t in (q, k, v))
        for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
            if offsets is not None and len(offsets) != q.shape[0] + 1:
                raise ValueError(
                    f"attention 'sora' takes one sequence for each of the {q.shape[0]} batches; "
                    f"got {name} of {len(offsets) - 1}: use 'flash_attn3' for packed sequences"
                )
        how = {"grid": (k.shape[1], 1, 1), "causal": "frame"} if causal else {}
        return spacetime_attention(q, k, v, scale=softmax_scale, **how).flatten(2).flatten(0, 1)

    def apply_with_lse(self, q, k, v, softmax_scale=None) -> tuple[Tensor, Tensor]:
        """One block of a ring: [tokens, H·E] and the log-sum-exp [tokens, H]."""
        q, k, v = (t.unsqueeze(0) if t.ndim == 3 else t for t in (q, k, v))
        out, lse = spacetime_attention(q, k, v, scale=softmax_scale, return_lse=True)
        return out.flatten(2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)

    return {"apply": apply, "apply_with_lse": apply_with_lse}


def _rms_norm() -> dict[str, Any]:
    def apply(self, input_tensor: Tensor) -> Tensor:
        host = types.SimpleNamespace(weight=self._get_actual_weight(), eps=self.eps)
        return layers.normalize(host, input_tensor, "rms")

    return {"apply": apply}


def _layer_norm() -> dict[str, Any]:
    def apply(self, input_tensor: Tensor) -> Tensor:
        host = types.SimpleNamespace(weight=self._get_actual_weight(), bias=self._get_actual_bias(), eps=self.eps)
        out = layers.normalize(host, input_tensor, "layer")
        return out.to(self.infer_dtype) if self.sensitive_layer_dtype != self.infer_dtype else out

    return {"apply": apply}


def _rope() -> dict[str, Any]:
    def apply(self, q: Tensor, k: Tensor, freqs: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rotary_dim = kwargs.get("rotary_dim") or q.shape[-1]
        turns = self.prepare_freqs(freqs, rotary_dim=rotary_dim)                             # complex, [S, (1,) pairs]
        S = turns.shape[0]
        if turns.shape[1:-1].numel() != 1 or q.shape[-3] != S or k.shape[:-2] != q.shape[:-2]:
            return type(self).__mro__[1].apply(self, q, k, freqs, **kwargs)
        turns = turns.reshape(S, rotary_dim // 2)
        batched = [t.reshape(-1, S, *t.shape[-2:]) for t in (q, k)]
        how = {"freqs": (turns.real, turns.imag), "rotary_dim": rotary_dim, "interleaved": self.layout == "interleaved"}
        return tuple(o.view(t.shape) for o, t in zip(qk_norm_rope(*batched, norm=None, **how), (q, k), strict=True))

    return {"apply": apply}
