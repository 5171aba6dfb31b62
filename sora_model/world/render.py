"""Rendering: anti-aliased by the area a shape covers of each pixel, from its signed distance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .base import Scene, Setting, State, Thing
from .palette import BACKGROUNDS, GLOW, INSIDE, grey, ink
from .shapes import distance, extent, reach

# Pixels painted at a time: bounds the memory of a long or large clip.
_BLOCK = 1 << 22
_GLOW_REACH, _GLOW_WIDTH = 0.11, 0.04
_HATCH = 0.075
Bounds = tuple[float, float, float, float]


def paint(scene: Scene, state: State, size: tuple[int, int]) -> np.ndarray:
    """Frames uint8 [T,H,W,3] of ``scene`` in ``state``, for ``size`` = (H, W)."""
    video = np.empty((len(state.times), *size, 3), dtype=np.uint8)
    block = max(1, _BLOCK // (size[0] * size[1]))
    for first in range(0, len(video), block):
        part = state.times[first : first + block]
        canvas = Canvas(scene.setting, len(part), size)
        scene.paint(canvas, state if len(part) == len(video) else scene.state(part))
        for channel, plane in enumerate(canvas.image):
            np.add(plane, 0.5, out=video[first : first + block, ..., channel], casting="unsafe")
    return video


def inked(style: str, d: np.ndarray, hatch: np.ndarray | None, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """(mask, ink) of pixels at signed distance ``d`` (pixels): the share of the pixel that the shape takes from what
    is behind it, and the share of that which is its colour; the rest is background. mask >= ink."""
    mask = np.clip(0.5 - d, 0, 1)
    if style == "flat":
        return mask, mask
    inner = np.clip(0.5 - max(1.4, 0.024 * unit) - d, 0, 1)
    if style == "sketch":
        return mask, mask - inner * (1 - INSIDE["sketch"] - 0.3 * hatch)
    amount = mask - inner * (1 - INSIDE[style])
    if style == "neon":
        last = math.exp(-_GLOW_REACH / _GLOW_WIDTH)
        glow = np.exp(np.maximum(d, 0) * np.float32(-1 / (_GLOW_WIDTH * unit)))
        amount = amount + (1 - mask) * GLOW * np.maximum(glow - last, 0)
        mask = np.maximum(mask, amount)
    return mask, amount


def hatching(dx: np.ndarray, dy: np.ndarray, unit: float) -> np.ndarray:
    """Pencil lines at 45 degrees through a shape's centre, 0 to 1."""
    period = max(3.2, _HATCH * unit)
    wave = np.abs(np.mod((dx + dy) * np.float32(math.sqrt(0.5) / period) + 0.5, 1) - 0.5) * np.float32(period)
    return np.clip(0.21 * period + 0.5 - wave, 0, 1)


class Canvas:
    """T frames under the brush: ``image`` fp32 [3,T,H,W]. Lengths are in the world's units, pixels only inside."""

    def __init__(self, setting: Setting, frames: int, size: tuple[int, int]) -> None:
        self.setting, self.size, self.unit = setting, size, min(size)
        self.back = np.array(BACKGROUNDS[setting.background], np.float32)
        self.image = np.empty((3, frames, *size), np.float32)
        self.image[:] = self.back[:, None, None, None]
        self._flat = self.image.reshape(3, -1)

    def box(self, centre: np.ndarray, bounds: Bounds):
        """The pixels about ``centre`` [T,2] as far as ``bounds`` (left, right, up, down): their places [T,h,w] in a
        plane of the image, and their offsets dx [T,1,w], dy [T,h,1] from the centre in pixels."""
        height, width = self.size
        left, right, up, down = (math.ceil(b * self.unit) + 1 for b in bounds)
        w, h = min(width, left + right + 1), min(height, up + down + 1)
        centre = centre * self.unit
        x0 = np.clip(np.floor(centre[:, 0]).astype(np.int64) - left, 0, width - w)
        y0 = np.clip(np.floor(centre[:, 1]).astype(np.int64) - up, 0, height - h)
        columns, rows = x0[:, None] + np.arange(w), y0[:, None] + np.arange(h)
        dx = (columns + 0.5 - centre[:, :1]).astype(np.float32)[:, None, :]
        dy = (rows + 0.5 - centre[:, 1:]).astype(np.float32)[:, :, None]
        return (np.arange(len(centre))[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :], dx, dy

    def blend(self, index, mask: np.ndarray, amount: np.ndarray, colour: np.ndarray, rest=None) -> None:
        """What is there gives way by ``mask``: to ``colour`` by ``amount``, else to ``rest``, the background."""
        rest = self.back if rest is None else rest
        for plane, low, high in zip(self._flat, rest, colour, strict=True):
            region = plane[index]
            plane[index] = region + mask * (low - region) + amount * (high - low)

    def figure(
        self, thing: Thing, position: np.ndarray, *, cut: Sequence[tuple[np.ndarray, float, float]] = ()
    ) -> None:
        """A flat shape with its centroid at ``position`` [T,2]. ``cut``: discs taken out of it, (offset from the
        centroid, radius, time index from which it is gone)."""
        style, unit = self.setting.style, self.unit
        margin = _GLOW_REACH if style == "neon" else 0.0
        index, dx, dy = self.box(position, tuple(e + margin for e in extent(thing.shape, thing.radius)))
        d = distance(thing.shape, thing.radius * unit, dx, dy)
        if style == "neon":  # round corners, or their glow would run out in spikes
            d = np.maximum(d, np.sqrt(dx * dx + dy * dy) - reach(thing.shape, thing.radius) * unit)
        for (x, y), radius, first in cut:
            if first < len(d):
                hole = radius * unit - np.sqrt((dx[first:] - x * unit) ** 2 + (dy[first:] - y * unit) ** 2)
                d[first:] = np.maximum(d[first:], hole)
        self.stamp(index, d, dx, dy, thing.colour)

    def stroke(self, thing: Thing, start: np.ndarray, end: np.ndarray, first: int) -> None:
        """A line with round ends from ``start`` [2] to ``end`` [T,2], ``thing.radius`` to either side, from frame
        ``first`` on."""
        unit, margin = self.unit, thing.radius + (_GLOW_REACH if self.setting.style == "neon" else 0.0)
        span = end - start
        low, high = np.minimum(span.min(0), 0), np.maximum(span.max(0), 0)
        bounds = tuple(margin + float(b) for b in (-low[0], high[0], -low[1], high[1]))
        index, dx, dy = self.box(np.broadcast_to(start, end.shape), bounds)
        ex, ey = (span * unit).astype(np.float32).T[:, :, None, None]
        along = np.clip((dx * ex + dy * ey) / np.maximum(ex * ex + ey * ey, 1e-6), 0, 1)
        d = np.sqrt((dx - along * ex) ** 2 + (dy - along * ey) ** 2) - thing.radius * unit
        d[:first] = unit
        self.stamp(index, d, dx, dy, thing.colour)

    def stamp(self, index, d: np.ndarray, dx: np.ndarray, dy: np.ndarray, colour: str) -> None:
        """Pixels at signed distance ``d`` from a shape's outline, in this setting's style."""
        style = self.setting.style
        hatch = hatching(dx, dy, self.unit) if style == "sketch" else None
        self.blend(index, *inked(style, d, hatch, self.unit), ink(colour, self.setting.background))

    def faces(self, centre: np.ndarray, bounds: Bounds, faces: Sequence[tuple[np.ndarray, np.ndarray]], colour) -> None:
        """A body about ``centre`` [T,2] made of four-cornered ``faces`` that tile its outline: (corners [T,4,2]
        clockwise on the screen, brightness [T], 0 where the face is turned away)."""
        style, unit = self.setting.style, self.unit
        index, dx, dy = self.box(centre, tuple(b + (_GLOW_REACH if style == "neon" else 0) for b in bounds))
        shape = np.broadcast_shapes(dx.shape, dy.shape)
        mask, amount = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        hatch = hatching(dx, dy, unit) if style == "sketch" else None
        for corners, brightness in faces:
            seen = np.flatnonzero(brightness > 0)
            if not len(seen):
                continue
            p = ((corners[seen] - centre[seen, None]) * unit).astype(np.float32)
            d = _quadrangle(p, dx[seen], dy[seen])
            taken, given = inked(style, d, None if hatch is None else hatch[seen], unit)
            mask[seen] += taken
            amount[seen] += given * brightness[seen, None, None].astype(np.float32)
        over = np.maximum(mask, 1)
        shadow = grey("cream", 0.75) if style == "flat" and self.setting.background == "cream" else self.back
        self.blend(index, np.minimum(mask, 1), amount / over, ink(colour, self.setting.background), shadow)

    def disc(self, position: np.ndarray, radius: float, strength: float) -> None:
        """A grey disc."""
        index, dx, dy = self.box(position, (radius,) * 4)
        mask = np.clip(radius * self.unit + 0.5 - np.sqrt(dx * dx + dy * dy), 0, 1)
        tone = grey(self.setting.background, strength)
        self.blend(index, mask, mask, tone, tone)

    def ellipse(self, centre: np.ndarray, reach: np.ndarray, strength: float) -> None:
        """A grey ellipse that stays where it is."""
        y, x = (np.arange(n, dtype=np.float32) + 0.5 for n in self.size)
        u, v = (
            (x - centre[0] * self.unit) / (reach[0] * self.unit),
            (y - centre[1] * self.unit) / (reach[1] * self.unit),
        )
        level = np.sqrt(u * u + (v * v)[:, None])
        slope = np.sqrt((u / reach[0]) ** 2 + ((v / reach[1]) ** 2)[:, None]) / (self.unit * np.maximum(level, 1e-6))
        d = (level - 1) / np.maximum(slope, 1e-6)  # to first order in the distance to the outline
        self.shade(slice(None), np.clip(0.5 - d, 0, 1), strength)

    def bar(self, left, right, strength: float, top: float = 0.0, bottom: float = math.inf) -> None:
        """A grey rectangle over all frames; ``left`` and ``right`` are numbers or [T]."""
        rows = _overlap(self.size[0], top * self.unit, bottom * self.unit)
        lit = np.flatnonzero(rows)
        if not len(lit):
            return
        columns = _overlap(self.size[1], np.asarray(left) * self.unit, np.asarray(right) * self.unit)
        used = np.flatnonzero(columns.max(axis=0) if columns.ndim == 2 else columns)
        if not len(used):
            return
        y, x = slice(lit[0], lit[-1] + 1), slice(used[0], used[-1] + 1)
        mask = rows[y, None] * columns[..., None, x]
        self.shade((slice(None), y, x), mask, strength)

    def shade(self, index, mask: np.ndarray, strength: float) -> None:
        """A grey by ``mask`` over the slices ``index`` of each plane."""
        for plane, level in zip(self.image, grey(self.setting.background, strength), strict=True):
            region = plane[index]
            region += mask * (level - region)


def _quadrangle(corners: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Signed distance to convex quadrangles [T,4,2], clockwise on the screen. Near the outline it is what gives the
    covered share: between two opposite edges that is what both leave, so that a face seen from the side covers as
    little as it should."""
    edge = np.roll(corners, -1, axis=1) - corners
    length = np.maximum(np.linalg.norm(edge, axis=2), 1e-6)[..., None, None]
    along_x, along_y = np.moveaxis(edge[..., None, None] / length[..., None, :, :], 2, 0)
    deepest = nearest = None
    bare = []
    for k in range(4):
        ux, uy, half = along_x[:, k], along_y[:, k], length[:, k] / 2
        x, y = dx - corners[:, k, :1, None], dy - corners[:, k, 1:, None]  # of one axis each: cheap
        outside = x * uy - y * ux
        bare.append(np.clip(outside + 0.5, 0, 1))
        deepest = outside if deepest is None else np.maximum(deepest, outside)
        beyond = np.abs(x * ux + (y * uy - half))
        beyond -= half
        np.maximum(beyond, 0, out=beyond)
        beyond *= beyond
        beyond += outside * outside
        nearest = beyond if nearest is None else np.minimum(nearest, beyond)
    cover = np.maximum(1 - bare[0] - bare[2], 0) * np.maximum(1 - bare[1] - bare[3], 0)
    near = np.where(cover < 1, np.maximum(deepest, 0.5 - cover), deepest)
    return np.where(deepest > 0, np.maximum(np.sqrt(nearest), near), near)


def _overlap(count: int, low, high) -> np.ndarray:
    """Covered share of each of ``count`` pixels by [low, high]; fp32 [count] or [T, count]."""
    edges = np.arange(count, dtype=np.float64)
    low, high = np.asarray(low)[..., None], np.asarray(high)[..., None]
    return np.clip(np.minimum(edges + 1, high) - np.maximum(edges, low), 0, 1).astype(np.float32)
