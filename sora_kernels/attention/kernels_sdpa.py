"""Attention without a mask by PyTorch's own flash kernel: its products, behind our contract.

On a GPU it takes bfloat16 and float16 and, in its backward, adds parts in a fixed order where two runs must agree. On a
CPU it takes fp32 as well; there one order is all it has. Called below autograd, so that the log-sum-exp comes with the
output and has a gradient: PyTorch's formula leaves that out.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from . import reference

_SETTINGS = threading.Lock()

DENSE = None, None, (1, 1, 1), (1, 1, 1), (0, 0, 0), 0, 0, False  # the mode, as the private ops take it


def spacetime_attention_fwd(q, k, v, kv_lens, *args) -> None:
    *_, scale, out, lse = args
    result, sums, *_ = _forward(q, k, v, scale)
    out.copy_(result.transpose(1, 2))
    lse.copy_(sums)


def spacetime_attention_bwd(dout, dlse, q, k, v, out, lse, kv_lens, *args) -> None:
    """With P the softmax, dS = P ∘ (dO vᵀ − rowsum(dO ∘ O) + dlse).

    The last term is P scaled by row, so its dq is that of attention whose values are the keys, and its dk is the dv of
    attention whose dO is q scaled by row: one forward and one backward more, where the log-sum-exp was used.
    """
    *_, scale, deterministic, dq, dk, dv = args
    grads = _backward(dout, q, k, v, out, lse, scale, deterministic)
    if dlse is not None:
        rows = scale * dlse.transpose(1, 2)[..., None]
        of_keys = _forward(q, k, k, scale)[0].transpose(1, 2)
        of_queries = _backward((rows * q).to(q.dtype), q, k, v, out, lse, scale, deterministic)[2]
        grads[0] = grads[0].float() + rows * of_keys
        grads[1] = grads[1].float() + of_queries.float()
    for destination, grad in zip((dq, dk, dv), grads, strict=True):
        if destination is not None:
            destination.copy_(grad)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple:
    """out [B, H, Sq, E], its log-sum-exp [B, H, Sq] and, on a GPU, what the backward wants besides."""
    operands = [_heads_first(t) for t in (q, k, v)]
    if q.is_cpu:
        if not _within_limits(q, k, v, scale):
            out, lse = reference.spacetime_attention(q, k, v, None, *DENSE, scale)
            return out.transpose(1, 2), lse
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*operands, scale=scale)
    return torch.ops.aten._scaled_dot_product_flash_attention(*operands, scale=scale)


def _within_limits(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether every score is finite, and every value: else PyTorch's kernel on a CPU may give 0 in the place of NaN."""
    limit = (torch.finfo(torch.float32).max / (q.shape[-1] * max(scale, 1))) ** 0.5
    return all(max(-low.item(), high.item()) <= limit for low, high in map(torch.aminmax, (q, k, v)))


def _backward(dout, q, k, v, out, lse, scale: float, deterministic: bool) -> list[Tensor]:
    operands = [_heads_first(t) for t in (dout, q, k, v, out)]
    if q.is_cpu:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *operands, lse, 0.0, False, scale=scale
        )
    else:
        state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
        with _fixed_order(deterministic):
            grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                *operands, lse, None, None, q.shape[1], k.shape[1], 0.0, False, state, state[:0], scale=scale
            )
    return [grad.transpose(1, 2) for grad in grads]


def _heads_first(t: Tensor) -> Tensor:
    """[B, H, S, E]; the GPU's kernel loads 16 bytes at a time and does not look whether they are aligned."""
    size = 16 // t.element_size()
    if not t.is_cpu and (t.data_ptr() % 16 or any(stride % size for stride in t.stride()[:-1])):
        t = t.clone(memory_format=torch.contiguous_format)
    return t.transpose(1, 2)


@contextlib.contextmanager
def _fixed_order(wanted: bool) -> Iterator[None]:
    """PyTorch asks the process, not the call, whether sums must keep an order; one thread at a time says so."""
    if not wanted or torch.are_deterministic_algorithms_enabled():
        yield
        return
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with _SETTINGS:
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over every buffer, for nothing here
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill
