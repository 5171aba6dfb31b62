"""Filters of frames: what somebody's own classifier says of a picture, where rules for prompts see nothing.

    filters.use(lambda frames: Decision("block", "violence", "my model") if model(frames) > 0.9 else None)

None is shipped: one that sees needs weights, and none are downloaded. Each is called with frames, uint8 `[T, H, W, 3]`:
those that are given to a verb, before anything is computed of them, and those that are made, as they are decoded and
before they are written. "block" raises `PolicyError` and nothing is written, "review" warns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from .policy import ACTIONS, Decision, PolicyError

Filter = Callable[[np.ndarray], Decision | None]

_used: tuple[Filter, ...] = ()


def use(*filters: Filter) -> None:
    """These from now on, in every thread; with none, none."""
    global _used
    for one in filters:
        if not callable(one):
            raise TypeError(f"a filter must be a function of frames; got {type(one).__name__}")
    _used = filters


def check(frames: np.ndarray, what: str) -> None:
    """Raises `PolicyError` for frames that a filter blocks, `what` being their name, and warns of those to review."""
    for one in _used:
        decision = one(frames)
        if decision is None:
            continue
        if not isinstance(decision, Decision) or decision.action not in ACTIONS:
            raise TypeError(f"a filter of frames must give None or a policy.Decision; got {decision!r:.80}")
        told = f"falls under {decision.category}, rule {decision.rule}: {decision.message}"
        if decision.action == "block":
            raise PolicyError(f"{what} is refused: it {told}", decision)
        if decision.action == "review":
            warnings.warn(f"a person should look at {what}: it {told}", stacklevel=3)
