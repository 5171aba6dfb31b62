"""How long a clip will take: the arithmetic of its two stages over the rate at which the machine multiplies."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from .dit import SoraDiT
from .tiling import Stage
from .vae import CausalVAE

SHARE = 0.5  # of the rate of a large product, which a model comes to: measured on one core, 0.52 (DiT) and 0.74 (VAE)
LONG = 60.0  # seconds from which on it is worth a note
SMALL = 10**11  # operations that no machine needs that long for: not worth a measurement


def denoise_flops(dit: SoraDiT, latents: Sequence[int], *, evaluations: int, seen: int | None = None) -> int:
    """Floating-point operations of so many evaluations of the transformer on latents [C, T, H, W], text and image left
    out; of which a token sees `seen` frames, by default all."""
    tokens = math.prod(latents[1:]) // math.prod(dit.config.patch)
    linear = [m for block in dit.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    given = ("k", "v", "k_image", "v_image")  # of text and image, which are few
    of_given = [m for block in dit.blocks for name, m in block.cross_attn.named_children() if name in given]
    weights = sum(m.weight.numel() for m in linear) - sum(m.weight.numel() for m in of_given)
    keys = tokens if seen is None else tokens * seen // latents[1]
    attention = 4 * tokens * keys * dit.config.dim * dit.config.layers  # every pair, whatever a window hides
    ends = 2 * 2 * dit.patch_embedding.weight.numel() * tokens
    return evaluations * (2 * weights * tokens + attention + ends)


def decode_flops(vae: CausalVAE, latents: Sequence[int]) -> int:
    """Floating-point operations of the decoder's convolutions on latents [C, T, H, W], in whole frames."""
    return _convolutions(vae.decoder.stages, math.prod(latents[1:]))


def encode_flops(vae: CausalVAE, video: Sequence[int]) -> int:
    """Floating-point operations of the encoder's convolutions on a video [C, T, H, W], in whole frames."""
    return _convolutions(vae.encoder.stages, math.prod(video[1:]))


def _convolutions(stages: Sequence[Stage], positions: int) -> int:
    flops = 0
    for stage in stages:
        positions = positions * math.prod(stage.up) // math.prod(stage.down)
        past = () if stage.past is None else (stage.past,)
        flops += sum(2 * conv.weight.numel() * positions for conv in (*stage.convs, *past))
    return flops


@functools.cache
def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of two matrices of 1024x1024: the median of a few, in a fraction of a second."""
    a, taken = torch.rand(1024, 1024, device=device, dtype=dtype), []
    for _ in range(5):
        begun = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        taken.append(time.perf_counter() - begun)
    return 2 * 1024**3 / statistics.median(taken)


def seconds(
    dit: SoraDiT, vae: CausalVAE, latents: Sequence[int], *, steps: int, guidance: float, seen: int | None = None
) -> float:
    """About how long a clip of latents [C, T, H, W] takes here, right within a factor of three; 0 for a moment.
    `seen`: as `denoise_flops`."""
    device, dtype = vae.quant_conv.weight.device, dit.patch_embedding.weight.dtype
    denoise = denoise_flops(dit, latents, evaluations=steps * (1 if guidance == 1 else 2), seen=seen)
    decode = decode_flops(vae, latents)
    if denoise + decode < SMALL:
        return 0.0
    return (denoise / rate(device, dtype) + decode / rate(device, torch.float32)) / SHARE


def coding_seconds(vae: CausalVAE, frames: int, height: int, width: int) -> float:
    """As `seconds`, of a video that is encoded and decoded."""
    size = vae.config.latent_shape(vae.config.fitting(frames), height, width)
    flops = encode_flops(vae, (3, frames, height, width)) + decode_flops(vae, size)
    return flops / rate(vae.quant_conv.weight.device, torch.float32) / SHARE if flops > SMALL else 0.0


def in_words(duration: float) -> str:
    """Of seconds: "about 40 seconds", "about 12 minutes", "about 3 hours"."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if duration >= 1.5 * length:
            return f"about {round(duration / length)} {unit}s"
    return f"about {max(1, round(duration))} second{'s' * (round(duration) > 1)}"
