"""Colours, backgrounds and styles, chosen so that a clip can be read back exactly.

What is no object (backgrounds, walls, the eater, the ground) differs from the background by a grey: its *chroma*, the
part of a colour that adding grey leaves alone, is that of the background everywhere. An object's colour has a chroma of
its own angle. Covering pixels by area is linear, so how much of an object a pixel shows is the length of its chroma
along the object's, whatever is behind it or hides a part of it.
"""

from __future__ import annotations

import numpy as np

# On dark backgrounds, and on light ones. The angles of the chroma are at least 23 degrees apart.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (236, 52, 76),
    "orange": (250, 124, 30),
    "yellow": (246, 224, 50),
    "green": (60, 200, 90),
    "cyan": (48, 204, 228),
    "blue": (72, 112, 248),
    "purple": (150, 84, 240),
    "pink": (248, 104, 192),
}
DEEP_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (206, 38, 58),
    "orange": (224, 104, 16),
    "yellow": (208, 178, 10),
    "green": (34, 150, 74),
    "cyan": (10, 150, 178),
    "blue": (42, 84, 214),
    "purple": (122, 52, 200),
    "pink": (222, 62, 150),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (14, 14, 18),
    "navy": (24, 30, 56),
    "grey": (64, 66, 72),
    "cream": (246, 241, 231),
}
STYLES: dict[str, tuple[str, ...]] = {  # style -> the backgrounds it goes with
    "flat": ("black", "navy", "grey", "cream"),
    "outline": ("black", "navy", "grey", "cream"),
    "neon": ("black", "navy"),
    "sketch": ("cream",),
}
# The inside of a shape is covered by at least this much of its colour, and what glows outside of it in neon by at most
# GLOW.
INSIDE: dict[str, float] = {"flat": 1.0, "outline": 0.3, "neon": 0.5, "sketch": 0.4}
GLOW = 0.3
SHADE = 0.7  # the share of its colour on the darkest face of a flat box

_AXES = np.array([[1, -1, 0], [1, 1, -2]]).T / np.sqrt([2, 6])


def chroma(rgb: np.ndarray) -> np.ndarray:
    """[..., 3] -> [..., 2]: the colour without its grey part, an orthogonal projection."""
    return np.asarray(rgb) @ _AXES.astype(np.float32)


def ink(colour: str, background: str) -> np.ndarray:
    """The RGB of a colour's name on a background, fp32 [3]."""
    return np.array((DEEP_COLOURS if background == "cream" else COLOURS)[colour], np.float32)


def grey(background: str, strength: float) -> np.ndarray:
    """The background, `strength` (0 to 1) of the way from it towards its far end: lighter where it is dark."""
    rgb = np.array(BACKGROUNDS[background], np.float32)
    return rgb + strength * ((255 - rgb.max()) if rgb.mean() < 128 else -rgb.min())
