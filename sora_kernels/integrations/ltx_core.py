"""Ops for LTX-2 (`ltx_core`): its transformer blocks built on ours, through its own `TransformerOpsConfig`.

    from sora_kernels.integrations import ltx_core
    block = BasicAVTransformerBlock(video, audio, ops=ltx_core.transformer_ops())
    swap = set_attention_module_op(ltx_core.attention)  # or the attention alone, on a meta model before it is loaded
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..attention import spacetime_attention
from ..modulation import gate_residual_norm_modulate, norm_modulate
from ..qknorm_rope import qk_norm_rope
from . import _host


def transformer_ops(**others: Any) -> Any:
    """`TransformerOpsConfig.from_functions` with our attention, preattention, ada_zero and post_sa.

    others   further functions of `from_functions`, or other ones in the place of these. Those not given are the
             host's: masked attention, whose masks are added to scores, and the gate of each head

    Both rotary forms of the host, tables with a batch axis, and tables of their own for the keys between video and
    sound; forward and deterministic backward. Statistics, products and sums are fp32, rounded once.

    Raises ImportError where ltx-core is missing or older than 1.2 (the release on PyPI is: install the repository's).
    """
    needed = "ltx-core", "1.2", "the ops of LTX-2's blocks", "packages/ltx-core of github.com/Lightricks/LTX-2"
    host = _host.require("ltx_core.model.transformer.transformer", *needed)
    ours = {"attention": attention, "preattention": preattention, "ada_zero": ada_zero, "post_sa": post_sa}
    return host.TransformerOpsConfig.from_functions(**ours | others)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √E) v of tensors [B, S, H·E]: `spacetime_attention`."""
    q, k, v = (t.to(v.dtype).unflatten(-1, (heads, -1)) for t in (q, k, v))
    return spacetime_attention(q, k, v).flatten(2)


def preattention(
    q: Tensor,
    k: Tensor,
    attn_module: nn.Module,
    mask: Tensor | None,
    pe: tuple[Tensor, Tensor] | None,
    k_pe: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """RMS norm of q and k [B, S, H·E] over their whole width, then the rotary embedding: `qk_norm_rope`."""
    interleaved = attn_module.rope_type.value == "interleaved"
    heads = attn_module.heads
    if pe is not None and not interleaved and pe[0].ndim == 3:  # halves of the whole width, not of each head
        heads = 1
    how = {} if pe is None else {"freqs": _tables(pe, heads, interleaved), "interleaved": interleaved}
    if pe is not None and k_pe is not None:
        how["k_freqs"] = _tables(k_pe, heads, interleaved)
    q_norm, k_norm = attn_module.q_norm, attn_module.k_norm
    q, k = (t.unflatten(-1, (heads, -1)) for t in (q, k))
    weights = {"q_weight": q_norm.weight, "k_weight": k_norm.weight}
    return tuple(t.flatten(2) for t in qk_norm_rope(q, k, across="width", **weights, **how, eps=q_norm.eps))


def _tables(pe: tuple[Tensor, Tensor], heads: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(cos, sin) as [B or 1, S, H, pairs] from [B, H, S, pairs], or from [B, S, channels]."""
    if interleaved:  # each angle stands beside itself
        return tuple(t[..., ::2].unflatten(-1, (heads, -1)) for t in pe)
    return tuple(t.transpose(1, 2) if t.ndim == 4 else t.unsqueeze(2) for t in pe)


def ada_zero(x: Tensor, eps: float, scale: Tensor, shift: Tensor) -> Tensor:
    """rms_norm(x) · (1 + scale) + shift: `norm_modulate`."""
    return norm_modulate(x, shift, scale, norm="rms", eps=eps)


def post_sa(x: Tensor, y: Tensor, norm_weights: Tensor | None, eps: float, gate: Tensor) -> tuple[Tensor, Tensor]:
    """(x + gate · y, its rms_norm): `gate_residual_norm_modulate`."""
    return gate_residual_norm_modulate(x, y, gate, None, None, norm="rms", weight=norm_weights, eps=eps)
