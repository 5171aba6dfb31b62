"""The Triton norm_silu: both norms, both memory formats, forward and backward, against the definition in fp64.
Without a GPU in the interpreter, in fp32 and fp16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_causal_conv import plain_norm

from sora_kernels import _dispatch, _library, norm_silu
from sora_kernels.testing import LAYOUTS, arrange, assert_matches_oracle, outputs_and_grads, poison_empty

if reason := _dispatch.why_not("norm_silu", "triton", "cuda" if torch.cuda.is_available() else "cpu"):
    pytest.skip(reason, allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not _dispatch.INTERPRET)
FORMATS = {"last": torch.channels_last_3d, "first": torch.contiguous_format}
NORMS = {"rms": dict(norm="rms"), "group": dict(norm="group", groups=3)}
FORMAT, NORM = pytest.mark.parametrize("order", FORMATS), pytest.mark.parametrize("norm", NORMS)


@pytest.fixture
def programs(monkeypatch):
    """As many programs at most as reduce anything: with few, a part of a clip is several tiles."""
    from sora_kernels.causal_conv import kernels_norm

    return lambda count: monkeypatch.setattr(kernels_norm, "PROGRAMS", count)


def draw(shape, dtype=torch.float32, order="last", bias=True):
    C = shape[1]
    x = (torch.randn(shape, device=DEVICE) * 3 + 1).to(dtype).contiguous(memory_format=FORMATS[order])
    return dict(
        x=x, weight=torch.rand(C, device=DEVICE) + 0.5, bias=torch.randn(C, device=DEVICE).to(dtype) if bias else None
    )


def check(tensors, kwargs, dout=None) -> None:
    """Output and every gradient by the error rule, unwritten memory poisoned; the same bits twice."""
    kwargs = {"eps": 1e-5} | kwargs
    x = tensors["x"]
    dout = torch.randn_like(x) if dout is None else dout
    with poison_empty():
        first, second = (
            outputs_and_grads(lambda **ts: norm_silu(**ts, **kwargs, impl="triton"), tensors, [dout]) for _ in range(2)
        )
    wide = {n: None if t is None else t.double() for n, t in tensors.items()}
    oracle = outputs_and_grads(lambda **ts: norm_silu(**ts, **kwargs), wide, [dout.double()])
    zero = torch.zeros_like(tensors["weight"], dtype=x.dtype)
    baseline = outputs_and_grads(
        lambda **ts: plain_norm(ts if ts.get("bias") is not None else ts | {"bias": zero}, kwargs), tensors, [dout]
    )
    for name, expected in oracle.items():
        assert torch.equal(first[name], second[name]), name
        assert_matches_oracle(first[name], expected, baseline[name], name, x.numel() if name != "output0" else 1)


SHAPES = [  # one channel, one pixel, odd sizes, several tiles; channels in three blocks; more than a tile of channels
    (1, 1, 2, 3, 3),
    (3, 6, 1, 1, 1),
    (2, 3, 1, 5, 7),
    (2, 33, 3, 5, 3),
    (1, 96, 1, 9, 5),
    (1, 1155, 1, 1, 3),
]


@NORM
@FORMAT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_match_the_fp64_oracle(shape, dtype, order, norm):
    kwargs = NORMS[norm] | ({"groups": 1} if shape[1] % 3 else {})
    check(draw(shape, dtype, order), kwargs)


@NORM
@FORMAT
@pytest.mark.parametrize("count", [1, 7])
def test_a_part_of_a_clip_is_several_tiles(count, order, norm, programs):
    """What is cut into 1024 parts at the sizes of models: one part of many tiles, and parts that end within a tile."""
    programs(count)
    check(draw((2, 3, 1, 59, 37), order=order), NORMS[norm])


@FORMAT
def test_without_a_bias_and_with_parameters_of_another_dtype(order):
    for norm in NORMS.values():
        check(draw((1, 6, 2, 3, 5), order=order, bias=False), norm)
        tensors = draw((1, 6, 2, 3, 5), torch.float16, order)
        check(tensors | dict(weight=tensors["weight"].half(), bias=tensors["bias"].double()), norm)


@NORM
@pytest.mark.parametrize("layout", LAYOUTS)
def test_awkward_layouts_of_the_video_and_its_gradient(layout, norm):
    tensors = draw((2, 6, 3, 4, 5), order="first")
    tensors["x"] = arrange(tensors["x"], layout)
    if layout != "expanded":  # of one value per group, a group norm leaves rounding
        check(tensors, NORMS[norm], arrange(torch.randn(2, 6, 3, 4, 5, device=DEVICE), layout))
    check(draw((2, 6, 3, 4, 5)), NORMS[norm], torch.ones((), device=DEVICE).expand(2, 6, 3, 4, 5))


@FORMAT
def test_a_video_is_read_where_it_lies(order, monkeypatch):
    """Neither memory format is copied into the other, nor is the result."""
    tensors, seen, call = draw((2, 6, 3, 4, 5), order=order), [], _library.call
    monkeypatch.setattr(_library, "call", lambda op, impl: lambda *args: (seen.append(args), call(op, impl)(*args)))
    out = norm_silu(**tensors, impl="triton")
    assert seen[0][0].data_ptr() == tensors["x"].data_ptr() and seen[0][0].stride() == tensors["x"].stride()
    assert out.is_contiguous(memory_format=FORMATS[order])


@NORM
@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (1, 3, 0, 4, 4), (1, 3, 2, 0, 4)], ids=str)
def test_empty_in_empty_out(shape, norm):
    tensors = {n: t.requires_grad_() for n, t in draw(shape).items()}
    y = norm_silu(**tensors, **NORMS[norm], impl="triton")
    with poison_empty():
        y.sum().backward()
    assert y.shape == tensors["x"].grad.shape == shape
    assert tensors["weight"].grad.eq(0).all() and tensors["bias"].grad.eq(0).all()


@FORMAT
@pytest.mark.parametrize("first", [3000.0, 0.0], ids=["even", "beside a zero"])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of what is masked
def test_group_statistics_are_stable(first, order, programs):
    """A mean of thousands of deviations, over many tiles, where E[x²] − E[x]² in fp32 is off in the first digit; with
    one of the values far from the mean, too, that the statistics are taken around."""
    programs(3)
    x = torch.randn(1, 6, 4, 33, 32, device=DEVICE) + 3000
    one_pass = x[0, :2].square().mean() - x[0, :2].mean().square()
    assert not 0.9 < one_pass < 1.1, "a formula that must not pass would pass"
    x[0].flatten(1)[:, 4 * 33 * 32 // 3] = first
    x = x.contiguous(memory_format=FORMATS[order])
    tensors, kwargs = dict(x=x, weight=torch.ones(6, device=DEVICE)), dict(norm="group", groups=3, eps=1e-6)
    oracle = norm_silu(x.double(), tensors["weight"], **kwargs)
    baseline = plain_norm(tensors | dict(bias=torch.zeros(6, device=DEVICE)), kwargs)
    assert_matches_oracle(norm_silu(**tensors, **kwargs, impl="triton"), oracle, baseline)


@NORM
def test_each_gradient_alone_equals_the_one_computed_with_all_others(norm):
    tensors, dout = draw((2, 6, 3, 4, 5)), torch.randn(2, 6, 3, 4, 5, device=DEVICE)
    together = outputs_and_grads(lambda **ts: norm_silu(**ts, **NORMS[norm], impl="triton"), tensors, [dout])
    for name in tensors:
        leaf = tensors[name].clone().requires_grad_()
        with poison_empty():
            out = norm_silu(**tensors | {name: leaf}, **NORMS[norm], impl="triton")
            (alone,) = torch.autograd.grad(out, leaf, dout)
        assert torch.equal(alone, together[f"grad {name}"]), name


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu_at_the_ends_of_its_range():
    bias = torch.tensor([-3e38, -1e4, -89.0, -87.5, -20.0, 0.0, 20.0, 88.5, 1e4, 3e38], device=DEVICE)
    x = torch.zeros(1, 10, 1, 2, 2, device=DEVICE, requires_grad=True)
    y = norm_silu(x, torch.ones(10, device=DEVICE), bias, eps=1.0, impl="triton")
    torch.testing.assert_close(y[0, :, 0, 0, 0].double(), F.silu(bias.double()), rtol=1e-5, atol=1e-36)
    (grad,) = torch.autograd.grad(y.sum(), x)
    b = bias.double().requires_grad_()
    (slope,) = torch.autograd.grad(F.silu(b).sum(), b)
    torch.testing.assert_close(grad[0, :, 0, 0, 0].double(), slope, rtol=1e-5, atol=1e-30)
    nan = torch.full((1, 2, 1, 1, 1), float("nan"), device=DEVICE)
    assert norm_silu(nan, torch.ones(2, device=DEVICE), impl="triton").isnan().all()


def test_zeros_with_the_eps_of_wan():
    x = torch.zeros(1, 6, 1, 2, 2, device=DEVICE, requires_grad=True)
    y = norm_silu(x, torch.ones(6, device=DEVICE), eps=1e-24, impl="triton")
    y.sum().backward()
    assert y.eq(0).all() and x.grad.isfinite().all()


@pytest.mark.gpu
@NORM
@FORMAT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 96, 2, 120, 208), (2, 384, 1, 60, 52), (1, 528, 3, 33, 31)], ids=str)
def test_on_a_gpu_at_sizes_of_models(shape, dtype, order, norm):
    check(draw(shape, dtype, order), NORMS[norm])


@pytest.mark.gpu
def test_auto_takes_triton_on_a_gpu():
    x, weight = torch.randn(1, 6, 1, 2, 2, device="cuda"), torch.ones(6, device="cuda")
    assert _dispatch.choose("norm_silu", "auto", x, grad=True) == "triton"
    assert torch.equal(norm_silu(x, weight), norm_silu(x, weight, impl="triton"))
