"""Tiny LTX-2 models of diffusers: 2.0, and one with what came with 2.3: modulated texts, gated heads, split halves."""

from __future__ import annotations

import pytest
import torch

from . import Case, random_weights

diffusers = pytest.importorskip("diffusers")

TINY = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32,
    "audio_in_channels": 3, "audio_out_channels": 3, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16, "num_layers": 1, "caption_channels": 20,
}  # fmt: skip
LATER = {
    "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True,
    "rope_type": "split", "use_prompt_embeddings": False, "perturbed_attn": True,
}  # fmt: skip


def ltx2(**changes):
    torch.manual_seed(0)
    return random_weights(diffusers.LTX2VideoTransformer3DModel(**TINY | changes), "table")


def later():
    return ltx2(**LATER)


def inputs(model, sizes=(2, 2, 3), sounds=4):
    """Texts of two lengths, the second one's padding in the middle of it."""
    torch.manual_seed(1)
    F, H, W = sizes
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
    config, tokens = model.config, F * H * W
    return {
        "hidden_states": torch.randn(2, tokens, config.in_channels),
        "audio_hidden_states": torch.randn(2, sounds, config.audio_in_channels),
        "encoder_hidden_states": torch.randn(2, 5, config.caption_channels),
        "audio_encoder_hidden_states": torch.randn(2, 5, config.caption_channels),
        "timestep": torch.rand(2) * 1000,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": F,
        "height": H,
        "width": W,
        "audio_num_frames": sounds,
    }


def of_later(model):
    """A time for each token."""
    texts = {"encoder_hidden_states": torch.randn(2, 5, 32), "audio_encoder_hidden_states": torch.randn(2, 5, 16)}
    times = {"timestep": torch.rand(2, 12) * 1000, "audio_timestep": torch.rand(2) * 1000, "sigma": torch.rand(2) * 99}
    return inputs(model) | texts | times


_LORA = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
_STEPS = {
    "norm_modulate, gate_residual, gate_residual_norm_modulate": 1, "qk_norm_rope": 6, "spacetime_attention": 6,
}  # fmt: skip
CASES = {
    "LTX-2": Case(ltx2, inputs, _STEPS, lora=_LORA, compiled=("transformer_blocks",)),
    "LTX-2.3": Case(later, of_later, _STEPS | {"gate_heads": 6}, compiled=("transformer_blocks",)),
}
