"""Scenes of the procedural world: what is in them, and where everything is at any time, in closed form.

Lengths are in units of the frame's shorter side, the origin is the frame's top-left corner, x points right
and y down, times are in seconds. A scene holds one object; it moves at constant speed and reflects
elastically from the edges of the frame, so its state at time t needs no simulation: it is a triangle wave per
axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 38, 42),
    "green": (36, 186, 66),
    "blue": (48, 84, 240),
    "yellow": (244, 216, 40),
    "purple": (168, 56, 216),
    "cyan": (40, 212, 226),
    "orange": (250, 134, 24),
    "white": (240, 240, 240),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "ring")
SCENES: tuple[str, ...] = ("bounce", "occluder")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (10, 10, 14),
    "navy": (16, 24, 58),
    "grey": (66, 68, 72),
}
WALLS: dict[str, tuple[int, int, int]] = {"grey": (132, 134, 140), "brown": (104, 70, 44)}
DIRECTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}

# One pair per shape, every colour at most once: training shows both halves of each pair, never together.
HELD_OUT: tuple[tuple[str, str], ...] = (
    ("green", "circle"),
    ("orange", "square"),
    ("blue", "triangle"),
    ("purple", "ring"),
)
SPLITS: tuple[str, ...] = ("train", "held_out", "all")

# Sizes as multiples of the radius. The triangle is equilateral, apex up, and given by its circumradius.
SQUARE_HALF = math.sqrt(math.pi) / 2
TRIANGLE = 1.35
RING_OUTER, RING_INNER = 1.12, 0.56

# Walls begin and end on this grid, so that at the usual sizes no pixel is half wall: there an object that
# touches the wall shares its pixels with it and the covered areas, multiplied, are only approximately the
# visible one.
WALL_GRID = 64


def extent(shape: str, radius: float) -> tuple[float, float, float, float]:
    """How far the shape reaches (left, right, up, down) from its centroid."""
    if shape == "circle":
        return (radius,) * 4
    if shape == "square":
        return (SQUARE_HALF * radius,) * 4
    if shape == "ring":
        return (RING_OUTER * radius,) * 4
    big = TRIANGLE * radius
    return big * math.sqrt(3) / 2, big * math.sqrt(3) / 2, big, big / 2


def area_left_of(shape: str, radius: float, x: np.ndarray) -> np.ndarray:
    """Exact area of the part of the shape, centred at 0, whose first coordinate is below ``x``."""
    x = np.asarray(x, dtype=np.float64)
    if shape == "square":
        half = SQUARE_HALF * radius
        return 2 * half * (np.clip(x, -half, half) + half)
    if shape == "triangle":
        half, height = TRIANGLE * radius * math.sqrt(3) / 2, 1.5 * TRIANGLE * radius
        u = np.clip(x / half, -1, 1)
        return height * half * np.where(u < 0, (1 + u) ** 2 / 2, 1 - (1 - u) ** 2 / 2)

    def disc(a: float) -> np.ndarray:
        u = np.clip(x / a, -1, 1)
        return a * a * (math.pi / 2 + np.arcsin(u) + u * np.sqrt(1 - u * u))

    if shape == "ring":
        return disc(RING_OUTER * radius) - disc(RING_INNER * radius)
    return disc(radius)


def fold(start: float, velocity: float, low: float, high: float, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position and velocity on one axis under elastic reflection at ``low`` and ``high``: a triangle wave."""
    span = high - low
    phase = np.mod(start - low + velocity * times, 2 * span)
    returning = phase > span
    return low + np.where(returning, 2 * span - phase, phase), np.where(returning, -velocity, velocity)


@dataclass(frozen=True)
class Wall:
    """A vertical bar over the full height, in front of the object."""

    left: float
    right: float
    colour: str


@dataclass(frozen=True)
class State:
    """The truth about the object in each frame, in the module's units; arrays have length T.

    position [T,2] (x, y of the centroid) · velocity [T,2] (units per second, after any reflection up to that
    time) · visible [T], the fraction of the object's area that the wall does not cover, exact · hidden [T]
    bool, visible == 0 · bounces [T], number of reflections up to that time.
    """

    times: np.ndarray
    position: np.ndarray
    velocity: np.ndarray
    visible: np.ndarray
    hidden: np.ndarray
    bounces: np.ndarray
    radius: float
    colour: str
    shape: str

    @property
    def hides(self) -> bool:
        """True when in some frame at most a tenth of the object is visible."""
        return bool((self.visible <= 0.1).any())

    @property
    def reappears(self) -> bool:
        """True when the object hides and is at least half visible in a later frame."""
        return self.hides and bool((self.visible[int(np.argmax(self.visible <= 0.1)) :] >= 0.5).any())


@dataclass(frozen=True)
class Scene:
    """One object before a plain background, perhaps behind a wall. ``box`` is the frame (width, height)."""

    kind: str
    colour: str
    shape: str
    radius: float
    start: tuple[float, float]
    velocity: tuple[float, float]
    direction: str
    background: str
    box: tuple[float, float]
    wall: Wall | None = None

    def state(self, times: np.ndarray) -> State:
        """State at ``times`` [T] in seconds, exact for any time, in any order."""
        times = np.asarray(times, dtype=np.float64)
        left, right, up, down = extent(self.shape, self.radius)
        bounds = ((left, self.box[0] - right), (up, self.box[1] - down))
        axes, bounces = [], np.zeros(len(times), dtype=np.int64)
        for start, velocity, (low, high) in zip(self.start, self.velocity, bounds, strict=True):
            axes.append(fold(start, velocity, low, high, times))
            travelled = (start - low if velocity >= 0 else high - start) + abs(velocity) * times
            bounces += np.floor(travelled / (high - low)).astype(np.int64)
        position = np.stack([a[0] for a in axes], axis=-1)
        visible = np.ones(len(times))
        if self.wall is not None:
            x = position[:, 0]
            covered = area_left_of(self.shape, self.radius, self.wall.right - x) - area_left_of(
                self.shape, self.radius, self.wall.left - x
            )
            total = area_left_of(self.shape, self.radius, np.array(math.inf))
            visible = np.clip(1 - covered / total, 0, 1)
            visible[(x - left >= self.wall.left) & (x + right <= self.wall.right)] = 0
        velocity = np.stack([a[1] for a in axes], axis=-1)
        return State(times, position, velocity, visible, visible == 0, bounces, self.radius, self.colour, self.shape)


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


def draw(dice: Dice, kind: str, box: tuple[float, float], split: str, fixed: Mapping[str, str]) -> Scene:
    """Draw a scene of ``kind``; ``fixed`` may give colour, shape, direction and background."""
    allowed = [(c, s) for c, s in pairs(split) if fixed.get("colour", c) == c and fixed.get("shape", s) == s]
    if not allowed:
        raise ValueError(
            f"prompt_spec asks for {dict(fixed)}, which is not in split {split!r}; use split='all' or one of "
            f"the pairs of world.pairs({split!r})"
        )
    colour, shape = dice.pick(allowed)
    background = dice.pick(BACKGROUNDS)
    background = fixed.get("background", background)
    make = _occluder if kind == "occluder" else _bounce
    return make(dice, box, colour, shape, background, fixed.get("direction"))


def _bounce(dice: Dice, box, colour: str, shape: str, background: str, direction: str | None) -> Scene:
    radius = dice.uniform(0.14, 0.19)
    heading = dice.pick(DIRECTIONS)
    heading = direction or heading
    left, right, up, down = extent(shape, radius)
    low, span = (left, up), (box[0] - left - right, box[1] - up - down)
    dx, dy = DIRECTIONS[heading]
    # The object starts in the first two fifths of its way, so that the direction named in the caption shows.
    along, across = dice.uniform(0.02, 0.4), dice.uniform(0.1, 0.9)
    along = along if dx + dy > 0 else 1 - along
    unit = (along, across) if dx else (across, along)
    speed, angle = dice.uniform(0.35, 0.8), dice.uniform(-0.42, 0.42)
    velocity = (
        speed * (dx * math.cos(angle) - dy * math.sin(angle)),
        speed * (dx * math.sin(angle) + dy * math.cos(angle)),
    )
    start = (low[0] + unit[0] * span[0], low[1] + unit[1] * span[1])
    return Scene("bounce", colour, shape, radius, start, velocity, heading, background, box)


def _occluder(dice: Dice, box, colour: str, shape: str, background: str, direction: str | None) -> Scene:
    radius = dice.uniform(0.105, 0.122)
    heading = dice.pick(("right", "left"))
    heading = direction or heading
    if heading not in ("right", "left"):
        raise ValueError(f"prompt_spec direction {heading!r}: in the occluder scene it is 'left' or 'right'")
    half, _, up, down = extent(shape, radius)
    # A wall wider than the object by at least `gap`, with room for the whole object on either side of it.
    gap = dice.uniform(0.05, min(0.25, box[0] - 6 * half - 3 / WALL_GRID))
    columns = math.ceil(WALL_GRID * (2 * half + gap))
    first, last = math.ceil(WALL_GRID * 2 * half), math.floor(WALL_GRID * (box[0] - 2 * half)) - columns
    left = first + int(dice.uniform(0.0, 1.0) * (last - first + 1))
    wall = Wall(left / WALL_GRID, (left + columns) / WALL_GRID, dice.pick(WALLS))
    room = wall.left - 2 * half if heading == "right" else box[0] - wall.right - 2 * half
    way = dice.uniform(0.0, min(0.1, room))
    x = wall.left - half - way if heading == "right" else wall.right + half + way
    y = up + (box[1] - up - down) * dice.uniform(0.08, 0.92)
    speed = dice.uniform(0.36, 0.46) * DIRECTIONS[heading][0]
    return Scene("occluder", colour, shape, radius, (x, y), (speed, 0.0), heading, background, box, wall)
