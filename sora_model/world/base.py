"""What every scene is made of: dice, things, states and claims.

Lengths are in units of the frame's shorter side, the origin is the frame's top-left corner, x points right and y down,
times are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from .palette import BACKGROUNDS, COLOURS, STYLES
from .shapes import FIGURES

SHAPES: tuple[str, ...] = (*FIGURES, "box", "line")

# One pair per shape, every colour at most once: training shows both halves of each pair, never together.
HELD_OUT: tuple[tuple[str, str], ...] = (
    ("green", "circle"),
    ("orange", "square"),
    ("blue", "triangle"),
    ("purple", "ring"),
    ("cyan", "box"),
    ("pink", "line"),
)
SPLITS: tuple[str, ...] = ("train", "held_out", "all")
HIDDEN, SHOWN = 0.1, 0.5  # hidden: at most a tenth is visible; shown again: at least half


def pairs(split: str) -> list[tuple[str, str]]:
    """The (colour, shape) pairs of a split: ``train``, ``held_out`` or ``all``."""
    every = [(c, s) for c in COLOURS for s in SHAPES]
    if split == "all":
        return every
    return [p for p in every if (p in HELD_OUT) == (split == "held_out")]


class Dice:
    """Draws from one seed, by ``Generator.random`` alone: its stream is the same in every NumPy."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._rng.random()

    def chance(self, p: float) -> bool:
        return bool(self._rng.random() < p)

    def pick(self, items):
        items = list(items)
        return items[int(self._rng.random() * len(items))]


@dataclass(frozen=True)
class Thing:
    """An object: its colour, its shape and its radius (for a line half its width, for a box its half side)."""

    colour: str
    shape: str
    radius: float


@dataclass(frozen=True)
class Event:
    """Something that happens at a time to the things ``who``: ``kind`` is edge, collide, land, bite, ..."""

    time: float
    kind: str
    who: tuple[int, ...]


@dataclass(frozen=True)
class State:
    """The truth about T frames and N things, in the module's units.

    position fp64 [T,N,2], (x, y) of each centroid in the frame · velocity [T,N,2], after any event up to that time ·
    visible [T,N], the share of a thing's whole area that shows, exact (worked out when asked for) · events: those up to
    the last frame, in order · extra: what else the scene knows, by name (a scene's docstring lists it).
    """

    scene: Scene
    times: np.ndarray
    position: np.ndarray
    velocity: np.ndarray
    events: tuple[Event, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def things(self) -> tuple[Thing, ...]:
        return self.scene.things

    @cached_property
    def visible(self) -> np.ndarray:
        return self.scene.visible(self)

    def kinds(self, *who: int) -> tuple[str, ...]:
        """The kinds of the events that some thing of ``who`` takes part in (of all when none is named), in order."""
        return tuple(e.kind for e in self.events if not who or set(who) & set(e.who))

    def hides(self, thing: int) -> bool:
        """True when in some frame at most a tenth of the thing is visible after it was at least half visible."""
        return self._hidden_from(thing) is not None

    def reappears(self, thing: int) -> bool:
        """True when the thing hides and is at least half visible in a later frame."""
        first = self._hidden_from(thing)
        return first is not None and bool((self.visible[first:, thing] >= SHOWN).any())

    def _hidden_from(self, thing: int) -> int | None:
        visible = self.visible[:, thing]
        seen = np.flatnonzero(visible >= SHOWN)
        hidden = np.flatnonzero(visible <= HIDDEN)
        later = hidden[hidden > seen[0]] if len(seen) else ()
        return int(later[0]) if len(later) else None


@dataclass(frozen=True)
class Setting:
    """Where a scene is set: the frame's (width, height) in its shorter side, a style and a background."""

    box: tuple[float, float]
    style: str
    background: str


@dataclass(frozen=True)
class Claims:
    """All that a caption may say of a clip and be true: the way each thing first heads (None: no clear one), the
    accounts of what happens (each a sequence of events), the camera's way, the pace."""

    ways: tuple[str | None, ...]
    accounts: frozenset[tuple[str, ...]]
    camera: str | None = None
    pace: str | None = None


Cast = Callable[..., list[tuple[str, str]]]


class Scene:
    """Base of the scenes. Each is a frozen dataclass in a file of ``scenes/`` with these, and a row in its registry.

    ``name`` · ``RULES``: (account, number of things, templates) for captions, see ``captions`` · ``draw(dice, setting,
    cast)`` where ``cast(n, shapes)`` names n things of different colours · ``state(times)``, exact at any times >= 0 in
    ascending order, each the same whatever the others are · ``visible(state)`` · ``paint(canvas, state)`` ·
    ``claims(state)``.
    """

    name: ClassVar[str]
    RULES: ClassVar[tuple]
    setting: Setting
    things: tuple[Thing, ...]

    @classmethod
    def draw(cls, dice: Dice, setting: Setting, cast: Cast) -> Scene:
        raise NotImplementedError

    def state(self, times: np.ndarray) -> State:
        raise NotImplementedError

    def paint(self, canvas, state: State) -> None:
        for thing, position in zip(state.things, np.moveaxis(state.position, 1, 0), strict=True):
            canvas.figure(thing, position)

    def visible(self, state: State) -> np.ndarray:
        """[T,N]: the share of each thing's whole area that shows, exact."""
        return np.ones(state.position.shape[:2])

    def claims(self, state: State) -> Claims:
        raise NotImplementedError


def draw_setting(dice: Dice, box: tuple[float, float], fixed: Mapping[str, Any]) -> Setting:
    """Two draws, whatever is fixed, so that a fixed style or background leaves the rest of the clip as it is."""
    style, chance = dice.pick(("flat", *STYLES)), dice.uniform(0, 1)
    style = fixed.get("style", style)
    allowed = STYLES[style]
    if (wanted := fixed.get("background")) is not None:
        if wanted not in allowed and "style" in fixed:
            raise ValueError(
                f"prompt_spec: style {style!r} goes with background {' or '.join(allowed)}, not {wanted!r}"
            )
        style = style if wanted in allowed else "flat"
        return Setting(box, style, wanted)
    return Setting(box, style, allowed[int(chance * len(allowed))])


def cast_of(dice: Dice, split: str, fixed: Mapping[str, Any]) -> Cast:
    """Names things of different colours whose pairs are in ``split`` (of the held-out ones the first alone); ``fixed``
    may give the first one's colour and shape."""

    def cast(count: int, shapes: tuple[str, ...] = FIGURES) -> list[tuple[str, str]]:
        named: list[tuple[str, str]] = []
        for i in range(count):
            asked = fixed if i == 0 else {}
            allowed = [
                (c, s)
                for c, s in pairs("all" if i and split == "held_out" else split)
                if s in shapes and asked.get("colour", c) == c and asked.get("shape", s) == s
                and c not in [n[0] for n in named] and (i == 0 or c != fixed.get("colour"))
            ]  # fmt: skip
            if not allowed:
                raise ValueError(
                    f"prompt_spec asks for {dict(fixed)}: no such thing among the shapes {', '.join(shapes)} of this "
                    f"scene in split {split!r}; use split='all' or one of the pairs of world.pairs({split!r})"
                )
            named.append(dice.pick(allowed))
        return named

    return cast


def count_of(dice: Dice, weights: Mapping[int, float]) -> int:
    """A number of things, drawn with these weights."""
    rest = dice.uniform(0, sum(weights.values()))
    for number, weight in weights.items():
        rest -= weight
        if rest < 0:
            return number
    return max(weights)


def fold(start: float, velocity: float, low: float, high: float, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position and velocity on one axis under elastic reflection at ``low`` and ``high``: a triangle wave."""
    span = high - low
    phase = np.mod(start - low + velocity * times, 2 * span)
    returning = phase > span
    return low + np.where(returning, 2 * span - phase, phase), np.where(returning, -velocity, velocity)


def fold_events(start: float, velocity: float, low: float, high: float, until: float) -> list[float]:
    """The times up to ``until`` at which ``fold`` reflects."""
    if velocity == 0:
        return []
    first, gap = ((high if velocity > 0 else low) - start) / velocity, (high - low) / abs(velocity)
    return [first + i * gap for i in range(int(max(-1, (until - first) // gap)) + 1)]


def way_of(vx: float, vy: float) -> str | None:
    """The way a velocity heads: left, right, up or down; None when it is too slow or too oblique to say."""
    if math.hypot(vx, vy) < 0.05 or max(abs(vx), abs(vy)) < 1.4 * min(abs(vx), abs(vy)):
        return None
    if abs(vx) > abs(vy):
        return "right" if vx > 0 else "left"
    return "down" if vy > 0 else "up"


def smooth(u: np.ndarray) -> np.ndarray:
    """3u² - 2u³ on [0, 1], 0 before and 1 after: from rest to rest."""
    u = np.clip(u, 0, 1)
    return u * u * (3 - 2 * u)


def smooth_rate(u: np.ndarray) -> np.ndarray:
    """Derivative of ``smooth``."""
    u = np.clip(u, 0, 1)
    return 6 * u * (1 - u)


def known(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checked ``prompt_spec``."""
    allowed = {"colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS, "style": STYLES, "count": (1, 2, 3)}
    if not isinstance(spec, Mapping):
        raise TypeError(f"prompt_spec must be a mapping, got {type(spec).__name__}")
    for key, value in spec.items():
        if key not in allowed:
            raise ValueError(f"prompt_spec key {key!r} is unknown; it may hold {', '.join(allowed)}")
        if value not in allowed[key]:
            raise ValueError(f"prompt_spec {key} must be one of {', '.join(map(str, allowed[key]))}, got {value!r}")
    return spec
