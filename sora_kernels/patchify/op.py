"""The two ends of the transformer, video to tokens and tokens to video; and that of a decoder, video to frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .. import _check, _dispatch, _library, _rows
from .._autograd import apply, derive, needs_grad, once_differentiable, transformed
from .._operands import dense, like, narrow, parameter
from . import kernels_cuda, reference

NORMS = ("layer", "rms")  # as the private ops number them


def patch_embed3d(
    video: Tensor, weight: Tensor, bias: Tensor | None = None, *, pos: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """out[b, s] = Σ weight · patch s of video[b] + bias + pos[s]: a Conv3d whose stride is its kernel, as tokens

    video    [B, C, T, H, W], float32, bfloat16, float16 (float64 in `reference`), any memory format; T, H, W multiples
             of the patch
    weight   [D, C, pt, ph, pw], a Conv3d's weight as it is, any float dtype; bias [D]
    pos      [S, D] or [B, S, D], added; any float dtype

    Returns [B, S, D] in video's dtype, dense, S = (T/pt)·(H/ph)·(W/pw) in t-major order. Products and sums are fp32,
    rounded once at the store; error against fp64 ≤ 2 × that of plain PyTorch in the same dtype plus one rounding. The
    gradients of weight, bias and pos are reduced in fp32 in a fixed order: two runs agree bit for bit. Forward mode,
    torch.func and, under it, higher orders: by the reference's formula (docs/numerics.md).

    Raises TypeError or ValueError naming the argument; `Unavailable` where an explicit impl cannot run.
    Source: tubelet embedding of ViViT, arXiv 2103.15691.
    """
    op = "patch_embed3d"
    _check.tensor(op, "video", video, "[B, C, T, H, W]", ndim=5)
    _check.tensor(op, "weight", weight, "[D, C, pt, ph, pw]", ndim=5)
    (B, C, *size), (D, channels, *patch) = video.shape, weight.shape
    if channels != C:
        raise ValueError(f"{op}: weight [D, C, pt, ph, pw] must have video's C={C} channels; got {channels}")
    if min(patch) < 1:
        _check.triple(op, "the patch (pt, ph, pw) of weight", patch)
    for axis, n, p in zip("THW", size, patch, strict=True):
        if n % p:
            raise ValueError(
                f"{op}: video's {axis} must be a multiple of the patch {p}; got {n}; "
                f"pad it to {n - n % p + p} or crop it to {n - n % p}"
            )
    S = math.prod([n // p for n, p in zip(size, patch, strict=True)])
    if bias is not None:
        _check.exact(op, "bias", bias, (D,), "[D], as weight has rows")
    if pos is not None:
        batched = (B, S, D) if isinstance(pos, Tensor) and pos.ndim == 3 else (S, D)
        _check.exact(op, "pos", pos, batched, "[S, D] or [B, S, D], one row per token")
    _check.same_device(op, video, {"weight": weight, "bias": bias, "pos": pos}, "video")
    tensors = narrow(video, (video, weight, bias, pos))
    grad = needs_grad(tensors)
    impl = _dispatch.choose(op, impl, video, grad=grad, limits=partial(kernels_cuda.why_not_embed, video, weight, pos))
    settings = ((B, S, D), impl)
    return apply(_PatchEmbed3d, *tensors, settings) if grad else _patch_embed3d(*tensors, *settings)


def unpatchify3d(
    tokens: Tensor, grid: Sequence[int], patch: Sequence[int], channels: int, *, impl: str = "auto"
) -> Tensor:
    """out[b, c, t·pt + i, h·ph + j, w·pw + k] = tokens[b, (t·H + h)·W + w, ((i·ph + j)·pw + k)·C + c]

    tokens    [B, T·H·W, pt·ph·pw·C], float32, bfloat16, float16 (float64 in `reference`), any strides
    grid      (T, H, W) in tokens; patch (pt, ph, pw); channels C

    Returns [B, C, T·pt, H·ph, W·pw] in tokens' dtype, dense: the values are moved, not touched, and so are gradients.
    Raises TypeError or ValueError naming the argument; `Unavailable` where an explicit impl cannot run.
    """
    op = "unpatchify3d"
    _check.tensor(op, "tokens", tokens, "[B, S, pt*ph*pw*C]", ndim=3)
    grid, patch = _check_layout(op, "tokens", tokens, grid, patch)
    channels = _check.integer(op, "channels", channels, 1)
    B, _, features = tokens.shape
    if features != math.prod(patch) * channels:
        raise ValueError(
            f"{op}: tokens must have pt*ph*pw*C = {math.prod(patch) * channels} features for patch {patch} and "
            f"channels {channels}; got {features}"
        )
    grad = needs_grad((tokens,))
    impl = _dispatch.choose(op, impl, tokens, grad=grad)
    settings = (_video(B, channels, grid, patch), grid, impl)
    return apply(_Unpatchify3d, tokens, settings) if grad else _unpatchify3d(tokens, *settings)


def final_layer(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    grid: Sequence[int],
    patch: Sequence[int],
    norm: str = "layer",
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """unpatchify3d((norm(x) · (1 + scale) + shift) weightᵀ + bias)

        norm="layer":  norm(x) = (x − mean(x)) / √(var(x) + eps)            (biased variance, over D)
        norm="rms":    norm(x) = x / √(mean(x²) + eps)

    x             [B, S, D], float32, bfloat16, float16 (float64 in `reference`), any strides
    shift, scale  one of [D], [B, D], [B, 1, D], [B, F, D] with F dividing S (each of F frames' S/F consecutive tokens
                  shares a row), [B, S, D], with 1 instead of B for rows of every clip; any strides, any float dtype;
                  None: absent. For rows that an index chooses: norm_modulate(index=), linear, unpatchify3d
    weight, bias  [pt·ph·pw·C, D] and [pt·ph·pw·C], rows ordered (pt, ph, pw, C); any float dtype
    grid, patch   (T, H, W) in tokens with T·H·W = S; (pt, ph, pw)

    Returns [B, C, T·pt, H·ph, W·pw] in x's dtype, dense. Statistics, products and sums are fp32, rounded once at the
    store (and, where tensor cores multiply, once before); error against fp64 ≤ 2 × that of plain PyTorch in the same
    dtype plus one rounding. Each gradient is reduced to exactly the shape given, in fp32 and in a fixed order: two runs
    agree bit for bit. Forward mode, torch.func and, under it, higher orders: by the reference's formula
    (docs/numerics.md).

    Raises TypeError or ValueError naming the argument; `Unavailable` where an explicit impl cannot run.
    Source: the final layer of DiT, arXiv 2212.09748.
    """
    op = "final_layer"
    _check.tensor(op, "x", x, "[B, S, D]", ndim=3)
    grid, patch = _check_layout(op, "x", x, grid, patch)
    frames = _rows.check(op, x, shift=shift, scale=scale)
    _check.choice(op, "norm", norm, NORMS)
    eps = _check.positive(op, "eps", eps)
    _check.tensor(op, "weight", weight, "[pt*ph*pw*C, D]", ndim=2)
    (B, _, D), (features, width) = x.shape, weight.shape
    if width != D:
        raise ValueError(f"{op}: weight [pt*ph*pw*C, D] must have x's width D={D}; got {width}")
    cells = math.prod(patch)
    if features == 0 or features % cells:
        raise ValueError(
            f"{op}: weight must have a multiple of pt*ph*pw = {cells} rows for patch {patch}; got {features}"
        )
    if bias is not None:
        _check.exact(op, "bias", bias, (features,), "[pt*ph*pw*C], as weight has rows")
    _check.same_device(op, x, {"weight": weight, "bias": bias})
    tensors = narrow(x, (x, shift, scale, weight, bias))
    grad = needs_grad(tensors)
    limits = partial(kernels_cuda.why_not_final, x, *tensors[1:4], frames)
    impl = _dispatch.choose(op, impl, x, grad=grad, limits=limits)
    settings = (_video(B, features // cells, grid, patch), frames, *grid, norm == "rms", eps, impl)
    return apply(_FinalLayer, *tensors, settings) if grad else _final_layer(*tensors, *settings)


def video_to_uint8(video: Tensor, *, patch: Sequence[int] = (1, 1, 1), impl: str = "auto") -> Tensor:
    """out[b, t·pt + i, h·ph + j, w·pw + k, c] = round((clamp(x, −1, 1) + 1) · 127.5),
    x = video[b, ((c·pt + i)·pw + k)·ph + j, t, h, w]

    video     [B, C·pt·pw·ph, T, H, W], float32, bfloat16, float16 (float64 in `reference`), any strides: what a
              decoder's last convolution gives
    patch     (pt, ph, pw): Wan 2.2's VAE has (1, 2, 2), LTX's (1, 4, 4), both with features ordered (C, pt, pw, ph)

    Returns uint8 [B, T·pt, H·ph, W·pw, C], dense: the frames of a clip. NaN becomes 0. Sum and product are fp32, each
    rounded, then the result, halves to even: the bits of plain PyTorch on video.float(). Reads and writes each value
    once. Not differentiable: integers have no gradient, and none is recorded; a video with a tangent is a TypeError.

    Raises TypeError or ValueError naming the argument; `Unavailable` where an explicit impl cannot run.
    """
    op = "video_to_uint8"
    _check.tensor(op, "video", video, "[B, C*pt*pw*ph, T, H, W]", ndim=5)
    pt, ph, pw = patch = _check.triple(op, "patch", patch)
    B, features, T, H, W = video.shape
    if features % (pt * ph * pw):
        raise ValueError(
            f"{op}: video must have a multiple of pt*ph*pw = {pt * ph * pw} channels for patch {patch}; got {features}"
        )
    size = (B, T * pt, H * ph, W * pw, features // (pt * ph * pw))
    impl = _dispatch.choose(op, impl, video)
    if transformed():
        return derive(_video_to_uint8, _uint8_formula, video, patch, size, impl)
    return _video_to_uint8(video.detach(), patch, size, impl)


# Validation


def _check_layout(op, name, tokens, grid, patch) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    grid, patch = _check.triple(op, "grid", grid), _check.triple(op, "patch", patch)
    if math.prod(grid) != tokens.shape[1]:
        raise ValueError(
            f"{op}: grid {grid} makes {math.prod(grid)} tokens; {name} has {tokens.shape[1]}; "
            "text tokens must be cut off first"
        )
    return grid, patch


def _video(B, C, grid, patch) -> tuple[int, ...]:
    """The shape of the video that grid · patch pixels make."""
    (T, H, W), (pt, ph, pw) = grid, patch
    return B, C, T * pt, H * ph, W * pw


# patch_embed3d

_library.define(
    "patch_embed3d_fwd",
    "(Tensor video, Tensor weight, Tensor? bias, Tensor? pos, Tensor(a!) out) -> ()",
    reference=lambda video, weight, bias, pos, out: out.copy_(reference.patch_embed3d(video, weight, bias, pos=pos)),
    impls={"triton": ".patchify.kernels_embed:patch_embed3d_fwd", "cpu": None, "cuda": None},
)
_library.define(
    "patch_embed3d_bwd",
    "(Tensor dout, Tensor video, Tensor weight, Tensor? bias, Tensor? pos, "
    "Tensor(a!)? dvideo, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dpos) -> ()",
    reference=lambda dout, video, weight, bias, pos, dvideo, dweight, dbias, dpos: _library.vjp(
        reference.patch_embed3d,
        dict(video=video, weight=weight, bias=bias, pos=pos),
        (dout,),
        dict(video=dvideo, weight=dweight, bias=dbias, pos=dpos),
    ),
    impls={"triton": ".patchify.kernels_embed:patch_embed3d_bwd", "cpu": None},
)


def _patch_operands(video, weight, bias, pos) -> tuple[Tensor | None, ...]:
    """As the kernels see them: pos is [1, S, D] or [B, S, D]."""
    pos = pos[None] if pos is not None and pos.ndim == 2 else pos
    return video, parameter(weight), parameter(bias), parameter(pos)


def _patch_embed3d(video, weight, bias, pos, shape, impl) -> Tensor:
    out = video.new_empty(shape)
    _library.call("patch_embed3d_fwd", impl)(*_patch_operands(video, weight, bias, pos), out)
    return out


class _PatchEmbed3d(torch.autograd.Function):
    @staticmethod
    def formula(video, weight, bias, pos, settings):
        return reference.patch_embed3d(video, weight, bias, pos=pos)

    @staticmethod
    def forward(ctx, video, weight, bias, pos, settings):
        ctx.save_for_backward(video, weight, bias, pos)
        ctx.settings = settings
        return _patch_embed3d(video, weight, bias, pos, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        saved = ctx.saved_tensors
        operands = _patch_operands(*saved)
        grads = [like(t, wanted) for t, wanted in zip(operands, ctx.needs_input_grad[:4], strict=True)]
        _, impl = ctx.settings
        _library.call("patch_embed3d_bwd", impl)(dense(dout), *operands, *grads)
        if grads[3] is not None:
            grads[3] = grads[3].view(saved[3].shape)
        return *grads, None


# unpatchify3d

_library.define(
    "unpatchify3d_fwd",
    "(Tensor tokens, SymInt T, SymInt H, SymInt W, Tensor(a!) out) -> ()",
    reference=lambda tokens, T, H, W, out: out.copy_(
        reference.unpatchify3d(tokens, (T, H, W), reference.patch_of(out, (T, H, W)), out.shape[1])
    ),
    impls={"triton": ".patchify.kernels:unpatchify3d_fwd", "cpu": None},
)
_library.define(
    "unpatchify3d_bwd",
    "(Tensor dout, SymInt T, SymInt H, SymInt W, Tensor(a!) dtokens) -> ()",
    reference=lambda dout, T, H, W, dtokens: dtokens.copy_(
        reference.patchify3d(dout, reference.patch_of(dout, (T, H, W)))
    ),
    impls={"triton": ".patchify.kernels:unpatchify3d_bwd", "cpu": None},
)


def _unpatchify3d(tokens, shape, grid, impl) -> Tensor:
    out = tokens.new_empty(shape)
    _library.call("unpatchify3d_fwd", impl)(tokens, *grid, out)
    return out


class _Unpatchify3d(torch.autograd.Function):
    @staticmethod
    def formula(tokens, settings):
        (_, C, *size), grid, _ = settings
        return reference.unpatchify3d(tokens, grid, [n // g for n, g in zip(size, grid, strict=True)], C)

    @staticmethod
    def forward(ctx, tokens, settings):
        ctx.shape, ctx.settings = tokens.shape, settings
        return _unpatchify3d(tokens, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        _, grid, impl = ctx.settings
        dtokens = dout.new_empty(ctx.shape)
        _library.call("unpatchify3d_bwd", impl)(dout, *grid, dtokens)
        return dtokens, None


# final_layer

_FINAL = (
    "Tensor x, Tensor? shift, Tensor? scale, Tensor weight, Tensor? bias, SymInt T, SymInt H, SymInt W, "
    "bool rms, float eps"
)


def _final(video, x, shift, scale, weight, bias, T, H, W, rms, eps) -> Tensor:
    """The reference; video tells the patch."""
    grid = T, H, W
    patch = reference.patch_of(video, grid)
    return reference.final_layer(x, shift, scale, weight, bias, grid=grid, patch=patch, norm=NORMS[rms], eps=eps)


_library.define(
    "final_layer_fwd",
    f"({_FINAL}, Tensor(a!) out) -> ()",
    reference=lambda *args: args[-1].copy_(_final(args[-1], *args[:-1])),
    impls={"triton": ".patchify.kernels_final:final_layer_fwd", "cpu": None, "cuda": None},
)
_library.define(
    "final_layer_bwd",
    f"(Tensor dout, {_FINAL}, Tensor(a!)? dx, Tensor(b!)? dshift, Tensor(c!)? dscale, Tensor(d!)? dweight, "
    "Tensor(e!)? dbias) -> ()",
    reference=lambda dout, x, shift, scale, weight, bias, T, H, W, rms, eps, *grads: _library.vjp(
        lambda **inputs: _final(dout, **inputs, T=T, H=H, W=W, rms=rms, eps=eps),
        dict(x=x, shift=shift, scale=scale, weight=weight, bias=bias),
        (dout,),
        dict(zip(("x", "shift", "scale", "weight", "bias"), grads, strict=True)),
    ),
    impls={"triton": ".patchify.kernels_final:final_layer_bwd", "cpu": None},
)


def _final_layer(x, shift, scale, weight, bias, shape, frames, T, H, W, rms, eps, impl) -> Tensor:
    out = x.new_empty(shape)
    _library.call("final_layer_fwd", impl)(
        dense(x), _rows.operand(shift, x, frames), _rows.operand(scale, x, frames), parameter(weight), parameter(bias),
        T, H, W, rms, eps, out,
    )  # fmt: skip
    return out


class _FinalLayer(torch.autograd.Function):
    @staticmethod
    def formula(x, shift, scale, weight, bias, settings):
        (_, _, *size), _, *grid, rms, eps, _ = settings
        patch = [n // g for n, g in zip(size, grid, strict=True)]
        return reference.final_layer(x, shift, scale, weight, bias, grid=grid, patch=patch, norm=NORMS[rms], eps=eps)

    @staticmethod
    def forward(ctx, x, shift, scale, weight, bias, settings):
        ctx.save_for_backward(x, shift, scale, weight, bias)
        ctx.settings = settings
        return _final_layer(x, shift, scale, weight, bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        _, frames, *settings, impl = ctx.settings
        x, shift, scale, weight, bias = ctx.saved_tensors
        need = ctx.needs_input_grad
        dx, dweight, dbias = like(x, need[0]), like(weight, need[3]), like(bias, need[4])
        dshift, dscale = _rows.like(shift, need[1], x, frames), _rows.like(scale, need[2], x, frames)
        _library.call("final_layer_bwd", impl)(
            dout, dense(x), _rows.view(shift, x, frames), _rows.view(scale, x, frames), parameter(weight),
            parameter(bias), *settings, dx, dshift, dscale, dweight, dbias,
        )  # fmt: skip
        dshift, dscale = _rows.sum_to(dshift, shift), _rows.sum_to(dscale, scale)
        return dx, dshift, dscale, dweight, dbias, None


# video_to_uint8

_library.define(
    "video_to_uint8_fwd",
    "(Tensor video, SymInt[] patch, Tensor(a!) out) -> ()",
    reference=lambda video, patch, out: out.copy_(reference.video_to_uint8(video, patch)),
    impls={"triton": ".patchify.kernels_uint8:video_to_uint8_fwd", "cpu": None},
)


def _video_to_uint8(video, patch, size, impl) -> Tensor:
    out = video.new_empty(size, dtype=torch.uint8)
    _library.call("video_to_uint8_fwd", impl)(video, list(patch), out)
    return out


def _uint8_formula(video, patch, *_) -> Tensor:
    if torch.autograd.forward_ad._current_level >= 0:
        raise TypeError(
            "video_to_uint8: integers have no tangent; got a video that has one, or may, inside torch.func.jvp or a "
            "dual level; convert frames outside of it"
        )
    return reference.video_to_uint8(video, patch)
