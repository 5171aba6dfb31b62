"""What a run of training consists of beside its steps: settings, log and progress, batches drawn ahead, signals."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import checks, files
from .checkpoint import CheckpointError, read_json
from .muon import Muon


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. The learning rate warms up, stays, and falls linearly to 0 over the last `decay` of the steps.

    The weights depend on all of it but `save_every` and `loaders`, on `workers` in their rounding.
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

    def check_finite(self, step: int, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"the loss is {loss} and the norm of its gradients {norm} at step {step}; "
                f"lower the learning rate ({self.lr})"
            )

    def follow(self, average: Sequence[Tensor], weights: Sequence[Tensor], step: int) -> None:
        """Moves an average towards the weights after a step, in place: faster in the first ones."""
        keep = min(self.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - keep)


def generator_of(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step of a run."""
    return torch.Generator().manual_seed((seed << 32) + step)


def written(settings: Settings, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is made with, as `settings.json` has it."""
    return json.loads(json.dumps(dataclasses.asdict(settings) | dict(made_with)))


def state_of(module: nn.Module, optimiser: Muon, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a run keeps beside its step, by name; the tensors themselves."""
    state = {f"model.{name}": value for name, value in module.state_dict().items()}
    state |= {f"average.{name}": value for name, value in average.items()}
    for name, parameter in module.named_parameters():
        state |= {f"optimiser.{key}.{name}": moment for key, moment in optimiser.state[parameter].items()}
    return state


def check_left(run: Path, step: int, settings: Settings) -> None:
    """Raises CheckpointError where `run` has more steps behind it than it is to have."""
    if not 0 <= step <= settings.steps:
        raise CheckpointError(f"{run} has {step} steps behind it, more than steps={settings.steps}; ask for more")


def check_begun(run: Path, now: Mapping[str, Any]) -> None:
    """Raises CheckpointError where `run` was begun with other settings than `now`, but for those that may change."""
    before = read_json(run / "settings.json")
    for name in now:
        if name not in ("steps", "decay", "save_every", "workers", "loaders") and before.get(name) != now[name]:
            raise CheckpointError(
                f"{run} was begun with {name}={before.get(name)!r}, not {now[name]!r}; keep it or use another folder"
            )


def check_form(run: Path, *, divided: bool) -> None:
    """Raises CheckpointError where `run` holds saves of the other form: a run that began anew would overwrite its log
    and its checkpoint."""
    forms = {False: "state.safetensors", True: "step-*/.metadata"}
    if any(run.glob(forms[not divided])):
        begun, do = ("without", "leave them out") if divided else ("with", "give them")
        raise CheckpointError(
            f"{run} was begun {begun} --shard, --cp or --accumulate: {do}, on any number of processes, or use another "
            "folder"
        )


@contextmanager
def drawn_ahead(batch_at: Callable[[int], Sequence[Tensor]], steps: range, loaders: int) -> Iterator[Iterator[Any]]:
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
                batch = result_of(following)
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


def rewind(run: Path, step: int) -> float:
    """Takes what came after a step out of a run's log; the seconds that it took until there."""
    rows = [row for row in read_log(run) if row["step"] <= step]
    files.write_bytes(run / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows[-1]["seconds"] if rows else 0.0


@contextmanager
def journal(
    run: Path, label: str, settings: Settings, step: int, seconds: float
) -> Iterator[Callable[[int, float, float, int], None]]:
    """`told(step, loss, norm, clips)` after every step of so many clips: progress on the terminal, with the loss, the
    clips a second of late and the time left, and every tenth a row of `run/log.jsonl`."""
    started, smooth = time.monotonic() - seconds, None
    lately: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=50)  # when, and clips until then
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with files.naming(run / "log.jsonl"):
        log = (run / "log.jsonl").open("a", encoding="utf-8")
    columns += [TextColumn("loss {task.fields[loss]}"), TextColumn("{task.fields[pace]} clips/s")]
    with log, Progress(*columns) as bar:
        task = bar.add_task(label, total=settings.steps, completed=step, loss="-", pace="-")

        def told(step: int, loss: float, norm: float, clips: int) -> None:
            nonlocal smooth
            smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            lately.append((time.monotonic(), lately[-1][1] + clips))
            pace = (lately[-1][1] - lately[0][1]) / max(lately[-1][0] - lately[0][0], 1e-9)
            bar.update(task, completed=step, loss=f"{smooth:.4f}", pace=f"{pace:.3g}")
            if step % 10 == 0 or step == settings.steps:
                figures = dict(loss=loss, lr=settings.rate(step - 1), norm=norm)
                row = {"step": step} | figures | {"seconds": time.monotonic() - started}
                with files.naming(run / "log.jsonl"):
                    log.write(json.dumps({key: round(figure, 6) for key, figure in row.items()}) + "\n")
                    log.flush()

        yield told


@contextmanager
def noted_signals() -> Iterator[list[int]]:
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


def act_upon(number: int) -> NoReturn:
    """What the signal always does."""
    signal.raise_signal(number)
    raise KeyboardInterrupt  # where nobody else acts upon it


def result_of(future: Future[Any]) -> Any:
    """Its result, waited for in slices: a signal that the system hands to another thread does not end a wait."""
    while not wait([future], timeout=0.1).done:
        pass
    return future.result()


@contextmanager
def no_garbage_before() -> Iterator[None]:
    """What exists before the block is not searched for garbage inside it: of short steps a tenth of the time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch's own threads, for each of ours, inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
