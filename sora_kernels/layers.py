"""Stateless modules whose `forward` works on another module's parameters, for drop-in use.

A layer has a `forward` and nothing else: no constructor, no parameters, no methods. It is lent to a host, an existing
module of the same mathematics, and reads what the host has:

    module.forward = types.MethodType(sora_kernels.layers.RMSNorm.forward, module)

which is what `kernelize` of Hugging Face's `kernels` does with a layer it finds in a kernel repository, and what
`sora_kernels.integrations.patch_model` does for whole models. Parameters, state_dict and hooks stay the host's own.
`has_backward` and `can_torch_compile` tell kernelize that training and compiled modes are served.

Numbers, determinism and errors are those of the function named in each layer's docstring.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .causal_conv import norm_silu
from .modulation import norm_modulate
from .patchify import patch_embed3d

__all__ = ["LayerNorm", "NormSiLU", "PatchEmbed3d", "RMSNorm"]


class LayerNorm(nn.Module):
    """(x − mean(x)) / √(var(x) + eps) · weight + bias over the last axis, in one pass: `norm_modulate`.

    Host: torch.nn.LayerNorm over one axis, or any module with `weight`, `bias` (either may be None) and `eps`.
    x [..., D] in any float dtype; the parameters may be of another one. Returns a dense tensor like x.
    Raises ValueError where the host normalises over several axes, or its parameters are not [D].
    """

    has_backward = True
    can_torch_compile = True

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return normalize(self, x, "layer")


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight over the last axis, in one pass: `norm_modulate` with norm="rms".

    Host: torch.nn.RMSNorm over one axis, or any module with `weight` and `eps` or `variance_epsilon` (as in Llama, T5)
    that multiplies by weight, not by 1 + weight. An eps of None means that of the dtype of the statistics, as in torch.
    x [..., D] in any float dtype; the weight may be of another one. Returns a dense tensor like x.
    Raises ValueError where the host normalises over several axes, or its parameters are not [D].
    """

    has_backward = True
    can_torch_compile = True

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return normalize(self, x, "rms")


class NormSiLU(nn.Module):
    """SiLU(norm(x) · weight + bias) over [B, C, T, H, W], in one pass: `norm_silu`.

    Host: torch.nn.GroupNorm, or a channel RMS norm as in Wan's VAE, which has `gamma` [C, 1, 1, 1] and `bias` (0.0 or
    like gamma) and no eps (1e-24 is used: equal to its clamp of the norm at 1e-12 up to rounding). The SiLU that
    followed the host must go: it is done already.
    Raises ValueError for a GroupNorm without a weight, or where x is not [B, C, T, H, W].
    """

    has_backward = True
    can_torch_compile = True

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return activate(self, x)


class PatchEmbed3d(nn.Module):
    """A Conv3d whose stride is its kernel, as one matrix product over patches: `patch_embed3d`.

    Host: torch.nn.Conv3d without padding, dilation or groups. x [B, C, T, H, W]; rows and columns that do not fill a
    patch are left out, as the convolution does. Returns [B, D, T/pt, H/ph, W/pw] as a view of the tokens
    [B, S, D]: `.flatten(2).transpose(1, 2)` gives them back without a copy. Under autocast the result has its dtype.
    Or torch.nn.Conv2d: x [B, C, H, W] gives [B, D, H/ph, W/pw].
    Raises ValueError where the host's stride is not its kernel.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return embed(self, x)


# The layers' mathematics as functions of (host, x), with a choice of implementation


def normalize(host: nn.Module, x: Tensor, norm: str, impl: str = "auto") -> Tensor:
    shape = getattr(host, "normalized_shape", None)
    if shape is not None and tuple(shape) != (x.shape[-1],):
        raise ValueError(f"the host must normalise over the last axis of x, ({x.shape[-1]},); got {tuple(shape)}")
    eps = host.eps if hasattr(host, "eps") else host.variance_epsilon
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps
    tokens = x if x.ndim == 3 else x.reshape(1, x.numel() // max(x.shape[-1], 1), x.shape[-1])
    parameters = {"weight": host.weight, "bias": getattr(host, "bias", None)}
    return norm_modulate(tokens, None, None, norm=norm, eps=eps, impl=impl, **parameters).view(x.shape)


def activate(host: nn.Module, x: Tensor, impl: str = "auto") -> Tensor:
    bias = host.bias.flatten() if isinstance(host.bias, Tensor) else None
    if hasattr(host, "gamma"):
        return norm_silu(x, host.gamma.flatten(), bias, eps=1e-24, impl=impl)
    if host.weight is None:
        raise ValueError("the host must have a weight [C]; got a GroupNorm(affine=False)")
    return norm_silu(x, host.weight, bias, norm="group", groups=host.num_groups, eps=host.eps, impl=impl)


def embed(host: nn.Conv2d | nn.Conv3d, x: Tensor, impl: str = "auto") -> Tensor:
    if reason := why_not_embed(host):
        raise ValueError(f"the host {reason}")
    x = as_autocast(x)
    grid = [n // p for n, p in zip(x.shape[2:], host.kernel_size, strict=True)]
    whole = tuple(slice(n * p) for n, p in zip(grid, host.kernel_size, strict=True))
    video, weight = x[(..., *whole)], host.weight
    if len(grid) == 2:  # a frame
        video, weight = video.unsqueeze(2), weight.unsqueeze(2)
    tokens = patch_embed3d(video, weight, host.bias, impl=impl)
    return tokens.transpose(1, 2).unflatten(2, grid)


def as_autocast(x: Tensor) -> Tensor:
    """x in the dtype in which autocast, where it is on, would have a convolution or a product."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if under_autocast(x) else x


def under_autocast(x: Tensor) -> bool:
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # of which PyTorch may not be asked


def why_not_embed(host: nn.Module) -> str | None:
    """None where a convolution cuts its input into patches, else what is in the way."""
    if host.stride != host.kernel_size:
        return f"must have a stride equal to its kernel {host.kernel_size}; got {host.stride}"
    axes = len(host.kernel_size)
    if host.padding not in ((0,) * axes, "valid") or host.dilation != (1,) * axes or host.groups != 1:
        return f"must have no padding, dilation or groups; got {host.padding}, {host.dilation}, {host.groups}"
    return None
