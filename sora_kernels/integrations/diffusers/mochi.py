"""diffusers' MochiTransformer3DModel through our operations: which step of theirs is which operation of ours.

Theirs normalises and gates in fp32. Its attention takes one clip at a time, to leave out the padding of each text; ours
takes all, the padding last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous, MochiRMSNorm, RMSNorm
from diffusers.models.transformers import transformer_mochi as host
from torch import Tensor, nn

from ... import layers
from ...modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from ..patch import How, Plan, Swap, bind, why_not_rebind
from .common import (
    PlainProcessor,
    draw,
    embed_frames,
    euler,
    first,
    learned,
    norm_continuous,
    padding_last,
    why_not_continuous,
    why_not_processor,
    why_not_read,
)

_BLOCK = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def plan(model: nn.Module, how: How) -> tuple[list[Plan], tuple[str, ...]]:
    kept = "projections, proj_out and its unpatchify, feed-forward and embeddings: PyTorch's own"
    return list(_steps(model, how)), (kept,)


def example(model: nn.Module, grid: tuple[int, int, int] = (3, 4, 6)) -> tuple[Any, ...]:
    generator, config, like = torch.Generator().manual_seed(0), model.config, model.proj_out
    frames, height, width = grid
    sizes = frames, height * config.patch_size, width * config.patch_size
    latents = draw(like, 1, config.in_channels, *sizes, generator=generator)
    text = draw(like, 1, 16, config.text_embed_dim, generator=generator)
    mask = (torch.arange(16, device=latents.device) < 11)[None]
    return latents, text, torch.tensor([500.0], device=latents.device), mask


def sample(model: nn.Module, steps: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    channels = model.config.out_channels or model.config.in_channels
    return euler(model, steps, inputs, kwargs, channels=channels, time=lambda t: 1000 * (1 - t))


def _steps(model: nn.Module, how: How) -> Iterator[Plan]:
    conv = model.patch_embed.proj
    reason = why_not_rebind(conv, nn.Conv2d) or layers.why_not_embed(conv)
    yield how.step("patch_embed", ("patch_embed3d",), reason, bind(conv, embed_frames, how.impl))

    for name, module in model.named_modules():
        if isinstance(module, host.MochiTransformerBlock):
            reason = why_not_rebind(module, host.MochiTransformerBlock) or _why_not_block(module)
            yield how.step(name, _BLOCK, reason, bind(module, _block_forward, how.impl))
        elif isinstance(module, MochiAttention):
            reason = why_not_processor(module, MochiAttention, MochiAttnProcessor2_0) or _why_not_attention(module)
            swap = Swap(module, MochiProcessor(how, module.processor), processor=True)
            yield how.step(name, ("qk_norm_rope", "spacetime_attention"), reason, swap)

    norm = model.norm_out
    reason = why_not_rebind(norm, AdaLayerNormContinuous) or why_not_continuous(norm)
    yield how.step("norm_out", ("norm_modulate",), reason, bind(norm, norm_continuous, how))


def _why_not_block(block: nn.Module) -> str | None:
    """None where all of its norms are known, without hooks, and of one eps."""
    names = ["norm1", "norm2", "norm3", "norm4", "norm1_context"]
    if not block.context_pre_only:
        names += ["norm2_context", "norm3_context", "norm4_context"]
    kinds = dict.fromkeys(names, (host.MochiModulatedRMSNorm,))
    kinds |= {"norm1": (host.MochiRMSNormZero,)}
    kinds["norm1_context"] = (host.MochiLayerNormContinuous if block.context_pre_only else host.MochiRMSNormZero,)
    if reason := why_not_read(block, **kinds):
        return reason
    norms = [getattr(block, name) for name in names]
    if block.context_pre_only:
        norms.append(block.norm1_context.norm)
    for norm in norms:
        if not isinstance(norm, host.MochiLayerNormContinuous) and (reason := why_not_read(norm, norm=(RMSNorm,))):
            return reason
    return None if len({_eps(norm) for norm in norms}) == 1 else "its norms differ in eps"


def _eps(norm: nn.Module) -> float:
    return norm.norm.norm.eps if isinstance(norm, host.MochiLayerNormContinuous) else norm.norm.eps


def _why_not_attention(attn: nn.Module) -> str | None:
    if reason := why_not_read(attn, **dict.fromkeys(_NORMS, (MochiRMSNorm,))):
        return reason
    return None if len({getattr(attn, name).eps for name in _NORMS}) == 1 else "its norms differ in eps"


def _block_forward(
    self: nn.Module,
    impl: str,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    encoder_attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    x, text, mask = hidden_states, encoder_hidden_states, encoder_attention_mask             # [B, S, D], [B, L, C]
    if _why_not_block(self):
        return type(self).forward(self, x, text, temb, mask, image_rotary_emb)
    rms = {"norm": "rms", "eps": _eps(self.norm1), "impl": impl}
    gated = {"y_norm": "rms", "eps": _eps(self.norm1), "impl": impl}

    scale1, gate1, scale2, gate2 = _rows(self.norm1, temb)
    h = norm_modulate(x, None, scale1, **rms)
    if self.context_pre_only:
        norm = self.norm1_context
        t = norm_modulate(text, None, norm.linear_1(norm.silu(temb).to(text.dtype)), **rms)
    else:
        text_scale1, text_gate1, text_scale2, text_gate2 = _rows(self.norm1_context, temb)
        t = norm_modulate(text, None, text_scale1, **rms)

    y, z = self.attn1(hidden_states=h, encoder_hidden_states=t, image_rotary_emb=image_rotary_emb, attention_mask=mask)
    x, h = gate_residual_norm_modulate(x, y.type_as(x), gate1.tanh(), None, scale2, y_norm="rms", **rms)
    x = gate_residual(x, self.ff(h).type_as(x), gate2.tanh(), **gated)
    if not self.context_pre_only:
        z = z.type_as(text)
        text, t = gate_residual_norm_modulate(text, z, text_gate1.tanh(), None, text_scale2, y_norm="rms", **rms)
        text = gate_residual(text, self.ff_context(t).type_as(text), text_gate2.tanh(), **gated)
    return x, text


def _rows(norm: nn.Module, temb: Tensor) -> tuple[Tensor, ...]:
    """Scale and gate of attention, and of the feed-forward: 4 x [B, D]."""
    return norm.linear(norm.silu(temb)).chunk(4, 1)


class MochiProcessor(PlainProcessor):
    """Attention processor of a MochiAttention: a video's tokens and those of its text that are no padding."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, text = hidden_states, encoder_hidden_states
        if _why_not_attention(attn) or not self.ours():
            inputs = {"encoder_hidden_states": text, "attention_mask": attention_mask}
            return self.replaced(attn, x, **inputs, image_rotary_emb=image_rotary_emb)
        tokens = x.shape[1]
        text, lens = padding_last(attention_mask, text)

        video = (to(x).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        added = (to(text).unflatten(2, (attn.heads, -1)) for to in added)
        trained = learned(image_rotary_emb)                                                  # 2 x [S, H, E / 2]
        rotary = {} if image_rotary_emb is None or trained else {"freqs": image_rotary_emb}
        q, k, v = self.joined(attn, *video, *added, **rotary)                                # [B, S + L, H, E]
        if trained:  # our tables are constants
            turned = (_rotate(t[:, :tokens], *image_rotary_emb) for t in (q, k))
            q, k = (torch.cat([t, old[:, tokens:]], 1) for t, old in zip(turned, (q, k), strict=True))
        out = self.attend(q, k, v, kv_lens=tokens + lens).flatten(2).type_as(q)
        x, text = out.split([tokens, out.shape[1] - tokens], 1)
        x = attn.to_out[1](attn.to_out[0](x))
        text = text.masked_fill(~first(lens, text.shape[1]).unsqueeze(-1), 0)
        return x, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)
