"""How far a run is, how long the rest may take, and how much of a given time each further case gets."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

LEAST_S = 0.02  # for the timing of a mode, however late it is


class Progress:
    """Of `total` cases, each timed for `budget_s` seconds a mode, or for less where they have to end in `minutes`."""

    def __init__(
        self, total: int, minutes: float | None, budget_s: float, *,
        clock: Callable[[], float] = time.monotonic, out: TextIO | None = None,
    ) -> None:  # fmt: skip
        self.total, self.budget_s, self.clock, self.out = total, budget_s, clock, out or sys.stderr
        self.start = clock()
        self.end = self.start + 60 * minutes if minutes else None
        self.done, self.timing = -1, 0.0  # seconds that were given to the clock so far

    def begin(self, name: str, modes: int) -> float | None:
        """Say that a case begins; its seconds a mode, or None where the time is up."""
        self.done += 1
        now = self.clock()
        if self.end is not None and now >= self.end:
            return None
        left, gone = self.total - self.done, now - self.start
        budget = self.budget_s
        if self.end is not None:
            share = (self.end - now) / left
            checking = max(gone - self.timing, 0) / self.done if self.done else share / 2  # and all that is not timing
            budget = min(budget, max(LEAST_S, (share - checking) / modes))
        self.timing += budget * modes
        rest = gone / self.done * left if self.done else None
        if self.end is not None:
            rest = min(self.end - now, rest or self.end - now)
        about = f", about {_minutes(rest)} left" if rest is not None else ""
        print(f"[{self.done + 1}/{self.total}] {name}, {_minutes(gone)} gone{about}", file=self.out, flush=True)
        return budget


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
