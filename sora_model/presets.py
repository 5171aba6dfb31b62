"""Sizes by name: those a SoraDiT is built with, and those of public video models, for benchmarks."""

from __future__ import annotations

import dataclasses
import math

from .dit import DiTConfig, Grid

DIT: dict[str, DiTConfig] = {
    "toy": DiTConfig(
        dim=192, heads=6, layers=6, ffn_dim=768, in_channels=12, out_channels=12, text_dim=128, freq_dim=128
    ),
    "wan2.1-1.3b": DiTConfig(dim=1536, heads=12, layers=30, ffn_dim=8960),
    "wan2.1-14b": DiTConfig(dim=5120, heads=40, layers=40, ffn_dim=13824),
    "wan2.2-5b": DiTConfig(dim=3072, heads=24, layers=30, ffn_dim=14336, in_channels=48, out_channels=48),
}


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes of a public video transformer that its kernels see.

    heads        query heads of `head_width`; together they may be wider than `dim`
    ffn_dim      width inside the feed-forward; of each of its two halves where it is gated
    text         tokens of text, part of self-attention if `joint`, else attended to across
    patch        latent cells a token covers in (t, h, w)
    norm         "layer" or "rms", before the modulation
    qk_norm      "rms", "layer" or None, over each "head" or the whole "width"
    rope         rotary pairs of a head for (t, h, w); None: none, or none that `qk_norm_rope` computes
    rows         what has a modulation row of its own, "clip" or "token"; `table`: blocks add a learnt one
    clips        by height x width x frames, the grid of tokens after patching
    """

    layers: int
    dim: int
    heads: int
    head_width: int
    ffn_dim: int
    in_channels: int
    text: int
    clips: dict[str, Grid]
    patch: Grid = (1, 2, 2)
    norm: str = "layer"
    qk_norm: str | None = "rms"
    across: str = "head"
    rope: Grid | None = None
    theta: float = 1e4
    rows: str = "clip"
    table: bool = False
    joint: bool = True

    def tokens(self, clip: str) -> int:
        """How many tokens of video the clip has."""
        if clip not in self.clips:
            raise ValueError(f"clip must be one of {', '.join(self.clips)}; got {clip!r}")
        return math.prod(self.clips[clip])


def _wan(name: str, clips: dict[str, Grid], rows: str = "clip") -> ModelShape:
    config = DIT[name]
    width = config.dim // config.heads
    return ModelShape(
        config.layers, config.dim, config.heads, width, config.ffn_dim, config.in_channels, 512, clips,
        across="width", rope=(22, 21, 21), rows=rows, table=True, joint=False,
    )  # fmt: skip


_WAN = {"480x832x81": (21, 30, 52), "720x1280x81": (21, 45, 80)}
_HUNYUAN = {"rope": (8, 28, 28), "theta": 256.0}
_COGVIDEOX = {"clips": {"480x720x49": (13, 30, 45)}, "qk_norm": "layer"}
_LTX = {"patch": (1, 1, 1), "norm": "rms", "across": "width", "table": True, "joint": False}

# layers, dim, heads, head width, ffn_dim, in_channels, text
SHAPES: dict[str, ModelShape] = {
    "wan2.1-1.3b": _wan("wan2.1-1.3b", _WAN),
    "wan2.1-14b": _wan("wan2.1-14b", _WAN),
    "wan2.2-5b": _wan("wan2.2-5b", {"704x1280x121": (31, 22, 40)}, rows="token"),
    "hunyuan-13b": ModelShape(60, 3072, 24, 128, 12288, 16, 256, {"720x1280x129": (33, 45, 80)}, **_HUNYUAN),
    "hunyuan1.5-8b": ModelShape(
        54, 2048, 16, 128, 8192, 65, 1000, {"480x848x121": (31, 30, 53), "720x1280x121": (31, 45, 80)},
        patch=(1, 1, 1), **_HUNYUAN,
    ),
    "opensora2-11b": ModelShape(
        57, 3072, 24, 128, 12288, 16, 512, {"192x336x129": (33, 12, 21), "576x1024x129": (33, 36, 64)},
        rope=(8, 28, 28),
    ),
    "cogvideox-2b": ModelShape(30, 1920, 30, 64, 7680, 16, 226, **_COGVIDEOX),
    "cogvideox-5b": ModelShape(42, 3072, 48, 64, 12288, 16, 226, **_COGVIDEOX, rope=(8, 12, 12)),
    "mochi-10b": ModelShape(48, 3072, 24, 128, 8192, 12, 256, {"480x848x163": (28, 30, 53)}, norm="rms"),
    "ltx-2b": ModelShape(28, 2048, 32, 64, 8192, 128, 128, {"512x768x121": (16, 16, 24)}, **_LTX),
    "ltx2-19b": ModelShape(48, 4096, 32, 128, 16384, 128, 1024, {"1024x1536x121": (16, 32, 48)}, **_LTX),
    "latte-xl": ModelShape(
        28, 1152, 16, 72, 4608, 4, 120, {"256x256x16": (16, 16, 16)}, qk_norm=None, table=True, joint=False
    ),
    "minimax-h3": ModelShape(
        50, 5376, 56, 128, 14336, 24, 512, {"768x1344x121": (31, 24, 42)},
        norm="rms", rope=(16, 16, 16), rows="token",
    ),
}  # fmt: skip
