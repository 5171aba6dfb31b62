"""What csrc/cuda/patchify_embed.cu takes: 16-bit videos of any strides, whole patches beside a slice of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from .._gpu import capability

FEATURES = 384  # of a patch, at most: kMostFeatures of csrc/cuda/patchify_embed.cu


def why_not_embed(video: Tensor, weight: Tensor, pos: Tensor | None, impl: str = "cuda") -> str | None:
    """Why the kernel of patch_embed3d does not take these arguments; of other implementations nothing."""
    if impl != "cuda":
        return None
    if (found := capability(video.device)) != 90:
        return f"cuda needs a GPU of compute capability 9.0; got {found / 10}"
    if video.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != video.dtype:
        return f"cuda takes bfloat16 or float16, video and weight alike; got {video.dtype} and {weight.dtype}"
    D, K = weight.shape[0], weight[0].numel() if weight.shape[0] else 0
    if D % 8 or K % 8 or not 0 < K <= FEATURES:
        return f"cuda takes a width and features of a patch in multiples of 8, at most {FEATURES}; got {D} and {K}"
    if pos is not None:
        return "cuda adds no pos; add it to the result"
    if video.numel() == 0:
        return f"cuda takes no empty tensors; got video of {tuple(video.shape)}"
    if weight.storage_offset() % 8 and weight.is_contiguous():
        return f"cuda takes a weight at a multiple of 8 elements; got offset {weight.storage_offset()}"
    return None
