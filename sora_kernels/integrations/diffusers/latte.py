"""diffusers' LatteTransformer3DModel through our operations: which step of theirs is which operation of ours.

Blocks of frames and of time alternate; a clip's rows are repeated for each of its frames, or places. Theirs modulates
and gates in the dtype of the tokens, and normalises neither queries nor keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from ... import layers
from ...modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from ..patch import How, Plan, Swap, bind, why_not_rebind
from .common import (
    PlainProcessor,
    adaln,
    affine,
    draw,
    embed_frames,
    euler,
    in_16_bits,
    of_noise,
    why_not_processor,
    why_not_read,
)

_BLOCK = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")


def plan(model: nn.Module, how: How) -> tuple[list[Plan], tuple[str, ...]]:
    kept = "projections, feed-forward and embeddings: matrix products, PyTorch's own"
    return list(_steps(model, how)), (kept, "norm_out, proj_out and its unpatchify: in the model's own forward")


def example(model: nn.Module, grid: tuple[int, int, int] = (3, 4, 6)) -> tuple[Any, ...]:
    """The config says how many patches and frames there are."""
    generator, config, like = torch.Generator().manual_seed(0), model.config, model.proj_out
    sizes = config.video_length, config.sample_size, config.sample_size
    latents = draw(like, 1, config.in_channels, *sizes, generator=generator)
    times = torch.tensor([500], device=latents.device)
    return latents, times, draw(like, 1, 16, config.caption_channels, generator=generator)


def sample(model: nn.Module, steps: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return euler(model, steps, inputs, kwargs, channels=model.config.in_channels, to=of_noise)


def _steps(model: nn.Module, how: How) -> Iterator[Plan]:
    conv = model.pos_embed.proj
    reason = why_not_rebind(conv, nn.Conv2d) or layers.why_not_embed(conv)
    yield how.step("pos_embed", ("patch_embed3d",), reason, bind(conv, embed_frames, how.impl))

    for name, module in model.named_modules():
        if isinstance(module, BasicTransformerBlock):
            reason = why_not_rebind(module, BasicTransformerBlock) or _why_not_block(module)
            yield how.step(name, _BLOCK, reason, bind(module, _block_forward, how))
        elif isinstance(module, Attention):
            reason = why_not_processor(module, Attention, AttnProcessor2_0) or _why_not_attention(module)
            swap = Swap(module, LatteProcessor(how, module.processor), processor=True)
            yield how.step(name, ("spacetime_attention",), reason, swap)


def _why_not_block(block: nn.Module) -> str | None:
    if block.norm_type != "ada_norm_single":
        return f"its norm is {block.norm_type}, not ada_norm_single"
    if block.pos_embed is not None or block.only_cross_attention:
        return "it adds places to what its attention sees, or attends to the text only"
    return why_not_read(block, norm1=(nn.LayerNorm,), norm2=(nn.LayerNorm,))


def _why_not_attention(attn: nn.Module) -> str | None:
    norms = attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross
    if any(norms) or attn.residual_connection or attn.rescale_output_factor != 1:
        return "it has a norm, a residual or an output factor of its own"
    return None


def _block_forward(
    self: nn.Module,
    how: How,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    x, text, mask = hidden_states, encoder_hidden_states, encoder_attention_mask             # [B, S, D]
    if cross_attention_kwargs or self._chunk_size is not None or _why_not_block(self):
        inputs = x, attention_mask, text, mask, timestep, cross_attention_kwargs, class_labels, added_cond_kwargs
        return type(self).forward(self, *inputs)
    exact = in_16_bits(how)
    (shift1, scale1, gate1, shift2, scale2, gate2), _ = adaln(self.scale_shift_table, timestep.unsqueeze(1))

    h = norm_modulate(x, shift1, scale1, **affine(self.norm1), **exact)
    y = self.attn1(h, encoder_hidden_states=None, attention_mask=attention_mask).type_as(x)
    gate = gate1
    if self.attn2 is not None:
        x, gate = gate_residual(x, y, gate1, **exact), None
        y = self.attn2(x, encoder_hidden_states=text, attention_mask=mask).type_as(x)
    x, h = gate_residual_norm_modulate(x, y, gate, shift2, scale2, **affine(self.norm2), **exact)
    return gate_residual(x, self.ff(h).type_as(x), gate2, **exact)


class LatteProcessor(PlainProcessor):
    """Attention processor of an Attention without norms."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        x, context, mask = hidden_states, encoder_hidden_states, attention_mask
        if mask is not None or args or kwargs or x.ndim != 3 or _why_not_attention(attn):
            return self.replaced(attn, x, context, mask, *args, **kwargs)
        context = x if context is None else context
        projected = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        q, k, v = (t.unflatten(2, (attn.heads, -1)) for t in projected)                      # [B, S, H, E]
        return attn.to_out[1](attn.to_out[0](self.attend(q, k, v).flatten(2).type_as(q)))
