"""`orbit`: one to three upright boxes on a round floor, seen by a pinhole camera that goes round them.

World axes: x and z span the floor, y points up. ``position`` is the centroid of a box's outline in the frame, without
what stands before it; ``velocity`` its derivative. ``extra``: ``camera`` [T,3] where the camera is, ``angle`` [T], its
azimuth, ``corners`` [T,N,8,2] in the frame, ``boxes`` [N,5]: x, z, half side, height, yaw. It looks at ``TARGET``, with
``FOCAL`` in units of the frame's shorter side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..base import Cast, Claims, Dice, Scene, Setting, State, Thing, count_of
from ..palette import SHADE

DISTANCE, HEIGHT, FOCAL, TARGET, FLOOR = 4.4, 2.3, 1.62, 0.35, 1.62
_CORNERS = np.array([(x, y, z) for y in (0, 1) for x, z in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
# Each face's corners, and its normal in the box's own axes.
_FACES = (
    ((4, 5, 6, 7), (0, 1, 0)), ((0, 1, 5, 4), (0, 0, -1)), ((1, 2, 6, 5), (1, 0, 0)),
    ((2, 3, 7, 6), (0, 0, 1)), ((3, 0, 4, 7), (-1, 0, 0)),
)  # fmt: skip
_LIGHT = np.array([0.35, 0.8, -0.49])


@dataclass(frozen=True)
class Orbit(Scene):
    name = "orbit"
    setting: Setting
    things: tuple[Thing, ...]
    boxes: tuple[tuple[float, float, float, float, float], ...]  # x, z, half side, height, yaw
    azimuth: float
    rate: float  # radians per second; positive: the camera goes to its left

    RULES = (
        (("orbit",), 1, ("the camera goes round {a}", "the camera goes {camera} round {a}")),
        (("orbit",), 2, ("the camera goes round {a} and {b}", "the camera goes {camera} round {a} and {b}",
                       "two boxes turn before the camera: {a} and {b}")),
        (("orbit",), 3, ("the camera goes round {a}, {b} and {c}",
                       "three boxes turn before the camera: {a}, {b} and {c}")),
    )  # fmt: skip

    @classmethod
    def draw(cls, dice: Dice, setting: Setting, cast: Cast, count: int | None = None) -> Orbit:
        drawn = count_of(dice, {1: 0.3, 2: 0.45, 3: 0.25})
        count = count or drawn
        things, boxes = [], []
        turn = dice.uniform(0, 2 * math.pi)
        for i, (colour, shape) in enumerate(cast(count, ("box",))):
            half = dice.uniform(0.4, 0.52) if count == 1 else dice.uniform(0.3, 0.38)
            height, yaw = half * dice.uniform(1.7, 2.6), dice.uniform(0, math.pi / 2)
            away = dice.uniform(0, 0.3) if count == 1 else dice.uniform(0.78, 0.95)
            angle = turn + 2 * math.pi * i / count + dice.uniform(-0.25, 0.25)
            things.append(Thing(colour, shape, half * FOCAL / math.hypot(DISTANCE, HEIGHT - TARGET)))
            boxes.append((away * math.cos(angle), away * math.sin(angle), half, height, yaw))
        rate = dice.uniform(0.4, 1.0) * (1 if dice.chance(0.5) else -1)
        return cls(setting, tuple(things), tuple(boxes), dice.uniform(0, 2 * math.pi), rate)

    def project(self, points: np.ndarray, angle: np.ndarray) -> np.ndarray:
        """World points [N,...,3] seen at azimuths [T]: [T,N,...,2] in the frame, and their depths on a third axis."""
        c, s = np.cos(angle), np.sin(angle)
        tilt = math.atan2(HEIGHT - TARGET, DISTANCE)
        shape = (len(angle), *(1,) * (points.ndim - 1))
        c, s = c.reshape(shape), s.reshape(shape)
        x, y, z = points[..., 0], points[..., 1] - TARGET, points[..., 2]
        right = s * x - c * z
        towards = c * x + s * z  # along the ground, to the camera
        up = y * math.cos(tilt) - towards * math.sin(tilt)
        depth = math.hypot(DISTANCE, HEIGHT - TARGET) - (towards * math.cos(tilt) + y * math.sin(tilt))
        width, height = self.setting.box
        return np.stack(
            [width / 2 + FOCAL * right / depth, 0.52 * height - FOCAL * up / depth, depth * np.ones_like(right)], -1
        )

    @cached_property
    def _solid(self) -> np.ndarray:
        """[N,8,3]: the boxes' corners in the world."""
        out = []
        for x, z, half, height, yaw in self.boxes:
            c, s = math.cos(yaw), math.sin(yaw)
            px, pz = _CORNERS[:, 0] * half, _CORNERS[:, 2] * half
            out.append(np.stack([x + c * px - s * pz, _CORNERS[:, 1] * height, z + s * px + c * pz], -1))
        return np.array(out)

    def state(self, times: np.ndarray) -> State:
        times = np.asarray(times, dtype=np.float64)
        step, count = 1e-4, len(times)
        centroids, angle, seen = self._centroids(np.concatenate([times, times + step, times - step]))
        position, angle, seen = centroids[:count], angle[:count], seen[:count]
        velocity = (centroids[count : 2 * count] - centroids[2 * count :]) / (2 * step)
        camera = np.stack([DISTANCE * np.cos(angle), np.full(len(times), HEIGHT), DISTANCE * np.sin(angle)], -1)
        extra = {"camera": camera, "angle": angle, "corners": seen[..., :2], "boxes": np.array(self.boxes)}
        return State(self, times, position, velocity, extra=extra)

    def _centroids(self, times: np.ndarray):
        angle = self.azimuth + self.rate * times
        seen = self.project(self._solid, angle)
        total, moment = 0.0, 0.0
        for corners, normal in _FACES:
            area, centre = _moments(seen[:, :, corners, :2])
            area = np.where(self._facing(normal, angle), area, 0)
            total, moment = total + area, moment + area[..., None] * centre
        return moment / total[..., None], angle, seen

    def _facing(self, normal, angle: np.ndarray) -> np.ndarray:
        """[T,N]: whether each box's face of this normal is turned to the camera."""
        boxes = np.array(self.boxes)
        n, point = self._normals(normal), np.array(self.boxes)[:, :2]
        camera = np.stack([DISTANCE * np.cos(angle), np.full(len(angle), HEIGHT), DISTANCE * np.sin(angle)], -1)
        on = np.stack([point[:, 0], boxes[:, 3] * (normal[1] > 0), point[:, 1]], -1)
        on = on + n * boxes[:, 2:3] * (normal[1] == 0)
        return ((camera[:, None] - on) * n).sum(-1) > 0

    def _normals(self, normal) -> np.ndarray:
        c, s = (f(np.array(self.boxes)[:, 4]) for f in (np.cos, np.sin))
        x, y, z = normal
        return np.stack([c * x - s * z, np.full(len(c), float(y)), s * x + c * z], -1)

    def _nearest_last(self, angle: np.ndarray) -> np.ndarray:
        """[T,N]: the boxes in order, the farthest first."""
        boxes = np.array(self.boxes)
        towards = np.cos(angle)[:, None] * boxes[:, 0] + np.sin(angle)[:, None] * boxes[:, 1]
        return np.argsort(towards, axis=1, kind="stable")

    def visible(self, state: State) -> np.ndarray:
        """An outline less its parts behind nearer ones, all of them convex."""
        seen, angle, count = state.extra["corners"], state.extra["angle"], len(self.things)
        visible = np.ones(seen.shape[:2])
        if count == 1:
            return visible
        for t, order in enumerate(self._nearest_last(angle)):
            hulls = [_hull(seen[t, i]) for i in range(count)]
            for place, i in enumerate(order[:-1]):
                nearer = [_clip(hulls[i], hulls[j]) for j in order[place + 1 :]]
                hidden = sum(map(_area, nearer))
                if len(nearer) == 2:
                    hidden -= _area(_clip(nearer[0], hulls[order[-1]]))
                visible[t, i] = 1 - hidden / _area(hulls[i])
        return visible

    def paint(self, canvas, state: State) -> None:
        ring = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        rim = np.stack([FLOOR * np.cos(ring), 0 * ring, FLOOR * np.sin(ring)], -1)
        rim = self.project(rim, np.zeros(1))[0, :, :2]  # the same from every side
        canvas.ellipse((rim.min(0) + rim.max(0)) / 2, (rim.max(0) - rim.min(0)) / 2, 0.12)
        angle, corners = state.extra["angle"], state.extra["corners"]
        order = self._nearest_last(angle)
        light = {
            normal: SHADE + (1 - SHADE) * np.clip(self._normals(normal) @ _LIGHT, 0, 0.8) / 0.8 for _, normal in _FACES
        }
        facing = {normal: self._facing(normal, angle) for _, normal in _FACES}
        for place in range(len(self.things)):
            for i in np.unique(order[:, place]):
                now = order[:, place] == i
                faces = []
                for which, normal in _FACES:
                    shine = float(light[normal][i]) if self.setting.style == "flat" else 1.0
                    faces.append((corners[:, i][:, which], np.where(now & facing[normal][:, i], shine, 0.0)))
                span = np.abs(corners[:, i] - state.position[:, i, None]).max((0, 1))
                canvas.faces(state.position[:, i], (span[0], span[0], span[1], span[1]), faces, self.things[i].colour)

    def claims(self, state: State) -> Claims:
        way = ("left" if self.rate > 0 else "right") if len(state.times) > 1 else None
        return Claims((None,) * len(self.things), frozenset({("orbit",)}), camera=way)


def _moments(polygon: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area [...] and centroid [...,2] of polygons [...,K,2]."""
    following = np.roll(polygon, -1, axis=-2)
    cross = polygon[..., 0] * following[..., 1] - polygon[..., 1] * following[..., 0]
    area = cross.sum(-1) / 2
    safe = np.where(np.abs(area) < 1e-12, 1, area)
    centre = ((polygon + following) * cross[..., None]).sum(-2) / (6 * safe[..., None])
    return np.abs(area), centre


def _hull(points: np.ndarray) -> list[tuple[float, float]]:
    """Convex hull of points [K,2]."""
    ordered, hull = sorted(map(tuple, points.tolist())), []
    for chain in (ordered, ordered[::-1]):
        start = len(hull)
        for p in chain:
            while len(hull) - start > 1 and _cross(hull[-2], hull[-1], p) <= 0:
                hull.pop()
            hull.append(p)
        hull.pop()
    return hull


def _cross(a, b, c) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _clip(polygon, by) -> list[tuple[float, float]]:
    """The part of a convex polygon inside another, both in the order of ``_hull``."""
    for a, b in zip(by, by[1:] + by[:1], strict=True):
        kept = []
        for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            one, two = _cross(a, b, p), _cross(a, b, q)
            if one >= 0:
                kept.append(p)
            if (one > 0 > two) or (one < 0 < two):
                s = one / (one - two)
                kept.append((p[0] + s * (q[0] - p[0]), p[1] + s * (q[1] - p[1])))
        polygon = kept
        if len(polygon) < 3:
            return []
    return polygon


def _area(polygon) -> float:
    return (
        abs(sum(p[0] * q[1] - p[1] * q[0] for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True))) / 2
        if polygon
        else 0.0
    )
