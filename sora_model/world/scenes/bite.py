"""`bite`: a grey eater takes up to three bites out of an object, and what is bitten off stays off.

A bite is a disc that goes at one moment, under the eater, which is larger; then the eater moves away. The object sways.
``extra``: ``bite_time`` [K], ``bite_centre`` [K,2] from the object's centroid, ``bite_radius``, ``eater`` [T,2],
``eater_radius``, ``left`` [T], the share of the object that is not eaten. Its ``position`` stays the centroid of the
whole shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..base import Cast, Claims, Dice, Event, Scene, Setting, State, Thing, smooth
from ..shapes import chord, distance, extent

_LINES = 1024
EATER = 1.3  # its radius in that of a bite
FOOD = ("circle", "square", "triangle")


@dataclass(frozen=True)
class Bite(Scene):
    name = "bite"
    setting: Setting
    things: tuple[Thing, ...]
    centre: tuple[float, float]
    sway: tuple[float, float, float, float]  # amplitude, angle, period, phase
    bites: tuple[tuple[float, float, float], ...]  # time, and where in the object's frame
    radius: float  # of a bite
    path: tuple[tuple[float, float, float], ...]  # time and place of the eater in the object's frame

    RULES = (
        ((), 1, ("{a} and a hungry eater", "an eater comes to {a}")),
        (("bite",), 1, ("an eater bites {a}", "{a} is bitten", "{a} is bitten once",
                        "an eater takes a bite out of {a}")),
        (("bite", "bite"), 1, ("{a} is bitten twice", "an eater bites {a} twice",
                               "an eater takes two bites out of {a}")),
        (("bite", "bite", "bite"), 1, ("{a} is bitten three times", "an eater bites {a} three times",
                                       "an eater takes three bites out of {a}")),
    )  # fmt: skip

    @classmethod
    def draw(cls, dice: Dice, setting: Setting, cast: Cast, count: int | None = None) -> Bite:
        width, height = setting.box
        ((colour, shape),) = cast(1, FOOD)
        thing = Thing(colour, shape, dice.uniform(0.21, 0.26))
        number = dice.pick((1, 2, 3))
        radius = dice.uniform(0.4, 0.5) * thing.radius
        sway = (
            dice.uniform(0.0, 0.045),
            dice.uniform(0, math.pi),
            dice.uniform(1.8, 3.0),
            dice.uniform(0, 2 * math.pi),
        )
        reach = [e + sway[0] + 0.06 for e in extent(shape, thing.radius)]
        centre = (
            dice.uniform(reach[0], width - reach[1]) if width > 1.3 else width / 2 + dice.uniform(-0.1, 0.1),
            dice.uniform(reach[2], height - reach[3]) if height > 1.3 else height / 2 + dice.uniform(-0.1, 0.1),
        )
        # At corners and the middles of edges, so that no crumbs are left between two bites.
        corners = {"circle": 4, "square": 4, "triangle": 3}[shape]
        angle = math.pi * (int(2 * corners * dice.uniform(0, 1)) / corners - 0.5)
        angle, turn = angle + dice.uniform(-0.12, 0.12), dice.pick((-1, 1)) * 2 * math.pi / corners
        time = dice.uniform(0.4, 0.5)
        bites, path = [], []
        for k in range(number):
            direction = np.array([math.cos(angle + k * turn), math.sin(angle + k * turn)])
            edge = _edge(shape, thing.radius, direction)
            depth = min(edge - 0.25 * radius, thing.radius)  # at a corner deep enough to take all of it
            at, outside = direction * depth, direction * (edge + 2.0 * radius)
            far = direction * (edge + 4 * radius)
            if k == 0:
                path.append((0.0, *far))
            path += [(time - 0.19, *outside), (time, *at), (time + 0.19, *outside)]
            bites.append(_floats((time, *at)))
            time += dice.uniform(0.5, 0.58)
        path.append((path[-1][0] + 0.4, *(far + direction * 1.5)))
        return cls(setting, (thing,), centre, sway, tuple(bites), radius, tuple(map(_floats, path)))

    def _sway(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        amplitude, angle, period, phase = self.sway
        way = np.array([math.cos(angle), math.sin(angle)])
        turn = 2 * math.pi / period
        swing = amplitude * (np.sin(turn * times + phase) - math.sin(phase))
        rate = amplitude * turn * np.cos(turn * times + phase)
        return np.array(self.centre) + swing[:, None] * way, rate[:, None] * way

    def state(self, times: np.ndarray) -> State:
        times = np.asarray(times, dtype=np.float64)
        position, velocity = self._sway(times)
        knots = np.array(self.path)
        k = np.clip(np.searchsorted(knots[:, 0], times, side="right") - 1, 0, len(knots) - 2)
        share = smooth((times - knots[k, 0]) / (knots[k + 1, 0] - knots[k, 0]))[:, None]
        eater = position + knots[k, 1:] + share * (knots[k + 1, 1:] - knots[k, 1:])
        events = tuple(Event(t, "bite", (0,)) for t, *_ in self.bites if t <= times[-1])
        centres = np.array(self.bites)[:, 1:]
        taken = times[:, None] >= np.array(self.bites)[:, 0]
        extra = {
            "bite_time": np.array(self.bites)[:, 0], "bite_centre": centres, "bite_radius": self.radius,
            "eater": eater, "eater_radius": EATER * self.radius, "left": self._left[taken.sum(1)],
        }  # fmt: skip
        return State(self, times, position[:, None], velocity[:, None], events, extra)

    def visible(self, state: State) -> np.ndarray:
        taken = state.times[:, None] >= state.extra["bite_time"]
        return self._share(taken, state.extra["eater"] - state.position[:, 0])[:, None]

    def paint(self, canvas, state: State) -> None:
        cut = []
        for time, *at in self.bites:
            cut.append((at, self.radius, int(np.searchsorted(state.times, time))))
        canvas.figure(state.things[0], state.position[:, 0], cut=cut)
        eater, radius = state.extra["eater"], EATER * self.radius
        canvas.disc(eater, radius, 0.62)
        look = state.position[:, 0] - eater
        look /= np.maximum(np.linalg.norm(look, axis=1, keepdims=True), 1e-6)
        side = np.stack([-look[:, 1], look[:, 0]], 1)
        for sign in (-1, 1):
            canvas.disc(eater + radius * (0.3 * look + 0.4 * sign * side), 0.17 * radius, 0.0)

    def claims(self, state: State) -> Claims:
        taken = sum(t <= state.times[-1] - 0.15 for t, *_ in self.bites)
        return Claims((None,), frozenset({("bite",) * taken}))

    @cached_property
    def _left(self) -> np.ndarray:
        """[K+1]: the share of the object that is left after so many bites."""
        return self._share(np.tri(len(self.bites) + 1, len(self.bites), -1, dtype=bool), None)

    def _share(self, taken: np.ndarray, eater: np.ndarray | None) -> np.ndarray:
        """[T]: the share of the object outside the bites that are ``taken`` [T,K] and the eater's disc at [T,2], from
        the exact lengths of lines across it."""
        thing, count = self.things[0], len(taken)
        holes = [(np.array([at]), self.radius, taken[:, k : k + 1]) for k, (_, *at) in enumerate(self.bites)]
        if eater is not None:
            holes.append((eater, EATER * self.radius, np.ones((count, 1), bool)))
        _, _, up, down = extent(thing.shape, thing.radius)
        y = (np.arange(_LINES) + 0.5) / _LINES * (up + down) - up
        half = chord(thing.shape, thing.radius, y)
        spans = []
        for centre, radius, there in holes:
            reach = np.sqrt(np.maximum(radius**2 - (y - centre[:, 1:]) ** 2, 0)) * there
            spans.append((np.clip(centre[:, :1] - reach, -half, half), np.clip(centre[:, :1] + reach, -half, half)))
        low, high = (np.stack(np.broadcast_arrays(*ends), -1) for ends in zip(*spans, strict=True))
        order = np.argsort(low, axis=-1)
        low, high = np.take_along_axis(low, order, -1), np.take_along_axis(high, order, -1)
        before = np.maximum.accumulate(high, -1)[..., :-1]
        low[..., 1:] = np.maximum(low[..., 1:], before)
        whole = 2 * half - np.maximum(high - low, 0).sum(-1)
        return whole.sum(-1) / (2 * half).sum()


def _edge(shape: str, radius: float, direction: np.ndarray) -> float:
    """How far from the centroid the outline is in a direction."""
    along = np.linspace(0, 1.5 * radius, 601)
    inside = distance(shape, radius, along * direction[0], along * direction[1]) < 0
    return float(along[inside][-1])


def _floats(row) -> tuple[float, ...]:
    return tuple(float(x) for x in row)
