"""A transformer over several devices, each with a share of the clips and their tokens: ring, Ulysses, both, and halos.

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("ring", "ulysses"))
    with parallel.over(dit, mesh):
        loss = loss_of(dit(latents, times, text))      # the same inputs on every rank, and the whole velocity
    loss.backward()                                    # of the same loss on every rank
    parallel.sum_gradients(dit.parameters(), mesh)     # of a rank's tokens before, of all afterwards

Self-attention is the one step in which tokens meet. Ulysses exchanges tokens for heads: of the tokens of its group a
rank has all, in some of the heads. A ring passes keys and values round, the next block on its way while this one is
worked off, and joins what the blocks give in fp32. Windows and causal clips are cut between frames, and a rank fetches
the frames that its own see. Launching, meshes, sharded weights and checkpoints are PyTorch's own.

Sources: ring attention, arXiv 2310.01889; Ulysses, arXiv 2309.14509; both, arXiv 2405.07719.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sora_kernels import qk_norm_rope, spacetime_attention
from sora_kernels.attention import reference as rules

from . import alike, experts, flow
from .attention import AttentionMode, Grid
from .context import Context
from .divided import rows_over as rows_over
from .divided import tiles_over
from .exchange import Gather, Range, Ring, Swap, cut, fetch
from .ranks import Ranks, check_within, squares, told_of_loss

AXES = ("clips", "ring", "ulysses")


@contextmanager
def over(dit: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
    """Inside the block each rank of `mesh` computes its share of the tokens of `dit`, a `SoraDiT`.

    mesh  of some of the dimensions "clips", "ring" and "ulysses"; of a larger mesh, `mesh["ring", "ulysses"]`, say

    Every rank passes the same inputs and gets the whole velocity, that of one process within rounding. "clips" divides
    the batch, under guidance the prompt's half and the other; tokens need not be divisible by ranks, heads must be by
    those of "ulysses"; windows and causal attention are divided by frames along the ring. A gradient is then that of
    the rank's clips and tokens: see `sum_gradients`. A memory of frames is refused.

    Raises ValueError for a mesh or degree that does not fit, and on every rank where ranks hold other weights, but for
    rounding, or pass other inputs.
    """
    if not hasattr(dit, "parallel"):
        raise TypeError(f"over: dit must be a SoraDiT; got a {type(dit).__name__}; diffusers has enable_parallelism()")
    if dit.parallel is not None:
        raise ValueError("over: the transformer is divided already; leave that block first")
    dit.parallel = Parallel(mesh, dit)
    try:
        yield
    finally:
        dit.parallel = None


@contextmanager
def sampling(sora: Any, *, guidance: float | tuple[float, float] | None = None) -> Iterator[None]:
    """All processes of the run sample one clip inside the block: `over` and `tiles_over` a mesh of all of them.

    With guidance, by default the checkpoint's, half of an even number takes the prompt and half takes none; of each
    half as many as divide the heads in the largest number go to Ulysses, the others to the ring. Where each process
    holds one of two experts, those of an expert are divided so. In one process nothing happens. Raises ValueError, on
    every rank, where two were asked for something else, and `ranks.RankError` where a process is lost.
    """
    size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if size == 1:
        yield
        return
    with told_of_loss("while the clip was made", "nothing of it is kept: start all again"):
        device, apart = sora.device.type, experts.check_halves(sora.expert)
        halves = 2 if apart else 1
        guided = [number != 1 for number in flow.pair(sora.defaults.guidance if guidance is None else guidance)]
        Ranks().agree({"guidance": guidance, "boundary": sora.boundary} | alike.held(sora))
        meshes = {}
        for either in sorted(set(guided)):
            share = size // halves
            clips = 2 if either and share % 2 == 0 else 1
            ulysses = math.gcd(share // clips, sora.dit.config.heads)
            sizes = halves, clips, share // clips // ulysses, ulysses
            meshes[either] = init_device_mesh(device, sizes, mesh_dim_names=("experts", *AXES))
        with ExitStack() as stack:
            for name, dit, either in zip(experts.NAMES, (sora.dit, sora.second), guided, strict=True):
                if dit is not None and sora.expert in (None, name) and size > halves:
                    stack.enter_context(over(dit, meshes[either][AXES]))
            stack.enter_context(tiles_over(sora.vae, init_device_mesh(device, (size,))))
            sora.together = True
            stack.callback(setattr, sora, "together", False)
            if apart:
                sora.experts = experts.Experts(meshes[guided[0]].get_group("experts"), experts.NAMES.index(sora.expert))
                stack.callback(setattr, sora, "experts", None)
            yield


def sum_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Adds up the gradients of all ranks of `mesh`, in place: what one process would have computed.

    Of FSDP's sharded parameters too, where its mesh is another dimension. Where FSDP shards over these ranks it has
    averaged their gradients already: multiply the loss by `mesh.size()` instead.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    gradients = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    for group, _, size in _groups(mesh).values():
        for dtype in dict.fromkeys(g.dtype for g in gradients) if size > 1 else ():
            same = [g for g in gradients if g.dtype == dtype]
            flat = torch.cat([g.flatten() for g in same])
            dist.all_reduce(flat, group=group)
            for g, total in zip(same, flat.split([g.numel() for g in same]), strict=True):
                g.copy_(total.view(g.shape))


def _groups(mesh: DeviceMesh) -> dict[str, tuple[Any, int, int]]:
    """(process group, this process' rank in it, size) of each of AXES; one that the mesh lacks has one rank."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh of torch.distributed; got {type(mesh).__name__}")
    names = mesh.mesh_dim_names or ()
    if not names or set(names) - set(AXES):
        raise ValueError(
            f"mesh must have some of the dimensions {', '.join(AXES)}; got {names or 'none with a name'}; "
            "of a larger mesh pass mesh['ring', 'ulysses'], say"
        )
    check_within(mesh)
    alone = None, 0, 1
    sizes = {name: mesh.size(i) for i, name in enumerate(names)}
    return {
        name: (mesh.get_group(name), mesh.get_local_rank(name), sizes[name]) if sizes.get(name, 1) > 1 else alone
        for name in AXES
    }


class Parallel:
    """The ranks that share a transformer's tokens, as it knows them."""

    def __init__(self, mesh: DeviceMesh, dit: nn.Module) -> None:
        self.groups, self.heads, self._agreed = _groups(mesh), dit.config.heads, set()
        _, _, ulysses = self.groups["ulysses"]
        if self.heads % ulysses:
            fit = ", ".join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)
            raise ValueError(f"ulysses={ulysses} ranks must divide the {self.heads} heads; {fit} would")
        self._agree_on_weights(dit)

    def velocity(self, dit, latents, timesteps, text, text_lens, image, grid, mode, memory, impl: str) -> Tensor:
        """As `SoraDiT.forward`, whose checked arguments these are: each rank computes its share, and gets the whole."""
        if memory is not None:
            raise ValueError(
                "memory must be None inside of parallel.over: frames that are remembered are not divided; make the "
                "clip at once (long='once') or on one device"
            )
        inputs = {"latents": latents, "timesteps": timesteps, "text": text, "text_lens": text_lens, "image": image}
        self.agree(mode, inputs)
        share = self.share(grid, mode, latents.shape[0])
        latents, timesteps, text, text_lens, image = share.clips(latents, timesteps, text, text_lens, image)
        x = share.tokens(dit.embed_patches(share.latents(latents, dit.config.patch), impl))  # [B, own, D]
        time = share.rows(dit.embed_times(timesteps).to(x.dtype))                            # [B, N, D]
        x = dit.through_blocks(x, time, text, text_lens, image, grid, mode, impl, lambda layer: share)
        return share.join(dit.read_out(x, time, share.strip, impl), dit.config.patch)        # [B, C, T, H, W]

    def agree(self, mode: AttentionMode, inputs: Mapping[str, Tensor | None]) -> None:
        """Raises ValueError, on every rank, where two have another mode or other inputs.

        Ranks with other shapes would wait for each other: a number for the form of the inputs is compared at every
        call, their values where a rank has not had that form before.
        """
        given = {name: t for name, t in inputs.items() if t is not None}
        facts = {"the attention mode": str(mode)}
        facts |= {f"the shape of {name}": f"{list(t.shape)} {t.dtype}" for name, t in given.items()}
        form = zlib.crc32(repr(facts).encode())
        if not self._agree_already(form, next(iter(given.values())).device):
            self._compare(facts, given)
            self._agreed.add(form)

    def _agree_on_weights(self, dit: nn.Module) -> None:
        """Raises ValueError, on every rank, where two hold other weights, by the norm of those that FSDP leaves whole:
        ranks that step alike may drift apart by rounding, where NCCL adds in another order, other seeds do by more."""
        whole = [p.detach() for p in dit.parameters() if not (p.is_meta or hasattr(p, "placements") or p.itemsize < 2)]
        norms = [torch.linalg.vector_norm(p, dtype=torch.float64) for p in whole]
        (first, expected), *others = self._of_all(torch.stack(norms).norm().item() if norms else 0.0)
        for rank, norm in others:
            if not math.isclose(norm, expected, rel_tol=1e-6) and math.isfinite(norm + expected):
                raise ValueError(
                    "all ranks must hold the same weights (of one seed, or one checkpoint): their norm is "
                    f"{expected:.9g} on rank {first}, {norm:.9g} on rank {rank}"
                )

    def shares_of_pack(self, grids: Sequence[Grid], mode: AttentionMode) -> list[Share]:
        """This rank's share of each clip of a sequence of several: all are cut alike."""
        _, _, clips = self.groups["clips"]
        if clips > 1:
            raise ValueError(
                f"clips={clips} ranks cannot divide packed clips, which are one sequence: take clips=1, in "
                "parallel.sampling guidance=1, and ranks divide the tokens of each"
            )
        return [self.share(grid, mode, 1) for grid in grids]

    def share(self, grid: Grid, mode: AttentionMode, batch: int) -> Share:
        """This rank's share of `batch` clips of a grid of tokens."""
        (_, clip, clips), (_, ring, rings), (_, ulysses, parts) = self.groups.values()
        if batch < clips:
            raise ValueError(
                f"clips={clips} ranks need a clip each; the batch has {batch}: take clips={batch}, or give "
                "parallel.sampling the guidance of the clip"
            )
        frame = math.prod(grid[1:])
        unit, what = (1, "tokens") if _in(grid, mode) == AttentionMode() else (frame, "frames")
        units = math.prod(grid) // unit
        if units < rings:
            told = f"the clip has {units}: take ring={units}, or start fewer processes"
            raise ValueError(f"ring={rings} ranks need {rings} {what} or more; {told}")
        chunks = [(a * unit, b * unit) for a, b in cut(0, units, rings)]
        if (least := min(stop - start for start, stop in chunks)) < parts:
            fits = max(n for n in range(1, least + 1) if self.heads % n == 0)
            what = f"need {parts} tokens or more; the least of the {rings} parts of the ring has {least}"
            raise ValueError(f"ulysses={parts} ranks {what}: take ulysses={fits}, or start fewer processes")
        batches, within = cut(0, batch, clips), cut(*chunks[ring], parts)
        return Share(self, grid, tuple(batches), tuple(chunks), tuple(within), clip, ring, ulysses)

    def _agree_already(self, form: int, device: torch.device) -> bool:
        """Whether all ranks have this form, and have had it before: all get the same answer."""
        most = torch.tensor([form, -form, form not in self._agreed], device=device)
        for group, _, size in self.groups.values():
            if size > 1:
                dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        high, low, new = most.tolist()
        return high == -low and not new

    def _compare(self, facts: dict[str, Any], inputs: dict[str, Tensor]) -> None:
        """Raises ValueError, on every rank, where two have other facts or other values."""
        for name, t in inputs.items():
            facts[f"the values of {name}"] = squares(t)
        (first, expected), *others = self._of_all(facts)
        for rank, theirs in others:
            for name, value in expected.items():
                if theirs.get(name) != value and not (value != value):
                    raise ValueError(
                        f"all ranks must pass the same inputs (draw them with the same seed): {name} is {value} on "
                        f"rank {first}, {theirs.get(name)} on rank {rank}"
                    )

    def _of_all(self, own: Any) -> list[tuple[int, Any]]:
        """Each rank and what it has, in order."""
        seen = [(dist.get_rank(), own)]
        for group, _, size in self.groups.values():
            if size > 1:
                lists = [None] * size
                dist.all_gather_object(lists, seen, group=group)
                seen = list(itertools.chain(*lists))
        return sorted(seen, key=lambda pair: pair[0])


def _in(grid: Grid, mode: AttentionMode) -> AttentionMode:
    """What the mode is in a clip of one frame, all of which sees all of it where no window says otherwise."""
    return AttentionMode() if grid[0] == 1 and mode.window is None else mode


@dataclasses.dataclass(frozen=True)
class Share(Context):
    """The clips and tokens of one rank.

    batches  the clips of each rank along "clips"; chunks: the tokens of each rank of the ring; parts: of each rank of
             this one's Ulysses group, within its chunk
    """

    parallel: Parallel
    grid: Grid
    batches: tuple[Range, ...]
    chunks: tuple[Range, ...]
    parts: tuple[Range, ...]
    clip: int
    ring: int
    ulysses: int

    @property
    def own(self) -> Range:
        return self.parts[self.ulysses]

    @property
    def frames(self) -> Range:
        """Those that the rank's tokens lie in."""
        frame = math.prod(self.grid[1:])
        return self.own[0] // frame, -(-self.own[1] // frame)

    def clips(self, *inputs: Tensor | None) -> list[Tensor | None]:
        """Of inputs [B, ...]: those of the rank's clips."""
        start, stop = self.batches[self.clip]
        return [t if t is None else t[start:stop] for t in inputs]

    def latents(self, latents: Tensor, patch: Grid) -> Tensor:
        """The frames [B, C, t, H, W] that hold the rank's tokens."""
        first, last = self.frames
        return latents[:, :, first * patch[0] : last * patch[0]]

    def tokens(self, x: Tensor) -> Tensor:
        """The rank's tokens of those of its frames."""
        first = self.frames[0] * math.prod(self.grid[1:])
        return x[:, self.own[0] - first : self.own[1] - first]

    def rows(self, x: Tensor) -> Tensor:
        """Of rows [B, N, D], one for a clip, frame or token: those of the rank's tokens."""
        frame, (start, stop) = math.prod(self.grid[1:]), self.own
        if x.shape[1] == 1:
            return x
        if x.shape[1] == math.prod(self.grid):
            return x[:, start:stop]
        if start % frame == 0 and stop % frame == 0:
            return x[:, start // frame : stop // frame]
        first, last = self.frames
        return self.tokens(x[:, first:last].repeat_interleave(frame, 1))

    @property
    def size(self) -> int:
        return self.own[1] - self.own[0]

    @property
    def strip(self) -> Grid:
        """The rank's tokens as a grid of their own, one beside the other."""
        return 1, 1, self.size

    def join(self, video: Tensor, patch: Grid) -> Tensor:
        """The whole video [B, C, T, H, W], on every rank, of each rank's strip [B, C, pt, ph, own·pw]."""
        x = video.unflatten(4, (-1, patch[2])).movedim(4, 1)                                 # [B, own, C, pt, ph, pw]
        for name, axis, ranges in (("ulysses", 1, self.parts), ("ring", 1, self.chunks), ("clips", 0, self.batches)):
            group, rank, _ = self.parallel.groups[name]
            if group is not None:
                x = Gather.apply(x, axis, [stop - start for start, stop in ranges], rank, group)
        x = x.unflatten(1, self.grid).permute(0, 4, 1, 5, 2, 6, 3, 7)                        # [B, C, T, pt, H, ph, ...]
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)                                   # [B, C, T, H, W]

    def attention(self, q, k, v, grid: Grid, mode: AttentionMode, norms: Mapping[str, Any]) -> Tensor:
        """Of the rank's tokens, as `Context.attention`; they see those of all ranks."""
        q, k = qk_norm_rope(q, k, grid=self.grid, tokens=self.own, **norms)
        impl, group = norms["impl"], self.parallel.groups["ulysses"][0]
        if group is not None:
            q, k, v = self._heads_of_all(torch.cat((q, k, v)), group).chunk(3)
        ring, mode = self.parallel.groups["ring"][0], _in(self.grid, mode)
        if mode != AttentionMode():
            out = self._attend_in_frames(q, k, v, mode, ring, impl)
        elif ring is None:
            out = spacetime_attention(q, k, v, impl=impl)
        else:
            out = Ring.apply(q, k, v, [stop - start for start, stop in self.chunks], self.ring, ring, impl)
        return out if group is None else self._tokens_of_all(out, group)

    def _heads_of_all(self, x: Tensor, group) -> Tensor:
        """[B, own, H, E] of each rank of the group -> some of the heads of all its tokens."""
        heads = x.chunk(len(self.parts), 2)
        shapes = [(x.shape[0], stop - start, *heads[0].shape[2:]) for start, stop in self.parts]
        return torch.cat(Swap.apply(group, shapes, *heads), 1)

    def _tokens_of_all(self, x: Tensor, group) -> Tensor:
        """The way back."""
        tokens = x.split([stop - start for start, stop in self.parts], 1)
        return torch.cat(Swap.apply(group, [tokens[self.ulysses].shape] * len(tokens), *tokens), 2)

    def _attend_in_frames(self, q: Tensor, k: Tensor, v: Tensor, mode: AttentionMode, ring, impl: str) -> Tensor:
        """The chunk's frames, with keys and values of all frames that they see, a sink's and those of one run.

        Queries are the last frames of their keys, as `spacetime_attention` aligns them: behind them come zeros, for the
        frames of a window that follow.
        """
        frame, frames = math.prod(self.grid[1:]), self.grid[0]
        seen = [frames_seen(frames, start // frame, stop // frame, mode) for start, stop in self.chunks]
        if ring is not None:
            both = torch.cat((k, v))
            wanted = [[(frame * start, frame * stop) for start, stop in ranges] for ranges in zip(*seen, strict=True)]
            parts = [fetch(both, self.chunks, ranges, self.ring, ring) for ranges in wanted[0 if mode.sink else 1 :]]
            k, v = torch.cat(parts, 1).chunk(2)
        own, after = q.shape[1], seen[self.ring][1][1] * frame - self.chunks[self.ring][1]
        q = torch.cat((q, q.new_zeros(q.shape[0], after, *q.shape[2:])), 1) if after else q
        how = mode.keywords((k.shape[1] // frame, *self.grid[1:]))
        return spacetime_attention(q, k, v, **how, impl=impl)[:, :own]


@functools.lru_cache(maxsize=1024)
def frames_seen(frames: int, start: int, stop: int, mode: AttentionMode) -> tuple[Range, Range]:
    """Of a clip, the frames that those in [start, stop) see, widened to where strides and chunks of frames begin and
    end: those of the sink that lie apart, and a run. Joined they are a clip in which the mode shows them the same."""
    table = rules.token_table(frames, [(frames, 1, 1)], 0, False, torch.device("cpu"))
    causal = {None: 0, "frame": 1}.get(mode.causal, mode.causal)
    window = () if mode.window is None else (mode.window[0], 1, 1)
    lo, hi, _ = rules.reach(table, window, (mode.stride[0], 1, 1), (1, 1, 1), (causal, 0, 0), mode.sink)
    step = math.lcm(mode.stride[0], causal or 1)
    first, last = int(lo[start:stop, 1].min()), -(-int(hi[start:stop, 1].max()) // step) * step
    between = max(first - mode.sink, 0) // step * step  # frames left out: strides and chunks begin where they did
    return (0, mode.sink if between else 0), (between + mode.sink if between else 0, min(last, frames))
