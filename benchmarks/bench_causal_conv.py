"""One layer of the video decoder behind each model, channels last: norms, convolutions and changes of resolution.

A clip's shape stands for a layer of that model's decoder, with the frames that one chunk of a stream has there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.causal_conv import reference

from . import peers
from .shapes import LENGTHS, Shape
from .suite import Benchmark, Inputs


@dataclass(frozen=True)
class Layer:
    """C channels of (T, H, W) pixels; groups 0 is an RMS norm."""

    decoder: str
    channels: int
    grid: tuple[int, int, int]
    groups: int = 0
    batch: int = 1

    @property
    def elements(self) -> int:
        return self.batch * self.channels * math.prod(self.grid)


_LAYERS = {
    "wan1.3b-480p": Layer("wan2.1", 96, (4, 480, 832)),
    "wan1.3b-frames": Layer("wan2.1", 384, (2, 120, 208)),
    **{f"wan1.3b-length-{n}": Layer("wan2.1", 192, (n, 240, 416)) for n in LENGTHS},
    "wan1.3b-720p": Layer("wan2.1", 384, (4, 180, 320)),
    "wan14b-480p": Layer("wan2.1", 192, (4, 240, 416)),
    "wan14b-720p": Layer("wan2.1", 96, (4, 720, 1280)),
    "wan2.2-5b": Layer("wan2.2", 256, (4, 352, 640)),
    "hunyuan-720p": Layer("hunyuan", 128, (4, 720, 1280), groups=32),
    "hunyuan-sta": Layer("hunyuan", 128, (4, 768, 1280), groups=32),
    "hunyuan1.5-480p": Layer("hunyuan1.5", 512, (4, 120, 212)),
    "hunyuan1.5-720p": Layer("hunyuan1.5", 256, (4, 360, 640)),
    "opensora2-192p": Layer("hunyuan", 256, (4, 96, 168), groups=32),
    "opensora2-576p": Layer("hunyuan", 128, (4, 576, 1024), groups=32),
    "cogvideox-2b": Layer("cogvideox", 256, (8, 240, 360), groups=32),
    "cogvideox-5b": Layer("cogvideox", 128, (8, 480, 720), groups=32),
    "mochi-480p": Layer("mochi", 128, (6, 480, 848), groups=32),
    "ltx-2b": Layer("ltx", 128, (8, 128, 192)),
    "ltx2-19b": Layer("ltx2", 128, (8, 256, 384)),
    "latte-xl": Layer("sd", 128, (16, 256, 256), groups=32),
    "h3-768p": Layer("wan2.1", 192, (4, 384, 672)),
    "cpu-8192x1536": Layer("wan2.1", 96, (4, 48, 80)),
    "cpu-frames": Layer("wan2.1", 192, (4, 24, 40)),
    "cpu-tokens": Layer("wan2.1", 384, (2, 12, 20)),
    "cpu-attention": Layer("wan2.1", 32, (4, 64, 64)),
    **{f"cpu-length-{n}": Layer("wan2.1", 32, (n, 32, 32)) for n in LENGTHS},
    "tiny": Layer("ours", 16, (1, 8, 8)),
    "cpu-rms": Layer("hunyuan", 128, (4, 32, 48), groups=32),
    "toy": Layer("ours", 16, (3, 8, 8), batch=2),
}


REPLICATE = ("hunyuan", "hunyuan1.5", "mochi")  # whose convolutions repeat borders where others have zeros


def layer(shape: Shape) -> Layer:
    return _LAYERS[shape.id]


def _video(at: Layer, draw: Callable[..., Tensor], channels: int | None = None) -> Tensor:
    x = draw(at.batch, channels or at.channels, *at.grid)
    return x.contiguous(memory_format=torch.channels_last_3d)


def _norm_inputs(shape: Shape, dtype: torch.dtype, draw: Callable[..., Tensor]) -> Inputs:
    at = layer(shape)
    inputs: Inputs = {"x": _video(at, draw), "weight": draw(at.channels), "bias": draw(at.channels)}
    return inputs | ({"norm": "group", "groups": at.groups} if at.groups else {"norm": "rms", "eps": 1e-24})  # Wan's


def _conv_inputs(
    shape: Shape, dtype: torch.dtype, draw: Callable[..., Tensor], *, taps: tuple[int, int, int], epilogue: bool = False
) -> Inputs:
    at = layer(shape)
    C = at.channels
    weight = (draw(C, C, *taps) / math.sqrt(C * math.prod(taps))).contiguous(memory_format=torch.channels_last_3d)
    inputs: Inputs = {"x": _video(at, draw), "weight": weight, "bias": draw(C)}
    if not epilogue:
        return inputs
    return inputs | {"residual": _video(at, draw)} | ({"padding": "replicate"} if at.decoder in REPLICATE else {})


def _eager_norm(x, weight, bias, *, norm, groups=32, eps=1e-6):
    if norm == "group":
        return F.silu(F.group_norm(x, groups, weight, bias, eps))
    weight, bias = (t.view(-1, 1, 1, 1) for t in (weight, bias))
    return F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * weight + bias)


def _eager_conv(x, weight, bias, residual, padding="constant"):
    kt, kh, kw = weight.shape[2:]
    return F.conv3d(F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0), padding), weight, bias) + residual


def _frames(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of the frames as a batch of images."""
    B = x.shape[0]
    return function(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, -1)).transpose(1, 2)


def _eager_up(x, weight, bias):
    def up(frames: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(frames, scale_factor=2.0, mode="nearest"), weight[:, :, 0], bias, padding=1)

    return _frames(x, up)


def _eager_down(x, weight, bias):
    return _frames(x, lambda frames: F.conv2d(F.pad(frames, (0, 1, 0, 1)), weight[:, :, 0], bias, stride=2))


def _diffusers_norm(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    module = peers._import("diffusers.models.autoencoders.autoencoder_kl_wan", "diffusers")
    if inputs["norm"] != "rms":
        raise peers.Missing("diffusers' WanRMS_norm is an RMS norm")
    module = module.WanRMS_norm(inputs["x"].shape[1], images=False, bias=True)

    def norm_silu(x, weight, bias, *, norm, eps):
        parameters = {"gamma": weight.view(-1, 1, 1, 1), "bias": bias.view(-1, 1, 1, 1)}
        return F.silu(torch.func.functional_call(module, parameters, (x,)))

    return norm_silu


def _diffusers_conv(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    out_channels, channels, *taps = inputs["weight"].shape
    if "padding" in inputs:
        module = peers._import("diffusers.models.autoencoders.autoencoder_kl_hunyuan_video", "diffusers")
        conv, place = module.HunyuanVideoCausalConv3d(channels, out_channels, tuple(taps)), "conv."
    else:
        module = peers._import("diffusers.models.autoencoders.autoencoder_kl_wan", "diffusers")
        same = tuple(k // 2 for k in taps)
        conv, place = module.WanCausalConv3d(channels, out_channels, tuple(taps), padding=same), ""

    def causal_conv3d(x, weight, bias, residual, padding="zeros"):
        parameters = {f"{place}weight": weight, f"{place}bias": bias}
        return torch.func.functional_call(conv, parameters, (x,)) + residual

    return causal_conv3d


def _torch_cudnn_conv(inputs: Mapping[str, Any], mode: str) -> Callable[..., Tensor]:
    """The best that eager PyTorch can do: cuDNN on channels last, which pads in space; the past is copied in front."""
    if inputs["x"].device.type != "cuda":
        raise peers.Missing("cuDNN needs a CUDA device")
    if "padding" in inputs:
        raise peers.Missing("cuDNN pads with zeros")

    def causal_conv3d(x, weight, bias, residual):
        B, C, T, H, W = x.shape
        kt, kh, kw = weight.shape[2:]
        past = x.new_zeros(B, C, kt - 1, H, W).contiguous(memory_format=torch.channels_last_3d)
        return F.conv3d(torch.cat([past, x], 2), weight, bias, padding=(0, kh // 2, kw // 2)) + residual

    return causal_conv3d


def _norm_read_twice(inputs: Inputs, mode: str) -> tuple[str, ...]:
    """Of a group, whole statistics come first; so do, in its backward, sums over dout and x."""
    return {"fwd": ("x",), "bwd": ("x", "dout")}[mode] if inputs["norm"] == "group" else ()


def _norm_flops(shape: Shape, mode: str) -> int:
    """Per element: a norm 6 forward and 9 backward, a SiLU 4 and 8."""
    return layer(shape).elements * {"fwd": 10, "bwd": 17}[mode]


def _conv_flops(taps: float, shape: Shape, mode: str) -> int:
    """Of the taps that the definition has, per input element; a backward has two products of that size."""
    at = layer(shape)
    return round(2 * taps * at.channels * at.elements) * {"fwd": 1, "bwd": 2}[mode]


def _dims(shape: Shape) -> dict[str, object]:
    return asdict(layer(shape))


def _terms(inputs: Inputs) -> int:
    """A gradient of x sums as many values, over the other channels."""
    return inputs["weight"][0].numel()


_WEIGHTS = ("weight", "bias")

BENCHMARKS = [
    Benchmark(
        "norm_silu",
        inputs=_norm_inputs,
        reference=reference.norm_silu,
        eager=_eager_norm,
        peers={"diffusers": _diffusers_norm},
        differentiable=("x", *_WEIGHTS),
        backward_reads=("x", *_WEIGHTS),
        backward_writes=("x", *_WEIGHTS),
        read_twice=_norm_read_twice,
        flops=_norm_flops,
        dims=_dims,
    ),
    Benchmark(
        "causal_conv3d",
        inputs=partial(_conv_inputs, taps=(3, 3, 3), epilogue=True),
        reference=reference.causal_conv3d,
        eager=_eager_conv,
        peers={"diffusers": _diffusers_conv, "torch-cudnn": _torch_cudnn_conv},
        differentiable=("x", *_WEIGHTS),
        backward_reads=("x", "weight"),
        backward_writes=("x", *_WEIGHTS),
        flops=partial(_conv_flops, 27),
        terms=_terms,
        dims=_dims,
    ),
    Benchmark(
        "upsample_conv3d",
        inputs=partial(_conv_inputs, taps=(1, 3, 3)),
        reference=reference.upsample_conv3d,
        eager=_eager_up,
        differentiable=("x", *_WEIGHTS),
        backward_reads=("x", "weight"),
        backward_writes=("x", *_WEIGHTS),
        flops=partial(_conv_flops, 36),
        terms=_terms,
        dims=_dims,
    ),
    Benchmark(
        "downsample_conv3d",
        inputs=partial(_conv_inputs, taps=(1, 3, 3)),
        reference=reference.downsample_conv3d,
        eager=_eager_down,
        differentiable=("x", *_WEIGHTS),
        backward_reads=("x", "weight"),
        backward_writes=("x", *_WEIGHTS),
        flops=partial(_conv_flops, 9 / 4),
        terms=_terms,
        dims=_dims,
    ),
]
