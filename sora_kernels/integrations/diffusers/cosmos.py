"""diffusers' CosmosTransformer3DModel (Cosmos 1, Predict2 and 2.5, Transfer 2.5) through our operations.

Theirs normalises, modulates and gates in the dtype of the tokens. Its rotary pairs are split halves of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers import transformer_cosmos as host
from torch import Tensor, nn

from ... import layers
from ...modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from ...patchify import patch_embed3d
from ..patch import How, Plan, Swap, bind, why_not_rebind
from .common import (
    Processor,
    attention_steps,
    draw,
    euler,
    in_16_bits,
    learned,
    of_clips,
    why_not_norms,
    why_not_processor,
    why_not_projection,
    why_not_read,
)

_BLOCK = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")
_ATTENTIONS = (host.CosmosAttention, host.CosmosAttnProcessor2_5), (Attention, host.CosmosAttnProcessor2_0)


def plan(model: nn.Module, how: How) -> tuple[list[Plan], tuple[str, ...]]:
    kept = "projections, proj_out and its unpatchify, feed-forward and embeddings: PyTorch's own"
    return list(_steps(model, how)), (kept,)


def example(model: nn.Module, grid: tuple[int, int, int] = (3, 4, 6)) -> tuple[Any, ...]:
    generator, config, like = torch.Generator().manual_seed(0), model.config, model.proj_out
    sizes = (n * p for n, p in zip(grid, config.patch_size, strict=True))
    latents = draw(like, 1, config.in_channels, *sizes, generator=generator)
    times = torch.tensor([0.5], device=latents.device)
    width = config.crossattn_proj_in_channels if config.use_crossattn_projection else config.text_embed_dim
    text = draw(like, 1, 16, width, generator=generator)
    if config.img_context_dim_in:
        image = draw(like, 1, config.img_context_num_tokens, config.img_context_dim_in, generator=generator)
        text = text, image
    padding = latents.new_zeros(1, 1, *latents.shape[3:]) if config.concat_padding_mask else None
    return latents, times, text, None, None, 24, None, padding


def sample(model: nn.Module, steps: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return euler(model, steps, inputs, kwargs, channels=model.config.out_channels, time=lambda t: t)


def _steps(model: nn.Module, how: How) -> Iterator[Plan]:
    embed = model.patch_embed
    reason = why_not_rebind(embed, host.CosmosPatchEmbed) or why_not_projection(embed, "proj")
    yield how.step("patch_embed", ("patch_embed3d",), reason, bind(embed, _embed, how.impl))

    for name, module in model.named_modules():
        if isinstance(module, host.CosmosTransformerBlock):
            reason = why_not_rebind(module, host.CosmosTransformerBlock) or _why_not_block(module)
            yield how.step(name, _BLOCK, reason, bind(module, _block_forward, how))
        elif isinstance(module, Attention):
            standard = next(pair for pair in _ATTENTIONS if isinstance(module, pair[0]))
            reason = why_not_processor(module, *standard) or _why_not_attention(module)
            yield from attention_steps(name, reason, how, Swap(module, CosmosProcessor(how, module.processor), True))

    norm = model.norm_out
    reason = why_not_rebind(norm, host.CosmosAdaLayerNorm) or _why_not_norm(norm)
    yield how.step("norm_out", ("norm_modulate",), reason, bind(norm, _norm_out, how))


def _why_not_norm(norm: nn.Module) -> str | None:
    return why_not_read(norm, norm=(nn.LayerNorm,))


def _why_not_block(block: nn.Module) -> str | None:
    norms = dict.fromkeys(("norm1", "norm2", "norm3"), (host.CosmosAdaLayerNormZero,))
    if reason := why_not_read(block, **norms):
        return reason
    return next((reason for name in norms if (reason := _why_not_norm(getattr(block, name)))), None)


def _why_not_attention(attn: nn.Module) -> str | None:
    names = ("norm_q", "norm_k")
    if isinstance(attn, host.CosmosAttention):
        names += ("q_img_norm", "k_img_norm")
    return why_not_norms(attn, names)


def _embed(self: nn.Module, impl: str, hidden_states: Tensor) -> Tensor:
    x = hidden_states
    if why_not_projection(self, "proj"):
        return type(self).forward(self, x)
    x = layers.as_autocast(x)
    grid = [n // p for n, p in zip(x.shape[2:], self.patch_size, strict=True)]
    weight = self.proj.weight.unflatten(1, (x.shape[1], *self.patch_size))                   # [D, C, pt, ph, pw]
    return patch_embed3d(x, weight, self.proj.bias, impl=impl).unflatten(1, grid)            # [B, T, H, W, D]


def _norm_out(
    self: nn.Module, how: How, hidden_states: Tensor, embedded_timestep: Tensor, temb: Tensor | None = None
) -> Tensor:
    if _why_not_norm(self):
        return type(self).forward(self, hidden_states, embedded_timestep, temb)
    if temb is not None:
        temb = temb[..., : 2 * self.embedding_dim]
    shift, scale = _rows(self, hidden_states, embedded_timestep, temb, 2)
    return norm_modulate(hidden_states, shift, scale, eps=self.norm.eps, **in_16_bits(how))


def _rows(norm: nn.Module, x: Tensor, time: Tensor, temb: Tensor | None, count: int) -> tuple[Tensor, ...]:
    rows = norm.linear_2(norm.linear_1(norm.activation(time)))                               # [B, n * D], [B, S, n * D]
    rows = rows if temb is None else rows + temb
    return rows.expand(len(x), *rows.shape[1:]).chunk(count, -1)


def _block_forward(
    self: nn.Module,
    how: How,
    hidden_states: Tensor,
    encoder_hidden_states: Any,
    embedded_timestep: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    extra_pos_emb: Tensor | None = None,
    attention_mask: Any = None,
    controlnet_residual: Tensor | None = None,
    latents: Tensor | None = None,
    block_idx: int | None = None,
) -> Any:
    if _why_not_block(self):
        inputs = hidden_states, encoder_hidden_states, embedded_timestep, temb, image_rotary_emb, extra_pos_emb
        inputs += attention_mask, controlnet_residual, latents, block_idx
        return type(self).forward(self, *inputs)
    x = hidden_states if self.before_proj is None else self.before_proj(hidden_states) + latents
    x = x if extra_pos_emb is None else x + extra_pos_emb                                    # [B, S, D]
    norms = self.norm1, self.norm2, self.norm3
    shifts, scales, gates = zip(*(_rows(norm, x, embedded_timestep, temb, 3) for norm in norms), strict=True)
    eps, exact = [norm.norm.eps for norm in norms], in_16_bits(how)

    h = norm_modulate(x, shifts[0], scales[0], eps=eps[0], **exact)
    y = self.attn1(h, image_rotary_emb=image_rotary_emb).type_as(x)
    x, h = gate_residual_norm_modulate(x, y, gates[0], shifts[1], scales[1], eps=eps[1], **exact)
    y = self.attn2(h, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask).type_as(x)
    x, h = gate_residual_norm_modulate(x, y, gates[1], shifts[2], scales[2], eps=eps[2], **exact)
    x = gate_residual(x, self.ff(h).type_as(x), gates[2], **exact)
    if controlnet_residual is not None:
        x = x + controlnet_residual
    return x if self.after_proj is None else (x, self.after_proj(x))


class CosmosProcessor(Processor):
    """Attention processor of an Attention to tokens or a text, or (`CosmosAttention`) to a text and an image."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        x, context, mask = hidden_states, encoder_hidden_states, attention_mask
        if _why_not_attention(attn) or learned(image_rotary_emb):
            return self.replaced(attn, x, context, mask, image_rotary_emb)
        image = None
        if isinstance(context, tuple):
            (context, image), (mask, image_mask) = context, mask or (None, None)
        context = x if context is None else context
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        out = self.attention(attn, (q, k, v), attn.norm_q, attn.norm_k, image_rotary_emb, mask)
        if image is not None:
            q, k, v = attn.q_img(x), attn.k_img(image), attn.v_img(image)
            out = out + self.attention(attn, (q, k, v), attn.q_img_norm, attn.k_img_norm, None, image_mask)
        return attn.to_out[1](attn.to_out[0](out))

    def attention(
        self,
        attn: nn.Module,
        projected: tuple[Tensor, ...],
        norm_q: nn.Module,
        norm_k: nn.Module,
        rotary_emb: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
    ) -> Tensor:
        q, k, v = (of_clips(t, projected[0]).unflatten(2, (attn.heads, -1)) for t in projected)  # [B, S, H, E]
        rotary = {}
        if rotary_emb is not None:  # [S, E], each angle twice
            rotary = {"freqs": tuple(t[:, : t.shape[1] // 2] for t in rotary_emb), "interleaved": False}
        q, k = self.normed(norm_q, norm_k, q, k, **rotary)
        return self.attend(q, k, v, mask).flatten(2).type_as(q)
