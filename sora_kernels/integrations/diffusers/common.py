"""What the families of diffusers' models share: reasons to leave a step, processors, inputs and a sampling run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ... import _dispatch, layers
from ..._check import in_context_parallel
from ...attention import spacetime_attention
from ...modulation import norm_modulate
from ...qknorm_rope import qk_norm_rope
from ..patch import How, Plan, Swap, is_hooked, named


def why_not_read(owner: nn.Module, **kinds: tuple[type[nn.Module], ...]) -> str | None:
    """None where nothing would be missed if the parameters of these children were read and they not called.

    Asked again at each call: hooks, offloading, FSDP or a wrapper may have come after the patch. Then the host's own
    step runs.
    """
    for name, types in kinds.items():
        child = owner._modules[name]
        if type(child) not in types:
            return f"{name} is a {named(type(child), *types)}, not {' or '.join(t.__name__ for t in types)}"
        if is_hooked(child):
            return f"{name} has hooks, which a fused operation would not run"
    return None


def why_not_rms_norms(attn: nn.Module) -> str | None:
    """None where `norm_q` and `norm_k` of an attention are PyTorch's RMSNorms of one eps."""
    if reason := why_not_read(attn, norm_q=(nn.RMSNorm,), norm_k=(nn.RMSNorm,)):
        return reason
    return None if attn.norm_q.eps == attn.norm_k.eps is not None else "norm_q and norm_k differ in eps, or have none"


def why_not_norms(attn: nn.Module, names: tuple[str, ...]) -> str | None:
    """None where these norms, of queries and keys in turn, are diffusers' RMSNorms, two by two of one eps."""
    if reason := why_not_read(attn, **dict.fromkeys(names, (RMSNorm,))):
        return reason
    norms = [getattr(attn, name) for name in names]
    return None if all(q.eps == k.eps for q, k in zip(norms[::2], norms[1::2], strict=True)) else "norms differ in eps"


def why_not_projection(owner: nn.Module, name: str) -> str | None:
    """None where this linear layer's weight can be read as a plain tensor."""
    if reason := why_not_read(owner, **{name: (nn.Linear,)}):
        return reason
    weight = getattr(owner, name).weight
    return f"the weight of {name} is a {type(weight).__name__}" if is_traceable_wrapper_subclass(weight) else None


def affine(norm: nn.Module) -> dict[str, Any]:
    """A norm's parameters as our operations take them; any may be absent."""
    return {"weight": norm.weight, "bias": getattr(norm, "bias", None), "eps": norm.eps}


def in_16_bits(how: How) -> dict[str, Any]:
    """What the modulation family is told where the host computes a chain of it in x's dtype, rounding at each step. Its
    C++ and CUDA kernels round once."""
    impl = _dispatch.FORCED if how.impl == "auto" else how.impl
    return {"rounding": "once" if impl in ("cpu", "cuda") else how.rounding_now(), "impl": how.impl}


def adaln(table: Tensor, temb: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """The n rows temb + table of adaLN-single, temb [B, F, n * D], table [n, D]: rows and, apart, tables to be added.

    Where a clip has one row each, it is added here, and rounded, as the host does; tokens' rows are left as they lie.
    """
    rows = temb.unflatten(-1, table.shape)
    if temb.shape[1] == 1:
        return (table.to(temb.device) + rows).unbind(2), (None,) * len(table)
    return rows.unbind(2), table.unbind(0)


def of_clips(t: Tensor, x: Tensor) -> Tensor:
    """t [B or 1, ...] for the clips of x [B, ...], which one text or image may serve all: hosts broadcast."""
    return t.expand(len(x), *t.shape[1:]) if len(t) == 1 else t


def learned(tables: tuple[Tensor, Tensor] | None) -> bool:
    """Whether gradients of rotary tables are asked for: to our operations they are constants."""
    return tables is not None and torch.is_grad_enabled() and any(t.requires_grad for t in tables)


def padding_last(mask: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, L, D] of which a mask [B, L] is true before the others, in their order, and how many those are.

    For tokens that know nothing of their place it is the same text, whose attention needs no mask. Nothing is read from
    the device.
    """
    mask = mask.bool()
    order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return text.take_along_dim(order.unsqueeze(-1), 1), mask.sum(1, dtype=torch.int32)


def lengths(
    blocks: nn.ModuleList, takes: Callable[[nn.Module], bool], mask: Tensor | None, text: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The text, its padding last, and for its mask [B, L] how many tokens each clip has [B], where every block `takes`
    that. Else both as they are."""
    if mask is None or mask.ndim != 2 or mask.is_floating_point() or not all(map(takes, blocks)):
        return text, mask
    text, lens = padding_last(mask, text)
    return text, torch.where(lens == 0, text.shape[1], lens)  # without a token theirs adds one number to all scores


def first(lens: Tensor, tokens: int) -> Tensor:
    """Whether a token is one of the first lens [B]: [B, tokens]."""
    return torch.arange(tokens, device=lens.device) < lens.unsqueeze(1)


def embed_frames(conv: nn.Conv2d, impl: str, x: Tensor) -> Tensor:
    """A convolution that cuts frames [N, C, H, W] into patches."""
    return layers.embed(conv, x, impl)


def norm_continuous(self: nn.Module, how: How, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """The forward of AdaLayerNormContinuous."""
    if why_not_continuous(self):
        return type(self).forward(self, x, conditioning_embedding)
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, 1)
    return norm_modulate(x, shift, scale, **affine(self.norm), **in_16_bits(how))


def why_not_continuous(norm: nn.Module) -> str | None:
    return why_not_read(norm, norm=(nn.LayerNorm,))


def why_not_processor(attn: nn.Module, cls: type[nn.Module], standard: type) -> str | None:
    """None where `attn` runs the forward of `cls`, and its processor is the standard one."""
    if type(attn).forward is not cls.forward:
        return f"{type(attn).__name__} has a forward of its own, not that of {cls.__name__}"
    if type(attn.processor) is not standard:
        return f"its processor is a {type(attn.processor).__name__}, set by someone else"
    return None


def draw(like: nn.Module, *sizes: int, generator: torch.Generator) -> Tensor:
    """Standard normal values of the dtype and device of a module's weight."""
    return torch.randn(sizes, generator=generator).to(like.weight)


class Processor:
    """An attention processor of ours in place of `replaced`, which runs whatever ours does not take.

    The backend and the parallel configuration that diffusers sets on a processor are those of the replaced one.
    """

    crossing_is_parallel = False  # diffusers' context parallelism splits what a cross-attention attends to as well

    def __init__(self, how: How, replaced: Any) -> None:
        self.how = how
        self.replaced = replaced

    @property
    def _attention_backend(self) -> AttentionBackendName | None:  # some hosts' processors have none: nor has this one
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

    def ours(self) -> bool:
        """Whether `attend` runs our operation: nobody asked for diffusers' context parallelism, an attention backend
        other than its default (`set_attention_backend`, `attention_backend`, DIFFUSERS_ATTN_BACKEND) or torch's
        `context_parallel`."""
        parallel, backend = getattr(self, "_parallel_config", None), getattr(self, "_attention_backend", None)
        if parallel is not None or not is_default(backend) or in_context_parallel():
            return False
        return not self.how.why_not("spacetime_attention")

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        *,
        crossing: bool = False,
        **rules: Any,
    ) -> Tensor:
        """Attention [B, S, H, E]: ours where `ours()` says so and there is no mask, or `rules` say to
        `spacetime_attention` what it means; else the host's."""
        if self.ours() and (mask is None or rules):
            return spacetime_attention(q, k, v, **rules, impl=self.how.impl)
        return self.theirs(q, k, v, mask, crossing)

    def theirs(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, crossing: bool) -> Tensor:
        parallel, backend = getattr(self, "_parallel_config", None), getattr(self, "_attention_backend", None)
        parallel = None if crossing and not self.crossing_is_parallel else parallel
        return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend, parallel_config=parallel)

    def normed(self, norm_q: nn.Module, norm_k: nn.Module, q: Tensor, k: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        how |= {"q_weight": norm_q.weight, "k_weight": norm_k.weight, "eps": norm_q.eps}
        return qk_norm_rope(q, k, **how, rounding=self.how.rounding_now(), impl=self.how.impl)

    def joined(
        self,
        attn: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        text_q: Tensor,
        text_k: Tensor,
        text_v: Tensor,
        **rotary: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of video and text in one sequence; without gradients they are written there."""
        norms, text_norms = (attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k)
        v, S = torch.cat([v, text_v], 1), q.shape[1]                                         # [B, S + L, H, E]
        if torch.is_grad_enabled():
            video, text = self.normed(*norms, q, k, **rotary), self.normed(*text_norms, text_q, text_k)
            return *(torch.cat(pair, 1) for pair in zip(video, text, strict=True)), v
        joint_q, joint_k = torch.empty_like(v), torch.empty_like(v)
        self.normed(*norms, q, k, **rotary, out=(joint_q[:, :S], joint_k[:, :S]))
        self.normed(*text_norms, text_q, text_k, out=(joint_q[:, S:], joint_k[:, S:]))
        return joint_q, joint_k, v


class PlainProcessor(Processor):
    """In place of a processor that calls PyTorch's attention itself, for which diffusers chooses no backend."""

    def ours(self) -> bool:
        return not in_context_parallel() and not self.how.why_not("spacetime_attention")

    def theirs(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, crossing: bool) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def attention_steps(where: str, reason: str | None, how: How, swap: Swap) -> Iterator[Plan]:
    """The two steps of an attention: norm and rotation of queries and keys, and the attention of what comes of them."""
    norm = how.step(where, ("qk_norm_rope",), reason, swap)
    yield norm
    yield how.step(where, ("spacetime_attention",), norm.step.reason, swap)


def is_default(backend: AttentionBackendName | None) -> bool:
    """Nobody has chosen a backend: the processor has none, and the process has the one that diffusers starts with."""
    return backend is None and _AttentionBackendRegistry.get_active_backend()[0] == AttentionBackendName.NATIVE


def euler(
    model: nn.Module,
    steps: int,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    channels: int,
    axis: int = 1,
    time: Callable[[float], float] = lambda t: 1000 * t,
    to: Callable[[Tensor, Tensor, float, float], Tensor] = lambda x, velocity, t, s: x - (t - s) * velocity,
) -> Tensor | None:
    """Latents after so many steps from the noise of a seed at t = 1 to t = 0, all else as in the inputs: Euler's along
    a flow, or what `to(x, prediction, t, s)` makes of latents at t for s.

    `channels` is how many the prediction has along `axis`. Where the input has more, those after them hold what the
    sample is conditioned on, and stay; where it has fewer, the model does not predict what its input is made of: None.
    """
    call = inspect.signature(model.forward).bind(*inputs, **kwargs)
    given, times = call.arguments["hidden_states"], call.arguments["timestep"]
    if given.shape[axis] < channels:
        return None
    x, condition = given.split([channels, given.shape[axis] - channels], axis)
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(given.device)
    call.arguments["return_dict"] = False
    for step in range(steps):
        t, s = 1 - step / steps, 1 - (step + 1) / steps
        call.arguments["hidden_states"] = torch.cat([x.to(given.dtype), condition], axis)
        call.arguments["timestep"] = torch.full_like(times, time(t))
        x = to(x, model(*call.args, **call.kwargs)[0].narrow(axis, 0, channels).float(), t, s)
    return x


def ddim(noise: Tensor, clip: Tensor, s: float) -> Tensor:
    """Latents at s of a diffusion: cos φ · clip + sin φ · noise, φ = 3/2 · s."""
    return math.cos(1.5 * s) * clip + math.sin(1.5 * s) * noise


def of_noise(x: Tensor, noise: Tensor, t: float, s: float) -> Tensor:
    """A step of DDIM by a prediction of the noise."""
    return ddim(noise, (x - math.sin(1.5 * t) * noise) / math.cos(1.5 * t), s)


def of_velocity(x: Tensor, v: Tensor, t: float, s: float) -> Tensor:
    """A step of DDIM by a prediction of v = cos φ · noise - sin φ · clip."""
    cos, sin = math.cos(1.5 * t), math.sin(1.5 * t)
    return ddim(sin * x + cos * v, cos * x - sin * v, s)
