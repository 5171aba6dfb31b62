"""Reads objects back from any clip: which colours there are, where each is in every frame, how much of it, its shape
and the style it is drawn in.

It knows the world's rule (``palette``): what is no object has the chroma of the background. So a pixel's chroma, less
the background's, is a share times the chroma of one of the eight colours; the nearest angle says of which, the length
says how much. The shares of one colour, over the least share inside a shape of that style, are its silhouette; their
first moment is its position. Nothing of a clip's seed is used, so generated clips and true ones are read alike. On true
clips it measures itself: the read-out floor, which every figure should be read against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .base import Setting, Thing
from .palette import BACKGROUNDS, COLOURS, GLOW, INSIDE, SHADE, STYLES, chroma, ink
from .render import Canvas
from .shapes import FIGURES, area

# Shares of the frame's shorter side squared: below the first a colour is not there at all, below the second it is not
# in that frame. The smallest object of the world covers 0.022.
LEAST, FAINT = 0.006, 0.0012
LOWEST = 0.15  # half the least share inside any shape


@dataclass(frozen=True)
class Track:
    """One colour through T frames. Lengths in pixels, a pixel's centre at whole numbers.

    position [T,2] (x, y) of the silhouette's centroid, NaN where absent · area [T] of the silhouette · present [T] ·
    silhouette fp32 [T,H,W], 0 to 1 · whole: the area when all of it shows · least: the area from which something is
    there.
    """

    colour: str
    position: np.ndarray
    area: np.ndarray
    present: np.ndarray
    silhouette: np.ndarray
    whole: float
    least: float

    @property
    def visible(self) -> np.ndarray:
        """Area over the whole area, [T]."""
        return self.area / self.whole

    @cached_property
    def pieces(self) -> np.ndarray:
        """How many separate pieces of a size that counts, [T]."""
        return pieces(self.silhouette > 0.5, self.least)


@dataclass(frozen=True)
class Reading:
    """A clip as it was read: ``background`` (the nearest by name), ``style``, ``tracks`` by colour, the largest first,
    and ``likeness`` of each to each flat shape, the cosine with its rendering, at best 1."""

    background: str
    style: str
    size: tuple[int, int]
    tracks: dict[str, Track]
    likeness: dict[str, dict[str, float]]

    @property
    def colour(self) -> str | None:
        """The colour of the largest object, None when there is none."""
        return next(iter(self.tracks), None)

    def shape(self, colour: str | None = None) -> str | None:
        """The flat shape that a colour's object (the largest one's) is most like."""
        likeness = self.likeness.get(colour or self.colour)
        return max(likeness, key=likeness.get) if likeness else None


def read(video: np.ndarray, style: str | None = None) -> Reading:
    """Read a clip [T,H,W,3], uint8 or floating point in [0, 1]. Its ``style`` is found out unless given. Raises
    ValueError for anything else."""
    image = pixels(video)
    if style is not None and style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)} or None, got {style!r}")
    size = image.shape[1:3]
    background = background_of(image)
    amounts = {c: a for c, a in shares(image, background).items() if _track(c, a, 2 * LOWEST) is not None}
    style = style or _style(amounts, background)
    setting = Setting((1.0, 1.0), style, background)
    tracks, likeness = {}, {}
    for colour, amount in amounts.items():
        if (track := _track(colour, amount, _inside(amount, style), _outside(style))) is not None:
            likeness[colour] = fits = _fits(track, amount, setting)
            best = max(fits, key=fits.get)
            tracks[colour] = track if style == "flat" or fits[best] < 0.9 else _centred(track, amount, setting, best)
    order = sorted(tracks, key=lambda c: -tracks[c].whole)
    return Reading(background, style, size, {c: tracks[c] for c in order}, {c: likeness[c] for c in order})


def _interior(amount: np.ndarray) -> np.ndarray:
    """The shares [N] of the pixels that lie at least two pixels inside."""
    inner = amount > LOWEST
    for axis in (1, 2):
        for shift in (-2, -1, 1, 2):
            inner = inner & (np.roll(amount, shift, axis) > LOWEST)
    return amount[inner]


def _style(amounts: dict[str, np.ndarray], background: str) -> str:
    """The style whose inside is as full as that of the objects there are, or, where their shapes are too thin to have
    one, whose renderings they are most like."""
    full = [_interior(a) for a in amounts.values()]
    if amounts and max(map(len, full)) < 6 * len(next(iter(amounts.values()))):
        styles = [s for s in STYLES if background in STYLES[s]]
        return max(
            styles, key=lambda s: sum(_likest(c, a, Setting((1.0, 1.0), s, background)) for c, a in amounts.items())
        )
    level = float(np.quantile(np.concatenate(full), 0.2)) if full else 1.0
    if level > 0.57:
        return "flat"
    return "outline" if level < 0.36 else "sketch" if background == "cream" else "neon"


def _likest(colour: str, amount: np.ndarray, setting: Setting) -> float:
    track = _track(colour, amount, INSIDE[setting.style], _outside(setting.style))
    return 0.0 if track is None else max(_fits(track, amount, setting).values())


def _inside(amount: np.ndarray, style: str) -> float:
    """The least share inside a shape: a box in flat colours has faces in the shade."""
    if style != "flat":
        return INSIDE[style]
    full = _interior(amount)
    return SHADE if len(full) > 40 and np.mean(full < 0.93) > 0.3 else 1.0


def _outside(style: str) -> float:
    return GLOW if style == "neon" else 0.0


def pixels(video: np.ndarray) -> np.ndarray:
    """fp32 [T,H,W,3] of 0 to 255."""
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"video must be [T,H,W,3] and not empty, got shape {list(video.shape)}")
    if video.dtype == np.uint8:
        return video.astype(np.float32)
    if not np.issubdtype(video.dtype, np.floating):
        raise ValueError(f"video must be uint8 or floating point in [0, 1], got {video.dtype}")
    if not np.isfinite(video).all() or video.min() < -0.01 or video.max() > 1.01:
        raise ValueError("video of floating point must lie in [0, 1]; clamp it, or scale it from [-1, 1] first")
    return video.astype(np.float32) * 255


def background_of(image: np.ndarray) -> str:
    """The name of the background, from the most common of its pixels."""
    names = list(BACKGROUNDS)
    palette = np.array([BACKGROUNDS[n] for n in names], np.float32)
    sparse = image[:: max(1, len(image) // 8), ::2, ::2].reshape(-1, 3)
    gaps = np.linalg.norm(sparse[:, None] - palette, axis=-1)
    return names[int(np.argmax(np.exp(-gaps / 12).sum(0)))]


def shares(image: np.ndarray, background: str) -> dict[str, np.ndarray]:
    """How much of each pixel is of each colour: fp32 [T,H,W] by colour, 1 where the colour is pure. A pixel is of the
    colour nearest in angle alone."""
    seen = chroma(image)
    base = np.median(seen[:, ::2, ::2].reshape(-1, 2), axis=0)
    seen -= base
    axes = np.stack(
        [chroma(ink(c, background)) - chroma(np.array(BACKGROUNDS[background], np.float32)) for c in COLOURS]
    )
    length = np.linalg.norm(axes, axis=1)
    along = seen @ (axes / length[:, None]).T
    nearest = along.argmax(-1)
    most = np.maximum(np.take_along_axis(along, nearest[..., None], -1)[..., 0], 0) / length[nearest]
    return {c: np.where(nearest == k, most, 0) for k, c in enumerate(COLOURS)}


def silhouette(amount: np.ndarray, inside: float, outside: float = 0.0) -> np.ndarray:
    """Shares [T,H,W] of a colour -> how much each pixel is inside its shape, near its solid part alone. Inside the
    share is at least ``inside``, outside at most ``outside``."""
    shape = np.clip((amount - outside) / (inside - outside), 0, 1)
    near = shape > 0.5
    for axis in (1, 2):
        grown = near.copy()
        for shift in (1, 2):
            ahead, behind = [slice(None)] * 3, [slice(None)] * 3
            ahead[axis], behind[axis] = slice(shift, None), slice(None, -shift)
            grown[tuple(ahead)] |= near[tuple(behind)]
            grown[tuple(behind)] |= near[tuple(ahead)]
        near = grown
    return np.where(near, shape, 0)


def centroids(shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area [T] and centroid [T,2] of silhouettes [T,H,W], NaN where there is nothing."""
    part = shape.astype(np.float64)
    total = part.sum((1, 2))
    moments = np.stack([part.sum(1) @ np.arange(part.shape[2]), part.sum(2) @ np.arange(part.shape[1])], -1)
    return total, np.where(total[:, None] > 0, moments / np.maximum(total, 1e-9)[:, None], np.nan)


def rendered(thing: Thing, setting: Setting, position: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Silhouettes [T,H,W] of a flat shape drawn at ``position`` [T,2] (pixels), read as a clip's are."""
    return silhouette(_drawn(thing, setting, position, size), INSIDE[setting.style], _outside(setting.style))


def _track(colour: str, amount: np.ndarray, inside: float, outside: float = 0.0) -> Track | None:
    unit = min(amount.shape[1:])
    shape = silhouette(amount, inside, outside)
    total, position = centroids(shape)
    most = total.max()
    if most < LEAST * unit**2:
        return None
    whole = float(np.median(total[total >= 0.9 * most]))
    least = max(FAINT * unit**2, 0.05 * whole)
    present = total >= least
    position[~present] = np.nan
    return Track(colour, position, total, present, shape, whole, least)


def pieces(solid: np.ndarray, least: float) -> np.ndarray:
    """[T]: how many 8-connected pieces of at least ``least`` pixels each frame of [T,H,W] bool has."""
    rows, columns = (np.flatnonzero(solid.any(axis)) for axis in ((0, 2), (0, 1)))
    if not len(rows):
        return np.zeros(len(solid), np.int64)
    solid = solid[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    frames, height, width = solid.shape
    label = np.where(solid, np.arange(1, solid.size + 1, dtype=np.int32).reshape(solid.shape), 0)
    padded = np.zeros((frames, height + 2, width + 2), np.int32)
    while True:
        padded[:, 1:-1, 1:-1] = label
        best = padded[:, 1:-1]
        best = np.maximum(np.maximum(padded[:, :-2], best), padded[:, 2:])
        best = np.maximum(np.maximum(best[:, :, :-2], best[:, :, 1:-1]), best[:, :, 2:])
        best = np.where(solid, best, 0)
        best = np.where(solid, np.maximum(best, label.reshape(-1)[np.maximum(best - 1, 0)]), 0)  # two steps at once
        if np.array_equal(best, label):
            break
        label = best
    roots, sizes = np.unique(label[solid], return_counts=True)
    frame = (roots[sizes >= least] - 1) // (height * width)
    return np.bincount(frame, minlength=frames)


def _fits(track: Track, amount: np.ndarray, setting: Setting) -> dict[str, float]:
    """Cosine of up to 7 frames that show a colour whole with each flat shape."""
    frames = np.flatnonzero(np.abs(track.visible - 1) <= 0.1)
    frames = frames[np.linspace(0, len(frames) - 1, min(7, len(frames))).astype(int)]
    seen = amount[frames] * (track.silhouette[frames] > 0)
    fits = {}
    for shape in FIGURES:
        thing = Thing(track.colour, shape, radius_of(track, shape, setting, amount.shape[1:]))
        fits[shape] = _cosine(seen, _drawn(thing, setting, track.position[frames], amount.shape[1:]))
    return fits


def _centred(track: Track, amount: np.ndarray, setting: Setting, shape: str) -> Track:
    """The track with the first moments of the shares themselves, which unlike silhouettes of an outlined shape are
    linear in them, less what hatching moves them by."""
    _, position = centroids(np.where(track.silhouette > 0, amount, 0))
    if setting.style == "sketch":
        thing = Thing(track.colour, shape, radius_of(track, shape, setting, amount.shape[1:]))
        middle = np.array([[amount.shape[2] / 2, amount.shape[1] / 2]])
        drawn = _drawn(thing, setting, middle, amount.shape[1:])
        position = position - (centroids(drawn)[1] - middle)
    position[~track.present] = np.nan
    return replace(track, position=position)


def _drawn(thing: Thing, setting: Setting, position: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Shares [T,H,W] of a flat shape drawn at ``position`` [T,2] (pixels)."""
    canvas = Canvas(setting, len(position), size)
    canvas.figure(thing, (position + 0.5) / min(size))
    return shares(np.moveaxis(canvas.image, 0, -1), setting.background)[thing.colour]


def radius_of(track: Track, shape: str, setting: Setting, size: tuple[int, int]) -> float:
    """The radius, in the frame's shorter side, at which a shape's rendering has the track's whole area."""
    unit = min(size)
    radius = math.sqrt(track.whole / area(shape, 1.0)) / unit
    middle = np.array([[size[1] / 2, size[0] / 2]])
    drawn = float(rendered(Thing(track.colour, shape, radius), setting, middle, size).sum())
    return radius * math.sqrt(track.whole / max(drawn, 1e-6))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norm = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / norm if norm > 0 else 0.0
