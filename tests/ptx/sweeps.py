"""Which of a sweep's combinations are for `make test`: the others are slow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import pytest


def in_turns(cases: Sequence, *axes: Sequence) -> list:
    """Parameters (*case, a value of each axis): each case with one value of one or two axes, in turn, the rest slow.

    The values of two axes meet in every way as the cases go on.
    """
    sizes, found = [len(axis) for axis in axes], []
    for n, case in enumerate(cases):
        turn = [(n + place * (n // math.lcm(*sizes))) % size for place, size in enumerate(sizes)]
        for values in itertools.product(*map(range, sizes)):
            marks = () if list(values) == turn else pytest.mark.slow
            fields = case if isinstance(case, tuple) else (case,)
            chosen = [axis[value] for axis, value in zip(axes, values, strict=True)]
            found.append(pytest.param(*fields, *chosen, marks=marks))
    return found


LONG = {  # faults with many places, or which no schedule shows at some of them
    "a wait for an mbarrier removed", "a named barrier removed", "a fence of products removed",
    "a wait for stores too lax",
}  # fmt: skip


def faults(labels: Iterable[str]) -> list:
    """Planted faults as parameters, those that take seconds marked slow."""
    return [pytest.param(label, marks=pytest.mark.slow if label in LONG else ()) for label in labels]
