"""A tiny Mochi model of diffusers."""

from __future__ import annotations

import pytest
import torch

from . import Case, random_weights

diffusers = pytest.importorskip("diffusers")

TINY = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "pooled_projection_dim": 24, "in_channels": 4,
    "text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": 5,
}  # fmt: skip


def mochi():
    torch.manual_seed(0)
    return random_weights(diffusers.MochiTransformer3DModel(**TINY), "pos_frequencies")


def frozen_places():
    model = mochi()
    model.pos_frequencies.requires_grad_(False)
    return model


def inputs(model):
    """Texts of two lengths, the second one's padding in the middle of it."""
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 2, 4, 6),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "timestep": torch.rand(2) * 1000,
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]).bool(),
    }


_LORA = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "ff.net.0.proj", "ff.net.2")
_STEPS = {
    "patch_embed3d": 1, "norm_modulate, gate_residual, gate_residual_norm_modulate": 2,
    "qk_norm_rope, spacetime_attention": 2, "norm_modulate": 1,
}  # fmt: skip
CASES = {
    "Mochi": Case(mochi, inputs, _STEPS, lora=_LORA, compiled=("transformer_blocks",)),
    "Mochi, places not trained": Case(frozen_places, inputs, _STEPS, compiled=("transformer_blocks",)),
}
