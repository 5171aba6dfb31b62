"""Fast, trainable, reference-proven operations for video diffusion transformers and their causal VAEs."""

from . import layers as layers
from ._dispatch import Unavailable
from .attention import (
    attention_backward,
    attention_forward,
    attention_plan,
    gate_heads,
    merge_attention,
    spacetime_attention,
)
from .causal_conv import causal_conv3d, downsample_conv3d, norm_silu, upsample_conv3d
from .modulation import gate_residual, gate_residual_norm_modulate, norm_modulate
from .patchify import final_layer, patch_embed3d, unpatchify3d, video_to_uint8
from .qknorm_rope import qk_norm_rope, qk_norm_stats
from .watermark import embed_watermark

__version__ = "0.1.0"

__all__ = [
    "Unavailable",
    "attention_backward",
    "attention_forward",
    "attention_plan",
    "causal_conv3d",
    "downsample_conv3d",
    "embed_watermark",
    "final_layer",
    "gate_heads",
    "gate_residual",
    "gate_residual_norm_modulate",
    "merge_attention",
    "norm_modulate",
    "norm_silu",
    "patch_embed3d",
    "qk_norm_rope",
    "qk_norm_stats",
    "spacetime_attention",
    "unpatchify3d",
    "upsample_conv3d",
    "video_to_uint8",
]
