"""From a sentence to a clip: text encoder, transformer, flow sampler and streaming VAE decoder behind one class.

sora = Sora.from_pretrained()                    # the shipped toy checkpoint
clip = sora.generate("a red circle bounces", seconds=2, seed=1)
clip.save("out/clip.mp4")
"""

from __future__ import annotations

import base64
import dataclasses
import html
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import flow, lora, machine, media, planning, wan
from .attention import AttentionMode
from .checkpoint import (
    CheckpointError,
    build,
    check_finite,
    read_json,
    read_names,
    read_part,
    write_json,
    write_tensors,
)
from .dit import DiTConfig, SoraDiT
from .experts import NAMES, Experts
from .frames import to_pixels
from .image import ImageEncoder
from .lora import Loading
from .machine import TooLargeError, Turns, choose_device, gib
from .planning import Defaults, Plan, Planning
from .safety import filters, shading
from .safety.credentials import Origin
from .sampling import Sampler
from .text import UMT5TextEncoder, WordTextConfig, WordTextEncoder
from .vae import CausalVAE, VAEConfig
from .verbs import Verbs

TOY = Path(__file__).parent / "checkpoints" / "toy"

Progress = Callable[[str, int, int], None]
"""(stage, done, total), called as a clip is made."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PARTS = {
    "transformer": (SoraDiT, DiTConfig),
    "vae": (CausalVAE, VAEConfig),
    "text_encoder": (WordTextEncoder, WordTextConfig),
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A finished clip: `frames` uint8 `[T, H, W, 3]` sRGB, and what it was made from."""

    frames: np.ndarray
    fps: float
    prompt: str
    seed: int
    steps: int
    guidance: float | tuple[float, float]
    origin: Origin | None = dataclasses.field(default=None, repr=False, compare=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a signed H.264 MP4, whole or not at all, and returns its path. Raises `media.MediaError` if it cannot,
        `safety.credentials.CredentialsError` for a certificate that has expired, say."""
        return media.write_video(path, self.frames, self.fps, origin=self._origin)

    @property
    def _origin(self) -> Origin:
        made = dict(seed=self.seed, steps=self.steps, guidance=self.guidance)
        return self.origin or Origin.of(None, prompt=self.prompt, **made)

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        length = f"{count} frames of {width}x{height}, {count / self.fps:.3g} s"
        guidance = " and ".join(f"{g:g}" for g in dict.fromkeys(flow.pair(self.guidance)))
        return f"Clip({self.prompt!r}: {length}, seed {self.seed}, {self.steps} steps, guidance {guidance})"

    def _repr_html_(self) -> str:
        """The clip itself, playing in a notebook."""
        video = base64.b64encode(media.video_bytes(self.frames, self.fps, origin=self._origin)).decode()
        height, width = self.frames.shape[1:3]
        scale = max(1, 256 // max(height, width))  # small clips enlarged by whole pixels
        return (
            f'<video controls autoplay loop muted playsinline width="{scale * width}" height="{scale * height}" '
            f'style="image-rendering: pixelated" title="{html.escape(repr(self))}" '
            f'src="data:video/mp4;base64,{video}"></video>'
        )


class Sora(Verbs, Planning, Loading):
    """A text-to-video model ready to use. Build it by `from_pretrained`.

    second, boundary  a transformer that takes over from `dit` below a time, 0 to 1: Wan 2.2's expert of little noise
    image             the encoder of the image that `dit` sees beside the text, where it sees one
    solver            integrates the velocity; None: Euler's steps
    """

    folder: Path | None = None
    """Where the checkpoint was read from."""

    expert: str | None = None
    """The one of two whose weights are here, where the other's are on other processes."""

    experts: Experts | None = None
    """How they meet, inside of `parallel.sampling`."""

    def __init__(
        self,
        dit: SoraDiT,
        vae: CausalVAE,
        text: WordTextEncoder | UMT5TextEncoder,
        defaults: Defaults,
        *,
        second: SoraDiT | None = None,
        boundary: float = 0.0,
        image: ImageEncoder | None = None,
        solver: Callable[..., Tensor] | None = None,
    ) -> None:
        self.dit, self.vae, self.text, self.defaults = dit, vae, text, defaults
        self.second, self.boundary, self.image, self.solver = second, boundary, image, solver or flow.sample
        self._turns: Turns | None = None
        self._loras = [lora.LoRAs(part) for part in (dit, second) if part is not None]
        latents, given = vae.config.z_dim, vae.config.z_dim + vae.config.temporal_factor
        if dit.config.in_channels not in (latents, latents + given) or dit.config.out_channels != latents:
            raise CheckpointError(
                f"the transformer works on {dit.config.in_channels} -> {dit.config.out_channels} latent channels, "
                f"the VAE has {latents}: they are parts of different checkpoints"
            )
        if second is not None and second.config != dit.config:
            raise CheckpointError("the two transformers are not of one size: they are parts of different checkpoints")
        if dit.config.image_dim != (image and image.dim):
            raise CheckpointError(
                f"the transformer sees an image of width {dit.config.image_dim}, the image encoder gives "
                f"{image and image.dim}: they are parts of different checkpoints"
            )
        if dit.config.text_dim != text.dim:
            raise CheckpointError(
                f"the transformer takes text of width {dit.config.text_dim}, the text encoder gives {text.dim}: "
                "they are parts of different checkpoints"
            )
        if second is None and isinstance(defaults.guidance, tuple):
            raise CheckpointError(f"guidance must be one number for one transformer; got {defaults.guidance}")

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = "toy",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        offload: bool | None = None,
        expert: str | None = None,
    ) -> Sora:
        """Loads a checkpoint folder: one written by `save_pretrained`, "toy" for the shipped one, or one of Wan 2.1 or
        2.2 in the diffusers layout, from text or from images.

        A Wan folder (Wan2.1-T2V-1.3B-Diffusers, say) has transformer/, vae/, text_encoder/, tokenizer/, scheduler/
        and model_index.json; models of two experts, or that see an image, have folders for these too. `device` defaults
        to a GPU where there is one; `dtype`, of the transformer, to fp32, for Wan on a GPU to bf16. In half precision
        some weights stay in fp32, as Wan keeps them. With `offload` the parts take turns on the device, each there only
        while it is at work; None: where they do not all fit. Of a checkpoint of two experts, an `expert`, "high" or
        "low", has its weights alone loaded: see `experts`. Only local safetensors are read. Raises `CheckpointError`
        for what is missing, damaged, unsafe or of another model, `TooLargeError` for weights that do not fit in memory,
        TypeError for another dtype.
        """
        if dtype is not None and dtype not in _DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, _DTYPES))} or None; got {dtype!r}")
        if not isinstance(source, str | os.PathLike):
            raise TypeError(f"source must be the folder of a checkpoint, or 'toy'; got {source!r}")
        folder = TOY if os.fspath(source) == "toy" else Path(source)
        device = choose_device(device)
        if not folder.exists():
            raise CheckpointError(
                f"there is no checkpoint at {folder}; give the folder that holds model_index.json, or 'toy'"
            )
        if folder.is_file():
            if any("lora_" in name for name in read_names(folder)):
                raise CheckpointError(f"{folder} is a LoRA: load the model that it changes, then load_lora, or --lora")
            raise CheckpointError(f"{folder} is one file; give the folder of a whole checkpoint, with model_index.json")
        if not (folder / "model_index.json").exists() and (folder / "config.json").exists():
            raise CheckpointError(
                f"{folder} holds one model, not a checkpoint of several with a model_index.json; `sora info` says "
                "which it is and where it belongs"
            )
        index = read_json(folder / "model_index.json")
        kind = index.get("_class_name")
        if expert not in (None, *NAMES):
            raise ValueError(f"expert must be 'high', 'low' or None; got {expert!r}")
        if expert is not None and index.get("boundary_ratio") is None:
            raise ValueError(
                f"expert must be None (leave out --apart): {folder} has one transformer, not two experts; "
                f"got {expert!r}"
            )
        free = machine.available(torch.device("cpu"))
        if kind == "Sora":
            if (weights := sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))) > free:
                raise TooLargeError(
                    f"the weights in {folder} take {gib(weights)}, and {machine.left(free, 'of memory ')}; "
                    "use a smaller model"
                )
            parts = {name: read_part(folder / name, *kinds) for name, kinds in _PARTS.items()}
            defaults = build(Defaults, index, str(folder / "model_index.json"))
            parts["transformer"].to_dtype(dtype or torch.float32)
            sora = cls(parts["transformer"], parts["vae"], parts["text_encoder"], defaults)
        elif kind in wan.PIPELINES:
            dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
            wan.check_memory(folder, dtype, free, expert)
            parts, defaults = wan.read(folder, index, dtype, expert)
            sora = cls(**parts, defaults=build(Defaults, defaults, str(folder)))
        else:
            raise CheckpointError(
                f"{folder / 'model_index.json'} describes a {kind!r}; supported are 'Sora' and "
                + " and ".join(map(repr, wan.PIPELINES))
            )
        for module in filter(None, (sora.dit, sora.second, sora.vae.to(torch.float32))):
            module.eval().requires_grad_(False)
        sora.folder, sora.expert = folder, expert
        return sora._placed(device, offload)

    def _placed(self, device: torch.device, offload: bool | None) -> Sora:
        experts = [part for part in (self.dit, self.second) if part is not None and not part.head_table.is_meta]
        parts = list(filter(None, (self.text, self.image, *experts, self.vae)))
        turns = Turns(device, parts)
        if offload is None:
            offload = device.type != "cpu" and turns.whole > 0.9 * machine.available(device)
        if offload:
            self._turns = turns
        else:
            for part in parts:
                part.to(device)
        return self

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
        return self.turns.device

    @property
    def turns(self) -> Turns:
        """Called with each part before it is at work."""
        here = self.second if self.expert == "low" else self.dit
        return self._turns or Turns(here.head_table.device)

    @property
    def sees_frames(self) -> bool:
        """Are known frames given to the transformer in channels of their own, as to image-to-video models?"""
        return self.dit.config.in_channels > self.vae.config.z_dim

    def generate(
        self,
        prompt: str,
        *,
        seconds: float | None = None,
        size: tuple[int, int] | None = None,
        fps: float | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | tuple[float, float] | None = None,
        negative: str = "",
        shift: float | None = None,
        attention: AttentionMode | str | None = None,
        long: str | None = None,
        shade: bool = False,
        impl: str = "auto",
        progress: Progress | None = None,
    ) -> Clip:
        """Makes a clip of what `prompt` says.

        seconds    length; the clip has round(seconds * fps) frames
        size       (height, width), multiples of the VAE's factor times the patch (16 for the toy and for Wan)
        fps        frames per second of the file; the motion is that of the rate the model was trained at
        steps      of the checkpoint's sampler, Euler's where it names none; more is slower and finer
        guidance   how strongly to follow the prompt; 1 is not at all beyond the training data; of a checkpoint of two
                   experts two numbers, for much noise and for little
        negative   what the guidance leads away from
        shift      of the sampler's times toward noise; more for larger clips
        attention  mode of self-attention: an `AttentionMode`, or text such as "window=3x4x4" or "causal=frame"
        long       how to make what is longer than the clips of training: "once", all frames together; "stream", a few
                   at a time that see the last ones made and the first, in constant memory; "pieces", clips of that
                   length that begin with the end of the last, in constant memory. Checkpoints whose latents are frames
                   have all three, and "stream" by default; others have "once"
        shade      draw the noise with a mark in it (`safety.shading`), of this installation's key: another clip
        impl       of every kernel: "auto", "reference", "cpu" or "triton"

        What is left out is the checkpoint's own default. The same arguments on the same device give the same clip;
        another `impl` gives it up to rounding, as do the tiles in which frames too large for the memory are decoded; a
        surrounding `torch.autocast` has no effect.
        Raises ValueError or TypeError that names the argument, `TooLargeError` before anything is allocated.
        """
        plan = self._plan(
            prompt, seconds=seconds, size=size, fps=fps, seed=seed, steps=steps, guidance=guidance, negative=negative,
            shift=shift, attention=attention, long=long, shade=shade, impl=impl,
        )  # fmt: skip
        plan.asked["frames"] = plan.frames
        with machine.own_dtypes(self.device):
            frames = np.concatenate(list(self._frames(plan, impl, progress)))
        return self._clip(plan, frames)

    def generate_to(self, path: str | os.PathLike[str], prompt: str, **options: Any) -> Path:
        """`generate(prompt, **options)` straight into an MP4: written as it is decoded, whole or not at all.

        The frames are never held together: of the clip, only its latents and attention over them grow with its length.
        Nothing is computed if the request or the path is bad. Returns the path; also raises `media.MediaError`.
        """
        impl, progress = options.pop("impl", "auto"), options.pop("progress", None)
        if unknown := sorted(options.keys() - inspect.signature(self.generate).parameters.keys()):
            raise TypeError(f"generate_to takes no argument {unknown[0]!r}; it takes those of generate")
        plan = self._plan(prompt, **options, impl=impl, held=False)
        plan.asked["frames"] = plan.frames
        frames = (frame for chunk in self._frames(plan, impl, progress) for frame in chunk)
        with machine.own_dtypes(self.device):
            return media.write_video(path, frames, plan.fps, origin=self._origin(plan))

    @torch.no_grad()
    def _frames(self, plan: Plan, impl: str, progress: Progress | None, **how: Any) -> Iterator[np.ndarray]:
        """The clip's frames, uint8 `[t, H, W, 3]`, a chunk at a time as the VAE decodes it; `how`: `Sampler.draw`'s."""
        if self.sees_frames and "frames" not in how:
            raise ValueError(
                "this checkpoint makes clips from an image: give one (animate, or sora animate), or take a checkpoint "
                "that makes them from text alone"
            )
        sampler = Sampler(
            self.dit, self.text, plan.prompt, steps=plan.steps, guidance=plan.guidance, shift=plan.shift,
            negative=plan.negative, second=self.second, boundary=self.boundary, experts=self.experts,
            solver=self.solver, attention=plan.attention, impl=impl, turns=self.turns, clock=plan.clock,
        )  # fmt: skip
        latents = self._latents(plan, sampler, progress, how)
        self.vae.impl = impl
        done = 0
        for video in self.vae.decode_stream(map(self.vae.denormalize, latents), clamp=False, tile=plan.tile):
            pixels = to_pixels(video, impl)[: plan.frames - done]
            done += len(pixels)
            plan.clock()
            if progress is not None:
                progress("decode", done, plan.frames)
            if len(pixels):
                filters.check(pixels, "what was made")
                yield pixels

    def _latents(
        self, plan: Plan, sampler: Sampler, progress: Progress | None, how: Mapping[str, Any]
    ) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(plan.seed)
        if plan.long == "once":
            identity = self._origin(plan).identity if plan.shade else None
            noise = shading.draw((1, *plan.latents), identity, generator=generator).to(self.device)
            told = None if progress is None else lambda done, total: progress("denoise", done, total)
            parts = iter([sampler.draw(noise, progress=told, **how)])
        elif plan.long == "stream":
            window = self.defaults.frames - planning.CHUNK
            parts = sampler.stream(plan.latents, generator=generator, window=window, chunk=planning.CHUNK)
        else:
            length = self.defaults.frames
            parts = sampler.pieces(plan.latents, generator=generator, length=length, overlap=length // 2)
        for part in parts:
            if not torch.isfinite(part).all():
                raise FloatingPointError(
                    f"the transformer gives NaN or infinite latents ({sampler.dtype}, guidance={plan.guidance}, "
                    f"shift={plan.shift:g}): its weights or the text encoder's are damaged, or "
                    f"{sampler.dtype} is too narrow for them"
                )
            self.turns(self.vae)
            yield part

    def _clip(self, plan: Plan, frames: np.ndarray) -> Clip:
        return Clip(frames, plan.fps, plan.prompt, plan.seed, plan.steps, plan.guidance, self._origin(plan))

    def _origin(self, plan: Plan) -> Origin:
        made = plan.told(self.defaults) | ({"loras": loras} if (loras := self._loras[0].told()) else {})
        return Origin.of(self.folder, prompt=plan.prompt, inputs=tuple(plan.inputs), **made)
