"""Training of a transformer that does not fit one device: FSDP2 over all ranks, clips and tokens divided among them.

    torchrun --nproc-per-node 8 -m sora_model -- train dit --shard --cp 2 --accumulate 4

Weights, gradients, their average and the optimiser's state are divided among all ranks (`shard`); of each batch a group
of `cp` ranks has some clips, and each of its ranks some of their tokens (`parallel.over`). Checkpoints are PyTorch's
distributed ones, which any number of ranks reads. The losses are those of `fit.fit` in one process within rounding.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from . import files
from .checkpoint import CheckpointError, write_json
from .dit import SoraDiT
from .muon import Muon
from .parallel import AXES
from .ranks import Ranks, told_of_loss
from .steps import (
    Settings,
    act_upon,
    check_begun,
    check_form,
    check_left,
    drawn_ahead,
    journal,
    no_garbage_before,
    noted_signals,
    rewind,
    state_of,
    written,
)


def mesh_of(device: torch.device, cp: int, heads: int) -> DeviceMesh:
    """All ranks of the run as ("clips", "ring", "ulysses"): groups of `cp` that share the tokens of their clips, by
    Ulysses where their number and the heads' have a common divisor, and by a ring."""
    size = dist.get_world_size()
    if size % cp:
        fit = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ValueError(f"cp={cp} must divide the {size} processes; {fit} would")
    ulysses = math.gcd(cp, heads)
    with told_of_loss("before the first step"):
        return init_device_mesh(device.type, (size // cp, cp // ulysses, ulysses), mesh_dim_names=AXES)


def shard(dit: SoraDiT, *others: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Divides the weights among all ranks, in place, to compute in `dtype`; of `others` in their own.

    Weights on the meta device are divided as they are, without memory: `deferred.fill` gives each rank its part.

    What Wan keeps in fp32 stays whole on every rank where `dtype` is less; gradients are averaged in fp32.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    how = dict(mesh=mesh, mp_policy=policy, ignored_params=dit.kept_wide(dtype))
    for block in dit.blocks:
        fully_shard(block, **how)
    fully_shard(dit, **how)
    for other in others:
        fully_shard(other, mesh=mesh)


def fit(
    module: nn.Module,
    batch_at: Callable[[int], Sequence[Tensor]],
    loss_of: Callable[..., Tensor],
    settings: Settings,
    run: str | Path,
    *,
    mesh: DeviceMesh,
    label: str,
    accumulate: int = 1,
    matrices: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    made_with: Mapping[str, Any] | None = None,
    on_save: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """As `fit.fit`, for a module whose parts `shard` has divided, on every rank of `mesh`, which is `mesh_of`'s.

    accumulate  parts that a rank's clips are worked off in, one after the other: memory for time
    `run` is a folder that all ranks see; it receives `step-N`, a distributed checkpoint, which is read by any number of
    ranks and replaces the last one when it is whole. `on_save` is called on rank 0, with whole weights on the CPU,
    which it also returns; on the others nothing. A signal on any rank stops all after the step. If a process dies the
    others raise `RankError`, and the last save is whole.
    """
    run, ranks, groups = Path(run), Ranks(), mesh["clips"].size()
    made_with = {"matrices": list(matrices)} | dict(made_with or {})
    with told_of_loss("before the first step"):
        ranks.agree({"what is trained": label} | dataclasses.asdict(settings) | made_with | {"accumulate": accumulate})
    if settings.batch < groups:
        raise ValueError(f"batch={settings.batch} clips are fewer than the {groups} groups of processes; raise cp")
    named = dict(module.named_parameters())
    others = [parameter for name, parameter in named.items() if name not in matrices]
    kinds = [[p for p in others if isinstance(p, DTensor) == divided] for divided in (True, False)]
    optimiser = Muon(
        [{"params": kind} for kind in kinds if kind], [named[name] for name in matrices],
        lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True, dtype=dtype,
    )  # fmt: skip
    average = {name: value.detach().clone() for name, value in named.items()} if settings.ema else {}
    for value in others:  # as its first step makes it: a checkpoint is read into what is there
        moments = {key: torch.zeros_like(value, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        optimiser.state[value] = {"step": torch.zeros((), device=value.device)} | moments
    state = state_of(module, optimiser, average)

    def save() -> dict[str, Tensor]:
        with told_of_loss(f"while step {step} was saved"):
            weights = _whole(module.state_dict() | average, f"cannot write {str(run)!r}")
            _write(run, state, step)
        if on_save is not None and ranks.rank == 0:
            on_save(step, weights)
        return weights

    first = ranks.rank == 0
    with files.exclusive(run) if first else nullcontext():
        step, seconds = _resume(run, state, settings, made_with)
        with (
            journal(run, label, settings, step, seconds) if first else nullcontext(lambda *figures: None) as told,
            drawn_ahead(batch_at, range(step, settings.steps), settings.loaders) as batches,
            no_garbage_before(),
            noted_signals() as stop,
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here writes into it
            stopped = 0
            while step < settings.steps and not stopped:
                for group in optimiser.param_groups:
                    group["lr"] = settings.rate(step)
                batch = next(batches)
                with told_of_loss(f"at step {step}"):
                    value = _gradients(batch, loss_of, mesh, accumulate)
                    value = _over_all(value / (ranks.size // groups), mesh, dist.ReduceOp.SUM)
                    norm = _clip(list(named.values()), settings.clip)
                    stopped = int(_over_all(stop[0] if stop else 0, mesh, dist.ReduceOp.MAX))
                    settings.check_finite(step, value, norm)
                    optimiser.step()
                optimiser.zero_grad()
                if average:
                    settings.follow(*([_local(t) for t in kept.values()] for kept in (average, named)), step)
                step += 1
                told(step, value, norm, len(batch[0]))
                if step % settings.save_every == 0 and step < settings.steps:
                    save()
            weights = save()
    if stopped:
        if first:
            print(f"stopped at step {step}; the same command resumes from {run}")
        act_upon(stopped)
    return weights


def _gradients(batch: Sequence[Tensor], loss_of: Callable[..., Tensor], mesh: DeviceMesh, accumulate: int) -> float:
    """Adds to the gradients those of this rank's clips and tokens, and returns its share of the mean loss.

    FSDP averages over all ranks, and the ranks of a group hold parts of one sum: hence the factor. Who has no clip
    left takes part with one that counts nothing.
    """
    clips, size, value = len(batch[0]), dist.get_world_size(), 0.0
    own = list(range(mesh.get_local_rank("clips"), clips, mesh["clips"].size()))
    for first in range(accumulate):
        rows = own[first::accumulate]
        loss = loss_of(*(t[rows] if rows else t[:1] for t in batch)) * (len(rows) / clips)
        (size * loss).backward()
        value += loss.item()
    return value


def _over_all(value: float, mesh: DeviceMesh, how: dist.ReduceOp) -> float:
    value = torch.tensor(float(value), device=mesh.device_type)
    dist.all_reduce(value, how)
    return value.item()


def _clip(parameters: Sequence[nn.Parameter], most: float) -> float:
    """As `clip_grad_norm_`, of gradients divided among ranks and of whole ones, which it averages first."""
    whole = [p.grad for p in parameters if not isinstance(p, DTensor) and p.grad is not None]
    divided = [p.grad.to_local() for p in parameters if isinstance(p, DTensor) and p.grad is not None]
    for gradient in whole:
        dist.all_reduce(gradient)
        gradient.div_(dist.get_world_size())
    total = torch.stack([t.float().square().sum() for t in divided]).sum()
    dist.all_reduce(total)
    norm = (total + sum(t.float().square().sum() for t in whole)).sqrt()
    torch._foreach_mul_([*whole, *divided], (most / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()


def _local(t: Tensor) -> Tensor:
    t = t.detach()
    return t.to_local() if isinstance(t, DTensor) else t


def _whole(tensors: Mapping[str, Tensor], why: str) -> dict[str, Tensor]:
    """Each tensor whole, on the CPU of rank 0; FloatingPointError on every rank where one is not finite."""
    kept = {}
    for name, t in tensors.items():
        t = t.full_tensor() if isinstance(t, DTensor) else t
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise FloatingPointError(f"{why}: {name} has values that are not finite")
        if dist.get_rank() == 0:
            kept[name] = t.detach().cpu()
    return kept


def _saves(run: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints that are whole, in order: their metadata are written last."""
    found = (path for path in run.glob("step-*") if (path / ".metadata").exists())
    return sorted((int(path.name.removeprefix("step-")), path) for path in found)


def _write(run: Path, state: dict[str, Any], step: int) -> None:
    with _saying(f"cannot write a checkpoint to {run}"):
        dcp.save(state | {"step": torch.tensor(step)}, checkpoint_id=run / f"step-{step}")
        dist.barrier()
    for before, path in _saves(run) if dist.get_rank() == 0 else ():
        if before != step:
            shutil.rmtree(path)


def _resume(run: Path, state: dict[str, Any], settings: Settings, made_with: Mapping[str, Any]) -> tuple[int, float]:
    """Takes up what `run` holds of an earlier run: its last step, and the seconds that it took."""
    now = written(settings, made_with)
    check_form(run, divided=True)
    step, folder = (_saves(run) or [(0, None)])[-1]
    if folder is not None:
        check_begun(run, now)
        check_left(run, step, settings)
        with told_of_loss("before the first step"), _saying(f"{folder} cannot be read"):
            dcp.load(state, checkpoint_id=folder)
    with told_of_loss("before the first step"):
        dist.barrier()
    if dist.get_rank():
        return step, 0.0
    write_json(run / "settings.json", now)
    return step, rewind(run, step)


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """What the checkpoints of PyTorch raise, as one line."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {cause[0]!r}" for rank, cause in error.failures.items())
        raise CheckpointError(f"{what} ({causes.splitlines()[0]})") from error
