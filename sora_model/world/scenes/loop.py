"""`loop`: one or two objects go round or swing to and fro for ever, and are after each period where they were.

``extra``: ``period``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..base import Cast, Claims, Dice, Scene, Setting, State, Thing, count_of
from ..shapes import extent


@dataclass(frozen=True)
class Loop(Scene):
    name = "loop"
    setting: Setting
    things: tuple[Thing, ...]
    centre: tuple[float, float]
    reach: tuple[float, float]  # half axes of the ellipse; (reach, 0) swings
    period: float
    turn: int  # 1 clockwise on the screen, -1 the other way
    phase: float

    RULES = (
        (("circle",), 1, ("{a} goes round in circles {a_way}", "{a} circles {a_way}", "{a} circles {a_way} {pace}",
                          "{a} goes round and round")),
        (("swing",), 1, ("{a} swings", "{a} swings to and fro", "{a} swings to and fro {pace}")),
        (("circle",), 2, ("{a} and {b} go round in circles", "{a} and {b} circle {a_way}",
                          "{a} and {b} go round each other", "{a} and {b} circle {a_way} {pace}")),
    )  # fmt: skip

    @classmethod
    def draw(cls, dice: Dice, setting: Setting, cast: Cast, count: int | None = None) -> Loop:
        width, height = setting.box
        drawn = count_of(dice, {1: 0.6, 2: 0.4})
        count = min(2, count or drawn)
        swings = count == 1 and dice.chance(0.35)
        things = []
        for colour, shape in cast(count):
            things.append(Thing(colour, shape, dice.uniform(0.12, 0.16) if count == 1 else dice.uniform(0.1, 0.125)))
        margin = max(max(extent(t.shape, t.radius)) for t in things) + 0.02
        room = (width / 2 - margin, height / 2 - margin)
        least = 0.2 if count == 1 else 0.26
        radius = dice.uniform(least, min(room))
        shape = (dice.uniform(min(0.22, room[0]), min(room[0], 0.6)), 0.0) if swings else (radius, radius)
        centre = tuple(
            m + s + dice.uniform(0, 1) * max(0.0, side - 2 * (m + s))
            for m, s, side in zip((margin, margin), shape, (width, height), strict=True)
        )
        period = dice.pick((1.0, 2.0, 2.0))
        turn = 1 if dice.chance(0.5) else -1
        return cls(setting, tuple(things), centre, shape, period, turn, dice.uniform(0, 2 * math.pi))

    def state(self, times: np.ndarray) -> State:
        times = np.asarray(times, dtype=np.float64)
        rate = 2 * math.pi / self.period * self.turn
        apart = 2 * math.pi * np.arange(len(self.things)) / len(self.things)
        angle = self.phase + rate * np.mod(times, self.period)[:, None] + apart
        reach = np.array(self.reach)
        position = np.array(self.centre) + reach * np.stack([np.cos(angle), np.sin(angle)], -1)
        velocity = rate * reach * np.stack([-np.sin(angle), np.cos(angle)], -1)
        return State(self, times, position, velocity, extra={"period": self.period})

    def claims(self, state: State) -> Claims:
        moves = len(state.times) > 1
        way = ("clockwise" if self.turn > 0 else "counterclockwise") if self.reach[1] and moves else None
        account = ("circle",) if self.reach[1] else ("swing",)
        pace = ("fast" if self.period == 1 else "slow") if moves else None
        return Claims((way,) * len(self.things), frozenset({account}), pace=pace)
