"""diffusers' VAEs of HunyuanVideo, HunyuanVideo-1.5, CogVideoX, LTX-Video and Mochi through our operations.

Norm and SiLU in one pass in all of them, of whichever kind the norm is. Convolutions that pad a frame with zeros or
repeat its border; in time with what `causal_conv3d` takes as its cache: the frames before, or the first one repeated.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from ... import layers
from ...causal_conv import causal_conv3d, norm_silu
from ..patch import How, Plan, bind, why_not_rebind
from .common import why_not_read
from .vae import Activate, example, pair, sample

__all__ = ["example", "plan", "sample"]
_FILES = {  # model -> file of diffusers, and how its classes begin
    "AutoencoderKLHunyuanVideo": ("hunyuan_video", "HunyuanVideo"),
    "AutoencoderKLHunyuanVideo15": ("hunyuanvideo15", "HunyuanVideo15"),
    "AutoencoderKLCogVideoX": ("cogvideox", "CogVideoX"),
    "AutoencoderKLLTXVideo": ("ltx", "LTXVideo"),
    "AutoencoderKLMochi": ("mochi", "Mochi"),
}
_RESIDUAL = ("ResnetBlockCausal3D", "ResnetBlock3D", "ResnetBlock3d", "ResnetBlock")
_ENDS = ("Encoder3D", "Encoder3d", "Decoder3D", "Decoder3d")


def plan(model: nn.Module, how: How) -> tuple[list[Plan], tuple[str, ...]]:
    kept = "resampling: PyTorch's own, around the convolutions", "attention within frames or of one head: PyTorch's own"
    return list(_steps(model, how)), kept


def _steps(model: nn.Module, how: How) -> Iterator[Plan]:
    file, prefix = next(_FILES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _FILES)
    theirs = vars(importlib.import_module(f"diffusers.models.autoencoders.autoencoder_kl_{file}"))
    residual, ends = (
        tuple(cls for name in names if isinstance(cls := theirs.get(prefix + name), type))
        for names in (_RESIDUAL, _ENDS)
    )
    conv = theirs.get(f"{prefix}CausalConv3d") or theirs["CogVideoXCausalConv3d"]  # which Mochi has, too
    kinds = _norms(theirs, prefix)
    for name, module in model.named_modules():
        if isinstance(module, residual):
            yield _pair(name, module, residual, ("norm1", "norm2"), "nonlinearity", kinds, how)
        elif isinstance(module, ends) and (norm := _last_norm(module)):
            activation = "conv_act" if hasattr(module, "conv_act") else "nonlinearity"
            yield _pair(name, module, ends, (norm,), activation, kinds, how)
        elif isinstance(module, conv):
            reason = why_not_rebind(module, conv) or _why_not_conv(module)
            forward = _frames_repeated if hasattr(module, "is_causal") else _borders_repeated
            forward = _with_cache if hasattr(module, "const_padding_conv3d") else forward
            yield how.step(name, ("causal_conv3d",), reason, bind(module, forward, how.impl))


# Norm and SiLU


def _norms(theirs: Mapping[str, Any], prefix: str) -> dict[type[nn.Module], Activate]:
    """Every kind of norm of this file that `norm_silu` can stand for, and how."""
    kinds: dict[type[nn.Module], Activate] = {nn.GroupNorm: layers.activate, RMSNorm: _activate_last}
    if channels := theirs.get(f"{prefix}RMS_norm"):
        kinds[channels] = layers.activate
    if frames := theirs.get(f"{prefix}ChunkedGroupNorm3D"):
        kinds[frames] = _activate_frames
    return kinds


def _last_norm(module: nn.Module) -> str | None:
    return next((name for name in ("conv_norm_out", "norm_out") if hasattr(module, name)), None)


def _pair(name, module, classes, norms, activation, kinds, how: How) -> Plan:
    cls = next(cls for cls in classes if isinstance(module, cls))
    kind = type(getattr(module, norms[0]))
    if reason := _why_not_norm(module, kind, kinds):
        return how.step(name, ("norm_silu",), reason)
    return pair(name, module, cls, dict.fromkeys(norms, kind), activation, kinds[kind], how)


def _why_not_norm(module: nn.Module, kind: type[nn.Module], kinds: Mapping[type[nn.Module], Activate]) -> str | None:
    if kind not in kinds:
        return f"its norm is a {kind.__name__}, whose scale differs from pixel to pixel"
    if getattr(module, "scale_shift_table", None) is not None:
        return "a scale and a shift by the time come between norm and SiLU"
    return None


def _activate_last(norm: nn.Module, x: Tensor, impl: str) -> Tensor:
    """Of an RMSNorm over the last axis, to which the host has moved the channels."""
    x = x.movedim(-1, 1)
    weight = x.new_ones(x.shape[1]) if norm.weight is None else norm.weight
    return norm_silu(x, weight, norm.bias, eps=norm.eps, impl=impl).movedim(1, -1)


def _activate_frames(norm: nn.Module, x: Tensor, impl: str) -> Tensor:
    """Of a group norm of each frame alone."""
    frames = x.transpose(1, 2).flatten(0, 1).unsqueeze(2)                                    # [B T, C, 1, H, W]
    y = layers.activate(norm.norm_layer, frames, impl)
    return y.squeeze(2).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


# Convolutions


def _why_not_conv(module: nn.Module) -> str | None:
    conv = module.conv
    if reason := why_not_read(module, conv=(nn.Conv3d, *_safe_conv())):
        return reason
    (kt, kh, kw), border = conv.kernel_size, _repeats_borders(module)
    if conv.dilation != (1, 1, 1) or conv.groups != 1 or (conv.stride != (1, 1, 1) and not border):
        return "it has a stride, a dilation or groups"
    if not kh % 2 == kw % 2 == 1:
        return "its kernel has an even side, so that a frame is not padded alike on both"
    sides = (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0)
    padding = (0, 0, 0) if border else (0, kh // 2, kw // 2)
    same = conv.padding == padding and conv.padding_mode == "zeros"
    same = same and not (border and module.time_causal_padding != sides)
    ahead = not getattr(module, "is_causal", True)
    return None if same and not (ahead and kt % 2 == 0) else "it pads in a way that is not one of causal_conv3d's"


def _repeats_borders(module: nn.Module) -> bool:
    return getattr(module, "pad_mode", "constant") == "replicate"


def _safe_conv() -> tuple[type[nn.Module], ...]:
    """CogVideoX's Conv3d, which takes a long clip in parts: the operation needs no memory that grows with it."""
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d

    return (CogVideoXSafeConv3d,)


def _frames_repeated(self: nn.Module, impl: str, x: Tensor) -> Tensor:
    """LTX-Video: before the clip lies its first frame, and, where it looks ahead, after it its last."""
    if layers.under_autocast(x) or _why_not_conv(self):
        return type(self).forward(self, x)
    past = self.conv.kernel_size[0] - 1
    if self.is_causal or not past:
        return _conv(self.conv, x, None, impl)
    first, last = (t.expand(-1, -1, past // 2, -1, -1) for t in (x[:, :, :1], x[:, :, -1:]))
    frames = torch.cat([first, x, last], 2)
    return _conv(self.conv, frames[:, :, past:], frames[:, :, :past], impl)


def _borders_repeated(self: nn.Module, impl: str, x: Tensor) -> Tensor:
    """HunyuanVideo and 1.5: around each frame its border, before the clip its first frame."""
    if layers.under_autocast(x) or _why_not_conv(self):
        return type(self).forward(self, x)
    conv = self.conv
    return causal_conv3d(x, conv.weight, conv.bias, stride=conv.stride, padding="replicate", impl=impl)


def _with_cache(self: nn.Module, impl: str, x: Tensor, conv_cache: Tensor | None = None) -> Any:
    """CogVideoX: before a chunk lie the last frames of the one before, or its first frame; and the next one's cache.
    Mochi's repeats borders, and has no cache."""
    if layers.under_autocast(x) or _why_not_conv(self):
        return type(self).forward(self, x, conv_cache)
    if _repeats_borders(self):
        return _borders_repeated(self, impl, x), None
    y, frames = _conv(self.conv, x, conv_cache, impl), self.conv.kernel_size[0] - 1
    if not frames:
        return y, None
    return y, torch.cat([_past(x, conv_cache, frames), x[:, :, -frames:]], 2)[:, :, -frames:].clone()


def _conv(conv: nn.Conv3d, x: Tensor, past: Tensor | None, impl: str) -> Tensor:
    if not (frames := conv.kernel_size[0] - 1):
        return causal_conv3d(x, conv.weight, conv.bias, impl=impl)
    return causal_conv3d(x, conv.weight, conv.bias, cache=_past(x, past, frames), impl=impl)[0]


def _past(x: Tensor, past: Tensor | None, frames: int) -> Tensor:
    return x[:, :, :1].expand(-1, -1, frames, -1, -1) if past is None else past.to(x)
