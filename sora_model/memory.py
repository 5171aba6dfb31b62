"""What a transformer remembers of a clip that it makes frame after frame: keys and values, in constant memory.

    memory = Memory(window=16, sink=1)
    for chunk in chunks:
        v = dit(x, times, text, memory=memory)                     # as often as the sampler asks
        dit(chunk, zeros, text, memory=memory, remember=True)      # once it is clean

New frames see themselves and, of those before, the last `window` and the first `sink`. Keys carry the rotation of their
frame's place in the clip, and only differences of places count; the sink's are turned anew for every chunk, to lie
just before the window: no difference ever exceeds what a clip of window and sink has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sora_kernels import qk_norm_rope

from . import checks
from .attention import Grid
from .context import Context


@dataclasses.dataclass
class Memory:
    """Of a stream: begins empty, and belongs to one model and one clip.

    window, sink  frames; `frames` is how many have been remembered so far
    """

    window: int
    sink: int = 0
    frames: int = dataclasses.field(default=0, init=False)
    _layers: list[_Layer] = dataclasses.field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        checks.whole("window", self.window, 1, 2**20)
        checks.whole("sink", self.sink, 0, 2**20)

    def layer(self, index: int) -> _Layer:
        while len(self._layers) <= index:
            self._layers.append(_Layer())
        return self._layers[index]

    @property
    def recent(self) -> int:
        """How many frames after the sink's are held."""
        return min(self.window, max(0, self.frames - self.sink))


@dataclasses.dataclass(frozen=True)
class Past(Context):
    """A memory as one layer sees it, and whether what it computes now is to be remembered."""

    memory: Memory
    layer: _Layer
    remember: bool

    def joined(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, norms: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Grid]:
        """Of new frames: q; k and v behind those of what they see; the grid of both."""
        memory, layer = self.memory, self.layer
        size = grid[1:]

        def turned(q: Tensor, k: Tensor, place: int, **weights: Tensor) -> tuple[Tensor, Tensor]:
            own = (k.shape[1] // math.prod(size), *size)
            return qk_norm_rope(q, k, grid=own, origin=(place, 0, 0), **norms | weights)

        raw = k
        q, k = turned(q, k, memory.frames)
        keys, values = [layer.keys, k], [layer.values, v]
        if layer.keys is None:
            keys, values = [k], [v]
        elif layer.sink_keys.shape[1]:
            place = memory.frames - memory.recent - layer.sink_keys.shape[1] // math.prod(size)
            _, sink = turned(layer.sink_keys, layer.sink_keys, place, q_weight=norms["k_weight"])
            keys, values = [sink, *keys], [layer.sink_values, *values]
        if self.remember:
            layer.remember(memory, raw, k, v, math.prod(size))
        keys, values = torch.cat(keys, 1), torch.cat(values, 1)
        return q, keys, values, (keys.shape[1] // math.prod(size), *size)


@dataclasses.dataclass
class _Layer:
    """sink_keys as projected, keys turned; [B, S, H, E] each. None before the first frame."""

    sink_keys: Tensor | None = None
    sink_values: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None

    def remember(self, memory: Memory, raw: Tensor, keys: Tensor, values: Tensor, size: int) -> None:
        """New frames of `size` tokens each: keys as projected and turned, and values."""
        first = min(max(0, memory.sink - memory.frames), keys.shape[1] // size) * size  # tokens that become the sink's
        kept = memory.window * size
        if self.keys is None:
            self.sink_keys, self.sink_values = raw[:, :0], values[:, :0]
            self.keys, self.values = keys[:, :0], values[:, :0]
        self.sink_keys = torch.cat([self.sink_keys, raw[:, :first]], 1)
        self.sink_values = torch.cat([self.sink_values, values[:, :first]], 1)
        self.keys = torch.cat([self.keys, keys[:, first:]], 1)[:, -kept:]
        self.values = torch.cat([self.values, values[:, first:]], 1)[:, -kept:]
