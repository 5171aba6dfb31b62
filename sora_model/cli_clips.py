"""The commands that make a clip: `sora generate`, and those that begin with frames."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .arguments import OWN, WAIT, Credentials, Device, Impl, Wait, Weights, parse_guidance, parse_size
from .terminal import bars, console, notes, say

clips = typer.Typer()

out = console()
err = console(stderr=True)

_TO = Path("out/clip.mp4")
Source = Annotated[Path, typer.Argument(help="A video file, or an image.")]
Seconds = Annotated[float | None, typer.Option(help="Length of the clip.", show_default=OWN)]
More = Annotated[float, typer.Option(help="Length of what is made.")]


def _write(
    make: Callable[..., list[str]],
    prompt: Annotated[str, typer.Argument(help="What the clip shows, such as 'a red circle bounces around'.")],
    to: Annotated[Path, typer.Option("--out", help="The MP4 to write.")] = _TO,
    weights: Weights = "toy",
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT, such as 64x64.", show_default=OWN)] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second.", show_default=OWN)] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same clip.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler.", show_default=OWN)] = None,
    guidance: Annotated[
        str | None,
        typer.Option(
            help="How strongly to follow the prompt: a number, or of two experts HIGH,LOW, such as 4.0,3.0.",
            show_default=OWN,
        ),
    ] = None,
    negative: Annotated[str, typer.Option(help="What the guidance leads away from.", show_default="nothing")] = "",
    shift: Annotated[float | None, typer.Option(help="Of the times toward noise.", show_default=OWN)] = None,
    loras: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", help="FILE or FILE:WEIGHT; of two experts, FILE:WEIGHT:high or :low. Any number.",
            show_default="none",
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Self-attention: full, causal=frame, or window=TxHxW and, after commas, stride=TxHxW and sink=N.",
            show_default=OWN,
        ),
    ] = None,
    impl: Impl = "auto",
    device: Device = None,
    credentials: Credentials = True,
    apart: Annotated[
        bool, typer.Option("--apart", help="Under torchrun: each half of the processes loads one of two experts.")
    ] = False,
    wait: Wait = WAIT,
) -> None:
    """Loads the checkpoint, lets `make(sora, to, prompt, **options)` write, and says what it says.

    Under torchrun all processes make one clip, and the first of them writes it.
    """
    from . import experts, lora, parallel, ranks
    from .files import make_folder
    from .machine import check_impl
    from .media import check_target
    from .pipeline import Sora
    from .safety.credentials import sealer, signing
    from .text import check_prompt

    with notes(err), signing(credentials):
        check_prompt(prompt)
        options: dict[str, Any] = dict(fps=fps, seed=seed, steps=steps, attention=attention)
        options |= {"guidance": None if guidance is None else parse_guidance(guidance)}
        options |= {"impl": impl, "size": None if size is None else parse_size(size)}
        options |= {"negative": negative, "shift": shift}
        check_impl(impl)
        if to == _TO:
            make_folder(to.parent)
        check_target(to)
        sealer(to.name)
        with ranks.started(device, wait=wait) as own, ranks.spare(to) as (first, to):
            expert = experts.own() if apart else None
            with err.status("loading the checkpoint"):
                sora = Sora.from_pretrained(weights, device=own, expert=expert)
                for text in loras or ():
                    file, weight, expert = lora.parse(text)
                    sora.load_lora(file, weight, expert=expert)
            with parallel.sampling(sora, guidance=options["guidance"]), bars(err) as progress:
                said = make(sora, to, prompt, progress=progress if first else None, **options)
    for line in said if first else ():
        say(out, line)


def _command(make: Callable[..., list[str]]) -> Callable[..., None]:
    """A command of `make(sora, to, prompt, ..., **options)`: its own arguments, then those that all of them share."""
    own = list(inspect.signature(make, eval_str=True).parameters.values())[3:-1]
    shared = list(inspect.signature(_write, eval_str=True).parameters.values())[1:]

    def command(**given: Any) -> None:
        mine = {parameter.name: given.pop(parameter.name) for parameter in own}
        _write(lambda *fixed, **options: make(*fixed, **mine, **options), **given)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own + shared]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = make.__doc__
    return clips.command(make.__name__)(command)


def _saved(clip: Any, to: Path) -> list[str]:
    return [f"wrote {clip.save(to)}"]


@_command
def generate(
    sora: Any,
    to: Path,
    prompt: str,
    seconds: Seconds = None,
    long: Annotated[
        str | None,
        typer.Option(
            help="How to make what is longer than the clips of training: once, stream or pieces.",
            show_default="stream where the checkpoint can",
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Clips, of the seeds SEED, SEED + 1, ...")] = 1,
    shade: Annotated[
        bool, typer.Option("--shade", help="Mark the noise that the clip is drawn from, too: another clip.")
    ] = False,
    pick: Annotated[
        str,
        typer.Option(help="Of several: all, a file each, or best, the one that shows most of what PROMPT says."),
    ] = "all",
    **options: Any,
) -> list[str]:
    """Make a clip of what PROMPT says."""
    from . import checks, choose, ranks
    from .media import check_target
    from .safety import limits

    checks.whole("--n", n, 1, limits.current().clips)
    if pick not in ("all", "best"):
        raise ValueError(f"--pick must be all or best; got {pick!r}")
    ranks.Ranks().agree({"--n": n, "--pick": pick})
    options |= {"seconds": seconds, "long": long, "shade": shade}
    if n == 1:
        return [f"wrote {sora.generate_to(to, prompt, **options)}"]
    first = options.pop("seed")
    seeds = range(first, first + n)
    if pick == "best":
        choose.program_of(prompt)
        clip, verdicts = choose.best(sora.generate(prompt, seed=seed, **options) for seed in seeds)
        lines = [
            f"seed {seed}: {verdict.truth:.0%} of what is said, the right count in {verdict.steady:.0%} of the frames, "
            f"rigidity {verdict.rigidity:.2f}"
            for seed, verdict in zip(seeds, verdicts, strict=True)
        ]
        return [*lines, f"wrote {clip.save(to)}: seed {clip.seed}"]
    files = {seed: to.with_stem(f"{to.stem}-{seed}") for seed in seeds}
    for file in files.values():
        check_target(file)
    return [f"wrote {sora.generate_to(file, prompt, seed=seed, **options)}" for seed, file in files.items()]


@_command
def animate(
    sora: Any,
    to: Path,
    prompt: str,
    image: Annotated[Path, typer.Argument(help="The first frame: an image, or a video, of which the first counts.")],
    last: Annotated[
        Path | None, typer.Option(help="The last frame: an image, or a video.", show_default="none")
    ] = None,
    seconds: Seconds = None,
    **options: Any,
) -> list[str]:
    """Make a clip that begins with IMAGE."""
    return _saved(sora.animate(image, prompt, last=last, seconds=seconds, **options), to)


@_command
def extend(
    sora: Any,
    to: Path,
    prompt: str,
    clip: Source,
    seconds: More = 1.0,
    backward: Annotated[bool, typer.Option("--backward", help="Before its beginning, not after its end.")] = False,
    **options: Any,
) -> list[str]:
    """Let CLIP go on."""
    return _saved(sora.extend(clip, prompt, seconds=seconds, backward=backward, **options), to)


@_command
def connect(
    sora: Any,
    to: Path,
    prompt: str,
    first: Source,
    second: Source,
    seconds: More = 1.0,
    **options: Any,
) -> list[str]:
    """Lead from the end of FIRST to the beginning of SECOND."""
    return _saved(sora.connect(first, second, prompt, seconds=seconds, **options), to)


@_command
def loop(sora: Any, to: Path, prompt: str, clip: Source, seconds: More = 1.0, **options: Any) -> list[str]:
    """Lead from the end of CLIP to its beginning, so that it can be played in a circle."""
    return _saved(sora.loop(clip, prompt, seconds=seconds, **options), to)


@_command
def interpolate(
    sora: Any,
    to: Path,
    prompt: str,
    clip: Source,
    factor: Annotated[int, typer.Option(help="As many times the frames and the rate.")] = 2,
    **options: Any,
) -> list[str]:
    """Put frames between those of CLIP."""
    return _saved(sora.interpolate(clip, prompt, factor=factor, **options), to)


Strength = Annotated[float, typer.Option(help="Noise that CLIP is mixed with: 0 keeps it, 1 keeps nothing of it.")]


@_command
def edit(sora: Any, to: Path, prompt: str, clip: Source, strength: Strength = 0.6, **options: Any) -> list[str]:
    """Make CLIP into what PROMPT says."""
    return _saved(sora.edit(clip, prompt, strength=strength, **options), to)


@_command
def restyle(sora: Any, to: Path, prompt: str, clip: Source, strength: Strength = 0.8, **options: Any) -> list[str]:
    """Keep the motion of CLIP and give it the look that PROMPT names."""
    return _saved(sora.restyle(clip, prompt, strength=strength, **options), to)


@_command
def inpaint(
    sora: Any,
    to: Path,
    prompt: str,
    clip: Source,
    box: Annotated[str, typer.Option(help="LEFT,TOP,RIGHT,BOTTOM of what is drawn anew, in pixels of the result.")],
    **options: Any,
) -> list[str]:
    """Draw a box of CLIP anew."""
    try:
        corners = [int(number) for number in box.split(",")]
    except ValueError:
        raise ValueError(f"--box must be LEFT,TOP,RIGHT,BOTTOM in pixels, such as 0,0,32,32; got {box!r}") from None
    return _saved(sora.inpaint(clip, prompt, box=corners, **options), to)
