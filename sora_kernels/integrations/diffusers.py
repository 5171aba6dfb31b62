"""diffusers' Wan models through our operations: which step of theirs is which operation of ours.

Theirs upcasts to fp32 around every norm, modulation and gate and rounds once after it; so do our operations inside.
Source: diffusers 0.36 to 0.42, models/transformers/transformer_wan.py and models/autoencoders/autoencoder_kl_wan.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import layers
from ..attention import spacetime_attention
from ..modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from ..patchify import final_layer
from ..qknorm_rope import qk_norm_rope
from .patch import Plan, Step, Swap, bind, is_hooked, why_not_rebind

_BLOCK = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")


def plan(model: nn.Module, impl: str) -> tuple[list[Plan], tuple[str, ...]]:
    """The steps of a WanTransformer3DModel or an AutoencoderKLWan, and what of it is never replaced."""
    from diffusers import WanTransformer3DModel

    if isinstance(model, WanTransformer3DModel):
        kept = "projections, feed-forward and embeddings: matrix products, PyTorch's own"
        return list(_transformer(model, impl)), (kept,)
    kept = "convolutions and resampling: their caches between chunks are diffusers' own"
    return list(_autoencoder(model, impl)), (kept, "attention of a single head over a frame: PyTorch's own")


def _step(where: str, ops: tuple[str, ...], reason: str | None, *swaps: Swap) -> Plan:
    return Plan(Step(where, ops, reason), () if reason else swaps)


def _bypassed(owner: nn.Module, *names: str) -> str | None:
    """None where nothing would be missed if the parameters of these children were read and they not called."""
    hooked = [name for name in names if is_hooked(getattr(owner, name))]
    return f"{', '.join(hooked)} has hooks, which a fused operation would not run" if hooked else None


def _unlike(owner: nn.Module, **expected: tuple[type[nn.Module], ...]) -> str | None:
    for name, types in expected.items():
        if type(child := getattr(owner, name)) not in types:
            return f"{name} is a {type(child).__name__}, not {' or '.join(t.__name__ for t in types)}"
    return None


# WanTransformer3DModel


def _transformer(model: nn.Module, impl: str) -> Iterator[Plan]:
    from diffusers import WanTransformer3DModel
    from diffusers.models.normalization import FP32LayerNorm
    from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock

    embedding = model.patch_embedding
    reason = why_not_rebind(embedding, nn.Conv3d) or layers.why_not_embed(embedding)
    forward = bind(embedding, lambda self, x: layers.embed(self, x, impl))
    yield _step("patch_embedding", ("patch_embed3d",), reason, forward)

    norm = (FP32LayerNorm,)
    for name, module in model.named_modules():
        if isinstance(module, WanTransformerBlock):
            reason = (
                why_not_rebind(module, WanTransformerBlock)
                or _unlike(module, norm1=norm, norm2=(FP32LayerNorm, nn.Identity), norm3=norm)
                or _bypassed(module, "norm1", "norm2", "norm3")
            )
            yield _step(name, _BLOCK, reason, bind(module, _block_forward(impl)))
        elif isinstance(module, WanAttention):
            processor = Swap(module, WanProcessor(impl, module.processor), processor=True)
            yield _step(name, ("qk_norm_rope", "spacetime_attention"), _why_not_attention(module), processor)

    reason = why_not_rebind(model, WanTransformer3DModel) or _why_not_final(model)
    yield _step("norm_out, proj_out", ("final_layer",), reason, bind(model, _model_forward(impl)))


def _why_not_attention(attn: nn.Module) -> str | None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    if type(attn.processor) is not WanAttnProcessor:
        return f"its processor is a {type(attn.processor).__name__}, set by someone else"
    if attn.add_k_proj is not None:
        return "it attends to an image as well, in a second attention of its own"
    if reason := _unlike(attn, norm_q=(nn.RMSNorm,), norm_k=(nn.RMSNorm,)) or _bypassed(attn, "norm_q", "norm_k"):
        return reason
    return None if attn.norm_q.eps == attn.norm_k.eps is not None else "norm_q and norm_k differ in eps, or have none"


def _why_not_final(model: nn.Module) -> str | None:
    if type(model.proj_out) is not nn.Linear:
        return f"proj_out is a {type(model.proj_out).__name__}, not Linear"
    return _bypassed(model, "norm_out", "proj_out")


def _block_forward(impl: str) -> Callable[..., Tensor]:
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        x = hidden_states                                                                    # [B, S, D]
        tables = self.scale_shift_table[0].unbind(0)                                         # 6 x [D]
        shift1, scale1, gate1, shift2, scale2, gate2 = temb.unbind(-2)                       # [B, D] or [B, S, D]

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

    return forward


def _affine(norm: nn.LayerNorm) -> dict[str, Any]:
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}


class WanProcessor:
    """Attention processor of a WanAttention: projections, then QK-norm with rotary embedding, then attention.

    A backend set by diffusers' `set_attention_backend`, its context parallelism and a mask are served by diffusers'
    own dispatch; the norm and the rotation before it stay ours.
    """

    def __init__(self, impl: str, replaced: Any) -> None:
        self.impl = impl
        self._attention_backend = getattr(replaced, "_attention_backend", None)  # diffusers looks for these names
        self._parallel_config = getattr(replaced, "_parallel_config", None)

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q, k, v = (t.unflatten(2, (attn.heads, -1)) for t in _project(attn, hidden_states, encoder_hidden_states))
        norms = {"q_weight": attn.norm_q.weight, "k_weight": attn.norm_k.weight, "across": "width"}
        if rotary_emb is not None:  # [1, S, 1, E], each angle twice
            cos, sin = (t[0, :, 0, ::2] for t in rotary_emb)
            norms["freqs"] = cos, sin
        q, k = qk_norm_rope(q, k, **norms, eps=attn.norm_q.eps, impl=self.impl)              # [B, S, H, E]
        if attention_mask is None and self._attention_backend is None and self._parallel_config is None:
            out = spacetime_attention(q, k, v, impl=self.impl)
        else:
            from diffusers.models.attention_dispatch import dispatch_attention_fn

            parallel = self._parallel_config if encoder_hidden_states is None else None
            how = {"attn_mask": attention_mask, "backend": self._attention_backend, "parallel_config": parallel}
            out = dispatch_attention_fn(q, k, v, **how)
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(q)))


def _project(attn: nn.Module, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    fused = getattr(attn, "fused_projections", False)
    if fused and hasattr(attn, "to_qkv"):
        return attn.to_qkv(x).chunk(3, -1)
    context = x if context is None else context
    if fused:
        return attn.to_q(x), *attn.to_kv(context).chunk(2, -1)
    return attn.to_q(x), attn.to_k(context), attn.to_v(context)


def _model_forward(impl: str) -> Callable[..., Any]:
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # a LoRA scale and an image are the host's business; proj_out may have been wrapped or hooked since
        if attention_kwargs or encoder_hidden_states_image is not None or _why_not_final(self):
            return type(self).forward(
                self, hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image,
                return_dict, attention_kwargs,
            )  # fmt: skip
        patch = tuple(self.config.patch_size)
        grid = tuple(n // p for n, p in zip(hidden_states.shape[2:], patch, strict=True))
        rotary_emb = self.rope(hidden_states)
        x = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()      # [B, S, D]
        times = timestep.shape[1] if timestep.ndim == 2 else None
        time, rows, text, _ = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, None, timestep_seq_len=times
        )
        rows = rows.unflatten(-1, (6, -1))                                                   # [B, 6, D] or [B, N, 6, D]
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, text, rows, rotary_emb)
            else:
                x = block(x, text, rows, rotary_emb)
        table = self.scale_shift_table.to(time.device)                                       # [1, 2, D]
        shift, scale = ((time.unsqueeze(-2) + table).to(x.device)).unbind(-2)                # [B, D] or [B, N, D]
        how = {"grid": grid, "patch": patch, "eps": self.norm_out.eps, "impl": impl}
        sample = final_layer(x, shift, scale, self.proj_out.weight, self.proj_out.bias, **how)
        if not return_dict:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    return forward


# AutoencoderKLWan


def _autoencoder(model: nn.Module, impl: str) -> Iterator[Plan]:
    """Each norm does its SiLU as well, and the SiLU that follows hands its input on."""
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    owners = {
        wan.WanResidualBlock: ("norm1", "norm2"),
        wan.WanEncoder3d: ("norm_out",),
        wan.WanDecoder3d: ("norm_out",),
    }
    for name, module in model.named_modules():
        for cls, norms in owners.items():
            if isinstance(module, cls):
                reason = _why_not_pair(module, cls, norms, wan.WanRMS_norm)
                swaps = [bind(getattr(module, n), lambda self, x: layers.activate(self, x, impl)) for n in norms]
                swaps.append(bind(module.nonlinearity, lambda self, x: x))
                yield _step(name, ("norm_silu",), reason, *swaps)


def _why_not_pair(module: nn.Module, cls: type, norms: tuple[str, ...], norm: type) -> str | None:
    if type(module).forward is not cls.forward:
        return f"{type(module).__name__} has a forward of its own, not that of {cls.__name__}"
    if reason := _unlike(module, nonlinearity=(nn.SiLU,), **{name: (norm,) for name in norms}):
        return reason
    kinds = [(module.nonlinearity, nn.SiLU), *((getattr(module, name), norm) for name in norms)]
    reasons = [reason for child, kind in kinds if (reason := why_not_rebind(child, kind))]
    return reasons[0] if reasons else None
