"""What the CUDA C++ kernel of the forward is launched with: tables of a plan, and sizes of what it reads as boxes."""

from __future__ import annotations

import functools
import math

from .. import _library
from .mode import Mode, by_head, mode_of
from .plan import Clip, head_table, plan

TILE = 128  # queries of a tile of a plan, and keys


def launch(*args) -> None:
    _library.launch("spacetime_attention_fwd", "cuda")(*args)


def spacetime_attention_fwd(q, k, v, kv_lens, *args) -> None:
    *mode, scale, out, lse = args
    if not mode[0]:
        return launch(q, k, v, kv_lens, None, None, None, None, [], [], [], [], 0, 0, scale, out, lse)
    for heads, rule in by_head(mode, q.shape[2]):
        sizes = q.shape[1], k.shape[1], *rule
        p = plan(*sizes, (TILE,), TILE, False, kv_lens is not None, q.device)
        tables = head_table(heads, q.shape[2], q.device), p.rows, p.tiles, p.reach
        boxes = p.own_box, p.visit_box, *videos(mode_of(*sizes))
        launch(q, k, v, kv_lens, *tables, *boxes, scale, out, lse)


@functools.lru_cache(maxsize=256)
def videos(mode: Mode) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Sides of the video of the queries and of that of the keys, after axes were merged, and where each begins.

    Of packed clips all axes are merged (`op._not_for_cuda`): their boxes are runs of the whole sequence.
    """
    if len(mode.clips) == 1:
        axes = Clip(mode, mode.clips[0], "cpu", False).axes
        own, visit = tuple(lo.shape[0] for lo, _, _ in axes), tuple(n for _, _, n in axes)
        start = mode.text_len if mode.text_first else 0
        if math.prod(own):
            return own, visit, start, start
        return (1, 1, mode.q_len), visit, 0, start
    return (1, 1, mode.q_len), (1, 1, mode.k_len), 0, 0
