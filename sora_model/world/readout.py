"""Reads a clip back: the object's colour and shape, where it is, when it is hidden, which way it goes.

It knows the world (a plain background, at most one full-height wall, one object of a named colour and shape)
and nothing about the clip's seed, so it measures generated clips and true ones alike. On true clips it is a
measure of itself: the read-out floor, kept by the tests, which every published figure should be read against.

What it does, in order: the median of each column over frames and rows is the still part, background and wall;
what differs from it is the object; its colour is the median of the most different pixels, named by hue; each
pixel's coverage is its projection on the line from background to that colour; the centroid is the coverage's
first moment; the shape is the one whose rendering, scaled to the measured area and perhaps out of focus,
correlates with the coverage best.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .render import coverage
from .scenes import BACKGROUNDS, COLOURS, SHAPES, WALLS, area_left_of

# An object must stand out from what is still by this much (RGB distance) to count as there at all.
_FAINTEST = 60.0
_LEAST_AREA = 4.0


@dataclass(frozen=True)
class Reading:
    """What was read. Lengths in pixels, arrays of length T.

    colour, shape: names, None when no object is seen · position [T,2] (x, y) of the visible part's centroid,
    where a pixel's centre is a whole number, NaN where absent · visible [T], area relative to the whole
    object · present [T] bool · likeness: correlation with each shape, 1 is perfect · wall: (left, right)
    columns, or None.
    """

    colour: str | None
    shape: str | None
    position: np.ndarray
    visible: np.ndarray
    present: np.ndarray
    likeness: dict[str, float]
    wall: tuple[int, int] | None

    @property
    def reappears(self) -> bool:
        """True when the object is seen, then all but gone while there is a wall, then seen again."""
        if self.wall is None:
            return False
        seen, gone = self.visible >= 0.5, self.visible < 0.2
        if not (seen.any() and gone.any()):
            return False
        later = np.flatnonzero(gone & (np.arange(len(gone)) > int(np.argmax(seen))))
        return bool(len(later) and seen[later[0] :].any())

    def heading(self, fps: float = 8) -> str | None:
        """Where the object goes in its first half second in sight; None when it stays or is not seen."""
        frames = np.flatnonzero(self.present)
        if len(frames) < 2:
            return None
        window = frames[frames <= frames[0] + max(1, round(0.5 * fps))]
        dx, dy = self.position[window[-1]] - self.position[window[0]]
        if max(abs(dx), abs(dy)) < 0.5:
            return None
        if abs(dx) >= abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"


def read(video: np.ndarray) -> Reading:
    """Read a clip [T,H,W,3], uint8 or floating point in [0, 1]. Raises ValueError for anything else."""
    pixels = _pixels(video)
    still = np.median(pixels, axis=(0, 1))
    background, wall = _background(still, narrowest=min(pixels.shape[1:3]) / 8)
    difference = pixels - still
    distance = np.sqrt(np.einsum("thwc,thwc->thw", difference, difference))
    if wall is not None:
        distance[:, :, wall[0] : wall[1]] = 0
    strongest = np.partition(distance.ravel(), -3)[-3]
    if strongest < _FAINTEST:
        return _nothing(len(pixels), wall)
    colour = np.median(pixels[distance >= 0.7 * strongest], axis=0)

    towards = colour - background
    cover = difference @ (towards / (towards @ towards))
    if wall is not None:
        cover[:, :, wall[0] + 1 : max(wall[0] + 1, wall[1] - 1)] = 0
    coarse, cover = _isolate(cover)
    areas, position = _moments(cover, coarse)
    if areas.max() < _LEAST_AREA:
        return _nothing(len(pixels), wall)
    whole = float(np.median(areas[areas >= 0.9 * areas.max()]))
    visible = areas / whole
    present = visible >= 0.1
    position[~present] = np.nan
    likeness = _likeness(cover, position, visible, whole)
    return Reading(_name(colour), max(likeness, key=likeness.get), position, visible, present, likeness, wall)


def score(video: np.ndarray, expected: Mapping, fps: float = 8) -> dict[str, bool | None]:
    """Whether a clip shows what is ``expected`` (as in ``eval_prompts``): colour, shape, moves, reappears.

    An entry is None where ``expected`` says nothing (its ``direction`` or ``reappears`` is None or absent).
    """
    seen = read(video)
    direction, reappears = expected.get("direction"), expected.get("reappears")
    return {
        "colour": seen.colour == expected["colour"],
        "shape": seen.shape == expected["shape"],
        "moves": None if direction is None else seen.heading(fps) == direction,
        "reappears": None if reappears is None else seen.reappears == reappears,
    }


def _pixels(video: np.ndarray) -> np.ndarray:
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"video must be [T,H,W,3] and not empty, got shape {list(video.shape)}")
    if video.dtype == np.uint8:
        return video.astype(np.float32)
    if not np.issubdtype(video.dtype, np.floating):
        raise ValueError(f"video must be uint8 or floating point in [0, 1], got {video.dtype}")
    if not np.isfinite(video).all() or video.min() < -0.01 or video.max() > 1.01:
        raise ValueError("video of floating point must lie in [0, 1]; clamp it, or scale it from [-1, 1] first")
    return video.astype(np.float32) * 255


def _background(still: np.ndarray, narrowest: float) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Background colour and wall span from the colours [W,3] of the still columns."""
    names = [(c, False) for c in BACKGROUNDS.values()] + [(c, True) for c in WALLS.values()]
    palette = np.array([c for c, _ in names], np.float32)
    nearest = np.argmin(((still[:, None] - palette) ** 2).sum(-1), axis=1)
    is_wall = np.array([w for _, w in names])[nearest]
    edges = np.flatnonzero(np.diff(np.concatenate(([0], is_wall.astype(np.int8), [0]))))
    left, right = max(edges.reshape(-1, 2).tolist(), key=lambda run: run[1] - run[0], default=(0, 0))
    # A clip that is wall from side to side has no background to speak of: take the whole as background.
    if right - left < narrowest or right - left == len(still):
        return np.median(still, axis=0), None
    # Edge columns are a blend of both; they belong to neither.
    inner = np.ones(len(still), dtype=bool)
    inner[max(0, left - 1) : right + 1] = False
    background = np.median(still[inner if inner.any() else ~is_wall], axis=0)
    return background, (left, right)


def _name(rgb: np.ndarray) -> str:
    hue, saturation, _ = colorsys.rgb_to_hsv(*(float(v) / 255 for v in rgb))
    if saturation < 0.3:
        return "white"

    def gap(name: str) -> float:
        other = colorsys.rgb_to_hsv(*(v / 255 for v in COLOURS[name]))[0]
        return min(abs(hue - other), 1 - abs(hue - other))

    return min((name for name in COLOURS if name != "white"), key=gap)


def _isolate(cover: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each frame's object roughly is ([T,2], NaN where absent), and the coverage near it alone.

    Rough is the median of the solid pixels. Near is within 2 pixels of a solid one that is no farther than a
    shape of that area reaches; the rest, noise and stray spots, becomes 0.
    """
    solid = cover > 0.5
    coarse = np.full((len(cover), 2), np.nan)
    counts = solid.sum(axis=(1, 2))
    reach = 1.8 * math.sqrt(float(np.quantile(counts, 0.9)) / math.pi) + 2
    near = np.zeros_like(solid)
    for t in np.flatnonzero(counts >= _LEAST_AREA):
        rows, columns = np.nonzero(solid[t])
        x, y = np.median(columns), np.median(rows)
        coarse[t] = x, y
        box = (
            slice(max(0, math.floor(y - reach)), math.ceil(y + reach) + 1),
            slice(max(0, math.floor(x - reach)), math.ceil(x + reach) + 1),
        )
        near[t][box] = solid[t][box]
    for axis in (1, 2):
        grown = near.copy()
        for shift in (1, 2):
            ahead, behind = [slice(None)] * 3, [slice(None)] * 3
            ahead[axis], behind[axis] = slice(shift, None), slice(None, -shift)
            grown[tuple(ahead)] |= near[tuple(behind)]
            grown[tuple(behind)] |= near[tuple(ahead)]
        near = grown
    return coarse, np.where(near, cover, 0)


def _moments(cover: np.ndarray, coarse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area [T] and centroid [T,2] of the coverage."""
    areas, position = np.zeros(len(cover)), np.full((len(cover), 2), np.nan)
    found = ~np.isnan(coarse[:, 0]) & (cover.sum(axis=(1, 2)) >= 1)
    rows, columns = np.arange(cover.shape[1]), np.arange(cover.shape[2])
    part = cover[found].astype(np.float64)
    areas[found] = part.sum(axis=(1, 2))
    across, down = part.sum(axis=1) @ columns, part.sum(axis=2) @ rows
    position[found] = np.stack([across, down], axis=-1) / areas[found, None]
    return areas, position


def _likeness(cover: np.ndarray, position: np.ndarray, visible: np.ndarray, whole: float) -> dict[str, float]:
    """Cosine of the coverage with each shape's rendering, sharp or out of focus.

    Taken over up to 9 frames that show the whole object.
    """
    frames = np.argsort(np.abs(visible - 1))[:9]
    frames = frames[np.abs(visible[frames] - 1) <= 0.1]
    seen = cover[frames]
    dx = np.arange(cover.shape[2]) - position[frames, 0, None, None]
    dy = np.arange(cover.shape[1])[:, None] - position[frames, 1, None, None]
    likeness = {}
    for shape in SHAPES:
        radius = math.sqrt(whole / float(area_left_of(shape, 1.0, np.array(math.inf))))
        ideals = (coverage(shape, radius, dx, dy, ramp) for ramp in (1.0, 2.5, 4.0))
        likeness[shape] = max(_cosine(seen, ideal) for ideal in ideals)
    return likeness


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norm = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else 0.0


def _nothing(frames: int, wall: tuple[int, int] | None) -> Reading:
    absent = np.zeros(frames)
    return Reading(None, None, np.full((frames, 2), np.nan), absent, absent > 0, dict.fromkeys(SHAPES, 0.0), wall)
