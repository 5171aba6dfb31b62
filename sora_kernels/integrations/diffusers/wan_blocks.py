"""The blocks and attentions of diffusers' Wan and its kin through our operations.

Theirs upcast to fp32 around every norm, modulation and gate and round once after it; so do our operations inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from ...modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from ...qknorm_rope import qk_norm_rope
from ..patch import is_hooked
from .common import Processor, affine, of_clips, why_not_read, why_not_rms_norms

_NORM = (FP32LayerNorm,)


def why_not_block(block: nn.Module) -> str | None:
    return why_not_read(block, norm1=_NORM, norm2=(FP32LayerNorm, nn.Identity), norm3=_NORM)


# Blocks: the three models with blocks of their own differ in what they take, and where the six rows lie


def wan_block(
    self: nn.Module,
    impl: str,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
) -> Tensor:
    if why_not_block(self):
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb)
    rows = temb.unbind(-2)                                                                   # 6 x [B, D] or [B, S, D]
    return _chain(self, impl, hidden_states, encoder_hidden_states, rows, rotary_emb)


def skyreels_block(
    self: nn.Module,
    impl: str,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    attention_mask: Any,
) -> Tensor:
    if why_not_block(self):
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb, attention_mask)
    rows = temb.unbind(1)                                                                    # 6 x [B, D] or [B, S, D]
    return _chain(self, impl, hidden_states, encoder_hidden_states, rows, rotary_emb, attention_mask)


def vace_block(
    self: nn.Module,
    impl: str,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    control_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
) -> tuple[Tensor | None, Tensor]:
    x = control_hidden_states
    if why_not_block(self):
        return type(self).forward(self, hidden_states, encoder_hidden_states, x, temb, rotary_emb)
    if self.proj_in is not None:
        x = self.proj_in(x) + hidden_states
    x = _chain(self, impl, x, encoder_hidden_states, temb.unbind(1), rotary_emb)
    return None if self.proj_out is None else self.proj_out(x), x


def _chain(
    block: nn.Module,
    impl: str,
    x: Tensor,
    text: Tensor,
    rows: tuple[Tensor, ...],
    rotary_emb: Any,
    mask: Any = None,
) -> Tensor:
    tables = block.scale_shift_table[0].unbind(0)                                            # 6 x [D]
    shift1, scale1, gate1, shift2, scale2, gate2 = rows

    modulation = {"shift_table": tables[0], "scale_table": tables[1]}
    h = norm_modulate(x, shift1, scale1, **affine(block.norm1), **modulation, impl=impl)
    y = block.attn1(h, None, mask, rotary_emb).type_as(x)  # autocast gives another dtype
    if isinstance(block.norm2, nn.Identity):
        x = h = gate_residual(x, y, gate1, gate_table=tables[2], impl=impl)
    else:
        modulation = {"gate_table": tables[2]}
        x, h = gate_residual_norm_modulate(x, y, gate1, None, None, **affine(block.norm2), **modulation, impl=impl)
    y = block.attn2(h, text, None, None).type_as(x)
    modulation = {"shift_table": tables[3], "scale_table": tables[4]}
    x, h = gate_residual_norm_modulate(x, y, None, shift2, scale2, **affine(block.norm3), **modulation, impl=impl)
    return gate_residual(x, block.ffn(h).type_as(x), gate2, gate_table=tables[5], impl=impl)


# Attentions


class Causal(NamedTuple):
    """In the place of a block-causal mask [1, 1, S, S]: what `spacetime_attention` is told instead."""

    grid: tuple[int, int, int]
    causal: int


class WanProcessor(Processor):
    """Attention processor of a WanAttention: projections, then QK-norm with rotary embedding, then attention; to an
    image as well, in a second one, whose result is added."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | Causal | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if why_not_rms_norms(attn):
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        context, image = encoder_hidden_states, None
        if attn.add_k_proj is not None:  # 512 tokens of text, as diffusers has it
            image, context = context.split([context.shape[1] - 512, 512], 1)
        projected = _project(attn, hidden_states, context)
        q, k, v = (of_clips(t, hidden_states).unflatten(2, (attn.heads, -1)) for t in projected)
        norms = {"q_weight": attn.norm_q.weight, "k_weight": attn.norm_k.weight, "across": "width"}
        if rotary_emb is not None:  # [1, S, 1, E], each angle twice
            cos, sin = (t[0, :, 0, ::2] for t in rotary_emb)
            norms["freqs"] = cos, sin
        norms["rounding"] = self.how.rounding_now()
        q, k = qk_norm_rope(q, k, **norms, eps=attn.norm_q.eps, impl=self.how.impl)          # [B, S, H, E]
        mask, rules = attention_mask, {}
        if isinstance(mask, Causal):
            mask, rules = None, mask._asdict()
        out = self.attend(q, k, v, mask, crossing=context is not None, **rules).type_as(q)
        if image is not None:
            k, v = (of_clips(t, q).unflatten(2, (attn.heads, -1)) for t in _project_image(attn, image))
            out = out + self.attend(q, k, v, crossing=True).type_as(q)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class SkyReelsV2Processor(WanProcessor):
    """The same for a SkyReelsV2Attention."""

    crossing_is_parallel = True


def takes_causal(block: nn.Module) -> bool:
    """Nobody sees what stands in the place of the mask between here and our processor, which understands it."""
    attn = block.attn1
    processor = attn.processor
    ours = isinstance(processor, WanProcessor) and processor.ours() and not why_not_rms_norms(attn)
    return ours and not is_hooked(block) and not is_hooked(attn)


class FaceProcessor(Processor):
    """Attention processor of a WanAnimateFaceBlockCrossAttention: the tokens of a frame attend to its few of a face."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if why_not_rms_norms(attn):
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask)
        B, T = encoder_hidden_states.shape[:2]                                               # [B, T, N, D]
        context = attn.pre_norm_kv(encoder_hidden_states).flatten(1, 2)
        projected = _project(attn, attn.pre_norm_q(hidden_states), context)
        q, k, v = (t.unflatten(2, (attn.heads, -1)) for t in projected)
        norms = {"q_weight": attn.norm_q.weight, "k_weight": attn.norm_k.weight, "eps": attn.norm_q.eps}
        q, k = qk_norm_rope(q, k, **norms, impl=self.how.impl)
        q, k, v = (t.unflatten(1, (T, -1)).flatten(0, 1) for t in (q, k, v))                 # [B*T, S/T or N, H, E]
        out = self.attend(q, k, v).type_as(q).flatten(2).unflatten(0, (B, T)).flatten(1, 2)
        out = attn.to_out(out)
        return out if attention_mask is None else out * attention_mask.flatten(1)


def _project(attn: nn.Module, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    fused = getattr(attn, "fused_projections", False)
    if fused and hasattr(attn, "to_qkv"):
        return attn.to_qkv(x).chunk(3, -1)
    context = x if context is None else context
    if fused:
        return attn.to_q(x), *attn.to_kv(context).chunk(2, -1)
    return attn.to_q(x), attn.to_k(context), attn.to_v(context)


def _project_image(attn: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    if getattr(attn, "fused_projections", False):
        k, v = attn.to_added_kv(image).chunk(2, -1)
    else:
        k, v = attn.add_k_proj(image), attn.add_v_proj(image)
    return attn.norm_added_k(k), v
