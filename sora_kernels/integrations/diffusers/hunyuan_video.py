"""diffusers' HunyuanVideo, its Framepack and HunyuanVideo-1.5 through our operations.

Theirs normalise, modulate and gate in the dtype of the tokens. Video comes first in the joint sequence, text after it,
and the models' forwards see to it that what a mask hides of the text is the end: its length says the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
)
from diffusers.models.transformers import transformer_hunyuan_video as host
from diffusers.models.transformers import transformer_hunyuan_video15 as host15
from torch import Tensor, nn

from ... import layers
from ...modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from ..patch import How, Plan, Swap, bind, why_not_rebind
from .common import (
    Processor,
    affine,
    attention_steps,
    draw,
    euler,
    in_16_bits,
    learned,
    norm_continuous,
    why_not_norms,
    why_not_processor,
    why_not_read,
)

_REFINER = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")
_DUAL = ("gate_residual", "gate_residual_norm_modulate")


def plan(model: nn.Module, how: How) -> tuple[list[Plan], tuple[str, ...]]:
    kept = "projections, proj_out and its unpatchify, feed-forward and embeddings: PyTorch's own"
    text = "the attention of the token refiner, to text alone, masked from both sides: PyTorch's own"
    return list(_steps(model, how)), (kept, text)


def example(model: nn.Module, grid: tuple[int, int, int] = (3, 4, 6)) -> tuple[Any, ...]:
    generator, config, like = torch.Generator().manual_seed(0), model.config, model.proj_out
    patch = config.patch_size_t, config.patch_size, config.patch_size
    frames, *area = (n * p for n, p in zip(grid, patch, strict=True))

    def random(*sizes: int) -> Tensor:
        return draw(like, 1, *sizes, generator=generator)

    latents = random(config.in_channels, frames, *area)
    device = latents.device
    times, text = torch.tensor([500.0], device=device).to(latents), random(16, config.text_embed_dim)
    mask = torch.arange(16, device=device).unsqueeze(0) < 11
    if hasattr(model, "context_embedder_2"):  # HunyuanVideo-1.5
        more = random(8, config.text_embed_2_dim), torch.arange(8, device=device).unsqueeze(0) < 5
        return latents, times, text, mask, None, *more, random(9, config.image_embed_dim)
    pooled = random(config.pooled_projection_dim)
    guidance = torch.tensor([6000.0], device=device).to(latents) if config.guidance_embeds else None
    if not hasattr(model, "clean_x_embedder"):
        return latents, times, text, mask.long(), pooled, guidance
    past = []  # clips at full, half and a quarter of the resolution, each with the places of its frames
    for n in (2, 2, 4):
        past += random(config.in_channels, n, *area), torch.arange(n, device=device)
    image = random(9, config.image_proj_dim), torch.arange(frames, device=device)
    return latents, times, text, mask.long(), pooled, *image, guidance, *past


def sample(model: nn.Module, steps: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return euler(model, steps, inputs, kwargs, channels=model.config.out_channels)


def _steps(model: nn.Module, how: How) -> Iterator[Plan]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv3d):
            reason = why_not_rebind(module, nn.Conv3d) or layers.why_not_embed(module)
            yield how.step(name, ("patch_embed3d",), reason, bind(module, _embed, how.impl))
        elif isinstance(module, Attention) and ".refiner_blocks." not in name:
            processor, standard = HunyuanVideoProcessor, host.HunyuanVideoAttnProcessor2_0
            if isinstance(module.processor, host15.HunyuanVideo15AttnProcessor2_0):
                processor, standard = HunyuanVideo15Processor, host15.HunyuanVideo15AttnProcessor2_0
            reason = why_not_processor(module, Attention, standard) or _why_not_attention(module)
            yield from attention_steps(name, reason, how, Swap(module, processor(how, module.processor), True))
        for cls, forward in _NORMS.items():
            if isinstance(module, cls):
                reason = why_not_rebind(module, cls) or _why_not_norm(module)
                yield how.step(name, ("norm_modulate",), reason, bind(module, forward, how))
        for cls, (ops, forward, norms) in _BLOCKS.items():
            if isinstance(module, cls):
                reason = why_not_rebind(module, cls) or _why_not_layer_norms(module, norms)
                yield how.step(name, ops, reason, bind(module, forward, how))


def _why_not_layer_norms(owner: nn.Module, names: tuple[str, ...]) -> str | None:
    return why_not_read(owner, **dict.fromkeys(names, (nn.LayerNorm,)))


def _why_not_norm(norm: nn.Module) -> str | None:
    return _why_not_layer_norms(norm, ("norm",))


def _why_not_attention(attn: nn.Module) -> str | None:
    names = ("norm_q", "norm_k") if attn.add_q_proj is None else ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    if any(getattr(attn, name) is None for name in names):
        return "queries and keys are not normalised"
    return why_not_norms(attn, names)


def _embed(embedding: nn.Module, impl: str, x: Tensor) -> Tensor:
    return layers.embed(embedding, x, impl)


# Norms that make the rows of their block as well: shift, scale (here) and gate, and three more of a dual block


def _norm_zero(self: nn.Module, how: How, x: Tensor, *others: Any, emb: Tensor | None = None) -> tuple[Tensor, ...]:
    if others or emb is None or _why_not_norm(self):
        return type(self).forward(self, x, *others, emb=emb)
    shift, scale, *rows = _rows(self, emb)
    return norm_modulate(x, shift, scale, **affine(self.norm), **in_16_bits(how)), *rows


def _norm_replace(
    self: nn.Module,
    how: How,
    hidden_states: Tensor,
    emb: Tensor,
    token_replace_emb: Tensor,
    first_frame_num_tokens: int,
) -> tuple[Tensor, ...]:
    x, frame = hidden_states, first_frame_num_tokens
    if _why_not_norm(self):
        return type(self).forward(self, x, emb, token_replace_emb, frame)
    rows, of_frame = _rows(self, emb), _rows(self, token_replace_emb)
    shift, scale = _both(rows[:2], of_frame[:2])
    x = norm_modulate(x, shift, scale, index=_index(x, frame), **affine(self.norm), **in_16_bits(how))
    return x, *rows[2:], *of_frame[2:]


def _rows(norm: nn.Module, emb: Tensor) -> tuple[Tensor, ...]:
    rows = norm.linear(norm.silu(emb))                                                       # [B, n * D]
    return rows.chunk(rows.shape[1] // emb.shape[1], 1)


def _both(rows: list[Tensor], of_frame: list[Tensor]) -> list[Tensor]:
    return [torch.stack(pair, 1) for pair in zip(rows, of_frame, strict=True)]               # [B, 2, D]


def _index(x: Tensor, frame: int) -> Tensor:
    """Which of two rows is a token's: the tokens of the first frame have the second."""
    return (torch.arange(x.shape[1], device=x.device) < frame).int().expand(x.shape[:2])     # [B, S]


# Blocks


def _refine(
    self: nn.Module, how: How, hidden_states: Tensor, temb: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    x = hidden_states
    if _why_not_layer_norms(self, ("norm1", "norm2")):
        return type(self).forward(self, x, temb, attention_mask)
    exact = in_16_bits(how)
    h = norm_modulate(x, None, None, **affine(self.norm1), **exact)
    y = self.attn(hidden_states=h, encoder_hidden_states=None, attention_mask=attention_mask).type_as(x)
    gate1, gate2 = self.norm_out(temb)                                                       # [B, 1, D]
    x, h = gate_residual_norm_modulate(x, y, gate1, None, None, **affine(self.norm2), **exact)
    return gate_residual(x, self.ff(h).type_as(x), gate2, **exact)


def _dual(
    self: nn.Module,
    how: How,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: tuple[Tensor, Tensor] | None = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    x, text, mask = hidden_states, encoder_hidden_states, attention_mask
    if _why_not_layer_norms(self, ("norm2", "norm2_context")):
        return type(self).forward(self, x, text, temb, mask, freqs_cis, token_replace_emb, num_tokens)
    exact = of_video = in_16_bits(how)
    if isinstance(self.norm1, host.HunyuanVideoTokenReplaceAdaLayerNormZero):
        h, *rows = self.norm1(x, temb, token_replace_emb, num_tokens)
        rows, of_video = _both(rows[:4], rows[4:]), {"index": _index(x, num_tokens), **exact}
    else:
        h, *rows = self.norm1(x, emb=temb)
    gate1, shift, scale, gate2 = rows
    t, text_gate1, text_shift, text_scale, text_gate2 = self.norm1_context(text, emb=temb)
    y, z = self.attn(hidden_states=h, encoder_hidden_states=t, attention_mask=mask, image_rotary_emb=freqs_cis)

    norm = affine(self.norm2)
    x, h = gate_residual_norm_modulate(x, y.type_as(x), gate1, shift, scale, **norm, **of_video)
    norm = affine(self.norm2_context)
    text, t = gate_residual_norm_modulate(text, z.type_as(text), text_gate1, text_shift, text_scale, **norm, **exact)
    x = gate_residual(x, self.ff(h).type_as(x), gate2, **of_video)
    return x, gate_residual(text, self.ff_context(t).type_as(text), text_gate2, **exact)


def _single(
    self: nn.Module,
    how: How,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    token_replace_emb: Tensor | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    sizes = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
    x = torch.cat([hidden_states, encoder_hidden_states], 1)                                 # [B, S + L, D]
    exact = in_16_bits(how)
    if isinstance(self.norm, host.HunyuanVideoTokenReplaceAdaLayerNormZeroSingle):
        h, gate, of_frame = self.norm(x, temb, token_replace_emb, num_tokens)
        (gate,), exact = _both([gate], [of_frame]), {"index": _index(x, num_tokens), **exact}
    else:
        h, gate = self.norm(x, emb=temb)
    ff = self.act_mlp(self.proj_mlp(h))
    h, t = h.split(sizes, 1)
    given = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
    y = torch.cat(self.attn(hidden_states=h, encoder_hidden_states=t, **given), 1)
    x = gate_residual(x, self.proj_out(torch.cat([y, ff], 2)).type_as(x), gate, **exact)
    return x.split(sizes, 1)


_NORMS = {
    AdaLayerNormZero: _norm_zero,
    AdaLayerNormZeroSingle: _norm_zero,
    AdaLayerNormContinuous: norm_continuous,
    host.HunyuanVideoTokenReplaceAdaLayerNormZero: _norm_replace,
    host.HunyuanVideoTokenReplaceAdaLayerNormZeroSingle: _norm_replace,
}
_BLOCKS = {  # class -> what a step runs, how, and which norms it reads
    host.HunyuanVideoIndividualTokenRefinerBlock: (_REFINER, _refine, ("norm1", "norm2")),
    host15.HunyuanVideo15IndividualTokenRefinerBlock: (_REFINER, _refine, ("norm1", "norm2")),
    host.HunyuanVideoTransformerBlock: (_DUAL, _dual, ("norm2", "norm2_context")),
    host.HunyuanVideoTokenReplaceTransformerBlock: (_DUAL, _dual, ("norm2", "norm2_context")),
    host15.HunyuanVideo15TransformerBlock: (_DUAL, _dual, ("norm2", "norm2_context")),
    host.HunyuanVideoSingleTransformerBlock: (("gate_residual",), _single, ()),
    host.HunyuanVideoTokenReplaceSingleTransformerBlock: (("gate_residual",), _single, ()),
}


# Attention


class HunyuanVideoProcessor(Processor):
    """Attention processor of an Attention of video and text, with projections for each (dual) or for both (single)."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        x, text, mask = hidden_states, encoder_hidden_states, attention_mask
        if text is None or _why_not_attention(attn) or learned(image_rotary_emb):
            return self.replaced(attn, x, text, mask, image_rotary_emb)
        sizes = [x.shape[1], text.shape[1]]
        rotary = {}
        if image_rotary_emb is not None:  # [S, E], each angle twice
            rotary["freqs"] = tuple(t[:, ::2] for t in image_rotary_emb)
        if attn.add_q_proj is None:
            if rotary:
                rotary["text_len"] = sizes[1]
            tokens = torch.cat([x, text], 1)
            q, k, v = (to(tokens).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
            q, k = self.normed(attn.norm_q, attn.norm_k, q, k, **rotary)                     # [B, S + L, H, E]
        else:
            video = (to(x).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
            added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            added = (to(text).unflatten(2, (attn.heads, -1)) for to in added)
            q, k, v = self.joined(attn, *video, *added, **rotary)
        mask, rules = self.rules(mask, sizes)
        out = self.attend(q, k, v, mask, **rules).flatten(2).type_as(q)
        x, text = out.split(sizes, 1)
        if attn.to_out is not None:
            x = attn.to_out[1](attn.to_out[0](x))
        if attn.to_add_out is not None:
            text = attn.to_add_out(text)
        return x, text

    def rules(self, mask: Tensor | None, sizes: list[int]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """A mask for diffusers' dispatch, and what it says in the terms of our operation: [B, 1, 1, S + L], true where
        there is a token, hides the last ones."""
        if mask is None or mask.shape[1:3] != (1, 1):
            return mask, {}
        return mask, {"kv_lens": mask.flatten(1).sum(1, dtype=torch.int32)}


class HunyuanVideo15Processor(HunyuanVideoProcessor):
    """The same of HunyuanVideo-1.5, whose mask [B, L] is of the text alone and hides queries as well as keys. No token
    that counts sees one of those."""

    def rules(self, mask: Tensor, sizes: list[int]) -> tuple[Tensor | None, dict[str, Tensor]]:
        if self.ours():
            return None, {"kv_lens": sizes[0] + mask.sum(1, dtype=torch.int32)}
        mask = F.pad(mask, (sum(sizes) - mask.shape[1], 0), value=True).bool()
        return mask[:, None, :, None] & mask[:, None, None, :], {}                           # [B, 1, S + L, S + L]
