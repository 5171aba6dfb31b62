"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Weights = Annotated[str, typer.Option(help="Checkpoint folder (own, or Wan 2.1's in the diffusers layout), or 'toy'.")]
Device = Annotated[
    str | None, typer.Option(help="Where to compute.", show_default="cuda where there is a GPU, else cpu")
]
Impl = Annotated[str, typer.Option(help="Kernels: auto, reference, cpu or triton.")]
