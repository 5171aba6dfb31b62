"""What a causal network keeps of a clip from chunk to chunk: the caches of its convolutions, and nothing else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from sora_kernels import causal_conv3d, norm_silu, spacetime_attention

if TYPE_CHECKING:
    from .divided import Sharers

LAYOUT = torch.channels_last_3d  # the norms and convolutions of every implementation are fastest in it
EPS = 1e-24  # Wan divides by max(‖x‖, 1e-12): the smallest that keeps a pixel of zeros finite, and no more


@dataclass(frozen=True)
class VAECache:
    """What the layers remember of the frames so far: opaque, made by a chunk, handed to the next chunk of that clip.

    It fits chunks of the direction (`kind`), the model, the (batch, height, width), the tiling and the ranks (`by`) it
    was made with. A pytree of tensors: it passes through `torch.compile` and CUDA graphs.
    """

    kind: str
    model: Any
    size: tuple[int, int, int]
    tile: tuple[int, int] | None
    by: str
    tensors: tuple[Tensor, ...]

    def check(self, kind: str, model: Any, x: Tensor, tile: tuple[int, int] | None, by: str) -> None:
        """ValueError unless a chunk x may follow."""
        if self.kind != kind:
            raise ValueError(
                f"cache must be the VAECache that {kind}_chunk returned for the chunk before; got that of "
                f"{self.kind}_chunk"
            )
        if self.model != model:
            raise ValueError(f"cache is of another VAE, {self.model}; this one is {model}")
        if self.size != (size := (x.shape[0], *x.shape[3:])):
            raise ValueError(
                f"the chunk before had the batch, height and width {list(self.size)}, this one has {list(size)}; "
                "a clip keeps its size: begin another without a cache"
            )
        if self.tile != tile:
            before, now = (f"tiles of {t} latents" if t else "whole frames" for t in (self.tile, tile))
            raise ValueError(f"tile: the chunk before was coded in {before}, this one in {now}; a clip keeps its tiles")
        if self.by != by:
            raise ValueError(f"the chunk before was coded by {self.by}, this one by {by}; a clip goes on as it began")
        past = self.tensors[0]
        if (past.dtype, past.device) != (x.dtype, x.device):
            raise ValueError(
                f"the chunk before was {past.dtype} on {past.device}, this one is {x.dtype} on {x.device}; a clip "
                "keeps both: begin another without a cache"
            )


def _unflatten(tensors: Iterable[Tensor], context: tuple) -> VAECache:
    return VAECache(*context, tuple(tensors))


_pytree.register_pytree_node(
    VAECache,
    lambda cache: (list(cache.tensors), (cache.kind, cache.model, cache.size, cache.tile, cache.by)),
    _unflatten,
)


@dataclass
class Pass:
    """One way of a chunk through the layers: the implementation to use, and each convolution's past, in order.

    tile   the largest (height, width), in latents, at which to take the layers that see a few pixels only
    ranks  who shares the frames, inside of `parallel.tiles_over` and `parallel.rows_over`
    """

    impl: str
    tile: tuple[int, int] | None = None
    streaming: bool = False
    past: deque[Tensor] | None = None  # None: the clip begins with this chunk
    future: list[Tensor] = field(default_factory=list)
    ranks: Sharers | None = None

    @property
    def starts(self) -> bool:
        return self.past is None

    @property
    def by(self) -> str:
        return str(self.ranks or "one process")

    def part(self, x: Tensor) -> Tensor:
        """Of the whole frames x, what this pass takes through the layers."""
        return x

    def whole(self, x: Tensor) -> Tensor:
        """The whole frames again."""
        return x

    def conv(self, x: Tensor, conv: nn.Conv3d, function: Callable = causal_conv3d, **kwargs) -> Tensor:
        """`function` with the parameters of `conv`, and with its cache where it has a past to remember."""
        frames = conv.kernel_size[0] - 1
        if not self.streaming or frames == 0:
            return function(x, conv.weight, conv.bias, impl=self.impl, **kwargs)
        if self.starts:  # nothing but zeros before x: without a cache they cost nothing
            y, cache = function(x, conv.weight, conv.bias, impl=self.impl, **kwargs), x[:, :, -frames:]
            cache = F.pad(cache, (0, 0, 0, 0, frames - cache.shape[2], 0)).contiguous(memory_format=LAYOUT)
        else:
            y, cache = function(x, conv.weight, conv.bias, cache=self.past.popleft(), impl=self.impl, **kwargs)
        self.future.append(cache)
        return y

    def norm_silu(self, x: Tensor, weight: Tensor) -> Tensor:
        return norm_silu(x, weight, eps=EPS, impl=self.impl)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Among the pixels of each frame, [BT, HW, 1, C]."""
        return spacetime_attention(q, k, v, impl=self.impl)


def joined(*parts: Tensor) -> Tensor:
    """The frames of all parts in turn, channels last as they are: beside a part without frames, `cat` forgets that.

    Such a part is left out, unless what it was made of wants gradients, even if they are zeros.
    """
    parts = [part for part in parts if part.shape[2] or part.requires_grad] or parts[:1]
    return torch.cat(parts, 2).contiguous(memory_format=LAYOUT) if len(parts) > 1 else parts[0]


def regroup(pieces: Iterable[Tensor], first: int, step: int) -> Iterator[Tensor]:
    """Cuts a sequence of pieces into `first`, then `step` frames at a time; the last may be shorter."""
    held, wanted = [], first
    for piece in pieces:
        if held and held[0].shape[:2] + held[0].shape[3:] != piece.shape[:2] + piece.shape[3:]:
            raise ValueError(
                f"the pieces of a clip must differ in their frames only; got {list(piece.shape)} after "
                f"{list(held[0].shape)}"
            )
        held.append(piece)
        while sum(p.shape[2] for p in held) >= wanted:
            whole = torch.cat(held, 2) if len(held) > 1 else held[0]
            yield whole[:, :, :wanted]
            held, wanted = [whole[:, :, wanted:]], step
    if sum(p.shape[2] for p in held):
        yield torch.cat(held, 2)
    elif not held:
        raise ValueError("a stream must have at least one frame; got none")
