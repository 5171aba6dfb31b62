"""What a copy of a Wan model holds, from its configs and the headers of its files: no weights are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import image, text
from .checkpoint import FP8, CheckpointError, Header, build, listed, read_headers, read_json, wan_weights
from .dit import ORIGINAL, SoraDiT, own_name
from .extras import MissingExtra
from .vae import CausalVAE, VAEConfig, wan_config
from .wan_files import own_vae_name, vae_config

_ENCODERS = {"text_encoder": text.check_sizes, "image_encoder": image.check_sizes}


def compare(folder: Path, name: str) -> list[str]:
    """Compares names, shapes and dtypes of the tensors of the part `name` with those that its config asks for.

    Raises `CheckpointError` for what is missing, unknown or of another shape; of an encoder, which leaves what it does
    not know unread, that is returned as a remark.
    """
    where = folder / name
    if name not in _ENCODERS:
        look(where)
        return []
    try:
        unread = _ENCODERS[name](where)
    except MissingExtra as error:
        return [f"{name}: its tensors are not compared with its config: {error}"]
    return [f"{name} holds {len(unread)} tensors that nothing reads{listed(unread)}"] if unread else []


def look(path: Path) -> str:
    """The model of Wan that a file, or a folder of one model, holds, in words; names and shapes are found to agree.

    Raises `CheckpointError` for a file of something else, one that is damaged, and a model that is not whole.
    """
    where, file = str(path), not path.is_dir()
    if file and re.search(r"-\d+-of-\d+\.safetensors", path.name):
        raise CheckpointError(f"{path} is one of several shards of a model: give their folder")
    held = read_headers([path] if file else wan_weights(path), also=FP8)
    sizes = {"_class_name": ORIGINAL} if file else read_json(path / "config.json")
    names, kind = {own_name(name) for name in held}, sizes.get("_class_name")
    try:
        if kind == "AutoencoderKLWan" or (file and "conv1.weight" in names):
            return _vae(held, None if file else sizes, where)
        if file and "patch_embedding.weight" not in names and not any("lora_" in name for name in names):
            raise CheckpointError(f"{path} holds no model of Wan: its first tensor is {next(iter(held), '')!r}")
        config, given = SoraDiT.planned(sizes, held, where)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    sees = "" if config.image_dim is None else ", that sees an image"
    return (
        f"a transformer of Wan{sees}: {config.layers} layers of width {config.dim}, from {config.in_channels} to "
        f"{config.out_channels} latent channels, {len(given)} tensors"
    )


def _vae(held: dict[str, Header], sizes: dict[str, Any] | None, where: str) -> str:
    """In words; without sizes by Wan's own names."""
    if sizes is None:
        held = {own_vae_name(name): header for name, header in held.items()}
        sizes = vae_config({name: header.shape for name, header in held.items()})
    else:
        sizes = wan_config(sizes, where)
    config = build(VAEConfig, sizes, where)
    shapes = CausalVAE.planned(config, held, where)
    side = config.spatial_factor
    return f"a VAE of Wan: {config.z_dim} latent channels of {side}x{side} pixels, {len(shapes)} tensors"
