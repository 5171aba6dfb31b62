"""`parabola`: one or two objects thrown or dropped onto the ground, from which they bounce lower each time.

Gravity and the restitution are the scene's; against the sides an object reflects elastically. When its flights have
become infinitely short (a finite time) it slides on. ``extra``: ``gravity``, ``restitution``, ``ground``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..base import Cast, Claims, Dice, Event, Scene, Setting, State, Thing, count_of, fold, fold_events, way_of
from ..shapes import extent

GROUND = 0.1


@dataclass(frozen=True)
class Parabola(Scene):
    name = "parabola"
    setting: Setting
    things: tuple[Thing, ...]
    start: tuple[tuple[float, float], ...]
    velocity: tuple[tuple[float, float], ...]
    lanes: tuple[tuple[float, float], ...]
    gravity: float
    restitution: float

    RULES = (
        (("throw",), 1, ("{a} is thrown {a_way}", "{a} flies {a_way}", "{a} flies {a_way} in an arc")),
        (("throw", "land"), 1, ("{a} is thrown {a_way} and bounces on the ground", "{a} flies {a_way} and lands",
                                "{a} hops along the ground {a_way}")),
        (("fall",), 1, ("{a} falls", "{a} is dropped")),
        (("fall", "land"), 1, ("{a} falls and bounces on the ground", "{a} is dropped and lands")),
        (("fall",), 2, ("{a} and {b} fall", "{a} and {b} are dropped", "two shapes fall: {a} and {b}")),
        (("fall", "land"), 2, ("{a} lands before {b}", "{a} and then {b} lands",
                               "{a} falls and lands, then {b} does")),
    )  # fmt: skip

    @classmethod
    def draw(cls, dice: Dice, setting: Setting, cast: Cast, count: int | None = None) -> Parabola:
        width, height = setting.box
        drawn = count_of(dice, {1: 0.65, 2: 0.35})
        count = min(2, count or drawn)
        gravity, restitution = dice.uniform(1.5, 2.4), dice.uniform(0.7, 0.9)
        names = cast(count)
        things, start, velocity, lanes = [], [], [], []
        thrown = count == 1 and dice.chance(0.65)
        drops = sorted(dice.uniform(0.5, 1.0) for _ in range(count))  # the one that is named first lands first
        for i, (colour, shape) in enumerate(names):
            thing = Thing(colour, shape, dice.uniform(0.11, 0.15))
            left, right, up, down = extent(shape, thing.radius)
            lane = (i * width / count + left + 0.02, (i + 1) * width / count - right - 0.02)
            low, high = up + 0.02, height - GROUND - down
            if thrown:
                sign = 1 if dice.chance(0.5) else -1
                along = dice.uniform(0, 0.2)
                x = lane[0] + (lane[1] - lane[0]) * (along if sign > 0 else 1 - along)
                y = dice.uniform(max(low, high - 0.45), high - 0.1)
                vx, vy = sign * dice.uniform(0.35, 0.6), -math.sqrt(2 * gravity * (y - low)) * dice.uniform(0.55, 0.9)
            else:
                x, y, vx, vy = dice.uniform(*lane), high - drops[i] * (height - GROUND - 0.48), 0.0, 0.0
            things.append(thing)
            start.append((x, y))
            velocity.append((vx, vy))
            lanes.append(lane)
        return cls(setting, tuple(things), tuple(start), tuple(velocity), tuple(lanes), gravity, restitution)

    def state(self, times: np.ndarray) -> State:
        times = np.asarray(times, dtype=np.float64)
        position, velocity, events = [], [], []
        for i, thing in enumerate(self.things):
            floor = self.setting.box[1] - GROUND - extent(thing.shape, thing.radius)[3]
            x, vx = fold(self.start[i][0], self.velocity[i][0], *self.lanes[i], times)
            y, vy, landings = hops(self.start[i][1], self.velocity[i][1], floor, self.gravity, self.restitution, times)
            position.append(np.stack([x, y], -1))
            velocity.append(np.stack([vx, vy], -1))
            sides = fold_events(self.start[i][0], self.velocity[i][0], *self.lanes[i], times[-1])
            events += [Event(t, "edge", (i,)) for t in sides] + [Event(t, "land", (i,)) for t in landings]
        extra = {"gravity": self.gravity, "restitution": self.restitution, "ground": self.setting.box[1] - GROUND}
        events = tuple(sorted(events, key=lambda e: e.time))
        return State(self, times, np.stack(position, 1), np.stack(velocity, 1), events, extra)

    def paint(self, canvas, state: State) -> None:
        canvas.bar(0, self.setting.box[0] + 1, 0.13, top=self.setting.box[1] - GROUND)
        super().paint(canvas, state)

    def claims(self, state: State) -> Claims:
        verb = "fall" if self.velocity[0][0] == 0 else "throw"
        landed = [e.who[0] for e in state.events if e.kind == "land" and e.time <= state.times[-1] - 0.02]
        accounts = {(verb,)}
        if landed and (len(self.things) == 1 or self._apart(landed, state)):
            accounts = {(verb, "land")}
        return Claims(tuple(way_of(v[0], 0) for v in self.velocity), frozenset(accounts))

    def _apart(self, landed: list[int], state: State) -> bool:
        """The first thing lands at least 0.1 s before the second, or alone."""
        first = {
            i: next((e.time for e in state.events if e.kind == "land" and e.who == (i,)), math.inf) for i in (0, 1)
        }
        return landed[0] == 0 and min(first[1], state.times[-1]) - first[0] > 0.1


def hops(start: float, velocity: float, floor: float, gravity: float, restitution: float, times: np.ndarray):
    """Height and velocity [T] under gravity above ``floor`` (y points down), and the times of the landings up to the
    last time. Flight i after the first landing, at speed u, takes 2 u restitution^i / gravity."""
    impact = math.sqrt(velocity**2 + 2 * gravity * (floor - start))
    first = (impact - velocity) / gravity
    rebound = restitution * impact
    flight = 2 * rebound / gravity
    rest = first + flight / (1 - restitution)
    since = np.maximum(times - first, 0)
    left = np.maximum(1 - since * (1 - restitution) / flight, 1e-9)
    i = np.floor(np.log(left) / math.log(restitution) + 1e-12)
    begun = flight * (1 - restitution**i) / (1 - restitution)
    u = rebound * restitution**i
    t = since - begun
    y = np.where(times < first, start + velocity * times + gravity * times**2 / 2, floor - u * t + gravity * t * t / 2)
    vy = np.where(times < first, velocity + gravity * times, -u + gravity * t)
    resting = times >= rest - 1e-6
    landings, time, k = [], first, 0
    while time <= times[-1] and k < 60:
        landings.append(time)
        time += flight * restitution**k
        k += 1
    return np.where(resting, floor, np.minimum(y, floor)), np.where(resting, 0.0, vy), landings
