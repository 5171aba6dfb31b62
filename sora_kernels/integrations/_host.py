"""What every door into another package shares: that package, or one clear error where it is missing or too old."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import types


def release(distribution: str) -> tuple[int, ...]:
    """The release installed, as numbers: (0, 42, 1) of 0.42.1.dev0+abc. () where there is none to ask."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def require(module: str, distribution: str, oldest: str, why: str, source: str | None = None) -> types.ModuleType:
    """Import `module` of `distribution`. Raises ImportError naming both releases where it is missing or too old, and
    the `source` to install it from where that is not PyPI."""
    install = f"install it from {source}" if source else f"pip install -U '{distribution}>={oldest}'"
    needed = f"sora_kernels needs {distribution} >= {oldest} for {why}"
    found = release(distribution)
    if found and found < tuple(map(int, oldest.split("."))):
        got = ".".join(map(str, found))
        raise ImportError(f"{needed}; found {got}: {install}", name=distribution)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = f"{module} does not import ({error})" if found else "it is not installed"
        raise ImportError(f"{needed}; {remedy}: {install}", name=distribution) from error
