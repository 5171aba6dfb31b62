"""Tiny Cosmos models of diffusers: Predict 1, and 2.5, which attends to an image as well and has a time for each frame.
"""

from __future__ import annotations

import pytest
import torch

from . import Case, random_weights

diffusers = pytest.importorskip("diffusers")

TINY = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2,
    "mlp_ratio": 2.0, "text_embed_dim": 20, "adaln_lora_dim": 8, "max_size": (4, 8, 12), "concat_padding_mask": False,
}  # fmt: skip
WITH_IMAGE = {
    "extra_pos_embed_type": None, "use_crossattn_projection": True, "crossattn_proj_in_channels": 12,
    "encoder_hidden_states_channels": 20, "img_context_dim_in": 10, "img_context_num_tokens": 3,
    "img_context_dim_out": 48,
}  # fmt: skip


def cosmos(**changes):
    torch.manual_seed(0)
    return random_weights(diffusers.CosmosTransformer3DModel(**TINY | changes), "pos_emb")


def cosmos_with_image():
    return cosmos(**WITH_IMAGE, num_layers=1)


def inputs(model):
    torch.manual_seed(1)
    latents, text = torch.randn(2, 4, 2, 4, 6), torch.randn(2, 5, model.config.text_embed_dim)
    return {"hidden_states": latents, "timestep": torch.rand(2), "encoder_hidden_states": text, "fps": 16}


def inputs_with_image(model):
    torch.manual_seed(1)
    context = torch.randn(2, 5, 12), torch.randn(2, 3, 10)
    return {
        "hidden_states": torch.randn(2, 4, 2, 4, 6),
        "timestep": torch.rand(2, 1, 2, 1, 1),
        "encoder_hidden_states": context,
    }


_LORA = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
_STEPS = {
    "patch_embed3d": 1, "norm_modulate, gate_residual, gate_residual_norm_modulate": 2, "qk_norm_rope": 4,
    "spacetime_attention": 4, "norm_modulate": 1,
}  # fmt: skip
_ONE = {name: count // 2 or 1 for name, count in _STEPS.items()}
CASES = {
    "Cosmos": Case(cosmos, inputs, _STEPS, lora=_LORA, compiled=("transformer_blocks",), draws=8),
    "Cosmos with an image": Case(cosmos_with_image, inputs_with_image, _ONE, compiled=("transformer_blocks",)),
}
