"""What a model makes of what is there: an image comes alive, a clip goes on, two clips meet, a clip is changed.

    clip = sora.animate(image, "a red circle bounces around")
    longer = sora.extend(clip, "a red circle bounces around", seconds=10)
    round_and_round = sora.loop(clip, "a red circle bounces around")

All of it is `conditioning`: what is given keeps its latents while the rest is drawn. Given are frames, uint8
`[T, H, W, 3]` or an image `[H, W, 3]`, a `Clip`, or the path of an image or a video. Of another size than asked for,
they are scaled to cover it and cut around the centre; a file of another rate gives the frames that it shows at the
model's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import machine, media, planning
from .conditioning import Known, place
from .frames import covering, held, to_video
from .reader import NoVideoError
from .safety import filters, limits
from .safety.credentials import Input, Origin

if TYPE_CHECKING:
    from .pipeline import Clip

Given = Any
"""Frames, a clip, or a path."""

_IMAGES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # none that another program reads, as EPS


class Verbs:
    """The methods of `Sora` that begin with frames. `options` are those of `generate` but `long`.

    Frames of the result that were given are the given ones, not what the VAE makes of them. Raises as `generate`;
    ValueError where frames are missing or do not fit; `media.MediaError` for a file that cannot be read.
    """

    def animate(self, image: Given, prompt: str, *, last: Given = None, **options: Any) -> Clip:
        """A clip that begins with `image`, and ends with `last` if that is given."""
        plan, impl, progress = self._planned("animate", prompt, options)
        plan.asked["frames"] = plan.frames
        parts = {0: self._given("image", image, plan)[:1]}
        if last is not None:
            # frames of a latent, in which the last one stands still; where frames are given as such, that one alone
            factor = 1 if self.sees_frames else self.vae.config.temporal_factor
            parts[-factor] = np.repeat(self._given("last", last, plan)[-1:], factor, axis=0)
        return self._clip(plan, self._around(plan, parts, impl, progress))

    def extend(
        self, clip: Given, prompt: str, *, seconds: float = 1.0, backward: bool = False, **options: Any
    ) -> Clip:
        """The clip and `seconds` more: after its end, or before its beginning.

        Piece by piece, each as long as the clips that the model was trained on and half of it known. As the prompt
        names the motion, that of the end should still be what it says.
        """
        plan, impl, progress = self._planned("extend", prompt, options | {"seconds": None})
        frames = self._given("clip", clip, plan)
        wanted = self._count("seconds", seconds, plan)
        plan.asked.update(new_frames=wanted, backward=bool(backward))
        length = len(frames) + wanted
        self._fit(length, plan.size, impl, at_once=plan.frames)
        seed = plan.seed
        while len(frames) < length:
            known = self._fitting(min(len(frames), plan.frames // 2), begins=not backward)
            new = min(plan.frames - known, length - len(frames))
            piece = dataclasses.replace(plan, seed=seed)
            if backward:
                made = self._around(piece, {-known: frames[:known]}, impl, progress)[: plan.frames - known]
                frames = np.concatenate([made[-new:], frames])
            else:
                made = self._around(piece, {0: frames[-known:]}, impl, progress)[known:]
                frames = np.concatenate([frames, made[:new]])
            seed += 1
        return self._clip(plan, frames)

    def connect(self, first: Given, second: Given, prompt: str, *, seconds: float = 1.0, **options: Any) -> Clip:
        """The first clip, `seconds` that lead from it to the second one, and that one."""
        plan, impl, progress = self._planned("connect", prompt, options | {"seconds": None})
        before, after = self._given("first", first, plan), self._given("second", second, plan)
        plan.asked["new_frames"] = wanted = self._count("seconds", seconds, plan)
        between = self._bridge(plan, before, after, wanted, impl, progress)
        return self._clip(plan, np.concatenate([before, between, after]))

    def loop(self, clip: Given, prompt: str, *, seconds: float = 1.0, **options: Any) -> Clip:
        """The clip and `seconds` that lead from its end to its beginning, so that it may be played in a circle."""
        plan, impl, progress = self._planned("loop", prompt, options | {"seconds": None})
        frames = self._given("clip", clip, plan)
        plan.asked["new_frames"] = wanted = self._count("seconds", seconds, plan)
        between = self._bridge(plan, frames, frames, wanted, impl, progress)
        return self._clip(plan, np.concatenate([frames, between]))

    def interpolate(self, clip: Given, prompt: str, *, factor: int = 2, **options: Any) -> Clip:
        """`factor` times as many frames at as many times the rate: the clip's own, and others between them.

        In pieces of as many frames as the model was trained on. For a VAE that codes every frame by itself alone.
        """
        if self.vae.config.temporal_factor != 1:
            raise ValueError(
                f"interpolate needs a VAE whose latents are frames; in this one's a latent is "
                f"{self.vae.config.temporal_factor} frames, which would all have to be known"
            )
        if isinstance(factor, bool) or not isinstance(factor, Integral) or not 2 <= factor <= 64:
            raise ValueError(f"factor must be a whole number from 2 to 64; got {factor!r}")
        plan, impl, progress = self._planned("interpolate", prompt, options | {"seconds": None})
        plan.asked["factor"] = int(factor)
        frames = self._given("clip", clip, plan)
        self._fit((len(frames) - 1) * factor + 1, plan.size, impl, at_once=plan.frames)
        step = max(1, (plan.frames - 1) // factor)  # of the clip's frames, from one piece to the next
        made = [frames[:1]]
        for at in range(0, len(frames) - 1, step):
            own = frames[at : at + step + 1]
            piece = dataclasses.replace(self._sized(plan, (len(own) - 1) * factor + 1, impl), seed=plan.seed + at)
            parts = {i * factor: own[i : i + 1] for i in range(len(own))}
            made.append(self._around(piece, parts, impl, progress)[1:])
        whole = self._clip(plan, np.concatenate(made))
        return dataclasses.replace(whole, fps=plan.fps * factor)

    def edit(self, clip: Given, prompt: str, *, strength: float = 0.6, **options: Any) -> Clip:
        """The clip made into what `prompt` says: mixed with noise of `strength`, 0 (none) to 1 (nothing else), and
        drawn anew from there (SDEdit, arXiv:2108.01073). The less, the more of the clip is left."""
        plan, impl, progress = self._planned("edit", prompt, options | {"seconds": None})
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
            raise ValueError(f"strength must be a number from 0 to 1; got {strength!r}")
        plan.asked["strength"] = float(strength)
        frames = self._given("clip", clip, plan)
        plan = self._sized(plan, len(frames), impl)
        latents = self._encoded(self._padded_frames(frames), begins=True, impl=impl)
        return self._clip(plan, self._drawn(plan, impl, progress, clip=latents, strength=float(strength)))

    def restyle(self, clip: Given, prompt: str, *, strength: float = 0.8, **options: Any) -> Clip:
        """`edit`, with as much noise as leaves the motion and takes the look; the prompt names the new one."""
        return self.edit(clip, prompt, strength=strength, **options)

    def inpaint(self, clip: Given, prompt: str, *, box: Sequence[int], **options: Any) -> Clip:
        """The clip with what lies in `box` = (left, top, right, bottom), pixels of the result, drawn anew in all
        frames. The box is widened to whole tokens."""
        plan, impl, progress = self._planned("inpaint", prompt, options | {"seconds": None})
        frames = self._given("clip", clip, plan)
        plan = self._sized(plan, len(frames), impl)
        rows, columns = self._box(box, plan.size)
        plan.asked["box"] = f"{columns.start},{rows.start},{columns.stop},{rows.stop}"
        latents = self._encoded(self._padded_frames(frames), begins=True, impl=impl)
        mask = torch.ones((1, 1, *latents.shape[2:]), dtype=torch.bool)
        factor = self.vae.config.spatial_factor
        mask[..., rows.start // factor : rows.stop // factor, columns.start // factor : columns.stop // factor] = False
        made = self._drawn(plan, impl, progress, known=Known(latents, mask.to(latents.device)))
        result = frames.copy()
        result[:, rows, columns] = made[:, rows, columns]
        return self._clip(plan, result)

    # --- frames that are given ---

    def _given(self, name: str, given: Given, plan: Any) -> np.ndarray:
        """uint8 `[T, H, W, 3]` of the plan's size."""
        path = given if isinstance(given, str | os.PathLike) else None
        given = given if path is None else _read(path, plan.fps)
        frames = np.require(getattr(given, "frames", given), requirements="W")  # PyTorch warns of what is read only
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(
                f"{name} must be frames, uint8 [T, H, W, 3] or one [H, W, 3], a Clip, or the path of an image or a "
                f"video; got {frames.dtype} {list(frames.shape)}"
            )
        filters.check(frames, name)
        origin = getattr(given, "origin", None)
        plan.inputs.append(origin if isinstance(origin, Origin) else Input.of(path or frames, name))
        return covering(frames, plan.size)

    def _count(self, name: str, seconds: Any, plan: Any) -> int:
        frames = round(planning.number(name, seconds, 0, limits.current().seconds) * plan.fps) if seconds else 0
        if frames < 1:
            raise ValueError(f"{name}={seconds} at {plan.fps:g} frames per second is less than one frame")
        return frames

    def _fitting(self, frames: int, *, begins: bool) -> int:
        """So many frames, or the next fewer that are whole latents at the beginning of a clip or elsewhere."""
        factor = self.vae.config.temporal_factor
        return max(1, (frames - 1) // factor * factor + 1) if begins else max(factor, frames // factor * factor)

    def _box(self, box: Sequence[int], size: tuple[int, int]) -> tuple[slice, slice]:
        box = box.tolist() if isinstance(box, np.ndarray) else box
        whole = isinstance(box, Sequence) and len(box) == 4
        if not whole or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in box):
            raise ValueError(f"box must be four whole numbers (left, top, right, bottom); got {box!r}")
        left, top, right, bottom = map(int, box)
        height, width = size
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(f"box must lie within {width}x{height}, left of right and top above bottom; got {box}")
        units = (self.vae.config.spatial_factor * patch for patch in self.dit.config.patch[1:])
        spans = zip((top, left), (bottom, right), units, strict=True)
        rows, columns = (slice(least // unit * unit, -(-most // unit) * unit) for least, most, unit in spans)
        if (rows.stop - rows.start, columns.stop - columns.start) == size:
            raise ValueError(f"box {box} leaves nothing of {width}x{height} in whole tokens: nothing is known; edit it")
        return rows, columns

    # --- around them ---

    def _planned(self, verb: str, prompt: str, options: Mapping[str, Any]) -> tuple[Any, str, Any]:
        if "long" in options:
            raise TypeError("what begins with frames is made all at once; it takes no argument 'long'")
        options = dict(options)
        impl, progress = options.pop("impl", "auto"), options.pop("progress", None)
        plan = self._plan(prompt, **options, long="once", impl=impl)
        plan.asked["verb"] = verb
        return plan, impl, progress

    def _bridge(self, plan: Any, before: np.ndarray, after: np.ndarray, frames: int, impl: str, progress: Any):
        """So many frames that lead from the end of one clip to the beginning of another."""
        ends = self._fitting(min(len(before), plan.frames // 4 + 1), begins=True)
        begins = self._fitting(min(len(after), plan.frames // 4 + 1), begins=False)
        frames = self._fitting(frames, begins=False)
        plan = self._sized(plan, ends + frames + begins, impl)
        parts = {0: before[-ends:], -begins: after[:begins]}
        return self._around(plan, parts, impl, progress)[ends : ends + frames]

    def _around(self, plan: Any, parts: Mapping[int, np.ndarray], impl: str, progress: Any) -> np.ndarray:
        """Frames of the plan around those given, each part from the frame of its key on; negative: from the end."""
        factor, shape = self.vae.config.temporal_factor, (1, *plan.latents)
        total = 1 + factor * (plan.latents[1] - 1)
        parts = {key + total if key < 0 else key: frames for key, frames in parts.items()}
        if self.sees_frames:
            how = self._shown(parts, total, plan.size, impl)
        else:
            latents = {}
            for start, frames in parts.items():
                frames = frames if start == 0 else held(frames, len(frames) + -len(frames) % factor)
                latents[-(-start // factor)] = self._encoded(frames, begins=start == 0, impl=impl)
            how = {"known": place(shape, latents)}
        made = self._drawn(dataclasses.replace(plan, frames=total), impl, progress, **how)
        for start, frames in parts.items():
            made[start : start + len(frames)] = frames
        return made

    def _shown(
        self, parts: Mapping[int, np.ndarray], total: int, size: tuple[int, int], impl: str
    ) -> dict[str, Tensor]:
        """What an image-to-video transformer is given of a clip's known frames, each part from its first one on.

        In channels: which frames are known, as many to a latent as it has frames; and the latents of a video that shows
        them, and grey elsewhere. Beside the text, where it sees images there: the first frame, or that and the last.
        """
        video, known, shown = torch.zeros(1, 3, total, *size), torch.zeros(total), {}
        for start, frames in parts.items():
            video[:, :, start : start + len(frames)] = to_video(frames[None])
            known[start : start + len(frames)] = 1
        if self.image is not None:
            ends = {0: "first", total - 1: "last"} if self.dit.config.image_tokens else {0: "first"}
            for number, name in ends.items():
                if not known[number]:
                    raise ValueError(f"this checkpoint sees the {name} frame of a clip: it must be given")
            frames = {start + i: frame for start, part in parts.items() for i, frame in enumerate(part)}
            self.turns(self.image)
            shown["image"] = self.image.encode(np.stack([frames[number] for number in ends]))
        latents = self._coded(video, impl)                                                   # [1, C, T', H', W']
        factor = self.vae.config.temporal_factor
        known = torch.cat([known[:1].expand(factor - 1), known]).view(-1, factor).T          # [factor, T']
        mask = known[None, :, :, None, None].expand(-1, -1, -1, *latents.shape[3:]).to(latents)
        return shown | {"frames": torch.cat([mask, latents], 1)}

    def _encoded(self, frames: np.ndarray, *, begins: bool, impl: str) -> Tensor:
        """Normalised latents `[1, C, T', H', W']`; of frames that do not begin a clip, as if the first of them had
        stood still before."""
        frames = frames if begins else np.concatenate([frames[:1], frames])
        latents = self._coded(to_video(frames[None]), impl)
        return latents if begins else latents[:, :, 1:]

    def _coded(self, video: Tensor, impl: str) -> Tensor:
        """Normalised latents of a video that begins a clip, in tiles where the memory is short."""
        self.vae.impl = impl
        self.turns(self.vae)
        tile, _ = self.vae.fit_tile("encode", *video.shape[3:], machine.available(self.device), impl=impl)
        tile, pieces = self._smallest(tile), (piece.to(self.device) for piece in video.split(16, 2))
        with torch.no_grad(), machine.own_dtypes(self.device):
            means = torch.cat([mean for mean, _ in self.vae.encode_stream(pieces, tile=tile)], 2)
            return self.vae.normalize(means)

    def _padded_frames(self, frames: np.ndarray) -> np.ndarray:
        return held(frames, self._padded(len(frames)))

    def _sized(self, plan: Any, frames: int, impl: str) -> Any:
        """The plan for another number of frames. Raises `TooLargeError`."""
        height, width = plan.size
        self._fit(frames, plan.size, impl)
        return dataclasses.replace(
            plan, frames=frames, latents=self.vae.config.latent_shape(self._padded(frames), height, width)
        )

    def _drawn(self, plan: Any, impl: str, progress: Any, **how: Any) -> np.ndarray:
        with machine.own_dtypes(self.device):
            return np.concatenate(list(self._frames(plan, impl, progress, **how)))


def _read(path: str | os.PathLike, fps: float) -> np.ndarray:
    """The frames that an image or a video shows at `fps`."""
    from PIL import Image, UnidentifiedImageError

    most = limits.current()
    try:
        if (size := os.path.getsize(path)) > most.read_bytes:
            raise media.MediaError(
                f"{os.fspath(path)!r} has {size} bytes, and the limits allow read_bytes={most.read_bytes}"
            )
        if not os.path.isfile(path):  # a pipe would be waited for; the reader of videos refuses it by name
            raise UnidentifiedImageError
        with Image.open(path, formats=_IMAGES) as image:
            if getattr(image, "n_frames", 1) == 1:
                if image.width * image.height > most.read_pixels:
                    raise media.MediaError(
                        f"{os.fspath(path)!r} is {image.width}x{image.height}, and the limits allow "
                        f"read_pixels={most.read_pixels}; scale it down"
                    )
                return np.array(image.convert("RGB"))[None]
    except (UnidentifiedImageError, IsADirectoryError):
        pass
    except media.MediaError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        if not os.path.exists(path):
            raise media.MediaError(f"there is no file {os.fspath(path)!r}") from error
        raise media.MediaError(f"{os.fspath(path)!r} cannot be read as an image: {error}") from error
    frames, shown, free = [], [], machine.available(torch.device("cpu"))
    try:
        video = media.read_video(path, times=True)
    except NoVideoError as error:
        raise media.MediaError(f"{error}, nor an image of {', '.join(_IMAGES)}") from None
    for time, frame in video:
        shown.append(float(time))
        frames.append(frame)
        if len(frames) * frame.nbytes > free // 2:
            raise machine.TooLargeError(
                f"{os.fspath(path)!r} is too long: its first {len(frames)} frames take half of the memory, of which "
                f"{machine.left(free)}; cut it, or scale it down"
            )
    wanted = np.arange(max(1, round((shown[-1] - shown[0]) * fps) + 1)) / fps + shown[0]
    return np.stack([frames[i] for i in np.searchsorted(shown, wanted + 1e-6, side="right") - 1])
