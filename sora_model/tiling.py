"""Layers over tiles of a frame, each with the border of pixels that its outputs depend on: exact, without seams.

A convolution sees a few pixels around the one it computes. So a tile is computed from a window of the frame that
reaches as far as the layers see; at each layer it is cut down to what the layers that follow still need. Where the
window ends inside the frame, the outermost results are wrong and cut off before they are read; where it ends with the
frame, the layers' own padding is the true one. The windows follow from the layers' kernels and factors alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, cat, nn

from .stream import Pass

ONE = (1, 1, 1)
Tile = int | tuple[int, int] | None
"""The largest tile, in pixels: a side, or (height, width); None for whole frames."""


@dataclass(frozen=True)
class Span:
    """The elements [start, stop) of an axis that has `size`."""

    start: int
    stop: int
    size: int

    def seen(self, kernel: int, up: int = 1, down: int = 1) -> Span:
        """What a convolution with this span as result reads: of its input repeated `up` times, in steps of `down`."""
        front = (kernel - down) // 2  # elements of padding before the first, as the ops have it
        start, stop = (self.start * down - front) // up, -(-((self.stop - 1) * down - front + kernel) // up)
        size = self.size * down // up
        return Span(max(start // down * down, 0), min(stop, size), size)

    def given(self, up: int, down: int) -> Span:
        """The span that such a layer writes when this one is all it is given."""
        return Span(self.start * up // down, self.stop * up // down, self.size * up // down)


Window = tuple[Span, Span]
"""Rows and columns of a frame."""


@dataclass(frozen=True)
class Shortcut:
    """A way around several stages, added to what they make: of x repeated `up` times, or in steps of `down`."""

    apply: Callable[[Tensor, Pass], Tensor]
    up: tuple[int, int, int] = ONE
    down: tuple[int, int, int] = ONE

    def seen(self, window: Window) -> Window:
        return tuple(span.given(self.down[axis], self.up[axis]) for axis, span in enumerate(window, 1))


@dataclass(frozen=True)
class Stage:
    """A step from x to x: `convs` in turn, of x repeated `up` times in (t, h, w), or in steps of `down`.

    Without convolutions pixels only move: into channels (`down`) or out of them (`up`).
    past              a convolution over time alone, beside them
    forks, shortcut   where a shortcut begins: with what this stage is given; where it ends: with what this stage makes
    """

    apply: Callable[[Tensor, Pass], Tensor]
    convs: tuple[nn.Conv3d, ...]
    up: tuple[int, int, int] = ONE
    down: tuple[int, int, int] = ONE
    past: nn.Conv3d | None = None
    forks: bool = False
    shortcut: Shortcut | None = None

    def seen(self, window: Window) -> Window:
        for kernel in [conv.kernel_size for conv in reversed(self.convs)] or [self.down]:
            window = tuple(
                span.seen(kernel[axis], self.up[axis], self.down[axis]) for axis, span in enumerate(window, 1)
            )
        return window

    def given(self, window: Window) -> Window:
        return tuple(span.given(self.up[axis], self.down[axis]) for axis, span in enumerate(window, 1))


def in_latents(tile: Tile, size: Sequence[int], factor: int) -> tuple[int, int] | None:
    """A tile in latents; None where one holds the frame. `size` is that of the frame in latents."""
    if tile is None:
        return None
    both = tile if isinstance(tile, tuple) else (tile, tile)
    if len(both) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in both):
        raise ValueError(f"tile must be a number of pixels, (height, width) or None; got {tile!r}")
    if any(n % factor for n in both):
        fits = tuple(-(-n // factor) * factor for n in both)
        raise ValueError(f"tile must be in multiples of {factor} pixels; got {tile}; {fits} would fit")
    both = tuple(min(n // factor, most) for n, most in zip(both, size, strict=True))
    return None if both == tuple(size) else both


def shared(tile: tuple[int, int] | None, size: Sequence[int], ranks: int) -> tuple[int, int] | None:
    """No larger a tile, in latents, than gives each of the ranks one: of all ways to cut the frame into a tile a rank,
    that of the smallest and then the squarest tiles. None where one holds the frame."""
    height, width = size
    cuts = [(-(-height // rows), -(-width // min(ranks // rows, width))) for rows in range(1, min(ranks, height) + 1)]
    cut = min(cuts, key=lambda cut: (math.prod(cut), sum(cut)))
    both = tuple(map(min, cut, tile or size))
    return None if both == tuple(size) else both


def apply(stages: Sequence[Stage], x: Tensor, run: Pass) -> Tensor:
    """The stages in turn: of the whole frames, or tile by tile."""
    if run.tile is None:
        whole = tuple(n // math.prod([stage.down[1] for stage in stages]) for n in x.shape[3:])
        return _one(stages, x, run, windows(stages, x.shape[3:], whole)[0][0])
    grid = windows(stages, x.shape[3:], run.tile)
    tiles = [window for row in grid for window in row]
    if run.ranks is None:
        done = [_one(stages, x, run, window) for window in tiles]
    else:
        areas = [tuple(span.stop - span.start for span in window) for window in tiles]
        done = run.ranks.each(lambda window: _one(stages, x, run, window), tiles, areas)
    columns = len(grid[0])
    return cat([cat(done[i : i + columns], 4) for i in range(0, len(done), columns)], 3)


def windows(stages: Sequence[Stage], size: Sequence[int], tile: tuple[int, int]) -> list[list[Window]]:
    """The tiles of the result of frames of `size`: as equal as latents can be split, none of more than `tile`."""
    up, down = math.prod([stage.up[1] for stage in stages]), math.prod([stage.down[1] for stage in stages])
    axes = []
    for elements, most in zip(size, tile, strict=True):
        latents = elements // down
        count = -(-latents // most)
        edges = [latents * i // count * up for i in range(count + 1)]
        axes.append([Span(*ends, latents * up) for ends in zip(edges, edges[1:], strict=False)])
    return [[(rows, columns) for columns in axes[1]] for rows in axes[0]]


def memory(stages: Sequence[Stage], size: Sequence[int], frames: int, tile: tuple[int, int] | None) -> tuple[int, int]:
    """Elements that a stream of frames of `size` keeps in caches, and of the largest tensor of one chunk."""
    down = math.prod([stage.down[1] for stage in stages])
    grid = windows(stages, size, tile or tuple(n // down for n in size))
    rows = [[rows for rows, _ in needed(stages, window)] for window, *_ in grid]
    columns = [[columns for _, columns in needed(stages, window)] for window in grid[0]]
    kept = largest = 0
    for at, stage in enumerate(stages):
        lengths = [[span[at].stop - span[at].start for span in axis] for axis in (rows, columns)]
        remembering = stage.convs if stage.past is None else (*stage.convs, stage.past)
        kept += math.prod(map(sum, lengths)) * sum((conv.kernel_size[0] - 1) * conv.in_channels for conv in remembering)
        before = frames * math.prod(map(max, lengths))
        after = before * math.prod(stage.up) // math.prod(stage.down)
        if stage.convs:
            largest = max(largest, before * stage.convs[0].in_channels, after * stage.convs[-1].out_channels)
        frames = frames * stage.up[0] // stage.down[0]
    return kept, largest


def choices(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Tiles in latents, from the whole frame down to 8 latents, below which the borders outweigh what is saved."""
    yield size
    side = max(size)
    while side > 8:
        side = max(side * 3 // 4, 8)
        yield min(size[0], side), min(size[1], side)


def needed(stages: Sequence[Stage], window: Window) -> list[Window]:
    """What each stage must be given for `window` to come out of the last, and that window itself."""
    spans = [window]
    for stage in reversed(stages):
        spans.append(stage.seen(spans[-1]))
    return spans[::-1]


def _one(stages: Sequence[Stage], x: Tensor, run: Pass, window: Window) -> Tensor:
    wanted = needed(stages, window)
    have = tuple(Span(0, span.size, span.size) for span in wanted[0])
    for stage, want in zip(stages, wanted, strict=False):
        x = _cut(x, have, want)
        if stage.forks:
            begun, at = x, want
        x, have = stage.apply(x, run), stage.given(want)
        if stage.shortcut is not None:
            x = x + stage.shortcut.apply(_cut(begun, at, stage.shortcut.seen(have)), run)
    return _cut(x, have, window)


def bypassed(stages: Sequence[Stage], shortcut: Shortcut) -> list[Stage]:
    """The stages with a shortcut around them."""
    first = [replace(stages[0], forks=True), *stages[1:]]
    return [*first[:-1], replace(first[-1], shortcut=shortcut)]


def _cut(x: Tensor, have: Window, want: Window) -> Tensor:
    for axis, (h, w) in enumerate(zip(have, want, strict=True), 3):
        x = x.narrow(axis, w.start - h.start, w.stop - w.start)
    return x
