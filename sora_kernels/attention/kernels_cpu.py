"""Dense attention on the CPU through PyTorch's own flash attention, which keeps no score matrix in memory."""

from __future__ import annotations

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _fold(x: Tensor, heads: int) -> Tensor:
    """``[B, S, H, E]`` -> ``[B, heads, H/heads * S, E]``: the query heads that share a key head become its queries.

    Rows of dense attention do not know of each other, so k and v are never repeated and their gradients come summed.
    """
    return x.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfold(x: Tensor, length: int) -> Tensor:
    """The inverse of :func:`_fold`."""
    return x.unflatten(2, (-1, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def spacetime_attention_fwd(q, k, v, kv_lens, grids, window, stride, chunk, sink, text_len, text_first, scale, out, lse):
    if out.numel() == 0 or k.shape[1] == 0:
        out.zero_()
        lse.fill_(float("-inf"))
        return
    result, log_sum = _forward(_fold(q, k.shape[2]), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    out.copy_(_unfold(result, q.shape[1]))
    lse.copy_(log_sum.unflatten(2, (-1, q.shape[1])).flatten(1, 2))


def spacetime_attention_bwd(
    grad_out, grad_lse, q, k, v, out, lse, kv_lens, grids, window, stride, chunk, sink, text_len, text_first, scale,
    grad_q, grad_k, grad_v,
):  # fmt: skip
    if out.numel() == 0 or k.shape[1] == 0:
        grads = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    else:
        heads = k.shape[2]
        dq, dk, dv = _backward(
            _fold(grad_out, heads), _fold(q, heads), k.transpose(1, 2), v.transpose(1, 2), _fold(out, heads),
            lse.unflatten(1, (heads, -1)).flatten(2, 3), 0.0, False, scale=scale,
        )  # fmt: skip
        grads = (_unfold(dq, q.shape[1]), dk.transpose(1, 2), dv.transpose(1, 2))
    for destination, grad in zip((grad_q, grad_k, grad_v), grads, strict=True):
        if destination is not None:
            destination.copy_(grad)
