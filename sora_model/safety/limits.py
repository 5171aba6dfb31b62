"""What one request may ask for and take, and where it may write: for whom a program serves that is not its owner.

    limits.use(Limits(seconds=10, steps=50, time=120, memory=8 << 30, folder="out"))

Or a YAML file of the same fields, which the environment variable SORA_LIMITS names. They hold in every command and in
Python, and are looked at before anything is computed, save for `time`, which is asked between the steps of the work.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from .. import checks

VARIABLE = "SORA_LIMITS"


class LimitsError(ValueError):
    """Limits that cannot be used, or work that was ended by one."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """None is no limit but what the machine has. Of what is asked for:

    characters  of a prompt
    seconds     of a clip, and of what is added to one
    side        of a frame that is made, pixels
    steps       of the sampler
    clips       that one command makes

    of files that are read, videos and images:

    read_bytes  of a file
    read_pixels, read_frames    of a frame, and in a file

    and of what it takes:

    memory      bytes that it may need by the estimate made beforehand
    time        seconds from the check of the request to its last frame
    folder      where alone files are written; links and ".." are followed first
    """

    characters: int = 4096
    seconds: float = 86_400
    side: int = 8192
    steps: int = 10_000
    clips: int = 1000
    read_bytes: int = 16 << 30
    read_pixels: int = 4096 * 2304
    read_frames: int = 7200
    memory: int | None = None
    time: float | None = None
    folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "folder":
                if value is not None and not (isinstance(value, str | os.PathLike) and os.fspath(value)):
                    raise ValueError(f"folder must be the path of a folder or None; got {value!r}")
                if value is not None:
                    object.__setattr__(self, "folder", Path(value).absolute())
            elif field.name in ("seconds", "time"):
                if value is not None or field.name == "seconds":
                    checks.number(field.name, value, 0, 1e9)
            elif value is not None or field.name != "memory":
                checks.whole(field.name, value, 1, 1 << 60)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Limits:
        """Of a YAML file; `folder` is seen from the file's own. Raises `LimitsError` naming file, field and value."""
        try:
            content = yaml.safe_load(Path(path).read_text("utf-8"))
            if content is not None and not isinstance(content, Mapping):
                raise ValueError(f"it must hold names and values; got {content!r:.80}")
            content = dict(content or {})
            names = [field.name for field in dataclasses.fields(cls)]
            if unknown := [name for name in content if name not in names]:
                raise ValueError(f"unknown {unknown[0]!r}; known are {', '.join(names)}")
            if isinstance(content.get("folder"), str):
                content["folder"] = Path(path).absolute().parent / content["folder"]
            return cls(**content)
        except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise LimitsError(f"cannot use the limits {os.fspath(path)!r}: {reason}") from error


def current() -> Limits:
    """What `use` was given, else those of the file that SORA_LIMITS names, else the defaults."""
    if _own is not None:
        return _own
    return _loaded(path) if (path := os.environ.get(VARIABLE)) else Limits()


def use(limits: Limits | None) -> None:
    """These from now on, in every thread; with None, those of SORA_LIMITS again."""
    global _own
    if not isinstance(limits, Limits | None):
        raise TypeError(f"limits must be Limits or None; got {type(limits).__name__}")
    _own = limits


_own: Limits | None = None
_loaded = functools.lru_cache(Limits.load)


class Clock:
    """Begins with a request; called between its steps, it raises `LimitsError` once `Limits.time` is over."""

    def __init__(self) -> None:
        self.most, self.begun = current().time, time.monotonic()

    def __call__(self) -> None:
        if self.most is not None and time.monotonic() - self.begun > self.most:
            raise LimitsError(
                f"this took more than the time={self.most:g} seconds that the limits allow, and was ended; ask for "
                "fewer steps, or a smaller or shorter clip"
            )


def outside(path: str | os.PathLike[str], target: Path) -> str | None:
    """Why nothing may be written at `target`, which `path` leads to, links followed; None where it may."""
    folder = current().folder
    if folder is None or target.is_relative_to(os.path.realpath(folder)):
        return None
    return f"{os.fspath(path)!r} lies outside of {os.fspath(folder)!r}, where alone the limits allow to write"
