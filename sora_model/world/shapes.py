"""The flat shapes: distances, areas, reach, and when one that moves past another touches it.

Lengths are in any unit; a shape of radius r has about the area of a disc of that radius, and its centroid is 0.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

FIGURES: tuple[str, ...] = ("circle", "square", "triangle", "ring")

# Sizes as multiples of the radius. The triangle is equilateral, apex up, and given by its circumradius.
SQUARE_HALF = math.sqrt(math.pi) / 2
TRIANGLE = 1.35
RING_OUTER, RING_INNER = 1.12, 0.56
_ROOT3 = math.sqrt(3)


def extent(shape: str, radius: float) -> tuple[float, float, float, float]:
    """How far the shape reaches (left, right, up, down) from its centroid."""
    if shape == "triangle":
        big = TRIANGLE * radius
        return big * _ROOT3 / 2, big * _ROOT3 / 2, big, big / 2
    return ({"circle": 1.0, "square": SQUARE_HALF, "ring": RING_OUTER}[shape] * radius,) * 4


def reach(shape: str, radius: float) -> float:
    """Radius of the smallest disc about the centroid that holds the shape."""
    return {"circle": 1.0, "square": math.sqrt(2) * SQUARE_HALF, "triangle": TRIANGLE, "ring": RING_OUTER}[
        shape
    ] * radius


def area(shape: str, radius: float) -> float:
    """Exact area."""
    return float(area_left_of(shape, radius, np.array(math.inf)))


def area_left_of(shape: str, radius: float, x: np.ndarray) -> np.ndarray:
    """Exact area of the part of the shape whose first coordinate is below ``x``."""
    x = np.asarray(x, dtype=np.float64)
    if shape == "square":
        half = SQUARE_HALF * radius
        return 2 * half * (np.clip(x, -half, half) + half)
    if shape == "triangle":
        half, height = TRIANGLE * radius * _ROOT3 / 2, 1.5 * TRIANGLE * radius
        u = np.clip(x / half, -1, 1)
        return height * half * np.where(u < 0, (1 + u) ** 2 / 2, 1 - (1 - u) ** 2 / 2)

    def disc(a: float) -> np.ndarray:
        u = np.clip(x / a, -1, 1)
        return a * a * (math.pi / 2 + np.arcsin(u) + u * np.sqrt(1 - u * u))

    if shape == "ring":
        return disc(RING_OUTER * radius) - disc(RING_INNER * radius)
    return disc(radius)


def distance(shape: str, radius: float, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Signed distance to the outline at (dx, dy) from the centroid, negative inside; outside a corner it is that to
    the nearer edge's line."""
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - SQUARE_HALF * radius
    if shape == "triangle":
        return np.maximum((_ROOT3 / 2) * np.abs(dx) - 0.5 * dy, dy) - TRIANGLE * radius / 2
    d = np.sqrt(dx * dx + dy * dy)
    if shape == "ring":
        return np.abs(d - (RING_OUTER + RING_INNER) / 2 * radius) - (RING_OUTER - RING_INNER) / 2 * radius
    return d - radius


def chord(shape: str, radius: float, y: np.ndarray) -> np.ndarray:
    """Half the width of a shape without a hole, symmetric in x, at height ``y`` from its centroid; 0 where there is
    none."""
    if shape == "square":
        return np.where(np.abs(y) <= SQUARE_HALF * radius, SQUARE_HALF * radius, 0.0)
    if shape == "triangle":
        big = TRIANGLE * radius
        return np.where((y >= -big) & (y <= big / 2), (y + big) / _ROOT3, 0.0)
    return np.sqrt(np.maximum(radius * radius - y * y, 0))


def _corners(shape: str, radius: float) -> list[tuple[float, float]]:
    if shape == "square":
        h = SQUARE_HALF * radius
        return [(-h, -h), (h, -h), (h, h), (-h, h)]
    if shape == "triangle":
        left, _, up, down = extent(shape, radius)
        return [(0.0, -up), (left, down), (-left, down)]
    return [(0.0, 0.0)]


@cache
def _difference(one: tuple[str, float], two: tuple[str, float]) -> tuple[list[tuple[float, float]], float]:
    """Where the first shape's centre overlaps the second, at 0: a convex polygon, in order, and its rounding."""
    points = sorted({(bx - ax, by - ay) for ax, ay in _corners(*one) for bx, by in _corners(*two)})
    hull: list[tuple[float, float]] = []
    for chain in (points, points[::-1]):
        start = len(hull)
        for p in chain:
            while len(hull) - start > 1:
                (ax, ay), (bx, by) = hull[-2], hull[-1]
                if (bx - ax) * (p[1] - ay) - (by - ay) * (p[0] - ax) > 1e-12:
                    break
                hull.pop()
            hull.append(p)
        hull.pop()
    rounding = sum(reach(shape, radius) for shape, radius in (one, two) if shape in ("circle", "ring"))
    return hull or points, rounding


def gap(one: tuple[str, float], two: tuple[str, float], dx: float, dy: float) -> float:
    """Distance between two shapes (name, radius) that do not overlap, the first at (dx, dy) from the second; negative
    where they do."""
    hull, rounding = _difference(one, two)
    if len(hull) == 1:
        return math.hypot(dx - hull[0][0], dy - hull[0][1]) - rounding
    outside, depth = math.inf, -math.inf
    for (ax, ay), (bx, by) in zip(hull, hull[1:] + hull[:1], strict=True):
        ex, ey = bx - ax, by - ay
        length = math.hypot(ex, ey)
        depth = max(depth, ((dx - ax) * ey - (dy - ay) * ex) / length)
        s = min(1.0, max(0.0, ((dx - ax) * ex + (dy - ay) * ey) / length**2))
        outside = min(outside, math.hypot(dx - ax - s * ex, dy - ay - s * ey))
    return (outside if depth > 0 else depth) - rounding


def contact(
    one: tuple[str, float], two: tuple[str, float], dx: float, dy: float, vx: float, vy: float
) -> tuple[float, float, float]:
    """When the first shape, at (dx, dy) from the second and moving by (vx, vy) relative to it, meets it: (time, normal
    x, normal y), time infinite when never. The normal points from the second to the first."""
    hull, rounding = _difference(one, two)
    best = (math.inf, 0.0, 0.0)
    if rounding:
        for cx, cy in hull:
            px, py = dx - cx, dy - cy
            a, b, c = vx * vx + vy * vy, px * vx + py * vy, px * px + py * py - rounding * rounding
            if b < 0 and (root := b * b - a * c) >= 0:
                t = max(0.0, c / (-b + math.sqrt(root)))
                if t < best[0]:
                    nx, ny = px + t * vx, py + t * vy
                    length = math.hypot(nx, ny)
                    best = (t, nx / length, ny / length)
    for (ax, ay), (bx, by) in zip(hull, hull[1:] + hull[:1], strict=True) if len(hull) > 1 else ():
        length = math.hypot(bx - ax, by - ay)
        nx, ny = (by - ay) / length, -(bx - ax) / length
        along = nx * vx + ny * vy
        away = nx * (dx - ax) + ny * (dy - ay) - rounding
        if along < 0 and away > -1e-9:
            t = max(0.0, -away / along)
            s = ((dx + t * vx - ax) * (bx - ax) + (dy + t * vy - ay) * (by - ay)) / length
            if -1e-9 <= s <= length + 1e-9 and t < best[0]:
                best = (t, nx, ny)
    return best
