"""Faults planted into what nvcc compiles, one at a time, and what finds them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from . import Fault, nvcc


def planted(source: str, kernel: str, pattern: str, replacement: str) -> Iterator[str]:
    """The PTX of csrc/cuda/{source}.cu with each match by itself replaced in the kernel whose name holds `kernel`."""
    text = nvcc.compiled(source, 90)
    begin = re.search(rf"\.entry \S*{re.escape(kernel)}", text).end()
    end = text.find(".entry", begin)
    for hit in re.compile(pattern, re.M).finditer(text, begin, end if end > 0 else len(text)):
        yield text[: hit.start()] + hit.expand(replacement) + text[hit.end() :]


def found(check: Callable[[int], None], schedules: int = 8) -> str | None:
    """What finds a fault: the kind that check(schedule) meets first, or "wrong result"; None where nothing does."""
    for schedule in range(schedules):
        try:
            check(schedule)
        except Fault as fault:
            return fault.kind
        except AssertionError:
            return "wrong result"
    return None
