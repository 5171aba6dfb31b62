"""Verbs of whose result the world knows the truth: a new style leaves the motion as it is, and a circle has no seam."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from . import world
from .world import measures, measures_long
from .world.measures_summary import summary
from .world.readout import read

SCENES = ("bounce", "parabola", "occluder", "turn_back", "loop")
_CHANGES = [list(itertools.permutations(world.STYLES, 2))[5 * k % 12] for k in range(12)]  # mixed, for few clips

Keep = Callable[[str, str, dict[str, np.ndarray]], None]


def verbs(
    sora: Any,
    each: int,
    seed: int,
    first: int,
    coded: Callable[[np.ndarray], np.ndarray],
    tell: Callable[[str, int, int], None],
    keep: Keep | None,
    options: dict[str, Any],
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """{"restyle", "loop"}: measures of `each` true clips of every scene that is flat, of the seeds from `first` on.

    Restyled: the motion against the truth, and whether the style is the one asked for; beside the clip left as it was,
    one made from the words alone, the true one in the new style, and that one `coded`. In a circle: jumps at the two
    seams, beside the clip cut from its end to its beginning, and a true one that goes on.
    """
    restyled: dict[str, list] = {}
    looped: dict[str, list] = {}
    total = each * len(SCENES)
    for done in range(total):
        scene, number = SCENES[done % len(SCENES)], first + done
        for kind, found, judge in (("restyle", restyled, _restyled), ("loop", looped, _looped)):
            title, made = judge(sora, scene, number, done, seed, coded, options)
            for name, (_, answers) in made.items():
                found.setdefault(name, []).append(answers)
            if keep is not None and done < len(SCENES):
                keep(kind, title, {name: video for name, (video, _) in made.items()})
        tell("restyle and loop", done + 1, total)
    return {kind: {name: summary(clips) for name, clips in found.items()}
            for kind, found in (("restyle", restyled), ("loop", looped))}  # fmt: skip


Judged = tuple[str, dict[str, tuple[np.ndarray, dict[str, list[float]]]]]


def _restyled(sora, scene: str, number: int, turn: int, seed: int, coded, options: dict[str, Any]) -> Judged:
    shown = dict(frames=sora.defaults.frames, size=sora.defaults.size, fps=sora.defaults.fps)
    old, new = _CHANGES[turn % len(_CHANGES)]
    source, truth = (world.sample(number, scene=scene, prompt_spec={"style": style}, **shown) for style in (old, new))
    caption = truth.caption
    made = {
        "checkpoint": sora.restyle(source.video, caption, seed=seed, **options).frames,
        "left as it was": source.video,
        "from the words alone": sora.generate(caption, seed=seed, **options).frames,
        "true clips": truth.video,
        "true clips, coded": coded(truth.video),
    }
    return f"{old} to {new}: {caption}", {name: (video, _kept(video, truth, new)) for name, video in made.items()}


def _kept(video: np.ndarray, truth: world.Sample, style: str) -> dict[str, list[float]]:
    """Of a clip that should move as the truth does, in another style."""
    found = measures.measure(video, truth)
    errors = [error for name, values in found.items() if name.startswith("position@") for error in values]
    kept = {name: found[name] for name in ("motion", "rigidity", "counted") if name in found}
    return {"style": [float(read(video).style == style)], "position": errors} | kept


def _looped(sora, scene: str, number: int, turn: int, seed: int, coded, options: dict[str, Any]) -> Judged:
    own, fps = sora.defaults.frames, sora.defaults.fps
    more = max(2, own // 2)
    truth = world.sample(number, scene=scene, frames=own + more, size=sora.defaults.size, fps=fps)
    given = truth.video[:own]
    circle = sora.loop(given, truth.caption, seconds=more / fps, seed=seed, **options).frames
    made = {
        "checkpoint": (circle, [own, len(circle)]),
        "cut": (given, [own]),
        "true clips": (truth.video, [own]),
        "true clips, coded": (coded(truth.video), [own]),
    }
    judged = {}
    for name, (video, seams) in made.items():
        round_ = video if name.startswith("true") else np.concatenate([video, video[:3]])
        judged[name] = video, {"seam": measures_long.seam(round_, seams)}
    return truth.caption, judged
