"""A training loop that resumes bit for bit: Muon and AdamW, gradient clipping, a moving average of the weights, a log.

The state is safetensors, written atomically every `save_every` steps and when the run is asked to stop. The loop draws
no random number: what a step needs comes from `generator_of(seed, step)`, so a run that was stopped and resumed equals
one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import checks, files
from .checkpoint import (
    CheckpointError,
    check_shapes,
    load_into,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from .muon import Muon
from .ranks import RankError, Ranks


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. The learning rate warms up, stays, and falls linearly to 0 over the last `decay` of the steps.

    The weights depend on all of it but `save_every` and `loaders`.
    """

    steps: int
    batch: int
    lr: float
    seed: int = 0
    warmup: int = 50
    decay: float = 0.3
    clip: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.0
    save_every: int = 200
    workers: int = 2
    loaders: int = 0

    def __post_init__(self) -> None:
        # a step's random numbers come from a seed of 64 bits: 31 of the run's and 32 of the step's
        whole = dict(steps=(1, 2**32), batch=(1, 4096), seed=(0, 2**31 - 1), warmup=(0, 2**32))
        for name, (least, most) in (whole | dict(save_every=(1, 2**32), workers=(1, 256), loaders=(0, 256))).items():
            checks.whole(name, getattr(self, name), least, most)
        for name, most in dict(lr=1e6, clip=1e6, weight_decay=1e6, decay=1, ema=1).items():
            checks.number(name, getattr(self, name), 0, most)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers; got {self.betas!r}")
        for beta in self.betas:
            checks.number("betas", beta, 0, 1)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / (self.warmup + 1), left)


def fit(
    module: nn.Module,
    batch_at: Callable[[int], Sequence[Tensor]],
    loss_of: Callable[..., Tensor],
    settings: Settings,
    run: str | Path,
    *,
    label: str,
    matrices: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    made_with: Mapping[str, Any] | None = None,
    on_save: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """Minimises `loss_of(*batch_at(step))` by Muon, of products in `dtype`, for the parameters named in `matrices`
    and AdamW for the others; returns the weights to keep: the moving average if there is one.

    `batch_at(step)` gives tensors of one length, that of the step's clips; `loss_of` the mean loss of the clips it is
    given. Each of `settings.workers` threads takes a share of them and their gradients are averaged in order, so that
    cores meet once a step: small models and busy machines gain much by it. Batches are drawn ahead, by a thread, or by
    `settings.loaders` processes where steps are shorter than the drawing of a batch.

    `run` is a folder, held against other runs, that receives `state.safetensors`, `settings.json` and `log.jsonl`
    (step, loss, lr, norm, seconds); one that holds them already is resumed. It is refused with `CheckpointError` when
    it is of another model, of other settings than `steps`, `decay`, `save_every` and `loaders`, or of another
    `made_with`: what else the losses depend on, as JSON. `on_save(step, weights)` is called after every save. Same
    seed, same device, same weights.

    Where torch.distributed is in use (`ranks.started`), all its processes call `fit` alike, and each takes a share of
    every step's clips: the losses are those of one process within rounding. Rank 0 alone writes, and ends the others.

    Ctrl-C, SIGTERM and SIGHUP wait for the step that runs, save, and then do what they always do; a second one does not
    wait and saves nothing. A loss, gradients or weights that are not finite raise FloatingPointError and leave the last
    save as it is; a folder that is in use or cannot be written raises `files.WriteError`.
    """
    run, ranks = Path(run), Ranks()
    named = dict(module.named_parameters())
    parameters = list(named.values())
    made_with = {"matrices": list(matrices)} | dict(made_with or {})
    ranks.agree({"what is trained": label} | dataclasses.asdict(settings) | made_with)
    if settings.batch < ranks.size:
        raise ValueError(f"batch={settings.batch} clips are fewer than the {ranks.size} processes; start fewer")
    threads = torch.get_num_threads()

    def gradients(part: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = loss_of(*part)
        return loss.detach(), torch.autograd.grad(loss, parameters)

    if ranks.rank:
        _assist(ranks, parameters, batch_at, gradients, settings)
        return module.state_dict()
    optimiser = Muon(
        [parameter for name, parameter in named.items() if name not in matrices], [named[name] for name in matrices],
        lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True, dtype=dtype,
    )  # fmt: skip
    average = {name: value.detach().clone() for name, value in named.items()} if settings.ema else None
    smooth = None

    def write_state() -> None:
        state = {f"model.{name}": value for name, value in module.state_dict().items()}
        state |= {f"average.{name}": value for name, value in (average or {}).items()}
        for name, value in named.items():
            state |= {f"optimiser.{key}.{name}": moment for key, moment in optimiser.state[value].items()}
        write_tensors(run / "state.safetensors", state | {"step": torch.tensor(step)})

    def save() -> dict[str, Tensor]:
        write_state()
        weights = module.state_dict() | (average or {})
        if on_save is not None:
            on_save(step, weights)
        return weights

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with ranks.leading(parameters), files.exclusive(run):
        step, spent = _resume(run, module, optimiser, average, settings, made_with)
        started = time.monotonic() - spent
        with files.naming(run / "log.jsonl"):
            log = (run / "log.jsonl").open("a", encoding="utf-8")
        with (
            log,
            Progress(*columns, TextColumn("loss {task.fields[loss]}")) as bar,
            torch_threads(max(1, threads // settings.workers)),
            ThreadPoolExecutor(settings.workers) as pool,
            _drawn_ahead(batch_at, range(step, settings.steps), settings.loaders) as batches,
            _noted_signals() as stop,
        ):
            task = bar.add_task(label, total=settings.steps, completed=step, loss="-")
            while step < settings.steps and not stop:
                for group in optimiser.param_groups:
                    group["lr"] = settings.rate(step)
                batch = next(batches)
                try:
                    ranks.order(step, parameters)
                    share = _own_share(ranks, parameters, batch, gradients, pool, settings.workers)
                    value, totals = ranks.sum(*share, step)
                except RankError:
                    write_state()
                    raise
                for parameter, total in zip(parameters, totals, strict=True):
                    parameter.grad = _laid_out(parameter, total)
                norm = nn.utils.clip_grad_norm_(parameters, settings.clip).item()
                if not (math.isfinite(value) and math.isfinite(norm)):
                    raise FloatingPointError(
                        f"the loss is {value} and the norm of its gradients {norm} at step {step}; "
                        f"lower the learning rate ({settings.lr})"
                    )
                with torch_threads(threads):
                    optimiser.step()
                if average is not None:
                    keep = min(settings.ema, (step + 1) / (step + 10))
                    torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters], 1 - keep)
                step += 1
                smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
                bar.update(task, completed=step, loss=f"{smooth:.4f}")
                if step % 10 == 0 or step == settings.steps:
                    figures = dict(loss=value, lr=settings.rate(step - 1), norm=norm)
                    row = {"step": step} | figures | {"seconds": time.monotonic() - started}
                    with files.naming(run / "log.jsonl"):
                        log.write(json.dumps({key: round(figure, 6) for key, figure in row.items()}) + "\n")
                        log.flush()
                if step % settings.save_every == 0 and step < settings.steps:
                    save()
            weights = save()
            if stop:
                bar.console.print(f"stopped at step {step}; the same command resumes from {run}")
    if stop:
        signal.raise_signal(stop[0])
        raise KeyboardInterrupt  # where nobody else acts upon the signal
    return weights


def _own_share(
    ranks: Ranks,
    weights: Sequence[Tensor],
    batch: Sequence[Tensor],
    gradients: Callable[..., Any],
    pool: ThreadPoolExecutor,
    workers: int,
) -> tuple[float, list[Tensor]]:
    """What this rank's clips of a batch give of its mean loss and of that loss's gradients."""
    clips, count = len(batch[0]), ranks.size * workers
    parts = [[t[k::count] for t in batch] for k in range(ranks.rank, min(clips, count), ranks.size)]
    if not parts:  # of fewer clips than ranks
        return 0.0, [torch.zeros_like(weight) for weight in weights]
    computed = [pool.submit(gradients, part) for part in parts]
    losses, slopes = zip(*map(_result, computed), strict=True)
    shares = [len(part[0]) / clips for part in parts]
    value = sum(share * loss.item() for share, loss in zip(shares, losses, strict=True))
    totals = [sum(s * term for s, term in zip(shares, terms, strict=True)) for terms in zip(*slopes, strict=True)]
    return value, totals


def _assist(
    ranks: Ranks,
    weights: Sequence[Tensor],
    batch_at: Callable[[int], Sequence[Tensor]],
    gradients: Callable[..., Any],
    settings: Settings,
) -> None:
    """What all ranks but the first do: gradients of their share of each step that it orders."""
    with (
        torch_threads(max(1, torch.get_num_threads() // settings.workers)),
        ThreadPoolExecutor(settings.workers) as pool,
        ExitStack() as stack,
        _noted_signals() as stop,
    ):
        batches = None
        while (step := ranks.receive(weights)) is not None:
            if batches is None:
                ahead = _drawn_ahead(batch_at, range(step, settings.steps), settings.loaders)
                batches = stack.enter_context(ahead)
            ranks.sum(*_own_share(ranks, weights, next(batches), gradients, pool, settings.workers), step)
    if stop:
        signal.raise_signal(stop[0])
        raise KeyboardInterrupt


@contextmanager
def _drawn_ahead(batch_at: Callable[[int], Sequence[Tensor]], steps: range, loaders: int) -> Iterator[Iterator[Any]]:
    """The batches of the steps in order, each drawn before it is asked for."""
    if loaders:
        # forked: the function and what it draws from need not be pickled; it touches no GPU
        how = dict(num_workers=loaders, prefetch_factor=4, multiprocessing_context="fork")
        yield iter(DataLoader(_Batches(batch_at, steps), batch_size=None, sampler=steps, **how))
        return
    with ThreadPoolExecutor(1) as thread:

        def drawn() -> Iterator[Any]:
            following = thread.submit(batch_at, steps[0])
            for step in steps:
                batch = _result(following)
                if step + 1 in steps:
                    following = thread.submit(batch_at, step + 1)
                yield batch

        yield drawn()


@dataclasses.dataclass(frozen=True)
class _Batches(Dataset):
    batch_at: Callable[[int], Sequence[Tensor]]
    steps: range

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> Sequence[Tensor]:
        return self.batch_at(step)


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's log, without those that a crash cut short."""
    file, rows = Path(run) / "log.jsonl", []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
            rows.append({key: float(row[key]) for key in ("loss", "seconds")} | row | {"step": int(row["step"])})
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
    return rows


def _resume(
    run: Path,
    module: nn.Module,
    optimiser: Muon,
    average: dict[str, Tensor] | None,
    settings: Settings,
    made_with: Mapping[str, Any],
) -> tuple[int, float]:
    """Takes up what `run` holds of an earlier run: its last step, and the seconds that it took."""
    file, log = run / "state.safetensors", run / "log.jsonl"
    now = json.loads(json.dumps(dataclasses.asdict(settings) | made_with))
    if not file.exists():
        log.unlink(missing_ok=True)
        write_json(run / "settings.json", now)
        return 0, 0.0
    before = read_json(run / "settings.json")
    for name in now:
        if name not in ("steps", "decay", "save_every", "loaders") and before.get(name) != now[name]:
            raise CheckpointError(
                f"{run} was begun with {name}={before.get(name)!r}, not {now[name]!r}; keep it or use another folder"
            )
    state = read_tensors(file, also=[torch.int64])
    wanted = {f"model.{name}": value.shape for name, value in module.state_dict().items()}
    wanted |= {f"average.{name}": value.shape for name, value in (average or {}).items()}
    for name, parameter in module.named_parameters():
        kept = optimiser.kept(parameter)
        wanted |= {f"optimiser.{key}.{name}": () if key == "step" else parameter.shape for key in kept}
    check_shapes(wanted | {"step": ()}, {name: value.shape for name, value in state.items()}, str(file))
    step = int(state["step"])
    if not 0 <= step <= settings.steps:
        raise CheckpointError(f"{run} has {step} steps behind it, more than steps={settings.steps}; ask for more")
    load_into(module, {name: state[f"model.{name}"] for name in module.state_dict()}, str(file))
    for name, value in (average or {}).items():
        value.copy_(state[f"average.{name}"])
    for name, parameter in module.named_parameters():
        moments = {key: state[f"optimiser.{key}.{name}"] for key in optimiser.kept(parameter)}
        optimiser.state[parameter] = {
            key: value.to(parameter.device) if key == "step" else _laid_out(parameter, value)
            for key, value in moments.items()
        }
    write_json(run / "settings.json", now)
    rows = [row for row in read_log(run) if row["step"] <= step]
    files.write_bytes(log, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return step, rows[-1]["seconds"] if rows else 0.0


def _laid_out(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` laid out as a parameter is: the fused AdamW pairs numbers by where they lie in memory."""
    if (value.stride(), value.dtype, value.device) == (parameter.stride(), parameter.dtype, parameter.device):
        return value
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and SIGHUP inside the block: the first is put on the list, a second does what it always does."""
    noted: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():  # no other thread is told of signals
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()


def _result(future: Future[Any]) -> Any:
    """Its result, waited for in slices: a signal that the system hands to another thread does not end a wait."""
    while not wait([future], timeout=0.1).done:
        pass
    return future.result()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch's own threads, for each of ours, inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def generator_of(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step of a run."""
    return torch.Generator().manual_seed((seed << 32) + step)
