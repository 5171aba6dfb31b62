"""A thin text-to-video system on `sora_kernels`: Wan-compatible transformer and VAE, flow matching, a procedural world.

    from sora_model import Sora
    Sora.from_pretrained().generate("a red circle bounces", seed=1).save("clip.mp4")

Sora, Clip                  a checkpoint ready to use, and what it makes
SoraDiT, DiTConfig          the diffusion transformer; `SoraDiT.from_wan` takes Wan's weights
CausalVAE, VAEConfig        the VAE; `CausalVAE.from_wan` takes Wan's weights
AttentionMode               what self-attention sees: everything, a window, earlier frames
CheckpointError, MediaError, TooLargeError    what can be wrong with weights, with a video file, with a request
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .extras import named

if TYPE_CHECKING:
    from .attention import AttentionMode
    from .checkpoint import CheckpointError
    from .dit import DiTConfig, SoraDiT
    from .machine import TooLargeError
    from .pipeline import Clip, Sora
    from .reader import MediaError
    from .vae import CausalVAE, VAEConfig

__all__ = [
    "AttentionMode", "CausalVAE", "CheckpointError", "Clip", "DiTConfig", "MediaError", "Sora", "SoraDiT",
    "TooLargeError", "VAEConfig",
]  # fmt: skip

_HOMES = {
    "AttentionMode": "attention", "CausalVAE": "vae", "CheckpointError": "checkpoint", "Clip": "pipeline",
    "DiTConfig": "dit", "MediaError": "reader", "Sora": "pipeline", "SoraDiT": "dit", "TooLargeError": "machine",
    "VAEConfig": "vae",
}  # fmt: skip


def __getattr__(name: str) -> object:
    # lazily: the sizes in `presets` are also read where video and checkpoint libraries are not installed
    if name in _HOMES:
        with named(f"sora_model.{name}"):
            return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
