"""The VAEs of Wan by Wan's own names: one safetensors file without a config, whose contents each model fixes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_STATISTICS = {  # z_dim -> mean and standard deviation of latents over the training set
    16: (
        (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
         -0.9497, 0.2503, -0.2921),
        (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
         2.8251, 1.9160),
    ),
    48: (
        (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
         -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055,
         -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083,
         -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
        (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
         0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
         0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
         0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
}  # fmt: skip
_BLOCKS = 2  # residual blocks of a level of the encoder; the decoder's have one more
_NAMES = {  # in this order; a norm is its weight
    "encoder.conv1": "encoder.conv_in", "decoder.conv1": "decoder.conv_in", "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attention", "middle.2": "mid_block.resnets.1", "head.0": "norm_out", "head.2": "conv_out",
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
    "shortcut": "conv_shortcut", "resample.1": "resample", ".gamma": "",
}  # fmt: skip
_WHOLE = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_NESTED = re.compile(r"(encoder\.down|decoder\.up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.")
_FLAT = re.compile(r"decoder\.upsamples\.(\d+)\.")


def own_vae_name(name: str) -> str:
    """Our name of a weight."""
    module, _, rest = name.partition(".")
    name = f"{_WHOLE.get(module, module)}.{rest}"
    name = _NESTED.sub(lambda m: _level(m[1], int(m[2]), int(m[3])), name)
    name = _FLAT.sub(lambda m: _level("decoder.up", *divmod(int(m[1]), _BLOCKS + 2)), name)
    name = name.replace("encoder.downsamples.", "encoder.down_blocks.")
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _level(kind: str, level: int, place: int) -> str:
    blocks = _BLOCKS if kind == "encoder.down" else _BLOCKS + 1
    layer = f"resnets.{place}" if place < blocks else f"{kind.partition('.')[2]}sampler"
    return f"{kind}_blocks.{level}.{layer}."


def vae_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The fields of a VAEConfig, of the weights' shapes by our names; ValueError where they are of something else."""
    try:
        base, channels = shapes["encoder.conv_in.weight"][:2]
        z_dim, top = shapes["post_quant_conv.weight"][0], shapes["decoder.conv_in.weight"][0]
        mean, std = _STATISTICS[z_dim]
    except (KeyError, ValueError) as error:
        raise ValueError(f"holds no VAE of Wan: {error} is missing, or no number of latent channels") from error
    patch = 2 if channels == 12 else 1
    return {
        "base_dim": base, "decoder_base_dim": None if top == 4 * base else top // 4, "z_dim": z_dim,
        "in_channels": channels // patch**2, "patch": patch, "latents_mean": mean, "latents_std": std,
        "residual": any(name.startswith("encoder.down_blocks.0.resnets") for name in shapes),
    }  # fmt: skip
