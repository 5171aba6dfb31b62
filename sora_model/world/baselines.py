"""What a prediction must beat: the last known frame for ever, and every object straight on at the speed it had.

Both are given the truth up to the frames that are known, the second its exact speeds and shapes too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from . import Sample
from .render import paint


def copy_last(truth: Sample, known: int) -> np.ndarray:
    """The known frames, and the last of them from there on."""
    return truth.video[np.minimum(np.arange(len(truth.video)), known - 1)]


def constant_velocity(truth: Sample, known: int) -> np.ndarray:
    """The known frames, and from there on what they show moving straight on, the camera too. What a scene draws from
    more than positions (bites, strokes, boxes) stays as it is."""
    if truth.scene.name in ("bite", "paint", "orbit") or known < 2:
        return copy_last(truth, known)
    state = truth.state
    ahead = np.maximum(np.arange(len(state.times)) - (known - 1), 0)

    def straight(values: np.ndarray) -> np.ndarray:
        step = values[known - 1] - values[known - 2]
        later = values[known - 1] + ahead.reshape(-1, *(1,) * step.ndim) * step
        return np.where((ahead > 0).reshape(-1, *(1,) * step.ndim), later, values)

    extra = dict(state.extra)
    if "camera" in extra:
        extra["camera"] = straight(extra["camera"])
    moved = replace(state, position=straight(state.position), extra=extra)
    video = paint(truth.scene, moved, truth.size)
    video[:known] = truth.video[:known]
    return video
