"""Convolutions of a causal video VAE: causal in time, with a cache that lets a clip pass chunk by chunk."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from .. import _check, _dispatch, _library
from .._autograd import apply, needs_grad, once_differentiable, transformed
from .._operands import empty_video, like, narrow, parameter, video_format, zero
from . import config, kernels_cuda, reference

if TYPE_CHECKING:
    from typing_extensions import Unpack

_LIMITS = {} if torch.backends.mkldnn.is_available() else {"cpu": "cpu needs a torch with oneDNN"}
MAX_CHANNELS = 65536  # of a pixel that is normalised, in the registers of a Triton program


def norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "rms",
    groups: int = 32,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """SiLU(norm(x) · weight + bias), the activation in front of a VAE's convolutions.

        rms    norm(x)[c] = x[c] / sqrt(mean_c(x²) + eps)             over the C channels of each pixel
        group  norm(x)    = (x − mean) / sqrt(var + eps)              over a group of C/groups channels and T, H, W

    x       [B, C, T, H, W], float32, bfloat16, float16 or float64, any strides.
    weight  [C]; bias [C] or None; of any float dtype.
    groups  divides C; read for norm="group" only.
    impl    "cuda": norm="rms", forward, up to 1024 channels, in whole 16 bytes where they lie side by side, else
            T·H·W in whole 16 bytes; executed, not yet run on a GPU: "auto" never takes it.
    Returns a tensor like x, in channels_last_3d where x is. Gradients: x, weight, bias; forward mode, torch.func and,
    under it, higher orders: by the reference's formula (docs/numerics.md).

    Errors: TypeError for a dtype, ValueError for a shape, a device, an unknown `norm`, groups that do not divide C.
    Numerics: statistics and arithmetic in fp32 (fp64 for fp64), rounded once. Deterministic.
    Wan's VAE norm, x · sqrt(C) / max(‖x‖, 1e-12) · gamma, is norm="rms" with eps=1e-24 up to rounding.
    """
    op = "norm_silu"
    _check.tensor(op, "x", x, "[B, C, T, H, W]", ndim=5)
    C = x.shape[1]
    _check.choice(op, "norm", norm, ("rms", "group"))
    _check.exact(op, "weight", weight, (C,), "[C], one per channel of x")
    if bias is not None:
        _check.exact(op, "bias", bias, (C,), "[C], one per channel of x")
    if norm == "group" and not (_check.is_integer(groups) and groups >= 1 and C % groups == 0):
        raise ValueError(f"{op}: groups must divide the {C} channels of x; got groups={groups!r}")
    eps = _check.positive(op, "eps", eps)
    _check.same_device(op, x, {"weight": weight, "bias": bias})
    tensors = narrow(x, (x, weight, bias))
    grad, groups = needs_grad(tensors), int(groups) if norm == "group" else 0
    run = partial(apply, _NormSilu) if grad else _NormSilu.run
    wide = _dispatch.within(MAX_CHANNELS, C, "pixels")

    def limits(name: str) -> str | None:
        return kernels_cuda.why_not_norm(x, groups) if name == "cuda" else wide and wide(name)

    return run(*tensors, groups, eps, _dispatch.choose(op, impl, x, grad=grad, limits=limits))


class _Options(TypedDict, total=False):
    """For type checkers: what a call to `causal_conv3d` may say whatever it returns."""

    stride: int | tuple[int, int, int]
    padding: str
    residual: Tensor | None
    norm_weight: Tensor | None
    norm_eps: float
    impl: str


@overload
def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    cache: None = None, return_raw: Literal[False] = False, **options: Unpack[_Options],
) -> Tensor: ...  # fmt: skip
@overload
def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    cache: Tensor, return_raw: Literal[False] = False, **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    cache: None = None, return_raw: Literal[True], **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    cache: Tensor, return_raw: Literal[True], **options: Unpack[_Options],
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int, int] = 1,
    padding: str = "zeros",
    cache: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    return_raw: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """3D convolution that is causal in time and "same" in space, with an optional epilogue.

        h[t] = bias + Σ_i weight[:, :, i] ∗ x[t·stride_t − (kt−1) + i]         (∗: 2D convolution, k//2 zeros around)
        y    = h + residual,   or with norm_weight   SiLU(rms(h + residual) · norm_weight)

    x            [B, C, T, H, W], float32, bfloat16, float16 or float64; T may be 0.
    weight       [O, C, kt, kh, kw], a Conv3d weight as it is; kh and kw odd. bias [O] or None. Any float dtype.
    stride       an int or (t, h, w). The result is [B, O, ceil(T/st), ceil(H/sh), ceil(W/sw)].
    padding      "zeros", or "replicate": a frame is surrounded by repeats of its outermost pixels, and preceded, where
                 there is no cache, by repeats of the first frame. (Implementations read x and its border in one copy.)
    cache        None: the kt−1 frames before x are zeros, or as padding says, and y is returned.
                 [B, C, kt−1, H, W] in x's dtype (at the start of a clip zeros, or its first frame): the frames before
                 x; (y, cache for the next chunk) is returned. T must then be a multiple of stride_t.
    residual     like the result; added before the norm.
    norm_weight  [O]: RMS norm over the O channels with `norm_eps`, then SiLU, as in norm_silu.
    return_raw   with norm_weight: h + residual is returned too, (y, raw) or (y, raw, cache). A residual block convolves
                 the one and adds the other to its result.
    impl         "auto" on a GPU: in 16 bits cudnn (its products, our passes around them), until triton is measured
                 faster. "cuda": on sm_90, forward, stride 1, channels-last videos, channels in eights, a norm of up to
                 128; executed, not yet run on a GPU: "auto" never takes it.
    Gradients: x, weight, bias, cache (through the returned cache too), residual, norm_weight; of y and of raw. Other
    derivatives: as norm_silu.

    Errors: TypeError for a dtype, ValueError for a shape, a device, an even kh or kw, a stride below 1, an unknown
    padding, return_raw without norm_weight.
    Numerics: fp32 accumulation (fp64 for fp64), epilogue included, rounded once; error against fp64 ≤ 2 × that of plain
    PyTorch plus the √n + 1 roundings of n = C·kt·kh·kw products summed in another order: all that chunks change.
    In triton and cudnn the weight is rounded to x's dtype; in cudnn so are the convolution, before bias, residual and
    norm, and the gradient of the weight, of whatever dtype that is. Gradients are deterministic.
    """
    op = "causal_conv3d"
    _check_conv(op, x, weight, bias, same=True)
    _check.flag(op, "return_raw", return_raw)
    _check.choice(op, "padding", padding, ("zeros", "replicate"))
    stride = _check.triple(op, "stride", _check.per_axis(stride))
    _check_cache(op, x, cache, weight.shape[2] - 1, "kt - 1")
    if cache is not None and x.shape[2] % stride[0]:
        raise ValueError(f"{op}: with a cache, x must have a multiple of {stride[0]} frames (stride); got {x.shape[2]}")
    B, _, *size = x.shape
    size = size if stride == (1, 1, 1) else [-(-n // s) for n, s in zip(size, stride, strict=True)]
    shape = (B, weight.shape[0], *size)
    if residual is not None:
        _check.exact(op, "residual", residual, shape, "the shape of the result")
        if residual.dtype != x.dtype:
            raise TypeError(f"{op}: residual must have x's dtype {x.dtype}; got {residual.dtype}; cast it with .to()")
    if norm_weight is not None:
        _check.exact(op, "norm_weight", norm_weight, (weight.shape[0],), "[O], one per output channel")
        norm_eps = _check.positive(op, "norm_eps", norm_eps)
    elif return_raw:
        raise ValueError(f"{op}: return_raw=True needs norm_weight, without which y is the raw result; got None")
    _check.same_device(op, x, {"residual": residual, "norm_weight": norm_weight})
    tensors = narrow(x, (x, weight, bias, cache, residual, norm_weight))
    grad = needs_grad(tensors)
    for_cuda = partial(kernels_cuda.why_not, x, weight, cache, residual, norm_weight is not None, stride)
    impl = _choose(op, impl, x, weight, grad, norm_weight, for_cuda)
    settings = stride, padding, norm_eps, shape, return_raw, impl
    y = apply(_CausalConv3d, *tensors, *settings) if grad else _CausalConv3d.run(*tensors, *settings)
    if cache is None:
        return y
    return (*y, _next_cache(x, cache)) if return_raw else (y, _next_cache(x, cache))


@overload
def upsample_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    factor: tuple[int, int, int] = (1, 2, 2), cache: None = None, impl: str = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def upsample_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    factor: tuple[int, int, int] = (1, 2, 2), cache: Tensor, impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def upsample_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    factor: tuple[int, int, int] = (1, 2, 2),
    cache: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """causal_conv3d of x with every frame, row and column repeated `factor` times (nearest upsampling).

        y = causal_conv3d(u, weight, bias),   u[t, h, w] = x[t // ft, h // fh, w // fw]

    x       [B, C, T, H, W], float32, bfloat16, float16 or float64; T may be 0.
    weight  [O, C, kt, kh, kw], kh and kw odd (for a Conv2d: weight[:, :, None]). bias [O] or None. Any float dtype.
    factor  (t, h, w), each at least 1. The result is [B, O, ft·T, fh·H, fw·W].
    cache   None: the frames before x are zeros. [B, C, ceil((kt−1)/ft), H, W] in x's dtype: they are the frames before
            x, before upsampling, and (y, cache for the next chunk) is returned.
    impl    "cuda": as of causal_conv3d; factors of up to 8 pixels, each of which divides its k − 1.
    Gradients: x, weight, bias, cache. Errors, numerics: as causal_conv3d.
    """
    op = "upsample_conv3d"
    _check_conv(op, x, weight, bias, same=True)
    factor = _check.triple(op, "factor", factor)
    _check_cache(op, x, cache, reference.upsample_past(weight.shape[2], factor[0]), "ceil((kt - 1) / factor[0])")
    shape = (x.shape[0], weight.shape[0], *(size * f for size, f in zip(x.shape[2:], factor, strict=True)))
    return _resample(op, x, weight, bias, cache, factor, shape, impl)


@overload
def downsample_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    factor: tuple[int, int, int] = (1, 2, 2), cache: None = None, impl: str = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def downsample_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    factor: tuple[int, int, int] = (1, 2, 2), cache: Tensor, impl: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def downsample_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    factor: tuple[int, int, int] = (1, 2, 2),
    cache: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolution with stride `factor` and the padding inside: asymmetric in space, causal in time.

        space  k − f zeros in all, (k − f) // 2 of them in front: for k = 3, f = 2 one row below, one column right
        time   output frame j sees the kt frames that end with x's frame ft·(j+1) − 1

    x       [B, C, T, H, W], float32, bfloat16, float16 or float64; T a multiple of ft, 0 included.
    weight  [O, C, kt, kh, kw], no axis smaller than its factor. bias [O] or None. Any float dtype.
    factor  (t, h, w), each at least 1. The result is [B, O, T/ft, H//fh, W//fw].
    cache   None: the kt − ft frames before x are zeros. [B, C, kt−ft, H, W] in x's dtype: they are those frames, and
            (y, cache for the next chunk) is returned.
    Gradients: x, weight, bias, cache. Errors, numerics: as causal_conv3d.
    """
    op = "downsample_conv3d"
    _check_conv(op, x, weight, bias, same=False)
    factor = _check.triple(op, "factor", factor)
    if any(k < f for k, f in zip(weight.shape[2:], factor, strict=True)):
        raise ValueError(f"{op}: the kernel must be at least as large as factor={factor}; got {list(weight.shape[2:])}")
    if x.shape[2] % factor[0]:
        raise ValueError(f"{op}: the frames of x must be a multiple of factor[0]={factor[0]}; got {x.shape[2]}")
    _check_cache(op, x, cache, reference.downsample_past(weight.shape[2], factor[0]), "kt - factor[0]")
    shape = (x.shape[0], weight.shape[0], *(size // f for size, f in zip(x.shape[2:], factor, strict=True)))
    return _resample(op, x, weight, bias, cache, factor, shape, impl)


def _resample(op, x, weight, bias, cache, factor, shape, impl):
    tensors = narrow(x, (x, weight, bias, cache))
    grad = needs_grad(tensors)
    run = partial(apply, _Resample) if grad else _Resample.run
    for_cuda = partial(kernels_cuda.why_not_upsample, x, weight, cache, factor)
    y = run(*tensors, factor, shape, op, _choose(op, impl, x, weight, grad, for_cuda=for_cuda))
    return y if cache is None else (y, _next_cache(x, cache))


def _choose(op, impl, x, weight, grad, norm_weight=None, for_cuda=None):
    wide = None if norm_weight is None else _dispatch.within(MAX_CHANNELS, weight.shape[0], "pixels")

    def limits(name: str) -> str | None:
        if name == "cuda":
            return for_cuda and for_cuda()
        return _LIMITS.get(name) or (wide and wide(name))

    return _dispatch.choose(op, impl, x, grad=grad, limits=limits, fastest=config.fastest(op, x, weight, grad))


def _next_cache(x: Tensor, cache: Tensor) -> Tensor:
    if transformed():  # torch.func.vmap may map over one of the two, and does not write it into the other's memory
        return torch.cat([cache, x], 2)[:, :, x.shape[2] :]
    return reference.next_cache(x, cache)


class _NormSilu(torch.autograd.Function):
    @staticmethod
    def formula(x, weight, bias, groups, eps, impl):
        return _norm_silu_formula(x, weight, bias, groups, eps)

    @staticmethod
    def run(x, weight, bias, groups, eps, impl):
        out = torch.empty_like(x := x.contiguous(memory_format=video_format(x)))
        if impl == "cuda":
            weight, bias = kernels_cuda.parameters(weight, bias, x)
        _library.call("norm_silu_fwd", impl)(x, parameter(weight), parameter(bias), groups, eps, out)
        return out

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, impl):
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps, ctx.impl = groups, eps, impl
        return _NormSilu.run(x, weight, bias, groups, eps, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, bias = ctx.saved_tensors
        grads = [_like_if(n, t) for n, t in zip(ctx.needs_input_grad, (x, weight, bias), strict=False)]
        dout, x = (t.contiguous(memory_format=video_format(x)) for t in (dout, x))
        args = (dout, x, parameter(weight), parameter(bias), ctx.groups, ctx.eps)
        _library.call("norm_silu_bwd", ctx.impl)(*args, *grads)
        return *grads, None, None, None


class _CausalConv3d(torch.autograd.Function):
    @staticmethod
    def formula(x, weight, bias, cache, residual, norm_weight, stride, padding, norm_eps, shape, return_raw, impl):
        if 0 in shape:
            y = raw = x.new_zeros(shape)
        else:
            bordered = padding == "replicate"
            x_read, cache = reference.replicated(x, cache, weight) if bordered else (x, cache)
            tensors = x_read, weight, bias, cache, residual, norm_weight
            y, raw = _causal_conv3d_formula(*tensors, stride, bordered, norm_eps)
        return (y.to(x.dtype), raw.to(x.dtype)) if return_raw else y.to(x.dtype)

    @staticmethod
    def run(
        x, weight, bias, cache, residual, norm_weight, stride, padding, norm_eps, shape, return_raw, impl, keep=False
    ):  # fmt: skip
        """y, or (y, raw) where the caller wants it or, `keep`, the backward does."""
        out = empty_video(x, shape)
        raw = torch.empty_like(out) if return_raw or keep else None
        if bordered := padding == "replicate" and 0 not in shape:
            x, cache = reference.replicated(x, cache, weight)
        if impl == "cuda":
            x, weight, bias, cache, norm_weight = kernels_cuda.operands(x, weight, bias, cache, norm_weight)
        tensors = (x, weight, parameter(bias), cache, residual, parameter(norm_weight))
        _library.call("causal_conv3d_fwd", impl)(*tensors, stride, bordered, norm_eps, out, raw)
        return out if raw is None else (out, raw)

    @staticmethod
    def forward(ctx, x, weight, bias, cache, residual, norm_weight, stride, padding, norm_eps, shape, return_raw, impl):
        # what the norm read: a forward that kept only its result would have to be run again in the backward
        keep = norm_weight is not None
        tensors = (x, weight, bias, cache, residual, norm_weight)
        out = _CausalConv3d.run(*tensors, stride, padding, norm_eps, shape, return_raw, impl, keep)
        y, pre = out if keep else (out, None)
        ctx.save_for_backward(x, weight, bias, cache, norm_weight, pre)
        ctx.stride, ctx.padding, ctx.norm_eps, ctx.impl = stride, padding, norm_eps, impl
        return (y, pre) if return_raw else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, draw=None):
        x, weight, bias, cache, norm_weight, pre = ctx.saved_tensors
        need, plain = ctx.needs_input_grad, norm_weight is None  # then the gradient of residual is `dout` itself
        dx, dweight, dbias, dcache = (_like_if(n, t) for n, t in zip(need, (x, weight, bias, cache), strict=False))
        dresidual, dnorm = _like_if(need[4] and not plain, pre), _like_if(need[5], norm_weight)
        bordered = ctx.padding == "replicate" and dout.numel() > 0
        read, past, dread, dpast = x, cache, dx, dcache
        if bordered:
            read, past = reference.replicated(x, cache, weight)
            dread, dpast = (_wide_if(dx is not None or dcache is not None, t) for t in (read, past))
        args = (dout, draw, read, weight, past, parameter(norm_weight), pre, ctx.stride, bordered, ctx.norm_eps)
        _library.call("causal_conv3d_bwd", ctx.impl)(*args, dread, dweight, dbias, dpast, dresidual, dnorm)
        if bordered:
            _fold(dread, dpast, cache is None, dx, dcache)
        grads = (dx, dweight, dbias, dcache, dout if need[4] and plain else dresidual, dnorm)
        return *grads, None, None, None, None, None, None


class _Resample(torch.autograd.Function):
    """upsample_conv3d and downsample_conv3d: one signature, two ops."""

    @staticmethod
    def formula(x, weight, bias, cache, factor, shape, op, impl):
        return x.new_zeros(shape) if 0 in shape else getattr(reference, op)(x, weight, bias, factor=factor, cache=cache)

    @staticmethod
    def run(x, weight, bias, cache, factor, shape, op, impl):
        out = empty_video(x, shape)
        if impl == "cuda":
            weight, bias = kernels_cuda.phases(weight, factor, x), None if bias is None else bias.float()
        _library.call(f"{op}_fwd", impl)(x, weight, parameter(bias), cache, factor, out)
        return out

    @staticmethod
    def forward(ctx, x, weight, bias, cache, factor, shape, op, impl):
        ctx.save_for_backward(x, weight, bias, cache)
        ctx.factor, ctx.op, ctx.impl = factor, op, impl
        return _Resample.run(x, weight, bias, cache, factor, shape, op, impl)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, bias, cache = saved = ctx.saved_tensors  # once: checkpointing unpacks a single time
        grads = [_like_if(n, t) for n, t in zip(ctx.needs_input_grad, saved, strict=False)]
        _library.call(f"{ctx.op}_bwd", ctx.impl)(dout, x, weight, cache, ctx.factor, *grads)
        return *grads, None, None, None, None


def _check_conv(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, *, same: bool) -> None:
    _check.tensor(op, "x", x, "[B, C, T, H, W]", ndim=5)
    _check.tensor(op, "weight", weight, "[O, C, kt, kh, kw]", ndim=5)
    shape, channels = weight.shape, x.shape[1]
    out_channels, in_channels, kt, kh, kw = shape
    if in_channels != channels:
        got = _check.shape_of(weight)
        raise ValueError(f"{op}: weight [O, C, kt, kh, kw] must have the {channels} channels of x; got {got}")
    if min(shape) < 1:
        raise ValueError(f"{op}: weight must not be empty; got shape {_check.shape_of(weight)}")
    if same and not (kh % 2 and kw % 2):
        raise ValueError(f"{op}: kh and kw must be odd, for a result of the same size; got {[kt, kh, kw]}")
    if bias is not None:
        _check.exact(op, "bias", bias, (out_channels,), "[O], one per output channel")
    _check.same_device(op, x, {"weight": weight, "bias": bias})


def _check_cache(op: str, x: Tensor, cache: Tensor | None, past: int, formula: str) -> None:
    if cache is None:
        return
    B, C, _, H, W = x.shape
    _check.exact(op, "cache", cache, (B, C, past, H, W), f"x's, with {formula} frames")
    if cache.dtype != x.dtype:
        raise TypeError(f"{op}: cache must have x's dtype {x.dtype}; got {cache.dtype}; cast it with .to()")
    _check.same_device(op, x, {"cache": cache})


def _like_if(need: bool, t: Tensor | None) -> Tensor | None:
    return (torch.empty_like(t, memory_format=video_format(t)) if t.ndim == 5 else like(t)) if need else None


def _wide_if(need: bool, t: Tensor) -> Tensor | None:
    dtype = torch.promote_types(t.dtype, torch.float32)
    return torch.empty_like(t, dtype=dtype, memory_format=video_format(t)) if need else None


def _fold(
    dread: Tensor | None, dpast: Tensor | None, repeated: bool, dx: Tensor | None, dcache: Tensor | None
) -> None:
    """The adjoint of `reference.replicated`, in fp32 and one order: borders are added to the pixels they repeat."""
    if dread is None:
        return
    H, W = (dx if dcache is None else dcache).shape[3:]
    dread, dpast = (_inside(_inside(t, 3, H), 4, W) for t in (dread, dpast))
    if repeated:
        dread[:, :, 0] += dpast.sum(2)
    if dcache is not None:
        dcache.copy_(dpast)
    if dx is not None:
        dx.copy_(dread)


def _inside(t: Tensor, axis: int, size: int) -> Tensor:
    """The middle of an axis, to whose ends what lies outside of it is added."""
    n = (t.shape[axis] - size) // 2
    inside = t.narrow(axis, n, size)
    if n:
        inside.narrow(axis, 0, 1).add_(t.narrow(axis, 0, n).sum(axis, keepdim=True))
        inside.narrow(axis, size - 1, 1).add_(t.narrow(axis, n + size, n).sum(axis, keepdim=True))
    return inside


def _norm_silu_formula(x, weight, bias, groups, eps):
    if x.numel() == 0:
        return torch.zeros_like(x)
    return reference.norm_silu(x, weight, bias, norm="group" if groups else "rms", groups=groups, eps=eps)


def _norm_silu_bwd(dout, x, weight, bias, groups, eps, dx, dweight, dbias):
    if dout.numel() == 0:
        return zero(dx, dweight, dbias)
    function = partial(_norm_silu_formula, groups=groups, eps=eps)
    inputs, destinations = dict(x=x, weight=weight, bias=bias), dict(x=dx, weight=dweight, bias=dbias)
    _library.vjp(function, inputs, (dout,), destinations)


def _causal_conv3d_formula(x, weight, bias, cache, residual, norm_weight, stride, bordered, norm_eps):
    """The result and what the norm read, not rounded yet."""
    wide = reference.accumulate(x)  # in its dtype until the epilogue is done
    raw = reference.conv(*reference.causal_input(wide, weight, cache, bordered), weight, bias, tuple(stride))
    raw = raw if residual is None else raw + residual.to(raw.dtype)
    return raw if norm_weight is None else reference.norm_silu(raw, norm_weight, eps=norm_eps), raw


def _causal_conv3d_fwd(*args):
    *inputs, out, pre = args
    if out.numel() > 0:
        for destination, result in zip((out, pre), _causal_conv3d_formula(*inputs), strict=True):
            if destination is not None:
                destination.copy_(result)


def _causal_conv3d_bwd(
    dout, draw, x, weight, cache, norm_weight, pre, stride, bordered, norm_eps,
    dx, dweight, dbias, dcache, dresidual, dnorm_weight,
):  # fmt: skip
    if norm_weight is not None:
        dpre = torch.empty_like(pre, dtype=torch.promote_types(pre.dtype, torch.float32))
        _norm_silu_bwd(dout, pre, norm_weight, None, 0, norm_eps, dpre, dnorm_weight, None)
        dout = dpre if draw is None else dpre.add_(draw)
        if dresidual is not None:
            dresidual.copy_(dout)
    read = partial(reference.causal_input, bordered=bordered)
    _conv_bwd(read, dout, x, weight, cache, stride, dx, dweight, dbias, dcache)


def _conv_bwd(source, dout, x, weight, cache, stride, dx, dweight, dbias, dcache):
    """Backward of conv3d(source(x, ...)): aten's, then the adjoint of `source`. The forward is not run again."""
    if dout.numel() == 0:
        return zero(dx, dweight, dbias, dcache)
    padded, padding = source(reference.accumulate(x), weight, cache)
    mask = [dx is not None or dcache is not None, dweight is not None, dbias is not None]
    dpadded, dw, db = torch.ops.aten.convolution_backward(
        dout.to(padded.dtype), padded, weight.to(padded.dtype), [weight.shape[0]],
        stride, padding, (1, 1, 1), False, (0, 0, 0), 1, mask,
    )  # fmt: skip
    if dweight is not None:
        dweight.copy_(dw)
    if dbias is not None:
        dbias.copy_(db)
    if mask[0]:
        inputs, destinations = dict(x=x, cache=cache), dict(x=dx, cache=dcache)
        _library.vjp(lambda x, cache: source(x, weight, cache)[0], inputs, (dpadded,), destinations)


_library.define(
    "norm_silu_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, int groups, float eps, Tensor(a!) out) -> ()",
    reference=lambda *args: args[-1].copy_(_norm_silu_formula(*args[:-1])),
    impls={"triton": ".causal_conv.kernels_norm:norm_silu_fwd", "cpu": None, "cuda": None},
)
_library.define(
    "norm_silu_bwd",
    "(Tensor dout, Tensor x, Tensor weight, Tensor? bias, int groups, float eps, "
    "Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias) -> ()",
    reference=_norm_silu_bwd,
    impls={"triton": ".causal_conv.kernels_norm:norm_silu_bwd", "cpu": None},
)


def _implementations(op: str) -> dict[str, str | None]:
    return {impl: f".causal_conv.kernels_{impl}:{op}" for impl in ("triton", "cudnn", "cpu")}


_library.define(
    "causal_conv3d_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? cache, Tensor? residual, Tensor? norm_weight, "
    "SymInt[3] stride, bool bordered, float norm_eps, Tensor(a!) out, Tensor(b!)? pre) -> ()",
    reference=_causal_conv3d_fwd,
    impls=_implementations("causal_conv3d_fwd") | {"cuda": None},
)
_library.define(
    "causal_conv3d_bwd",
    "(Tensor dout, Tensor? draw, Tensor x, Tensor weight, Tensor? cache, Tensor? norm_weight, Tensor? pre, "
    "SymInt[3] stride, bool bordered, float norm_eps, Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, "
    "Tensor(d!)? dcache, Tensor(e!)? dresidual, Tensor(f!)? dnorm_weight) -> ()",
    reference=_causal_conv3d_bwd,
    impls=_implementations("causal_conv3d_bwd"),
)


def _define_resample(op, forward, source, strided, **impls):
    def fwd(x, weight, bias, cache, factor, out):
        if out.numel() > 0:
            out.copy_(forward(x, weight, bias, factor=tuple(factor), cache=cache))

    def bwd(dout, x, weight, cache, factor, *destinations):
        read = partial(source, factor=tuple(factor))
        _conv_bwd(read, dout, x, weight, cache, factor if strided else (1, 1, 1), *destinations)

    _library.define(
        f"{op}_fwd",
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? cache, SymInt[3] factor, Tensor(a!) out) -> ()",
        reference=fwd,
        impls=_implementations(f"{op}_fwd") | impls,
    )
    _library.define(
        f"{op}_bwd",
        "(Tensor dout, Tensor x, Tensor weight, Tensor? cache, SymInt[3] factor, "
        "Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dcache) -> ()",
        reference=bwd,
        impls=_implementations(f"{op}_bwd"),
    )


_define_resample("upsample_conv3d", reference.upsample_conv3d, reference.upsample_input, strided=False, cuda=None)
_define_resample("downsample_conv3d", reference.downsample_conv3d, reference.downsample_input, strided=True)
