"""How good is a checkpoint? Its clips read back and measured against the world, whose truth is known exactly.

`evaluate` asks four things. *Text*: do clips of fixed prompts show what their caption says? *Continuation*: given the
first half of a true clip, is what follows right (`world.measures`)? *Length*: what is left of a clip after so many
seconds? *Size*: does all this hold at sizes it was not trained on? Beside every figure stand those of the true clips
(the read-out's floor), of the true clips through the VAE (the best that any transformer could do), and of two
baselines: the last frame copied, and constant velocity. Means come with 95 % intervals over clips.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table

from . import flow, machine, world
from .frames import held, to_pixels, to_video
from .pipeline import Sora
from .world import baselines, measures
from .world.captions import Program
from .world.measures_summary import label, mean_of, permanence_curve, summary
from .world.measures_text import CLAIMS, text_truth
from .world.readout import read

QUESTIONS = CLAIMS
_TRUE_SEED = 10**13 + 10**6
Progress = Callable[[str, int, int], None]


def evaluate(
    sora: Sora,
    *,
    prompts: Sequence[tuple[str, Program]] | None = None,
    seed: int = 0,
    true_clips: int = 40,
    continuations: int = 2,
    long: float | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    progress: Progress | None = None,
    keep: Callable[[str, str, dict[str, np.ndarray]], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores `sora` on `prompts` (those of `world.eval_prompts()` by default), one clip each, made with `seed` and
    `options`, and on `continuations` true clips of every scene.

    Returns a JSON-ready dict: `score` (share of right answers to each of `QUESTIONS`, among the prompts that ask it),
    `held_out` (the same over prompts whose first colour and shape never occurred together in training), `floor` and
    `vae` (the same on true clips, and after encode and decode, with the mean `psnr` in dB), `intervals`, `shape`
    (rigidity and counts of the prompts' clips), `continuation` and `permanence` by predictor, `length` (with `long`
    seconds), `sizes` (H, W), and every prompt's own answers in `clips`. `keep(group, title, {name: frames})` is given
    clips that belong side by side. Sizes and `long` are refused, as by `generate`, before any work.
    """
    prompts = world.eval_prompts() if prompts is None else list(prompts)
    asked = [{"size": (height, width)} for height, width in sizes] + ([{"seconds": long}] if long else [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # given again when the clips are made
        for more in asked:  # what cannot be made is refused before what can be has taken its time
            sora._plan(prompts[0][0], seed=seed, **options | more)
    tell = progress or (lambda stage, done, total: None)
    rows, found = _prompted(sora, prompts, seed, tell, "clips", keep, options)
    true, coded, psnr = _true_clips(sora, true_clips)
    held = [row for row in rows if row["held_out"]]
    guidance = sora.defaults.guidance if options.get("guidance") is None else options["guidance"]
    result = {
        "prompts": len(rows),
        "seed": int(seed),
        "steps": int(options.get("steps") or sora.defaults.steps),
        "guidance": float(flow.pair(guidance)[0]),
        "score": _shares(rows),
        "held_out": _shares(held),
        "floor": _shares(true),
        "vae": _shares(coded) | {"psnr": psnr},
        "intervals": {name: _intervals(part) for name, part in (("score", rows), ("held_out", held))},
        "shape": summary(found),
        "clips": rows,
    }
    if continuations:
        result |= _continuations(sora, continuations, seed, tell, keep, options)
    if long:
        result["length"] = _length(sora, long, seed, tell, keep, options)
    if sizes:
        result["sizes"] = {}
        for height, width in sizes:
            some = prompts[:: max(1, len(prompts) // 16)]
            sized, shape = _prompted(
                sora, some, seed, tell, f"{width}x{height}", keep, options | {"size": (height, width)}
            )
            result["sizes"][f"{width}x{height}"] = {"score": _shares(sized), "shape": summary(shape)}
    return result


def _prompted(sora, prompts, seed: int, tell: Progress, stage: str, keep, options) -> tuple[list[dict], list[dict]]:
    """Each prompt's answers, and what can be measured of its clip."""
    rows, found = [], []
    for done, (prompt, program) in enumerate(prompts, 1):
        clip = sora.generate(prompt, seed=seed, **options)
        reading = read(clip.frames)
        answers = text_truth(clip.frames, program, clip.fps, reading)
        rows.append({"prompt": prompt, "held_out": program.things[0] in world.HELD_OUT, **answers})
        found.append(measures.prompted(clip.frames, program, clip.fps, reading))
        if keep is not None and done % max(1, len(prompts) // 16) == 0:
            wrong = [name for name, answer in answers.items() if answer is False]
            keep(f"prompts: {stage}", prompt, {"wrong: " + ", ".join(wrong) if wrong else "all true": clip.frames})
        tell(stage, done, len(prompts))
    return rows, found


def _true_clips(sora: Sora, count: int) -> tuple[list[dict], list[dict], float]:
    """Answers of true clips, of the same through the VAE, and the PSNR between the two."""
    true, coded, psnr, defaults = [], [], [], sora.defaults
    for seed in range(_TRUE_SEED, _TRUE_SEED + count):
        sample = world.sample(seed, frames=defaults.frames, size=defaults.size, fps=defaults.fps, split="all")
        pixels = reconstructed(sora, sample.video)
        error = (pixels.astype(np.float64) - sample.video) / 255
        psnr.append(-10 * math.log10(max(float((error**2).mean()), 1e-10)))
        true.append(text_truth(sample.video, sample.program, defaults.fps))
        coded.append(text_truth(pixels, sample.program, defaults.fps))
    return true, coded, round(float(np.mean(psnr)), 2)


@torch.no_grad()
def reconstructed(sora: Sora, video: np.ndarray) -> np.ndarray:
    """A clip uint8 `[T, H, W, 3]` through the VAE and back."""
    whole = held(video, sora.vae.config.fitting(len(video)))
    with machine.own_dtypes(sora.device):
        back = sora.vae.decode(sora.vae.encode(to_video(whole[None]).to(sora.device))[0])
        return to_pixels(back, sora.vae.impl)[: len(video)]


def predictors(sora: Sora, seed: int, options: dict[str, Any]) -> dict[str, Callable[[world.Sample, int], np.ndarray]]:
    """What continues a true clip from its first `known` frames, by name: the checkpoint, the floors, the baselines."""

    def checkpoint(truth: world.Sample, known: int) -> np.ndarray:
        wanted = len(truth.state.times)
        seconds = (wanted - known) / truth.fps
        prompt = truth.caption
        made = sora.extend(truth.video[:known], prompt, seconds=seconds, fps=truth.fps, seed=seed, **options).frames
        return np.concatenate([truth.video[:known], made[known:wanted]])

    return {
        "checkpoint": checkpoint,
        "copy last frame": baselines.copy_last,
        "constant velocity": baselines.constant_velocity,
        "true clips": lambda truth, known: truth.video,
        "true clips, coded": lambda truth, known: reconstructed(sora, truth.video),
    }


def _continuations(sora: Sora, each: int, seed: int, tell: Progress, keep, options) -> dict[str, Any]:
    """Measures of what each predictor makes of true clips, `each` of every scene."""
    defaults, by_name = sora.defaults, {}
    known = max(2, (defaults.frames + 1) // 2)
    makers = predictors(sora, seed, options)
    total = each * len(world.SCENES)
    for done in range(total):
        scene, number = world.SCENES[done % len(world.SCENES)], done // len(world.SCENES)
        truth = world.sample(
            _TRUE_SEED + 1000 * (done % len(world.SCENES)) + number,
            scene=scene,
            frames=2 * known + known // 2,
            size=defaults.size,
            fps=defaults.fps,
        )
        made = {name: make(truth, known) for name, make in makers.items()}
        for name, video in made.items():
            by_name.setdefault(name, []).append(measures.measure(video, truth, known))
            by_name[name][-1]["seam"] = measures.seam(video, [known])
        if keep is not None and number == 0:
            keep("continuation", f"{scene}: {truth.caption}", made)
        tell("continuations", done + 1, total)
    return {
        "known": known,
        "continuation": {name: summary(clips) for name, clips in by_name.items()},
        "permanence": {name: permanence_curve(clips) for name, clips in by_name.items()},
    }


def _length(sora: Sora, seconds: float, seed: int, tell: Progress, keep, options) -> dict[str, Any]:
    """Drift of clips of so many seconds by windows, beside that of true ones."""
    found: dict[str, list] = {"checkpoint": [], "true clips": []}
    scenes = ("bounce", "loop", "occluder")
    for done, scene in enumerate(scenes, 1):
        fps, size = sora.defaults.fps, sora.defaults.size
        truth = world.sample(_TRUE_SEED, scene=scene, frames=round(seconds * fps), size=size, fps=fps)
        clip = sora.generate(truth.caption, seconds=seconds, seed=seed, **options)
        things = list(truth.program.things)
        for name, video in (("checkpoint", clip.frames), ("true clips", truth.video)):
            found[name].append(measures.drift(video, things, fps))
        if keep is not None:
            keep("length", truth.caption, {f"{seconds:g} s, every 8th frame": clip.frames[::8]})
        tell("long clips", done, len(scenes))
    return {name: {key: _columns([one[key] for one in all_]) for key in all_[0]} for name, all_ in found.items()}


def _columns(rows: list[list[float | None]]) -> list[float | None]:
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=False)]
    return [round(float(np.mean(column)), 4) if column else None for column in columns]


def _shares(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The share of right answers to each question, among the rows that ask it; None where none does."""
    shares = {}
    for question in QUESTIONS:
        answers = [row[question] for row in rows if row[question] is not None]
        shares[question] = round(sum(answers) / len(answers), 4) if answers else None
    return shares


def _intervals(rows: Sequence[dict[str, Any]]) -> dict[str, list[float] | None]:
    """95 % intervals of `_shares`."""
    found = {}
    for question in QUESTIONS:
        one = mean_of([{"x": [float(row[question])]} for row in rows if row[question] is not None], "x")
        found[question] = None if one is None else [one["low"], one["high"]]
    return found


def tables(result: dict[str, Any]) -> list[Table]:
    """What `evaluate` found, for a terminal."""
    text = Table("", *QUESTIONS, title=f"text: {result['prompts']} prompts, seed {result['seed']}")
    for name, key in (("clips", "score"), ("of unseen pairs", "held_out"), ("true clips", "floor"),
                      ("true clips, coded", "vae")):  # fmt: skip
        text.add_row(name, *("-" if (share := result[key][q]) is None else f"{share:.0%}" for q in QUESTIONS))
    made = [text]
    if "continuation" in result:
        by_name = result["continuation"]
        made.append(Table("", *by_name, title=f"true clips continued from {result['known']} frames"))
        for name in dict.fromkeys(name for found in by_name.values() for name in found):
            cells = [found.get(name) for found in by_name.values()]
            made[-1].add_row(label(name), *("-" if c is None else f"{c['mean']:.3g}" for c in cells))
        lives = {name: curve["half_life"] for name, curve in result["permanence"].items()}
        made[-1].add_row(
            "permanence, half-life, s", *("-" if life is None else f"{life:.2g}" for life in lives.values())
        )
    if "length" in result:
        seconds = [f"{2 * i}-{2 * i + 2} s" for i in range(len(result["length"]["true clips"]["there"]))]
        few = range(0, len(seconds), max(1, len(seconds) // 8))
        made.append(Table("", *(seconds[i] for i in few), title="against time"))
        for who, found in result["length"].items():
            for name, row in found.items():
                made[-1].add_row(f"{who}: {name}", *("-" if row[i] is None else f"{row[i]:.2f}" for i in few))
    for size, found in result.get("sizes", {}).items():
        text.add_row(size, *("-" if (share := found["score"][q]) is None else f"{share:.0%}" for q in QUESTIONS))
    return made
