"""Tiny VAEs of diffusers: HunyuanVideo's two, CogVideoX's, LTX-Video's, Mochi's."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from . import Case, random_weights

diffusers = pytest.importorskip("diffusers")


def make(name, **config):
    torch.manual_seed(0)
    return random_weights(getattr(diffusers, f"AutoencoderKL{name}")(**config), "gamma", "norm").eval()


def clip(model, channels=3, frames=5, side=16):
    torch.manual_seed(1)
    return (torch.rand(1, channels, frames, side, side) * 2 - 1,)


def several(kind, n):
    return [kind] * n


HUNYUAN = dict(
    latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
)  # fmt: skip
HUNYUAN15 = dict(latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1)
COGVIDEOX = dict(
    block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    down_block_types=several("CogVideoXDownBlock3D", 4), up_block_types=several("CogVideoXUpBlock3D", 4),
)  # fmt: skip
LTX = dict(
    latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
    layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), patch_size=2,
)  # fmt: skip
MOCHI = dict(
    latent_channels=4, encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
    layers_per_block=(1, 1, 1, 1, 1), add_attention_block=(False,) * 5, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
)  # fmt: skip
EVEN = "its kernel has an even side, so that a frame is not padded alike on both"
BY_PIXEL = "its norm is a CogVideoXSpatialNorm3D, whose scale differs from pixel to pixel"
CASES = {
    "AutoencoderKLHunyuanVideo": Case(
        partial(make, "HunyuanVideo", **HUNYUAN), partial(clip, side=32), {"norm_silu": 18, "causal_conv3d": 42},
        compiled=("decoder.mid_block.resnets",), draws=4,
    ),
    "AutoencoderKLHunyuanVideo15": Case(
        partial(make, "HunyuanVideo15", **HUNYUAN15), clip, {"norm_silu": 21, "causal_conv3d": 50},
        compiled=("decoder.mid_block.resnets",), draws=8,
    ),
    "AutoencoderKLCogVideoX": Case(
        partial(make, "CogVideoX", **COGVIDEOX), clip, {"norm_silu": 7, "causal_conv3d": 78}, {BY_PIXEL: 11},
        compiled=("encoder.mid_block.resnets",), draws=12,
    ),
    "AutoencoderKLLTXVideo": Case(
        partial(make, "LTXVideo", **LTX), clip, {"norm_silu": 12, "causal_conv3d": 27},
        {"it has a stride, a dilation or groups": 3},
        compiled=("encoder.mid_block.resnets",), draws=4,
    ),
    "AutoencoderKLMochi": Case(
        partial(make, "Mochi", **MOCHI), clip, {"norm_silu": 11, "causal_conv3d": 20}, {EVEN: 3},
        compiled=("encoder.block_in.resnets",), draws=4,
    ),
}  # fmt: skip
