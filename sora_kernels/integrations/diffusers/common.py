"""What the families of diffusers' models share: reasons to leave a step, processors, inputs and a sampling run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn

from ..._check import in_context_parallel
from ...attention import spacetime_attention
from ..patch import How, Plan, Swap, is_hooked


def why_not_read(owner: nn.Module, **kinds: tuple[type[nn.Module], ...]) -> str | None:
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


def draw(like: nn.Module, *sizes: int, generator: torch.Generator) -> Tensor:
    """Standard normal values of the dtype and device of a module's weight."""
    return torch.randn(sizes, generator=generator).to(like.weight)


class Processor:
    """An attention processor of ours in place of `replaced`, which runs whatever ours does not take.

    The backend and the parallel configuration that diffusers sets on a processor are those of the replaced one.
    """

    def __init__(self, how: How, replaced: Any) -> None:
        self.how = how
        self.replaced = replaced

    @property
    def _attention_backend(self) -> AttentionBackendName | None:
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, crossing: bool = False) -> Tensor:
        """Attention [B, S, H, E]. A mask, diffusers' context parallelism, an attention backend other than its default
        (`set_attention_backend`, `attention_backend`, DIFFUSERS_ATTN_BACKEND) and torch's `context_parallel` are
        served by diffusers' own dispatch."""
        backend, parallel = self._attention_backend, self._parallel_config
        ours = mask is None and parallel is None and is_default(backend) and not in_context_parallel()
        if ours and not self.how.why_not("spacetime_attention"):
            return spacetime_attention(q, k, v, impl=self.how.impl)
        parallel = None if crossing else parallel
        return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend, parallel_config=parallel)


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
) -> Tensor | None:
    """Latents after so many Euler steps of the flow from the noise of a seed to t = 0, all else as in the inputs.

    `channels` is how many the output has along `axis`. Where the input has more, those after them hold what the sample
    is conditioned on, and stay; where it has fewer, the model does not predict the velocity of its input: None.
    """
    call = inspect.signature(model.forward).bind(*inputs, **kwargs)
    given, times = call.arguments["hidden_states"], call.arguments["timestep"]
    if given.shape[axis] < channels:
        return None
    x, condition = given.split([channels, given.shape[axis] - channels], axis)
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(given.device)
    call.arguments["return_dict"] = False
    for step in range(steps):
        call.arguments["hidden_states"] = torch.cat([x.to(given.dtype), condition], axis)
        call.arguments["timestep"] = torch.full_like(times, time(1 - step / steps))
        x = x - model(*call.args, **call.kwargs)[0].float() / steps
    return x
