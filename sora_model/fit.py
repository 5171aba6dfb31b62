"""A training loop that resumes bit for bit: Muon and AdamW, gradient clipping, a moving average of the weights, a log.

The state is safetensors, written atomically every `save_every` steps and when the run is asked to stop. The loop draws
no random number: what a step needs comes from `steps.generator_of(seed, step)`, so a run that was stopped and resumed
equals one that was not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import files
from .checkpoint import check_shapes, load_into, read_tensors, write_json, write_tensors
from .muon import Muon
from .ranks import RankError, Ranks, told_of_loss
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
    result_of,
    rewind,
    state_of,
    torch_threads,
    written,
)


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
    it is of another model, of other settings but `steps`, `decay`, `save_every`, `workers` and `loaders`, or of another
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
    with told_of_loss("before the first step"):
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
    average = {name: value.detach().clone() for name, value in named.items()} if settings.ema else {}

    def write_state() -> None:
        state = state_of(module, optimiser, average) | {"step": torch.tensor(step)}
        write_tensors(run / "state.safetensors", state)

    def save() -> dict[str, Tensor]:
        write_state()
        weights = module.state_dict() | average
        if on_save is not None:
            on_save(step, weights)
        return weights

    with ranks.leading(parameters), files.exclusive(run):
        step, spent = _resume(run, module, optimiser, average, settings, made_with)
        with (
            journal(run, label, settings, step, spent) as told,
            torch_threads(max(1, threads // settings.workers)),
            ThreadPoolExecutor(settings.workers) as pool,
            drawn_ahead(batch_at, range(step, settings.steps), settings.loaders) as batches,
            no_garbage_before(),
            noted_signals() as stop,
        ):
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
                settings.check_finite(step, value, norm)
                with torch_threads(threads):
                    optimiser.step()
                if average:
                    settings.follow(list(average.values()), parameters, step)
                step += 1
                told(step, value, norm, len(batch[0]))
                if step % settings.save_every == 0 and step < settings.steps:
                    save()
            weights = save()
    if stop:
        print(f"stopped at step {step}; the same command resumes from {run}")
        act_upon(stop[0])
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
    losses, slopes = zip(*map(result_of, computed), strict=True)
    if len(parts) == ranks.size == 1:
        return losses[0].item(), list(slopes[0])
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
        no_garbage_before(),
        noted_signals() as stop,
    ):
        batches = None
        while (step := ranks.receive(weights)) is not None:
            if batches is None:
                ahead = drawn_ahead(batch_at, range(step, settings.steps), settings.loaders)
                batches = stack.enter_context(ahead)
            ranks.sum(*_own_share(ranks, weights, next(batches), gradients, pool, settings.workers), step)
    if stop:
        act_upon(stop[0])


def _resume(
    run: Path,
    module: nn.Module,
    optimiser: Muon,
    average: dict[str, Tensor],
    settings: Settings,
    made_with: Mapping[str, Any],
) -> tuple[int, float]:
    """Takes up what `run` holds of an earlier run: its last step, and the seconds that it took."""
    file = run / "state.safetensors"
    now = written(settings, made_with)
    check_form(run, divided=False)
    if not file.exists():
        write_json(run / "settings.json", now)
        return 0, rewind(run, 0)
    check_begun(run, now)
    state = read_tensors(file, also=[torch.int64])
    wanted = {f"model.{name}": value.shape for name, value in module.state_dict().items()}
    wanted |= {f"average.{name}": value.shape for name, value in average.items()}
    for name, parameter in module.named_parameters():
        kept = optimiser.kept(parameter)
        wanted |= {f"optimiser.{key}.{name}": () if key == "step" else parameter.shape for key in kept}
    check_shapes(wanted | {"step": ()}, {name: value.shape for name, value in state.items()}, str(file))
    step = int(state["step"])
    check_left(run, step, settings)
    load_into(module, {name: state[f"model.{name}"] for name in module.state_dict()}, str(file))
    for name, value in average.items():
        value.copy_(state[f"average.{name}"])
    for name, parameter in module.named_parameters():
        moments = {key: state[f"optimiser.{key}.{name}"] for key in optimiser.kept(parameter)}
        optimiser.state[parameter] = {
            key: value.to(parameter.device) if key == "step" else _laid_out(parameter, value)
            for key, value in moments.items()
        }
    write_json(run / "settings.json", now)
    return step, rewind(run, step)


def _laid_out(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` laid out as a parameter is: the fused AdamW pairs numbers by where they lie in memory."""
    if (value.stride(), value.dtype, value.device) == (parameter.stride(), parameter.dtype, parameter.device):
        return value
    return torch.empty_like(parameter, requires_grad=False).copy_(value)
