"""`sora world` and `sora eval`: true clips, and a checkpoint measured against them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .arguments import OWN, Credentials, Device, Impl, Weights, parse_size
from .terminal import bars, console, note, notes, say

worlds = typer.Typer(help="The procedural world: clips whose truth is known.", no_args_is_help=True)

out = console()
err = console(stderr=True)


@worlds.command("render")
def render(
    to: Annotated[Path, typer.Option("--out", help="Folder for the clips; made when missing.")] = Path("out/world"),
    scene: Annotated[str | None, typer.Option(help="bounce, parabola, occluder, ...", show_default="drawn")] = None,
    n: Annotated[int, typer.Option("--n", min=1, max=100_000, help="Clips.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first clip; each further one is one more.")] = 0,
    seconds: Annotated[float, typer.Option(help="Length of each clip.")] = 17 / 8,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT, such as 64x64.")] = "256x256",
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 8,
    style: Annotated[str | None, typer.Option(help="flat, outline, neon or sketch.", show_default="drawn")] = None,
    split: Annotated[str, typer.Option(help="train, held_out (pairs that training never shows) or all.")] = "train",
    credentials: Credentials = True,
) -> None:
    """Write true clips of the world, each an MP4, and beside it its caption and state as JSON."""
    from . import world
    from .checkpoint import write_json
    from .files import make_folder
    from .media import write_video
    from .safety.credentials import Origin, signing

    if not 0 < seconds * fps < 1e6:
        raise ValueError(f"--seconds x --fps must be from 1 to 1e6 frames, got {seconds:g} x {fps:g}")
    spec = None if style is None else {"style": style}
    options = dict(scene=scene, frames=max(1, round(seconds * fps)), size=parse_size(size), fps=fps, split=split)
    with notes(err), signing(credentials):
        for number in range(seed, seed + n):
            clip = world.sample(number, prompt_spec=spec, **options)
            make_folder(to)
            name = f"{clip.scene.name}-{number}"
            origin = Origin({"scene": clip.scene.name, "seed": number}, source="algorithmicMedia")
            write_video(to / f"{name}.mp4", clip.video, fps, origin=origin)
            write_json(to / f"{name}.json", clip.record())
            say(out, f"wrote {to / name}.mp4: {clip.caption}")


def evaluate(
    weights: Weights = "toy",
    to: Annotated[Path, typer.Option("--out", help="The JSON file to write.")] = Path("out/eval.json"),
    seed: Annotated[int, typer.Option(help="Seed of every clip.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.", show_default=OWN)] = None,
    guidance: Annotated[float | None, typer.Option(help="How strongly to follow the prompt.", show_default=OWN)] = None,
    each: Annotated[int, typer.Option(min=1, max=1000, help="Prompts of each scene, trained pairs and unseen.")] = 4,
    continuations: Annotated[
        int, typer.Option(min=0, max=1000, help="True clips of each scene to continue; 0 for none.")
    ] = 2,
    occlusions: Annotated[
        int, typer.Option(min=0, max=1000, help="Longer ones of each scene that hides things, for the permanence.")
    ] = 5,
    verbs: Annotated[
        int, typer.Option(min=0, max=1000, help="True clips of each flat scene to restyle and to loop; 0 for none.")
    ] = 1,
    long: Annotated[float | None, typer.Option(help="Also clips of so many seconds.", show_default="none")] = None,
    ways: Annotated[
        str | None,
        typer.Option(help="How to make those: any of once,stream,pieces.", show_default="as sora generate"),
    ] = None,
    sizes: Annotated[str | None, typer.Option(help="Other sizes, such as 96x64,64x96.", show_default="none")] = None,
    impl: Impl = "auto",
    device: Device = None,
) -> None:
    """Measure a checkpoint against the world: JSON, tables, and a page with clips side by side beside the JSON."""
    from . import evaluate as measure
    from . import world
    from .files import make_folder, naming, write_atomically
    from .machine import check_impl
    from .page import write_page
    from .pipeline import Sora
    from .planning import LONG

    check_impl(impl)
    others = [parse_size(size, "--sizes") for size in sizes.split(",")] if sizes else []
    how = ways.split(",") if ways else []
    if wrong := [way for way in how if way not in LONG]:
        raise ValueError(f"--ways must be any of {', '.join(LONG)}, with commas between; got {wrong[0]!r}")
    if long is not None and not 4 <= long <= 3600:
        raise ValueError(f"--long must be from 4 to 3600 seconds, got {long:g}")
    if to == Path("out/eval.json"):
        make_folder(to.parent)
    page, clips = to.with_suffix(".html"), []
    if page == to:
        raise ValueError(f"--out is the JSON file, beside which the page {page.name} is written; name it .json")
    with write_atomically(to) as part, write_atomically(page) as document:
        sora = Sora.from_pretrained(weights, device=device)
        prompts = world.eval_prompts(each)
        if unknown := sora.text.unknown(" ".join(prompt for prompt, _ in prompts)):
            note(err, f"this checkpoint does not know these words of the prompts: {', '.join(unknown)}")
        with warnings.catch_warnings(), bars(err) as progress:
            warnings.simplefilter("ignore", UserWarning)  # of each prompt: said above
            result = measure.evaluate(
                sora, prompts=prompts, seed=seed, steps=steps, guidance=guidance, impl=impl,
                continuations=continuations, occlusions=occlusions, verbs=verbs, long=long, ways=how, sizes=others,
                progress=progress,
                keep=lambda *clip: clips.append(clip),
            )  # fmt: skip
        with naming(to):
            part.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        with naming(page):
            write_page(document, result, clips, sora.defaults.fps, sora.folder)
    for table in measure.tables(result):
        out.print(table)
    say(out, f"VAE: {result['vae']['psnr']} dB; wrote {to} and {page}")
