"""Exact measures of a clip against the truth of the world: what a prediction of its frames gets right.

    truth = world.sample(7, scene="occluder", frames=33)
    measure(predicted, truth, known=9)      # predicted uint8 [33,H,W,3], its first 9 frames given

``measure`` gives a flat dict of lists of numbers, one for each thing it could be asked of; ``measures_summary`` makes
means with intervals of many. Positions are in pixels of a frame whose shorter side is 64, so that sizes compare.
On the true clip every measure is perfect up to the read-out's floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from . import Sample
from .base import HIDDEN, SHOWN, Setting, Thing
from .captions import Program
from .readout import Reading, Track, radius_of, read, rendered
from .shapes import FIGURES, gap

HORIZONS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
LOST = 32.0  # the error, in pixels of 64, of an object that is not there
WHOLE = 0.99
_SETTLED = 0.2  # seconds after a change before its persistence is asked for


@dataclass(frozen=True)
class Pair:
    """A clip's reading beside its truth's: ``own`` of the clip, ``true`` of the true frames; both see things alike."""

    truth: Sample
    own: Reading
    true: Reading
    known: int

    @property
    def scale(self) -> float:
        """Pixels of a frame of 64 in one of these."""
        return 64 / min(self.truth.size)

    def tracks(self, thing: Thing) -> tuple[Track | None, Track | None]:
        return self.own.tracks.get(thing.colour), self.true.tracks.get(thing.colour)


def measure(video: np.ndarray, truth: Sample, known: int = 0) -> dict[str, list[float]]:
    """All measures of a clip [T,H,W,3] whose truth is known; its first ``known`` frames were given and are not judged.

    Raises ValueError when the clip is not of the truth's frames and size, or nothing is left to judge.
    """
    video = np.asarray(video)
    wanted = (len(truth.state.times), *truth.size, 3)
    if video.shape != wanted:
        raise ValueError(f"video must be of the truth's shape {list(wanted)}, got {list(video.shape)}")
    if not 0 <= known < wanted[0]:
        raise ValueError(f"known must be from 0 to {wanted[0] - 1} frames, got {known}")
    style = truth.scene.setting.style
    pair = Pair(truth, read(video, style), read(truth.video, style), known)
    found: dict[str, list[float]] = {}
    for part in (motion, rigidity, permanence, count, persistence, conservation):
        found |= part(pair)
    return found


def followed(pair: Pair, i: int) -> np.ndarray:
    """[T,2]: where the read-out finds a thing, NaN where it is absent."""
    track = pair.tracks(pair.truth.state.things[i])[0]
    return np.full((len(pair.truth.state.times), 2), np.nan) if track is None else track.position


def motion(pair: Pair) -> dict[str, list[float]]:
    """Errors of position (px) and velocity (px per frame) by horizon, of what is wholly visible, and the share of the
    true motion that is still there: what is absent errs by ``LOST`` and does not move."""
    state, found = pair.truth.state, {}
    scene = pair.truth.scene.name
    if scene in ("bite", "paint"):  # what is left of a thing has another centroid
        return found
    since = state.times - state.times[max(0, pair.known - 1)]
    for i in range(len(state.things)):
        own, true = followed(pair, i), pair.truth.pixels[:, i]
        judged = (state.visible[:, i] >= WHOLE) & (np.arange(len(own)) >= pair.known)
        error = np.linalg.norm(own - true, axis=1) * pair.scale
        error = np.minimum(np.nan_to_num(error, nan=LOST), LOST)
        steps = judged[1:] & (state.visible[:-1, i] >= WHOLE)
        own_step, true_step = np.diff(own, axis=0), np.diff(true, axis=0)
        slip = np.minimum(np.nan_to_num(np.linalg.norm(own_step - true_step, axis=1), nan=LOST) * pair.scale, LOST)
        last = 0.0
        for horizon in HORIZONS:
            near = (since > last + 1e-9) & (since <= horizon + 1e-9)
            found.setdefault(f"position@{horizon:g}s", []).extend(error[judged & near].tolist())
            found.setdefault(f"velocity@{horizon:g}s", []).extend(slip[steps & near[1:]].tolist())
            last = horizon
        moving = steps & (np.linalg.norm(true_step, axis=1) * pair.scale > 0.5)
        if moving.any():
            lengths = np.nan_to_num(np.linalg.norm(own_step, axis=1))[moving].sum()
            found.setdefault("motion", []).append(float(lengths / np.linalg.norm(true_step, axis=1)[moving].sum()))
    return found


def rigidity(pair: Pair) -> dict[str, list[float]]:
    """IoU of each silhouette that there is with the true shape drawn at the read position, where the true one is
    whole."""
    state, scores = pair.truth.state, []
    if pair.truth.scene.name in ("bite", "paint", "orbit"):
        return {}
    for i, thing in enumerate(state.things):
        track = pair.tracks(thing)[0]
        frames = np.flatnonzero((state.visible[:, i] >= WHOLE) & (np.arange(len(state.times)) >= pair.known))
        scores += shape_scores(track, thing, pair.truth.scene.setting, pair.truth.size, frames)
    return {"rigidity": scores}


def shape_scores(track: Track | None, thing: Thing, setting: Setting, size, frames: np.ndarray) -> list[float]:
    """Soft IoU of a track's silhouettes with a thing drawn where they are, in each of the frames that has one."""
    there = frames[:0] if track is None else frames[track.present[frames]]
    if not len(there):
        return []
    ideal, own = rendered(thing, setting, track.position[there], size), track.silhouette[there]
    return (np.minimum(own, ideal).sum((1, 2)) / np.maximum(own, ideal).sum((1, 2))).tolist()


def own_rigidity(reading: Reading, colour: str, shape: str) -> list[float]:
    """Rigidity without a truth: against the shape of the size that the track mostly has, in every frame that shows more
    than half of it away from the frame's edges."""
    track = reading.tracks.get(colour)
    if track is None or shape not in FIGURES:
        return []
    setting = Setting((1.0, 1.0), reading.style, reading.background)
    thing = Thing(colour, shape, radius_of(track, shape, setting, reading.size))
    return shape_scores(track, thing, setting, reading.size, np.flatnonzero(track.visible > SHOWN))


def prompted(video: np.ndarray, program: Program, fps: float, reading: Reading | None = None) -> dict[str, list[float]]:
    """What can be measured of a clip of which only the caption's program is known: ``rigidity`` of each named flat
    shape, ``counted`` and ``count_errors`` of the objects (those of scenes that hide some may be out of sight)."""
    reading = read(video) if reading is None else reading
    named = dict(program.things)
    scores = []
    if program.scene not in ("bite", "paint", "orbit"):
        for colour, shape in program.things:
            scores += own_rigidity(reading, colour, shape)
    hides = program.scene in ("occluder", "turn_back", "bite", "paint", "orbit")
    wrong = np.zeros(len(video), bool)
    for colour in {*named, *reading.tracks}:
        track = reading.tracks.get(colour)
        pieces = np.zeros(len(video), int) if track is None else track.pieces
        most = 0 if colour not in named else 3 if hides else 1
        wrong |= (pieces > most) | (pieces < (colour in named and not hides))
    begun = wrong & ~np.concatenate([[False], wrong[:-1]])
    return {
        "rigidity": scores,
        "counted": [float(1 - wrong.mean())],
        "count_errors": [float(begun.sum() * fps / len(video))],
    }


def permanence(pair: Pair) -> dict[str, list[float]]:
    """For each time a thing is hidden and comes out again: whether it comes out within two frames of when it should and
    a radius of where; how many seconds it was hidden (``hidden_s``); whether another colour came out instead
    (``swapped``). Where nothing was hidden the lists are empty."""
    state, size = pair.truth.state, pair.truth.size
    found: dict[str, list[float]] = {"reappears": [], "hidden_s": [], "swapped": []}
    if pair.truth.scene.name in ("bite", "paint"):
        return found
    for i, thing in enumerate(state.things):
        own, true = pair.tracks(thing)
        if true is None:
            continue
        near = (1.5 * thing.radius + 0.02) * min(size)
        for start, end in hidden_spells(state.visible[:, i]):
            if end < pair.known:
                continue
            frames = np.arange(max(pair.known, end - 2), min(len(state.times), end + 3))
            goal = true.position[end]
            back = own is not None and any(
                own.present[t] and own.area[t] >= 0.3 * true.whole and math.dist(own.position[t], goal) < near
                for t in frames
            )
            others = [
                track for colour, track in pair.own.tracks.items() if colour not in [t.colour for t in state.things]
            ] + [pair.own.tracks[t.colour] for k, t in enumerate(state.things) if k != i and t.colour in pair.own.tracks
                 and np.linalg.norm(pair.truth.pixels[end, k] - goal) > 2 * near]  # fmt: skip
            taken = any(o.present[end] and math.dist(o.position[end], goal) < near for o in others)
            found["reappears"].append(float(back))
            found["hidden_s"].append(float(state.times[end] - state.times[start]))
            found["swapped"].append(float(taken and not back))
    return found


def hidden_spells(visible: np.ndarray) -> list[tuple[int, int]]:
    """(first hidden frame, frame where at least half shows again) of each time that what was shown hides."""
    spells, start, shown = [], None, False
    for t, share in enumerate(visible):
        if share >= SHOWN:
            if start is not None:
                spells.append((start, t))
            start, shown = None, True
        elif share <= HIDDEN and shown and start is None:
            start = t
    return spells


def count(pair: Pair) -> dict[str, list[float]]:
    """Objects that appear, vanish or come apart, per second (``count_errors``); the share of the frames whose objects
    are those of the truth (``counted``); of colours that stand where another's thing should (``swaps``)."""
    state = pair.truth.state
    frames = np.arange(len(state.times)) >= pair.known
    wrong = np.zeros(len(frames), bool)
    for colour in {*pair.own.tracks, *pair.true.tracks}:
        own, true = pair.own.tracks.get(colour), pair.true.tracks.get(colour)
        pieces = np.zeros(len(frames), int) if own is None else own.pieces
        if true is None:
            wrong |= pieces > 0
            continue
        share = true.visible
        least = np.where(share > 0.25, 1, 0)
        most = np.where(share > 0.01, np.maximum(true.pieces, 1), 0)
        wrong |= (pieces < least) | (pieces > most)
    begun = wrong & ~np.concatenate([[False], wrong[:-1]])
    seconds = frames.sum() / pair.truth.fps
    swaps = _swaps(pair) if pair.truth.scene.name not in ("bite", "paint") else []
    return {"count_errors": [float(begun[frames].sum() / seconds)], "counted": [float(1 - wrong[frames].mean())],
            "swaps": swaps}  # fmt: skip


def _swaps(pair: Pair) -> list[float]:
    """For each thing and frame that shows it whole: 1 where another colour is there instead of its own."""
    state, swaps = pair.truth.state, []
    for i, thing in enumerate(state.things):
        near, own = thing.radius * min(pair.truth.size), pair.own.tracks.get(thing.colour)
        for t in range(pair.known, len(state.times)):
            if state.visible[t, i] < WHOLE:
                continue
            goal = pair.truth.pixels[t, i]
            here = own is not None and own.present[t] and math.dist(own.position[t], goal) < near
            other = any(
                track.present[t] and math.dist(track.position[t], goal) < 0.5 * near
                for colour, track in pair.own.tracks.items()
                if colour != thing.colour
            )
            swaps.append(float(other and not here))
    return swaps


def persistence(pair: Pair) -> dict[str, list[float]]:
    """Of what is bitten off, the share that has grown again (``regrowth``); of what is painted, the share that has gone
    (``faded``); IoU of what is left or painted with the truth (``change_iou``). From a moment after each change on."""
    name, state = pair.truth.scene.name, pair.truth.state
    if name not in ("bite", "paint"):
        return {}
    found: dict[str, list[float]] = {"regrowth" if name == "bite" else "faded": [], "change_iou": []}
    for i, thing in enumerate(state.things):
        own, true = pair.tracks(thing)
        if true is None:
            continue
        shape = np.zeros_like(true.silhouette) if own is None else own.silhouette
        judged = np.arange(len(state.times)) >= pair.known
        if name == "bite":
            _regrown(pair, thing, shape, judged, found)
        else:
            painted = state.visible[:, i]
            old = np.searchsorted(state.times, state.times - _SETTLED, side="right") - 1
            for t in np.flatnonzero(judged & (old >= 0) & (painted[np.maximum(old, 0)] > 0)):
                before = true.silhouette[old[t]] > 0.9
                if before.any():
                    found["faded"].append(float(1 - shape[t][before].mean()))
            for t in np.flatnonzero(judged & (painted >= 1)):
                found["change_iou"].append(_iou(shape[t], true.silhouette[t]))
    return found


def _regrown(pair: Pair, thing: Thing, shape: np.ndarray, judged: np.ndarray, found: dict[str, list[float]]) -> None:
    state, unit = pair.truth.state, min(pair.truth.size)
    height, width = pair.truth.size
    y, x = np.mgrid[:height, :width].astype(np.float64)
    extra = state.extra
    whole = rendered(thing, pair.truth.scene.setting, pair.truth.pixels[:, 0], pair.truth.size) > 0.9
    for t in np.flatnonzero(judged):
        gone = np.zeros((height, width), bool)
        for time, centre in zip(extra["bite_time"], extra["bite_centre"], strict=True):
            if time <= state.times[t] - _SETTLED:
                at = (state.position[t, 0] + centre) * unit - 0.5
                gone |= np.hypot(x - at[0], y - at[1]) < extra["bite_radius"] * unit - 1.0
        at = extra["eater"][t] * unit - 0.5
        free = np.hypot(x - at[0], y - at[1]) > extra["eater_radius"] * unit + 1.0
        bitten = gone & free & whole[t]
        if bitten.sum() >= 4:
            found["regrowth"].append(float(shape[t][bitten].mean()))
            if free[whole[t]].all():
                true = pair.true.tracks[thing.colour].silhouette[t]
                found["change_iou"].append(_iou(shape[t], true))


def _iou(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.minimum(one, two).sum() / max(np.maximum(one, two).sum(), 1e-9))


def conservation(pair: Pair) -> dict[str, list[float]]:
    """Energy against the truth's (``energy_error``, relative, medians over the judged frames), gravity's error
    (relative), and how deep shapes are in one another or outside of the frame (``penetration``, px)."""
    state, truth = pair.truth.state, pair.truth
    found: dict[str, list[float]] = {}
    paths = np.stack([followed(pair, i) for i in range(len(state.things))], 1) * pair.scale
    judged = np.arange(len(paths)) >= max(1, pair.known)
    if truth.scene.name in ("bounce", "loop"):
        mass = state.extra.get("mass", np.ones(len(state.things)))
        kinetic = [np.sum(mass * (np.diff(p, axis=0) ** 2).sum(-1), -1) for p in (paths, truth.pixels * pair.scale)]
        own, true = (k[judged[1:]] for k in kinetic)
        if len(own):
            own = np.nan_to_num(own)
            found["energy_error"] = [float(abs(np.median(own) / max(np.median(true), 1e-9) - 1))]
        depths = []
        for t in np.flatnonzero(judged):
            for i, one in enumerate(state.things):
                for j in range(i):
                    two, apart = state.things[j], (paths[t, i] - paths[t, j]) / 64
                    if np.isfinite(apart).all():
                        depth = -gap((one.shape, one.radius), (two.shape, two.radius), *apart) * 64
                        depths.append(max(0.0, depth))
        found["penetration"] = depths
    if truth.scene.name == "parabola":
        bend = np.diff(paths, 2, axis=0)[:, :, 1]
        true = np.diff(truth.pixels * pair.scale, 2, axis=0)[:, :, 1]
        flying = np.abs(true - np.median(true, axis=0)) < 0.05 * np.abs(np.median(true, axis=0))
        flying &= judged[2:, None]
        if flying.any():
            found["gravity_error"] = [
                float(np.abs(np.nan_to_num(bend) - true)[flying].mean() / np.abs(true)[flying].mean())
            ]
    return found
