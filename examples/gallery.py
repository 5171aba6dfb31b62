"""The clips at the top of the README, made again: `sora generate PROMPT --seed N` each, as docs/clips.webp.

python examples/gallery.py [FILE.webp]
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sora_model import Clip, Sora

CLIPS = [
    ("a blue square passes behind a wall and reappears", 1),
    ("a purple circle bounces", 0),
    ("a green triangle flies in an arc", 1),
    ("a yellow ring bounces off the edge, in neon", 0),
    ("an orange square bounces on a black background", 1),
    ("the camera goes towards the left round a yellow box", 0),
]
COLUMNS, SCALE, GAP = 3, 3, 4
TARGET = Path(__file__).resolve().parent.parent / "docs" / "clips.webp"


def clip(number: int) -> Clip:
    """Clip `number` of the gallery."""
    prompt, seed = CLIPS[number]
    return Sora.from_pretrained().generate(prompt, seed=seed)


def corner(number: int, height: int, width: int) -> tuple[int, int]:
    """Where clip `number` begins in the picture, y and x, as clips are `height` x `width` before they are enlarged."""
    row, column = divmod(number, COLUMNS)
    return row * (height * SCALE + GAP), column * (width * SCALE + GAP)


def main(target: str | Path = TARGET) -> None:
    """Makes all clips, and of them one animation, without loss."""
    clips = [clip(number) for number in range(len(CLIPS))]
    frames, height, width, _ = clips[0].frames.shape
    bottom, right = corner(len(clips) - 1, height, width)[0], corner(COLUMNS - 1, height, width)[1]
    picture = np.full((frames, bottom + height * SCALE, right + width * SCALE, 3), 255, np.uint8)
    for number, made in enumerate(clips):
        y, x = corner(number, height, width)
        picture[:, y : y + height * SCALE, x : x + width * SCALE] = made.frames.repeat(SCALE, 1).repeat(SCALE, 2)
    images = [Image.fromarray(frame) for frame in picture]
    delay = round(1000 / clips[0].fps)
    images[0].save(target, save_all=True, append_images=images[1:], duration=delay, loop=0, lossless=True)


if __name__ == "__main__":
    main(*sys.argv[1:2])
