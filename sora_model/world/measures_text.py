"""Text truth: does a clip show what the program of its caption says? Every claim is looked up in the read-out."""

from __future__ import annotations

import math

import numpy as np

from .base import way_of
from .captions import Program
from .readout import Reading, Track, read
from .shapes import FIGURES

CLAIMS = ("colour", "shape", "count", "way", "style", "background")


def text_truth(video: np.ndarray, program: Program, fps: float = 8, reading: Reading | None = None) -> dict:
    """For each of ``CLAIMS`` whether all of it is true, None where the program says nothing of it.

    colour: every named colour is there · shape: each named flat shape is the one its colour is most like, where the
    clip shows it whole · count: there are as many objects · way: each heads where it is said to when it is first
    seen (round: the sense of its turn) · style, background: those read.
    """
    reading = read(video) if reading is None else reading
    tracks = [reading.tracks.get(colour) for colour, _ in program.things]
    shapes = [
        reading.shape(colour) == shape
        for (colour, shape), track in zip(program.things, tracks, strict=True)
        if shape in FIGURES and program.scene != "bite" and track is not None
    ]
    says_shape = any(shape in FIGURES for _, shape in program.things) and program.scene != "bite"
    ways = [
        track is not None and heading(track, way, fps, min(reading.size), program.scene == "parabola") == way
        for way, track in zip(program.ways, tracks, strict=True)
        if way is not None
    ]
    return {
        "colour": all(track is not None for track in tracks),
        "shape": (len(shapes) > 0 and all(shapes)) if says_shape else None,
        "count": len(reading.tracks) == len(tracks),
        "way": all(ways) if ways else None,
        "style": reading.style == program.style,
        "background": None if program.background is None else reading.background == program.background,
    }


def heading(track: Track, asked: str, fps: float, unit: int, sideways: bool = False) -> str | None:
    """The way a track goes at first (``sideways``: left or right, whatever its height does), or round its middle when
    a turn is ``asked`` for; None when it stays."""
    frames = np.flatnonzero(track.present)
    if len(frames) < 2:
        return None
    path = track.position[frames]
    if asked in ("clockwise", "counterclockwise"):
        spokes = path - path.mean(0)
        turn = float((spokes[:-1, 0] * spokes[1:, 1] - spokes[:-1, 1] * spokes[1:, 0]).sum())
        return None if abs(turn) < 1 else "clockwise" if turn > 0 else "counterclockwise"
    until = frames[0] + max(1, round(0.12 * fps))
    step = path[frames <= max(until, frames[1])][-1] - path[0]
    if asked in ("left", "right") and sideways:
        step[1] = 0
    if math.hypot(*step) < 0.008 * unit:
        return None
    return way_of(*(step / math.hypot(*step))) or "oblique"
