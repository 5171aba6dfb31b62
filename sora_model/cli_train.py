"""`sora train`: the VAE, then the transformer, by a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .arguments import WAIT, Impl, Wait
from .terminal import console, say

training = typer.Typer(help="Train the toy checkpoint: first the VAE, then the transformer.", no_args_is_help=True)

out = console()

Config = Annotated[Path | None, typer.Option(help="YAML file of settings; that of the toy checkpoint by default.")]
Changes = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Over the settings, such as dit_fit.steps=2000.")
]
TrainDevice = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
Run = Annotated[Path, typer.Option(help="Folder of the run; one that was stopped is resumed.")]


@training.command("vae")
def train_vae(
    changes: Changes = None,
    config: Config = None,
    run: Run = Path("out/train/vae"),
    start: Annotated[
        Path | None, typer.Option(help="VAE to begin with instead of random weights, of the same sizes.")
    ] = None,
    decoder: Annotated[
        bool, typer.Option("--decoder", help="Train the decoder alone: latents stay as --start has them.")
    ] = False,
    impl: Impl = "auto",
    device: TrainDevice = "cpu",
    wait: Wait = WAIT,
) -> None:
    """Train the VAE on clips of the procedural world; under torchrun, on all its processes."""
    from . import ranks, recipe, train
    from .machine import check_impl

    check_impl(impl)
    how = recipe.load(config or recipe.TOY, changes or ())
    with ranks.started(device, wait=wait) as own:
        begun = None if start is None else train.load_vae(start)
        train.train_vae(run, how, start=begun, decoder=decoder, device=own, impl=impl)
        if ranks.Ranks().rank == 0:
            say(out, f"wrote {run / 'model.safetensors'}")


@training.command("dit")
def train_dit(
    changes: Changes = None,
    config: Config = None,
    run: Run = Path("out/train/dit"),
    vae: Annotated[Path, typer.Option(help="Folder of a VAE run, or vae/ of a checkpoint.")] = Path("out/train/vae"),
    checkpoint: Annotated[Path, typer.Option(help="Where every save writes the checkpoint.")] = Path("out/toy"),
    start: Annotated[
        Path | None, typer.Option(help="Checkpoint to begin with instead of random weights, of the same sizes.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="In which the transformer computes: fp32, bf16, or auto: bf16 on a GPU.")
    ] = "auto",
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Keep no activations inside of blocks: less memory, a third more work."),
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Divide weights and optimiser among the processes of torchrun (FSDP2).")
    ] = False,
    cp: Annotated[int, typer.Option(help="Processes that share the tokens of a clip; divides as --shard.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Parts of a process' clips, one after the other; as --shard.")] = 1,
    impl: Impl = "auto",
    device: TrainDevice = "cpu",
    wait: Wait = WAIT,
) -> None:
    """Train the transformer and its text encoder on the VAE's latents; every save writes a checkpoint, and a sheet of
    samples into RUN/samples. Under torchrun each process takes a share of every batch."""
    import torch

    from . import ranks, recipe, train
    from .files import make_folder
    from .machine import check_impl
    from .pipeline import Sora

    check_impl(impl)
    computes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    computes["auto"] = computes["fp32" if device == "cpu" else "bf16"]
    if dtype not in computes:
        raise ValueError(f"dtype must be one of {', '.join(computes)}; got {dtype!r}")
    how = recipe.load(config or recipe.TOY, changes or ())

    def save(dit: Any, text: Any, step: int) -> None:
        sora = Sora(dit, coder, text, how.defaults)
        sora.save_pretrained(checkpoint)
        sora.folder = checkpoint
        train.write_record(checkpoint, vae=vae, dit=run, command=["sora", *sys.argv[1:]], step=step)
        if how.samples:
            train.write_sheet(run / "samples" / f"{step:06}.png", sora, how.samples, impl=impl)

    with ranks.started(device, alone=shard or (cp, accumulate) != (1, 1), wait=wait) as own:
        coder = train.load_vae(vae)
        begun = None if start is None else Sora.from_pretrained(start, device="cpu")
        make_folder(checkpoint)
        train.train_dit(
            run, coder, how, start=begun and (begun.dit, begun.text), device=own, dtype=computes[dtype],
            checkpointing=checkpointing, shard=shard, cp=cp, accumulate=accumulate, impl=impl, on_save=save,
        )  # fmt: skip
        if ranks.Ranks().rank == 0:
            say(out, f"wrote {checkpoint}")
