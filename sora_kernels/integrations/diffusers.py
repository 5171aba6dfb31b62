"""diffusers' Wan models through our operations: which step of theirs is which operation of ours.

Theirs upcasts to fp32 around every norm, modulation and gate and rounds once after it; so do our operations inside.
Source: diffusers 0.36 to 0.42, models/transformers/transformer_wan.py and models/autoencoders/autoencoder_kl_wan.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.autoencoders import autoencoder_kl_wan as autoencoder
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import layers
from .._check import in_context_parallel
from ..attention import spacetime_attention
from ..modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from ..patchify import final_layer
from ..qknorm_rope import qk_norm_rope
from .patch import Plan, Step, Swap, bind, is_hooked, why_not_rebind

_BLOCK = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")
_NORM = (FP32LayerNorm,)


def plan(model: nn.Module, impl: str, rounding: str) -> tuple[list[Plan], tuple[str, ...]]:
    """The steps of a WanTransformer3DModel or an AutoencoderKLWan, and what of it is never replaced."""
    if isinstance(model, WanTransformer3DModel):
        kept = "projections, feed-forward and embeddings: matrix products, PyTorch's own"
        return list(_transformer(model, impl, rounding)), (kept,)
    kept = "convolutions and resampling: their caches between chunks are diffusers' own"
    return list(_autoencoder(model, impl)), (kept, "attention of a single head over a frame: PyTorch's own")


def example(model: nn.Module) -> tuple[Any, ...]:
    """Small random inputs that fit the model's config."""
    generator, config = torch.Generator().manual_seed(0), model.config

    def draw(like: nn.Module, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(like.weight)

    if not isinstance(model, WanTransformer3DModel):
        side = 2 * model.spatial_compression_ratio
        return (draw(model.encoder.conv_in, 1, 3, 5, side, side).tanh(),)
    pt, ph, pw = config.patch_size
    latents = draw(model.patch_embedding, 1, config.in_channels, 3 * pt, 4 * ph, 6 * pw)
    times = torch.tensor([500.0], device=latents.device)
    text = draw(model.patch_embedding, 1, 512 if config.added_kv_proj_dim else 16, config.text_dim)
    if config.image_dim is None:
        return latents, times, text
    return latents, times, text, draw(model.patch_embedding, 1, config.pos_embed_seq_len or 257, config.image_dim)


def sample(model: nn.Module, steps: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Latents after so many Euler steps of the flow from the noise of a seed to t = 0, all else as in the inputs.

    None for a model that does not predict the velocity of its own input. Where the input has more channels than the
    output, those after them hold what the sample is conditioned on, and stay.
    """
    if not isinstance(model, WanTransformer3DModel):
        return None
    call = inspect.signature(model.forward).bind(*inputs, **kwargs)
    given, times = call.arguments["hidden_states"], call.arguments["timestep"]
    channels = model.config.out_channels
    if given.shape[1] < channels:
        return None
    x = torch.randn((given.shape[0], channels, *given.shape[2:]), generator=torch.Generator().manual_seed(0))
    x = x.to(given.device)
    call.arguments["return_dict"] = False
    for step in range(steps):
        call.arguments["hidden_states"] = torch.cat([x.to(given.dtype), given[:, channels:]], 1)
        call.arguments["timestep"] = torch.full_like(times, 1000 * (1 - step / steps))
        x = x - model(*call.args, **call.kwargs)[0].float() / steps
    return x


def _step(where: str, ops: tuple[str, ...], reason: str | None, *swaps: Swap) -> Plan:
    return Plan(Step(where, ops, reason), () if reason else swaps)


def _why_not_read(owner: nn.Module, **kinds: tuple[type[nn.Module], ...]) -> str | None:
    """None where nothing would be missed if the parameters of these children were read and they not called.

    Asked again at each call: hooks, offloading, FSDP or a wrapper may have come after the patch. Then the host's own
    step runs.
    """
    for name, types in kinds.items():
        child = owner._modules[name]
        if type(child) not in types:
            return f"{name} is a {type(child).__name__}, not {' or '.join(t.__name__ for t in types)}"
        if is_hooked(child):
            return f"{name} has hooks, which a fused operation would not run"
    return None


# WanTransformer3DModel


def _transformer(model: nn.Module, impl: str, rounding: str) -> Iterator[Plan]:
    embedding = model.patch_embedding
    reason = why_not_rebind(embedding, nn.Conv3d) or layers.why_not_embed(embedding)
    yield _step("patch_embedding", ("patch_embed3d",), reason, bind(embedding, _embed, impl))

    for name, module in model.named_modules():
        if isinstance(module, WanTransformerBlock):
            reason = why_not_rebind(module, WanTransformerBlock) or _why_not_block(module)
            yield _step(name, _BLOCK, reason, bind(module, _block_forward, impl))
        elif isinstance(module, WanAttention):
            reason = None
            if type(module).forward is not WanAttention.forward:
                reason = f"{type(module).__name__} has a forward of its own, not that of WanAttention"
            elif type(module.processor) is not WanAttnProcessor:
                reason = f"its processor is a {type(module.processor).__name__}, set by someone else"
            processor = Swap(module, WanProcessor(impl, rounding, module.processor), processor=True)
            ops = ("qk_norm_rope", "spacetime_attention")
            yield _step(name, ops, reason or _why_not_attention(module), processor)

    reason = why_not_rebind(model, WanTransformer3DModel) or _why_not_final(model)
    yield _step("norm_out, proj_out", ("final_layer",), reason, bind(model, _model_forward, impl))


def _why_not_block(block: nn.Module) -> str | None:
    return _why_not_read(block, norm1=_NORM, norm2=(FP32LayerNorm, nn.Identity), norm3=_NORM)


def _why_not_attention(attn: nn.Module) -> str | None:
    if attn.add_k_proj is not None:
        return "it attends to an image as well, in a second attention of its own"
    if reason := _why_not_read(attn, norm_q=(nn.RMSNorm,), norm_k=(nn.RMSNorm,)):
        return reason
    return None if attn.norm_q.eps == attn.norm_k.eps is not None else "norm_q and norm_k differ in eps, or have none"


def _why_not_final(model: nn.Module) -> str | None:
    if reason := _why_not_read(model, norm_out=_NORM, proj_out=(nn.Linear,)):
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


class WanProcessor:
    """Attention processor of a WanAttention: projections, then QK-norm with rotary embedding, then attention.

    A mask, diffusers' context parallelism, an attention backend other than its default (`set_attention_backend`,
    `attention_backend`, DIFFUSERS_ATTN_BACKEND) and torch's `context_parallel` are served by diffusers' own dispatch;
    the norm and the rotation before it stay ours. Where the norms must be called, the processor that was replaced runs.
    """

    def __init__(self, impl: str, rounding: str, replaced: WanAttnProcessor) -> None:
        self.impl = impl
        self.rounding = rounding  # where no gradient is recorded
        self.replaced = replaced

    @property
    def _attention_backend(self) -> AttentionBackendName | None:  # diffusers reads and sets these two
        return self.replaced._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: AttentionBackendName | None) -> None:
        self.replaced._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.replaced._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.replaced._parallel_config = config

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
        norms["rounding"] = "once" if torch.is_grad_enabled() else self.rounding
        q, k = qk_norm_rope(q, k, **norms, eps=attn.norm_q.eps, impl=self.impl)              # [B, S, H, E]
        backend, parallel = self._attention_backend, self._parallel_config
        if attention_mask is None and parallel is None and _is_default(backend) and not in_context_parallel():
            out = spacetime_attention(q, k, v, impl=self.impl)
        else:
            parallel = parallel if encoder_hidden_states is None else None
            out = dispatch_attention_fn(
                q, k, v, attn_mask=attention_mask, backend=backend, parallel_config=parallel
            )  # fmt: skip
        return attn.to_out[1](attn.to_out[0](out.flatten(2).type_as(q)))


def _is_default(backend: AttentionBackendName | None) -> bool:
    """Nobody has chosen a backend: the processor has none, and the process has the one that diffusers starts with."""
    return backend is None and _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


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


# AutoencoderKLWan


def _autoencoder(model: nn.Module, impl: str) -> Iterator[Plan]:
    """Each norm does its SiLU as well, and the SiLU that follows hands its input on."""
    owners = {
        autoencoder.WanResidualBlock: ("norm1", "norm2"),
        autoencoder.WanEncoder3d: ("norm_out",),
        autoencoder.WanDecoder3d: ("norm_out",),
    }
    for name, module in model.named_modules():
        for cls, norms in owners.items():
            if isinstance(module, cls):
                reason = _why_not_pair(module, cls, norms)
                fused = tuple(getattr(module, child) for child in (*norms, "nonlinearity"))
                swaps = [bind(norm, _norm_silu, impl, fused) for norm in fused[:-1]]
                yield _step(name, ("norm_silu",), reason, *swaps, bind(fused[-1], _already_activated, fused))


def _why_not_pair(module: nn.Module, cls: type, norms: tuple[str, ...]) -> str | None:
    if type(module).forward is not cls.forward:
        return f"{type(module).__name__} has a forward of its own, not that of {cls.__name__}"
    kinds = {name: autoencoder.WanRMS_norm for name in norms} | {"nonlinearity": nn.SiLU}
    if reason := _why_not_read(module, **{name: (kind,) for name, kind in kinds.items()}):
        return reason
    reasons = [reason for name, kind in kinds.items() if (reason := why_not_rebind(getattr(module, name), kind))]
    return reasons[0] if reasons else None


def _norm_silu(norm: nn.Module, impl: str, fused: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    return type(norm).forward(norm, x) if any(map(is_hooked, fused)) else layers.activate(norm, x, impl)


def _already_activated(silu: nn.Module, fused: tuple[nn.Module, ...], x: Tensor) -> Tensor:
    return type(silu).forward(silu, x) if any(map(is_hooked, fused)) else x
