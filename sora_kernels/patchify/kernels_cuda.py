"""What csrc/cuda/patchify_embed.cu and patchify_final.cu take: 16-bit tensors and weights of their dtype, on sm_90."""

from __future__ import annotations

import torch
from torch import Tensor

from .._gpu import capability

FEATURES = 384  # of a patch, at most: kMostFeatures of csrc/cuda/patchify_embed.cu
RESULTS = 192  # features of a token, at most, that final_layer gives
WIDTH = 8192  # of its tokens, at most: beside more of scale and shift no stages are left
FRAME = 64  # tokens of a row of scale and shift, at least: those of a product


def why_not_embed(video: Tensor, weight: Tensor, pos: Tensor | None, impl: str = "cuda") -> str | None:
    """Why the kernel of patch_embed3d does not take these arguments; of other implementations nothing."""
    if impl != "cuda":
        return None
    if reason := _why_no_kernel("video", video, weight):
        return reason
    D, K = weight.shape[0], weight[0].numel() if weight.shape[0] else 0
    if D % 8 or K % 8 or not 0 < K <= FEATURES:
        return f"cuda takes a width and features of a patch in multiples of 8, at most {FEATURES}; got {D} and {K}"
    if pos is not None:
        return "cuda adds no pos; add it to the result"
    if video.numel() == 0:
        return f"cuda takes no empty tensors; got video of {tuple(video.shape)}"
    return None


def why_not_final(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor, frames: int, impl: str = "cuda"
) -> str | None:
    """The same of final_layer, whose clips have `frames` rows of shift and scale."""
    if impl != "cuda":
        return None
    if reason := _why_no_kernel("x", x, weight):
        return reason
    if x.numel() == 0:
        return f"cuda takes no empty tensors; got x of {tuple(x.shape)}"
    (_, S, D), N = x.shape, weight.shape[0]
    if D % 64 or D > WIDTH or N > RESULTS:
        return f"cuda takes a width in multiples of 64, at most {WIDTH}, to at most {RESULTS} features; got {D} to {N}"
    if frames > 1 and S // frames < FRAME:
        return f"cuda takes rows of shift and scale of at least {FRAME} tokens each; got rows of {S // frames}"
    for name, t in (("shift", shift), ("scale", scale)):
        if t is not None and x.dtype == torch.float16 != t.dtype:
            return f"cuda takes float16 shift and scale beside a float16 x; got {name} in {t.dtype}"
    outer = [step for size, step in zip(x.shape[:2], x.stride()[:2], strict=True) if size > 1]
    if x.stride(2) == 1 and (x.storage_offset() % 8 or any(step <= 0 or step % 8 for step in outer)):
        return (
            "cuda takes strides and offsets that are multiples of 8 elements; got x with strides "
            f"{x.stride()} and offset {x.storage_offset()}"
        )
    return None


def _why_no_kernel(name: str, x: Tensor, weight: Tensor) -> str | None:
    if (found := capability(x.device)) != 90:
        return f"cuda needs a GPU of compute capability 9.0; got {found / 10}"
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        return f"cuda takes bfloat16 or float16, {name} and weight alike; got {x.dtype} and {weight.dtype}"
    if weight.storage_offset() % 8 and weight.is_contiguous():
        return f"cuda takes a weight at a multiple of 8 elements; got offset {weight.storage_offset()}"
    return None
