"""A tiny Latte model of diffusers."""

from __future__ import annotations

import pytest
import torch

from . import Case, random_weights

diffusers = pytest.importorskip("diffusers")

TINY = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8, "num_layers": 1,
    "cross_attention_dim": 24, "attention_bias": True, "sample_size": 8, "patch_size": 2,
    "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
    "norm_eps": 1e-6, "caption_channels": 10, "video_length": 3,
}  # fmt: skip


def latte(**changes):
    torch.manual_seed(0)
    return random_weights(diffusers.LatteTransformer3DModel(**TINY | changes), "table")


def with_affine_norms():
    return latte(norm_elementwise_affine=True, norm_eps=1e-5)


def inputs(model):
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 3, 8, 8),
        "timestep": torch.tensor([300, 800]),
        "encoder_hidden_states": torch.randn(2, 5, 10),
    }


_STEPS = {
    "patch_embed3d": 1, "norm_modulate, gate_residual, gate_residual_norm_modulate": 2, "spacetime_attention": 3,
}  # fmt: skip
_BLOCKS = ("transformer_blocks", "temporal_transformer_blocks")
CASES = {
    "Latte": Case(latte, inputs, _STEPS, compiled=_BLOCKS),
    "Latte, norms with weights": Case(with_affine_norms, inputs, _STEPS, compiled=_BLOCKS),
}
