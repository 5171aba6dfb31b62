"""What the CUDA C++ kernels are launched with: tables of a plan, and sizes of what they read as boxes."""

from __future__ import annotations

import functools
import math

import torch

from .. import _library
from .mode import Mode, by_head, mode_of, splits_groups
from .plan import Clip, head_table, plan

TILE = 128  # tokens of a tile that owns, and of one that a tile of queries visits in the forward
VISITED = 64  # of one that is visited in the backward
PADDING = 192  # queries of a head with numbers of their own in the backward: whole tiles of 64 and of 96
DENSE = None, None, None, None, [], [], [], [], 0, 0  # in the place of tables and boxes


def launch(*args) -> None:
    _library.launch("spacetime_attention_fwd", "cuda")(*args)


def launch_rows(*args) -> None:
    _library.launch("spacetime_attention_bwd_rows", "cuda")(*args)


def launch_backward(*args) -> None:
    _library.launch("spacetime_attention_bwd", "cuda")(*args)


def spacetime_attention_fwd(q, k, v, kv_lens, *args) -> None:
    *mode, scale, out, lse = args
    if not mode[0]:
        return launch(q, k, v, kv_lens, *DENSE, scale, out, lse)
    for heads, rule in by_head(mode, q.shape[2]):
        table = head_table(heads, q.shape[2], q.device)
        launch(q, k, v, kv_lens, table, *tables(q, k, rule, TILE, False, kv_lens is not None), scale, out, lse)


def spacetime_attention_bwd(dout, dlse, q, k, v, out, lse, kv_lens, *args) -> None:
    *mode, scale, _, dq, dk, dv = args  # one order is all it has, `deterministic` or not
    B, Sq, H, E = q.shape
    numbers = torch.empty((2, B, H, -(-Sq // PADDING) * PADDING), dtype=torch.float32, device=q.device)
    launch_rows(dout, dlse, out, lse, numbers)
    operands, groups, shares = (dout, q, k, v, numbers, kv_lens), H // k.shape[2], 1
    rules = by_head(mode, H) if mode[0] else [(tuple(range(H)), None)]

    def differentiate(of_keys: bool, heads: tuple[int, ...], rule, *grads) -> None:
        how = DENSE
        if rule:
            own = tuple(h // groups for h in heads[::groups]) if of_keys else heads
            table = head_table(own, H // groups if of_keys else H, q.device)
            how = table, *tables(q, k, rule, VISITED, of_keys, kv_lens is not None)
        launch_backward(*operands, *how, scale, *grads)

    for heads, rule in rules if dq is not None else ():
        differentiate(False, heads, rule, dq, None, None)
    if dk is None and dv is None:
        return
    parts = dk, dv
    if mode[0] and splits_groups(mode, H, groups):  # each query head then gives its share, in fp32
        groups, shares = 1, groups
        shape = B, k.shape[1], H, E
        parts = [None if d is None else torch.empty(shape, dtype=torch.float32, device=k.device) for d in (dk, dv)]
    for heads, rule in rules:
        differentiate(True, heads, rule, None, *parts)
    for total, part in zip((dk, dv), parts, strict=True) if shares > 1 else ():
        if total is not None:
            total.copy_(part.unflatten(2, (-1, shares)).sum(3))


def tables(q, k, rule, visited: int, of_keys: bool, padded: bool) -> tuple:
    """Of one rule: rows, tiles and reach of its plan, the boxes, and the videos that they are cut from."""
    sizes = q.shape[1], k.shape[1], *rule
    p = plan(*sizes, (TILE,), visited, of_keys, padded, q.device)
    sides, starts = videos(mode_of(*sizes))
    turn = slice(None, None, -1 if of_keys else 1)
    return p.rows, p.tiles, p.reach, p.own_box, p.visit_box, *sides[turn], *starts[turn]


@functools.lru_cache(maxsize=256)
def videos(mode: Mode) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, int]]:
    """Sides of the video of the queries and of that of the keys, after axes were merged; where each begins.

    Of packed clips all axes are merged (`op._not_for_cuda`): their boxes are runs of the whole sequence.
    """
    if len(mode.clips) == 1:
        axes = Clip(mode, mode.clips[0], "cpu", False).axes
        own, visit = tuple(lo.shape[0] for lo, _, _ in axes), tuple(n for _, _, n in axes)
        start = mode.text_len if mode.text_first else 0
        if math.prod(own):
            return (own, visit), (start, start)
        return ((1, 1, mode.q_len), visit), (0, start)
    return ((1, 1, mode.q_len), (1, 1, mode.k_len)), (0, 0)
