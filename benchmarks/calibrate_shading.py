"""What of a mark in the noise can be read from a checkpoint's clips.

    python -m benchmarks.calibrate_shading --weights toy --json FILE

Clips of prompts of the world, drawn from marked noise, as the checkpoint does by default and without guidance: how many
are found in their frames as they are, and through H.264; beside it the z of a key that is another's.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch

from sora_model import Sora, world
from sora_model.safety import shading

from .calibrate_watermark import encoded

KEY, OTHER = b"calibration" * 3, b"another" * 3


def measure(sora: Sora, clips: int, guidance: float) -> dict:
    found: dict[str, list[float]] = {"frames": [], "H.264 crf 23": [], "another key": []}
    for seed, (prompt, _) in zip(range(clips), world.eval_prompts(1), strict=False):
        clip = sora.generate(prompt, seed=seed, guidance=guidance, shade=True)
        noise = shading.invert(sora, clip.frames)
        found["frames"].append(shading.read(noise, key=KEY).z)
        found["another key"].append(shading.read(noise, key=OTHER).z)
        found["H.264 crf 23"].append(shading.detect(sora, encoded(clip.frames, 23), key=KEY).z)
    return {
        name: {"n": len(z), "found": sum(one >= 6.5 for one in z), "largest_z": max(z), "mean_z": sum(z) / len(z)}
        for name, z in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="toy")
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    shading.secret = lambda: KEY
    sora = Sora.from_pretrained(given.weights, device="cpu")
    results = {f"guidance {g:g}": measure(sora, given.clips, g) for g in (sora.defaults.guidance, 1.0)}
    print(json.dumps(results, indent=2))
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
