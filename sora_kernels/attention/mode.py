"""What a call asks for, checked and in one form, and what becomes of it where heads keep rules of their own.

The form the private ops take: (grids flat, window, stride, dilation, causal, sink, text_len, text_first). `grids` and
`window` are None for none, never empty: programs that torch compiles ahead of time lose an empty list. `window` and
`stride` are one triple, or one after another for every query head. `causal` is the side of a chunk on each axis, or 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from .. import _check

Box = tuple[int, int, int]
Form = tuple[tuple[int, ...] | None, tuple[int, ...] | None, tuple[int, ...], Box, Box, int, int, bool]


class Rules(TypedDict, total=False):
    """For type checkers: what a call to `attention_plan` may say whatever it returns."""

    grid: Sequence[int] | None
    grids: Sequence[Sequence[int]] | None
    dilation: int | Sequence[int]
    causal: str | int | Sequence[int] | None
    sink: int
    text_len: int
    text_at: str


class Options(Rules, total=False):
    """For type checkers: what a call to `spacetime_attention` may say whatever it returns."""

    window: Sequence[int] | Sequence[Sequence[int]] | None
    stride: int | Sequence[int] | Sequence[Sequence[int]]
    kv_lens: Tensor | None
    scale: float | None
    deterministic: bool | None
    impl: str


class PlanOptions(Rules, total=False):
    padded: bool
    tile: int | Sequence[int]
    key_tile: int | Sequence[int]
    transposed: bool
    device: torch.device | str | None


@dataclass(frozen=True)
class Mode:
    """What all heads of a plan see, with hashable parts."""

    q_len: int
    k_len: int
    clips: tuple[Box, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: Box
    causal: Box
    sink: int
    text_len: int
    text_first: bool

    def frames(self, clip: Box) -> int:
        """The frames of a clip that are among the queries."""
        return (self.q_len - self.text_len) // (clip[1] * clip[2]) if len(self.clips) == 1 else clip[0]


def mode_of(
    q_len: int, k_len: int, grids, window, stride, dilation, causal, sink, text_len, text_first
) -> Mode:  # fmt: skip
    clips = tuple(tuple(grids[i : i + 3]) for i in range(0, len(grids or ()), 3))
    rules = tuple(window or ()), tuple(stride), tuple(dilation), tuple(causal)
    return Mode(q_len, k_len, clips, *rules, sink, text_len, bool(text_first))


def resolve(
    op: str, q_len: int, k_len: int, grid, grids, window, stride, dilation, causal, sink, text_len, text_at,
    heads: int | None = None,
) -> Form:  # fmt: skip
    """The mode in the form the ops take, for so many query heads; None: as many as there are rules.

    A mode that hides nothing comes out as plain attention, without grids, and heads that all keep one rule as that
    rule. Raises ValueError naming the argument.
    """
    key = op, q_len, k_len, grid, grids, window, stride, dilation, causal, sink, text_len, text_at, heads
    if torch.compiler.is_compiling():
        return _resolve(*key)
    try:
        hash(key)
    except TypeError:  # lists; symbols in the place of sizes
        return _resolve(*key)
    return _resolved(*key)


def _resolve(
    op: str, q_len: int, k_len: int, grid, grids, window, stride, dilation, causal, sink, text_len, text_at, heads
) -> Form:
    if grid is not None and grids is not None:
        raise ValueError(f"{op}: give grid (one clip size) or grids (packed clips), not both")
    strides = _per_head(op, "stride", _check.per_axis(stride), heads)
    windows = [None] if window is None else _per_head(op, "window", window, heads)
    if 1 != len(strides) != len(windows) != 1:
        raise ValueError(
            f"{op}: window and stride must be one rule or one for each head; got {len(windows)} and {len(strides)}"
        )
    dilation = _check.triple(op, "dilation", _check.per_axis(dilation))
    causal = _causal(op, causal)
    _check.choice(op, "text_at", text_at, ("end", "start"))
    sink = _check.integer(op, "sink", sink)
    text_len = _check.integer(op, "text_len", text_len)
    if grid is None and grids is None:
        rules = dict(window=window is not None, dilation=max(dilation) > 1, causal=any(causal), sink=sink > 0)
        rules |= dict(text_len=text_len > 0)
        for name, given in rules.items():
            if given:
                raise ValueError(f"{op}: {name} needs grid=(T, H, W) (or grids) to know where the tokens are; got none")
    if window is None and any(max(s) > 1 for s in strides):
        raise ValueError(
            f"{op}: stride={stride} groups the queries of a window; give window as well, or leave stride 1"
        )
    if max(dilation) > 1 and window is None:
        raise ValueError(
            f"{op}: dilation={dilation} thins out the keys of a window; give window as well, or leave dilation 1"
        )
    if max(dilation) > 1 and sink:
        raise ValueError(f"{op}: sink must be 0 with dilation, whose groups do not see each other; got {sink}")
    if sink and any(causal[1:]):
        raise ValueError(f"{op}: sink must be 0 with causal along h or w, for its frames are seen whole; got {sink}")
    clips = _clips(op, q_len, k_len, grid, grids, text_len)
    rest = dilation, causal, sink, text_len, text_at == "start"
    count = max(len(windows), len(strides))
    if count == 1:
        return _reduced(clips, windows[0] or (), strides[0], *rest)
    windows, strides = (rules * count if len(rules) == 1 else rules for rules in (windows, strides))
    reduced = [_reduced(clips, w, s, *rest) for w, s in zip(windows, strides, strict=True)]
    if all(form == reduced[0] for form in reduced):
        return reduced[0]
    return *map(_flat, (clips, windows, strides)), *rest


_resolved = functools.lru_cache(maxsize=1024, typed=True)(_resolve)


def by_head(form: Sequence, heads: int) -> list[tuple[tuple[int, ...], Form]]:
    """The distinct rules of a form, each with the heads that keep it, in the order of their first heads."""
    grids, window, stride, *rest = form
    if len(window or ()) <= 3:
        return [(tuple(range(heads)), tuple(form))]
    clips = [grids[i : i + 3] for i in range(0, len(grids), 3)]
    rules: dict[tuple, list[int]] = {}
    for head in range(heads):
        own = slice(3 * head, 3 * head + 3)
        rules.setdefault((*window[own], *stride[own]), []).append(head)
    return [(tuple(keep), _reduced(clips, rule[:3], rule[3:], *rest)) for rule, keep in rules.items()]


def splits_groups(form: Sequence, heads: int, groups: int) -> bool:
    """Whether query heads that share a key head keep different rules."""
    return any(
        {h // groups * groups + g for h in keep for g in range(groups)} != set(keep) for keep, _ in by_head(form, heads)
    )


def _causal(op: str, causal: object) -> Box:
    """The side of a chunk on each axis; 0 for none."""
    if isinstance(causal, tuple | list) and len(causal) == 3 and all(_check.is_integer(n) and n >= 0 for n in causal):
        return tuple(n if isinstance(n, torch.SymInt) else int(n) for n in causal)
    chunk = 0 if causal is None else 1 if isinstance(causal, str) and causal == "frame" else causal
    if causal is not None and not (_check.is_integer(chunk) and chunk >= 1):
        raise ValueError(
            f"{op}: causal must be None, 'frame', a number of frames per chunk >= 1, or the sides (t, h, w) of a chunk "
            f"with 0 on an axis that is not causal; got {causal!r}"
        )
    return chunk, 0, 0


def is_list(value: object) -> bool:
    """Whether a window or stride is a list of rules rather than one."""
    return isinstance(value, tuple | list) and any(isinstance(v, tuple | list) for v in value)


def _per_head(op: str, name: str, value: object, heads: int | None) -> list[Box]:
    """One triple, or one for each head."""
    if not is_list(value):
        return [_check.triple(op, name, value)]
    triples = [_check.triple(op, f"{name}[{i}]", v) for i, v in enumerate(value)]
    if heads is not None and len(triples) != heads:
        raise ValueError(
            f"{op}: {name} must be one (t, h, w) for all heads or a list of one for each of the {heads} heads of q; "
            f"got {len(triples)}"
        )
    return triples


def _clips(op: str, q_len: int, k_len: int, grid, grids, text_len: int) -> list[Box]:
    if grid is not None:
        T, H, W = grid = _check.triple(op, "grid", grid)
        if k_len != T * H * W + text_len:
            raise ValueError(
                f"{op}: grid {grid} and text_len {text_len} make {T * H * W + text_len} key tokens; k has {k_len}"
            )
        frames, rest = (q_len - text_len) // (H * W), (q_len - text_len) % (H * W)
        if rest or not 0 <= frames <= T:
            raise ValueError(
                f"{op}: q must hold text_len={text_len} text tokens and 0 to {T} whole frames of {H} x {W} tokens "
                f"(grid is that of the keys); got {q_len} tokens"
            )
        return [grid]
    if grids is not None and not isinstance(grids, tuple | list):
        raise ValueError(f"{op}: grids must be a list of clips' sizes (T, H, W); got {grids!r}")
    clips = [_check.triple(op, f"grids[{i}]", g) for i, g in enumerate(grids or ())]
    total = sum(math.prod(g) for g in clips)
    if grids is not None and not (q_len == k_len == total):
        raise ValueError(f"{op}: grids {clips} hold {total} tokens; q has {q_len} and k has {k_len}")
    if grids is not None and text_len:
        raise ValueError(
            f"{op}: text_len must be 0 with grids: text would join clips that do not see each other; got {text_len}"
        )
    return clips


def _reduced(
    clips, window, stride, dilation: Box, causal: Box, sink: int, text_len: int, text_first: bool
) -> Form:  # fmt: skip
    """One rule without what hides nothing."""
    thinned = any(causal) or max(dilation) > 1
    if window and not thinned and all(w >= n for g in clips for w, n in zip(window, g, strict=True)):
        window = ()
    if len(clips) < 2 and not window and not any(causal):
        clips = []
    stride, sink = (stride, sink) if window else ((1, 1, 1), 0)
    return _flat(clips) or None, tuple(window) or None, tuple(stride), dilation, causal, sink, text_len, text_first


def _flat(triples: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple([n for triple in triples for n in triple])
