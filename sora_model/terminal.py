"""What the commands print. Text is printed as it is, never read as rich's markup, emoji or highlighting: a path may be
`clip[v2].mp4`. What cannot be printed (control characters, bytes that are no text) is shown as an escape."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


def console(**options) -> Console:
    return Console(markup=False, emoji=False, highlight=False, **options)


def plain(text: object) -> str:
    """One line of it, every character printable."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(to: Console, *parts: object) -> None:
    """A line of text; a part may be a `Text` in colour."""
    to.print(Text.assemble(*(part if isinstance(part, Text) else plain(part) for part in parts)), soft_wrap=True)


def note(to: Console, message: object) -> None:
    say(to, Text("note: ", "yellow"), message)


def error(to: Console, message: object) -> None:
    """`message` in one line, and further ones where it lists reasons, one a line."""
    first, *rest = str(message).splitlines() or ["unknown"]
    say(to, Text("error: ", "bold red"), first)
    for line in rest:
        say(to, line)


@contextmanager
def notes(to: Console) -> Iterator[None]:
    """The warnings that are for the user, printed as notes when they are first given: before the work that they are
    about."""
    told: set[str] = set()

    def show(message: object, category: type[Warning], *place: object) -> None:
        if category is UserWarning and str(message) not in told:
            told.add(str(message))
            note(to, message)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def bars(to: Console, **options) -> Iterator[Callable[[str, int, int | None], None]]:
    """A function (stage, done, total) that draws a bar for each stage."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    drawn, tasks = Progress(*columns, console=to, **options), {}

    def progress(stage: str, done: int, total: int | None) -> None:
        drawn.start()  # not before there is a bar: an empty one is an empty line
        if stage not in tasks:
            tasks[stage] = drawn.add_task(stage, total=total)
        drawn.update(tasks[stage], completed=done, total=total)

    try:
        yield progress
    finally:
        if tasks:
            drawn.stop()


def forgive_encodings() -> None:
    """What a terminal's encoding lacks is escaped too, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
