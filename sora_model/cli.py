"""The `sora` command: generate and what begins with frames, info, reconstruct, patch, train, world, eval, policy,
verify, detect, redteam, certs, bench.

A mistake is a line, exit code 1.
Where it is to be written is tried before any work, and by `files.write_atomically`: whole or not at all.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from . import extras
from .arguments import Credentials, Device, Impl, Weights
from .cli_clips import clips
from .cli_safety import certs, detect, judge, redteam, verify
from .cli_train import training
from .cli_world import evaluate, worlds
from .terminal import bars, console, error, forgive_encodings, note, notes, plain, say

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.add_typer(clips)
app.add_typer(training, name="train")
app.add_typer(worlds, name="world")
app.add_typer(certs, name="certs")

out = console()
err = console(stderr=True)


def _show_version(asked: bool) -> None:
    if asked:
        from sora_kernels import __version__

        say(out, f"sora {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Text to video through the project's own kernels."""


@app.command()
def info(
    weights: Annotated[
        str, typer.Argument(metavar="DIR", help="Checkpoint folder, as of --weights.", show_default="toy")
    ] = "toy",
) -> None:
    """What runs on this machine, and what a checkpoint holds and needs."""
    from sora_kernels import info as kernels

    from . import wan, wan_check
    from .checkpoint import read_json
    from .pipeline import Sora

    index = Path(weights) / "model_index.json"
    if Path(weights).is_file() or (index.parent / "config.json").is_file() and not index.is_file():
        held = wan_check.look(Path(weights))
        kernels.main([])
        return say(out, f"{weights} is {held}: one model. {_WHERE}")
    if index.is_file() and (known := read_json(index)).get("_class_name") in wan.PIPELINES:
        return _wan_info(Path(weights), known)
    sora = Sora.from_pretrained(weights)
    kernels.main([])
    table = Table(title=plain(f"checkpoint {weights}"))
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("")
    text = getattr(sora.text, "model", sora.text)
    for name, module, about in (
        ("transformer", sora.dit, f"{sora.dit.config.layers} layers of width {sora.dit.config.dim}"),
        ("VAE", sora.vae, f"{sora.vae.config.z_dim} latent channels"),
        ("text encoder", text, f"width {sora.text.dim}, up to {sora.text.max_tokens} tokens"),
    ):
        table.add_row(name, f"{sum(p.numel() for p in module.parameters()):,}", about)
    out.print(table)
    height, width = sora.defaults.size
    say(out, f"made for {width}x{height}, {sora.defaults.frames} frames at {sora.defaults.fps:g} per second")
    if words := sora.text.words:
        say(out, f"it knows {len(words)} words: {', '.join(words)}")


_WHERE = (
    "In Python SoraDiT.from_wan or CausalVAE.from_wan reads it; for clips, put it into a checkpoint in the diffusers "
    "layout: a folder for each part, with its config.json, and model_index.json"
)


def _wan_info(folder: Path, index: dict[str, Any]) -> None:
    """Of a checkpoint that is too large to be loaded for that."""
    import torch

    from sora_kernels import info as kernels

    from . import machine, wan, wan_check
    from .machine import choose_device, gib
    from .planning import Sizes

    dit, vae = wan.configs(folder)
    parts, device = wan.parts_of(folder), choose_device(None)
    remarks = [remark for part in parts for remark in wan_check.compare(folder, part.name)]
    kernels.main([])
    table = Table(title=plain(f"checkpoint {folder}"))
    for name in ("part", "parameters", "on disk"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in parts:
        table.add_row(part.name, f"{part.parameters:,}", gib(part.bytes))
    out.print(table)
    for remark in remarks:
        say(out, remark)
    say(out, "names and shapes of the tensors are those that the configs ask for")
    for part in parts:
        if part.fp8:
            say(out, f"{part.name}: of its parameters {part.fp8:,} stay in fp8 and are widened layer by layer")
    say(out, wan.which(dit, index))
    free, made = machine.available(device), wan.defaults(dit, index)
    (height, width), frames = made["size"], made["frames"]
    say(out, f"on {device}, where {gib(free)} of memory are free, a clip of {frames} frames of {width}x{height} takes")
    for dtype in (torch.float32, torch.bfloat16):
        held, largest = wan.weights_in(parts, dtype), max(wan.weights_in([part], dtype) for part in parts)
        if device.type != "cpu" and held > 0.9 * free:  # as Sora.from_pretrained has it
            held, turns = largest, " of the largest part, as they take turns,"
        else:
            turns = ""
        needed, fits = Sizes(dit, vae, dtype).clip(frames, height, width, max(0, free - held))
        enough = "too little memory" if held >= free else fits or "fits"
        say(out, f"  in {str(dtype).removeprefix('torch.')}: {gib(held)} of weights{turns} and {gib(needed)}: {enough}")


@app.command()
def reconstruct(
    source: Annotated[Path, typer.Argument(help="A video file; its height and width must be multiples of 8.")],
    to: Annotated[Path, typer.Option("--out", help="The MP4 to write.")] = Path("out/reconstruction.mp4"),
    weights: Weights = "toy",
    impl: Impl = "auto",
    device: Device = None,
    credentials: Credentials = True,
) -> None:
    """Send a video through a checkpoint's VAE and back, and say what that loses."""
    from .files import make_folder
    from .machine import check_impl
    from .media import check_target
    from .reconstruct import load_vae, remarks
    from .reconstruct import reconstruct as run
    from .safety.credentials import signing

    check_impl(impl)
    if to == Path("out/reconstruction.mp4"):
        make_folder(to.parent)
    check_target(to)
    vae = load_vae(weights, device=device)
    vae.impl = impl
    with notes(err), signing(credentials), bars(err) as progress:

        def told(done: int, total: int | None) -> None:
            for remark in [] if done else remarks(source, vae, weights):
                note(err, remark)
            progress("frames", done, total)

        result = run(vae, source, to, progress=told)
    say(out, f"wrote {result.path}: {result.frames} frames, PSNR {result.psnr:.2f} dB")


@app.command()
def patch(
    folder: Annotated[Path, typer.Argument(help="A pipeline or a model in the diffusers layout.")],
    grid: Annotated[str, typer.Option(help="FRAMESxROWSxCOLUMNS of a transformer's tokens.")] = "21x30x52",
    verify: Annotated[bool, typer.Option(help="Load the weights and compare with the host, gradients too.")] = False,
) -> None:
    """Say what `patch_model` would replace in a diffusers pipeline, and the memory traffic that this saves."""
    if not (match := re.fullmatch(r"(\d{1,5})x(\d{1,5})x(\d{1,5})", grid)) or "0" in match.groups():
        raise ValueError(f"--grid must be FRAMESxROWSxCOLUMNS of tokens, such as 21x30x52, got {grid!r}")
    with extras.named("sora patch"):
        import diffusers  # noqa: F401
    from sora_kernels.integrations import directory

    for part in directory.inspect(folder, tuple(map(int, match.groups())), verify=verify):
        for line in str(part).splitlines():
            say(out, line)
        if part.verification is not None and not part.verification.ok:
            raise ValueError(f"{part.name or folder} does not agree with the host; see above")


app.command("eval")(evaluate)
app.command("policy")(judge)
app.command()(verify)
app.command()(detect)
app.command()(redteam)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure the kernels: arguments as of `python -m benchmarks.run` (try --help), or `report RESULTS`, a page."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "run.py").is_file():
        raise FileNotFoundError(
            f"the benchmarks are no part of the package installed in {root}; get a copy of the project, which holds "
            "them, and run `make bench` there, or `sora bench` after `pip install -e '.[model,bench]'` there"
        )
    sys.path.insert(0, str(root))
    drawn = context.args[:1] == ["report"]
    module = importlib.import_module("benchmarks.page" if drawn else "benchmarks.run")
    raise typer.Exit(module.main(context.args[drawn:]))


def _changed(settings: Any, **changes: Any) -> Any:
    return dataclasses.replace(settings, **{name: value for name, value in changes.items() if value is not None})


def _end(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def wait_politely() -> None:
    """Let threads that wait for each other sleep, unless the user's environment says otherwise.

    By default libgomp lets them spin for milliseconds after each loop. Beside another busy process the thread that is
    waited for is then the one without a processor, and two threads took three times as long as one. To be called before
    torch is imported, with which libgomp reads this.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main() -> None:
    """The entry point: runs the app; expected errors become one line and exit code 1.

    SIGTERM and SIGHUP end it as an exception does, so that no half-written file stays behind.
    """
    wait_politely()
    from sora_kernels._dispatch import Unavailable

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # under nohup, say, SIGHUP is ignored
            signal.signal(number, _end)
    forgive_encodings()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as end:
        broken = end if isinstance(end, BrokenPipeError) else end.__context__  # of which typer makes an exit code of 1
        if not isinstance(broken, BrokenPipeError):
            raise
        # the reader, such as head, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError, FloatingPointError, Unavailable, extras.MissingExtra) as failure:
        error(err, failure)
        sys.exit(1)


if __name__ == "__main__":
    main()
