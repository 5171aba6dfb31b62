"""A thin text-to-video system on `sora_kernels`: Wan-compatible transformer and VAE, flow matching, a procedural world.

    from sora_model import Sora
    Sora.from_pretrained().generate("a red circle bounces", seed=1).save("clip.mp4")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpoint import CheckpointError
    from .pipeline import Clip, Sora, TooLargeError

_HOMES = {"Sora": "pipeline", "Clip": "pipeline", "TooLargeError": "pipeline", "CheckpointError": "checkpoint"}

__all__ = ["CheckpointError", "Clip", "Sora", "TooLargeError"]


def __getattr__(name: str) -> object:
    # lazily: the sizes in `presets` are also read where video and checkpoint libraries are not installed
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
