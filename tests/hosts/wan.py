"""Tiny Wan models of diffusers, and those built of its blocks."""

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


def wan(name="Wan", **changes):
    """A tiny model whose every weight, biases and norms included, is random."""
    torch.manual_seed(0)
    model = getattr(diffusers, f"{name}Transformer3DModel")(**TINY | changes)
    return random_weights(model, "table", "padding")


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


def vace_inputs(model):
    latents, times, text = inputs(model)
    control = torch.randn(2, model.config.vace_in_channels, *latents.shape[2:])
    named = {"hidden_states": latents, "timestep": times, "encoder_hidden_states": text}
    return named | {"control_hidden_states": control, "control_hidden_states_scale": torch.tensor([0.7])}


def image_inputs(model):
    latents, times, text = inputs(model, length=512)
    return latents, times, text, torch.randn(2, 7, model.config.image_dim)


def animate_inputs(model):
    latents, times, text, image = image_inputs(model)
    latents, side = torch.cat([latents, latents[:, :, :1]], 2), model.config.motion_encoder_size
    pose = torch.randn(2, model.config.latent_channels, 2, *latents.shape[3:])
    return latents, times, text, image, pose, torch.randn(2, 3, 8, side, side)


def forcing_inputs(model):
    """A timestep for each frame, and how many of them a second has."""
    latents, _, text = inputs(model, sizes=(4, 4, 4))
    times = torch.rand(2, 4) * 1000
    return latents, times, text, None, True, [1]


WAN22 = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "dim_mult": [1, 1]}
_LORA = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
IMAGE = {"image_dim": 8, "added_kv_proj_dim": 48}
_ANIMATE = IMAGE | {
    "in_channels": 12, "latent_channels": 4, "motion_encoder_size": 16, "motion_style_dim": 12, "motion_dim": 4,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 6}, "motion_encoder_dim": 12,
    "face_encoder_hidden_dim": 12, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
}  # fmt: skip


def steps(blocks, *, embeddings=1, attentions=0):
    """The steps of so many blocks, of which each has two attentions, and of further ones."""
    return {
        "patch_embed3d": embeddings, "norm_modulate, gate_residual, gate_residual_norm_modulate": blocks,
        "qk_norm_rope": 2 * blocks + attentions, "spacetime_attention": 2 * blocks + attentions, "final_layer": 1,
    }  # fmt: skip


_VAE_BLOCKS = ("decoder.mid_block.resnets",)  # one more would be compiled anew too often: each chunk differs
_BLOCKS = {"lora": _LORA, "compiled": ("blocks",), "draws": 8}
CASES = {
    "Wan": Case(wan, inputs, steps(2), **_BLOCKS),
    "Wan with an image": Case(partial(wan, num_layers=1, **IMAGE), image_inputs, steps(1), **_BLOCKS),
    "WanVACE": Case(
        partial(wan, "WanVACE", vace_layers=[0], vace_in_channels=6), vace_inputs, steps(3, embeddings=2),
        lora=_LORA, compiled=("blocks", "vace_blocks"), draws=8,
    ),
    "WanAnimate": Case(
        partial(wan, "WanAnimate", **_ANIMATE), animate_inputs, steps(2, embeddings=2, attentions=1), **_BLOCKS
    ),
    "ChronoEdit": Case(partial(wan, "ChronoEdit", num_layers=1, **IMAGE), image_inputs, steps(1), **_BLOCKS),
    "SkyReels-V2": Case(partial(wan, "SkyReelsV2", num_layers=1), inputs, steps(1), **_BLOCKS),
    "SkyReels-V2 with diffusion forcing": Case(
        partial(wan, "SkyReelsV2", num_layers=1, num_frame_per_block=2, inject_sample_info=True), forcing_inputs,
        steps(1), **_BLOCKS,
    ),
    "AutoencoderKLWan": Case(vae, clip, {
        "norm_silu": 2, "norm_silu, causal_conv3d": 10, "causal_conv3d": 7, "downsample_conv3d": 1,
        "upsample_conv3d, causal_conv3d": 1,
    }, draws=4, compiled=_VAE_BLOCKS),
    "AutoencoderKLWan of Wan 2.2": Case(partial(vae, **WAN22), clip, {
        "norm_silu": 2, "norm_silu, causal_conv3d": 10, "causal_conv3d": 6, "downsample_conv3d": 1,
        "upsample_conv3d, causal_conv3d": 1,
    }, draws=4, compiled=_VAE_BLOCKS),
}  # fmt: skip
