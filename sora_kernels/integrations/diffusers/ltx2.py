"""diffusers' LTX2VideoTransformer3DModel (LTX-2 to 2.5) through our operations: which step of theirs is which of ours.

Theirs modulates and gates in the dtype of the tokens, of video and of sound. Between the two, queries and keys turn by
tables of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_ltx2 as host
from torch import Tensor, nn

from ...attention import gate_heads
from ...modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from ...qknorm_rope import qk_norm_rope
from ..patch import How, Plan, Swap, bind, is_hooked, why_not_rebind
from .common import (
    Processor,
    adaln,
    affine,
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
_NORMS = (
    "norm1", "norm2", "norm3", "audio_norm1", "audio_norm2", "audio_norm3", "audio_to_video_norm",
    "video_to_audio_norm",
)  # fmt: skip
_Row = tuple[Tensor | None, Tensor | None]  # a modulation row, and a table that is added to it


def plan(model: nn.Module, how: How) -> tuple[list[Plan], tuple[str, ...]]:
    kept = "projections, feed-forward and embeddings: matrix products, PyTorch's own"
    return list(_steps(model, how)), (kept, "norm_out and audio_norm_out: modulated in the model's own forward")


def example(model: nn.Module, grid: tuple[int, int, int] = (3, 4, 6)) -> tuple[Any, ...]:
    generator, config, like = torch.Generator().manual_seed(0), model.config, model.proj_in
    sounds, words = 5 * grid[0], 16
    latents = draw(like, 1, math.prod(grid), config.in_channels, generator=generator)
    audio = draw(like, 1, sounds, config.audio_in_channels, generator=generator)
    widths = config.cross_attention_dim, config.audio_cross_attention_dim
    if config.use_prompt_embeddings:
        widths = config.caption_channels, config.caption_channels
    texts = [draw(like, 1, words, width, generator=generator) for width in widths]
    times = torch.tensor([500.0], device=latents.device)
    mask = (torch.arange(words, device=latents.device) < 11)[None]
    return latents, audio, *texts, times, None, times, None, mask, mask, *grid, 24.0, sounds


def sample(model: nn.Module, steps: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    channels = model.config.out_channels or model.config.in_channels
    return euler(model, steps, inputs, kwargs, channels=channels, axis=2)


def _steps(model: nn.Module, how: How) -> Iterator[Plan]:
    texts = bind(model, _model_forward)
    elsewhere = why_not_rebind(model, host.LTX2VideoTransformer3DModel)
    for name, module in model.named_modules():
        if isinstance(module, host.LTX2VideoTransformerBlock):
            reason = why_not_rebind(module, host.LTX2VideoTransformerBlock) or _why_not_block(module)
            yield how.step(name, _BLOCK, reason, bind(module, _block_forward, how))
        elif isinstance(module, host.LTX2Attention):
            perturbed = isinstance(module.processor, host.LTX2PerturbedAttnProcessor)
            standard = host.LTX2PerturbedAttnProcessor if perturbed else host.LTX2AudioVideoAttnProcessor
            reason = why_not_processor(module, host.LTX2Attention, standard) or why_not_rms_norms(module)
            swap = Swap(module, LTX2Processor(how, module.processor), processor=True)
            norm = how.step(name, ("qk_norm_rope",), reason, swap)
            yield norm
            of_text = () if elsewhere or not name.endswith("attn2") else (texts,)
            yield how.step(name, ("spacetime_attention",), norm.step.reason, swap, *of_text)
            if module.to_gate_logits is not None:
                yield how.step(name, ("gate_heads",), norm.step.reason, swap)


def _why_not_block(block: nn.Module) -> str | None:
    return why_not_read(block, **dict.fromkeys(_NORMS, (RMSNorm,)))


def _model_forward(
    self: nn.Module,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    timestep: Tensor,
    audio_timestep: Tensor | None = None,
    sigma: Tensor | None = None,
    audio_sigma: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    audio_encoder_attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The host's, which masks of other than two axes are nothing to, and which maps texts token by token."""
    blocks, audio_text = self.transformer_blocks, audio_encoder_hidden_states
    text, mask = lengths(blocks, _takes_lengths, encoder_attention_mask, encoder_hidden_states)
    audio_text, audio_mask = lengths(blocks, _takes_audio_lengths, audio_encoder_attention_mask, audio_text)
    inputs = hidden_states, audio_hidden_states, text, audio_text, timestep, audio_timestep, sigma, audio_sigma
    return type(self).forward(self, *inputs, mask, audio_mask, *args, **kwargs)


def _takes_lengths(block: nn.Module, name: str = "attn2") -> bool:
    """For a mask. Nobody else sees them between the model and the attention."""
    attn = getattr(block, name)
    ours = isinstance(attn.processor, LTX2Processor) and attn.processor.ours() and not why_not_rms_norms(attn)
    return ours and not is_hooked(block) and not is_hooked(attn)


def _takes_audio_lengths(block: nn.Module) -> bool:
    return _takes_lengths(block, "audio_attn2")


def _block_forward(
    self: nn.Module,
    how: How,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    temb: Tensor,
    temb_audio: Tensor,
    temb_ca_scale_shift: Tensor,
    temb_ca_audio_scale_shift: Tensor,
    temb_ca_gate: Tensor,
    temb_ca_audio_gate: Tensor,
    temb_prompt: Tensor | None = None,
    temb_prompt_audio: Tensor | None = None,
    video_rotary_emb: tuple[Tensor, Tensor] | None = None,
    audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ca_video_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ca_audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
    audio_encoder_attention_mask: Tensor | None = None,
    self_attention_mask: Tensor | None = None,
    audio_self_attention_mask: Tensor | None = None,
    a2v_cross_attention_mask: Tensor | None = None,
    v2a_cross_attention_mask: Tensor | None = None,
    use_a2v_cross_attention: bool = True,
    use_v2a_cross_attention: bool = True,
    perturbation_mask: Tensor | None = None,
    all_perturbed: bool | None = None,
) -> tuple[Tensor, Tensor]:
    if _why_not_block(self) or use_a2v_cross_attention != use_v2a_cross_attention:
        return type(self).forward(
            self, hidden_states, audio_hidden_states, encoder_hidden_states, audio_encoder_hidden_states, temb,
            temb_audio, temb_ca_scale_shift, temb_ca_audio_scale_shift, temb_ca_gate, temb_ca_audio_gate, temb_prompt,
            temb_prompt_audio, video_rotary_emb, audio_rotary_emb, ca_video_rotary_emb, ca_audio_rotary_emb,
            encoder_attention_mask, audio_encoder_attention_mask, self_attention_mask, audio_self_attention_mask,
            a2v_cross_attention_mask, v2a_cross_attention_mask, use_a2v_cross_attention, use_v2a_cross_attention,
            perturbation_mask, all_perturbed,
        )  # fmt: skip
    x, sound, exact = hidden_states, audio_hidden_states, in_16_bits(how)                    # [B, S, D], [B, T, C]
    perturbed = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed} if self.perturbed_attn else {}

    rows, (shift2, scale2, gate2) = _rows(self.scale_shift_table, temb)
    shift1, scale1, gate1, shift3, scale3, gate3 = rows
    h = _normed(x, self.norm1, shift1, scale1, exact)
    given = {"query_rotary_emb": video_rotary_emb, "attention_mask": self_attention_mask}
    y = self.attn1(hidden_states=h, encoder_hidden_states=None, **given, **perturbed)
    x, h = _added(x, y, gate1, self.norm2, shift2, scale2, exact)

    rows, (a_shift2, a_scale2, a_gate2) = _rows(self.audio_scale_shift_table, temb_audio)
    a_shift1, a_scale1, a_gate1, a_shift3, a_scale3, a_gate3 = rows
    h_sound = _normed(sound, self.audio_norm1, a_shift1, a_scale1, exact)
    given = {"query_rotary_emb": audio_rotary_emb, "attention_mask": audio_self_attention_mask}
    y = self.audio_attn1(hidden_states=h_sound, encoder_hidden_states=None, **given, **perturbed)
    sound, h_sound = _added(sound, y, a_gate1, self.audio_norm2, a_shift2, a_scale2, exact)

    text, a_text = encoder_hidden_states, audio_encoder_hidden_states
    if self.cross_attn_adaln:
        text = _modulated(text, self.prompt_scale_shift_table, temb_prompt, x)
        a_text = _modulated(a_text, self.audio_prompt_scale_shift_table, temb_prompt_audio, sound)
    given = {"query_rotary_emb": None, "attention_mask": encoder_attention_mask}
    y = self.attn2(h, encoder_hidden_states=text, **given)
    given = {"query_rotary_emb": None, "attention_mask": audio_encoder_attention_mask}
    z = self.audio_attn2(h_sound, encoder_hidden_states=a_text, **given)

    if use_a2v_cross_attention:
        table, a_table = self.video_a2v_cross_attn_scale_shift_table, self.audio_a2v_cross_attn_scale_shift_table
        scale_a2v, shift_a2v, scale_v2a, shift_v2a = _pairs(table[:4], temb_ca_scale_shift)
        a_scale_a2v, a_shift_a2v, a_scale_v2a, a_shift_v2a = _pairs(a_table[:4], temb_ca_audio_scale_shift)
        x, h = _added(x, y, gate2, self.audio_to_video_norm, shift_a2v, scale_a2v, exact)
        h_v2a = _normed(x, self.audio_to_video_norm, shift_v2a, scale_v2a, exact)
        sound, h_sound = _added(sound, z, a_gate2, self.video_to_audio_norm, a_shift_a2v, a_scale_a2v, exact)
        h_sound_v2a = _normed(sound, self.video_to_audio_norm, a_shift_v2a, a_scale_v2a, exact)

        given = {"query_rotary_emb": ca_video_rotary_emb, "key_rotary_emb": ca_audio_rotary_emb}
        given |= {"encoder_hidden_states": h_sound, "attention_mask": a2v_cross_attention_mask}
        y = self.audio_to_video_attn(h, **given)
        given = {"query_rotary_emb": ca_audio_rotary_emb, "key_rotary_emb": ca_video_rotary_emb}
        given |= {"encoder_hidden_states": h_v2a, "attention_mask": v2a_cross_attention_mask}
        z = self.video_to_audio_attn(h_sound_v2a, **given)
        (gate2,), (a_gate2,) = _pairs(table[4:], temb_ca_gate), _pairs(a_table[4:], temb_ca_audio_gate)

    x, h = _added(x, y, gate2, self.norm3, shift3, scale3, exact)
    x = gate_residual(x, self.ff(h).type_as(x), gate3[0], gate_table=gate3[1], **exact)
    sound, h_sound = _added(sound, z, a_gate2, self.audio_norm3, a_shift3, a_scale3, exact)
    y = self.audio_ff(h_sound).type_as(sound)
    return x, gate_residual(sound, y, a_gate3[0], gate_table=a_gate3[1], **exact)


def _pairs(table: Tensor, temb: Tensor) -> list[_Row]:
    return list(zip(*adaln(table, temb), strict=True))


def _rows(table: Tensor, temb: Tensor) -> tuple[list[_Row], list[_Row]]:
    """Shift, scale and gate of self-attention and of the feed-forward; and those of the queries of the text."""
    rows = _pairs(table, temb)
    return rows[:6], rows[6:] or [(None, None)] * 3


def _normed(x: Tensor, norm: nn.Module, shift: _Row, scale: _Row, exact: dict[str, Any]) -> Tensor:
    tables = {"shift_table": shift[1], "scale_table": scale[1]}
    return norm_modulate(x, shift[0], scale[0], norm="rms", **tables, **affine(norm), **exact)


def _added(
    x: Tensor, y: Tensor, gate: _Row, norm: nn.Module, shift: _Row, scale: _Row, exact: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """x + gate * y, and its norm, modulated."""
    tables = {"gate_table": gate[1], "shift_table": shift[1], "scale_table": scale[1]}
    rows = gate[0], shift[0], scale[0]
    return gate_residual_norm_modulate(x, y.type_as(x), *rows, norm="rms", **tables, **affine(norm), **exact)


def _modulated(text: Tensor, table: Tensor, temb: Tensor | None, like: Tensor) -> Tensor:
    """The host's: a text has few tokens, and no norm here."""
    if temb is None:
        shift, scale = table[None, None].to(device=like.device, dtype=like.dtype).unbind(2)
    else:
        shift, scale = (table[None, None].to(temb.device) + temb.unflatten(-1, table.shape)).unbind(2)
    return text * (1 + scale) + shift


class LTX2Processor(Processor):
    """Attention processor of an LTX2Attention. A mask may be `lengths`."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> Tensor:
        x, context = hidden_states, hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask, rules = attention_mask, {}
        theirs = why_not_rms_norms(attn) or learned(query_rotary_emb) or learned(key_rotary_emb)
        if theirs or perturbation_mask is not None or all_perturbed:
            inputs = encoder_hidden_states, mask, query_rotary_emb, key_rotary_emb
            if isinstance(self.replaced, host.LTX2PerturbedAttnProcessor):
                inputs += perturbation_mask, all_perturbed
            return self.replaced(attn, x, *inputs)
        if mask is not None and mask.ndim == 1:
            mask, rules = None, {"kv_lens": mask}
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, context.shape[1], context.shape[0])
            mask = mask.view(context.shape[0], attn.heads, -1, mask.shape[-1])
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        q, k = self.turned(attn, q, k, query_rotary_emb, key_rotary_emb)
        v = v.unflatten(2, (attn.heads, -1))                                                 # [B, S, H, E]
        out = self.attend(q, k, v, mask, **rules).type_as(q)
        if attn.to_gate_logits is not None:
            logits = attn.to_gate_logits(x)                                                  # [B, S, H]
            if self.how.why_not("gate_heads"):
                out = out * (2.0 * torch.sigmoid(logits)).unsqueeze(-1)
            else:
                out = gate_heads(out, logits, scale=2.0, impl=self.how.impl)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))

    def turned(
        self, attn: nn.Module, q: Tensor, k: Tensor, rotary_emb: Any, key_rotary_emb: Any
    ) -> tuple[Tensor, Tensor]:
        """q and k [B, S, H * E], normalised over all heads and turned: [B, S, H, E]."""
        norms = {"q_weight": attn.norm_q.weight, "k_weight": attn.norm_k.weight, "eps": attn.norm_q.eps}
        norms |= {"rounding": self.how.rounding_now(), "impl": self.how.impl, "across": "width"}
        heads = (attn.heads, -1)
        if rotary_emb is not None:
            if attn.rope_type == "split":  # [B, H, S, E / 2]
                turn = [t.transpose(1, 2) for t in rotary_emb]
                turn_k = key_rotary_emb and [t.transpose(1, 2) for t in key_rotary_emb]
                norms["interleaved"] = False
            else:  # pairs over the whole width, as of one head: [B, S, H * E], each angle twice
                heads = (1, -1)
                turn = [t[:, :, None, ::2] for t in rotary_emb]
                turn_k = key_rotary_emb and [t[:, :, None, ::2] for t in key_rotary_emb]
            norms |= {"freqs": tuple(turn), "k_freqs": turn_k and tuple(turn_k)}
        q, k = qk_norm_rope(q.unflatten(2, heads), k.unflatten(2, heads), **norms)
        return tuple(t.flatten(2).unflatten(2, (attn.heads, -1)) for t in (q, k))
