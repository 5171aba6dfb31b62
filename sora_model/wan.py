"""A folder of Wan in the diffusers layout: which model of the family it is, its parts, and how it is best sampled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import checks, fp8
from .checkpoint import FP8, CheckpointError, build, read_headers, read_json, unfilled, wan_weights
from .dit import DiTConfig, SoraDiT, own_name
from .experts import NAMES
from .image import ImageEncoder
from .machine import TooLargeError, gib, left
from .solvers import Hosted
from .text import UMT5TextEncoder
from .vae import CausalVAE, VAEConfig, wan_config

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
_TRANSFORMERS = ("transformer", "transformer_2")  # in the order of experts.NAMES
_ALWAYS = ("transformer", "vae", "text_encoder", "tokenizer")


def read(
    folder: Path, index: dict[str, Any], dtype: torch.dtype, expert: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the arguments of `Sora`, the fields of its defaults) of a folder and its model_index.json.

    Transformers are in `dtype`, save what is stored in fp8 and stays so; of two, but for the `expert` where one is
    named, the sizes alone. Raises `CheckpointError` for a part that is missing, damaged or of something else.
    """
    also = [
        name for name in ("transformer_2", "image_encoder")
        if (folder / name).is_dir() or index.get(name) not in (None, [None, None])
    ]  # fmt: skip
    if missing := [name for name in (*_ALWAYS, *also) if not (folder / name).is_dir()]:
        raise CheckpointError(f"{folder} lacks the folder {missing[0]!r} of a Wan checkpoint; copy it whole")
    boundary = index.get("boundary_ratio")
    if (boundary is None) == ("transformer_2" in also):
        raise CheckpointError(
            f"{folder} has boundary_ratio={boundary!r} and {'a' if 'transformer_2' in also else 'no'} transformer_2: "
            "the one, in model_index.json, is the time below which the other takes over"
        )
    parts: dict[str, Any] = {"solver": _solver(folder)}
    try:
        if boundary is not None:
            checks.number("boundary_ratio", boundary, 0, 1)
            parts["boundary"] = float(boundary)
        own = {
            name: SoraDiT.from_wan(folder / name, dtype=dtype, keep_fp8=True)
            for name, which in zip(_TRANSFORMERS[: 1 if boundary is None else 2], NAMES, strict=False)
            if expert in (None, which)
        }
        with unfilled():
            sizes = None if expert is None else SoraDiT(next(iter(own.values())).config).to_dtype(dtype)
        parts |= {"dit": own.get("transformer", sizes), "second": own.get("transformer_2", sizes)}
        parts["vae"] = CausalVAE.from_wan(folder / "vae")
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    parts["text"] = UMT5TextEncoder.from_directory(folder)
    if parts["dit"].config.image_dim is not None:
        parts["image"] = ImageEncoder.from_directory(folder)
    return parts, defaults(parts["dit"].config, index) | ({"shift": parts["solver"].shift} if parts["solver"] else {})


@dataclasses.dataclass(frozen=True)
class Part:
    """Of a checkpoint on disk, from the headers of its files: numbers, and bytes.

    fp8   how many numbers stay in fp8 in memory
    room  bytes for the widening of the largest weight of these
    """

    name: str
    parameters: int
    bytes: int
    fp8: int = 0
    room: int = 0


def parts_of(folder: Path) -> list[Part]:
    """Those of a folder; no weights are read. Raises `CheckpointError` for what is missing."""
    parts = []
    for name in ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder"):
        if name in _ALWAYS or (folder / name).is_dir():
            if not (folder / name).is_dir():
                raise CheckpointError(f"{folder} lacks the folder {name!r} of a Wan checkpoint; copy it whole")
            files = wan_weights(folder / name)
            header = read_headers(files, also=FP8 if name.startswith("transformer") else ())
            if any("lora_" in key for key in header):
                raise CheckpointError(
                    f"{folder / name} holds a LoRA, which changes a model's weights: copy the model there, then "
                    "load_lora, or --lora"
                )
            held = fp8.weights(header)
            numbers = sum(math.prod(shape) for shape, _ in held.values())
            kept = [shape for key, (shape, dtype) in held.items() if fp8.stays(own_name(key), shape, dtype)]
            size = sum(file.stat().st_size for file in files)
            parts.append(Part(name, numbers, size, sum(map(math.prod, kept)), fp8.room(kept)))
    return parts


def weights_in(parts: Sequence[Part], dtype: torch.dtype) -> int:
    """Bytes of the parts in memory: the transformers in `dtype`, save what stays in fp8, and the room to widen that in;
    the VAE in fp32, the others as they are stored."""
    sizes, total = {"transformer": dtype.itemsize, "transformer_2": dtype.itemsize, "vae": 4}, 0
    for part in parts:
        wide = part.parameters - part.fp8
        total += wide * sizes[part.name] + part.fp8 if part.name in sizes else part.bytes
    return total + max((part.room for part in parts), default=0)


def check_memory(folder: Path, dtype: torch.dtype, free: int, expert: str | None = None) -> None:
    """Raises `TooLargeError` where a folder's weights, the transformers' in `dtype`, take more than `free` bytes."""
    others = {name for name, which in zip(_TRANSFORMERS, NAMES, strict=True) if expert not in (None, which)}
    parts, half = [part for part in parts_of(folder) if part.name not in others], torch.bfloat16
    if (wanted := weights_in(parts, dtype)) > free:
        fits = (smaller := weights_in(parts, half)) <= free
        offer = f"dtype={half}, of {gib(smaller)}, would fit" if fits else "use a smaller model"
        raise TooLargeError(f"the weights in {folder} take {gib(wanted)}, and {left(free, 'of memory ')}; {offer}")


def configs(folder: Path) -> tuple[DiTConfig, VAEConfig]:
    """Those of a folder's transformer and VAE."""
    try:
        dit = DiTConfig.from_wan(read_json(folder / "transformer" / "config.json"))
        return dit, build(VAEConfig, wan_config(read_json(folder / "vae" / "config.json"), "the VAE"), "the VAE")
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def which(config: DiTConfig, index: dict[str, Any]) -> str:
    """The model of a transformer's config and a model_index.json, in words."""
    sees = config.in_channels > config.out_channels
    if index.get("expand_timesteps"):
        kind = "Wan 2.2, from text or an image"
    elif index.get("boundary_ratio") is not None:
        kind = f"Wan 2.2 of two experts, from {'an image' if sees else 'text'}"
    else:
        what = "a first and a last image" if config.image_tokens else "an image" if sees else "text"
        kind = f"Wan 2.1, from {what}"
    return f"{kind}: {config.layers} layers of width {config.dim}"


def _solver(folder: Path) -> Hosted | None:
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.exists():
        return None
    try:
        return Hosted(read_json(file))
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def defaults(config: DiTConfig, index: dict[str, Any]) -> dict[str, Any]:
    """What the model's own examples ask for; Wan 2.2's of five billion is told by its times of tokens."""
    found = {"frames": 81, "size": (480, 832), "fps": 16, "steps": 50, "guidance": 5.0, "shift": 3.0}
    if index.get("expand_timesteps"):
        found |= {"frames": 121, "size": (704, 1280), "fps": 24}
    if index.get("boundary_ratio") is not None:
        sees = config.in_channels != config.out_channels
        found |= {"steps": 40, "guidance": (3.5, 3.5) if sees else (4.0, 3.0)}
    return found
