"""The `sora` command: info, generate, reconstruct, train, eval, bench. A mistake is one line and an exit code of 1."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(
    help="Text to video through the project's own kernels.", no_args_is_help=True, pretty_exceptions_enable=False,
    add_completion=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
training = typer.Typer(help="Train the toy checkpoint: first the VAE, then the transformer.", no_args_is_help=True)
app.add_typer(training, name="train")

out = Console()
err = Console(stderr=True)

Weights = Annotated[
    str, typer.Option(help="Checkpoint folder (own, or Wan 2.1's in the diffusers layout), or 'toy'.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU where there is one.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same weights.")]
Steps = Annotated[int | None, typer.Option(help="Steps of training.")]
Batch = Annotated[int | None, typer.Option(help="Clips in a step.")]
Rate = Annotated[float | None, typer.Option(help="Learning rate.")]
Run = Annotated[Path, typer.Option(help="Folder of the run; one that was stopped is resumed.")]
Impl = Annotated[str, typer.Option(help="Kernels: auto, reference, cpu, triton or cuda.")]


@app.command()
def info(weights: Weights = "toy") -> None:
    """What runs on this machine, and what a checkpoint holds."""
    from sora_kernels import info as kernels

    from .pipeline import Sora

    kernels.main([])
    sora = Sora.from_pretrained(weights)
    table = Table(title=f"checkpoint {weights}")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("")
    text = getattr(sora.text, "model", sora.text)
    for name, module, note in (
        ("transformer", sora.dit, f"{sora.dit.config.layers} layers of width {sora.dit.config.dim}"),
        ("VAE", sora.vae, f"{sora.vae.config.z_dim} latent channels"),
        ("text encoder", text, f"width {sora.text.dim}, up to {sora.text.max_tokens} tokens"),
    ):
        table.add_row(name, f"{sum(p.numel() for p in module.parameters()):,}", note)
    out.print(table)
    height, width = sora.defaults.size
    out.print(f"made for {width}x{height}, {sora.defaults.frames} frames at {sora.defaults.fps:g} per second")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the clip shows, such as 'a red circle bounces'.")],
    to: Annotated[Path, typer.Option("--out", help="The MP4 to write.")] = Path("out/clip.mp4"),
    weights: Weights = "toy",
    seconds: Annotated[float | None, typer.Option(help="Length of the clip.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, such as 64x64.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same clip.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strongly to follow the prompt.")] = None,
    attention: Annotated[
        str | None, typer.Option(help="Self-attention: full, window=TxHxW[,stride=TxHxW][,sink=N], causal=frame.")
    ] = None,
    impl: Impl = "auto",
    device: Device = None,
) -> None:
    """Make a clip of what PROMPT says."""
    from .pipeline import Sora
    from .text import check_prompt

    check_prompt(prompt)
    options: dict[str, Any] = dict(seconds=seconds, fps=fps, seed=seed, steps=steps, guidance=guidance, impl=impl)
    options |= {"size": None if size is None else _size(size), "attention": attention}
    if to == Path("out/clip.mp4"):
        to.parent.mkdir(exist_ok=True)
    with err.status("loading the checkpoint"):
        sora = Sora.from_pretrained(weights, device=device)
    with _bars() as bar, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        path = sora.generate_to(to, prompt, progress=progress, **options)
    for warning in caught:
        if warning.category is UserWarning:
            err.print(f"[yellow]note:[/] {escape(str(warning.message))}", highlight=False)
    out.print(f"wrote {path}", highlight=False, soft_wrap=True)


@app.command()
def reconstruct(
    source: Annotated[Path, typer.Argument(help="A video file; its height and width must be multiples of 8.")],
    to: Annotated[Path, typer.Option("--out", help="The MP4 to write.")] = Path("out/reconstruction.mp4"),
    weights: Weights = "toy",
    impl: Impl = "auto",
    device: Device = None,
) -> None:
    """Send a video through a checkpoint's VAE and back, and say what that loses."""
    from .reconstruct import load_vae
    from .reconstruct import reconstruct as run

    if to == Path("out/reconstruction.mp4"):
        to.parent.mkdir(exist_ok=True)
    vae = load_vae(weights, device=device)
    vae.impl = impl
    with _bars() as bar:
        task = bar.add_task("frames", total=None)
        result = run(vae, source, to, progress=lambda done, total: bar.update(task, completed=done, total=total))
    if result.left_out:
        err.print(f"[yellow]note:[/] not in it: {', '.join(result.left_out)}", highlight=False, soft_wrap=True)
    told = f"wrote {result.path}: {result.frames} frames, PSNR {result.psnr:.2f} dB"
    out.print(told, highlight=False, soft_wrap=True)


@training.command("vae")
def train_vae(
    run: Run = Path("out/train/vae"),
    steps: Steps = None,
    batch: Batch = None,
    lr: Rate = None,
    seed: Seed = None,
    impl: Impl = "auto",
    device: Device = None,
) -> None:
    """Train the VAE on clips of the procedural world."""
    from . import train

    settings = _changed(train.VAE_SETTINGS, steps=steps, batch=batch, lr=lr, seed=seed)
    train.train_vae(run, settings, device=device or "cpu", impl=impl)
    out.print(f"wrote {run / 'model.safetensors'}", highlight=False)


@training.command("dit")
def train_dit(
    run: Run = Path("out/train/dit"),
    vae: Annotated[Path, typer.Option(help="Folder of a VAE run, or vae/ of a checkpoint.")] = Path("out/train/vae"),
    checkpoint: Annotated[Path, typer.Option(help="Where every save writes the checkpoint.")] = Path("out/toy"),
    steps: Steps = None,
    batch: Batch = None,
    lr: Rate = None,
    seed: Seed = None,
    clips: Annotated[int, typer.Option(min=1, help="Clips to encode and learn from.")] = 5000,
    impl: Impl = "auto",
    device: Device = None,
) -> None:
    """Train the transformer and its text encoder on the VAE's latents, and write a checkpoint."""
    from . import train
    from .files import naming
    from .pipeline import Sora

    settings = _changed(train.DIT_SETTINGS, steps=steps, batch=batch, lr=lr, seed=seed)
    coder = train.load_vae(vae)
    with naming(checkpoint):
        checkpoint.mkdir(parents=True, exist_ok=True)

    def save(dit: Any, text: Any, step: int) -> None:
        Sora(dit, coder.cpu(), text, train.TOY_DEFAULTS).save_pretrained(checkpoint)
        train.write_record(checkpoint, vae=vae, dit=run, command=["sora", *sys.argv[1:]], step=step)

    train.train_dit(run, coder, settings, clips=clips, device=device or "cpu", impl=impl, on_save=save)
    out.print(f"wrote {checkpoint}", highlight=False)


@app.command("eval")
def evaluate(
    weights: Weights = "toy",
    to: Annotated[Path, typer.Option("--out", help="The JSON file to write.")] = Path("out/eval.json"),
    seed: Annotated[int, typer.Option(help="Seed of every clip.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strongly to follow the prompt.")] = None,
    impl: Impl = "auto",
    device: Device = None,
) -> None:
    """Score a checkpoint: do clips of prompts it never saw show what they say?"""
    from . import evaluate as measure
    from .checkpoint import write_json
    from .pipeline import Sora

    sora = Sora.from_pretrained(weights, device=device)
    with _bars() as bar:
        task = bar.add_task("clips", total=None)
        result = measure.evaluate(
            sora, seed=seed, steps=steps, guidance=guidance, impl=impl,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    write_json(to, result)
    table = Table(title=f"{result['prompts']} prompts never trained on, seed {seed}")
    for column in ("", *measure.QUESTIONS):
        table.add_column(column, justify="left" if not column else "right")
    for name, key in (
        ("clips", "score"),
        ("of unseen pairs", "held_out"),
        ("true clips", "floor"),
        ("true clips, coded", "vae"),
    ):
        table.add_row(
            name, *("-" if (share := result[key][q]) is None else f"{share:.0%}" for q in measure.QUESTIONS)
        )
    out.print(table)
    out.print(f"VAE: {result['vae']['psnr']} dB; wrote {to}", highlight=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure the kernels; arguments are those of `python -m benchmarks.run` (try --help)."""
    if importlib.util.find_spec("benchmarks") is None:
        raise FileNotFoundError(
            "the benchmarks are not part of the installed package; run this in a checkout of the project"
        )
    raise typer.Exit(subprocess.run([sys.executable, "-m", "benchmarks.run", *context.args], check=False).returncode)


def _size(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d{1,9})[xX](\d{1,9})", text.strip())):
        raise ValueError(f"--size must be WIDTHxHEIGHT in pixels, such as 64x64, got {text!r}")
    return int(match[2]), int(match[1])


def _changed(settings: Any, **changes: Any) -> Any:
    return dataclasses.replace(settings, **{name: value for name, value in changes.items() if value is not None})


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=err
    ) as bar:
        yield bar


def _end(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def main() -> None:
    """The entry point: runs the app; expected errors become one line and exit code 1.

    SIGTERM and SIGHUP end it as an exception does, so that no half-written file stays behind.
    """
    from sora_kernels._dispatch import Unavailable

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # under nohup, say, SIGHUP is ignored
            signal.signal(number, _end)
    try:
        app()
    except (ValueError, OSError, FloatingPointError, Unavailable) as error:
        message = escape(" ".join(str(error).split()))
        err.print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
