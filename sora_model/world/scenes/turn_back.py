"""`turn_back`: the camera pans away from one or two objects until they are out of sight, and comes back.

They go on moving meanwhile, so what it returns to is where it has gone. Grey blocks along the ground, fixed in the
world, show that it is the camera that moves. ``extra``: ``camera`` fp64 [T], how far the frame's left edge is from
where it was; ``home`` [T,N,2], positions without the camera.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..base import HIDDEN, SHOWN, Cast, Claims, Dice, Scene, Setting, State, Thing, count_of, fold, smooth, smooth_rate
from ..shapes import area, area_left_of, extent


@dataclass(frozen=True)
class TurnBack(Scene):
    name = "turn_back"
    setting: Setting
    things: tuple[Thing, ...]
    start: tuple[tuple[float, float], ...]
    velocity: tuple[tuple[float, float], ...]
    lanes: tuple[tuple[float, float, float, float], ...]
    turn: tuple[
        float, float, float, float, float
    ]  # distance (signed); seconds before, turning, away, and between turns
    blocks: tuple[tuple[float, float, float], ...]

    RULES = (
        (("stay",), 1, ("{a} and the camera",)),
        (("leave",), 1, ("the camera {look} from {a}", "the camera pans {camera} away from {a}")),
        (("leave", "return"), 1, ("the camera {look} from {a} and {back}",
                                  "the camera pans {camera} from {a} and {back}",
                                  "{a} is there again when the camera {back}")),
        (("stay",), 2, ("{a}, {b} and the camera",)),
        (("leave",), 2, ("the camera {look} from {a} and {b}", "the camera pans {camera} away from {a} and {b}")),
        (("leave", "return"), 2, ("the camera {look} from {a} and {b} and {back}",
                                  "the camera pans {camera} from {a} and {b} and {back}",
                                  "{a} and {b} are there again when the camera {back}")),
    )  # fmt: skip

    @classmethod
    def draw(cls, dice: Dice, setting: Setting, cast: Cast, count: int | None = None) -> TurnBack:
        width, height = setting.box
        drawn = count_of(dice, {1: 0.6, 2: 0.4})
        count = min(2, count or drawn)
        things, start, velocity, lanes = [], [], [], []
        for i, (colour, shape) in enumerate(cast(count)):
            thing = Thing(colour, shape, dice.uniform(0.13, 0.17) if count == 1 else dice.uniform(0.1, 0.13))
            left, right, up, down = extent(shape, thing.radius)
            lane = (
                i * width / count + left + 0.03,
                (i + 1) * width / count - right - 0.03,
                up + 0.03,
                height - down - 0.08,
            )
            x, y = dice.uniform(*lane[:2]), dice.uniform(*lane[2:])
            speed, across, back = dice.uniform(0.12, 0.4), dice.chance(0.4), dice.chance(0.5)
            speed = 0.0 if dice.chance(0.3) else -speed if back else speed
            things.append(thing)
            start.append((x, y))
            velocity.append((speed, 0.0) if across else (0.0, speed))
            lanes.append(lane)
        distance = (width + 0.02) * (1 if dice.chance(0.5) else -1)
        away = 0.1 + 1.2 * dice.uniform(0, 1) ** 2
        turn = (distance, dice.uniform(0.2, 0.35), dice.uniform(0.42, 0.56), away, dice.uniform(0.5, 1.2))
        low, blocks = min(0.0, distance) - 0.1, []
        x = low
        while x < low + 2 * width + 0.3:
            wide = dice.uniform(0.08, 0.22)
            blocks.append((x, x + wide, dice.uniform(0.05, 0.24)))
            x += wide + dice.uniform(0.02, 0.12)
        return cls(setting, tuple(things), tuple(start), tuple(velocity), tuple(lanes), turn, tuple(blocks))

    def camera(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the camera is and how fast it moves, [T] each."""
        distance, before, turning, away, between = self.turn
        t = np.mod(times - before, 2 * turning + away + between) * (times >= before)
        out, home = t / turning, (t - turning - away) / turning
        return distance * (smooth(out) - smooth(home)), distance / turning * (smooth_rate(out) - smooth_rate(home))

    def state(self, times: np.ndarray) -> State:
        times = np.asarray(times, dtype=np.float64)
        camera, rate = self.camera(times)
        home = np.empty((len(times), len(self.things), 2))
        velocity = np.empty_like(home)
        for i in range(len(self.things)):
            for axis in (0, 1):
                limits = self.lanes[i][2 * axis : 2 * axis + 2]
                home[:, i, axis], velocity[:, i, axis] = fold(
                    self.start[i][axis], self.velocity[i][axis], *limits, times
                )
        position = home - np.stack([camera, 0 * camera], -1)[:, None]
        velocity[:, :, 0] -= rate[:, None]
        return State(self, times, position, velocity, extra={"camera": camera, "home": home})

    def visible(self, state: State) -> np.ndarray:
        shares = []
        for n, thing in enumerate(self.things):
            key = (thing.shape, thing.radius)
            x = state.position[:, n, 0]
            shares.append((area_left_of(*key, self.setting.box[0] - x) - area_left_of(*key, -x)) / area(*key))
        shares = np.stack(shares, -1)
        return np.where(shares < 1e-12, 0, shares)

    def paint(self, canvas, state: State) -> None:
        camera = state.extra["camera"]
        for left, right, height in self.blocks:
            canvas.bar(left - camera, right - camera, 0.16, top=self.setting.box[1] - height)
        super().paint(canvas, state)

    def claims(self, state: State) -> Claims:
        gone = np.flatnonzero((state.visible <= HIDDEN).all(1))
        back = len(gone) and bool((state.visible[gone[0] :] >= SHOWN).all(1).any())
        account = ("leave", "return") if back else ("leave",) if len(gone) else ("stay",)
        way = "right" if self.turn[0] > 0 else "left"
        return Claims((None,) * len(self.things), frozenset({account}), camera=way)
