"""Means of measures over many clips, with 95 % intervals of a bootstrap over clips, and permanence against time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
# name -> (what it is, unit, whether more is better)
MEASURES: dict[str, tuple[str, str, bool]] = {
    "position": ("position error", "px", False),
    "velocity": ("velocity error", "px/frame", False),
    "motion": ("path length over the true one", "", True),
    "rigidity": ("IoU with the true shape", "", True),
    "reappears": ("comes out again, in time and place", "", True),
    "swapped": ("another came out instead", "", False),
    "swaps": ("another stands in its place", "", False),
    "count_errors": ("appear, vanish, come apart", "/s", False),
    "counted": ("frames with the right objects", "", True),
    "regrowth": ("of a bite, grown again", "", False),
    "faded": ("of the paint, gone", "", False),
    "change_iou": ("IoU of what is bitten or painted", "", True),
    "energy_error": ("energy, off by", "", False),
    "gravity_error": ("gravity, off by", "", False),
    "penetration": ("in one another", "px", False),
    "seam": ("jump at the seam", "px", False),
    "style": ("has the new style", "", True),
    "there": ("frames with every object", "", True),
    "rigid": ("IoU with its own shape", "", True),
    "moves": ("motion beside that of the start", "", True),
}


def label(name: str) -> str:
    """A measure's name in words, with its unit."""
    kind, _, horizon = name.partition("@")
    about, unit, _ = MEASURES.get(kind, (kind.replace("_", " "), "", True))
    return about + (f" to {horizon}" if horizon else "") + (f", {unit}" if unit else "")


def rows_of(by_name: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """What is known of each by measure, as rows of a table: the measure's label, and a cell each, None where it has
    none."""
    for name in dict.fromkeys(name for found in by_name.values() for name in found):
        yield label(name), [found.get(name) for found in by_name.values()]


def mean_of(clips: Sequence[dict[str, list[float]]], name: str, seed: int = 0) -> dict[str, float] | None:
    """{mean, low, high, clips} of one measure, each clip weighing as its number of answers; None where no clip has one.
    The interval holds the middle 95 % of means over clips drawn again."""
    sums = np.array([(sum(clip[name]), len(clip[name])) for clip in clips if clip.get(name)], dtype=np.float64)
    if not len(sums):
        return None
    rows = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    again = sums[rows].sum(1)
    low, high = np.quantile(again[:, 0] / again[:, 1], (0.025, 0.975))
    mean = sums[:, 0].sum() / sums[:, 1].sum()
    return {"mean": _short(mean), "low": _short(low), "high": _short(high), "clips": len(sums)}


def summary(clips: Sequence[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """``mean_of`` every measure that some clip has."""
    names = dict.fromkeys(name for clip in clips for name in clip if name != "hidden_s")
    return {name: found for name in names if (found := mean_of(clips, name)) is not None}


def permanence_curve(clips: Sequence[dict[str, list[float]]], edges=(0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)) -> dict:
    """Share of the hidden things that come out again, by how long they were hidden: {``bins``: [{from, to, share, low,
    high, number}], ``half_life``: the seconds at which a fit of 2^(-t / half_life) stands at a half, None when all or
    none come back}."""
    pairs = [p for clip in clips for p in zip(clip.get("hidden_s", ()), clip.get("reappears", ()), strict=True)]
    bins = []
    for low, high in zip(edges, edges[1:], strict=False):
        inside = [{"x": [back]} for seconds, back in pairs if low < seconds <= high]
        if inside:
            found = mean_of(inside, "x")
            bins.append({"from": low, "to": high, "share": found["mean"], "low": found["low"], "high": found["high"],
                         "number": len(inside)})  # fmt: skip
    return {"bins": bins, "half_life": half_life(pairs)}


def half_life(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The half-life that makes (seconds hidden, came back) most likely under 2^(-t / half_life), on a fine grid."""
    if not pairs or all(back for _, back in pairs) or not any(back for _, back in pairs):
        return None
    seconds, back = np.array(pairs, dtype=np.float64).T
    lives = np.geomspace(0.02, 600, 800)
    chance = np.clip(2 ** (-seconds / lives[:, None]), 1e-9, 1 - 1e-9)
    likelihood = (back * np.log(chance) + (1 - back) * np.log(1 - chance)).sum(1)
    return _short(lives[int(likelihood.argmax())])


def _short(value: float) -> float:
    return float(f"{float(value):.4g}")
