"""What ranks send each other: parts for parts, what others own, a ring of keys and values, with gradients; and rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sora_kernels import attention_backward, attention_forward, merge_attention

Range = tuple[int, int]


def cut(start: int, stop: int, parts: int) -> list[Range]:
    """[start, stop) in `parts` ranges whose lengths differ by one at most."""
    borders = [start + (stop - start) * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(borders))


def swap(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], group) -> tuple[Tensor, ...]:
    """parts[i] to rank i of the group; from each, a part of `shapes`."""
    sent, sizes = torch.cat([part.reshape(-1) for part in parts]), [math.prod(shape) for shape in shapes]
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=group)
    return tuple(part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True))


class Swap(torch.autograd.Function):
    """`swap`; gradients go back the way that the parts came."""

    @staticmethod
    def forward(ctx, group, shapes, *parts):
        ctx.group, ctx.shapes = group, [part.shape for part in parts]
        return swap(parts, shapes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return None, None, *swap(grads, ctx.shapes, ctx.group)


def fetch(x: Tensor, owned: Sequence[Range], wanted: Sequence[Range], rank: int, group) -> Tensor:
    """Of x [B, tokens, ...], rank i's being owned[i]: those in wanted[rank]."""

    def common(a: Range, b: Range) -> Range:
        start = max(a[0], b[0])
        return start, max(start, min(a[1], b[1]))

    first = owned[rank][0]
    parts = [x[:, start - first : stop - first] for start, stop in (common(owned[rank], w) for w in wanted)]
    ranges = [common(o, wanted[rank]) for o in owned]
    shapes = [(x.shape[0], stop - start, *x.shape[2:]) for start, stop in ranges]
    return torch.cat(Swap.apply(group, shapes, *parts), 1)


class Gather(torch.autograd.Function):
    """x, of sizes[rank] along `axis`, of all ranks in turn. All compute one loss of the result: no gradient is sent."""

    @staticmethod
    def forward(ctx, x, axis, sizes, rank, group):
        ctx.range = axis, sum(sizes[:rank]), sizes[rank]
        shapes = [(*x.shape[:axis], size, *x.shape[axis + 1 :]) for size in sizes]
        return torch.cat(swap([x] * len(sizes), shapes, group), axis)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad.narrow(*ctx.range), None, None, None, None


def beside(x: Tensor, above: int, below: int, rank: int, size: int, group) -> tuple[Tensor, int, int]:
    """x [B, C, T, H, W] with the last `above` rows of the rank before and the first `below` of the next; and how many
    these are: none of a rank that there is not. Without gradients; the result is channels last."""
    ops, edges = [], []
    sides = (rank - 1, x[:, :, :, :below], above), (rank + 1, x[:, :, :, x.shape[3] - above :], below)
    for peer, sent, wanted in sides:
        there = 0 <= peer < size
        edges.append(x.new_empty(*x.shape[:3], wanted if there else 0, x.shape[4]))
        for op, edge in ((dist.isend, sent), (dist.irecv, edges[-1])) if there else ():
            if edge.shape[3]:
                ops.append(dist.P2POp(op, edge.contiguous(), group=group, group_peer=peer))
    works = dist.batch_isend_irecv(ops) if ops else []
    above, below = (edge.shape[3] for edge in edges)
    rows = x.shape[3] + above + below
    whole = x.new_empty(x.shape[0], x.shape[2], rows, x.shape[4], x.shape[1]).movedim(4, 1)
    whole[:, :, :, above : rows - below] = x  # while the others come
    for work in works:
        work.wait()
    whole[:, :, :, :above], whole[:, :, :, rows - below :] = edges
    return whole, above, below


class Ring(torch.autograd.Function):
    """softmax(scale · q kᵀ) v with the keys and values of all ranks, which come round; sums and gradients in fp32."""

    @staticmethod
    def forward(ctx, q, k, v, sizes, rank, group, impl):
        wide, total = torch.promote_types(q.dtype, torch.float32), None
        for keys, values in _round(torch.stack((k, v)), sizes, rank, group):
            part = attention_forward(q, keys, values, out_dtype=wide, impl=impl)
            total = part if total is None else merge_attention(total, part)
        out, lse = total[0].to(q.dtype), total[1]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = sizes, rank, group, impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        sizes, rank, group, impl = ctx.settings
        wide, dq, arrive = torch.promote_types(q.dtype, torch.float32), 0, None
        for step, (keys, values) in enumerate(_round(torch.stack((k, v)), sizes, rank, group)):
            part, *mine = attention_backward(dout, q, keys, values, out, lse, out_dtype=wide, impl=impl)
            dq, total = dq + part, torch.stack(mine)
            if step == 0:
                own = total  # stays here: what the others give comes to it
                continue
            if arrive is not None:
                total += arrive()  # what the ranks give that had this block before
            shape = list(total.shape)
            shape[2] = sizes[(rank - 1 - step) % len(sizes)]
            arrive = _pass_on(total, shape, rank, group, tag=1)
        dk, dv = own + arrive()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _round(block: Tensor, sizes: Sequence[int], rank: int, group) -> Iterator[Tensor]:
    """This rank's block [2, B, sizes[rank], H, E], then that of each rank before it; the next comes meanwhile."""
    for step in range(1, len(sizes) + 1):
        if step < len(sizes):
            shape = list(block.shape)
            shape[2] = sizes[(rank - step) % len(sizes)]
            arrive = _pass_on(block, shape, rank, group)
        yield block
        if step < len(sizes):
            block = arrive()


def _pass_on(block: Tensor, shape: Sequence[int], rank: int, group, tag: int = 0) -> Callable[[], Tensor]:
    """Sends a block to the next rank; what is returned waits for that of the rank before, of `shape`."""
    size, received = dist.get_world_size(group), block.new_empty(shape)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, block, group=group, group_peer=(rank + 1) % size, tag=tag),
            dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size, tag=tag),
        ]
    )

    def arrive() -> Tensor:
        for work in works:
            work.wait()
        return received

    return arrive
