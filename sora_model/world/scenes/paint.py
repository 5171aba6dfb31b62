"""`paint`: a grey brush leaves one or two coloured strokes, one after the other, and paint stays where it is.

A stroke grows with its brush at constant speed, straight, with round ends, over the brush. Its ``position`` is the
middle of what there is of it, ``visible`` the share of the whole stroke that is painted. ``extra``: ``brush`` [T,2],
``painted`` [T,N], ``tip`` [T,N,2], ``ends`` [N,2,2], the start and end of each whole stroke.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..base import Cast, Claims, Dice, Event, Scene, Setting, State, Thing, count_of, way_of

BRUSH = 1.55  # its radius in that of a stroke


@dataclass(frozen=True)
class Paint(Scene):
    name = "paint"
    setting: Setting
    things: tuple[Thing, ...]
    strokes: tuple[tuple[float, float, float, float, float, float], ...]  # from, to: time, x, y

    RULES = (
        ((), 1, ("a brush and {a}",)),
        (("paint",), 1, ("a brush paints {a}", "a brush paints {a} {a_way}", "{a} is painted {a_way}",
                         "a brush draws {a} {a_way}")),
        ((), 2, ("a brush, {a} and {b}",)),
        (("paint",), 2, ("a brush paints {a} before {b}",)),
        (("paint", "paint"), 2, ("a brush paints {a} and then {b}", "a brush paints {a} {a_way} and then {b} {b_way}",
                                 "a brush draws first {a}, then {b}")),
    )  # fmt: skip

    @classmethod
    def draw(cls, dice: Dice, setting: Setting, cast: Cast, count: int | None = None) -> Paint:
        width, height = setting.box
        drawn = count_of(dice, {1: 0.55, 2: 0.45})
        count = min(2, count or drawn)
        things, strokes, time = [], [], dice.uniform(0.1, 0.25)
        flat = dice.chance(0.6) if width <= height else True
        for i, (colour, shape) in enumerate(cast(count, ("line",))):
            thing = Thing(colour, shape, dice.uniform(0.055, 0.075))
            margin, forth = thing.radius + 0.07, dice.chance(0.5)
            across = (i + dice.uniform(0.3, 0.7)) / count
            slope = dice.uniform(-0.1, 0.1)
            long, wide = (width, height) if flat else (height, width)
            a = margin + dice.uniform(0, 0.15) * (long - 2 * margin)
            b = long - margin - dice.uniform(0, 0.15) * (long - 2 * margin)
            c = margin + across * (wide - 2 * margin)
            ends = [(a, c - slope / 2), (b, c + slope / 2)]
            ends = [(x, min(max(y, margin), wide - margin)) for x, y in ends]
            if not forth:
                ends.reverse()
            if not flat:
                ends = [(y, x) for x, y in ends]
            last = time + math.dist(*ends) / dice.uniform(0.75, 1.05) * (1.25 if count == 1 else 0.85)
            things.append(thing)
            strokes.append((time, *ends[0], last, *ends[1]))
            time = last + 0.16
        return cls(setting, tuple(things), tuple(strokes))

    def state(self, times: np.ndarray) -> State:
        times = np.asarray(times, dtype=np.float64)
        s = np.array(self.strokes)
        begun, ended, start, span = s[:, 0], s[:, 3], s[:, 1:3], s[:, 4:] - s[:, 1:3]
        share = np.clip((times[:, None] - begun) / (ended - begun), 0, 1)
        tip = start + share[..., None] * span
        growing = (times[:, None] >= begun) & (times[:, None] < ended)
        velocity = np.where(growing[..., None], span / (ended - begun)[:, None] / 2, 0.0)
        ends = math.pi * np.array([t.radius for t in self.things]) / 2
        length = np.linalg.norm(span, axis=1)
        painted = np.where(times[:, None] >= begun, (share * length + ends) / (length + ends), 0.0)
        events = tuple(Event(t, "paint", (i,)) for i, t in enumerate(ended) if t <= times[-1])
        extra = {"brush": self._brush(times), "painted": painted, "ends": s.reshape(-1, 2, 3)[..., 1:], "tip": tip}
        return State(self, times, (start + tip) / 2, velocity, events, extra)

    def visible(self, state: State) -> np.ndarray:
        return state.extra["painted"]

    def _brush(self, times: np.ndarray) -> np.ndarray:
        """The brush comes from the right, follows each stroke, goes on to the next, and leaves."""
        away = (self.setting.box[0] + 0.3, 0.5 * self.setting.box[1])
        knots = np.array(self.strokes).reshape(-1, 3)
        knots = np.concatenate([[(0.0, *away)], knots, [(knots[-1, 0] + 0.35, *away)]])
        return np.stack([np.interp(times, knots[:, 0], knots[:, axis]) for axis in (1, 2)], -1)

    def paint(self, canvas, state: State) -> None:
        canvas.disc(state.extra["brush"], BRUSH * self.things[0].radius, 0.55)
        for i, thing in enumerate(self.things):
            first = int(np.searchsorted(state.times, self.strokes[i][0]))
            canvas.stroke(thing, np.array(self.strokes[i][1:3]), state.extra["tip"][:, i], first)

    def claims(self, state: State) -> Claims:
        done = sum(e.time <= state.times[-1] for e in state.events)
        begun = sum(s[0] < state.times[-1] - 0.3 for s in self.strokes)
        ways = tuple(way_of(s[4] - s[1], s[5] - s[2]) for s in self.strokes)
        account = ("paint",) * max(done, begun)
        return Claims(ways, frozenset({account}))
