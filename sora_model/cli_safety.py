"""`sora policy`: what may be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import console, say

out = console()


def judge(
    prompt: Annotated[str, typer.Argument(help="What somebody might ask for.")],
    rules: Annotated[
        Path | None, typer.Option(help="Policy file.", show_default="that of SORA_POLICY, or the shipped one")
    ] = None,
) -> None:
    """Say what the policy makes of PROMPT, by which rule: allow and review exit with 0, block with 3."""
    from .safety import policy

    decision = (policy.current() if rules is None else policy.Policy.load(rules)).decide(prompt)
    if decision.category is None:
        return say(out, "allow")
    start, end = decision.span
    say(out, f"{decision.action}: class {decision.category}, rule {decision.rule}, characters {start} to {end} "
        f"{prompt[start:end]!r} as read {decision.reading}: {decision.message}")  # fmt: skip
    if decision.action == "block":
        raise typer.Exit(3)
