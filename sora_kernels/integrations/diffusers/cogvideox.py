"""diffusers' CogVideoXTransformer3DModel (1.0 and 1.5) through our operations: which step of theirs is which of ours.

Theirs modulates and gates in the dtype of the tokens. One norm with weight and bias serves video and text; the text
comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
)
from diffusers.models.embeddings import CogVideoXPatchEmbed
from diffusers.models.normalization import AdaLayerNorm, CogVideoXLayerNormZero
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import Tensor, nn

from ... import layers
from ...modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from ...patchify import patch_embed3d
from ...qknorm_rope import qk_norm_rope
from ..patch import How, Plan, Swap, bind, why_not_rebind
from .common import (
    PlainProcessor,
    affine,
    attention_steps,
    draw,
    embed_frames,
    euler,
    in_16_bits,
    learned,
    of_velocity,
    why_not_processor,
    why_not_projection,
    why_not_read,
)

CONSTANTS = ("image_rotary_emb",)  # of the model's inputs: it writes over what a gradient of this would need
_BLOCK = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")


def plan(model: nn.Module, how: How) -> tuple[list[Plan], tuple[str, ...]]:
    kept = "projections, feed-forward and embeddings: matrix products, PyTorch's own"
    single = "norm_final: one LayerNorm without a modulation, PyTorch's own"
    layout = "proj_out and its unpatchify: its features are ordered (channel, pt, ph, pw)"
    return list(_steps(model, how)), (kept, single, layout)


def example(model: nn.Module, grid: tuple[int, int, int] = (3, 4, 6)) -> tuple[Any, ...]:
    generator, config, like = torch.Generator().manual_seed(0), model.config, model.proj_out
    frames, height, width = grid
    if config.use_learned_positional_embeddings:  # of that size only
        height, width = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    sizes = height * config.patch_size, width * config.patch_size
    latents = draw(like, 1, frames * (config.patch_size_t or 1), config.in_channels, *sizes, generator=generator)
    text = draw(like, 1, config.max_text_seq_length, config.text_embed_dim, generator=generator)
    times = torch.tensor([500], device=latents.device)
    ofs = torch.tensor([2.0], device=latents.device) if config.ofs_embed_dim else None
    rotary_emb = None
    if config.use_rotary_positional_embeddings:
        angles = torch.rand(frames * height * width, config.attention_head_dim // 2, generator=generator) * 6
        angles = angles.to(latents.device).repeat_interleave(2, 1)
        rotary_emb = angles.cos(), angles.sin()
    return latents, text, times, None, ofs, rotary_emb


def sample(model: nn.Module, steps: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return euler(model, steps, inputs, kwargs, channels=model.config.out_channels, axis=2, to=of_velocity)


def _steps(model: nn.Module, how: How) -> Iterator[Plan]:
    embed = model.patch_embed
    if isinstance(embed.proj, nn.Conv2d):
        reason = why_not_rebind(embed.proj, nn.Conv2d) or layers.why_not_embed(embed.proj)
        yield how.step("patch_embed", ("patch_embed3d",), reason, bind(embed.proj, embed_frames, how.impl))
    else:
        reason = why_not_rebind(embed, CogVideoXPatchEmbed) or _why_not_embed(embed)
        yield how.step("patch_embed", ("patch_embed3d",), reason, bind(embed, _embed, how.impl))

    for name, module in model.named_modules():
        if isinstance(module, CogVideoXBlock):
            reason = why_not_rebind(module, CogVideoXBlock) or _why_not_block(module)
            yield how.step(name, _BLOCK, reason, bind(module, _block_forward, how))
        elif isinstance(module, Attention):
            fused = isinstance(module.processor, FusedCogVideoXAttnProcessor2_0)
            standard = FusedCogVideoXAttnProcessor2_0 if fused else CogVideoXAttnProcessor2_0
            reason = why_not_processor(module, Attention, standard) or _why_not_attention(module)
            yield from attention_steps(name, reason, how, Swap(module, CogVideoXProcessor(how, module.processor), True))

    norm = model.norm_out
    reason = why_not_rebind(norm, AdaLayerNorm) or _why_not_norm(norm)
    yield how.step("norm_out", ("norm_modulate",), reason, bind(norm, _norm_out, how))


def _why_not_embed(embed: nn.Module) -> str | None:
    if embed.use_positional_embeddings or embed.use_learned_positional_embeddings:
        return "it adds places to text and video together"
    return why_not_projection(embed, "proj")


def _why_not_norm(norm: nn.Module) -> str | None:
    return why_not_read(norm, norm=(nn.LayerNorm,))


def _why_not_block(block: nn.Module) -> str | None:
    if reason := why_not_read(block, norm1=(CogVideoXLayerNormZero,), norm2=(CogVideoXLayerNormZero,)):
        return reason
    return _why_not_norm(block.norm1) or _why_not_norm(block.norm2)


def _why_not_attention(attn: nn.Module) -> str | None:
    if reason := why_not_read(attn, norm_q=(nn.LayerNorm,), norm_k=(nn.LayerNorm,)):
        return reason
    return None if attn.norm_q.eps == attn.norm_k.eps else "norm_q and norm_k differ in eps"


def _embed(self: nn.Module, impl: str, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
    if _why_not_embed(self):
        return type(self).forward(self, text_embeds, image_embeds)
    x = image_embeds.transpose(1, 2)                                                         # [B, C, T, H, W]
    x = layers.as_autocast(x)
    patch = self.patch_size_t, self.patch_size, self.patch_size
    weight = self.proj.weight.unflatten(1, (x.shape[1], *patch))                             # [D, C, pt, ph, pw]
    tokens = patch_embed3d(x, weight, self.proj.bias, impl=impl)
    return torch.cat([self.text_proj(text_embeds), tokens], 1)                               # [B, L + S, D]


def _norm_out(
    self: nn.Module, how: How, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None
) -> Tensor:
    if _why_not_norm(self) or self.emb is not None or self.chunk_dim != 1:
        return type(self).forward(self, x, timestep, temb)
    shift, scale = self.linear(self.silu(temb)).chunk(2, 1)                                  # [B, D]
    return norm_modulate(x, shift, scale, **affine(self.norm), **in_16_bits(how))


def _block_forward(
    self: nn.Module,
    how: How,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    x, text = hidden_states, encoder_hidden_states                                           # [B, S, D], [B, L, D]
    if _why_not_block(self):
        return type(self).forward(self, x, text, temb, image_rotary_emb, attention_kwargs)
    exact = in_16_bits(how)
    shift1, scale1, gate1, text_shift1, text_scale1, text_gate1 = _rows(self.norm1, temb)
    shift2, scale2, gate2, text_shift2, text_scale2, text_gate2 = _rows(self.norm2, temb)

    norm = affine(self.norm1.norm) | exact
    h, t = norm_modulate(x, shift1, scale1, **norm), norm_modulate(text, text_shift1, text_scale1, **norm)
    given = {"image_rotary_emb": image_rotary_emb, **(attention_kwargs or {})}
    y, z = self.attn1(hidden_states=h, encoder_hidden_states=t, **given)
    norm = affine(self.norm2.norm) | exact
    x, h = gate_residual_norm_modulate(x, y.type_as(x), gate1, shift2, scale2, **norm)
    text, t = gate_residual_norm_modulate(text, z.type_as(text), text_gate1, text_shift2, text_scale2, **norm)
    z, y = self.ff(torch.cat([t, h], 1)).type_as(x).split([t.shape[1], h.shape[1]], 1)
    return gate_residual(x, y, gate2, **exact), gate_residual(text, z, text_gate2, **exact)


def _rows(norm: nn.Module, temb: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate of the video, and of the text: 6 x [B, D]."""
    return norm.linear(norm.silu(temb)).chunk(6, 1)


class CogVideoXProcessor(PlainProcessor):
    """Attention processor of an Attention to text and video."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, text, mask = hidden_states, encoder_hidden_states, attention_mask
        if _why_not_attention(attn) or mask is not None or learned(image_rotary_emb):
            return self.replaced(attn, x, text, mask, image_rotary_emb)
        tokens = torch.cat([text, x], 1)
        if isinstance(self.replaced, FusedCogVideoXAttnProcessor2_0):
            projected = attn.to_qkv(tokens).chunk(3, -1)
        else:
            projected = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        q, k, v = (t.unflatten(2, (attn.heads, -1)) for t in projected)                      # [B, L + S, H, E]
        norms = {"q_weight": attn.norm_q.weight, "k_weight": attn.norm_k.weight, "eps": attn.norm_q.eps}
        norms |= {"q_bias": attn.norm_q.bias, "k_bias": attn.norm_k.bias, "norm": "layer"}
        if image_rotary_emb is not None:  # [S, E], each angle twice
            norms["freqs"] = tuple(t[:, ::2] for t in image_rotary_emb)
            norms |= {"text_len": text.shape[1], "text_at": "start"}
        q, k = qk_norm_rope(q, k, **norms, rounding=self.how.rounding_now(), impl=self.how.impl)
        out = attn.to_out[1](attn.to_out[0](self.attend(q, k, v).flatten(2).type_as(q)))
        text, x = out.split([text.shape[1], x.shape[1]], 1)
        return x, text
