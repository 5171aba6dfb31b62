"""The processes that `torchrun` started for one run: each computes the gradients of its share of every batch.

Rank 0 keeps the optimiser, the log and the state, and says what the others do: for each step it sends them the weights
and gets their gradients, summed in a fixed order. What one process does alone is the same code with one rank.
"""

from __future__ import annotations

import datetime
import itertools
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .machine import choose_device

_END = -1
_SOMEONE = "another process"
_RESUME = "the last save is whole: the same command resumes from it"
_LOST = re.compile("gloo|nccl|connection|timed? ?out", re.IGNORECASE)  # gloo raises RuntimeError itself
_LATE = re.compile("timed? ?out", re.IGNORECASE)
_BEAT, _SILENT = 0.5, 5.0  # seconds from beat to beat of a process, and after how many without one it is taken for gone


class RankError(ConnectionError):
    """Another process of the run is gone, or never came."""


@contextmanager
def started(
    device: str | torch.device | None, *, alone: bool = False, wait: float = 1800
) -> Iterator[torch.device]:
    """Joins the processes of `torchrun`, where it started this one; gives the device of this one.

    alone    one process is joined to itself, for what is divided among any number
    wait     seconds for a process that does not come or answer. Raises RankError where one never comes.
    """
    checks.number("wait", wait, 1, 604800)
    (rank, size), device = _place(), choose_device(device)
    if (size == 1 and not alone) or dist.is_initialized():
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        device, backend = torch.device("cuda", _set_by_torchrun("LOCAL_RANK", 0)), "nccl"
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=wait)
    store = dist.HashStore() if size == 1 else _met(rank, size, limit)
    with _Pulse(store, rank, size) if size > 1 else nullcontext(), _groups_wait(limit):
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        except RuntimeError as error:
            told = f"rank {rank} of {size} cannot join the others ({_first_line(error)}); start all"
            raise RankError(told) from error
        try:
            with _told_why_ended():
                yield device
        finally:
            dist.destroy_process_group()


@contextmanager
def _groups_wait(limit: datetime.timedelta) -> Iterator[None]:
    """Groups made inside, as those of a mesh, wait as long: PyTorch has one limit for all, whatever the first has."""
    names = "default_pg_timeout", "default_pg_nccl_timeout"
    before = {name: getattr(dist.distributed_c10d, name) for name in names}
    try:
        for name in names:
            setattr(dist.distributed_c10d, name, limit)
        yield
    finally:
        for name, value in before.items():
            setattr(dist.distributed_c10d, name, value)


class _Pulse:
    """A thread that tells the others, through the store at which they met, that this process is there.

    By it who loses a process can name it: what gloo and NCCL say of it is that some connection is closed.
    """

    now: _Pulse | None = None

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store = store.clone()  # a connection of its own, which no wait of the main thread holds up
        self._rank, self._others = rank, [other for other in range(size) if other != rank]
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._beat, daemon=True)
        self._told: str | None = None  # who is lost, as the first said that asked

    def __enter__(self) -> None:
        _Pulse.now = self
        self._thread.start()

    def __exit__(self, *_: Any) -> None:
        _Pulse.now = None
        self._ended.set()
        self._thread.join(2 * _BEAT)  # of a store that does not answer no longer
        with suppress(RuntimeError):
            for fact in ("ended", "told"):
                self._store.set(f"{fact} {self._rank}", "")
            if self._rank == 0 and not _store_is_torchruns():
                self._stay()

    def _stay(self) -> None:
        """Of the process with which the store goes: until all others that are left are told who is lost."""
        end = time.monotonic() + 2 * _SILENT
        if self._store.check(["lost"]):
            gone = self._store.get("lost").decode().split(", ")
            left = [f"told {rank}" for rank in self._others if str(rank) not in gone]
            while left and not self._store.check(left) and time.monotonic() < end:
                time.sleep(_BEAT / 5)

    def _beat(self) -> None:
        with suppress(RuntimeError):  # of a store that is gone
            beats = 0
            while not self._ended.wait(_BEAT):
                beats += 1
                self._store.set(f"pulse {self._rank}", str(beats))
                if self._told is None and self._store.check(["lost"]):
                    self._told = self._store.get("lost").decode()
                    self._store.set(f"told {self._rank}", "")

    def lost(self, *, late: bool) -> str:
        """Who is gone, or, where all are there and one is `late`, who does not wait as this one does; as the first says
        that asks: it may be gone itself when the next one does."""
        try:
            self._store.set(f"waits {self._rank}", "")
            if not self._store.check(["lost"]):
                before = self._beats()
                time.sleep(_SILENT)
                same = [str(rank) for rank, beats in self._beats().items() if beats == before[rank]]
                if late and not same:
                    same = [str(rank) for rank in self._others if not self._store.check([f"waits {rank}"])]
                self._store.compare_set("lost", "", ", ".join(same))
            names = self._store.get("lost").decode()
        except RuntimeError:  # rank 0's, where it is not torchrun's own
            names = ("" if _store_is_torchruns() else "0") if self._told is None else self._told
        return f"rank {names}" if names else _SOMEONE

    def gone(self) -> str:
        """Who is gone without having ended, asked by one that is ended from outside; "" where nobody is."""
        with suppress(RuntimeError):
            self._store.set(f"ended {self._rank}", "")
            before, end = self._beats(), time.monotonic() + _SILENT
            while not self._store.check([f"ended {rank}" for rank in self._others]) and time.monotonic() < end:
                time.sleep(_BEAT / 5)
            there = {rank for rank, beats in self._beats().items() if beats != before[rank]}
            silent = [rank for rank in self._others if rank not in there and not self._store.check([f"ended {rank}"])]
            return ", ".join(map(str, silent))
        return ""

    def _beats(self) -> dict[int, bytes]:
        keys = {rank: f"pulse {rank}" for rank in self._others}
        return {rank: self._store.get(key) if self._store.check([key]) else b"" for rank, key in keys.items()}


def _place() -> tuple[int, int]:
    """This process' rank and how many there are, by the variables of torchrun; ValueError where one does not fit."""
    size = _set_by_torchrun("WORLD_SIZE", 1)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if size > 1 and not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={size} is set, and {', '.join(missing)} not: start all processes by torchrun, or unset "
            "WORLD_SIZE for one alone"
        )
    rank = _set_by_torchrun("RANK", 0)
    if size != 1 and rank >= size:
        raise ValueError(f"RANK must be less than WORLD_SIZE={size}; got {rank}: start all processes by torchrun")
    return rank, size


def _set_by_torchrun(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise ValueError(f"{name} must be a whole number, as torchrun sets it; got {value!r}")
    return int(value)


def _store_is_torchruns() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def squares(x: Tensor) -> float:
    """The sum of its squares, by which ranks tell whether they have the same x."""
    return x.detach().double().square().sum().item()


def check_within(mesh: Any) -> None:
    """Raises ValueError where this process is none of those of a DeviceMesh."""
    if mesh.get_coordinate() is None:
        held = ", ".join(map(str, mesh.mesh.flatten().tolist()))
        raise ValueError(f"mesh must have this process in it, rank {dist.get_rank()}; it has {held}")


def _met(rank: int, size: int, limit: datetime.timedelta) -> dist.Store:
    """The store at which all ranks have come: torchrun's own, or rank 0's. RankError names those that have not."""
    host, port = os.environ["MASTER_ADDR"], _set_by_torchrun("MASTER_PORT", 0)
    keeps = rank == 0 and not _store_is_torchruns()
    end = time.monotonic() + limit.total_seconds()
    try:
        store = dist.TCPStore(host, port, None, keeps, limit, wait_for_workers=False)
    except dist.DistError as error:
        if keeps:
            told = f"rank 0 of {size} cannot listen at {host}:{port}; is the port in use? Give all another MASTER_PORT"
            raise RankError(f"{told} ({_first_line(error)})") from error
        raise RankError(f"rank 0 of {size}, at {host}:{port}, did not come within {limit}") from error
    store = dist.PrefixStore(f"sora {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store.set(str(rank), "here")
    missing = [str(other) for other in range(size)]
    while missing := [other for other in missing if not store.check([other])]:  # no wait in C++: signals are heard
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    if missing:
        raise RankError(f"rank {', '.join(missing)} of {size} did not come within {limit}; start all, or fewer")
    return store


@contextmanager
def spare(path: Path) -> Iterator[tuple[bool, Path]]:
    """Whether this process is the first, and where to write: the others make the same file where it is thrown away."""
    if Ranks().rank == 0:
        yield True, path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield False, Path(folder) / path.name


class Ranks:
    """This process among those of the run: one of one where torch.distributed is not in use."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raises ValueError, on every rank, where two were started with other facts: of those that both have."""
        if self.size == 1:
            return
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, dict(facts))
        for name in dict.fromkeys(itertools.chain(*everyone)):
            (first, expected), *others = [(rank, own[name]) for rank, own in enumerate(everyone) if name in own]
            for rank, found in others:
                if found != expected:
                    raise ValueError(
                        f"all processes must be started alike: {name} is {expected!r} on rank {first}, {found!r} on "
                        f"rank {rank}"
                    )

    def order(self, step: int, weights: Sequence[Tensor]) -> None:
        """Of rank 0: let the others compute this step with these weights."""
        if self.size > 1:
            with told_of_loss(f"before step {step}"):
                self._broadcast_step(step, weights[0].device)
                dist.broadcast(_flat(weights), 0)

    @contextmanager
    def leading(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Of rank 0: after the block, however it ends, the others are told that there are no more steps."""
        try:
            yield
        finally:
            if self.size > 1:
                with suppress(RuntimeError):  # one that is gone need not be told
                    self._broadcast_step(_END, weights[0].device)

    def receive(self, weights: Sequence[Tensor]) -> int | None:
        """Of the others: the step to compute now, its weights being written into `weights`; None at the end."""
        with told_of_loss("while it waited for rank 0"):
            step = self._broadcast_step(_END, weights[0].device)
            if step == _END:
                return None
            flat = _flat(weights)
            dist.broadcast(flat, 0)
        with torch.no_grad():
            for weight, value in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
                weight.copy_(value.view(weight.shape))
        return step

    def sum(self, value: float, gradients: Sequence[Tensor], step: int) -> tuple[float, Sequence[Tensor]]:
        """On rank 0 the sums over all ranks, in their order; on the others nothing of use."""
        if self.size == 1:
            return value, gradients
        flat = torch.cat([gradients[0].new_tensor([value]), _flat(gradients)])
        gathered = [torch.empty_like(flat) for _ in range(self.size)] if self.rank == 0 else None
        with told_of_loss(f"at step {step}"):
            dist.gather(flat, gathered)
        if gathered is None:
            return value, gradients
        total = sum(gathered)
        parts = total[1:].split([g.numel() for g in gradients])
        return total[0].item(), [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)]

    def _broadcast_step(self, step: int, device: torch.device) -> int:
        told = torch.tensor(step, device=device)
        dist.broadcast(told, 0)
        return int(told)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@contextmanager
def _told_why_ended() -> Iterator[None]:
    """Where torchrun ends this process because another one is gone, before an exchange with it fails: who that is."""
    try:
        yield
    except SystemExit as end:
        if _Pulse.now is None or end.code != 128 + signal.SIGTERM:
            raise
        from .steps import noted_signals  # with what training needs

        with noted_signals():
            gone = _Pulse.now.gone()
        if not gone:
            raise
        own = Ranks()
        raise RankError(f"rank {own.rank} of {own.size} is ended: rank {gone} is gone; start all again") from end


@contextmanager
def told_of_loss(when: str, then: str = _RESUME) -> Iterator[None]:
    """What torch says of a process that is gone or silent, as one line that says what to do `then`."""
    try:
        yield
    except RuntimeError as error:
        if Ranks().size == 1 or not (isinstance(error, dist.DistError) or _LOST.search(str(error))):
            raise
        from .steps import noted_signals  # with what training needs

        with noted_signals():  # torchrun ends the others when one is gone: not before they have said who
            who = _Pulse.now.lost(late=bool(_LATE.search(str(error)))) if _Pulse.now else _SOMEONE
        raise RankError(
            f"rank {dist.get_rank()} of {dist.get_world_size()} lost {who} {when} ({_first_line(error)}); {then}"
        ) from error


def _first_line(error: Exception) -> str:
    """Without what gloo adds of workers and logs."""
    return str(error).strip().partition("\n")[0].partition(". This is typically")[0]
