"""Tiny Wan models of diffusers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from . import Case, random_weights

diffusers = pytest.importorskip("diffusers")

TINY = {
    "patch_size": [1, 2, 2], "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4,
    "out_channels": 4, "text_dim": 20, "freq_dim": 32, "ffn_dim": 56, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip


def wan(**changes):
    """A tiny WanTransformer3DModel whose every weight, biases and norms included, is random."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**TINY | changes)
    return random_weights(model, "table")


def vae(**changes):
    torch.manual_seed(0)
    config = {"base_dim": 6, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
    model = diffusers.AutoencoderKLWan(**config | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4} | changes)
    return random_weights(model, "gamma")


def inputs(model, sizes=(2, 4, 6), per="clip", length=4, batch=2):
    torch.manual_seed(1)
    config = model.config
    tokens = math.prod(n // p for n, p in zip(sizes, config.patch_size, strict=True))
    times = torch.rand((batch,) if per == "clip" else (batch, tokens)) * 1000
    return torch.randn(batch, config.in_channels, *sizes), times, torch.randn(batch, length, config.text_dim)


def clip(model):
    torch.manual_seed(1)
    return (torch.rand(1, 3, 9, 8, 12) * 2 - 1,)


WAN22 = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "dim_mult": [1, 1]}
_LORA = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
_VAE_BLOCKS = ("decoder.mid_block.resnets",)  # one more would be compiled anew too often: each chunk differs
_STEPS = {
    "patch_embed3d": 1, "norm_modulate, gate_residual, gate_residual_norm_modulate": 2, "qk_norm_rope": 4,
    "spacetime_attention": 4, "final_layer": 1,
}  # fmt: skip
CASES = {
    "Wan": Case(wan, inputs, _STEPS, lora=_LORA, compiled=("blocks",)),
    "AutoencoderKLWan": Case(vae, clip, {
        "norm_silu": 2, "norm_silu, causal_conv3d": 10, "causal_conv3d": 7, "downsample_conv3d": 1,
        "upsample_conv3d, causal_conv3d": 1,
    }, draws=8, compiled=_VAE_BLOCKS),
    "AutoencoderKLWan of Wan 2.2": Case(partial(vae, **WAN22), clip, {
        "norm_silu": 2, "norm_silu, causal_conv3d": 10, "causal_conv3d": 6, "downsample_conv3d": 1,
        "upsample_conv3d, causal_conv3d": 1,
    }, draws=8, compiled=_VAE_BLOCKS),
}  # fmt: skip
