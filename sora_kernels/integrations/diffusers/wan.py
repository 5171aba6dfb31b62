"""diffusers' WanTransformer3DModel through our operations: which step of theirs is which operation of ours.

Theirs upcasts to fp32 around every norm, modulation and gate and rounds once after it; so do our operations inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ... import layers
from ...modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from ...patchify import final_layer
from ...qknorm_rope import qk_norm_rope
from ..patch import How, Plan, Swap, bind, why_not_rebind
from .common import Processor, attention_steps, draw, euler, why_not_read

_BLOCK = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")
_NORM = (FP32LayerNorm,)


def plan(model: nn.Module, how: How) -> tuple[list[Plan], tuple[str, ...]]:
    """The steps of the model, and what of it is never replaced."""
    kept = "projections, feed-forward and embeddings: matrix products, PyTorch's own"
    return list(_steps(model, how)), (kept,)


def example(model: nn.Module, grid: tuple[int, int, int] = (3, 4, 6)) -> tuple[Any, ...]:
    """Random inputs that fit the model's config, of so many patches."""
    generator, config = torch.Generator().manual_seed(0), model.config
    sizes = (n * p for n, p in zip(grid, config.patch_size, strict=True))
    latents = draw(model.patch_embedding, 1, config.in_channels, *sizes, generator=generator)
    times = torch.tensor([500.0], device=latents.device)
    tokens = 512 if config.added_kv_proj_dim else 16
    text = draw(model.patch_embedding, 1, tokens, config.text_dim, generator=generator)
    if config.image_dim is None:
        return latents, times, text
    image = draw(model.patch_embedding, 1, config.pos_embed_seq_len or 257, config.image_dim, generator=generator)
    return latents, times, text, image


def sample(model: nn.Module, steps: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The end of a short sampling run, all but noise and time as in the inputs; None if the model does not sample."""
    return euler(model, steps, inputs, kwargs, channels=model.config.out_channels)


def _steps(model: nn.Module, how: How) -> Iterator[Plan]:
    embedding = model.patch_embedding
    reason = why_not_rebind(embedding, nn.Conv3d) or layers.why_not_embed(embedding)
    yield how.step("patch_embedding", ("patch_embed3d",), reason, bind(embedding, _embed, how.impl))

    for name, module in model.named_modules():
        if isinstance(module, WanTransformerBlock):
            reason = why_not_rebind(module, WanTransformerBlock) or _why_not_block(module)
            yield how.step(name, _BLOCK, reason, bind(module, _block_forward, how.impl))
        elif isinstance(module, WanAttention):
            reason = None
            if type(module).forward is not WanAttention.forward:
                reason = f"{type(module).__name__} has a forward of its own, not that of WanAttention"
            elif type(module.processor) is not WanAttnProcessor:
                reason = f"its processor is a {type(module.processor).__name__}, set by someone else"
            reason = reason or _why_not_attention(module)
            processor = Swap(module, WanProcessor(how, module.processor), processor=True)
            yield from attention_steps(name, reason, how, processor)

    reason = why_not_rebind(model, WanTransformer3DModel) or _why_not_final(model)
    yield how.step("norm_out, proj_out", ("final_layer",), reason, bind(model, _model_forward, how.impl))


def _why_not_block(block: nn.Module) -> str | None:
    return why_not_read(block, norm1=_NORM, norm2=(FP32LayerNorm, nn.Identity), norm3=_NORM)


def _why_not_attention(attn: nn.Module) -> str | None:
    if attn.add_k_proj is not None:
        return "it attends to an image as well, in a second attention of its own"
    if reason := why_not_read(attn, norm_q=(nn.RMSNorm,), norm_k=(nn.RMSNorm,)):
        return reason
    return None if attn.norm_q.eps == attn.norm_k.eps is not None else "norm_q and norm_k differ in eps, or have none"


def _why_not_final(model: nn.Module) -> str | None:
    if reason := why_not_read(model, norm_out=_NORM, proj_out=(nn.Linear,)):
        return reason
    weight = model.proj_out.weight
    return f"the weight of proj_out is a {type(weight).__name__}" if is_traceable_wrapper_subclass(weight) else None


def _embed(embedding: nn.Module, impl: str, x: Tensor) -> Tensor:
    return layers.embed(embedding, x, impl)


def _block_forward(
    self: nn.Module,
    impl: str,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
) -> Tensor:
    if _why_not_block(self):
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb)
    x = hidden_states                                                                        # [B, S, D]
    tables = self.scale_shift_table[0].unbind(0)                                             # 6 x [D]
    shift1, scale1, gate1, shift2, scale2, gate2 = temb.unbind(-2)                           # [B, D] or [B, S, D]

    modulation = {"shift_table": tables[0], "scale_table": tables[1]}
    h = norm_modulate(x, shift1, scale1, **_affine(self.norm1), **modulation, impl=impl)
    y = self.attn1(h, None, None, rotary_emb).type_as(x)  # autocast gives another dtype
    if isinstance(self.norm2, nn.Identity):
        x = h = gate_residual(x, y, gate1, gate_table=tables[2], impl=impl)
    else:
        modulation = {"gate_table": tables[2]}
        x, h = gate_residual_norm_modulate(x, y, gate1, None, None, **_affine(self.norm2), **modulation, impl=impl)
    y = self.attn2(h, encoder_hidden_states, None, None).type_as(x)
    modulation = {"shift_table": tables[3], "scale_table": tables[4]}
    one = x.new_ones(x.shape[-1])
    x, h = gate_residual_norm_modulate(x, y, one, shift2, scale2, **_affine(self.norm3), **modulation, impl=impl)
    return gate_residual(x, self.ffn(h).type_as(x), gate2, gate_table=tables[5], impl=impl)


def _affine(norm: nn.LayerNorm) -> dict[str, Any]:
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}


class WanProcessor(Processor):
    """Attention processor of a WanAttention: projections, then QK-norm with rotary embedding, then attention."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if _why_not_attention(attn):
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        q, k, v = (t.unflatten(2, (attn.heads, -1)) for t in _project(attn, hidden_states, encoder_hidden_states))
        norms = {"q_weight": attn.norm_q.weight, "k_weight": attn.norm_k.weight, "across": "width"}
        if rotary_emb is not None:  # [1, S, 1, E], each angle twice
            cos, sin = (t[0, :, 0, ::2] for t in rotary_emb)
            norms["freqs"] = cos, sin
        norms["rounding"] = self.how.rounding_now()
        q, k = qk_norm_rope(q, k, **norms, eps=attn.norm_q.eps, impl=self.how.impl)          # [B, S, H, E]
        out = self.attend(q, k, v, attention_mask, crossing=encoder_hidden_states is not None)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(q)))


def _project(attn: nn.Module, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    fused = getattr(attn, "fused_projections", False)
    if fused and hasattr(attn, "to_qkv"):
        return attn.to_qkv(x).chunk(3, -1)
    context = x if context is None else context
    if fused:
        return attn.to_q(x), *attn.to_kv(context).chunk(2, -1)
    return attn.to_q(x), attn.to_k(context), attn.to_v(context)


def _model_forward(
    self: nn.Module,
    impl: str,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    # an image is the host's business, and so is a LoRA scale, which its decorator finds among keywords only
    if attention_kwargs or encoder_hidden_states_image is not None or _why_not_final(self):
        inputs = hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image
        return type(self).forward(self, *inputs, return_dict=return_dict, attention_kwargs=attention_kwargs)
    patch = tuple(self.config.patch_size)
    grid = tuple(n // p for n, p in zip(hidden_states.shape[2:], patch, strict=True))
    rotary_emb = self.rope(hidden_states)
    x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()          # [B, S, D]
    times = timestep.shape[1] if timestep.ndim == 2 else None
    time, rows, text, _ = self.condition_embedder(
        timestep.flatten(), encoder_hidden_states, None, timestep_seq_len=times
    )
    rows = rows.unflatten(-1, (6, -1))                                                       # [B, 6, D] or [B, N, 6, D]
    for block in self.blocks:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            x = self._gradient_checkpointing_func(block, x, text, rows, rotary_emb)
        else:
            x = block(x, text, rows, rotary_emb)
    table = self.scale_shift_table.to(time.device)                                           # [1, 2, D]
    shift, scale = ((time.unsqueeze(-2) + table).to(x.device)).unbind(-2)                    # [B, D] or [B, N, D]
    how = {"grid": grid, "patch": patch, "eps": self.norm_out.eps, "impl": impl}
    sample = final_layer(x, shift, scale, self.proj_out.weight, self.proj_out.bias, **how)
    if not return_dict:
        return (sample,)
    return Transformer2DModelOutput(sample=sample)
