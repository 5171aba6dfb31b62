"""Tiny HunyuanVideo models of diffusers: text to video, image to video by the first frame's tokens, Framepack, and 1.5.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from . import Case, random_weights

diffusers = pytest.importorskip("diffusers")

TINY = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
    "num_refiner_layers": 1, "mlp_ratio": 1.5, "text_embed_dim": 12, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
TWO_TEXTS = {"text_embed_2_dim": 10, "image_embed_dim": 8}
FRAMEPACK = {"pooled_projection_dim": 8, "has_image_proj": True, "image_proj_dim": 6, "has_clean_x_embedder": True}


def hunyuan_video(name="HunyuanVideo", **changes):
    torch.manual_seed(0)
    single = {} if "15" in name else {"num_single_layers": 1}
    return random_weights(getattr(diffusers, f"{name}Transformer3DModel")(**TINY | single | changes))


def padded(*lens, of):
    return torch.arange(of).unsqueeze(0) < torch.tensor(lens).unsqueeze(1)


def inputs(model):
    torch.manual_seed(1)
    config = model.config
    return {
        "hidden_states": torch.randn(2, config.in_channels, 2, 4, 6),
        "timestep": torch.rand(2) * 1000,
        "encoder_hidden_states": torch.randn(2, 5, config.text_embed_dim),
        "encoder_attention_mask": padded(3, 5, of=5).long(),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0, 3000.0]) if config.guidance_embeds else None,
    }


def framepack_inputs(model):
    more = {
        "image_embeds": torch.randn(2, 3, model.config.image_proj_dim), "indices_latents": torch.arange(3, 5),
        "latents_clean": torch.randn(2, 4, 1, 4, 6), "indices_latents_clean": torch.tensor([2]),
        "latents_history_2x": torch.randn(2, 4, 2, 4, 6), "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": torch.randn(2, 4, 4, 4, 6), "indices_latents_history_4x": torch.arange(4),
    }  # fmt: skip
    return inputs(model) | more


def inputs_of_15(model):
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, model.config.in_channels, 2, 4, 4),
        "timestep": torch.rand(2) * 1000,
        "encoder_hidden_states": torch.randn(2, 5, model.config.text_embed_dim),
        "encoder_attention_mask": padded(3, 5, of=5),
        "encoder_hidden_states_2": torch.randn(2, 4, model.config.text_embed_2_dim),
        "encoder_attention_mask_2": torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]]).bool(),
        "image_embeds": torch.randn(2, 3, model.config.image_embed_dim),
    }


def steps(*, embeddings=1, norms=4):
    return {
        "patch_embed3d": embeddings, "norm_modulate": norms, "gate_residual, gate_residual_norm_modulate": 1,
        "norm_modulate, gate_residual, gate_residual_norm_modulate": 1,
    }  # fmt: skip


_LORA = ("to_q", "to_k", "to_v", "add_k_proj", "to_out.0", "ff.net.0.proj", "proj_mlp")
_ONE, _TWO = ({"qk_norm_rope": n, "spacetime_attention": n} for n in (1, 2))
_COMPILED = ("transformer_blocks", "single_transformer_blocks")
_BLOCKS = {"lora": _LORA, "compiled": _COMPILED, "draws": 8}
_POOLED = partial(hunyuan_video, pooled_projection_dim=8)
CASES = {
    "HunyuanVideo": Case(_POOLED, inputs, steps() | _TWO | {"gate_residual": 1}, **_BLOCKS),
    "HunyuanVideo by tokens of an image": Case(
        partial(_POOLED, image_condition_type="token_replace", guidance_embeds=False), inputs,
        steps() | _TWO | {"gate_residual": 1}, **_BLOCKS,
    ),
    "HunyuanVideo Framepack": Case(
        partial(hunyuan_video, "HunyuanVideoFramepack", **FRAMEPACK), framepack_inputs,
        steps(embeddings=4) | _TWO | {"gate_residual": 1}, **_BLOCKS,
    ),
    "HunyuanVideo-1.5": Case(
        partial(hunyuan_video, "HunyuanVideo15", **TWO_TEXTS), inputs_of_15, steps(norms=3) | _ONE,
        lora=_LORA[:-1], compiled=("transformer_blocks",), draws=8,
    ),
}  # fmt: skip
