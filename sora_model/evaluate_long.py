"""What is left of a clip after so many seconds, by each way of making one that long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import world
from .planning import CHUNK
from .world import baselines, measures_long
from .world.measures_summary import summary

SCENES = ("bounce", "loop", "occluder")
NAMES = {"once": "checkpoint, at once", "stream": "checkpoint, stream", "pieces": "checkpoint, pieces"}


def borders(way: str, frames: int, own: int) -> list[int]:
    """The frames with which parts of a clip of `frames` begin, where the checkpoint's own clips have `own`; for what is
    made at once, which has none, those of a stream."""
    return list(range(own, frames, own - own // 2)) if way == "pieces" else list(range(CHUNK, frames, CHUNK))


def length(
    sora: Any,
    seconds: float,
    ways: Sequence[str],
    seed: int,
    first: int,
    coded: Callable[[np.ndarray], np.ndarray],
    tell: Callable[[str, int, int], None],
    keep: Callable[[str, str, dict[str, np.ndarray]], None] | None,
    options: dict[str, Any],
) -> tuple[dict[str, dict[str, list]], dict[str, dict[str, dict[str, float]]]]:
    """Drift by windows of two seconds, and means over the whole time with the seams, of one clip a scene by each of
    `ways`; beside them those of the true clips of the seeds from `first` on, of the same `coded`, and what becomes of
    their beginning if its last frame is copied, or all goes straight on."""
    found: dict[str, list[dict[str, list]]] = {}
    for done, scene in enumerate(SCENES):
        fps, size, own = sora.defaults.fps, sora.defaults.size, sora.defaults.frames
        truth = world.sample(first, scene=scene, frames=round(seconds * fps), size=size, fps=fps)
        known, things = max(2, (own + 1) // 2), list(truth.program.things)
        pace = measures_long.pace(truth.video, things)
        made = {}
        for way in ways:
            clip = sora.generate(truth.caption, seconds=seconds, seed=seed, long=way, **options)
            made[NAMES[way]] = clip.frames, way
            tell(f"long clips, {way}", done + 1, len(SCENES))
        made |= {
            "copy last frame": (baselines.copy_last(truth, known), "stream"),
            "constant velocity": (baselines.constant_velocity(truth, known), "stream"),
            "true clips": (truth.video, "stream"),
            "true clips, coded": (coded(truth.video), "stream"),
        }
        for name, (video, way) in made.items():
            drift = measures_long.drift(video, things, fps, pace=pace)
            seams = measures_long.seam(video, borders(way, len(video), own))
            found.setdefault(name, []).append(drift | {"seam": seams})
        if keep is not None:
            few = {name: video[:: max(1, len(video) // 60)] for name, (video, _) in made.items()}
            keep("length", f"{seconds:g} s, every {max(1, len(truth.video) // 60)}th frame: {truth.caption}", few)
    curves = {
        name: {key: _columns([clip[key] for clip in clips]) for key in clips[0] if key != "seam"}
        for name, clips in found.items()
    }
    told = {name: summary([_numbers(clip) for clip in clips]) for name, clips in found.items()}
    return curves, told


def _numbers(clip: dict[str, list]) -> dict[str, list[float]]:
    return {key: [value for value in values if value is not None] for key, values in clip.items()}


def _columns(rows: list[list[float | None]]) -> list[float | None]:
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=False)]
    return [round(float(np.mean(column)), 4) if column else None for column in columns]
