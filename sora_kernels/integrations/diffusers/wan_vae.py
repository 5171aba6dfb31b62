"""diffusers' AutoencoderKLWan (2.1 and 2.2) through our operations, the caches of its chunks included.

A residual block is norm + SiLU, then two convolutions whose epilogues are the second norm + SiLU and the sum with the
shortcut; a resampling is one convolution that repeats or skips pixels while it reads. What a chunk leaves for the next
one is kept in the host's own list, as the host keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_wan as host
from torch import Tensor, nn

from ... import layers
from ...causal_conv import causal_conv3d, downsample_conv3d, upsample_conv3d
from ..patch import How, Plan, bind, is_hooked, why_not_rebind
from .common import why_not_read
from .vae import example, pair, sample

_EPS = 1e-24  # with which an RMS norm clamps as F.normalize does
__all__ = ["example", "plan", "sample"]
_KERNEL = {"conv1": (host.WanCausalConv3d,), "conv2": (host.WanCausalConv3d,)}
_NORMS = {"norm1": (host.WanRMS_norm,), "norm2": (host.WanRMS_norm,), "nonlinearity": (nn.SiLU,)}
_PAIRS = {  # whose norms hand their output to the SiLU; residual blocks only where the convolutions stay the host's
    host.WanResidualBlock: {"norm1": host.WanRMS_norm, "norm2": host.WanRMS_norm},
    host.WanEncoder3d: {"norm_out": host.WanRMS_norm},
    host.WanDecoder3d: {"norm_out": host.WanRMS_norm},
}
_RESAMPLING = {
    "upsample2d": ("upsample_conv3d",),
    "upsample3d": ("upsample_conv3d", "causal_conv3d"),
    "downsample2d": ("downsample_conv3d",),
    "downsample3d": ("downsample_conv3d",),
}


def plan(model: nn.Module, how: How) -> tuple[list[Plan], tuple[str, ...]]:
    return list(_steps(model, how)), ("attention of a single head over a frame: PyTorch's own",)


def _steps(model: nn.Module, how: How) -> Iterator[Plan]:
    inside = set()  # convolutions that a larger step has taken
    for name, module in model.named_modules():
        if isinstance(module, host.WanResidualBlock) and not how.why_not("causal_conv3d"):
            reason = why_not_rebind(module, host.WanResidualBlock) or _why_not_block(module)
            yield how.step(name, ("norm_silu", "causal_conv3d"), reason, bind(module, _block, how.impl))
            inside |= {module.conv1, module.conv2}
        elif kind := next((cls for cls in _PAIRS if isinstance(module, cls)), None):
            yield pair(name, module, kind, _PAIRS[kind], "nonlinearity", layers.activate, how)
        elif isinstance(module, host.WanResample) and (ops := _RESAMPLING.get(module.mode)):
            reason = why_not_rebind(module, host.WanResample) or _why_not_resample(module)
            yield how.step(name, ops, reason, bind(module, _resample, how.impl))
            inside |= {getattr(module, "time_conv", None)}
        elif isinstance(module, host.WanCausalConv3d) and module not in inside:
            reason = why_not_rebind(module, host.WanCausalConv3d) or _why_not_conv(module)
            yield how.step(name, ("causal_conv3d",), reason, bind(module, _conv_forward, how.impl))


# Convolutions


def _why_not_conv(conv: nn.Conv3d) -> str | None:
    (kt, kh, kw), padding = conv.kernel_size, conv._padding
    same = (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0) == padding and kh % 2 == kw % 2 == 1
    if same and conv.stride == conv.dilation == (1, 1, 1) and conv.groups == 1 and conv.padding_mode == "zeros":
        return None
    return "it is not a convolution that keeps frames, rows and columns"


def _conv(conv: nn.Conv3d, impl: str, x: Tensor, past: Tensor | None = None, **epilogue: Any) -> Tensor:
    """conv(x, past): the frames before x are those of the past, and zeros before these."""
    frames = conv.kernel_size[0] - 1
    if past is None or not frames:
        return causal_conv3d(x, conv.weight, conv.bias, impl=impl, **epilogue)
    past = past[:, :, -frames:].to(x)
    past = F.pad(past, (0, 0, 0, 0, frames - past.shape[2], 0))
    return causal_conv3d(x, conv.weight, conv.bias, cache=past, impl=impl, **epilogue)[0]


def _conv_forward(self: nn.Module, impl: str, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    if layers.under_autocast(x):
        return type(self).forward(self, x, cache_x)
    return _conv(self, impl, x, cache_x)


def _remember(x: Tensor, cache: list[Any], index: list[int]) -> Tensor | None:
    """Put away the last two frames of what goes into a convolution, and hand out those of the chunk before."""
    past, kept = cache[index[0]], x[:, :, -host.CACHE_T :].clone()
    if isinstance(past, str):  # the host's mark for a frame that went another way
        past = torch.zeros_like(kept[:, :, :1])
    if kept.shape[2] < 2 and past is not None:
        kept = torch.cat([past[:, :, -1:].to(kept.device), kept], 2)
    cache[index[0]] = kept
    index[0] += 1
    return past


# Residual blocks


def _why_not_block(block: nn.Module) -> str | None:
    reason = why_not_read(block, **_NORMS, **_KERNEL)
    return reason or _why_not_conv(block.conv1) or _why_not_conv(block.conv2) or _why_not_gamma(block.norm2)


def _why_not_gamma(norm: nn.Module) -> str | None:
    return "norm2 has a bias, which the convolution before it does not add" if torch.is_tensor(norm.bias) else None


def _block(self: nn.Module, impl: str, x: Tensor, feat_cache: Any = None, feat_idx: list[int] | None = None) -> Tensor:
    if layers.under_autocast(x) or _why_not_block(self):
        return type(self).forward(self, x, feat_cache, [0] if feat_idx is None else feat_idx)

    def past(x: Tensor) -> Tensor | None:
        return None if feat_cache is None else _remember(x, feat_cache, feat_idx)

    h = self.conv_shortcut(x)
    x = layers.activate(self.norm1, x, impl)
    x = _conv(self.conv1, impl, x, past(x), norm_weight=self.norm2.gamma.flatten(), norm_eps=_EPS)
    x = self.dropout(x)
    return _conv(self.conv2, impl, x, past(x), residual=h)


# Resampling


def _why_not_resample(module: nn.Module) -> str | None:
    kind = host.WanUpsample if module.mode.startswith("up") else nn.ZeroPad2d
    if reason := why_not_read(module.resample, **{"0": (kind,), "1": (nn.Conv2d,)}):
        return reason
    conv, time = module.resample[1], module._modules.get("time_conv")
    if conv.kernel_size != (3, 3) or conv.dilation != (1, 1) or conv.groups != 1 or is_hooked(module.resample):
        return "its convolution is not one of 3x3 pixels"
    if time is None:
        return None
    if reason := why_not_read(module, time_conv=(host.WanCausalConv3d,)):
        return reason
    return _why_not_conv(time) if module.mode == "upsample3d" else None


def _resample(
    self: nn.Module, impl: str, x: Tensor, feat_cache: Any = None, feat_idx: list[int] | None = None
) -> Tensor:
    halved = self.mode == "downsample3d" and feat_cache is not None
    odd = halved and feat_cache[feat_idx[0]] is not None and x.shape[2] % 2
    if odd or layers.under_autocast(x) or _why_not_resample(self):
        return type(self).forward(self, x, feat_cache, [0] if feat_idx is None else feat_idx)
    if self.mode == "upsample3d" and feat_cache is not None:
        x = _double_frames(self.time_conv, impl, x, feat_cache, feat_idx)
    weight, bias = self.resample[1].weight[:, :, None], self.resample[1].bias
    resample = upsample_conv3d if self.mode.startswith("up") else downsample_conv3d
    x = resample(x, weight, bias, factor=(1, 2, 2), impl=impl)
    return _halve_frames(self.time_conv, impl, x, feat_cache, feat_idx) if halved else x


def _double_frames(conv: nn.Module, impl: str, x: Tensor, cache: list[Any], index: list[int]) -> Tensor:
    """Two frames for each. The first chunk's one frame stays one, and nothing of it reaches the next."""
    if cache[index[0]] is None:
        cache[index[0]] = "Rep"
        index[0] += 1
        return x
    pairs = _conv(conv, impl, x, _remember(x, cache, index)).unflatten(1, (2, -1))           # [B, 2, C, T, H, W]
    return pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)                                     # [B, C, 2T, H, W]


def _halve_frames(conv: nn.Module, impl: str, x: Tensor, cache: list[Any], index: list[int]) -> Tensor:
    """One frame for two, with the last one of the chunk before; the first chunk has one frame, which stays."""
    past, cache[index[0]] = cache[index[0]], x[:, :, -1:].clone()
    index[0] += 1
    if past is None:
        return x
    past = past[:, :, -1:].contiguous()
    return downsample_conv3d(x, conv.weight, conv.bias, factor=(2, 1, 1), cache=past, impl=impl)[0]
