"""Which tiles of tokens meet: what every mode of spacetime attention reduces to.

A plan is seen from the side whose tiles *own* a program: the queries (forward, dq) or the keys (dk, dv). An owner
visits tiles of the other side. Tiles are boxes of the video or runs of consecutive tokens (text; everything, where the
owner is text; frames of a sink). Owners are cut once and cover their side; visited boxes start at any token, where
the owner's reach begins. All follows from one interval of keys per axis, whose ends never fall from query to query.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .. import _check
from .._kept import kept
from .config import choose_boxes
from .mode import Box, Form, Mode, by_head, is_list, mode_of, resolve
from .reference import FAR, reach

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Unpack

    from .mode import PlanOptions

COLUMNS = ("begin", "masked", "end", "origin", "own_start", "own_end", "start", "visit_end", "stop", "H", "W")


@dataclass(frozen=True)
class AttentionPlan:
    """For each tile of queries the tiles of keys it visits; with `transposed`, for each tile of keys the queries.

    rows     [owners, 11] int32, longest lists first. Columns: begin, masked, end: in `tiles`, begin:masked are seen
             whole, masked:end by coordinates; origin: the owner's first token (~token for a run); own_start, own_end:
             the tokens of the owner's clip (or run); start, visit_end: those of the clip on the visited side; stop:
             no visited run goes beyond; H, W of the clip after axes were merged
    tiles    [n] int32: the first token of a visited tile, ~token for a run. Each pair that is seen is visited once
    reach    [7, own] int32: for each own token, lo and hi along t, h, w of the box that it sees on the visited side,
             and `kept`: it also sees the first `kept` tokens of its clip. Text sees all
    own_box, visit_box   (t, h, w) of a tile; a run is as many tokens
    visit_size   the sides of the visited clip after axes were merged; None unless it is one clip without text and sink
    axes     which of t, h, w can hide a key;  runs: whether any tile is a run
    own_tokens, visit_tokens   with a dilation tokens stand in an order of their own, in which those of a dilation group
             are neighbours on each axis: int32, the token at each place of it. All else speaks of places. Else None
    """

    rows: Tensor
    tiles: Tensor
    reach: Tensor
    own_box: Box
    visit_box: Box
    visit_size: Box | None
    axes: tuple[bool, bool, bool]
    runs: bool
    own_tokens: Tensor | None
    visit_tokens: Tensor | None
    transposed: bool
    q_len: int
    k_len: int
    text_len: int

    def visible_pairs(self) -> Tensor:
        """int64 []: the (query, key) pairs that are seen: the useful work."""
        lo, hi, kept = self.reach[:6:2].long(), self.reach[1:6:2].long(), self.reach[6].long()
        video = (hi - lo).clamp_min(0).prod(0) + kept + self.text_len
        return torch.where(kept == FAR, self.q_len if self.transposed else self.k_len, video).sum()

    def computed_pairs(self) -> Tensor:
        """int64 []: the pairs in the visited tiles: the work a kernel does."""
        tiles = (self.rows[:, 2] - self.rows[:, 0]).sum(dtype=torch.int64)
        return tiles * (math.prod(self.own_box) * math.prod(self.visit_box))

    def flops(self, heads: int, width: int) -> tuple[Tensor, Tensor]:
        """Useful and computed floating-point operations of the forward for one clip of the batch, each int64 []."""
        return 4 * heads * width * self.visible_pairs(), 4 * heads * width * self.computed_pairs()

    def numpy(self) -> dict[str, np.ndarray]:
        """The columns of `rows` by their names, `tiles` and `reach`, as arrays on the host: waits for the device."""
        columns = zip(COLUMNS, self.rows.cpu().numpy().T, strict=True)
        return dict(columns) | dict(tiles=self.tiles.cpu().numpy(), reach=self.reach.cpu().numpy())

    def __str__(self) -> str:
        """A summary for people: tiles, density, and the work beside what is needed. Waits for the device."""
        table = self.numpy()
        owners, visits = len(table["begin"]), int((table["end"] - table["begin"]).sum())
        whole = int((table["masked"] - table["begin"]).sum())
        own, visit = ("keys", "queries") if self.transposed else ("queries", "keys")
        seen, computed = int(self.visible_pairs()), int(self.computed_pairs())
        return (
            f"{owners} tiles of {own} {self.own_box} visit {visits} tiles of {visit} {self.visit_box}, "
            f"{whole / max(visits, 1):.0%} of them seen whole\n"
            f"{self.q_len} queries x {self.k_len} keys: {seen / max(self.q_len * self.k_len, 1):.2%} of the pairs are "
            f"seen, {computed / max(seen, 1):.2f} times as many are computed\n"
            f"forward: {4 * seen:.3g} FLOP useful, {4 * computed:.3g} computed, per head and unit of its width"
        )


@overload
def attention_plan(
    q_len: int, k_len: int | None = None, *, window: Sequence[int] | None = None, stride: int | Sequence[int] = 1,
    **options: Unpack[PlanOptions],
) -> AttentionPlan: ...  # fmt: skip
@overload
def attention_plan(
    q_len: int, k_len: int | None = None, *, window: Sequence[int] | Sequence[Sequence[int]] | None = None,
    stride: int | Sequence[int] | Sequence[Sequence[int]] = 1, **options: Unpack[PlanOptions],
) -> AttentionPlan | tuple[tuple[tuple[int, ...], AttentionPlan], ...]: ...  # fmt: skip
def attention_plan(
    q_len: int,
    k_len: int | None = None,
    *,
    grid: Sequence[int] | None = None,
    grids: Sequence[Sequence[int]] | None = None,
    window: Sequence[int] | Sequence[Sequence[int]] | None = None,
    stride: int | Sequence[int] | Sequence[Sequence[int]] = 1,
    dilation: int | Sequence[int] = 1,
    causal: str | int | Sequence[int] | None = None,
    sink: int = 0,
    text_len: int = 0,
    text_at: str = "end",
    padded: bool = False,
    tile: int | Sequence[int] = 128,
    key_tile: int | Sequence[int] = 64,
    transposed: bool = False,
    device: torch.device | str | None = None,
) -> AttentionPlan | tuple[tuple[tuple[int, ...], AttentionPlan], ...]:
    """The plan of `spacetime_attention` for `q_len` queries and `k_len` keys (None: as many).

    The modes are those of `spacetime_attention`; padded says that kv_lens will be given. tile, key_tile: tokens of a
    tile of queries and of keys, whose boxes are then chosen to compute least, or the boxes (t, h, w) themselves.
    transposed: the keys own. device: where the plan is built; None: torch's default. Plans are cached; building one
    does not synchronise the host. Raises ValueError naming the argument.

    With a list of windows or strides, one for each query head: (heads, plan) of every distinct rule, in the order of
    its first head. Heads that keep equal rules share a plan.
    """
    op = "attention_plan"
    q_len = _check.integer(op, "q_len", q_len)
    k_len = q_len if k_len is None else _check.integer(op, "k_len", k_len)
    padded, transposed = _check.flag(op, "padded", padded), _check.flag(op, "transposed", transposed)
    form = resolve(op, q_len, k_len, grid, grids, window, stride, dilation, causal, sink, text_len, text_at)
    if padded:
        check_padding(op, form)
    sizes = []
    for name, t in (("tile", tile), ("key_tile", key_tile)):
        t = _check.integer(op, name, t, 1) if _check.is_integer(t) else _check.triple(op, name, t)
        if (volume := t if isinstance(t, int) else math.prod(t)) & (volume - 1):
            raise ValueError(f"{op}: {name} must hold a power of two of tokens; got {t}")
        sizes.append(t)
    own, visit = sizes[::-1] if transposed else sizes
    device = torch.get_default_device() if device is None else _check.device(op, device)
    heads = max((len(x) for x in (window, stride) if is_list(x)), default=1)
    tiles = (own,), visit, transposed, padded, device
    plans = tuple((keep, plan(q_len, k_len, *rule, *tiles)) for keep, rule in by_head(form, heads))
    return plans if is_list(window) or is_list(stride) else plans[0][1]


def check_padding(op: str, form: Form) -> None:
    """Raises ValueError where kv_lens would hide some keys of every dilation group."""
    if max(form[3]) > 1:
        raise ValueError(f"{op}: dilation={tuple(form[3])} takes no kv_lens; cut off the padding, or leave dilation 1")


def plan(q_len, k_len, grids, window, stride, dilation, causal, sink, text_len, text_first, own, visit, transposed,
         padded, device) -> AttentionPlan:  # fmt: skip
    """`attention_plan` of a resolved mode of one rule. own: alternatives, of which the plan takes the fastest."""
    mode = mode_of(q_len, k_len, grids, window, stride, dilation, causal, sink, text_len, text_first)
    return _build(mode, own, visit, transposed, padded, device)


def head_table(heads: tuple[int, ...], total: int, device: torch.device) -> Tensor | None:
    """int32 `[n]` for a kernel that works on some heads only; None for all."""
    return None if len(heads) == total else _heads(heads, device)


def seen_pairs(q_len: int, k_len: int, form: Sequence, heads: int) -> int:
    """The (query, key) pairs that so many heads see, from the axes alone: neither a plan nor a device is asked."""
    rules = by_head(form, heads)
    each = (_seen_pairs(mode_of(q_len, k_len, *rule)) if rule[0] else q_len * k_len for _, rule in rules)
    return sum(len(keep) * pairs for (keep, _), pairs in zip(rules, each, strict=True))


@functools.lru_cache(maxsize=256)
def _seen_pairs(mode: Mode) -> int:
    total = mode.text_len * (mode.q_len + mode.k_len - mode.text_len)  # text sees all and is seen by all
    with unset_fake_temporarily():
        for size in mode.clips:
            clip = Clip(mode, size, "cpu", False)
            total += math.prod(int((hi - lo).clamp_min(0).sum()) for lo, hi, _ in clip.axes)
            total += int(clip.kept.sum()) * math.prod(lo.shape[0] for lo, _, _ in clip.axes[clip.lead + 1 :])
    return total


@kept
def _heads(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Made on the device: a copy from the host would wait, and no graph could capture it."""
    return torch.cat([torch.full((1,), h, dtype=torch.int32, device=device) for h in heads])


class Clip:
    """What the tokens of one clip reach: an interval of the visited side per axis, `[lo, hi)`, for each own place.

    axes     (lo, hi, visited length) along t, h, w. An axis seen whole is merged with the one before; axes of length 1
             take its place in front. lo and hi never fall, so what a tile of places reaches is an interval too, and
             so are the queries that reach a key. Places are indices, on a dilated axis one dilation group after another
    lead     the first axis that is not padding
    kept     sink tokens that place i along it sees; lo is not below them, so that nothing is seen twice. Transposed:
             how many of the lead's first keys are sink. Whatever the window, every query from `lo` on sees those
    """

    def __init__(self, mode: Mode, size: Box, device: torch.device | str, transposed: bool) -> None:
        self.size, self.transposed, self.mode = size, transposed, mode
        i = torch.arange(max(size), device=device)
        queries = torch.stack((torch.zeros_like(i), i, i, i, *(torch.full_like(i, n) for n in size)), -1)
        lo, hi, kept = reach(queries, mode.window, mode.stride, mode.dilation, mode.causal, mode.sink)
        lo[:, 1] = torch.maximum(lo[:, 1], kept)
        self.asking, self.asked = self._order(i, size[0] - mode.frames(size)), self._order(i, 0)
        self.kept = kept[self.asking[0]] * (size[1] * size[2])
        axes = []
        for axis, (n, d) in enumerate(zip(size, mode.dilation, strict=True)):
            first, last = lo[self.asking[axis], 1 + axis], hi[self.asking[axis], 1 + axis]
            if d > 1:
                place = self.asked[axis].argsort()
                first, last = place[first], place[last - 1] + 1
            some = mode.window and any(mode.window[axis] < clip[axis] for clip in mode.clips)
            if axis == 0 or some or mode.causal[axis] or d > 1:
                axes.append((first, last, n))
                continue
            if len(axes) == 1:
                self.kept = self.kept.repeat_interleave(n)
            first, last, length = axes[-1]
            axes[-1] = (first.repeat_interleave(n) * n, last.repeat_interleave(n) * n, length * n)
        self.lead = 3 - len(axes)
        one = i.new_ones(1)
        self.axes = [(one - 1, one, 1)] * self.lead + axes
        if transposed:
            sinks = self.kept // self.step(self.lead)
            self.kept = sinks[-1:].sum()
            for axis, (lo, hi, keys) in enumerate(self.axes):
                j = torch.arange(keys, device=device)
                first, past = torch.searchsorted(hi, j, right=True), torch.searchsorted(lo, j, right=True)
                if axis == self.lead:
                    first = torch.minimum(first, torch.searchsorted(sinks, j, right=True))
                self.axes[axis] = (first, past, lo.shape[0])

    def _order(self, i: Tensor, first: int) -> list[Tensor]:
        """The indices along t (from `first` on), h and w, in the order of their places."""
        orders = []
        for n, d, start in zip(self.size, self.mode.dilation, (first, 0, 0), strict=True):
            orders.append(torch.cat([i[start + (group - start) % d : n : d] for group in range(d)]))
        return orders

    def tokens(self, of_queries: bool) -> Tensor:
        """The token at each place of the queries, or of the keys, counted from the clip's first."""
        t, h, w = self.asking if of_queries else self.asked
        _, H, W = self.size
        t = t - (self.size[0] - self.mode.frames(self.size) if of_queries else 0)
        return ((t[:, None, None] * H + h[:, None]) * W + w).flatten()

    def step(self, axis: int) -> int:
        """Tokens from one index along the axis to the next."""
        return math.prod(n for _, _, n in self.axes[axis + 1 :])

    def spans(self, box: Box) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Per axis, for each tile of it: `[some, past)` is reached by some of its indices, `[every, short)` by all."""
        result = []
        for (lo, hi, _), side in zip(self.axes, box, strict=True):
            first = torch.arange(0, lo.shape[0], side, device=lo.device)
            last = (first + side).clamp_max(lo.shape[0]) - 1
            result.append((lo[first], hi[last], lo[last], hi[first]))
        return result

    def reach(self) -> Tensor:
        """`[7, tokens]` int32: the rows of `AttentionPlan.reach`."""
        size = [lo.shape[0] for lo, _, _ in self.axes]

        def spread(axis: int, x: Tensor) -> Tensor:
            return x.view([-1 if a == axis else 1 for a in range(3)]).expand(size).flatten()

        bounds = [spread(axis, x) for axis, (lo, hi, _) in enumerate(self.axes) for x in (lo, hi)]
        if self.transposed:
            sunk = spread(self.lead, torch.arange(size[self.lead], device=self.kept.device) < self.kept)
            for axis in range(self.lead, 3):
                lo, hi = bounds[2 * axis : 2 * axis + 2]
                bounds[2 * axis] = lo if axis == self.lead else lo.masked_fill(sunk, 0)
                bounds[2 * axis + 1] = hi.masked_fill(sunk, self.axes[axis][2])
            return torch.stack((*bounds, torch.zeros_like(lo))).int()
        return torch.stack((*bounds, spread(self.lead, self.kept))).int()


@kept
def _build(mode, own, visit, transposed, padded, device) -> AttentionPlan:
    with unset_fake_temporarily():  # sizes are numbers even where the plan's own tensors are not
        on_host = [Clip(mode, size, "cpu", transposed) for size in mode.clips]
        own_box, visit_box, most = choose_boxes(on_host, own, visit)
    step = math.prod(visit_box)
    own_len, visit_len = (mode.k_len, mode.q_len) if transposed else (mode.q_len, mode.k_len)
    own_text, visit_text = (mode.text_len, mode.text_len) if mode.clips else (own_len, visit_len)
    own_text_at, visit_text_at = (0, 0) if mode.text_first else (own_len - own_text, visit_len - visit_text)

    # Owners that are text share one list: everything.
    everything = torch.arange(0, visit_len, step, device=device)
    total, whole = everything.shape[0], visit_len // step
    origin = torch.arange(own_text_at, own_text_at + own_text, math.prod(own_box), device=device)
    rows = [_rows(0, whole, total, ~origin, own_text_at, own_text_at + own_text, 0, visit_len, visit_len, 1, 1)]
    tiles, reaches, tokens = [~everything], [], ([], [])

    q_start = k_start = mode.text_len if mode.text_first else 0
    for size, boxes in zip(mode.clips, most, strict=True):
        clip = Clip(mode, size, device, transposed)
        q_end, k_end = q_start + mode.frames(size) * size[1] * size[2], k_start + math.prod(size)
        own_range, visit_range = (q_start, q_end), (k_start, k_end)
        if transposed:
            own_range, visit_range = visit_range, own_range
        stop = visit_len if len(mode.clips) == 1 else visit_range[1]
        owner = Owners(clip, own_box)
        lists, text = [], [torch.full_like(owner.origin, n) for n in (visit_text_at, visit_text_at + visit_text)]
        if mode.sink and transposed:
            owner.sink_keys()
            boxes = math.prod(-(-n // side) for (_, _, n), side in zip(clip.axes, visit_box, strict=True))
        elif mode.sink:
            longest = min(mode.sink, size[0]) * size[1] * size[2]
            lists.append(_runs(*(visit_range[0] + x for x in owner.sink()), step, longest))
        lists.append(owner.boxes(visit_box, visit_range[0], boxes))
        if visit_text:
            every = text[0] if padded and not mode.text_first and not transposed else text[1]
            lists.append(_runs(*text, text[0], every, step, visit_text))
        listed, whole, count = _whole_first(*(torch.cat(parts, 1) for parts in zip(*lists, strict=True)))
        begin = total + torch.arange(listed.shape[0], device=device) * listed.shape[1]
        extent = *own_range, *visit_range, stop, *(max(lo.shape[0], n) for lo, _, n in clip.axes[1:])
        rows.append(_rows(begin, begin + whole, begin + count, owner.origin + own_range[0], *extent))
        tiles.append(listed.flatten())
        total += listed.numel()
        reaches.append(clip.reach())
        tokens[transposed].append(clip.tokens(True) + q_start)
        tokens[not transposed].append(clip.tokens(False) + k_start)
        q_start, k_start = q_end, k_end

    text = torch.full((7, own_text), FAR, dtype=torch.int32, device=device)
    text[:6:2] = -FAR
    at_text = 0 if mode.text_first else len(reaches)
    reaches.insert(at_text, text)
    for side, first, length in ((tokens[0], own_text_at, own_text), (tokens[1], visit_text_at, visit_text)):
        side.insert(at_text, torch.arange(first, first + length, device=device))
    own_tokens, visit_tokens = (torch.cat(x).int() if max(mode.dilation) > 1 else None for x in tokens)
    rows = torch.cat(rows)
    order = torch.argsort(rows[:, 2] - rows[:, 0], descending=True, stable=True)
    sides = zip(own_box, visit_box, *([max(lo.shape[0], n) for lo, _, n in c.axes] for c in on_host), strict=True)
    one_box = len(on_host) == 1 and not (mode.text_len or mode.sink or max(mode.dilation) > 1)
    return AttentionPlan(
        rows=rows[order], tiles=torch.cat(tiles).int(), reach=torch.cat(reaches, 1), own_box=own_box,
        visit_size=tuple(n for _, _, n in on_host[0].axes) if one_box else None,
        visit_box=visit_box, axes=tuple(max(side) > 1 for side in sides), transposed=transposed, q_len=mode.q_len,
        runs=bool(own_text or visit_text or mode.sink), k_len=mode.k_len, text_len=mode.text_len,
        own_tokens=own_tokens, visit_tokens=visit_tokens,
    )  # fmt: skip


class Owners:
    """The boxes that one clip's own side is cut into, and the spans that they reach on the other side."""

    def __init__(self, clip: Clip, box: Box) -> None:
        spans = clip.spans(box)
        counts = [span[0].shape[0] for span in spans]
        cell = torch.arange(math.prod(counts), device=clip.kept.device)
        h, w = (max(count, 1) for count in counts[1:])
        index = cell // (h * w), cell // w % h, cell % w
        self.clip, self.box = clip, box
        self.spans = [[x[i] for x in span] for span, i in zip(spans, index, strict=True)]
        self.first = [i * side for i, side in zip(index, box, strict=True)]
        self.origin = sum(first * clip.step(axis) for axis, first in enumerate(self.first))

    def sink(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each owner the run `[begin, end)` of the sink's tokens, and `[some, every)`, seen whole."""
        kept, first = self.clip.kept, self.first[self.clip.lead]
        last = (first + self.box[self.clip.lead]).clamp_max(kept.shape[0]) - 1
        zero = torch.zeros_like(first)
        return zero, kept[last], zero, kept[first]

    def sink_keys(self) -> None:
        """Widen the spans of keys of the sink to all queries that see them."""
        lead, kept = self.clip.lead, self.clip.kept
        some_sunk, all_sunk = self.first[lead] < kept, self.first[lead] + self.box[lead] <= kept
        for axis in range(lead, 3):
            some, past, every, short = self.spans[axis]
            _, hi, n = self.clip.axes[axis]
            if axis == lead:
                short = torch.where(some_sunk, hi.gather(0, kept.clamp_max(hi.shape[0] - 1)[None]), short)
            else:
                some, every = some.masked_fill(some_sunk, 0), every.masked_fill(all_sunk, 0)
            self.spans[axis] = some, past.masked_fill(some_sunk, n), every, short.masked_fill(all_sunk, n)

    def boxes(self, visit: Box, start: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Lists of at most `most` boxes that cover the reach of each owner: (origin, is one, is seen whole)."""
        spans = zip(self.spans, visit, strict=True)
        t, h, w = (((past - some).clamp_min(0) + side - 1)[:, None] // side for (some, past, _, _), side in spans)
        e = torch.arange(most, device=t.device)
        steps = e // (h * w).clamp_min(1), e // w.clamp_min(1) % h.clamp_min(1), e % w.clamp_min(1)
        origin, whole = start, True
        for axis, (some, _, every, short) in enumerate(self.spans):
            at = some[:, None] + steps[axis] * visit[axis]
            whole = whole & (at >= every[:, None]) & (at + visit[axis] <= short[:, None])
            origin = origin + at * self.clip.step(axis)
        return origin, e < t * h * w, whole


def _runs(begin, end, some, every, step: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of runs of `step` tokens that cover `[begin, end)`, at most `longest`; `[some, every)` is seen whole."""
    first = begin[:, None] + torch.arange(0, longest, step, device=begin.device)
    return ~first, first < end[:, None], (first >= some[:, None]) & (first + step <= every[:, None])


def _whole_first(origin: Tensor, valid: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lists in their order, but first what is seen whole; how many are, and how many there are at all."""
    whole = whole & valid
    rest = valid & ~whole
    wholes = whole.sum(1)
    place = torch.where(whole, whole.cumsum(1) - 1, rest.cumsum(1) - 1 + wholes[:, None])
    place = place.masked_fill(~valid, origin.shape[1])
    listed = origin.new_zeros(origin.shape[0], origin.shape[1] + 1).scatter_(1, place, origin)
    return listed, wholes, wholes + rest.sum(1)


def _rows(*columns: Tensor | int) -> Tensor:
    like = next(c for c in columns if isinstance(c, Tensor))
    return torch.stack([c if isinstance(c, Tensor) else torch.full_like(like, c) for c in columns], -1).int()
