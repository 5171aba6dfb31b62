"""The `sora` command where even what it prints with may be missing: `python -m sora_model` is the same."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from . import extras


@contextmanager
def _broken_off_at_once() -> Iterator[None]:
    """Ctrl-C ends the program without a word: of what is imported some prints a page about it, some goes on."""
    own = signal.getsignal(signal.SIGINT)
    if own is not signal.default_int_handler:  # under nohup, say, it is ignored
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, own)


def main() -> None:
    """Runs `cli.main`. A package of an extra that is not installed is one line and exit code 1."""
    try:
        with extras.named("the sora command"):
            with _broken_off_at_once():
                from . import cli

                cli.wait_politely()
                import sora_kernels  # noqa: F401  # and torch
            cli.main()
    except extras.MissingExtra as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
