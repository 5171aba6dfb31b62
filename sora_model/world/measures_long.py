"""Measures of a clip without its truth: jumps at the seams of its parts, and what becomes of it in time."""

from __future__ import annotations

import numpy as np

from .base import Setting, Thing
from .measures import shape_scores
from .readout import Reading, radius_of, read
from .shapes import FIGURES


def seam(video: np.ndarray, seams: list[int]) -> list[float]:
    """How much larger the change into each frame of ``seams`` is than elsewhere: the acceleration of the objects there
    above what nine in ten of the other frames stay below, in pixels of 64. 0 is no seam at all."""
    reading, jumps = read(video), []
    scale = 64 / min(reading.size)
    elsewhere = np.ones(max(0, len(video) - 2), bool)
    for at in seams:
        elsewhere[max(0, at - 2) : at] = False
    for track in reading.tracks.values():
        bend = np.linalg.norm(np.diff(track.position, 2, axis=0), axis=1) * scale
        usual = bend[elsewhere]
        usual = float(np.nanquantile(usual, 0.9)) if np.isfinite(usual).any() else 0.0
        for at in seams:
            near = bend[max(0, at - 2) : at]
            if len(near) and np.isfinite(near).any():
                jumps.append(max(0.0, float(np.nanmax(near)) - usual))
    return jumps


def drift(
    video: np.ndarray, things: list[tuple[str, str]], fps: float, window: float = 2.0, pace: float | None = None
) -> dict[str, list[float | None]]:
    """Against time, by windows of seconds, without a truth: ``there``, the share of the frames with every thing or part
    of it; ``rigid``, their shape; ``counted``, frames with no other or doubled object; ``moves``, the mean step
    beside that of the first window, and ``motion``, beside the ``pace`` of a true clip, where that is given. One number
    a window; None where nothing could be read."""
    reading = read(video)
    size = max(1, round(window * fps))
    steps, rigid = _steps(reading, things, len(video)), {}
    for colour, shape in things:
        track = reading.tracks.get(colour)
        if track is not None and shape in FIGURES:
            setting = Setting((1.0, 1.0), reading.style, reading.background)
            thing = Thing(colour, shape, radius_of(track, shape, setting, reading.size))
            frames = np.flatnonzero(track.visible > 0.8)
            rigid[colour] = np.full(len(video), np.nan)
            rigid[colour][frames] = shape_scores(track, thing, setting, reading.size, frames)
    found: dict[str, list] = {"there": [], "rigid": [], "counted": [], "moves": []}
    named = [c for c, _ in things]
    more = ((track.pieces > (1 if c in named else 0)).astype(int) for c, track in reading.tracks.items())
    strange = sum(more, start=np.zeros(len(video), int))
    for first in range(0, len(video) - size + 1, size):
        part = slice(first, first + size)
        seen = [reading.tracks[c].present[part] if c in reading.tracks else np.zeros(size, bool) for c in named]
        found["there"].append(float(np.mean(np.all(seen, axis=0))))
        found["rigid"].append(_mean([r[part] for r in rigid.values()]))
        found["counted"].append(float(np.mean(strange[part] == 0)))
        found["moves"].append(_mean([s[part] for s in steps]))
    if pace is not None:
        found["motion"] = [None if m is None else m / pace for m in found["moves"]]
    start = next((m for m in found["moves"] if m), None)
    found["moves"] = [None if start is None or m is None else m / start for m in found["moves"]]
    return found


def pace(video: np.ndarray, things: list[tuple[str, str]]) -> float:
    """How far the things of a clip go in a frame, on the mean, in pixels of 64; what is absent does not move."""
    return float(np.mean(_steps(read(video), things, len(video))))


def _steps(reading: Reading, things: list[tuple[str, str]], frames: int) -> list[np.ndarray]:
    """[frames - 1] of each thing: how far it goes, in pixels of 64, and 0 where it is not there before and after."""
    steps, scale = [], 64 / min(reading.size)
    for colour, _ in things:
        track, still = reading.tracks.get(colour), np.zeros(frames - 1)
        moved = still if track is None else np.linalg.norm(np.diff(track.position, axis=0), axis=1)
        steps.append(np.nan_to_num(moved) * scale)
    return steps


def _mean(parts: list[np.ndarray]) -> float | None:
    values = np.concatenate(parts) if parts else np.array([])
    return float(np.nanmean(values)) if np.isfinite(values).any() else None
