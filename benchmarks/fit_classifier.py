"""Fits a classifier of a checkpoint's clips, and measures it on what it was not fitted to.

    python -m benchmarks.fit_classifier --style flat --footage FOLDER --json benchmarks/results/classifier.json

Fitted are clips made from captions of the world, against true clips, moving 1/f noise and true clips through the VAE,
all through one chain at random: marked or not, cut, scaled, noisy, H.264 of crf 16 to 36. The test has other seeds, and
each row one thing that was never fitted: another sampler, other guidance, an earlier checkpoint, other scenes; and of
what the checkpoint did not make, true clips through the VAE by themselves, and footage where a folder of it is given.
For each row the area under the curve (AUC) against all negatives of the test, the share found where 1 % of them are
mistaken, and what is answered.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sora_model import Sora, world
from sora_model.evaluate import reconstructed
from sora_model.safety import classifier, convnet, watermark
from sora_model.solvers import Hosted

from .calibrate_watermark import encoded, interval, of_footage, textured

FITTED, HELD = ("bounce", "parabola", "occluder", "turn_back", "bite"), ("orbit", "loop", "paint")
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
FRAMES, SIZE = 17, (64, 64)


@cache
def sora(weights: str, sampler: str) -> Sora:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    loaded = Sora.from_pretrained(weights, device="cpu")
    if sampler == "unipc":
        loaded.solver = Hosted(UNIPC)
    return loaded


def true(seed: int, scenes: tuple[str, ...], style: str | None) -> world.Sample:
    spec = None if style is None else {"style": style}
    return world.sample(seed, scene=scenes[seed % len(scenes)], frames=FRAMES, size=SIZE, prompt_spec=spec)


def made(
    seed: int, weights: str, scenes=FITTED, style: str | None = None, guidance: float | None = None, sampler="euler"
) -> np.ndarray:
    return sora(weights, sampler).generate(true(seed, scenes, style).caption, seed=seed, guidance=guidance).frames


def through_vae(seed: int, weights: str, scenes=FITTED, style: str | None = None) -> np.ndarray:
    return reconstructed(sora(weights, "euler"), true(seed, scenes, style).video)


def drawn(seed: int, scenes=FITTED, style: str | None = None) -> np.ndarray:
    """A true clip or, one in four, noise that moves."""
    return true(seed, scenes, style).video if seed % 4 else textured(FRAMES, SIZE, np.random.default_rng(seed))


def chain(frames: np.ndarray, seed: int) -> np.ndarray:
    """What happens to clips that are handed round, drawn by the seed."""
    rng = np.random.default_rng([7, seed])
    if rng.random() < 0.5:
        frames = np.stack(list(watermark.embed(frames, int(rng.integers(2**32)), key=rng.bytes(32))))
    if rng.random() < 0.5:
        height, width = (int(n * rng.uniform(0.8, 1)) for n in frames.shape[1:3])
        top, left = (
            int(rng.integers(have - want + 1)) for have, want in zip(frames.shape[1:3], (height, width), strict=True)
        )
        frames = frames[:, top : top + height, left : left + width]
    if rng.random() < 0.5:
        size = [2 * int(n * rng.uniform(0.7, 2) / 2) for n in frames.shape[1:3]]
        x = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
        frames = x.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    if rng.random() < 0.3:
        noisy = frames + rng.normal(0, rng.uniform(0, 5), frames.shape)
        frames = noisy.clip(0, 255).round().astype(np.uint8)
    even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    return encoded(even, int(rng.integers(16, 37)))


def middle(frames: np.ndarray) -> np.ndarray:
    """What the network is shown of a clip: its middle, of no more pixels than the clips were made with."""
    height, width = (min(have, most) for have, most in zip(frames.shape[1:3], SIZE, strict=True))
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return np.ascontiguousarray(frames[:, top : top + height, left : left + width])


def _seen(look: Callable, make: Callable[[int], np.ndarray], seed: int) -> np.ndarray:
    torch.set_num_threads(1)
    return look(chain(make(seed), seed))


def collected(pool: ProcessPoolExecutor, look: Callable, make: Callable, seeds: range) -> list[np.ndarray]:
    return list(pool.map(partial(_seen, look, make), seeds, chunksize=4))


def rows(judge: Callable[[np.ndarray], classifier.Judgement], positives: dict, negatives: dict) -> Iterator[dict]:
    judged = {name: list(map(judge, found)) for name, found in (positives | negatives).items()}
    scores = {name: np.array([one.score for one in found]) for name, found in judged.items()}
    against = np.sort(np.concatenate([scores[name] for name in negatives]))
    for name, found in judged.items():
        row = {"clips": name, "made": name in positives, "n": len(found)}
        if name in positives:
            below, upto = (np.searchsorted(against, scores[name], side).mean() for side in ("left", "right"))
            row["auc"] = float(below + upto) / 2 / len(against)
            row["tpr_at_1_percent"] = float((scores[name] > np.quantile(against, 0.99)).mean())
        answers = [one.answer for one in found]
        row |= {answer: answers.count(answer) for answer in classifier.ANSWERS}
        yield row | {"likely_interval": interval(row["likely"], len(found))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="toy")
    parser.add_argument("--earlier", help="another checkpoint of the same training")
    parser.add_argument("--style", choices=world.STYLES, help="of all clips, where the checkpoint draws one only")
    parser.add_argument("--footage", type=Path, help="a folder of MP4s of real footage")
    parser.add_argument("--made", type=int, default=320, help="clips to fit; a fifth of it for each row of the test")
    parser.add_argument("--others", type=int, default=2000, help="negatives of the fit, and of the test")
    parser.add_argument("--network", action="store_true", help="fit the 3D network instead of the logistic regression")
    parser.add_argument("--workers", type=int, help="processes; by default one for each core")
    parser.add_argument("--out", type=Path, help="where the classifier goes, as JSON or, of the network, safetensors")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    few, many = given.made // 5, given.others
    mine, vae = (partial(make, weights=given.weights, style=given.style) for make in (made, through_vae))
    real, look = partial(drawn, style=given.style), middle if given.network else classifier.features
    with ProcessPoolExecutor(given.workers) as pool:
        of = partial(collected, pool, look)
        others = of(real, range(many)) + of(vae, range(10**6, 10**6 + given.made))
        others = [others[i] for i in np.random.default_rng(0).permutation(len(others))]
        taught = of(mine, range(10**7, 10**7 + given.made))
        if given.network:
            fitted = convnet.fit(taught, others)
        else:
            fitted = classifier.fit_features(np.stack(taught), np.stack(others))
        if given.out:
            fitted.save(given.out)
        test = range(2 * 10**7, 2 * 10**7 + few)
        positives = {
            "other seeds": of(mine, test),
            "sampler UniPC": of(partial(mine, sampler="unipc"), test),
            "guidance 1.5": of(partial(mine, guidance=1.5), test),
            "guidance 7": of(partial(mine, guidance=7.0), test),
            "scenes " + ", ".join(HELD): of(partial(mine, scenes=HELD), test),
        }
        if given.earlier:
            positives["an earlier checkpoint"] = of(partial(mine, weights=given.earlier), test)
        negatives = {
            "true clips": of(real, range(3 * 10**7, 3 * 10**7 + many - few)),
            "true clips of scenes " + ", ".join(HELD): of(partial(real, scenes=HELD), test),
            "true clips through the VAE": of(vae, range(4 * 10**7, 4 * 10**7 + few)),
        }
        if given.footage:
            filmed = list(of_footage(given.footage, (256, 256), FRAMES))
            negatives["footage"] = [look(chain(clip, seed)) for seed, clip in enumerate(filmed)]
    results = list(rows(fitted.judge if given.network else fitted.judge_features, positives, negatives))
    for row in results:
        print(json.dumps(row))
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
