"""`occluder`: objects pass behind one to three walls over the full height of the frame and come out again.

Each object keeps to a lane of its own at its own speed, and reflects from the sides. The first one starts in the open,
on its way to a wall that hides it wholly (the first of them); further ones are distractors, some at rest. ``extra``:
``walls`` fp64 [K,2], the left and right of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..base import Cast, Claims, Dice, Event, Scene, Setting, State, Thing, count_of, fold, fold_events, way_of
from ..shapes import area, area_left_of, extent

WALL = 0.27  # how far from the background to white or black


@dataclass(frozen=True)
class Occluder(Scene):
    name = "occluder"
    setting: Setting
    things: tuple[Thing, ...]
    start: tuple[tuple[float, float], ...]
    speed: tuple[float, ...]
    walls: tuple[tuple[float, float], ...]

    RULES = (
        (("near",), 1, ("{a} and {behind}", "{a} {go} {a_way} towards {behind}")),
        (("hide",), 1, ("{a} hides behind {behind}", "{a} disappears behind {behind}",
                        "{a} {go} {a_way} and hides behind {behind}")),
        (("hide", "return"), 1, ("{a} {pass} behind {behind} and {return}", "{a} {pass} {a_way} behind {behind}",
                                 "{a} {pass} {a_way} behind {behind} and {return}",
                                 "{a} is hidden by {behind} for a moment")),
        (("near",), 2, ("{a}, {b} and {behind}", "{a} {go} {a_way} towards {behind} and {b} {go} {b_way}")),
        (("hide",), 2, ("{a} hides behind {behind} near {b}", "{a} disappears behind {behind} {and} {b} {go} {b_way}")),
        (("hide", "return"), 2, ("{a} {pass} behind {behind} and {return} near {b}",
                                 "{a} {pass} {a_way} behind {behind} {and} {b} {go} {b_way}")),
        (("near",), 3, ("{a}, {b}, {c} and {behind}",)),
        (("hide",), 3, ("{a} hides behind {behind} near {b} and {c}",)),
        (("hide", "return"), 3, ("{a} {pass} behind {behind} and {return} near {b} and {c}",)),
    )  # fmt: skip

    @classmethod
    def draw(cls, dice: Dice, setting: Setting, cast: Cast, count: int | None = None) -> Occluder:
        width, height = setting.box
        drawn = count_of(dice, {1: 0.5, 2: 0.3, 3: 0.2})
        count = count or drawn
        names = cast(count)
        radii = [dice.uniform(0.085, 0.11) for _ in range(count)]
        things = tuple(Thing(c, s, r) for (c, s), r in zip(names, radii, strict=True))
        reach = extent(things[0].shape, things[0].radius)[0]
        rightwards = dice.chance(0.5)
        # Seen as if the first object went right; mirrored at the end if it does not.
        room = width - 4 * reach - 0.06
        first = 2 * reach + dice.uniform(0.04, min(0.5, max(0.05, room - 2 * reach)))
        left = 2 * reach + 0.02 + dice.uniform(0, 1) * min(0.3, room + 0.04 - first)
        walls = [(left, left + first)]
        for _ in range(dice.pick((0, 0, 1, 2))):
            space = width - walls[-1][1] - 0.24
            wide = dice.uniform(0.1, 0.2)
            if space < wide + 0.06:
                break
            begin = walls[-1][1] + 0.24 + dice.uniform(0, min(0.2, space - wide))
            walls.append((begin, begin + wide))
        starts, speeds = [], []
        slots = sorted(range(count), key=lambda _: dice.uniform(0, 1))
        for i, thing in enumerate(things):
            half, _, up, down = extent(thing.shape, thing.radius)
            lane = height / count
            low, high = slots[i] * lane + up + 0.005, (slots[i] + 1) * lane - down - 0.005
            y = low + max(0.0, high - low) * dice.uniform(0, 1)
            along, still, way, speed = dice.uniform(0, 1), dice.chance(0.25), dice.chance(0.5), dice.uniform(0.3, 0.6)
            if i == 0:
                x = max(half, walls[0][0] - half - 0.1 * along)
            else:
                x, speed = half + (width - 2 * half) * along, 0.0 if still else speed if way else -speed
            starts.append((x, y))
            speeds.append(speed)
        if not rightwards:
            starts = [(width - x, y) for x, y in starts]
            speeds = [-s for s in speeds]
            walls = [(width - b, width - a) for a, b in walls]
        return cls(setting, things, tuple(starts), tuple(speeds), tuple(walls))

    def state(self, times: np.ndarray) -> State:
        times = np.asarray(times, dtype=np.float64)
        position = np.empty((len(times), len(self.things), 2))
        velocity = np.zeros_like(position)
        events = []
        for i, thing in enumerate(self.things):
            half = extent(thing.shape, thing.radius)[0]
            limits = (half, self.setting.box[0] - half)
            position[:, i, 0], velocity[:, i, 0] = fold(self.start[i][0], self.speed[i], *limits, times)
            position[:, i, 1] = self.start[i][1]
            events += [Event(t, "edge", (i,)) for t in fold_events(self.start[i][0], self.speed[i], *limits, times[-1])]
        events = tuple(sorted(events, key=lambda e: e.time))
        return State(self, times, position, velocity, events, {"walls": np.array(self.walls)})

    def visible(self, state: State) -> np.ndarray:
        visible = np.ones(state.position.shape[:2])
        for n, thing in enumerate(self.things):
            x, key = state.position[:, n, 0], (thing.shape, thing.radius)
            for left, right in self.walls:
                visible[:, n] -= (area_left_of(*key, right - x) - area_left_of(*key, left - x)) / area(*key)
        return np.clip(np.where(visible < 1e-12, 0, visible), 0, 1)

    def paint(self, canvas, state: State) -> None:
        super().paint(canvas, state)
        for left, right in self.walls:
            canvas.bar(left, right, WALL)

    def claims(self, state: State) -> Claims:
        account = ("hide", "return") if state.reappears(0) else ("hide",) if state.hides(0) else ("near",)
        moves = len(state.times) > 1
        return Claims(tuple(way_of(s, 0) if moves else None for s in self.speed), frozenset({account}))
