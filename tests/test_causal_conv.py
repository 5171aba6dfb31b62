"""The causal_conv family: definitions, gradients, streaming, numerics and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sora_kernels import Unavailable, causal_conv3d, downsample_conv3d, norm_silu, upsample_conv3d
from sora_kernels.causal_conv import reference
from sora_kernels.testing import LAYOUTS, arrange, assert_matches_oracle, outputs_and_grads, poison_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST = torch.channels_last_3d


def op_samples():
    """(op, arguments) for the checks of tests/test_registration.py."""
    g = torch.Generator().manual_seed(1)

    def t(*shape):
        return torch.randn(*shape, generator=g)

    x, row, down_x = t(2, 4, 3, 4, 5), t(4), t(2, 4, 2, 4, 5)
    w, b, cache = t(6, 4, 3, 1, 3), t(6), t(2, 4, 2, 4, 5)
    out, pre, residual, norm = t(2, 6, 3, 4, 5), t(2, 6, 3, 4, 5), t(2, 6, 3, 4, 5), t(6)
    up, up_cache, down, down_cache = t(2, 6, 6, 4, 10), t(2, 4, 1, 4, 5), t(2, 6, 1, 4, 2), t(2, 4, 1, 4, 5)
    one, dx, dw = (1, 1, 1), t(*x.shape), t(*w.shape)
    return [
        ("norm_silu_fwd", (x, row, None, 0, 1e-6, t(*x.shape))),
        ("norm_silu_fwd", (x, row, t(4), 2, 1e-6, t(*x.shape))),
        ("norm_silu_bwd", (t(*x.shape), x, row, None, 0, 1e-6, t(*x.shape), t(4), None)),
        ("norm_silu_bwd", (t(*x.shape), x, row, t(4), 2, 1e-6, t(*x.shape), t(4), t(4))),
        ("causal_conv3d_fwd", (x, w, None, None, None, None, one, False, 1e-6, out, None)),
        ("causal_conv3d_fwd", (x, w, b, cache, residual, norm, one, False, 1e-6, out, pre)),
        ("causal_conv3d_bwd", (out, None, x, w, None, None, None, one, False, 1e-6, dx, dw, None, None, None, None)),
        (
            "causal_conv3d_bwd",
            (out, residual, x, w, cache, norm, pre, one, False, 1e-6, dx, dw, t(6), t(*cache.shape), residual, t(6)),
        ),
        ("upsample_conv3d_fwd", (x, w, b, up_cache, (2, 1, 2), up)),
        ("upsample_conv3d_bwd", (up, x, w, None, (2, 1, 2), dx, dw, t(6), None)),
        ("upsample_conv3d_bwd", (up, x, w, up_cache, (2, 1, 2), None, None, None, t(*up_cache.shape))),
        ("downsample_conv3d_fwd", (down_x, w, b, down_cache, (2, 1, 2), down)),
        ("downsample_conv3d_bwd", (down, down_x, w, None, (2, 1, 2), t(*down_x.shape), t(*w.shape), t(6), None)),
        ("downsample_conv3d_bwd", (down, down_x, w, down_cache, (2, 1, 2), None, None, None, t(*down_cache.shape))),
    ]  # fmt: skip


# The definitions, written as sums


def conv_by_definition(x, weight, bias, stride, front):
    """y[o, t, h, w] = bias[o] + sum of weight[o, c, i, j, k] x[c, st t + i - front_t, ...], zeros outside of x."""
    sizes = [n + 64 for n in x.shape[2:]]  # more zeros around than any tap reaches
    padded = x.new_zeros(*x.shape[:2], *sizes)
    padded[:, :, 32:-32, 32:-32, 32:-32] = x

    def at(t, h, w):
        t, h, w = (32 + i * s - f for i, s, f in zip((t, h, w), stride, front, strict=True))
        kt, kh, kw = weight.shape[2:]
        return torch.einsum("bcijk,ocijk->bo", padded[:, :, t : t + kt, h : h + kh, w : w + kw], weight) + bias

    return at


CONVS = {
    "3x3x3": (causal_conv3d, (3, 3, 3), {}, (1, 1, 1), (2, 1, 1)),
    "1x1x1": (causal_conv3d, (1, 1, 1), {}, (1, 1, 1), (0, 0, 0)),
    "3x1x1": (causal_conv3d, (3, 1, 1), {}, (1, 1, 1), (2, 0, 0)),
    "4x5x3, strides 2, 1, 3": (causal_conv3d, (4, 5, 3), {"stride": (2, 1, 3)}, (2, 1, 3), (3, 2, 1)),
    "down 1x3x3": (downsample_conv3d, (1, 3, 3), {}, (1, 2, 2), (0, 0, 0)),
    "down in time": (downsample_conv3d, (3, 1, 1), {"factor": (2, 1, 1)}, (2, 1, 1), (1, 0, 0)),
    "down 2x4x5 by 2, 2, 3": (downsample_conv3d, (2, 4, 5), {"factor": (2, 2, 3)}, (2, 2, 3), (0, 1, 1)),
}


@pytest.mark.parametrize("case", CONVS)
def test_convolution_is_its_definition(case):
    function, kernel, kwargs, stride, front = CONVS[case]
    x, bias = torch.randn(2, 3, 4, 5, 7, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    weight = torch.randn(4, 3, *kernel, dtype=torch.float64)
    y = function(x, weight, bias, **kwargs)
    ceil = function is causal_conv3d
    assert list(y.shape[2:]) == [(n + s - 1) // s if ceil else n // s for n, s in zip(x.shape[2:], stride, strict=True)]
    at = conv_by_definition(x, weight, bias, stride, front)
    for t, h, w in torch.cartesian_prod(*map(torch.arange, y.shape[2:])).tolist():
        torch.testing.assert_close(y[:, :, t, h, w], at(t, h, w), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [(1, 2, 2), (2, 2, 2), (3, 1, 4)])
def test_upsampling_is_nearest_then_the_convolution(factor):
    x, weight, bias = torch.randn(2, 3, 2, 3, 5), torch.randn(4, 3, 3, 3, 3), torch.randn(4)
    sizes = [n * f for n, f in zip(x.shape[2:], factor, strict=True)]
    expected = causal_conv3d(F.interpolate(x, sizes, mode="nearest"), weight, bias)
    torch.testing.assert_close(upsample_conv3d(x, weight, bias, factor=factor), expected)


def test_norm_silu_is_its_definition():
    x, weight, bias = torch.randn(2, 6, 3, 4, 5), torch.randn(6), torch.randn(6)
    per_channel = weight.view(-1, 1, 1, 1), bias.view(-1, 1, 1, 1)
    rms = F.silu(F.rms_norm(x.movedim(1, -1), (6,), weight, 1e-3).movedim(-1, 1) + per_channel[1])
    torch.testing.assert_close(norm_silu(x, weight, bias, eps=1e-3), rms)
    group = F.silu(F.group_norm(x, 3, weight, bias, 1e-3))
    torch.testing.assert_close(norm_silu(x, weight, bias, norm="group", groups=3, eps=1e-3), group)


def test_tiny_eps_is_the_norm_of_wan():
    x, gamma = torch.randn(1, 6, 3, 4, 5), torch.randn(6)
    for scale in (1.0, 1e-3, 1e-8):
        wan = F.silu(F.normalize(x * scale, dim=1) * 6**0.5 * gamma.view(-1, 1, 1, 1))
        torch.testing.assert_close(norm_silu(x * scale, gamma, eps=1e-24), wan, rtol=2e-6, atol=1e-6)
    zeros = torch.zeros_like(x).requires_grad_()
    y = norm_silu(zeros, gamma, eps=1e-24)
    y.sum().backward()
    assert y.eq(0).all() and zeros.grad.isfinite().all()


def test_replicated_borders_are_those_of_torch():
    """Around frames; before them where there is no cache, whose frames have borders of their own."""
    x, weight, bias = torch.randn(2, 3, 2, 3, 5), torch.randn(4, 3, 3, 5, 3), torch.randn(4)
    padded = F.pad(x, (1, 1, 2, 2, 2, 0), mode="replicate")
    for stride in (1, 2):
        y = causal_conv3d(x, weight, bias, stride=stride, padding="replicate")
        torch.testing.assert_close(y, F.conv3d(padded, weight, bias, stride))
    past = torch.randn(2, 3, 2, 3, 5)
    y, cache = causal_conv3d(x, weight, bias, padding="replicate", cache=past)
    padded = F.pad(torch.cat([past, x], 2), (1, 1, 2, 2, 0, 0), mode="replicate")
    torch.testing.assert_close(y, F.conv3d(padded, weight, bias))
    assert torch.equal(cache, x)


def test_epilogue_is_residual_then_norm_and_silu():
    x, weight, bias = torch.randn(2, 3, 2, 3, 5), torch.randn(4, 3, 3, 3, 3), torch.randn(4)
    residual, norm = torch.randn(2, 4, 2, 3, 5), torch.randn(4)
    y = causal_conv3d(x, weight, bias)
    torch.testing.assert_close(causal_conv3d(x, weight, bias, residual=residual), y + residual)
    fused = causal_conv3d(x, weight, bias, residual=residual, norm_weight=norm, norm_eps=1e-3)
    torch.testing.assert_close(fused, norm_silu(y + residual, norm, eps=1e-3))


def test_the_raw_result_is_what_the_norm_reads():
    x, weight, norm = torch.randn(1, 3, 2, 3, 5), torch.randn(4, 3, 3, 3, 3), torch.randn(4)
    for cache in (None, torch.randn(1, 3, 2, 3, 5)):
        options = dict(norm_weight=norm, residual=torch.randn(1, 4, 2, 3, 5), cache=cache)
        y, raw, *rest = causal_conv3d(x, weight, **options, return_raw=True)
        expected = causal_conv3d(x, weight, **options)
        assert torch.equal(y, expected if cache is None else expected[0])
        plain_y = causal_conv3d(x, weight, residual=options["residual"], cache=cache)
        assert torch.equal(raw, plain_y if cache is None else plain_y[0])
        assert len(rest) == (cache is not None) and all(torch.equal(r, expected[1]) for r in rest)


def test_the_input_of_a_convolution_is_all_it_reads():
    """`reference` splits a convolution into what it reads and aten's convolution; the backward rests on it."""
    x, weight = torch.randn(1, 3, 4, 5, 6), torch.randn(2, 3, 3, 4, 3)
    padded, padding = reference.downsample_input(x, weight, None, (2, 2, 2))
    assert padding == (0, 0, 0) and padded.shape == (1, 3, 5, 7, 7)
    assert torch.equal(padded[:, :, 1:, 1:-1, :-1], x)


# Gradients


def draw(name, dtype=torch.float64):
    """A call of the family: function of named tensors, those tensors, and its options."""
    def t(*shape):
        return torch.randn(*shape, dtype=torch.float32).to(dtype)

    x, w, b = t(2, 4, 2, 3, 2), t(2, 4, 3, 3, 1), t(2)
    return {
        "norm_silu rms": (norm_silu, dict(x=x, weight=t(4)), {}),
        "norm_silu rms bias": (norm_silu, dict(x=x, weight=t(4), bias=t(4)), {}),
        "norm_silu group": (norm_silu, dict(x=x, weight=t(4), bias=t(4)), dict(norm="group", groups=2)),
        "causal_conv3d": (causal_conv3d, dict(x=x, weight=w, bias=b), {}),
        "causal_conv3d stride": (causal_conv3d, dict(x=x, weight=w, bias=b), dict(stride=2)),
        "causal_conv3d residual": (causal_conv3d, dict(x=x, weight=w, bias=b, residual=t(2, 2, 2, 3, 2)), {}),
        "causal_conv3d everything": (
            causal_conv3d,
            dict(x=x, weight=w, bias=b, cache=t(2, 4, 2, 3, 2), residual=t(2, 2, 2, 3, 2), norm_weight=t(2)),
            {},
        ),
        "causal_conv3d raw": (
            causal_conv3d,
            dict(x=x, weight=w, cache=t(2, 4, 2, 3, 2), residual=t(2, 2, 2, 3, 2), norm_weight=t(2)),
            dict(return_raw=True),
        ),
        "causal_conv3d replicate": (causal_conv3d, dict(x=x, weight=w, bias=b), dict(padding="replicate")),
        "causal_conv3d replicate everything": (
            causal_conv3d,
            dict(x=x, weight=t(2, 4, 3, 5, 3), bias=b, cache=t(2, 4, 2, 3, 2), residual=t(2, 2, 1, 2, 1),
                 norm_weight=t(2)),
            dict(padding="replicate", stride=2, return_raw=True),
        ),
        "upsample_conv3d": (upsample_conv3d, dict(x=x, weight=w, bias=b), dict(factor=(1, 1, 2))),
        "upsample_conv3d cache": (
            upsample_conv3d, dict(x=x, weight=w, cache=t(2, 4, 1, 3, 2)), dict(factor=(2, 1, 1)),
        ),
        "downsample_conv3d": (downsample_conv3d, dict(x=x, weight=t(2, 4, 1, 2, 1)), dict(factor=(1, 2, 1))),
        "downsample_conv3d cache": (
            downsample_conv3d, dict(x=x, weight=w, bias=b, cache=t(2, 4, 1, 3, 2)), dict(factor=(2, 2, 1)),
        ),
    }[name]  # fmt: skip


CALLS = [
    "norm_silu rms", "norm_silu rms bias", "norm_silu group", "causal_conv3d", "causal_conv3d stride",
    "causal_conv3d residual", "causal_conv3d everything", "causal_conv3d raw", "causal_conv3d replicate",
    "causal_conv3d replicate everything", "upsample_conv3d", "upsample_conv3d cache", "downsample_conv3d",
    "downsample_conv3d cache",
]  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    """Every gradient, the one through the returned cache included, against finite differences."""
    function, tensors, kwargs = draw(name)
    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(
        lambda *ts: function(**dict(zip(tensors, ts, strict=True)), **kwargs), leaves, fast_mode=False
    )


@pytest.mark.parametrize("name", CALLS)
def test_only_the_gradients_asked_for(name):
    """Each gradient alone, and all together, are the same bits; twice run, too."""
    function, tensors, kwargs = draw(name, torch.float32)

    def grads(wanted):
        ts = {n: t.clone().requires_grad_(n in wanted) for n, t in tensors.items()}
        out = function(**ts, **kwargs)
        out = out if isinstance(out, tuple) else (out,)
        sum(o.cos().sum() for o in out).backward()
        return {n: ts[n].grad for n in wanted}

    together = grads(set(tensors))
    with poison_empty():
        for n in tensors:
            alone = grads({n})[n]
            assert torch.equal(alone, together[n]), n


# Streaming


STREAMS = {  # function, kernel, options, frames of the cache
    "causal_conv3d": (causal_conv3d, (3, 3, 3), {}, 2),
    "causal_conv3d kt=5": (causal_conv3d, (5, 1, 1), {}, 4),
    "causal_conv3d kt=1": (causal_conv3d, (1, 3, 3), {}, 0),
    "causal_conv3d stride 2": (causal_conv3d, (3, 3, 3), {"stride": (2, 1, 1)}, 2),
    "causal_conv3d replicate": (causal_conv3d, (3, 3, 3), {"padding": "replicate"}, 2),
    "causal_conv3d norm": (causal_conv3d, (3, 3, 3), {"norm_weight": torch.linspace(1, 2, 4)}, 2),
    "upsample_conv3d": (upsample_conv3d, (3, 3, 3), {}, 2),
    "upsample_conv3d in time": (upsample_conv3d, (4, 3, 3), {"factor": (2, 1, 1)}, 2),
    "downsample_conv3d": (downsample_conv3d, (3, 3, 3), {}, 2),
    "downsample_conv3d in time": (downsample_conv3d, (5, 3, 3), {"factor": (2, 2, 2)}, 3),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("cuts", [(8,), (2, 6), (2, 2, 2, 2), (6, 0, 2), (0, 4, 4)], ids=str)
def test_chunks_equal_the_whole(name, cuts):
    function, kernel, kwargs, past = STREAMS[name]
    x, weight = torch.randn(2, 3, 8, 5, 4), torch.randn(4, 3, *kernel)
    whole = function(x, weight, **kwargs)
    repeated = kwargs.get("padding") == "replicate"
    cache, parts = x[:, :, :1].expand(-1, -1, past, -1, -1) if repeated else torch.zeros(2, 3, past, 5, 4), []
    for piece in x.split(cuts, 2):
        part, cache = function(piece, weight, cache=cache, **kwargs)
        parts.append(part)
        assert cache.untyped_storage().data_ptr() != piece.untyped_storage().data_ptr(), "it would keep x alive"
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(cache, x[:, :, 8 - past :])


@pytest.mark.parametrize("name", ["causal_conv3d", "upsample_conv3d in time", "downsample_conv3d in time"])
def test_gradients_flow_through_the_cache(name):
    function, kernel, kwargs, past = STREAMS[name]
    x, weight = torch.randn(1, 3, 8, 5, 4), torch.randn(4, 3, *kernel)

    def grads(cuts):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        cache, total = torch.zeros(1, 3, past, 5, 4), 0
        for piece in leaves[0].split(cuts, 2):
            y, cache = function(piece, leaves[1], cache=cache, **kwargs)
            total = total + y.sin().sum()
        total.backward()
        return [leaf.grad for leaf in leaves]

    for chunked, whole in zip(grads((2, 2, 4)), grads((8,)), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)


# Numerics, layouts, sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_error_against_fp64(name, dtype):
    """Output and every gradient: at most twice the error of plain PyTorch in the same dtype, plus rounding."""
    function, tensors, kwargs = draw(name, dtype)
    as_double = {n: t.double() for n, t in tensors.items()}
    outputs = function(**as_double, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [torch.randn(o.shape).to(dtype) for o in outputs]
    oracle = outputs_and_grads(lambda **ts: function(**ts, **kwargs), as_double, [d.double() for d in douts])
    baseline = outputs_and_grads(lambda **ts: plain(name, ts, kwargs), tensors, douts)
    with poison_empty():
        actual = outputs_and_grads(lambda **ts: function(**ts, **kwargs), tensors, douts)
    for key, expected in oracle.items():
        assert_matches_oracle(actual[key], expected, baseline[key], key, terms=terms_of_small(key, tensors, kwargs))


def terms_of_small(key, tensors, kwargs):
    """At most all of x is summed; the cache, the last result, is copied."""
    last = "output2" if kwargs.get("return_raw") else "output1"
    return 1 if "cache" in tensors and key == last else tensors["x"].numel()


def plain(name, tensors, kwargs):
    """The same, in x's own dtype throughout: what a model without this library writes."""
    x, weight, bias = (tensors.get(n) for n in ("x", "weight", "bias"))
    if name.startswith("norm_silu"):
        if "norm" in kwargs:
            return F.silu(F.group_norm(x, kwargs["groups"], weight, bias, 1e-6))
        y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * weight.view(-1, 1, 1, 1)
        return F.silu(y if bias is None else y + bias.view(-1, 1, 1, 1))
    cache, factor = tensors.get("cache"), kwargs.get("factor", (1, 1, 1))
    (kt, kh, kw), stride = weight.shape[2:], (1, 1, 1)
    if name.startswith("downsample"):
        past, stride, pad = kt - factor[0], factor, (0, kw - factor[2], 0, kh - factor[1])
    else:
        past, pad = -(-(kt - 1) // factor[0]), (kw // 2, kw // 2, kh // 2, kh // 2)
        stride = (kwargs.get("stride", 1),) * 3
    h = F.pad(x, (0, 0, 0, 0, past, 0)) if cache is None else torch.cat([cache, x], 2)
    if kwargs.get("padding") == "replicate":
        h = F.pad(x if cache is None else h, (*pad, past if cache is None else 0, 0), mode="replicate")
        pad = (0, 0, 0, 0)
    if name.startswith("upsample"):
        for axis, f in enumerate(factor, 2):
            h = h.repeat_interleave(f, axis)
        h = h[:, :, past * factor[0] - (kt - 1) :]
    y = F.conv3d(F.pad(h, pad), weight, bias, stride)
    y = y if tensors.get("residual") is None else y + tensors["residual"]
    raw = y
    if tensors.get("norm_weight") is not None:
        y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-6) * tensors["norm_weight"].view(-1, 1, 1, 1)
        y = F.silu(y)
    outputs = (y, raw) if kwargs.get("return_raw") else (y,)
    outputs = outputs if cache is None else (*outputs, torch.cat([cache, x], 2)[:, :, -past:])
    return outputs if len(outputs) > 1 else y


def plain_norm(tensors, kwargs):
    x, weight, bias = (tensors[n] for n in ("x", "weight", "bias"))
    weight, bias = (t.to(x.dtype).view(-1, 1, 1, 1) for t in (weight, bias))
    if kwargs["norm"] == "group":
        y = F.group_norm(x, kwargs["groups"], None, None, kwargs["eps"])
    else:
        y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + kwargs["eps"])
    return F.silu(y * weight + bias)


def judged(function, plain, tensors, kwargs, terms, scale=1.0, impl="cpu", runs=2):
    """Output and every gradient against fp64 on the same values, by the error rule; all runs give the same bits."""
    as_double = {n: t.double() for n, t in tensors.items()}
    outputs = function(**as_double, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [torch.randn(o.shape).to(tensors["x"].dtype) * scale for o in outputs]
    oracle = outputs_and_grads(lambda **ts: function(**ts, **kwargs), as_double, [d.double() for d in douts])
    baseline = outputs_and_grads(lambda **ts: plain(ts, kwargs), tensors, douts)
    with poison_empty():
        first, *others = (
            outputs_and_grads(lambda **ts: function(**ts, **kwargs, impl=impl), tensors, douts) for _ in range(runs)
        )
    for key, expected in oracle.items():
        assert all(torch.equal(other[key], first[key]) for other in others), key
        assert_matches_oracle(first[key], expected, baseline[key], key, terms=terms(key, tensors))


def terms_of(key, tensors):
    """How many values an element sums: taps times channels, or all pixels for a parameter."""
    if key.startswith("output1"):
        return 1
    if key in ("grad weight", "grad bias", "grad norm_weight"):
        return tensors["x"].numel()
    weight = tensors["weight"]
    return max(weight.shape[:2]) * weight[0, 0].numel()


def by_reference(function, tensors, kwargs):
    return function(**tensors, **kwargs, impl="reference")


def test_parameters_of_another_dtype_than_x():
    x, weight, bias = torch.randn(1, 4, 2, 3, 3).bfloat16(), torch.randn(4, 4, 1, 3, 3), torch.randn(4)
    y = causal_conv3d(x, weight, bias, norm_weight=torch.ones(4, dtype=torch.float16))
    expected = causal_conv3d(x.float(), weight, bias, norm_weight=torch.ones(4)).bfloat16()
    assert torch.equal(y, expected)
    w = weight.requires_grad_()
    norm_silu(upsample_conv3d(x, w), torch.ones(4)).sum().backward()
    assert w.grad.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["norm_silu rms", "norm_silu group", "causal_conv3d everything", "upsample_conv3d"])
def test_layouts(name, layout):
    function, tensors, kwargs = draw(name, torch.float32)
    arranged = {n: arrange(t, layout) for n, t in tensors.items()}
    dense = {n: t.contiguous() for n, t in arranged.items()}
    outputs = function(**dense, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [arrange(torch.randn(o.shape), layout) for o in outputs]
    expected = outputs_and_grads(lambda **ts: function(**ts, **kwargs), dense, [d.contiguous() for d in douts])
    actual = outputs_and_grads(lambda **ts: function(**ts, **kwargs), arranged, douts)
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-5, atol=1e-5)


def test_channels_last_stays_channels_last():
    x = torch.randn(2, 4, 3, 4, 6).to(memory_format=LAST)
    weight = torch.randn(5, 4, 3, 3, 3)
    for function in (causal_conv3d, upsample_conv3d, downsample_conv3d, lambda x, w: norm_silu(x, w[0, :, 0, 0, 0])):
        y = function(x, weight)
        assert y.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(causal_conv3d(x, weight), causal_conv3d(x.contiguous(), weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (1, 3, 0, 4, 4), (1, 3, 2, 0, 4)], ids=str)
def test_empty_in_empty_out(shape):
    x, weight, row = torch.randn(shape).requires_grad_(), torch.randn(4, 3, 3, 3, 3).requires_grad_(), torch.ones(3)
    for y in (
        causal_conv3d(x, weight, norm_weight=torch.ones(4)), upsample_conv3d(x, weight),
        downsample_conv3d(x, weight), norm_silu(x, row), norm_silu(x, row, norm="group", groups=3),
    ):  # fmt: skip
        assert y.numel() == 0 and y.shape[0] == shape[0]
        y.sum().backward()
        assert x.grad.shape == shape
    assert weight.grad.eq(0).all()
    assert downsample_conv3d(torch.randn(1, 3, 2, 1, 4), weight).shape == (1, 4, 2, 0, 2), "half a row is no row"


def test_without_gradients_nothing_is_kept():
    x, weight, norm = torch.randn(1, 4, 2, 3, 3), torch.randn(4, 4, 3, 3, 3).requires_grad_(), torch.ones(4)
    with torch.no_grad():
        y = causal_conv3d(x, weight, norm_weight=norm)
    assert not y.requires_grad
    assert torch.equal(y, causal_conv3d(x, weight, norm_weight=norm))


def test_an_implementation_that_does_not_exist_is_refused():
    x, weight = torch.randn(1, 4, 2, 3, 3), torch.randn(4, 4, 3, 3, 3)
    torch.testing.assert_close(causal_conv3d(x, weight, impl="reference"), causal_conv3d(x, weight))
    with pytest.raises(Unavailable, match="causal_conv3d.*cuda"):
        causal_conv3d(x, weight, impl="cuda")
    with pytest.raises(ValueError, match="impl must be one of"):
        norm_silu(x, torch.ones(4), impl="fast")


X, W = torch.zeros(2, 4, 4, 6, 6), torch.zeros(8, 4, 3, 3, 3)
BAD = {
    "x a list": (lambda: causal_conv3d([1.0], W), TypeError, "x must be a tensor"),
    "x of integers": (lambda: causal_conv3d(X.int(), W), TypeError, "x must be float32.*int32"),
    "x of rank 4": (lambda: causal_conv3d(X[0], W), ValueError, r"x must be \[B, C, T, H, W\]; got shape"),
    "weight of a Conv2d": (lambda: upsample_conv3d(X, W[:, :, 0]), ValueError, r"weight must be \[O, C, kt, kh, kw\]"),
    "channels": (lambda: causal_conv3d(X[:, :3], W), ValueError, r"the 3 channels of x; got \[8, 4, 3, 3, 3\]"),
    "even kernel": (lambda: causal_conv3d(X, W[..., :2]), ValueError, r"kw must be odd.*\[3, 3, 2\]"),
    "no taps": (lambda: causal_conv3d(X, W[..., :0]), ValueError, "weight must not be empty"),
    "bias": (lambda: causal_conv3d(X, W, torch.zeros(4)), ValueError, r"bias must have shape \[8\].*got \[4\]"),
    "stride 0": (lambda: causal_conv3d(X, W, stride=0), ValueError, "stride must be at least 1"),
    "stride a pair": (lambda: causal_conv3d(X, W, stride=(1, 2)), ValueError, "stride must be three integers"),
    "stride a float": (lambda: causal_conv3d(X, W, stride=1.5), ValueError, "stride must be three integers"),
    "cache too long": (lambda: causal_conv3d(X, W, cache=X), ValueError, r"cache must have shape \[2, 4, 2, 6, 6\]"),
    "cache dtype": (
        lambda: causal_conv3d(X, W, cache=X[:, :, :2].double()), TypeError, "cache must have x's dtype.*float64",
    ),
    "cache and stride": (
        lambda: causal_conv3d(X[:, :, :3], W, stride=2, cache=X[:, :, :2]), ValueError, "multiple of 2 frames.*got 3",
    ),
    "cache device": (
        lambda: causal_conv3d(X, W, cache=X[:, :, :2].to("meta")), ValueError, "cache must be on x's device",
    ),
    "weight device": (lambda: causal_conv3d(X, W.to("meta")), ValueError, "weight must be on x's device"),
    "residual": (lambda: causal_conv3d(X, W, residual=X), ValueError, r"residual must have shape \[2, 8, 4, 6, 6\]"),
    "residual dtype": (
        lambda: causal_conv3d(X, W, residual=torch.zeros(2, 8, 4, 6, 6).half()), TypeError, "residual must have x's",
    ),
    "norm_weight": (lambda: causal_conv3d(X, W, norm_weight=torch.ones(4)), ValueError, r"norm_weight must have shape"),
    "norm_eps": (
        lambda: causal_conv3d(X, W, norm_weight=torch.ones(8), norm_eps=0.0), ValueError, "norm_eps must be positive",
    ),
    "raw of nothing": (lambda: causal_conv3d(X, W, return_raw=True), ValueError, "return_raw=True needs norm_weight"),
    "padding": (lambda: causal_conv3d(X, W, padding="reflect"), ValueError, "padding must be .*got 'reflect'"),
    "factor 0": (lambda: upsample_conv3d(X, W, factor=(1, 0, 2)), ValueError, "factor must be at least 1"),
    "factor an int": (lambda: upsample_conv3d(X, W, factor=2), ValueError, "factor must be three integers"),
    "upsample cache": (
        lambda: upsample_conv3d(X, W, factor=(2, 1, 1), cache=X[:, :, :2]), ValueError, r"shape \[2, 4, 1, 6, 6\]",
    ),
    "kernel below factor": (lambda: downsample_conv3d(X, W, factor=(1, 4, 2)), ValueError, "at least as large"),
    "frames": (
        lambda: downsample_conv3d(X[:, :, :3], W, factor=(2, 2, 2)), ValueError, r"multiple of factor\[0\]=2; got 3",
    ),
    "groups": (lambda: norm_silu(X, X.new_ones(4), norm="group", groups=3), ValueError, "must divide the 4 channels"),
    "groups 0": (lambda: norm_silu(X, X.new_ones(4), norm="group", groups=0), ValueError, "groups must divide"),
    "norm": (lambda: norm_silu(X, X.new_ones(4), norm="batch"), ValueError, "norm must be one of 'rms', 'group'"),
    "norm weight": (lambda: norm_silu(X, X.new_ones(6)), ValueError, r"weight must have shape \[4\]"),
    "eps": (lambda: norm_silu(X, X.new_ones(4), eps=float("nan")), ValueError, "eps must be positive"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_on_a_gpu(name, dtype):
    function, tensors, kwargs = draw(name, dtype)
    outputs = function(**tensors, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    douts = [torch.randn(o.shape).to(dtype) for o in outputs]
    oracle = outputs_and_grads(
        lambda **ts: function(**ts, **kwargs), {n: t.double() for n, t in tensors.items()}, [d.double() for d in douts]
    )
    on_gpu = {n: t.cuda() for n, t in tensors.items()}
    with torch.backends.cudnn.flags(allow_tf32=False):
        baseline = outputs_and_grads(lambda **ts: plain(name, ts, kwargs), on_gpu, [d.cuda() for d in douts])
        actual = outputs_and_grads(lambda **ts: function(**ts, **kwargs), on_gpu, [d.cuda() for d in douts])
    for key, expected in oracle.items():
        terms = terms_of_small(key, tensors, kwargs)
        assert_matches_oracle(actual[key].cpu(), expected, baseline[key].cpu(), key, terms=terms)
