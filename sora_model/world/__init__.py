"""The procedural world: captioned clips whose physics is known exactly, drawn from a seed at any size and length.

    clip = world.sample(7, scene="occluder")  # .video uint8 [17,64,64,3], .caption, .program, .state: the truth
    videos, captions, clips = world.batch(range(32))  # uint8 [32,17,64,64,3]
    world.parse("a red ball hits a blue ring")  # the program that a caption says, None for other text

``data`` feeds training, ``readout`` reads objects back from any clip.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import numpy as np

from . import readout
from .base import HELD_OUT, SHAPES, SPLITS, Dice, Event, Scene, State, Thing, cast_of, draw_setting, known, pairs
from .captions import Program, can_write, parse, vocabulary, write
from .palette import BACKGROUNDS, COLOURS, STYLES
from .render import paint
from .scenes import REGISTRY

SCENES: tuple[str, ...] = tuple(REGISTRY)
VOCABULARY: tuple[str, ...] = vocabulary()

__all__ = [
    "BACKGROUNDS", "COLOURS", "HELD_OUT", "SCENES", "SHAPES", "SPLITS", "STYLES", "VOCABULARY", "Event", "Program",
    "Sample", "Scene", "State", "Thing", "batch", "can_write", "draw", "eval_prompts", "pairs", "parse", "readout",
    "sample",
]  # fmt: skip

MIN_SIDE, MAX_ASPECT, MAX_BYTES = 8, 4, 4 << 30


@dataclass(frozen=True)
class Sample:
    """A clip: its ``scene`` and ``state`` (the truth), ``caption`` and ``program``, and ``video`` uint8 [T,H,W,3] sRGB,
    rendered when it is asked for."""

    scene: Scene
    state: State
    size: tuple[int, int]
    fps: float
    seed: int

    @cached_property
    def video(self) -> np.ndarray:
        return paint(self.scene, self.state, self.size)

    @cached_property
    def pixels(self) -> np.ndarray:
        """Centroids in array coordinates: fp64 [T,N,2] (x, y), where a pixel's centre is a whole number."""
        return self.state.position * min(self.size) - 0.5

    def wording(self, index: int) -> tuple[str, Program]:
        """Caption number ``index`` of the clip, and what it says. Every one is true of the frames there are."""
        return write(Dice((self.seed << 8) + index), self.scene, self.state)

    def record(self) -> dict[str, Any]:
        """The truth as JSON can hold it: caption, program, setting, and the state, in the world's units."""
        state, extra = self.state, {}
        for name, value in self.state.extra.items():
            extra[name] = np.asarray(value).tolist()
        arrays = {
            "times": state.times,
            "position": state.position,
            "velocity": state.velocity,
            "visible": state.visible,
        }
        return {
            "seed": self.seed,
            "scene": self.scene.name,
            "size": list(self.size),
            "fps": self.fps,
            "caption": self.caption,
            "program": asdict(self.program),
            "setting": asdict(self.scene.setting),
            "things": [asdict(thing) for thing in state.things],
            "events": [asdict(event) for event in state.events],
            **{name: value.tolist() for name, value in arrays.items()},
            "extra": extra,
        }

    @property
    def caption(self) -> str:
        return self.wording(0)[0]

    @property
    def program(self) -> Program:
        return self.wording(0)[1]


def sample(
    seed: int,
    *,
    scene: str | None = None,
    frames: int = 17,
    size: tuple[int, int] = (64, 64),
    fps: float = 8,
    split: str = "train",
    prompt_spec: Mapping[str, Any] | None = None,
) -> Sample:
    """The clip of a seed.

    The same arguments give the same bytes. The motion depends on the seed, the scene and the aspect ratio of ``size`` =
    (H, W) only: more frames continue the same clip, another ``fps`` samples the same motion, a larger size of the same
    ratio shows it finer. Captions are true of the frames there are, and so may change with their number.

    scene: one of ``SCENES``, drawn when None. split: ``"train"`` never shows a pair of ``HELD_OUT``, in
    ``"held_out"`` the first object is one. prompt_spec: fixes any of colour and shape (of the first object), style,
    background, count; another style or background leaves the motion as it is. Raises ValueError or TypeError naming
    the argument.
    """
    _check(seed, frames, size, fps)
    drawn = draw(seed, scene=scene, aspect=size[1] / size[0], split=split, prompt_spec=prompt_spec)
    return Sample(drawn, drawn.state(np.arange(frames) / fps), (int(size[0]), int(size[1])), float(fps), int(seed))


def draw(
    seed: int,
    *,
    scene: str | None = None,
    aspect: float = 1.0,
    split: str = "train",
    prompt_spec: Mapping[str, Any] | None = None,
) -> Scene:
    """The scene of a seed in a frame of width over height ``aspect``, as ``sample`` draws it: ``.state(times)`` gives
    its truth at any times."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be a whole number >= 0, got {seed!r}")
    if scene is not None and scene not in REGISTRY:
        raise ValueError(f"scene must be one of {', '.join(SCENES)} or None, got {scene!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    spec = known(prompt_spec or {})
    dice = Dice(int(seed))
    kind = REGISTRY[dice.pick(SCENES)]
    kind = REGISTRY[scene] if scene else kind
    setting = draw_setting(dice, (max(1.0, aspect), max(1.0, 1 / aspect)), spec)
    named = {key: value for key, value in spec.items() if key in ("colour", "shape")}
    drawn = kind.draw(dice, setting, cast_of(dice, split, named), spec.get("count"))
    if spec.get("count") not in (None, len(drawn.things)):
        raise ValueError(f"prompt_spec count {spec['count']}: scene {kind.name!r} shows {len(drawn.things)} at most")
    return drawn


def batch(seeds: Iterable[int], **settings) -> tuple[np.ndarray, list[str], list[Sample]]:
    """Clips of several seeds: (uint8 [N,T,H,W,3], captions, samples). ``settings`` as for ``sample``."""
    clips = [sample(seed, **settings) for seed in seeds]
    if not clips:
        raise ValueError("seeds is empty; give at least one seed")
    return np.stack([c.video for c in clips]), [c.caption for c in clips], clips


def eval_prompts(each: int = 4) -> list[tuple[str, Program]]:
    """Fixed prompts, ``each`` of every scene from either split, with what they say. Those of the held-out split name
    pairs of colour and shape that training never shows together; the seeds of the others are far from those of
    training."""
    return [
        sample(_EVAL_SEED + 2000 * number + 1000 * half + seed, scene=scene, split=split).wording(0)
        for half, split in enumerate(("held_out", "train"))
        for number, scene in enumerate(SCENES)
        for seed in range(each)
    ]


_EVAL_SEED = 10**13


def _check(seed, frames, size, fps) -> None:
    if not isinstance(frames, Integral) or isinstance(frames, bool) or frames < 1:
        raise ValueError(f"frames must be a whole number >= 1, got {frames!r}")
    if not isinstance(fps, Real) or isinstance(fps, bool) or not 0 < fps < math.inf:
        raise ValueError(f"fps must be a finite number > 0, got {fps!r}")
    try:
        height, width = size
    except (TypeError, ValueError):
        raise ValueError(f"size must be (height, width), got {size!r}") from None
    if not all(isinstance(n, Integral) and not isinstance(n, bool) and n >= MIN_SIDE for n in (height, width)):
        raise ValueError(f"size must be (height, width), whole numbers >= {MIN_SIDE}, got {size!r}")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"size {size!r} is longer than {MAX_ASPECT}:1; choose a less extreme ratio")
    needed = int(frames) * int(height) * int(width) * 3
    if needed > MAX_BYTES:
        fit = MAX_BYTES // (int(height) * int(width) * 3)
        advice = f"at this size at most {fit} frames fit" if fit else "choose a smaller size"
        raise ValueError(f"frames x size need {needed / 2**30:.1f} GiB, the limit is {MAX_BYTES >> 30} GiB; {advice}")
