"""The `sora` command where even what it prints with may be missing: `python -m sora_model` is the same."""

from __future__ import annotations

import sys

from . import extras


def main() -> None:
    """Runs `cli.main`. A package of an extra that is not installed is one line and exit code 1."""
    try:
        with extras.named("the sora command"):
            from . import cli

            cli.main()
    except extras.MissingExtra as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
