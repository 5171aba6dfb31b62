"""Packages that come with the extras of pyproject.toml, and what to say where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS = {  # module -> the extra that brings it
    "PIL": "model", "av": "model", "numpy": "model", "omegaconf": "model", "rich": "model", "safetensors": "model",
    "typer": "model", "yaml": "model",
    "c2pa": "safety", "cryptography": "safety", "inspect_ai": "redteam",
    "diffusers": "diffusers", "transformers": "diffusers", "matplotlib": "bench", "triton": "triton",
}  # fmt: skip


class MissingExtra(ImportError):
    """A package of an extra is not installed. The message is one line that names the extra."""


@contextmanager
def named(purpose: str) -> Iterator[None]:
    """Raises `MissingExtra` where an import inside fails for want of a package of an extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            raise
        extra = EXTRAS[module]
        raise MissingExtra(
            f"{purpose} needs {module}, which is not installed; it comes with the extra [{extra}]: "
            f"pip install '.[{extra}]' in a copy of the project",
            name=error.name,
        ) from error
