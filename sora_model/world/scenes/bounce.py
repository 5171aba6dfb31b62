"""`bounce`: one to three objects that reflect from the frame's edges and from each other, by exact event times.

Shapes do not turn. Two that touch push each other along the normal of their outlines and without friction, so that a
collision conserves momentum and energy; masses are areas. ``extra``: ``mass`` [N].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..base import Cast, Claims, Dice, Event, Scene, Setting, State, Thing, count_of, way_of
from ..shapes import area, contact, extent, gap

SLOW, FAST = 0.42, 0.66
_RADII = {1: (0.13, 0.18), 2: (0.115, 0.15), 3: (0.1, 0.125)}
_PAIR = "{a} and {b}"
_THREE = "{a}, {b} and {c}"


@dataclass(frozen=True)
class Bounce(Scene):
    name = "bounce"
    setting: Setting
    things: tuple[Thing, ...]
    start: tuple[tuple[float, float], ...]
    velocity: tuple[tuple[float, float], ...]

    RULES = (
        ((), 1, ("{a}", "{a} {go} {a_way}", "{a} {go} {a_way} {pace}", "{a} {pace} {go} {a_way}")),
        (("edge",), 1, ("{a} bounces around", "{a} {edge}", "{a} {go} {a_way} and {edge}",
                        "{a} {go} {a_way} {pace} and {edge}")),
        ((), 2, ("{a} and {b}", "{a} {go} {a_way} {and} {b} {go} {b_way}")),
        (("collide",), 2, ("{a} and {b} collide", "{a} {hit} {b}", "{a} and {b} bounce off each other",
                           "{a} {go} {a_way} and {hit} {b}", "two shapes collide: {a} and {b}")),
        (("edge", "collide"), 2, ("{a} {edge} and then {hit} {b}", "{a} first {edge}, then {hit} {b}")),
        (("collide", "edge"), 2, ("{a} {hit} {b} and then {edge}", "{a} first {hit} {b}, then {edge}")),
        (("edge",), 2, ("{a} and {b} bounce around", "two shapes bounce around: {a} and {b}")),
        ((), 3, (_THREE, "{a} {go} {a_way} {and} {b} and {c} move too")),
        (("collide",), 3, (f"{_THREE} bounce off each other", f"{_THREE} collide", f"three shapes collide: {_THREE}",
                           "{a} {hit} {b} near {c}")),
        (("edge",), 3, (f"{_THREE} bounce around", f"three shapes bounce around: {_THREE}")),
    )  # fmt: skip

    @classmethod
    def draw(cls, dice: Dice, setting: Setting, cast: Cast, count: int | None = None) -> Bounce:
        drawn = count_of(dice, {1: 0.4, 2: 0.4, 3: 0.2})
        count = count or drawn
        names = cast(count)
        things = tuple(Thing(c, s, dice.uniform(*_RADII[count])) for c, s in names)
        start = _places(dice, setting.box, things)
        velocity = []
        for i in range(count):
            speed, angle = dice.uniform(0.34, 0.78), dice.uniform(-0.42, 0.42)
            way, aim = dice.uniform(0, 1), dice.chance(0.7)
            if i < 2 and count > 1 and aim:  # towards the other, so that they meet
                other = start[1 - i]
                angle = math.atan2(other[1] - start[i][1], other[0] - start[i][0]) + angle / 3
            else:
                angle += math.pi / 2 * int(4 * way)
            velocity.append((speed * math.cos(angle), speed * math.sin(angle)))
        return cls(setting, things, start, tuple(velocity))

    def state(self, times: np.ndarray) -> State:
        times = np.asarray(times, dtype=np.float64)
        knots, places, speeds, events = _events(self.things, self.start, self.velocity, self.setting.box, times[-1])
        last = np.searchsorted(knots, times, side="right") - 1
        position = places[last] + speeds[last] * (times - knots[last])[:, None, None]
        mass = np.array([area(t.shape, t.radius) for t in self.things])
        return State(self, times, position, speeds[last], events=events, extra={"mass": mass})

    def claims(self, state: State) -> Claims:
        shown = [e for e in state.events if e.time <= state.times[-1] - 0.02]
        ways = tuple(way_of(*v) if len(state.times) > 1 else None for v in self.velocity)
        accounts: set[tuple[str, ...]] = {()}
        first = [e for e in shown if 0 in e.who]
        if any(e.kind == "edge" and (len(self.things) > 1 or 0 in e.who) for e in shown):
            accounts.add(("edge",))
        if any({0, 1} <= set(e.who) for e in shown):
            accounts.add(("collide",))
            if len(self.things) == 2:
                order = tuple(dict.fromkeys(e.kind for e in first))
                if len(order) == 2:
                    accounts.add(order)
        if len(accounts) > 1:
            accounts.discard(())
        speed = math.hypot(*self.velocity[0])
        pace = "slow" if speed < SLOW else "fast" if speed > FAST else None
        return Claims(ways, frozenset(accounts), pace=pace if len(state.times) > 1 else None)


def _places(dice: Dice, box: tuple[float, float], things: tuple[Thing, ...]) -> tuple[tuple[float, float], ...]:
    """Places in the frame, the shapes well apart."""
    apart = 0.06
    while True:
        placed: list[tuple[float, float]] = []
        for thing in things:
            left, right, up, down = extent(thing.shape, thing.radius)
            for _ in range(40):
                x = dice.uniform(left + 0.01, box[0] - right - 0.01)
                y = dice.uniform(up + 0.01, box[1] - down - 0.01)
                if all(
                    gap((thing.shape, thing.radius), (o.shape, o.radius), x - ox, y - oy) > apart
                    for o, (ox, oy) in zip(things, placed, strict=False)
                ):
                    placed.append((x, y))
                    break
        if len(placed) == len(things):
            return tuple(placed)
        apart /= 2


def _events(things, start, velocity, box, until: float):
    """Times [E], places [E,N,2] and velocities [E,N,2] from which the motion goes on straight, and the events."""
    n = len(things)
    keys = [(t.shape, t.radius) for t in things]
    limits = []
    for t in things:
        left, right, up, down = extent(t.shape, t.radius)
        limits.append(((left, box[0] - right), (up, box[1] - down)))
    mass = [area(*key) for key in keys]
    p, v, now = [list(x) for x in start], [list(x) for x in velocity], 0.0
    knots, places, speeds, events = [0.0], [[list(x) for x in p]], [[list(x) for x in v]], []

    def edge(i: int) -> tuple[float, int]:
        best = (math.inf, 0)
        for axis in (0, 1):
            if v[i][axis]:
                limit = limits[i][axis][v[i][axis] > 0]
                best = min(best, (max(0.0, (limit - p[i][axis]) / v[i][axis]), axis))
        return best

    def meeting(i: int, j: int) -> tuple[float, float, float]:
        return contact(keys[i], keys[j], p[i][0] - p[j][0], p[i][1] - p[j][1], v[i][0] - v[j][0], v[i][1] - v[j][1])

    at_edge = [edge(i) for i in range(n)]
    meet = {(i, j): meeting(i, j) for i in range(n) for j in range(i)}
    at_edge = [(t + now, axis) for t, axis in at_edge]
    while True:
        i = min(range(n), key=lambda k: at_edge[k][0])
        pair = min(meet, key=lambda k: meet[k][0], default=None)
        collides = pair is not None and meet[pair][0] < at_edge[i][0]
        time = meet[pair][0] if collides else at_edge[i][0]
        if time > until:
            break
        for k in range(n):
            p[k] = [p[k][0] + v[k][0] * (time - now), p[k][1] + v[k][1] * (time - now)]
        now = time
        if collides:
            i, j = pair
            _, nx, ny = meet[pair]
            closing = (v[i][0] - v[j][0]) * nx + (v[i][1] - v[j][1]) * ny
            push = -2 * closing / (1 / mass[i] + 1 / mass[j])
            for k, sign in ((i, 1), (j, -1)):
                v[k] = [v[k][0] + sign * push / mass[k] * nx, v[k][1] + sign * push / mass[k] * ny]
            changed = (i, j)
            events.append(Event(time, "collide", (j, i)))
        else:
            axis = at_edge[i][1]
            p[i][axis] = limits[i][axis][v[i][axis] > 0]
            v[i][axis] = -v[i][axis]
            changed = (i,)
            events.append(Event(time, "edge", (i,)))
        for k in changed:
            t, axis = edge(k)
            at_edge[k] = (now + t, axis)
        for a, b in meet:
            if a in changed or b in changed:
                t, nx, ny = meeting(a, b)
                meet[a, b] = (now + t, nx, ny)
        knots.append(now)
        places.append([list(x) for x in p])
        speeds.append([list(x) for x in v])
    return np.array(knots), np.array(places), np.array(speeds), tuple(events)
