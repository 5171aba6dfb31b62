"""diffusers' LTXVideoTransformer3DModel through our operations: which step of theirs is which operation of ours.

Theirs modulates and gates in the dtype of the tokens. Its rotary pairs run over the whole width, as one head would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_ltx import (
    LTXAttention,
    LTXVideoAttnProcessor,
    LTXVideoTransformerBlock,
)
from torch import Tensor, nn

from ...modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from ..patch import How, Plan, Swap, bind, is_hooked, why_not_rebind
from .common import (
    Processor,
    adaln,
    affine,
    attention_steps,
    draw,
    euler,
    in_16_bits,
    learned,
    lengths,
    why_not_processor,
    why_not_read,
    why_not_rms_norms,
)

_BLOCK = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")
_RMS = (RMSNorm,)


def plan(model: nn.Module, how: How) -> tuple[list[Plan], tuple[str, ...]]:
    kept = "projections, feed-forward and embeddings: matrix products, PyTorch's own"
    return list(_steps(model, how)), (kept,)


def example(model: nn.Module, grid: tuple[int, int, int] = (3, 4, 6)) -> tuple[Any, ...]:
    generator, config = torch.Generator().manual_seed(0), model.config
    latents = draw(model.proj_in, 1, math.prod(grid), config.in_channels, generator=generator)
    text = draw(model.proj_in, 1, 16, config.caption_channels, generator=generator)
    times = torch.tensor([500.0], device=latents.device)
    mask = (torch.arange(16, device=latents.device) < 11)[None]
    return latents, text, times, mask, *grid


def sample(model: nn.Module, steps: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return euler(model, steps, inputs, kwargs, channels=model.config.out_channels, axis=2)


def _steps(model: nn.Module, how: How) -> Iterator[Plan]:
    for name, module in model.named_modules():
        if isinstance(module, LTXVideoTransformerBlock):
            reason = why_not_rebind(module, LTXVideoTransformerBlock) or _why_not_block(module)
            yield how.step(name, _BLOCK, reason, bind(module, _block_forward, how))
        elif isinstance(module, LTXAttention):
            reason = why_not_processor(module, LTXAttention, LTXVideoAttnProcessor) or why_not_rms_norms(module)
            yield from attention_steps(name, reason, how, Swap(module, LTXProcessor(how, module.processor), True))

    reason = why_not_rebind(model, LTXVideoTransformer3DModel) or _why_not_out(model)
    yield how.step("norm_out", ("norm_modulate",), reason, bind(model, _model_forward, how))


def _why_not_block(block: nn.Module) -> str | None:
    return why_not_read(block, norm1=_RMS, norm2=_RMS)


def _why_not_out(model: nn.Module) -> str | None:
    return why_not_read(model, norm_out=(nn.LayerNorm,))


def _block_forward(
    self: nn.Module,
    how: How,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    text, mask = encoder_hidden_states, encoder_attention_mask
    if _why_not_block(self):
        return type(self).forward(self, hidden_states, text, temb, image_rotary_emb, mask)
    x, exact = hidden_states, in_16_bits(how)                                                # [B, S, D]
    (shift1, scale1, gate1, shift2, scale2, gate2), tables = adaln(self.scale_shift_table, temb)

    modulation = {"shift_table": tables[0], "scale_table": tables[1]}
    h = norm_modulate(x, shift1, scale1, norm="rms", **affine(self.norm1), **modulation, **exact)
    y = self.attn1(hidden_states=h, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb).type_as(x)
    x = gate_residual(x, y, gate1, gate_table=tables[2], **exact)
    y = self.attn2(x, encoder_hidden_states=text, image_rotary_emb=None, attention_mask=mask).type_as(x)
    modulation = {"shift_table": tables[3], "scale_table": tables[4]}
    modulation |= {"norm": "rms", **affine(self.norm2)}
    x, h = gate_residual_norm_modulate(x, y, None, shift2, scale2, **modulation, **exact)
    return gate_residual(x, self.ff(h).type_as(x), gate2, gate_table=tables[5], **exact)


class LTXProcessor(Processor):
    """Attention processor of an LTXAttention. A mask may be `lengths`."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask, rules = attention_mask, {}
        if why_not_rms_norms(attn) or learned(image_rotary_emb):
            return self.replaced(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)
        if mask is not None and mask.ndim == 1:
            mask, rules = None, {"kv_lens": mask}
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, context.shape[1], context.shape[0])
            mask = mask.view(context.shape[0], attn.heads, -1, mask.shape[-1])
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        rotary = {}
        if image_rotary_emb is not None:  # [B, S, H * E], each angle twice
            rotary["freqs"] = tuple(t[:, :, None, ::2] for t in image_rotary_emb)
        q, k = self.normed(attn.norm_q, attn.norm_k, q.unsqueeze(2), k.unsqueeze(2), **rotary)  # [B, S, 1, H * E]
        q, k, v = (t.flatten(2).unflatten(2, (attn.heads, -1)) for t in (q, k, v))           # [B, S, H, E]
        out = self.attend(q, k, v, mask, **rules)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(q)))


def _takes_lengths(block: nn.Module) -> bool:
    """For a mask. Nobody else sees them between the model and the attention."""
    attn = block.attn2
    ours = isinstance(attn.processor, LTXProcessor) and attn.processor.ours() and not why_not_rms_norms(attn)
    return ours and not is_hooked(block) and not is_hooked(attn)


def _model_forward(
    self: nn.Module,
    how: How,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    encoder_attention_mask: Tensor | None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    rope_interpolation_scale: Any = None,
    video_coords: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    place = num_frames, height, width, rope_interpolation_scale, video_coords
    if attention_kwargs or _why_not_out(self):  # a LoRA scale is found by the host's decorator, among keywords only
        inputs = hidden_states, encoder_hidden_states, timestep, encoder_attention_mask, *place
        return type(self).forward(self, *inputs, attention_kwargs=attention_kwargs, return_dict=return_dict)
    rotary_emb = self.rope(hidden_states, *place)
    x = self.proj_in(hidden_states)                                                          # [B, S, D]
    B = len(x)
    temb, time = self.time_embed(timestep.flatten(), batch_size=B, hidden_dtype=x.dtype)
    temb, time = (t.view(B, -1, t.shape[-1]) for t in (temb, time))                          # [B, 1 or S, 6 * D or D]
    text = self.caption_projection(encoder_hidden_states).view(B, -1, x.shape[-1])
    blocks = self.transformer_blocks
    text, mask = lengths(blocks, _takes_lengths, encoder_attention_mask, text)
    if mask is not None and mask.ndim == 2:
        mask = (1 - mask.to(x.dtype)).unsqueeze(1) * -10000.0
    for block in blocks:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            x = self._gradient_checkpointing_func(block, x, text, temb, rotary_emb, mask)
        else:
            given = {"encoder_hidden_states": text, "temb": temb, "image_rotary_emb": rotary_emb}
            x = block(hidden_states=x, **given, encoder_attention_mask=mask)
    rows = self.scale_shift_table + time.unsqueeze(2)                                        # [B, 1 or S, 2, D]
    x = norm_modulate(x, *rows.unbind(2), **affine(self.norm_out), **in_16_bits(how))
    sample = self.proj_out(x)
    if not return_dict:
        return (sample,)
    return Transformer2DModelOutput(sample=sample)
