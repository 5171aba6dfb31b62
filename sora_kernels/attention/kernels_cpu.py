"""Dense attention on the CPU through PyTorch's own flash attention, which keeps no score matrix in memory."""

from __future__ import annotations

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _fold(x: Tensor, heads: int) -> Tensor:
    """`[B, S, H, E]` -> `[B, heads, H/heads * S, E]`: query heads that share a key head become its queries.

    Rows of dense attention do not know of each other, so k and v need not be repeated, and their gradients come
    summed. The last axis must be dense: the kernel below does not look at its stride.
    """
    x = x.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return x if x.stride(-1) == 1 else x.contiguous()


def _unfold(x: Tensor, length: int) -> Tensor:
    """The inverse of `_fold`."""
    return x.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def spacetime_attention_fwd(q, k, v, *args) -> None:
    *_, scale, out, lse = args
    if out.numel() == 0 or k.shape[1] == 0:
        out.zero_()
        lse.fill_(float("-inf"))
        return
    heads = k.shape[2]
    result, log_sum = _forward(_fold(q, heads), _fold(k, heads), _fold(v, heads), scale=scale)
    out.copy_(_unfold(result, q.shape[1]))
    lse.copy_(log_sum.unflatten(2, (-1, q.shape[1])).flatten(1, 2))


def spacetime_attention_bwd(dout, dlse, q, k, v, out, lse, *args) -> None:
    *_, scale, dq, dk, dv = args
    if out.numel() == 0 or k.shape[1] == 0:
        grads = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    else:
        heads = k.shape[2]
        folded = [_fold(t, heads) for t in (dout, q, k, v, out)]
        log_sum = lse.unflatten(1, (heads, -1)).flatten(2, 3)
        grads = _backward(*folded, log_sum, 0.0, False, scale=scale)
        grads = [_unfold(g, t.shape[1]) for g, t in zip(grads, (q, k, v), strict=True)]
    for destination, grad in zip((dq, dk, dv), grads, strict=True):
        if destination is not None:
            destination.copy_(grad)
