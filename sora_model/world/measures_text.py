"""Text truth: does a clip show what the program of its caption says? Every claim is looked up in the read-out."""

from __future__ import annotations

import math

import numpy as np

from .base import way_of
from .captions import Program
from .readout import Reading, Track, read
from .shapes import FIGURES

CLAIMS = ("colour", "shape", "count", "way", "account", "style", "background")
_GONE, _SEEN = 0.15, 0.5


def text_truth(video: np.ndarray, program: Program, fps: float = 8, reading: Reading | None = None) -> dict:
    """For each of ``CLAIMS`` whether all of it is true, None where the program says nothing of it.

    colour: every named colour is there · shape: each named flat shape is the one its colour is most like, where the
    clip shows it whole · count: there are as many objects · way: each heads where it is said to when it is first seen
    (round: the sense of its turn) · account: what happens does, in that order (that there are bites at all, not how
    many) · style, background: those read.
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
        "account": happens(reading, program, tracks, fps),
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


def happens(reading: Reading, program: Program, tracks: list[Track | None], fps: float) -> bool | None:
    """Whether a program's account takes place; None when it has nothing that could be seen."""
    account, unit = program.account, min(reading.size)
    if not account or account[0] in ("near", "stay", "orbit"):
        return None
    if any(track is None for track in tracks[: 1 if program.scene in ("occluder", "paint") else None]):
        return False
    if program.scene in ("occluder", "turn_back"):
        all_of = tracks[:1] if program.scene == "occluder" else tracks
        return _goes(np.min([t.visible for t in all_of], 0), np.max([t.visible for t in all_of], 0), account[1:])
    if program.scene == "bite":
        quarter = max(1, len(tracks[0].area) // 4)
        return bool(np.median(tracks[0].visible[-quarter:]) < 0.97)
    if program.scene == "paint":
        return _painted([t for t in tracks[: len(account)]])
    if program.scene == "loop":
        return _goes_round(tracks[0], unit) if account == ("circle",) else _swings(tracks[0], unit)
    if program.scene == "parabola":
        return _flies(tracks, account, unit)
    return _bounces(tracks, account, reading.size)


def _goes(least: np.ndarray, most: np.ndarray, then: tuple[str, ...]) -> bool:
    """Whether what was seen goes out of sight, and ``then`` comes back."""
    seen = np.flatnonzero(least >= _SEEN)
    gone = np.flatnonzero(most <= _GONE)
    gone = gone[gone > seen[0]] if len(seen) else gone[:0]
    return bool(len(gone)) and (not then or bool((least[gone[0] :] >= _SEEN).any()))


def _painted(strokes: list[Track | None]) -> bool:
    if any(t is None or t.visible[0] > 0.4 or t.visible[-1] < 0.5 for t in strokes):
        return False
    begun = [int(np.argmax(t.visible > 0.3)) for t in strokes]
    return begun == sorted(begun)


def _goes_round(track: Track, unit: int) -> bool:
    path = track.position[track.present]
    spokes = path - path.mean(0)
    if len(path) < 4 or np.linalg.norm(spokes, axis=1).mean() < 0.08 * unit:
        return False
    angles = np.unwrap(np.arctan2(spokes[:, 1], spokes[:, 0]))
    return bool(abs(angles[-1] - angles[0]) > math.pi)


def _swings(track: Track, unit: int) -> bool:
    path = track.position[track.present]
    spread = np.ptp(path, axis=0) if len(path) else np.zeros(2)
    return bool(spread[0] > 0.15 * unit and spread[1] < 0.4 * spread[0] and len(turns(track, 0, unit)) > 0)


def turns(track: Track, axis: int, unit: int) -> list[int]:
    """The frames at which a track's motion along an axis turns back."""
    frames = np.flatnonzero(track.present)
    step = np.diff(track.position[frames, axis])
    moving = np.flatnonzero(np.abs(step) > 0.004 * unit)
    signs = np.sign(step[moving])
    return [int(frames[moving[k + 1]]) for k in np.flatnonzero(signs[1:] != signs[:-1])]


def _flies(tracks: list[Track], account: tuple[str, ...], unit: int) -> bool:
    first = tracks[0].position[tracks[0].present]
    sideways = float(np.ptp(first[:, 0])) if len(first) else 0.0
    if (account[0] == "throw") != (sideways > 0.1 * unit):
        return False
    if account[1:] != ("land",):
        return True
    landed = []
    for track in tracks:
        heights = track.position[:, 1]
        landed.append(
            [t for t in turns(track, 1, unit) if heights[max(0, t - 1) : t + 1].max() > np.nanmax(heights) - 0.1 * unit]
        )
    return bool(landed[0]) and (len(landed) == 1 or not landed[1] or landed[0][0] <= landed[1][0])


def _bounces(tracks: list[Track], account: tuple[str, ...], size: tuple[int, int]) -> bool:
    events = []
    for i, track in enumerate(tracks):
        for axis in (0, 1):
            for t in turns(track, axis, min(size)):
                where = track.silhouette[max(0, t - 2) : t + 1].max(0).max(axis) > 0.3
                margin = max(2, round(0.1 * min(size)))
                if where[:margin].any() or where[-margin:].any():
                    events.append((t, "edge", i))
    meetings = _meets(tracks, min(size))
    events = [e for e in events if not any(abs(e[0] - t) <= 1 for t, *who in meetings if e[2] in who) or e[1] == "edge"]
    events += [(t, "collide", 0) for t, i, j in meetings if {i, j} == {0, 1}]
    if len(account) == 1:
        return any(kind == account[0] for _, kind, _ in events)
    order = [kind for _, kind, who in sorted(events) if who == 0]
    return tuple(dict.fromkeys(order)) == account


def _meets(tracks: list[Track], unit: int) -> list[tuple[int, int, int]]:
    """(frame, one, other): where two come close and both change their course."""
    found = []
    for i in range(len(tracks)):
        for j in range(i):
            a, b = tracks[i], tracks[j]
            apart = np.linalg.norm(a.position - b.position, axis=1)
            reach = math.sqrt(a.whole / math.pi) + math.sqrt(b.whole / math.pi)
            for t in range(1, len(apart) - 1):
                near = np.nanmin(apart[t - 1 : t + 2]) if np.isfinite(apart[t - 1 : t + 2]).any() else math.inf
                if near != apart[t] or near > 1.35 * reach + 0.04 * unit:
                    continue
                bends = []
                for track in (a, b):
                    before = (
                        track.position[t - 1] - track.position[max(0, t - 2)]
                        if t > 1
                        else track.position[1] - track.position[0]
                    )
                    after = track.position[min(len(apart) - 1, t + 2)] - track.position[t + 1]
                    bends.append(float(np.linalg.norm(after - before)))
                if min(bends) > 0.012 * unit:
                    found.append((t, j, i))
    return found
