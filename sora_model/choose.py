"""Of several clips the one that shows most of what its prompt says: best of n, by the world's own read-out.

    clip, verdicts = best(sora.generate("a red circle bounces around", seed=seed) for seed in range(4))

It judges what the grammar of the world's captions can say, and so those prompts alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .world import measures
from .world.captions import Program, parse
from .world.measures_text import text_truth
from .world.readout import read

if TYPE_CHECKING:
    from .pipeline import Clip


class Verdict(NamedTuple):
    """What is true of a clip; the greater, the better.

    truth     the share of the prompt's claims that hold (`world.measures_text.CLAIMS`)
    steady    the share of frames with as many objects as the prompt names
    rigidity  mean IoU of each named shape with the true one at its place, over the frames that show it whole; 0: never
    """

    truth: float
    steady: float
    rigidity: float


def program_of(prompt: str) -> Program:
    """What a prompt says; ValueError where it is no caption of the world."""
    if (program := parse(prompt)) is None:
        raise ValueError(
            f"clips can be judged for captions of the world only, such as 'a red circle bounces around'; got {prompt!r}"
        )
    return program


def judge(clip: Clip) -> Verdict:
    """How much of what its prompt says a clip shows. Raises as `program_of`."""
    program, reading = program_of(clip.prompt), read(clip.frames)
    answers = text_truth(clip.frames, program, clip.fps, reading).values()
    found = measures.prompted(clip.frames, program, clip.fps, reading)
    rigidity = found["rigidity"]
    return Verdict(
        float(np.mean([answer for answer in answers if answer is not None])),
        found["counted"][0],
        float(np.mean(rigidity)) if rigidity else 0.0,
    )


def best(clips: Iterable[Clip]) -> tuple[Clip, list[Verdict]]:
    """The clip of the greatest verdict, the first one of equals, and all verdicts. One clip is held beside the best."""
    chosen, verdicts = None, []
    for clip in clips:
        verdicts.append(judge(clip))
        if chosen is None or verdicts[-1] > max(verdicts[:-1]):
            chosen = clip
    if chosen is None:
        raise ValueError("there is no clip to choose from")
    return chosen, verdicts
