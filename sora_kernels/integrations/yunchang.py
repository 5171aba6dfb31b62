"""A ring "sora" for yunchang (long-context-attention): `attention_forward` and `attention_backward` block by block.

    from sora_kernels.integrations import yunchang
    yunchang.register()
    attention = LongContextAttention(ring_impl_type="sora")  # after set_seq_parallel_pg, as with its own rings
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention import attention_backward, attention_forward, merge_attention
from . import _host

NAME = "sora"


def register() -> None:
    """Add "sora" to yunchang's table of rings. Forward and deterministic backward, on CPU and GPU, in fp32 too.

    softmax_scale and causal are served (the tokens of rank r follow those of rank r − 1, as in its ring "basic"), and
    fewer key heads than query heads. Refused by ValueError: dropout, window_size, softcap, alibi_slopes and
    return_attn_probs. `attn_type` and `attn_processor` choose among the host's kernels, and nothing here.

    Raises ImportError where yunchang is missing or older than 0.6.
    """
    _host.require("yunchang", "yunchang", "0.6", "a ring of its sequence parallelism")
    from yunchang.hybrid.utils import RING_IMPL_DICT

    RING_IMPL_DICT[NAME] = ring_attention


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: object = None,
    attn_type: object = None,
    attn_processor: object = None,
) -> Tensor:
    """Attention of the queries here over the keys of all ranks of `group`; [B, S, H, E], the signature of the host."""
    refused = {
        "dropout_p": dropout_p != 0,
        "window_size": tuple(window_size) != (-1, -1),
        "softcap": softcap not in (0, None),
        "alibi_slopes": alibi_slopes is not None,
        "return_attn_probs": bool(return_attn_probs),
    }
    if names := [name for name, given in refused.items() if given]:
        raise ValueError(f"ring_impl_type 'sora' does not serve {', '.join(names)}; use another ring of yunchang")
    return _Ring.apply(q, k, v, softmax_scale, causal, group)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, causal, group):
        merged = None
        for how, pair in _blocks(torch.stack([k, v]), causal, group):
            if how is not None:
                out, lse = attention_forward(q, *pair, scale=scale, **how)
                part = out.to(lse.dtype), lse
                merged = part if merged is None else merge_attention(merged, part)
        out, lse = merged[0].to(q.dtype), merged[1]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.constants = scale, causal, group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        scale, causal, group = ctx.constants
        dq, dpair = torch.zeros_like(q, dtype=lse.dtype), torch.zeros_like(torch.stack([k, v]), dtype=lse.dtype)
        for how, pair in _blocks(torch.stack([k, v]), causal, group):
            if how is not None:
                grads = attention_backward(dout, q, *pair, out, lse, scale=scale, **how)
                dq += grads[0]
                dpair += torch.stack(grads[1:])
            dpair = _pass_on(dpair, group)()  # after as many hops as ranks it is where its keys are
        return dq.to(q.dtype), *(grad.to(k.dtype) for grad in dpair), None, None, None


def _blocks(pair: Tensor, causal: bool, group):
    """(how its keys are seen, or None; its k and v) for the block of each rank, the next one on its way meanwhile."""
    rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    for step in range(world):
        arrived = _pass_on(pair, group) if step + 1 < world else None
        owner = (rank - step) % world
        itself = {"grid": (pair.shape[2], 1, 1), "causal": "frame"}
        yield None if causal and owner > rank else itself if causal and owner == rank else {}, pair
        pair = arrived() if arrived else pair


def _pass_on(tensor: Tensor, group):
    """Send to the next rank; a function that waits for what the one before has sent."""
    from yunchang.ring.utils import RingComm

    comm = RingComm(group)
    received = comm.send_recv(tensor.contiguous())
    comm.commit()

    def arrived() -> Tensor:
        comm.wait()
        return received

    return arrived
