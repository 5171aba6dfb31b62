"""A VAE's frames over several ranks: tiles, or bands of rows that fetch the few rows beside them.

    with torch.no_grad(), parallel.rows_over(vae, mesh["clips"]):
        video = vae.decode(latents)        # the same latents on every rank, and the whole clip

Tiles have their borders from the start and send nothing until one gather at the end; the layers at the size of the
latents run on every rank. A band stays one through all layers, and rows are exchanged before each convolution; computed
twice is no more than those. Time is not divided: it passes chunk by chunk.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sora_kernels import causal_conv3d, upsample_conv3d

from . import tiling
from .exchange import Gather, Range, beside, cut
from .ranks import check_within, squares
from .stream import Pass
from .tiling import ONE, Span

Item = TypeVar("Item")


@contextmanager
def tiles_over(vae: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
    """Inside the block `vae`, a `CausalVAE`, hands its tiles to the ranks of `mesh`, of one dimension; one gather.

    Every rank passes the same inputs and gets the whole, up to rounding what the VAE gives alone, in streams too. Tiles
    are as many as ranks, or more where a smaller `tile` is asked for. Gradients of tiled layers are those of the rank's
    tiles. Raises ValueError for a mesh that does not fit, and on every rank where two pass other inputs.
    """
    with _over("tiles_over", vae, mesh, Tiles):
        yield


@contextmanager
def rows_over(vae: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
    """Inside the block each rank of `mesh`, of one dimension, takes a band of the rows of `vae`'s frames.

    Every rank passes the same inputs and gets the whole, up to rounding what the VAE gives alone: of `encode`, `decode`
    and their streams. Bands are whole rows of latents, as equal as can be. A convolution that sees beyond its band
    fetches that from the ranks of the bands beside it, attention in the middle the keys and values of all; a stream
    remembers what it has fetched. One gather at the end of each call.

    For inference: gradients are refused. So is a `tile` smaller than the frame, as a band is taken whole. Raises
    ValueError, on every rank, also for fewer rows of latents than ranks and where two ranks pass other inputs.
    """
    with _over("rows_over", vae, mesh, Rows):
        yield


@contextmanager
def _over(name: str, vae: nn.Module, mesh: DeviceMesh, kind: type[Sharers]) -> Iterator[None]:
    if not hasattr(vae, "ranks"):
        raise TypeError(f"{name}: vae must be a CausalVAE; got a {type(vae).__name__}")
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        got = f"{mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        raise ValueError(f"{name}: mesh must be a DeviceMesh of one dimension; got {got}")
    check_within(mesh)
    before, vae.ranks = vae.ranks, kind(mesh.get_group(), mesh.get_local_rank(), mesh.size(), mesh.device_type)
    try:
        yield
    finally:
        vae.ranks = before


def reach(kernel: int, up: int = 1, down: int = 1) -> Range:
    """Rows above a band and below it that a convolution sees, of the band repeated `up` times or in steps of `down`."""
    rows = kernel * up * down
    band = Span(rows, 2 * rows, 3 * rows)
    seen = band.given(up, down).seen(kernel, up, down)
    return band.start - seen.start, seen.stop - band.stop


@dataclass(frozen=True)
class Sharers:
    """The ranks that share the frames of a VAE."""

    group: Any
    rank: int
    size: int
    device: str
    parts: ClassVar[str]

    def __str__(self) -> str:
        return f"{self.size} ranks in {self.parts}" if self.size > 1 else "one process"

    def divide(self, vae: Any, x: Tensor, tile: tuple[int, int] | None, size: Range, streaming: bool) -> Pass:
        """A pass for x, whose frames have `size` in latents. ValueError for what is not divided so."""
        raise NotImplementedError

    def begin(self, kind: str, x: Tensor, begin: Callable[[], Pass]) -> Pass:
        """begin(). Raises ValueError, on every rank, where it does on one, and where two have another x."""
        with self._told(kind):
            run = begin()
        where = f"in tiles of {run.tile or 'the whole'}, {'the first' if run.starts else 'the next'} of a clip"
        self._agree(kind, f"{list(x.shape)} {x.dtype}, of squares that sum to {squares(x)}, {where}")
        return run

    def pieces(self, kind: str, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        """`pieces`. Raises ValueError, on every rank, where they do on one, and where two have another number."""
        with self._told(kind):
            yield from pieces
        self._agree(kind, "at their end")

    @contextmanager
    def _told(self, kind: str) -> Iterator[None]:
        """What this rank refuses inside, the others hear: they do not wait for it."""
        try:
            yield
        except ValueError as error:
            self._agree(kind, f"refused ({error})")
            raise

    def _agree(self, kind: str, told: str) -> None:
        """Raises ValueError, on every rank, where two have something else to tell of what they were given."""
        told = f"the {'frames' if kind == 'encode' else 'latents'} to {kind} are {told}"
        form = zlib.crc32(told.encode())
        most = torch.tensor([form, -form], device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        if most[0] == -most[1]:
            return
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, told, self.group)
        other = next(rank for rank, theirs in enumerate(everyone) if theirs != everyone[0])
        raise ValueError(
            f"all ranks must pass the same inputs: {everyone[0]} on the first; {everyone[other]} on rank {other} of "
            f"the {self.size} that share the {self.parts}"
        )


@dataclass(frozen=True)
class Tiles(Sharers):
    """The ranks that share the tiles of a frame."""

    parts = "tiles"

    def divide(self, vae: Any, x: Tensor, tile: tuple[int, int] | None, size: Range, streaming: bool) -> Pass:
        return Pass(vae.impl, tiling.shared(tile, size, self.size), streaming, ranks=self)

    def each(self, compute: Callable[[Item], Tensor], items: Sequence[Item], areas: Sequence[Range]) -> list[Tensor]:
        """compute(item), [B, C, T, h, w] with (h, w) of `areas`, of all items: each rank computes a share of them."""
        owned = [range(rank, len(items), self.size) for rank in range(self.size)]
        mine = [compute(items[i]) for i in owned[self.rank] or [0]]  # one without an item must know B, C and T too
        shapes = [(*mine[0].shape[:3], *area) for area in areas]
        sizes = [math.prod(shape) for shape in shapes]
        flat = torch.cat([tile.reshape(-1) for tile in mine]) if owned[self.rank] else mine[0].new_empty(0)
        flat = Gather.apply(flat, 0, [sum(sizes[i] for i in own) for own in owned], self.rank, self.group)
        order = [i for own in owned for i in own]
        parts = dict(zip(order, flat.split([sizes[i] for i in order]), strict=True))
        return [parts[i].view(shape) for i, shape in enumerate(shapes)]


@dataclass(frozen=True)
class Rows(Sharers):
    """The ranks that share the rows of a frame."""

    parts = "rows"

    def divide(self, vae: Any, x: Tensor, tile: tuple[int, int] | None, size: Range, streaming: bool) -> Pass:
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in vae.parameters())):
            raise ValueError(
                "rows_over is for inference, as no gradients are sent between ranks; got a call that wants some: put "
                "it into torch.no_grad(), or take parallel.tiles_over"
            )
        if tile is not None:
            raise ValueError(
                f"tile must be None inside of parallel.rows_over, where each rank takes its rows whole; got tiles of "
                f"{tile} latents: take parallel.tiles_over"
            )
        if size[0] < self.size:
            raise ValueError(
                f"rows_over: {self.size} ranks need {self.size} rows of latents or more; the frames have {size[0]}: "
                f"take {size[0]} or fewer ranks, or parallel.tiles_over"
            )
        rows = [stop - start for start, stop in cut(0, size[0], self.size)]
        return Band(vae.impl, None, streaming, ranks=self, rows=rows)


@dataclass
class Band(Pass):
    """This rank's rows of the frames on their way through the layers; `rows`: of latents, how many each rank has."""

    rows: Sequence[int] = ()

    def part(self, x: Tensor) -> Tensor:
        scale, rank = x.shape[3] // sum(self.rows), self.ranks.rank
        return x.narrow(3, scale * sum(self.rows[:rank]), scale * self.rows[rank])

    def whole(self, x: Tensor) -> Tensor:
        return self._gather(x, 3)

    def conv(self, x: Tensor, conv: nn.Conv3d, function: Callable = causal_conv3d, **kwargs) -> Tensor:
        """As of whole frames: with the rows beside the band that `conv` sees, whose own results are cut off again."""
        rows, factor = x.shape[3], kwargs.get("factor", ONE)[1]
        up, down = (factor, 1) if function is upsample_conv3d else (1, factor)
        above, below = reach(conv.kernel_size[1], up, down)
        if above == below == 0:
            return super().conv(x, conv, function, **kwargs)
        x, above, below = beside(x, above, below, self.ranks.rank, self.ranks.size, self.ranks.group)
        if kwargs.get("residual") is not None:
            kwargs["residual"] = F.pad(kwargs["residual"], (0, 0, above, below))
        return super().conv(x, conv, function, **kwargs).narrow(3, above * up // down, rows * up // down)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attention(q, *self._gather(torch.cat((k, v)), 1).chunk(2))

    def _gather(self, x: Tensor, axis: int) -> Tensor:
        """x of all ranks; `axis` is rows, or pixels row by row."""
        scale, ranks = x.shape[axis] // self.rows[self.ranks.rank], self.ranks
        return Gather.apply(x, axis, [scale * n for n in self.rows], ranks.rank, ranks.group)
