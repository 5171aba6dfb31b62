"""Rendering: anti-aliased by the area a shape covers of each pixel, from its signed distance."""

from __future__ import annotations

import math

import numpy as np

from .scenes import (
    BACKGROUNDS,
    COLOURS,
    RING_INNER,
    RING_OUTER,
    SQUARE_HALF,
    TRIANGLE,
    WALLS,
    Scene,
    State,
    extent,
)

# Pixels of the object's surroundings painted at a time: bounds the memory of a long or large clip.
_BLOCK = 1 << 20


def coverage(shape: str, radius: float, dx: np.ndarray, dy: np.ndarray, ramp: float = 1.0) -> np.ndarray:
    """Covered fraction of pixels whose centres lie (dx, dy) from the shape's centroid; all in pixels,
    broadcast.

    ``clip(1/2 - d/ramp, 0, 1)`` with d the signed distance to the outline: at ``ramp`` 1 the covered area to
    second order, and exact for the axis-aligned square, a product of two interval overlaps. A wider ramp is
    an outline out of focus.
    """

    def inside(depth: np.ndarray) -> np.ndarray:
        if ramp != 1.0:
            depth = depth / ramp
        return np.clip(depth + 0.5, 0, 1)

    if shape == "square":
        half = SQUARE_HALF * radius
        return inside(half - np.abs(dx)) * inside(half - np.abs(dy))
    if shape == "triangle":
        inner = TRIANGLE * radius / 2
        return inside(inner + 0.5 * dy - (math.sqrt(3) / 2) * np.abs(dx)) * inside(inner - dy)
    d = np.sqrt(dx * dx + dy * dy)
    if shape == "ring":
        return inside(RING_OUTER * radius - d) - inside(RING_INNER * radius - d)
    return inside(radius - d)


def paint(scene: Scene, state: State, size: tuple[int, int]) -> np.ndarray:
    """Frames uint8 [T,H,W,3] of ``scene`` in ``state``, for ``size`` = (H, W)."""
    height, width = size
    unit = min(height, width)
    frames = len(state.times)
    canvas = np.empty((height, width, 3), dtype=np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    behind = np.ones(width, dtype=np.float32)
    if scene.wall is not None:
        edges = np.arange(width, dtype=np.float64)
        wall = np.clip(np.minimum(edges + 1, scene.wall.right * unit) - np.maximum(edges, scene.wall.left * unit), 0, 1)
        behind = (1 - wall).astype(np.float32)
        canvas = canvas * behind[:, None] + np.array(WALLS[scene.wall.colour], np.float32) * (1 - behind)[:, None]
    video = np.empty((frames, height, width, 3), dtype=np.uint8)
    video[:] = np.rint(canvas).astype(np.uint8)

    left, right, up, down = (math.ceil(e * unit) + 1 for e in extent(scene.shape, scene.radius))
    w, h = min(width, left + right + 1), min(height, up + down + 1)
    block = max(1, _BLOCK // (w * h))
    colour = np.array(COLOURS[scene.colour], np.float32) - np.array(BACKGROUNDS[scene.background], np.float32)
    for first in range(0, frames, block):
        centre = state.position[first : first + block] * unit
        x0 = np.clip(np.floor(centre[:, 0]).astype(np.int64) - left, 0, width - w)
        y0 = np.clip(np.floor(centre[:, 1]).astype(np.int64) - up, 0, height - h)
        columns, rows = x0[:, None] + np.arange(w), y0[:, None] + np.arange(h)
        dx = (columns + 0.5 - centre[:, :1]).astype(np.float32)[:, None, :]
        dy = (rows + 0.5 - centre[:, 1:]).astype(np.float32)[:, :, None]
        # The wall is in front: where it covers a part of the pixel, only the rest can show the object.
        alpha = coverage(scene.shape, scene.radius * unit, dx, dy) * behind[columns][:, None, :]
        picture = canvas[rows[:, :, None], columns[:, None, :]] + alpha[..., None] * colour
        index = np.arange(first, first + len(centre))[:, None, None]
        video[index, rows[:, :, None], columns[:, None, :]] = np.rint(picture).astype(np.uint8)
    return video
