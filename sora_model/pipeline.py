"""From a sentence to a clip: text encoder, transformer, flow sampler and streaming VAE decoder behind one class.

sora = Sora.from_pretrained()                    # the shipped toy checkpoint
clip = sora.generate("a red circle bounces", seconds=2, seed=1)
clip.save("out/clip.mp4")
"""

from __future__ import annotations

import base64
import dataclasses
import html
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks, estimate, flow, machine, media
from .attention import AttentionMode
from .checkpoint import (
    CheckpointError,
    build,
    check_finite,
    read_json,
    read_part,
    read_tensors,
    write_json,
    write_tensors,
)
from .dit import DiTConfig, SoraDiT
from .frames import to_pixels
from .machine import TooLargeError, choose_device, gib
from .safety.credentials import Origin
from .sampling import Sampler
from .text import UMT5TextEncoder, WordTextConfig, WordTextEncoder, check_prompt
from .vae import CausalVAE, VAEConfig
from .verbs import Verbs

TOY = Path(__file__).parent / "checkpoints" / "toy"

Progress = Callable[[str, int, int], None]
"""(stage, done, total), called as a clip is made."""

_LONG = ("once", "stream", "pieces")
_CHUNK = 4  # frames that a stream makes at once
_MAX_SIDE, _MAX_STEPS, _MAX_FRAMES = 8192, 10_000, 10_000_000
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PARTS = {
    "transformer": (SoraDiT, DiTConfig),
    "vae": (CausalVAE, VAEConfig),
    "text_encoder": (WordTextEncoder, WordTextConfig),
}


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a checkpoint was trained for, and how it is best sampled. `size` is (height, width)."""

    frames: int
    size: tuple[int, int]
    fps: float
    steps: int
    guidance: float
    shift: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", checks.several("size", self.size))
        if len(self.size) != 2:
            raise ValueError(f"size must be two numbers, the height and the width; got {self.size}")
        for side in self.size:
            checks.whole("size", side, 1, _MAX_SIDE)
        checks.whole("frames", self.frames, 1, _MAX_FRAMES)
        checks.whole("steps", self.steps, 1, _MAX_STEPS)
        checks.number("fps", self.fps, 0.1, 1000)
        checks.number("guidance", self.guidance, -100, 100)
        checks.number("shift", self.shift, 1e-3, 1e3)


@dataclasses.dataclass(frozen=True)
class Clip:
    """A finished clip: `frames` uint8 `[T, H, W, 3]` sRGB, and what it was made from."""

    frames: np.ndarray
    fps: float
    prompt: str
    seed: int
    steps: int
    guidance: float
    origin: Origin | None = dataclasses.field(default=None, repr=False, compare=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a signed H.264 MP4, whole or not at all, and returns its path. Raises `media.MediaError` if it cannot,
        `safety.credentials.CredentialsError` for a certificate that has expired, say."""
        made = dict(seed=self.seed, steps=self.steps, guidance=self.guidance)
        origin = self.origin or Origin.of(None, prompt=self.prompt, **made)
        return media.write_video(path, self.frames, self.fps, origin=origin)

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        length = f"{count} frames of {width}x{height}, {count / self.fps:.3g} s"
        return f"Clip({self.prompt!r}: {length}, seed {self.seed}, {self.steps} steps, guidance {self.guidance:g})"

    def _repr_html_(self) -> str:
        """The clip itself, playing in a notebook."""
        with tempfile.TemporaryDirectory() as folder:
            video = base64.b64encode(self.save(Path(folder) / "clip.mp4").read_bytes()).decode()
        height, width = self.frames.shape[1:3]
        scale = max(1, 256 // max(height, width))  # small clips enlarged by whole pixels
        return (
            f'<video controls autoplay loop muted playsinline width="{scale * width}" height="{scale * height}" '
            f'style="image-rendering: pixelated" title="{html.escape(repr(self))}" '
            f'src="data:video/mp4;base64,{video}"></video>'
        )


class Sora(Verbs):
    """A text-to-video model ready to use. Build it by `from_pretrained`."""

    folder: Path | None = None
    """Where the checkpoint was read from."""

    def __init__(
        self, dit: SoraDiT, vae: CausalVAE, text: WordTextEncoder | UMT5TextEncoder, defaults: Defaults
    ) -> None:
        self.dit, self.vae, self.text, self.defaults = dit, vae, text, defaults
        if dit.config.in_channels != vae.config.z_dim or dit.config.out_channels != vae.config.z_dim:
            raise CheckpointError(
                f"the transformer works on {dit.config.in_channels} -> {dit.config.out_channels} latent channels, "
                f"the VAE has {vae.config.z_dim}: they are parts of different checkpoints"
            )
        if dit.config.text_dim != text.dim:
            raise CheckpointError(
                f"the transformer takes text of width {dit.config.text_dim}, the text encoder gives {text.dim}: "
                "they are parts of different checkpoints"
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = "toy",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Sora:
        """Loads a checkpoint folder: one written by `save_pretrained`, "toy" for the shipped one, or Wan 2.1's in
        the diffusers layout.

        A Wan folder (Wan2.1-T2V-1.3B-Diffusers, say) has transformer/, vae/, text_encoder/, tokenizer/, scheduler/
        and model_index.json. `device` defaults to a GPU where there is one; `dtype`, of the transformer, to fp32, for
        Wan on a GPU to bf16. In half precision some weights stay in fp32, as Wan keeps them. Only local safetensors
        are read. Raises `CheckpointError` for what is missing, damaged, unsafe or of another model, `TooLargeError`
        for weights that do not fit in memory, TypeError for another dtype.
        """
        if dtype is not None and dtype not in _DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, _DTYPES))} or None; got {dtype!r}")
        folder = TOY if os.fspath(source) == "toy" else Path(source)
        device = choose_device(device)
        if not folder.exists():
            raise CheckpointError(
                f"there is no checkpoint at {folder}; give the folder that holds model_index.json, or 'toy'"
            )
        if folder.is_file():
            read_tensors(folder)
            raise CheckpointError(
                f"{folder} is one file; give the folder of a whole checkpoint, with model_index.json"
            )
        index = read_json(folder / "model_index.json")
        kind = index.get("_class_name")
        weights, free = (
            sum(file.stat().st_size for file in folder.glob("*/*.safetensors")),
            machine.available(torch.device("cpu")),
        )
        if weights > free:
            raise TooLargeError(
                f"the weights in {folder} take {gib(weights)}, and {gib(free)} of memory are free; "
                "use a smaller model"
            )
        if kind == "Sora":
            parts = {name: read_part(folder / name, *kinds) for name, kinds in _PARTS.items()}
            defaults = build(Defaults, index, str(folder / "model_index.json"))
            parts["transformer"].to_dtype(dtype or torch.float32)
            sora = cls(parts["transformer"], parts["vae"], parts["text_encoder"], defaults)
        elif kind == "WanPipeline":
            sora = _read_wan(
                cls, folder, index, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
            )
        else:
            raise CheckpointError(
                f"{folder / 'model_index.json'} describes a {kind!r}; supported are 'Sora' and 'WanPipeline'"
            )
        sora.dit.to(device).eval().requires_grad_(False)
        sora.vae.to(device, torch.float32).eval().requires_grad_(False)
        sora.text.to(device)
        sora.folder = folder
        return sora

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float16) -> None:
        """Writes the checkpoint, weights in `dtype`, each file atomically. Only with a `WordTextEncoder`.

        Weights that are not finite, or not in `dtype`, raise FloatingPointError before anything is written.
        """
        if not isinstance(self.text, WordTextEncoder):
            raise TypeError("only a checkpoint with a WordTextEncoder can be saved; keep the Wan folder it came from")
        if dtype not in _DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, _DTYPES))}; got {dtype!r}")
        parts = {"transformer": self.dit, "vae": self.vae, "text_encoder": self.text}
        states = {name: {k: v.to(dtype) for k, v in part.state_dict().items()} for name, part in parts.items()}
        for name, state in states.items():
            check_finite(state, f"cannot write {name} in {dtype}")
        for name, state in states.items():
            write_tensors(Path(folder) / name / "model.safetensors", state)
            write_json(Path(folder) / name / "config.json", dataclasses.asdict(parts[name].config))
        write_json(Path(folder) / "model_index.json", {"_class_name": "Sora"} | dataclasses.asdict(self.defaults))

    @property
    def device(self) -> torch.device:
        return self.dit.head_table.device

    def generate(
        self,
        prompt: str,
        *,
        seconds: float | None = None,
        size: tuple[int, int] | None = None,
        fps: float | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        attention: AttentionMode | str | None = None,
        long: str | None = None,
        impl: str = "auto",
        progress: Progress | None = None,
    ) -> Clip:
        """Makes a clip of what `prompt` says.

        seconds    length; the clip has round(seconds * fps) frames
        size       (height, width), multiples of the VAE's factor times the patch (16 for the toy and for Wan)
        fps        frames per second of the file; the motion is that of the rate the model was trained at
        steps      of the Euler sampler; more is slower and finer
        guidance   how strongly to follow the prompt; 1 is not at all beyond the training data
        attention  mode of self-attention: an `AttentionMode`, or text such as "window=3x4x4" or "causal=frame"
        long       how to make what is longer than the clips of training: "once", all frames together; "stream", a few
                   at a time that see the last ones made and the first, in constant memory; "pieces", clips of that
                   length that begin with the end of the last, in constant memory. Checkpoints whose latents are frames
                   have all three, and "stream" by default; others have "once"
        impl       of every kernel: "auto", "reference", "cpu" or "triton"

        What is left out is the checkpoint's own default. The same arguments on the same device give the same clip;
        another `impl` gives it up to rounding, as do the tiles in which frames too large for the memory are decoded; a
        surrounding `torch.autocast` has no effect.
        Raises ValueError or TypeError that names the argument, `TooLargeError` before anything is allocated.
        """
        plan = self._plan(
            prompt, seconds=seconds, size=size, fps=fps, seed=seed, steps=steps, guidance=guidance,
            attention=attention, long=long, impl=impl,
        )  # fmt: skip
        with machine.own_dtypes(self.device):
            frames = np.concatenate(list(self._frames(plan, impl, progress)))
        return self._clip(plan, frames)

    def generate_to(self, path: str | os.PathLike[str], prompt: str, **options: Any) -> Path:
        """`generate(prompt, **options)` straight into an MP4: written as it is decoded, whole or not at all.

        The frames are never held together: of the clip, only its latents and attention over them grow with its length.
        Nothing is computed if the request or the path is bad. Returns the path; also raises `media.MediaError`.
        """
        impl, progress = options.pop("impl", "auto"), options.pop("progress", None)
        known = ("seconds", "size", "fps", "seed", "steps", "guidance", "attention", "long")
        if unknown := sorted(options.keys() - set(known)):
            raise TypeError(
                f"generate_to takes no argument {unknown[0]!r}; it takes {', '.join(known)}, impl and progress"
            )
        plan = self._plan(prompt, **options, impl=impl, held=False)
        frames = (frame for chunk in self._frames(plan, impl, progress) for frame in chunk)
        with machine.own_dtypes(self.device):
            return media.write_video(path, frames, plan.fps, origin=self._origin(plan))

    @torch.no_grad()
    def _frames(self, plan: _Plan, impl: str, progress: Progress | None, **how: Any) -> Iterator[np.ndarray]:
        """The clip's frames, uint8 `[t, H, W, 3]`, a chunk at a time as the VAE decodes it; `how`: `Sampler.draw`'s."""
        sampler = Sampler(
            self.dit, self.text, plan.prompt, steps=plan.steps, guidance=plan.guidance, shift=self.defaults.shift,
            attention=plan.attention, impl=impl,
        )  # fmt: skip
        latents = self._latents(plan, sampler, progress, how)
        self.vae.impl = impl
        done = 0
        for video in self.vae.decode_stream(map(self.vae.denormalize, latents), clamp=False, tile=plan.tile):
            pixels = to_pixels(video, impl)[: plan.frames - done]
            done += len(pixels)
            if progress is not None:
                progress("decode", done, plan.frames)
            if len(pixels):
                yield pixels

    def _latents(
        self, plan: _Plan, sampler: Sampler, progress: Progress | None, how: Mapping[str, Any]
    ) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(plan.seed)
        if plan.long == "once":
            noise = flow.draw_noise((1, *plan.latents), generator=generator, device=self.device)
            told = None if progress is None else lambda done, total: progress("denoise", done, total)
            parts = iter([sampler.draw(noise, progress=told, **how)])
        elif plan.long == "stream":
            window = self.defaults.frames - _CHUNK
            parts = sampler.stream(plan.latents, generator=generator, window=window, chunk=_CHUNK)
        else:
            length = self.defaults.frames
            parts = sampler.pieces(plan.latents, generator=generator, length=length, overlap=length // 2)
        for part in parts:
            if not torch.isfinite(part).all():
                raise FloatingPointError(
                    f"the transformer gives NaN or infinite latents ({sampler.dtype}, guidance={plan.guidance:g}, "
                    f"shift={self.defaults.shift:g}): its weights or the text encoder's are damaged, or "
                    f"{sampler.dtype} is too narrow for them"
                )
            yield part

    def _clip(self, plan: _Plan, frames: np.ndarray) -> Clip:
        return Clip(frames, plan.fps, plan.prompt, plan.seed, plan.steps, plan.guidance, self._origin(plan))

    def _origin(self, plan: _Plan) -> Origin:
        made = dict(seed=plan.seed, steps=plan.steps, guidance=plan.guidance)
        return Origin.of(self.folder, prompt=plan.prompt, inputs=tuple(plan.inputs), **made)

    def _plan(
        self,
        prompt: Any,
        *,
        seconds: Any = None,
        size: Any = None,
        fps: Any = None,
        seed: Any = 0,
        steps: Any = None,
        guidance: Any = None,
        attention: Any = None,
        long: Any = None,
        impl: str = "auto",
        held: bool = True,
    ) -> _Plan:
        defaults, vae = self.defaults, self.vae.config
        check_prompt(prompt)
        machine.check_impl(impl)
        fps = _number("fps", defaults.fps if fps is None else fps, 0.1, 1000)
        seconds = _number("seconds", defaults.frames / fps if seconds is None else seconds, 0, 86_400)
        if not (frames := round(seconds * fps)):
            raise ValueError(
                f"seconds={seconds} at {fps} frames per second is less than one frame; ask for at least {1 / fps:.3g}"
            )
        steps = _whole("steps", defaults.steps if steps is None else steps, 1, _MAX_STEPS)
        seed = _whole("seed", seed, 0, 2**63 - 1)
        guidance = _number("guidance", defaults.guidance if guidance is None else guidance, -100, 100)
        attention = AttentionMode.parse(attention) if isinstance(attention, str) else attention
        if not isinstance(attention, AttentionMode | None):
            raise TypeError(f"attention must be an AttentionMode, text or None; got {type(attention).__name__}")
        height, width = self._check_size(defaults.size if size is None else size)
        long = self._long(long, frames, attention)
        if isinstance(self.text, WordTextEncoder):
            self.text.tokenize([prompt])
        padded = self._padded(frames)
        free = machine.available(self.device)
        at_once = padded if long == "once" else min(padded, defaults.frames)
        tile, needed = self._memory(padded, height, width, impl, held, free, at_once)
        if needed > free:
            raise TooLargeError(
                f"{width}x{height} with {frames} frames needs about {gib(needed)} and {gib(free)} are free; "
                + self._would_fit(padded, height, width, impl, held, free)
            )
        latents = vae.latent_shape(padded, height, width)
        seen = None if long == "once" else at_once
        for remark in self._remarks(prompt, frames, (height, width), latents, steps, guidance, seen):
            warnings.warn(remark, stacklevel=3)
        return _Plan(prompt, frames, (height, width), fps, seed, steps, guidance, attention, long, latents, tile)

    def _long(self, long: Any, frames: int, attention: AttentionMode | None) -> str:
        if long not in (None, *_LONG):
            raise ValueError(f"long must be one of {', '.join(_LONG)} or None; got {long!r}")
        able = self.vae.config.temporal_factor == self.dit.config.patch[0] == 1 and self.defaults.frames > _CHUNK
        if long is None:
            return "stream" if able and attention is None and frames > self.defaults.frames else "once"
        if long != "once" and not able:
            raise ValueError(
                f"long={long!r} needs a checkpoint whose latents and tokens are single frames; this one has once only"
            )
        return long

    def _remarks(
        self,
        prompt: str,
        frames: int,
        size: tuple[int, int],
        latents: Sequence[int],
        steps: int,
        guidance: float,
        seen: int | None,
    ) -> Iterator[str]:
        """What is worth knowing before the work begins."""
        own, defaults = isinstance(self.text, WordTextEncoder), self.defaults
        if own and (size != tuple(defaults.size) or frames > defaults.frames):
            made_for = f"{defaults.size[1]}x{defaults.size[0]} and up to {defaults.frames} frames"
            yield f"this checkpoint was trained on {made_for}; others may look wrong"
        if unknown := self.text.unknown(prompt):
            yield f"this checkpoint does not know: {', '.join(unknown)}. It knows: {', '.join(self.text.words)}"
        duration = estimate.seconds(self.dit, self.vae, latents, steps=steps, guidance=guidance, seen=seen)
        if duration > estimate.LONG:
            yield f"this takes {estimate.in_words(duration)} on this machine, guessed from its rate of multiplication"

    def _padded(self, frames: int) -> int:
        """As many frames or a few more: those of latents that patches divide."""
        factor, patch = self.vae.config.temporal_factor, self.dit.config.patch[0]
        latents = math.ceil((frames - 1) / factor) + 1
        return (math.ceil(latents / patch) * patch - 1) * factor + 1

    def _check_size(self, size: Any) -> tuple[int, int]:
        try:
            height, width = size
        except (TypeError, ValueError):
            raise ValueError(f"size must be (height, width), got {size!r}") from None
        for name, side, patch in (
            ("height", height, self.dit.config.patch[1]),
            ("width", width, self.dit.config.patch[2]),
        ):
            unit = self.vae.config.spatial_factor * patch
            whole = isinstance(side, Integral) and not isinstance(side, bool)
            if not whole or not unit <= side <= _MAX_SIDE:
                raise ValueError(f"size: the {name} must be a whole number from {unit} to {_MAX_SIDE}, got {side!r}")
            if side % unit:
                below = side // unit * unit
                raise ValueError(
                    f"size: the {name} must be a multiple of {unit}, got {side}; {below} or {below + unit} would fit"
                )
        return int(height), int(width)

    def _memory(
        self, frames: int, height: int, width: int, impl: str, held: bool, free: int, at_once: int | None = None
    ) -> tuple[tuple[int, int], int]:
        """The tile to decode with, and about the bytes that a clip needs beyond the weights.

        Those of the larger of its two stages, the first of `at_once` frames, by default all, and, where the clip is
        `held`, of its frames.
        """
        dit, vae = self.dit.config, self.vae.config
        cells = math.prod(vae.latent_shape(at_once or frames, height, width)[1:])
        tokens = 2 * cells // math.prod(dit.patch)
        wide = self.dit.patch_embedding.weight.element_size()
        denoise = tokens * (10 * dit.dim + 2 * dit.ffn_dim) * wide + 8 * cells * vae.z_dim * 4
        if impl == "reference":
            denoise += 3 * dit.heads * tokens * tokens * 2
        clip = 2 * frames * height * width * 3 if held else 0
        tile, decode = self.vae.fit_tile("decode", height, width, free - clip, impl=impl)
        return tile, max(denoise, decode) + clip

    def _would_fit(self, frames: int, height: int, width: int, impl: str, held: bool, free: int) -> str:
        def fits(frames: int, height: int, width: int) -> bool:
            return self._memory(self._padded(frames), height, width, impl, held, free)[1] <= free

        factor = self.vae.config.temporal_factor
        shorter = next((n for n in _halving(frames - 1, factor) if fits(n + 1, height, width)), None)
        units = [self.vae.config.spatial_factor * patch for patch in self.dit.config.patch[1:]]
        smaller = next(
            (
                (h, w)
                for h, w in ((_down(height >> k, units[0]), _down(width >> k, units[1])) for k in range(1, 14))
                if fits(frames, h, w)
            ),
            None,
        )
        offers = []
        if smaller:
            offers.append(f"{smaller[1]}x{smaller[0]} with as many frames")
        if shorter is not None:
            offers.append(f"{shorter + 1} frames at this size")
        return f"{' or '.join(offers)} would fit" if offers else "ask for a smaller and shorter clip"


@dataclasses.dataclass(frozen=True)
class _Plan:
    prompt: str
    frames: int
    size: tuple[int, int]
    fps: float
    seed: int
    steps: int
    guidance: float
    attention: AttentionMode | None
    long: str
    latents: tuple[int, int, int, int]
    tile: tuple[int, int]
    inputs: list[Any] = dataclasses.field(default_factory=list)  # what was given, for the record of the result


def _read_wan(cls: type[Sora], folder: Path, index: dict[str, Any], dtype: torch.dtype) -> Sora:
    for name in ("transformer_2", "image_encoder"):
        if (folder / name).is_dir() or index.get(name) not in (None, [None, None]):
            raise CheckpointError(f"{folder} has a part {name!r}: only Wan 2.1's text-to-video models are supported")
    missing = [name for name in ("transformer", "vae", "text_encoder", "tokenizer") if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(f"{folder} lacks the folder {missing[0]!r} of a Wan checkpoint; copy it whole")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = read_json(scheduler) if scheduler.exists() else {}
    shift = config.get("flow_shift", config.get("shift", 3.0))
    defaults = {"frames": 81, "size": (480, 832), "fps": 16, "steps": 50, "guidance": 5.0, "shift": shift}
    defaults = build(Defaults, defaults, str(scheduler))
    try:
        dit, vae = SoraDiT.from_wan(folder / "transformer", dtype=dtype), CausalVAE.from_wan(folder / "vae")
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    text = UMT5TextEncoder.from_directory(folder)
    return cls(dit, vae, text, defaults)


def _number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not least <= value <= most or (name == "seconds" and value == 0):
        raise ValueError(f"{name} must lie between {least} and {most}, got {value}")
    return float(value)


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must lie between {least} and {most}, got {value}")
    return int(value)


def _halving(n: int, unit: int) -> Iterator[int]:
    while n > 0:
        n = _down(n // 2, unit) if n >= 2 * unit else 0
        yield n


def _down(n: int, unit: int) -> int:
    return max(unit, n // unit * unit)
