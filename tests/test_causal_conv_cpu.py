"""The causal_conv family on a CPU: convolutions through oneDNN and aten, norm_silu in C++."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_causal_conv import DTYPES, LAST, STREAMS, by_reference, judged, plain_norm, terms_of
from test_csrc import cpu_library

from sora_kernels import Unavailable, _library, causal_conv3d, downsample_conv3d, norm_silu, upsample_conv3d
from sora_kernels.causal_conv import kernels_cpu
from sora_kernels.testing import arrange, assert_matches_oracle, outputs_and_grads

GEOMETRY = {  # function, kernel, options, frames of the cache
    "1x1x1": (causal_conv3d, (1, 1, 1), {}, 0),
    "3x1x1": (causal_conv3d, (3, 1, 1), {}, 2),
    "1x3x3": (causal_conv3d, (1, 3, 3), {}, 0),
    "3x3x3": (causal_conv3d, (3, 3, 3), {}, 2),
    "4x5x3": (causal_conv3d, (4, 5, 3), {}, 3),
    "3x3x3 by 2": (causal_conv3d, (3, 3, 3), {"stride": (2, 2, 2)}, 2),
    "1x3x3 by 1, 2, 2": (causal_conv3d, (1, 3, 3), {"stride": (1, 2, 2)}, 0),
    "up": (upsample_conv3d, (1, 3, 3), {"factor": (1, 2, 2)}, 0),
    "up in time": (upsample_conv3d, (3, 3, 3), {"factor": (2, 2, 2)}, 1),
    "up 4x5x1 by 3, 2, 3": (upsample_conv3d, (4, 5, 1), {"factor": (3, 2, 3)}, 1),
    "down": (downsample_conv3d, (1, 3, 3), {"factor": (1, 2, 2)}, 0),
    "down in time": (downsample_conv3d, (3, 1, 1), {"factor": (2, 1, 1)}, 1),
    "down 2x4x5 by 2, 2, 3": (downsample_conv3d, (2, 4, 5), {"factor": (2, 2, 3)}, 0),
}


MANY = ", as of many products"  # few are left to aten, and a small video is repeated instead of upsampled in phases


def geometry(cases, name, monkeypatch):
    """The case, which takes the way that its name says."""
    if name.endswith(MANY):
        monkeypatch.setattr(kernels_cpu, "FEW", 0)
    return cases[name.removesuffix(MANY)]


@pytest.mark.parametrize("past", ["cache", "zeros"])
@pytest.mark.parametrize("shape", [(1, 33, 4, 5, 7), (1, 5, 2, 9, 4), (3, 3, 6, 4, 5), (1, 1, 2, 6, 6)], ids=str)
@pytest.mark.parametrize("name", [*GEOMETRY, *(name + MANY for name in GEOMETRY)])
def test_convolutions_on_a_cpu(name, shape, past, monkeypatch):
    """Odd channels, one clip and several, few frames and many; channels last where C is odd, else contiguous."""
    function, kernel, kwargs, frames = geometry(GEOMETRY, name, monkeypatch)
    B, C, _, H, W = shape
    channels = {33: 5, 5: 33, 3: 1, 1: 3}[C]
    order = LAST if C in (5, 33) else torch.contiguous_format
    tensors = dict(x=torch.randn(shape).contiguous(memory_format=order), weight=torch.randn(channels, C, *kernel))
    tensors["bias"] = torch.randn(channels)
    if past == "cache":
        tensors["cache"] = torch.randn(B, C, frames, H, W)
    if function is causal_conv3d and "stride" not in kwargs:
        tensors["residual"] = torch.randn(B, channels, *shape[2:])
        if past == "cache" and channels > 1:  # of one channel, the RMS norm leaves the sign: its gradient is rounding
            tensors["norm_weight"] = torch.rand(channels) + 0.5
    judged(function, lambda ts, kw: by_reference(function, ts, kw), tensors, kwargs, terms_of, scale=0.1)


def by_products(x, dout, kernel, stride):
    """The gradient of the weight, as one product of matrices: what plain PyTorch computes of few channels."""
    kt, kh, kw = kernel
    windows = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0))
    for dim, size, step in zip((2, 3, 4), kernel, stride, strict=True):
        windows = windows.unfold(dim, size, step)
    return torch.einsum("bothw, bcthwijk -> ocijk", dout, windows)


@pytest.mark.parametrize("clips", [1, 2])
@pytest.mark.parametrize("size", [(5, 32, 32), (1, 7, 500), (9, 1, 400), (1, 60, 70)], ids=str)
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("channels", [(8, 8), (3, 17), (24, 2)], ids=str)
def test_weight_gradients_are_long_sums_in_short_runs(channels, stride, size, clips, monkeypatch):
    """oneDNN adds all pixels one after another, where a product of matrices adds them in blocks: it erred 4 times as
    much."""
    monkeypatch.setattr(kernels_cpu, "FEW", 0)
    C, out = channels
    x, weight = torch.randn(clips, C, *size), torch.randn(out, C, 3, 3, 3).requires_grad_()
    y = causal_conv3d(x, weight, stride=stride, impl="cpu")
    dout = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, weight, dout)
    oracle = by_products(x.double(), dout.double(), (3, 3, 3), stride)
    baseline = by_products(x, dout, (3, 3, 3), stride)
    ours, plain = ((t - oracle).norm() / oracle.norm() for t in (actual, baseline))
    assert ours <= 2 * plain + torch.finfo(torch.float32).eps, f"{ours:.1e}, a product of matrices {plain:.1e}"


@cpu_library
@pytest.mark.parametrize("norm", ["rms", "group"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 3, 3), (2, 3, 1, 5, 7), (2, 33, 3, 17, 11), (1, 384, 1, 3, 5), (3, 6, 2, 1, 1)], ids=str
)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "chunk", "transposed"])
def test_norm_silu_on_a_cpu(norm, dtype, shape, layout):
    x = torch.randn(shape).to(dtype) * 3 + 1
    x = {
        "contiguous": lambda: x,
        "channels last": lambda: x.contiguous(memory_format=LAST),
        "chunk": lambda: torch.cat([x * float("nan"), x], 2).contiguous(memory_format=LAST)[:, :, shape[2] :],
        "transposed": lambda: x.mT.contiguous().mT,
    }[layout]()
    C = shape[1]
    kwargs = {"norm": norm, "groups": 3 if C % 3 == 0 else 1, "eps": 1e-5}
    tensors = dict(x=x, weight=torch.rand(C) + 0.5, bias=torch.randn(C).to(dtype))
    judged(norm_silu, plain_norm, tensors, kwargs, lambda key, ts: 1 if key == "output0" else ts["x"].numel())


@cpu_library
@pytest.mark.parametrize("order", [LAST, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("norm", ["rms", "group"])
def test_norm_silu_does_not_depend_on_the_number_of_threads(norm, order, for_any_threads):
    tensors = dict(x=torch.randn(2, 12, 5, 37, 41).contiguous(memory_format=order), weight=torch.randn(12))
    dout = torch.randn(2, 12, 5, 37, 41)
    call = lambda **ts: norm_silu(**ts, norm=norm, groups=4, impl="cpu")  # noqa: E731
    for_any_threads(lambda: outputs_and_grads(call, tensors, [dout]))


@cpu_library
@pytest.mark.parametrize("order", [LAST, torch.contiguous_format], ids=str)
def test_group_statistics_are_stable(order):
    """A mean of a thousand deviations: E[x²] − E[x]² in fp32 would be wrong in the first digit."""
    x = (torch.randn(1, 4, 5, 60, 60) + 1000).contiguous(memory_format=order)
    kwargs = dict(weight=torch.ones(4), norm="group", groups=2)
    oracle = norm_silu(x.double(), **kwargs)
    assert_matches_oracle(norm_silu(x, **kwargs, impl="cpu"), oracle, norm_silu(x, **kwargs, impl="reference"))


@cpu_library
@pytest.mark.parametrize("pixels", [(2, 2), (4, 8)], ids=str)
@pytest.mark.parametrize("order", [LAST, torch.contiguous_format], ids=str)
def test_silu_at_the_ends_of_its_range(order, pixels):
    """One value at a time, and whole vectors of every instruction set."""
    ends = [-float("inf"), -3e38, -1e4, -89.0, -88.0, -87.5, -20.0, -1.0, 0.0, 1.0, 20.0, 87.5, 88.5, 1e4, 3e38]
    bias = torch.tensor([*ends, float("nan")])
    x = torch.zeros(1, 16, 1, *pixels).contiguous(memory_format=order).requires_grad_()
    y = norm_silu(x, torch.ones(16), bias, eps=1.0, impl="cpu")
    assert y[:, -1].isnan().all()
    per_pixel = bias.double().view(-1, 1, 1).expand(16, *pixels)[1:-1]
    torch.testing.assert_close(y[0, 1:-1, 0].double(), F.silu(per_pixel), rtol=1e-6, atol=1e-36)
    assert y[0, 0].isnan().all(), "as in plain PyTorch"
    finite = norm_silu(x[:, 1:-1], torch.ones(14), bias[1:-1], eps=1.0, impl="cpu")
    (grad,) = torch.autograd.grad(finite.sum(), x)
    b = per_pixel.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.silu(b).sum(), b)
    torch.testing.assert_close(grad[0, 1:-1, 0].double(), slope, rtol=1e-6, atol=1e-30)
    assert norm_silu(torch.full_like(x, float("nan")), torch.ones(16), impl="cpu").isnan().all()


@cpu_library
def test_private_ops_refuse_what_they_cannot_read():
    forward = _library.call("norm_silu_fwd", "cpu")
    x, weight = torch.randn(2, 4, 3, 5, 6), torch.ones(4)
    with pytest.raises(RuntimeError, match="expected x's memory format"):
        forward(x, weight, None, 0, 1e-6, torch.empty_like(x, memory_format=LAST))
    with pytest.raises(RuntimeError, match=r"x: expected T, H and W to lie as in one axis"):
        forward(x[..., :4], weight, None, 0, 1e-6, torch.empty(2, 4, 3, 5, 4))
    with pytest.raises(RuntimeError, match=r"groups: expected 0 or a divisor of the 4 channels of x, got 3"):
        forward(x, weight, None, 3, 1e-6, torch.empty_like(x))
    with pytest.raises(RuntimeError, match=r"weight: expected \(4,\), got Float \(5\)"):
        forward(x, torch.ones(5), None, 0, 1e-6, torch.empty_like(x))
    with pytest.raises(RuntimeError, match="x: expected float32, bfloat16 or float16"):
        forward(x.double(), weight, None, 0, 1e-6, torch.empty_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cuts", [(1,) * 8, (2,) * 4, (3, 3, 2), (1, 7), (8,)], ids=str)
@pytest.mark.parametrize("ways", ["", MANY])
@pytest.mark.parametrize("name", ["causal_conv3d", "causal_conv3d kt=5", "causal_conv3d norm", "upsample_conv3d"])
def test_chunks_on_a_cpu_equal_the_whole(name, ways, cuts, dtype, monkeypatch):
    """Frames read in place, frames packed after their past and taps left out for zeros all give the same frames."""
    function, kernel, kwargs, past = geometry(STREAMS, name + ways, monkeypatch)
    x = torch.randn(1, 8, 8, 12, 12).to(dtype).contiguous(memory_format=LAST)
    weight = torch.randn(4, 8, *kernel)
    whole = function(x, weight, **kwargs, impl="cpu")
    first, *rest = x.split(cuts, 2)
    parts = [function(first, weight, **kwargs, impl="cpu")]
    cache = F.pad(first[:, :, -past:], (0, 0, 0, 0, max(past - first.shape[2], 0), 0))
    for piece in rest:
        part, cache = function(piece, weight, cache=cache, **kwargs, impl="cpu")
        parts.append(part)
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=8e-3, atol=1e-5)
    torch.testing.assert_close(torch.cat(parts, 2), whole, **tolerance)
    assert torch.equal(cache, x[:, :, 8 - past :])


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("ways", ["", MANY])
def test_odd_memory_formats_of_the_weight_change_nothing(ways, frames, monkeypatch):
    """Forward and backward; of one frame, before which lie zeros, most taps have no gradient."""
    if ways == MANY:
        monkeypatch.setattr(kernels_cpu, "FEW", 0)
    x, weight = torch.randn(1, 8, frames, 12, 12), torch.randn(8, 8, 3, 3, 3)
    for function in (causal_conv3d, upsample_conv3d, downsample_conv3d):
        dout = torch.randn_like(function(x, weight))
        run = lambda weight, impl, f=function, g=dout: outputs_and_grads(  # noqa: E731
            lambda **ts: f(**ts, impl=impl), dict(x=x.to(weight.dtype), weight=weight), [g.to(weight.dtype)]
        )
        expected = run(weight.double(), "reference")
        for layout in ("contiguous", "channels last", "sliced", "transposed"):
            given = weight.contiguous(memory_format=LAST) if layout == "channels last" else arrange(weight, layout)
            for name, result in run(given, "cpu").items():
                torch.testing.assert_close(result.double(), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(
    "function, shape, kernel, options",
    [(downsample_conv3d, (1, 1, 2, 2, 3), (1, 1, 2, 2, 3), {"factor": (2, 1, 2)}),
     (downsample_conv3d, (3, 1, 4, 2, 3), (5, 1, 3, 2, 3), {"factor": (2, 1, 2)}),
     (causal_conv3d, (3, 1, 1, 2, 2), (2, 1, 1, 5, 3), {"stride": (1, 1, 2)})],
)  # fmt: skip
def test_narrow_videos_of_one_channel_in_channels_last(function, shape, kernel, options, impl):
    """oneDNN reads beyond their rows, where their strides are those of channels last."""
    x, weight = torch.randn(shape), torch.randn(kernel)
    _, _, T, H, W = shape
    last = torch.empty_strided(shape, (T * H * W, 1, H * W, W, 1)).copy_(x)
    expected = function(x.double(), weight.double(), **options, impl="reference")
    for given in (x, last):
        result = function(given, weight, **options, impl=impl)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_auto_takes_the_cpu_implementation(require):
    require("causal_conv3d", "cpu")
    x, weight = torch.randn(1, 4, 2, 3, 3), torch.randn(4, 4, 3, 3, 3)
    assert torch.equal(causal_conv3d(x, weight), causal_conv3d(x, weight, impl="cpu"))
    with pytest.raises(Unavailable, match="cpu takes float32"):
        causal_conv3d(x.double(), weight, impl="cpu")
