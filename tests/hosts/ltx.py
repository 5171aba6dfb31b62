"""A tiny LTX-Video model of diffusers."""

from __future__ import annotations

import pytest
import torch

from . import Case, random_weights

diffusers = pytest.importorskip("diffusers")

TINY = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32,
    "num_layers": 2, "caption_channels": 20,
}  # fmt: skip


def ltx(**changes):
    torch.manual_seed(0)
    return random_weights(diffusers.LTXVideoTransformer3DModel(**TINY | changes), "table")


def one_block():
    return ltx(num_layers=1)


def inputs(model, sizes=(2, 2, 3), per="clip"):
    """Texts of two lengths, the second one's padding in the middle of it."""
    torch.manual_seed(1)
    F, H, W = sizes
    config, tokens = model.config, F * H * W
    times = torch.rand((2,) if per == "clip" else (2, tokens)) * 1000
    return {
        "hidden_states": torch.randn(2, tokens, config.in_channels),
        "encoder_hidden_states": torch.randn(2, 5, config.caption_channels),
        "timestep": times,
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]),
        "num_frames": F,
        "height": H,
        "width": W,
    }


def per_token(model):
    return inputs(model, per="token")


_LORA = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
_STEPS = {
    "norm_modulate, gate_residual, gate_residual_norm_modulate": 2, "qk_norm_rope": 4, "spacetime_attention": 4,
    "norm_modulate": 1,
}  # fmt: skip
_ONE = {name: count // 2 or 1 for name, count in _STEPS.items()}
CASES = {
    "LTXVideo": Case(ltx, inputs, _STEPS, lora=_LORA, compiled=("transformer_blocks",)),
    "LTXVideo, a time for each token": Case(one_block, per_token, _ONE, compiled=("transformer_blocks",)),
}
