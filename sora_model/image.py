"""The image encoder of Wan 2.1's image-to-video models: CLIP's vision half, through `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import extras
from .checkpoint import CheckpointError, check_finite, check_known, read_headers, read_json, unfilled, wan_weights


class ImageEncoder:
    """CLIP's vision transformer and its preparation of images, from local folders. `dim` is the width of a token."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.dim = model.config.hidden_size

    @classmethod
    def from_directory(cls, path: str | Path) -> ImageEncoder:
        """Reads `path/image_encoder` and `path/image_processor` of a Wan directory; nothing is downloaded."""
        with extras.named("the image encoder of Wan weights"):
            from transformers import CLIPImageProcessor, CLIPVisionModel
        folders = [Path(path) / name for name in ("image_encoder", "image_processor")]
        for folder in folders:
            if not folder.is_dir():
                raise CheckpointError(f"{folder} is missing: a Wan checkpoint that sees an image has it")
        check_sizes(folders[0])
        try:
            model, info = CLIPVisionModel.from_pretrained(
                folders[0], local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            processor = CLIPImageProcessor.from_pretrained(folders[1], local_files_only=True)
        except Exception as error:  # transformers raises many kinds for damaged files
            raise CheckpointError(f"the image encoder in {path} cannot be read: {error}") from error
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(f"{folders[0]} lacks {len(missing)} tensors of its model (first: {missing[0]!r})")
        try:
            check_finite(model.state_dict(), str(folders[0]))
        except FloatingPointError as error:
            raise CheckpointError(f"{error}; the checkpoint is damaged") from None
        return cls(model.eval(), processor)

    def to(self, device: torch.device | str) -> ImageEncoder:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> Tensor:
        """The last but one hidden states `[1, I, D]` of images uint8 `[N, H, W, 3]`: those of each after the other."""
        pixels = self.processor(images=list(images), return_tensors="pt").pixel_values
        states = self.model(pixels.to(self.model.device, self.model.dtype), output_hidden_states=True).hidden_states[-2]
        return states.flatten(0, 1)[None]


def check_sizes(folder: Path) -> list[str]:
    """As `text.check_sizes`, of the image encoder."""
    with extras.named("the image encoder of Wan weights"):
        from transformers import CLIPVisionConfig, CLIPVisionModel

    def bare(name: str) -> str:  # newer versions of transformers leave the prefix out
        return name.removeprefix("vision_model.")

    found = {bare(name): held.shape for name, held in read_headers(wan_weights(folder)).items()}
    config = read_json(folder / "config.json")
    asked = config.get("vision_config", config).get("num_hidden_layers", 12)
    held = len({name.split(".")[2] for name in found if name.startswith("encoder.layers.")})
    if type(asked) is not int or asked != held:
        raise CheckpointError(
            f"{folder / 'config.json'}: num_hidden_layers must be {held}, as in the weights; got {asked!r}"
        )
    try:
        with unfilled():
            model = CLIPVisionModel(CLIPVisionConfig.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # transformers raises many kinds for damaged files
        raise CheckpointError(f"the image encoder in {folder.parent} cannot be read: {error}") from error
    wanted = {bare(name): tuple(value.shape) for name, value in model.named_parameters()}
    return check_known(wanted, found, str(folder))
