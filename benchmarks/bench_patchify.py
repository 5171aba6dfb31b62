"""The two ends of a transformer: latents of a public model to tokens, and its last tokens back to latents; and the end
of its decoder, a chunk of 4 frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.patchify import reference

from . import peers
from .shapes import Shape
from .suite import Benchmark, Inputs


def _features(shape: Shape) -> int:
    return math.prod(shape.model.patch) * shape.model.in_channels


def _video(shape: Shape) -> tuple[int, ...]:
    size = (n * p for n, p in zip(shape.grid, shape.model.patch, strict=True))
    return shape.batch, shape.model.in_channels, *size


def _matmul_flops(shape: Shape, mode: str) -> int:
    """One product of tokens by weights forward; two backward, for the weights and for the tokens."""
    return {"fwd": 2, "bwd": 4}[mode] * shape.elements * _features(shape)


# patch_embed3d


def _embed_inputs(shape: Shape, dtype: torch.dtype, draw: Callable[..., Tensor]) -> Inputs:
    model = shape.model
    weight = draw(model.dim, model.in_channels, *model.patch) / _features(shape) ** 0.5
    inputs = {"video": draw(*_video(shape)), "weight": weight, "bias": draw(model.dim)}
    return inputs if model.rope else inputs | {"pos": draw(shape.tokens, model.dim)}


def _embed_view(video, weight, bias, *, pos=None) -> Tensor:
    """The tokens are a view [B, S, D] of what the convolution wrote by channels; the next operation transposes."""
    tokens = F.conv3d(video, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return tokens if pos is None else tokens + pos


def _embed_eager(video, weight, bias, *, pos=None) -> Tensor:
    return _embed_view(video, weight, bias, pos=pos).contiguous()


def _linear(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    """What replaces the convolution where it is slow: patches copied out, then a linear layer."""

    def patch_embed3d(video, weight, bias, *, pos=None):
        pt, ph, pw = weight.shape[2:]
        x = video.unflatten(2, (-1, pt)).unflatten(4, (-1, ph)).unflatten(6, (-1, pw))
        tokens = F.linear(x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3), weight.flatten(1), bias)
        return tokens if pos is None else tokens + pos

    return patch_embed3d


# unpatchify3d


def _unpatchify_inputs(shape: Shape, dtype: torch.dtype, draw: Callable[..., Tensor]) -> Inputs:
    layout = {"grid": shape.grid, "patch": shape.model.patch, "channels": shape.model.in_channels}
    return {"tokens": draw(shape.batch, shape.tokens, _features(shape))} | layout


# final_layer


def _final_inputs(shape: Shape, dtype: torch.dtype, draw: Callable[..., Tensor]) -> Inputs:
    """Rows in fp32 as Wan holds them, views into `[B, rows, 2, D]`."""
    B, rows, D = shape.modulation
    two, features = draw(B, rows, 2, D, dtype=torch.float32), _features(shape)
    tensors = {"x": draw(B, shape.tokens, D), "shift": two[:, :, 0], "scale": two[:, :, 1]}
    tensors |= {"weight": draw(features, D) / D**0.5, "bias": draw(features)}
    return tensors | {"grid": shape.grid, "patch": shape.model.patch, "norm": shape.model.norm}


def _project(h: Tensor, weight: Tensor, bias: Tensor, grid, patch) -> Tensor:
    channels = weight.shape[0] // math.prod(patch)
    return reference.unpatchify3d(F.linear(h, weight, bias), grid, patch, channels)


def _final_eager(x, shift, scale, weight, bias, *, grid, patch, norm) -> Tensor:
    return _project(peers.norm_modulate(x, shift, scale, norm=norm), weight, bias, grid, patch)


def _diffusers(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    """The last lines of WanTransformer3DModel: the norm and the modulation in fp32, rounded, then projected."""
    norm_modulate = peers.NORM_MODULATE["diffusers"](inputs, mode)

    def final_layer(x, shift, scale, weight, bias, *, grid, patch, norm):
        return _project(norm_modulate(x, shift, scale, norm=norm), weight, bias, grid, patch)

    return final_layer


def _final_flops(shape: Shape, mode: str) -> int:
    """Beside the products, a norm and a modulation: 8 per element forward, 13 backward."""
    return _matmul_flops(shape, mode) + {"fwd": 8, "bwd": 13}[mode] * shape.elements


# video_to_uint8


def _frames_inputs(
    patch: tuple[int, int, int], shape: Shape, dtype: torch.dtype, draw: Callable[..., Tensor]
) -> Inputs:
    """What the last convolution of a decoder gives, 8 times as high and wide as the latents, channels last."""
    B, _, _, H, W = _video(shape)
    video = draw(B, 3 * math.prod(patch), 4, 8 * H, 8 * W)
    return {"video": video.contiguous(memory_format=torch.channels_last_3d), "patch": patch}


def _frames_eager(video, *, patch) -> Tensor:
    """Unpatchified as diffusers does, clamped, scaled, rounded, and the colours put last."""
    (B, _, T, H, W), (pt, ph, pw) = video.shape, patch
    x = video.view(B, -1, pt, pw, ph, T, H, W).permute(0, 1, 5, 2, 6, 4, 7, 3)
    x = x.reshape(B, -1, T * pt, H * ph, W * pw).float()
    return x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).movedim(1, -1).contiguous()


def _frames_flops(patch: tuple[int, int, int], shape: Shape, mode: str) -> int:
    """Four for each value: two bounds, a sum and a product."""
    B, _, _, H, W = _video(shape)
    return 4 * B * 3 * math.prod(patch) * 4 * 8 * H * 8 * W


BENCHMARKS = [
    Benchmark(
        "patch_embed3d",
        inputs=_embed_inputs,
        reference=reference.patch_embed3d,
        eager=_embed_eager,
        peers={"view": lambda inputs, mode: _embed_view, "linear": _linear},
        differentiable=("video", "weight", "bias"),
        backward_reads=("video", "weight"),
        backward_writes=("video", "weight", "bias"),
        flops=_matmul_flops,
    ),
    Benchmark(
        "unpatchify3d",
        inputs=_unpatchify_inputs,
        reference=reference.unpatchify3d,
        eager=reference.unpatchify3d,
        differentiable=("tokens",),
        backward_reads=(),
        backward_writes=("tokens",),
        flops=lambda shape, mode: 0,
    ),
    Benchmark(
        "final_layer",
        inputs=_final_inputs,
        reference=reference.final_layer,
        eager=_final_eager,
        peers={"diffusers": _diffusers},
        differentiable=("x", "shift", "scale", "weight", "bias"),
        backward_reads=("x", "shift", "scale", "weight"),
        backward_writes=("x", "shift", "scale", "weight", "bias"),
        flops=_final_flops,
    ),
    *(
        Benchmark(
            "video_to_uint8",
            inputs=partial(_frames_inputs, patch),
            reference=reference.video_to_uint8,
            eager=_frames_eager,
            differentiable=(),
            backward_reads=(),
            backward_writes=(),
            flops=partial(_frames_flops, patch),
            variant=variant,
        )
        for variant, patch in (("", (1, 1, 1)), ("patches", (1, 2, 2)))  # Wan 2.1's decoder and Wan 2.2's
    ),
]
