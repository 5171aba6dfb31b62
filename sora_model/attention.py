"""The mode of a transformer's self-attention: which tokens see which, as a setting."""

from __future__ import annotations

import dataclasses
from typing import Any

Grid = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class AttentionMode:
    """Which tokens self-attention sees: every one by default; else as `spacetime_attention` says.

    window  (t, h, w) tokens around a query; stride (t, h, w), causal "frame" or chunks of n frames, sink frames:
            all in tokens, and of no effect on the weights, so that a model may run in another mode than it was
            trained in
    """

    window: Grid | None = None
    stride: Grid = (1, 1, 1)
    causal: str | int | None = None
    sink: int = 0

    def __post_init__(self) -> None:
        for name in ("window", "stride"):
            value = getattr(self, name)
            if value is None and name == "window":
                continue
            if not isinstance(value, tuple | list) or len(value) != 3 or not all(_is_count(v) for v in value):
                raise ValueError(f"attention: {name} must be three integers (t, h, w) of at least 1; got {value!r}")
            object.__setattr__(self, name, tuple(value))
        if self.causal not in (None, "frame") and not _is_count(self.causal):
            raise ValueError(f"attention: causal must be 'frame' or a number of frames; got {self.causal!r}")
        if self.sink != 0 and not _is_count(self.sink):
            raise ValueError(f"attention: sink must be a number of frames; got {self.sink!r}")
        if self.window is None and (self.stride != (1, 1, 1) or self.sink):
            raise ValueError("attention: stride and sink belong to a window; give window=TxHxW too")

    @classmethod
    def parse(cls, text: str) -> AttentionMode:
        """From "full", or settings such as "window=3x4x4,stride=1x2x2,sink=1" or "causal=frame"."""
        settings: dict[str, Any] = {}
        for part in [] if text.strip() == "full" else text.split(","):
            name, _, value = part.strip().partition("=")
            numbers = [int(n) if n.isdecimal() else None for n in value.split("x")]
            if name in ("window", "stride") and len(numbers) == 3 and None not in numbers:
                settings[name] = tuple(numbers)
            elif name in ("causal", "sink") and (numbers[0] is not None or value == "frame"):
                settings[name] = numbers[0] if len(numbers) == 1 and numbers[0] is not None else value
            else:
                raise ValueError(
                    "attention must be 'full', or settings such as 'window=3x4x4,stride=1x2x2,sink=1' or "
                    f"'causal=frame'; got {part.strip()!r}"
                )
        return cls(**settings)

    def keywords(self, grid: Grid | tuple[Grid, ...]) -> dict[str, Any]:
        """For `spacetime_attention`, of the grid or, for clips one after another, the grids: what is dense says nothing
        of one grid, and may take any implementation."""
        if isinstance(grid[0], tuple):
            return dataclasses.asdict(self) | {"grids": grid}
        return {} if self == AttentionMode() else dataclasses.asdict(self) | {"grid": grid}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 2**20
