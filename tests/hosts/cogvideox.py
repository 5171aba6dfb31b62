"""Tiny CogVideoX models of diffusers: 1.0 with sinusoidal places, and 1.5 with a rotary embedding and patches in time.
"""

from __future__ import annotations

import pytest
import torch

from . import Case, random_weights

diffusers = pytest.importorskip("diffusers")

TINY = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": 12, "num_layers": 2, "sample_width": 6, "sample_height": 4, "sample_frames": 5,
    "max_text_seq_length": 3,
}  # fmt: skip


def cogvideox(**changes):
    torch.manual_seed(0)
    return random_weights(diffusers.CogVideoXTransformer3DModel(**TINY | changes))


def cogvideox15():
    return cogvideox(use_rotary_positional_embeddings=True, patch_size_t=2, ofs_embed_dim=8, num_layers=1)


def inputs(model):
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 2, 4, 4, 6),
        "encoder_hidden_states": torch.randn(2, 3, 12),
        "timestep": torch.tensor([300, 800]),
    }


def inputs15(model):
    angles = (torch.rand(12, 8) * 6).repeat_interleave(2, 1)
    latents = {"hidden_states": torch.randn(2, 4, 4, 4, 6), "ofs": torch.tensor([2, 2])}
    return inputs(model) | latents | {"image_rotary_emb": (angles.cos(), angles.sin())}


_LORA = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
_STEPS = {
    "patch_embed3d": 1, "norm_modulate, gate_residual, gate_residual_norm_modulate": 2, "qk_norm_rope": 2,
    "spacetime_attention": 2, "norm_modulate": 1,
}  # fmt: skip
_ONE = dict.fromkeys(_STEPS, 1)
CASES = {
    "CogVideoX": Case(cogvideox, inputs, _STEPS, lora=_LORA, compiled=("transformer_blocks",)),
    "CogVideoX 1.5": Case(cogvideox15, inputs15, _ONE, compiled=("transformer_blocks",)),
}
