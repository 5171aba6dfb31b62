"""Spacetime attention in plain PyTorch: the specification of `spacetime_attention`.

Every mode reduces to two questions about coordinates: which box of the video does a query reach (`reach`), and does
a key lie in it (`visible`). The kernels' plans are built from the same two functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

FAR = 1 << 30  # beyond every coordinate
SCORES = 1 << 24  # scores held at a time: queries are worked off in chunks of rows


def token_table(
    length: int, grids: Sequence[Sequence[int]], text_len: int, text_first: bool, device: torch.device
) -> Tensor:
    """`[length, 7]` int64: (clip, t, h, w, T, H, W) of each token; text has clip -1, and without grids all is text.

    When `length` is shorter than the grids and the text together, the first frames are missing (a KV cache).
    """
    text = torch.full((text_len if grids else length, 7), -1, dtype=torch.int64, device=device)
    clips = []
    for clip, (T, H, W) in enumerate(grids):
        i = torch.arange(T * H * W, dtype=torch.int64, device=device)
        where = (torch.full_like(i, clip), i // (H * W), i // W % H, i % W)
        clips.append(torch.stack((*where, *(torch.full_like(i, n) for n in (T, H, W))), dim=-1))
    video = torch.cat(clips) if clips else text[:0]
    video = video[video.shape[0] - (length - text.shape[0]) :]
    return torch.cat((text, video) if text_first else (video, text))


def reach(
    queries: Tensor, window: Sequence[int], stride: Sequence[int], dilation: Sequence[int], causal: Sequence[int],
    sink: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The box `[lo, hi)` over (clip, t, h, w) that each query sees, and `kept`: it also sees all frames below it.

    `window` is empty for none. `causal`: the side of a chunk on each axis, 0 where it is not causal. Of a dilated axis
    it sees every `dilation`-th index, from lo on: its own group's, which are an axis of their own.
    """
    clip, size = queries[:, 0], queries[:, 4:]
    lo, hi, kept = [clip], [clip + 1], size[:, 0]
    for axis, (d, chunk) in enumerate(zip(dilation, causal, strict=True)):
        group, i = queries[:, 1 + axis] % d, queries[:, 1 + axis] // d
        L = (size[:, axis] - group + d - 1) // d
        first, last = torch.zeros_like(L), L
        if chunk:
            last = torch.minimum((i // chunk + 1) * chunk, L)
            kept = last if axis == 0 else kept
        s = stride[axis]
        if window and chunk:
            end = torch.maximum(torch.minimum((i // s + 1) * s, L), last)
            first = (end - window[axis]).clamp_min(0)
        elif window:
            w = L.clamp_max(window[axis])
            leader = torch.minimum(i // s * s + s // 2, L - 1)
            first = torch.minimum((leader - w // 2).clamp_min(0), L - w)
            last = first + w
        lo.append(first * d + group)
        hi.append((last - 1) * d + group + 1)
    text = (clip < 0)[:, None]
    kept = kept.clamp_max(sink).masked_fill(text[:, 0], FAR)
    return torch.stack(lo, -1).masked_fill(text, -FAR), torch.stack(hi, -1).masked_fill(text, FAR), kept


def visible(
    queries: Tensor, keys: Tensor, window: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    causal: Sequence[int], sink: int,
) -> Tensor:  # fmt: skip
    """Bool `[Sq, Sk]`: which query sees which key. Both are rows of a `token_table`."""
    lo, hi, kept = reach(queries, window, stride, dilation, causal, sink)
    clip, t = keys[:, 0], keys[:, 1]
    seen = (t < kept[:, None]) & (clip == queries[:, :1])
    box = torch.ones_like(seen)
    for axis in range(4):
        box &= (keys[:, axis] >= lo[:, axis, None]) & (keys[:, axis] < hi[:, axis, None])
    for axis, d in enumerate(dilation):
        if d > 1:
            box &= ((keys[:, 1 + axis] - queries[:, 1 + axis, None]) % d == 0) | (queries[:, :1] < 0)
    return seen | box | (clip < 0)


def masks(
    q: Tensor, k: Tensor, kv_lens: Tensor | None, grids: Sequence[int] | None, window: Sequence[int] | None,
    stride: Sequence[int], dilation: Sequence[int], causal: Sequence[int], sink: int, text_len: int, text_first: bool,
) -> Iterator[tuple[slice, Tensor | None]]:  # fmt: skip
    """Chunks of query rows and their masks, broadcastable to `[B, H, rows, Sk]`; None sees everything.

    `window` and `stride` are of all heads, or of one head after another; `window` may be None, and `grids`.
    """
    grids, window = grids or (), window or ()
    B, Sq, H, _ = q.shape
    Sk = k.shape[1]
    rows = max(1, min(Sq, SCORES // max(B * H * Sk, 1)))
    clips = [tuple(grids[i : i + 3]) for i in range(0, len(grids), 3)]
    queries = token_table(Sq, clips, text_len, text_first, q.device)
    keys = token_table(Sk, clips, text_len, text_first, q.device)
    real = None if kv_lens is None else torch.arange(Sk, device=k.device) < kv_lens.view(B, 1, 1, 1)
    for start in range(0, Sq, rows):
        part = slice(start, start + rows)
        rules = [(window[i : i + 3], stride[i : i + 3]) for i in range(0, len(window) or 3, 3)]
        seen = [visible(queries[part], keys, *rule, dilation, causal, sink) for rule in rules] if clips else []
        mask = torch.stack(seen) if clips else None
        yield part, real if mask is None else mask if real is None else mask & real


def softmax(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp over the last axis; a row that sees nothing gives 0 and -inf."""
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
    top = top.masked_fill(top == float("-inf"), 0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    return weights / total, (top + total.log()).masked_fill(empty, float("-inf")).squeeze(-1)


def widen(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, H, S, E]` in the computing dtype, k and v with q's heads; padded keys become 0 whatever they held."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(compute).transpose(1, 2) for x in (q, k, v))
    if kv_lens is not None:
        pad = torch.arange(k.shape[2], device=k.device)[:, None] >= kv_lens.view(-1, 1, 1, 1)
        k, v = k.masked_fill(pad, 0), v.masked_fill(pad, 0)
    groups = q.shape[1] // max(k.shape[1], 1)
    return q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def spacetime_attention(
    q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None, grids: Sequence[int] | None, window: Sequence[int] | None,
    stride: Sequence[int], dilation: Sequence[int], causal: Sequence[int], sink: int, text_len: int, text_first: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output in q's dtype and the natural log-sum-exp of the scaled scores in fp32 (fp64 for fp64).

    `grids` is flat, (T, H, W) after (T, H, W); None means plain attention. So are `window` and `stride`, either of
    all heads or of one head after another.
    """
    Q, K, V = widen(q, k, v, kv_lens)
    outs, lses = [Q[:, :, :0]], [Q.new_zeros(Q.shape[:2] + (0,))]
    for rows, mask in masks(q, k, kv_lens, grids, window, stride, dilation, causal, sink, text_len, text_first):
        p, lse = softmax(scale * Q[:, :, rows] @ K.mT, mask)
        outs.append(p @ V)
        lses.append(lse)
    return torch.cat(outs, 2).transpose(1, 2).to(q.dtype), torch.cat(lses, 2)


def spacetime_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None,
    grids: Sequence[int], window: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    causal: Sequence[int], sink: int, text_len: int, text_first: bool, scale: float, out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v by the formula, chunk by chunk, so that memory stays bounded.

    `dS = P * (dO V^T - rowsum(P * dO V^T) + dLSE)`, `dQ = scale dS K`, `dK = scale dS^T Q`, `dV = P^T dO`.
    With `out` and `lse`, P = exp(scores - lse) and the row sum is that of `dO * O`: they may stem from more keys.
    """
    Q, K, V = widen(q, k, v, kv_lens)
    dQ, dK, dV = torch.zeros_like(Q), torch.zeros_like(K), torch.zeros_like(V)
    G = grad_out.to(Q.dtype).transpose(1, 2)
    for rows, mask in masks(q, k, kv_lens, grids, window, stride, dilation, causal, sink, text_len, text_first):
        g, scores = G[:, :, rows], scale * Q[:, :, rows] @ K.mT
        dP = g @ V.mT
        if lse is None:
            p, _ = softmax(scores, mask)
            dS = dP - (p * dP).sum(-1, keepdim=True)
        else:
            total = lse[:, :, rows, None].to(Q.dtype)
            p = torch.exp(scores - total).masked_fill(total == float("-inf"), 0)
            p = p if mask is None else p.masked_fill(~mask, 0)
            dS = dP - (g * out.to(Q.dtype).transpose(1, 2)[:, :, rows]).sum(-1, keepdim=True)
        if grad_lse is not None:
            dS = dS + grad_lse[:, :, rows, None].to(dS.dtype)
        dS = scale * p * dS
        dQ[:, :, rows] = dS @ K
        dK += dS.mT @ Q[:, :, rows]
        dV += p.mT @ g
    groups = Q.shape[1] // max(k.shape[2], 1)
    dK, dV = (d.unflatten(1, (-1, max(groups, 1))).sum(2) for d in (dK, dV))
    return tuple(d.transpose(1, 2).to(x.dtype) for d, x in ((dQ, q), (dK, k), (dV, v)))


def gate_heads(x: Tensor, gate: Tensor, scale: float = 2.0) -> Tensor:
    """Heads `[B,S,H,E]` times scale · sigmoid of their gates `[B,S,H]`, in fp32 (fp64 for fp64) and x's dtype."""
    compute = torch.promote_types(x.dtype, torch.float32)
    return (x.to(compute) * (scale * gate.to(compute).sigmoid())[..., None]).to(x.dtype)
