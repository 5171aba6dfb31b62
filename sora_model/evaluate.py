"""How good is a checkpoint? Its clips read back and measured against the world, whose truth is known exactly.

`evaluate` asks five things. *Text*: do clips of fixed prompts show what their caption says? *Continuation*: given the
first half of a true clip, is what follows right (`world.measures`)? *Length*: what is left of a clip after so many
seconds (`evaluate_long`)? *Verbs*: does a new style leave the motion, and is a circle closed (`evaluate_verbs`)?
*Size*: does all this hold at sizes it was not trained on? Beside every figure stand those of the true clips (the
read-out's floor), of the true clips through the VAE (the best that any transformer could do), and of baselines: the
last frame copied, and constant velocity. Means come with 95 % intervals over clips.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table

from . import evaluate_long, evaluate_verbs, flow, machine, world
from .frames import held, to_pixels, to_video
from .pipeline import Sora
from .world import baselines, measures, measures_long
from .world.captions import Program
from .world.measures_summary import mean_of, permanence_curve, rows_of, summary
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
    occlusions: int = 5,
    long: float | None = None,
    ways: Sequence[str] = (),
    verbs: int = 1,
    sizes: Sequence[tuple[int, int]] = (),
    progress: Progress | None = None,
    keep: Callable[[str, str, dict[str, np.ndarray]], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores `sora` on `prompts` (those of `world.eval_prompts()` by default), one clip each, made with `seed` and
    `options`, on `continuations` true clips of every scene, on `occlusions` longer ones of each scene that hides
    things, and on `verbs` of each that can be restyled.

    Returns a JSON-ready dict: `score` (share of right answers to each of `QUESTIONS`, among the prompts that ask it),
    `held_out` (the same over prompts whose first colour and shape never occurred together in training), `floor` and
    `vae` (the same on true clips, and after encode and decode, with the mean `psnr` in dB), `baselines` (on the first
    frame of true clips, on what their first two say of the rest, and on clips of other prompts), `intervals`, `shape`
    (rigidity and counts of the prompts' clips), `continuation` and `permanence` by predictor, `length` by windows and
    `length_means` (with `long` seconds, by each of `ways`, by default as `generate`), `verbs`, `sizes` (H, W), and
    every prompt's own answers in `clips`. `keep(group, title, {name: frames})` is given clips that belong side by side.
    Sizes and `long` are refused, as by `generate`, before any work.
    """
    prompts = world.eval_prompts() if prompts is None else list(prompts)
    asked: list[dict[str, Any]] = [{"size": (height, width)} for height, width in sizes]
    if long:
        asked += [{"seconds": long, "long": way} for way in ways or (None,)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # given again when the clips are made
        # what cannot be made is refused before what can be has taken its time
        plans = [sora._plan(prompts[0][0], seed=seed, **options | more) for more in asked]
    tell = progress or (lambda stage, done, total: None)
    rows, found, others = _prompted(sora, prompts, seed, tell, "clips", keep, options)
    true, coded, psnr, simple = _true_clips(sora, true_clips, sora.defaults.size)
    simple["clips of other prompts"] = others
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
        "baselines": {name: _shares(part) for name, part in simple.items()},
        "intervals": {
            name: _intervals(part)
            for name, part in (("score", rows), ("held_out", held), ("floor", true), ("vae", coded), *simple.items())
        },
        "shape": summary(found),
        "clips": rows,
    }
    if continuations:
        result |= _continuations(sora, continuations, occlusions, seed, tell, keep, options)
    through = functools.partial(reconstructed, sora)
    if long:
        result["length"], result["length_means"] = evaluate_long.length(
            sora, long, [plan.long for plan in plans[len(sizes) :]], seed, _TRUE_SEED, through, tell, keep, options
        )
    if verbs:
        result["verbs"] = evaluate_verbs.verbs(sora, verbs, seed, _TRUE_SEED + 500_000, through, tell, keep, options)
    if sizes:
        result["sizes"] = {}
        for height, width in sizes:
            some = prompts[:: max(1, len(prompts) // 16)]
            sized, shape, others = _prompted(
                sora, some, seed, tell, f"{width}x{height}", keep, options | {"size": (height, width)}
            )
            true, coded, psnr, _ = _true_clips(sora, true_clips, (height, width))
            parts = {"score": sized, "floor": true, "vae": coded}
            result["sizes"][f"{width}x{height}"] = {
                **{name: _shares(part) for name, part in parts.items()},
                "psnr": psnr,
                "intervals": {name: _intervals(part) for name, part in parts.items()},
                "shape": summary(shape),
            }
    return result


def _prompted(
    sora, prompts, seed: int, tell: Progress, stage: str, keep, options
) -> tuple[list[dict], list[dict], list[dict]]:
    """Each prompt's answers, what can be measured of its clip, and what that answers to the prompt before."""
    rows, found, others = [], [], []
    for done, (prompt, program) in enumerate(prompts, 1):
        clip = sora.generate(prompt, seed=seed, **options)
        reading = read(clip.frames)
        answers = text_truth(clip.frames, program, clip.fps, reading)
        rows.append({"prompt": prompt, "held_out": program.things[0] in world.HELD_OUT, **answers})
        found.append(measures.prompted(clip.frames, program, clip.fps, reading))
        others.append(text_truth(clip.frames, prompts[done - 2][1], clip.fps, reading))
        if keep is not None and done % max(1, len(prompts) // 16) == 0:
            wrong = [name for name, answer in answers.items() if answer is False]
            keep(f"prompts: {stage}", prompt, {"wrong: " + ", ".join(wrong) if wrong else "all true": clip.frames})
        tell(stage, done, len(prompts))
    return rows, found, others


def _true_clips(
    sora: Sora, count: int, size: tuple[int, int]
) -> tuple[list[dict], list[dict], float, dict[str, list[dict]]]:
    """Answers of true clips, of the same through the VAE, the PSNR between the two, and answers of the baselines."""
    true, coded, psnr, defaults = [], [], [], sora.defaults
    simple: dict[str, list[dict]] = {"copy first frame": [], "constant velocity": []}
    for seed in range(_TRUE_SEED, _TRUE_SEED + count):
        sample = world.sample(seed, frames=defaults.frames, size=size, fps=defaults.fps, split="all")
        pixels = reconstructed(sora, sample.video)
        error = (pixels.astype(np.float64) - sample.video) / 255
        psnr.append(-10 * math.log10(max(float((error**2).mean()), 1e-10)))
        true.append(text_truth(sample.video, sample.program, defaults.fps))
        coded.append(text_truth(pixels, sample.program, defaults.fps))
        for (name, answers), known in zip(simple.items(), (1, 2), strict=True):
            make = baselines.copy_last if name.startswith("copy") else baselines.constant_velocity
            answers.append(text_truth(make(sample, known), sample.program, defaults.fps))
    return true, coded, round(float(np.mean(psnr)), 2), simple


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


def _continuations(sora: Sora, each: int, occlusions: int, seed: int, tell: Progress, keep, options) -> dict[str, Any]:
    """Measures of what each predictor makes of true clips, `each` of every scene; and what comes out again in as many
    as `occlusions` of each that hides things, of four seconds after the known frames."""
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
            by_name[name][-1]["seam"] = measures_long.seam(video, [known])
        if keep is not None and number == 0:
            keep("continuation", f"{scene}: {truth.caption}", made)
        tell("continuations", done + 1, total)
    for done in range(2 * occlusions):
        scene, frames = ("occluder", "turn_back")[done % 2], known + round(4 * defaults.fps)
        truth = world.sample(
            _TRUE_SEED + 100_000 + done, scene=scene, frames=frames, size=defaults.size, fps=defaults.fps
        )
        for name, make in makers.items():
            found = measures.measure(make(truth, known), truth, known)
            by_name[name].append({key: found[key] for key in ("reappears", "hidden_s", "swapped")})
        tell("occlusions", done + 1, 2 * occlusions)
    return {
        "known": known,
        "continuation": {name: summary(clips) for name, clips in by_name.items()},
        "permanence": {name: permanence_curve(clips) for name, clips in by_name.items()},
    }


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
    for name, shares in (("clips", result["score"]), ("of unseen pairs", result["held_out"]),
                         *result["baselines"].items(), ("true clips", result["floor"]),
                         ("true clips, coded", result["vae"])):  # fmt: skip
        text.add_row(name, *("-" if shares[q] is None else f"{shares[q]:.0%}" for q in QUESTIONS))
    made = [text]
    if "continuation" in result:
        by_name = result["continuation"]
        made.append(Table("", *by_name, title=f"true clips continued from {result['known']} frames"))
        _add_means(made[-1], by_name)
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
        made.append(Table("", *result["length_means"], title="over all that time"))
        _add_means(made[-1], result["length_means"])
    for verb, by_name in result.get("verbs", {}).items():
        made.append(Table("", *by_name, title=verb))
        _add_means(made[-1], by_name)
    for size, found in result.get("sizes", {}).items():
        text.add_row(size, *("-" if (share := found["score"][q]) is None else f"{share:.0%}" for q in QUESTIONS))
    return made


def _add_means(table: Table, by_name: dict[str, dict[str, dict[str, float]]]) -> None:
    """A row of means for each measure, a column for each that was measured."""
    for name, cells in rows_of(by_name):
        table.add_row(name, *("-" if c is None else f"{c['mean']:.3g}" for c in cells))
