"""A training loop that resumes bit for bit: AdamW, gradient clipping, a moving average of the weights, a log.

The state is safetensors, written atomically every `save_every` steps and on Ctrl-C. The loop draws no random number:
what a step needs comes from `generator_of(seed, step)`, so a run that was stopped and resumed equals one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .checkpoint import CheckpointError, load_into, read_json, read_tensors, write_json, write_tensors


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train. The learning rate warms up, stays, and falls linearly to 0 over the last `decay` of the steps."""

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

    def __post_init__(self) -> None:
        for name, least in dict(steps=1, batch=1, seed=0, warmup=0, save_every=1, workers=1).items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if self.batch % self.workers:
            raise ValueError(f"batch must be a multiple of workers, got {self.batch} and {self.workers}")
        for name, most in dict(lr=math.inf, decay=1.0, clip=math.inf, ema=1.0, weight_decay=math.inf).items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie between 0 and {most}, got {getattr(self, name)!r}")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        left = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / (self.warmup + 1), left)


def fit(
    module: nn.Module,
    loss_at: Callable[[int, slice], Tensor],
    settings: Settings,
    run: str | Path,
    *,
    label: str,
    on_save: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """Minimises `loss_at(step, part)` by AdamW and returns the weights to keep: the moving average if there is one.

    `part` is the slice of the step's batch to take. Each of `settings.workers` threads takes one and their
    gradients are averaged in order, so that cores meet once a step: small models and busy machines gain much by it.

    `run` is a folder that receives `state.safetensors`, `settings.json` and `log.jsonl` (step, loss, lr, norm,
    seconds); one that holds them already is resumed, and refused with `CheckpointError` when it is of another model
    or of settings other than the number of steps, which may be changed. `on_save(step, weights)` is called after
    every save. Same seed, same device, same weights.
    """
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    named = dict(module.named_parameters())
    optimiser = torch.optim.AdamW(
        named.values(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    average = {name: value.detach().clone() for name, value in named.items()} if settings.ema else None
    step, spent = _resume(run, module, optimiser, average, settings)
    write_json(run / "settings.json", dataclasses.asdict(settings))
    parts = [slice(worker, None, settings.workers) for worker in range(settings.workers)]
    started, smooth = time.monotonic() - spent, None

    def gradients(part: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = loss_at(step, part)
        return loss.detach(), torch.autograd.grad(loss, list(named.values()))

    def save() -> dict[str, Tensor]:
        state = {f"model.{name}": value for name, value in module.state_dict().items()}
        state |= {f"average.{name}": value for name, value in (average or {}).items()}
        for name, value in named.items():
            state |= {f"adam.{key}.{name}": moment for key, moment in optimiser.state[value].items()}
        write_tensors(run / "state.safetensors", state | {"step": torch.tensor(step)})
        weights = module.state_dict() | (average or {})
        if on_save is not None:
            on_save(step, weights)
        return weights

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with (
        Progress(*columns, TextColumn("loss {task.fields[loss]}")) as bar,
        (run / "log.jsonl").open("a", encoding="utf-8") as log,
        torch_threads(max(1, torch.get_num_threads() // settings.workers)),
        ThreadPoolExecutor(settings.workers) as pool,
    ):
        task = bar.add_task(label, total=settings.steps, completed=step, loss="-")
        try:
            while step < settings.steps:
                for group in optimiser.param_groups:
                    group["lr"] = settings.rate(step)
                losses, slopes = zip(*pool.map(gradients, parts), strict=True)
                for parameter, *shares in zip(named.values(), *slopes, strict=True):
                    parameter.grad = sum(shares) / len(shares)
                norm = nn.utils.clip_grad_norm_(named.values(), settings.clip)
                if not math.isfinite(value := sum(losses).item() / len(losses)):
                    raise FloatingPointError(
                        f"the loss is {value} at step {step}; lower the learning rate ({settings.lr})"
                    )
                optimiser.step()
                if average is not None:
                    keep = min(settings.ema, (step + 1) / (step + 10))
                    torch._foreach_lerp_(list(average.values()), [p.detach() for p in named.values()], 1 - keep)
                step += 1
                smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
                bar.update(task, completed=step, loss=f"{smooth:.4f}")
                if step % 10 == 0 or step == settings.steps:
                    figures = dict(loss=value, lr=settings.rate(step - 1), norm=float(norm))
                    row = {"step": step} | figures | {"seconds": time.monotonic() - started}
                    log.write(json.dumps({key: round(figure, 6) for key, figure in row.items()}) + "\n")
                    log.flush()
                if step % settings.save_every == 0 and step < settings.steps:
                    save()
        except KeyboardInterrupt:
            save()
            bar.console.print(f"stopped at step {step}; the same command resumes from {run}")
            raise
    return save()


def _resume(
    run: Path,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: dict[str, Tensor] | None,
    settings: Settings,
) -> tuple[int, float]:
    """Takes up what `run` holds of an earlier run: its last step, and the seconds that it took."""
    file = run / "state.safetensors"
    if not file.exists():
        (run / "log.jsonl").unlink(missing_ok=True)
        return 0, 0.0
    before = read_json(run / "settings.json")
    now = json.loads(json.dumps(dataclasses.asdict(settings)))
    changed = [name for name in now if name not in ("steps", "decay", "save_every") and before.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise CheckpointError(
            f"{run} was begun with {name}={before.get(name)!r}, not {now[name]!r}; keep it or use another folder"
        )
    state = read_tensors(file)
    step = int(state.pop("step"))
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        kind, _, rest = name.partition(".")
        parts.setdefault(kind, {})[rest] = value
    load_into(module, parts.get("model", {}), str(file))
    if average is not None:
        if average.keys() != parts.get("average", {}).keys():
            raise CheckpointError(f"{file} holds no moving average of this model; use another folder")
        for name, value in average.items():
            value.copy_(parts["average"][name])
    moments = parts.get("adam", {})
    for name, parameter in module.named_parameters():
        try:
            optimiser.state[parameter] = {
                "step": moments[f"step.{name}"].to(parameter.device),
                "exp_avg": moments[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": moments[f"exp_avg_sq.{name}"].to(parameter.device),
            }
        except KeyError as error:
            raise CheckpointError(f"{file} lacks the optimiser's {error}; use another folder") from error
    log = run / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rows = [row for row in rows if row["step"] <= step]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return step, rows[-1]["seconds"] if rows else 0.0


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
