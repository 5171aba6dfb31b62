"""Attention over spacetime tokens: dense, windowed, causal, packed, with text, all through one definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _check, _dispatch, _library
from . import reference
from .plan import check_kv_lens, resolve


def spacetime_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int] | None = None,
    grids: Sequence[Sequence[int]] | None = None,
    window: Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    causal: str | int | None = None,
    sink: int = 0,
    text_len: int = 0,
    text_at: str = "end",
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ + mask) v, where the mask follows from the tokens' places in space and time

    q        [B, Sq, H, E], float32, bfloat16, float16 (float64 in `reference`), any strides
    k, v     [B, Sk, Hk, E], Hk a divisor of H: H/Hk consecutive query heads share a key head. dtype and device of q
    grid     (T, H, W) of the keys' video tokens, in t-major order. None: plain attention of any Sq and Sk. Sq may hold
             fewer frames than Sk: its frames are then the last ones (a KV cache); both hold the `text_len` text tokens
    grids    [(T, H, W), ...] instead of grid, with B = 1: clips packed one after another that do not see each other
    window   (wt, wh, ww) in tokens. On an axis of length L a query sees exactly min(w, L) keys: from
             clamp(leader − w//2, 0, L − w) on. The leader of query i is min((i//s)·s + s//2, L − 1)
    stride   s, an int or one per axis. 1: neighbourhood attention; the side of a tile: sliding-tile attention
    causal   "frame", or n for chunks of n frames: a query sees its own and earlier chunks. With window, the time
             window is the wt frames that end with the last frame of the query's chunk; along t the chunk takes the
             place of the stride's group
    sink     the first n frames (of each clip) are seen whole whatever the window; causal still holds
    text_len text tokens after (text_at="end") or before ("start") the video: they see and are seen by everything
    kv_lens  [B] int32 or int64: only the first kv_lens[b] keys are real. The others are never read as numbers: they
             may hold NaN, and their gradients are 0. Values are checked on the CPU only (no host synchronisation)
    scale    None: E**−0.5
    return_lse     also return the natural log of Σ exp(scale · q kᵀ) over the keys seen; differentiable
    deterministic  None or True: two runs agree bit for bit. False allows an implementation to trade that for speed;
             none does so far

    Returns [B, Sq, H, E] in q's dtype, dense (and LSE [B, H, Sq] in fp32; fp64 for fp64). A query that sees nothing
    gives 0 and LSE −inf, and no gradient. Scores, softmax and sums are fp32, rounded once at the store; error against
    fp64 ≤ 2 × that of plain PyTorch in the same dtype plus one rounding, for the output and every gradient. No
    atomics. Second derivatives: differentiate `sora_kernels.attention.reference`.

    Implementations: `reference` runs every mode, in chunks of queries, so that memory grows with S, not S². `cpu` is
    PyTorch's flash attention and runs the dense mode without kv_lens and return_lse; there "plain PyTorch" is itself:
    in fp32, gradients were measured at up to 5 × the error of an explicit softmax in fp32 (bf16, fp16: within 2 ×).

    Raises TypeError or ValueError naming the argument; `Unavailable` where an explicit impl cannot run.
    Sources: neighbourhood attention with stride, arXiv 2504.16922; sliding tiles, arXiv 2502.04507; sinks,
    arXiv 2309.17453.
    """
    op = "spacetime_attention"
    _check_heads(op, q, k, v)
    mode = resolve(op, q.shape[1], k.shape[1], grid, grids, window, stride, causal, sink, text_len, text_at)
    if grids is not None and q.shape[0] != 1:
        raise ValueError(f"{op}: grids packs the clips into one sequence, so B must be 1; got {q.shape[0]}")
    check_kv_lens(op, kv_lens, k.shape[1])
    if kv_lens is not None:
        _check.same_device(op, q, {"kv_lens": kv_lens}, "q")
        if kv_lens.shape[0] != q.shape[0]:
            raise ValueError(
                f"{op}: kv_lens must have one length per batch, [{q.shape[0]}]; got {_check.shape_of(kv_lens)}"
            )
    _check.choice(op, "deterministic", deterministic, (None, True, False))
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else float(scale)
    if not abs(scale) < math.inf:
        raise ValueError(f"{op}: scale must be a finite number; got {scale}")
    dense = not mode[0] and kv_lens is None and not return_lse

    def limits(impl: str) -> str | None:
        if impl == "cpu" and not dense:
            return "cpu runs dense attention only, without window, causal, grids, kv_lens or return_lse"
        return None

    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    impl = _dispatch.choose(op, impl, q, grad=grad, limits=limits)
    out, lse = (_SpacetimeAttention.apply if grad else _spacetime_attention)(q, k, v, kv_lens, *mode, scale, impl)
    return (out, lse) if return_lse else out


# Validation


def _check_heads(op, q, k, v) -> None:
    _check.tensor(op, "q", q, "[B, Sq, H, E]", ndim=4)
    _check.tensor(op, "k", k, "[B, Sk, Hk, E]", ndim=4)
    B, _, H, E = q.shape
    heads = k.shape[2]
    if k.shape[0] != B or k.shape[3] != E:
        raise ValueError(f"{op}: k must be [B, Sk, Hk, E] with B={B} and E={E} from q; got {_check.shape_of(k)}")
    if heads != H and (heads == 0 or H % heads):
        raise ValueError(f"{op}: the heads of k and v must divide the {H} heads of q; got {heads}")
    if k.dtype != q.dtype:
        raise TypeError(f"{op}: k must have q's dtype {q.dtype}; got {k.dtype}; cast it with .to()")
    _check.same_device(op, q, {"k": k}, "q")
    _check.like(op, "v", v, k, "k")


# The private ops

_MODE = (
    "Tensor? kv_lens, SymInt[] grids, SymInt[] window, SymInt[] stride, SymInt chunk, SymInt sink, "
    "SymInt text_len, bool text_first, float scale"
)
_CPU = "sora_kernels.attention.kernels_cpu:spacetime_attention"


def _forward(q, k, v, *args) -> None:
    *mode, out, lse = args
    for destination, result in zip((out, lse), reference.spacetime_attention(q, k, v, *mode), strict=True):
        destination.copy_(result)


def _backward(dout, dlse, q, k, v, out, lse, *args) -> None:
    *mode, dq, dk, dv = args
    grads = reference.spacetime_attention_backward(dout, dlse, q, k, v, *mode)
    for destination, grad in zip((dq, dk, dv), grads, strict=True):
        if destination is not None:
            destination.copy_(grad)


_library.define(
    "spacetime_attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_MODE}, Tensor(a!) out, Tensor(b!) lse) -> ()",
    reference=_forward,
    impls={"triton": "sora_kernels.attention.kernels_forward:spacetime_attention_fwd", "cpu": f"{_CPU}_fwd"},
)
_library.define(
    "spacetime_attention_bwd",
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_MODE}, "
    "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv) -> ()",
    reference=_backward,
    impls={"triton": "sora_kernels.attention.kernels_backward:spacetime_attention_bwd", "cpu": f"{_CPU}_bwd"},
)


def _spacetime_attention(q, k, v, *args) -> tuple[Tensor, Tensor]:
    *mode, impl = args
    B, Sq, H, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Sq), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    _library.call("spacetime_attention_fwd", impl)(q, k, v, *mode, out, lse)
    return out, lse


class _SpacetimeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, kv_lens, *args):
        ctx.set_materialize_grads(False)
        out, lse = _spacetime_attention(q, k, v, kv_lens, *args)
        ctx.save_for_backward(q, k, v, out, lse, kv_lens)
        ctx.constants = args
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, kv_lens = ctx.saved_tensors
        *mode, impl = ctx.constants
        grads = [
            torch.empty(t.shape, dtype=t.dtype, device=t.device) if needed else None
            for t, needed in zip((q, k, v), ctx.needs_input_grad[:3], strict=True)
        ]
        dout = torch.zeros_like(out) if dout is None else dout
        _library.call("spacetime_attention_bwd", impl)(dout, dlse, q, k, v, out, lse, kv_lens, *mode, *grads)
        return *grads, None, *(None for _ in ctx.constants)
