"""The clip at the top of the README, made again: `sora generate PROMPT --seed 2`, enlarged, as docs/clip.gif.

python examples/readme_clip.py [FILE.gif]
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sora_model import Sora

PROMPT, SEED, SCALE = "a red ball rolls to the right behind a wall and comes out on the other side", 2, 4
TARGET = Path(__file__).resolve().parent.parent / "docs" / "clip.gif"


def main(target: str | Path = TARGET) -> np.ndarray:
    """Writes the GIF and returns the clip's own frames, [T, H, W, 3]."""
    clip = Sora.from_pretrained().generate(PROMPT, seed=SEED)
    images = [Image.fromarray(frame.repeat(SCALE, 0).repeat(SCALE, 1)) for frame in clip.frames]
    images[0].save(target, save_all=True, append_images=images[1:], duration=round(1000 / clip.fps), loop=0)
    return clip.frames


if __name__ == "__main__":
    main(*sys.argv[1:2])
