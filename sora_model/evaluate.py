"""How good is a checkpoint? Clips of fixed prompts, read back by the world's read-out.

`evaluate` gives the share of clips that show what their prompt says of colour, shape, count, way, style and background.
Beside it stand the two ceilings: the read-out's score on true clips of the world, and on true clips after the VAE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sora_kernels import video_to_uint8

from . import machine, world
from .pipeline import Sora
from .train import to_video
from .world.captions import Program
from .world.measures_text import CLAIMS, text_truth

QUESTIONS = CLAIMS


def evaluate(
    sora: Sora,
    *,
    prompts: Sequence[tuple[str, Program]] | None = None,
    seed: int = 0,
    true_clips: int = 40,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores `sora` on `prompts` (those of `world.eval_prompts()` by default), one clip each, made with `seed` and
    `options`.

    Returns a JSON-ready dict: `score` (share of right answers to each of `QUESTIONS`, among the prompts that ask
    it), `held_out` (the same over prompts whose colour and shape never occurred together in training), `floor` and
    `vae` (the same read-out on true clips, and after encode and decode, with the mean `psnr` in dB), and every
    prompt's own answers.
    """
    prompts = world.eval_prompts() if prompts is None else list(prompts)
    rows = []
    for done, (prompt, program) in enumerate(prompts, 1):
        clip = sora.generate(prompt, seed=seed, **options)
        held_out = program.things[0] in world.HELD_OUT
        rows.append({"prompt": prompt, "held_out": held_out, **text_truth(clip.frames, program, clip.fps)})
        if progress is not None:
            progress(done, len(prompts))
    with machine.own_dtypes(sora.device):
        true, coded = _true_clips(sora, true_clips)
    return {
        "prompts": len(rows),
        "seed": int(seed),
        "steps": int(options.get("steps") or sora.defaults.steps),
        "guidance": float(sora.defaults.guidance if options.get("guidance") is None else options["guidance"]),
        "score": _shares(rows),
        "held_out": _shares([row for row in rows if row["held_out"]]),
        "floor": true,
        "vae": coded,
        "clips": rows,
    }


@torch.no_grad()
def _true_clips(sora: Sora, count: int) -> tuple[dict[str, float | None], dict[str, float | None]]:
    true, coded, psnr = [], [], []
    defaults = sora.defaults
    for seed in range(10**13, 10**13 + count):
        sample = world.sample(seed, frames=defaults.frames, size=defaults.size, fps=defaults.fps, split="all")
        program = sample.program
        video = to_video(sample.video[None]).to(sora.device)
        back = sora.vae.decode(sora.vae.encode(video)[0])
        psnr.append(-10 * math.log10(float((back - video).square().mean()) / 4))
        pixels = video_to_uint8(back)[0].cpu().numpy()
        true.append(text_truth(sample.video, program, defaults.fps))
        coded.append(text_truth(pixels, program, defaults.fps))
    return _shares(true), _shares(coded) | {"psnr": round(float(np.mean(psnr)), 2)}


def _shares(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The share of right answers to each question, among the rows that ask it; None where none does."""
    shares = {}
    for question in QUESTIONS:
        answers = [row[question] for row in rows if row[question] is not None]
        shares[question] = round(sum(answers) / len(answers), 4) if answers else None
    return shares
