"""Options that several commands share."""

from __future__ import annotations

import re
from typing import Annotated

import typer

OWN = "the checkpoint's own"
Weights = Annotated[str, typer.Option(help="Checkpoint folder (own, or Wan's in the diffusers layout), or 'toy'.")]
Device = Annotated[
    str | None, typer.Option(help="Where to compute.", show_default="cuda where there is a GPU, else cpu")
]
Impl = Annotated[str, typer.Option(help="Kernels: auto, reference, cpu or triton.")]
WAIT = 1800.0
Wait = Annotated[
    float, typer.Option(help="Under torchrun: seconds to wait for a process that does not come or answer.")
]
Credentials = Annotated[
    bool, typer.Option("--credentials/--no-credentials", help="Sign what made the file into it, and mark the pixels.")
]


def parse_guidance(text: str) -> float | tuple[float, float]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 2):
        raise ValueError(f"--guidance must be a number, or of two experts HIGH,LOW, such as 4.0,3.0; got {text!r}")
    return numbers if len(numbers) == 2 else numbers[0]


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", text.strip())):
        raise ValueError(f"{option} must be WIDTHxHEIGHT in pixels, such as 64x64, got {text!r}")
    return int(match[2]), int(match[1])
