"""Shapes to measure at, by name: those of public models (latent grid after patching), and small ones for a
CPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Shape:
    """One clip inside one transformer.

    grid   (T, H, W) in tokens; S = T·H·W
    rows   who shares a row of shift, scale and gate: "clip" `[B,1,D]`, "frame" `[B,T,D]`, "token" `[B,S,D]`
    table  the model adds a learned `[D]` table to each modulation
    text   tokens of text that join the video's in attention
    """

    id: str
    model: str
    grid: tuple[int, int, int]
    dim: int
    heads: int
    batch: int = 1
    rows: str = "clip"
    norm: str = "layer"
    table: bool = False
    text: int = 0

    @property
    def tokens(self) -> int:
        T, H, W = self.grid
        return T * H * W

    @property
    def elements(self) -> int:
        return self.batch * self.tokens * self.dim

    @property
    def modulation(self) -> tuple[int, int, int]:
        """Shape of one modulation row tensor."""
        return self.batch, {"clip": 1, "frame": self.grid[0], "token": self.tokens}[self.rows], self.dim

    def describe(self) -> dict[str, object]:
        return asdict(self) | {"tokens": self.tokens}


_WAN = dict(grid=(21, 30, 52), table=True)
_ALL = (
    Shape("wan1.3b-480p", "Wan2.1 1.3B, 81 frames 480x832", dim=1536, heads=12, **_WAN),
    Shape("wan1.3b-frames", "the same, a timestep per frame", dim=1536, heads=12, rows="frame", **_WAN),
    Shape("wan14b-480p", "Wan2.1 14B, 81 frames 480x832", dim=5120, heads=40, **_WAN),
    Shape("wan14b-720p", "Wan2.1 14B, 81 frames 720x1280", (21, 45, 80), 5120, 40, table=True),
    Shape("wan2.2-5b", "Wan2.2 TI2V 5B, 121 frames 704x1280, a timestep per token", (31, 22, 40), 3072, 24,
          rows="token", table=True),
    Shape("hunyuan-720p", "HunyuanVideo 13B, 129 frames 720x1280", (33, 45, 80), 3072, 24, text=256),
    Shape("hunyuan1.5-720p", "HunyuanVideo 1.5 8B, 121 frames 720x1280", (31, 45, 80), 2048, 16, text=256),
    Shape("opensora2-768p", "Open-Sora 2 11B, 129 frames 576x1024", (33, 36, 64), 3072, 24, text=512),
    Shape("cogvideox-2b", "CogVideoX 2B, 49 frames 480x720", (13, 30, 45), 1920, 30, text=226),
    Shape("cogvideox-5b", "CogVideoX 5B, 49 frames 480x720", (13, 30, 45), 3072, 48, text=226),
    Shape("mochi", "Mochi 1 10B, 163 frames 480x848", (28, 30, 53), 3072, 24, norm="rms", text=256),
    Shape("ltx-2b", "LTX-Video 2B, 121 frames 512x768", (16, 16, 24), 2048, 32, norm="rms", table=True),
    Shape("ltx2-19b", "LTX-2 19B, 121 frames 1024x1536", (16, 32, 48), 4096, 32, norm="rms", table=True),
    Shape("latte-xl", "Latte XL/2, 16 frames 256x256, heads of 72", (16, 16, 16), 1152, 16),
    Shape("h3-31b", "MiniMax-H3 31B, 121 frames 768x1344", (31, 24, 42), 5376, 56, rows="token", norm="rms"),
    Shape("cpu-8192x1536", "a quarter of wan1.3b-480p", (8, 32, 32), 1536, 12, table=True),
    Shape("cpu-frames", "eight frames, a timestep each", (8, 16, 16), 1536, 12, rows="frame", table=True),
    Shape("cpu-tokens", "a timestep per token", (8, 16, 16), 1536, 12, rows="token", table=True),
    Shape("cpu-rms", "LTX's norm, an odd width", (8, 16, 16), 1155, 11, norm="rms"),
    Shape("toy", "a few frames 64x64", (5, 4, 4), 192, 6, batch=2, table=True),
)  # fmt: skip
SHAPES = {shape.id: shape for shape in _ALL}

# what runs when no shape is named, most important first: a run may end early when its time is up
DEFAULT = {
    "cuda": ("wan1.3b-480p", "wan14b-720p", "wan2.2-5b", "wan1.3b-frames", "hunyuan-720p", "ltx2-19b",
             "latte-xl", "h3-31b", "cogvideox-5b", "ltx-2b"),
    "cpu": ("cpu-8192x1536", "cpu-frames", "cpu-tokens", "cpu-rms", "toy"),
}  # fmt: skip
