"""Shapes to measure at, by name: clips in public models (sizes from `sora_model.presets`), and small ones."""

from __future__ import annotations

import dataclasses
import math

from sora_model.presets import SHAPES as MODELS
from sora_model.presets import ModelShape

Grid = tuple[int, int, int]
ROWS = ("clip", "frame", "token")
LENGTHS = (1, 2, 4, 8, 16)  # latent frames of clips that differ in nothing else: what time and memory grow with


@dataclasses.dataclass(frozen=True)
class Shape:
    """One batch of clips inside one transformer.

    grid   (T, H, W) in tokens; S = T·H·W
    rows   who shares a row of shift, scale and gate: "clip" `[B,1,D]`, "frame" `[B,T,D]`, "token" `[B,S,D]`
    """

    id: str
    model: ModelShape
    grid: Grid
    rows: str = "clip"
    batch: int = 1

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise ValueError(f"rows must be one of {', '.join(ROWS)}; got {self.rows!r}")

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def elements(self) -> int:
        """Of x `[B,S,D]`."""
        return self.batch * self.tokens * self.model.dim

    @property
    def modulation(self) -> Grid:
        """`[B, rows, D]` of one shift, scale or gate."""
        rows = {"clip": 1, "frame": self.grid[0], "token": self.tokens}[self.rows]
        return self.batch, rows, self.model.dim

    def describe(self) -> dict[str, object]:
        """For the record: what the numbers behind the name were."""
        model = dataclasses.asdict(self.model)
        del model["clips"], model["layers"]
        own = dict(batch=self.batch, grid=self.grid, tokens=self.tokens, rows=self.rows)
        return model | own


def _clip(id: str, model: str, clip: str, rows: str | None = None) -> Shape:
    return Shape(id, MODELS[model], MODELS[model].clips[clip], rows or MODELS[model].rows)


_WAN = MODELS["wan2.1-1.3b"]
_TOY = dataclasses.replace(_WAN, dim=192, heads=6, head_width=32, ffn_dim=512, rope=(6, 5, 5), text=16)
_SMALL = dataclasses.replace(_WAN, heads=4, head_width=64, dim=256)
_ODD = dataclasses.replace(MODELS["ltx-2b"], dim=1155, heads=11, head_width=105, table=False)

SHAPES = {
    shape.id: shape
    for shape in (
        _clip("wan1.3b-480p", "wan2.1-1.3b", "480x832x81"),
        _clip("wan1.3b-frames", "wan2.1-1.3b", "480x832x81", rows="frame"),  # a timestep per frame
        *(Shape(f"wan1.3b-length-{n}", _WAN, (n, 30, 52)) for n in LENGTHS),  # of 480p, in latent frames
        _clip("wan1.3b-720p", "wan2.1-1.3b", "720x1280x81"),
        _clip("wan14b-480p", "wan2.1-14b", "480x832x81"),
        _clip("wan14b-720p", "wan2.1-14b", "720x1280x81"),
        _clip("wan2.2-5b", "wan2.2-5b", "704x1280x121"),
        _clip("hunyuan-720p", "hunyuan-13b", "720x1280x129"),
        Shape("hunyuan-sta", MODELS["hunyuan-13b"], (30, 48, 80)),  # 768x1280x117, which arXiv 2502.04507 measured
        _clip("hunyuan1.5-480p", "hunyuan1.5-8b", "480x848x121"),
        _clip("hunyuan1.5-720p", "hunyuan1.5-8b", "720x1280x121"),
        _clip("opensora2-192p", "opensora2-11b", "192x336x129"),
        _clip("opensora2-576p", "opensora2-11b", "576x1024x129"),
        _clip("cogvideox-2b", "cogvideox-2b", "480x720x49"),
        _clip("cogvideox-5b", "cogvideox-5b", "480x720x49"),
        _clip("mochi-480p", "mochi-10b", "480x848x163"),
        _clip("ltx-2b", "ltx-2b", "512x768x121"),
        _clip("ltx2-19b", "ltx2-19b", "1024x1536x121"),
        _clip("latte-xl", "latte-xl", "256x256x16"),
        _clip("h3-768p", "minimax-h3", "768x1344x121"),
        Shape("cpu-8192x1536", _WAN, (8, 32, 32)),
        Shape("cpu-frames", _WAN, (8, 16, 16), rows="frame"),
        Shape("cpu-tokens", _WAN, (8, 16, 16), rows="token"),
        Shape("cpu-attention", _SMALL, (12, 24, 24)),
        *(Shape(f"cpu-length-{n}", _SMALL, (n, 16, 16)) for n in LENGTHS),
        Shape("cpu-rms", _ODD, (8, 16, 16)),
        Shape("toy", _TOY, (5, 4, 4), batch=2),
        Shape("tiny", dataclasses.replace(_TOY, dim=64, heads=2), (1, 2, 2)),  # no work: the time is that of the call
    )
}

# what runs when no shape is named, most important first: a run may end early when its time is up
DEFAULT = {
    "cuda": (
        "wan1.3b-480p", "wan14b-720p", "wan2.2-5b", "wan1.3b-frames", "hunyuan-720p", "ltx2-19b", "latte-xl",
        "h3-768p", "cogvideox-5b", "ltx-2b",
    ),
    "cpu": ("cpu-8192x1536", "cpu-frames", "cpu-tokens", "cpu-rms", "toy", "tiny"),
}  # fmt: skip
CPU_ATTENTION = ("cpu-length-8", "toy", "tiny")  # instead: of eight thousand tokens eager alone takes a minute
