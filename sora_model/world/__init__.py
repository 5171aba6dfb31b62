"""The procedural world: captioned clips whose physics is known exactly, drawn from a seed at any size and
length.

    clip = world.sample(7, scene="occluder")  # .video uint8 [17,64,64,3], .caption, .state: the truth
    videos, captions, clips = world.batch(range(32))  # uint8 [32,17,64,64,3]

``readout`` reads colour, shape, way and reappearance back from any clip and scores it against a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from . import readout
from .captions import VOCABULARY, can_write, eval_prompts, write
from .render import paint
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    SCENES,
    SHAPES,
    SPLITS,
    Dice,
    Scene,
    State,
    Wall,
    draw,
    pairs,
)

__all__ = [
    "BACKGROUNDS", "COLOURS", "DIRECTIONS", "HELD_OUT", "SCENES", "SHAPES", "SPLITS", "VOCABULARY",
    "Sample", "Scene", "State", "Wall", "batch", "can_write", "eval_prompts", "pairs", "readout", "sample",
]  # fmt: skip

MIN_SIDE, MAX_ASPECT, MAX_BYTES = 8, 16, 4 << 30


@dataclass(frozen=True)
class Sample:
    """A clip: ``video`` uint8 [T,H,W,3] sRGB, ``caption``, ``scene`` and its ``state`` in each frame."""

    video: np.ndarray
    caption: str
    scene: Scene
    state: State
    fps: float
    seed: int

    @property
    def pixels(self) -> np.ndarray:
        """Centroid in array coordinates: fp64 [T,2] (x, y), where a pixel's centre is a whole number."""
        return self.state.position * min(self.video.shape[1:3]) - 0.5


def sample(
    seed: int,
    *,
    scene: str | None = None,
    frames: int = 17,
    size: tuple[int, int] = (64, 64),
    fps: float = 8,
    split: str = "train",
    prompt_spec: Mapping[str, str] | None = None,
) -> Sample:
    """The clip of a seed.

    The same arguments give the same bytes. The scene depends on the seed and on the aspect ratio of ``size``
    = (H, W) only: more frames continue the same clip, another ``fps`` samples the same motion, a larger size
    of the same ratio shows the same scene finer. The caption is true of the frames there are, and so may
    change with their number.

    scene: one of ``SCENES``, drawn when None. split: ``"train"`` never shows a pair of ``HELD_OUT``,
    ``"held_out"`` only those. prompt_spec: fixes any of colour, shape, direction, background. Raises
    ValueError or TypeError naming the argument.
    """
    _check(seed, scene, frames, size, fps, split)
    fixed = _check_spec(prompt_spec)
    height, width = (int(n) for n in size)
    dice = Dice(int(seed))
    kind = dice.pick(SCENES)
    unit = min(height, width)
    drawn = draw(dice, scene or kind, (width / unit, height / unit), split, fixed)
    state = drawn.state(np.arange(frames) / fps)
    return Sample(paint(drawn, state, (height, width)), write(dice, drawn, state), drawn, state, float(fps), int(seed))


def batch(seeds: Iterable[int], **options) -> tuple[np.ndarray, list[str], list[Sample]]:
    """Clips of several seeds: (uint8 [N,T,H,W,3], captions, samples). ``options`` as for ``sample``."""
    clips = [sample(seed, **options) for seed in seeds]
    if not clips:
        raise ValueError("seeds is empty; give at least one seed")
    return np.stack([c.video for c in clips]), [c.caption for c in clips], clips


def _check(seed, scene, frames, size, fps, split) -> None:
    if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be a whole number >= 0, got {seed!r}")
    if scene is not None and scene not in SCENES:
        raise ValueError(f"scene must be one of {', '.join(SCENES)} or None, got {scene!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
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


def _check_spec(spec: Mapping[str, str] | None) -> Mapping[str, str]:
    known = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS, "background": BACKGROUNDS}
    if spec is None:
        return {}
    if not isinstance(spec, Mapping):
        raise TypeError(f"prompt_spec must be a mapping, got {type(spec).__name__}")
    for key, value in spec.items():
        if key not in known:
            raise ValueError(f"prompt_spec key {key!r} is unknown; it may hold {', '.join(known)}")
        if value not in known[key]:
            raise ValueError(f"prompt_spec {key} must be one of {', '.join(known[key])}, got {value!r}")
    return spec
