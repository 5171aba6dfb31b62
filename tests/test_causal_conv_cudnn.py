"""What is cuDNN's own beside the convolutions of test_causal_conv_triton: when `auto` takes it, what is copied before
it, its settings, bf16. Without a GPU in the interpreter, with aten's convolutions on the CPU."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from test_causal_conv import CALLS, LAST, draw, judged, plain, terms_of_small

from sora_kernels import Unavailable, _dispatch, _library, causal_conv3d, downsample_conv3d, norm_silu, upsample_conv3d
from sora_kernels.causal_conv import config
from sora_kernels.testing import arrange, outputs_and_grads, poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := _dispatch.why_not("causal_conv3d", "cudnn", DEVICE):
    pytest.skip(reason, allow_module_level=True)

from sora_kernels.causal_conv import kernels_cudnn, kernels_passes  # noqa: E402

FUNCTIONS = {f.__name__: f for f in (causal_conv3d, upsample_conv3d, downsample_conv3d)}


def weight_of(channels, taps=(3, 3, 3)):
    return torch.randn(channels, channels, *taps, device=DEVICE, dtype=torch.float16)


@pytest.fixture(autouse=True, scope="module")
def plain_convolutions():
    """On a CPU PyTorch's own stand in for cuDNN's, not oneDNN's, whose weight gradient of a transposed convolution in
    bf16 is garbage on CPUs with AVX512_BF16 (torch 2.13)."""
    with torch.backends.mkldnn.flags(enabled=DEVICE != "cpu"):
        yield


# Dispatch


@pytest.fixture
def chosen(monkeypatch):
    """The implementation of each call, on a GPU of sm_90 that is only pretended: nothing runs."""
    seen = []
    monkeypatch.setattr(_dispatch, "_candidates", lambda op, *_: _library.impls(f"{op}_fwd"))
    monkeypatch.setattr(_dispatch, "_why_not", lambda *_: None)
    monkeypatch.setattr(config, "capability", lambda device: 90)
    monkeypatch.setattr(_library, "call", lambda op, impl: lambda *_: seen.append(impl))
    return seen


@pytest.mark.parametrize("name", FUNCTIONS)
def test_auto_takes_triton_where_it_was_measured_faster_and_cudnn_elsewhere(name, chosen, monkeypatch):
    function, other = FUNCTIONS[name], next(f for n, f in FUNCTIONS.items() if n != name)
    monkeypatch.setattr(config, "TRITON_FROM", {90: {(name, False): 8}})
    x, wide, narrow = (torch.zeros(1, C, 2, 4, 4, device=DEVICE, dtype=torch.float16) for C in (8, 8, 4))
    calls = {
        "triton": [
            lambda: function(wide, weight_of(8)),
            lambda: function(wide.float(), weight_of(8).float()),
            lambda: other(wide, weight_of(8), impl="triton"),
        ],
        "cudnn": [
            lambda: function(narrow, weight_of(4)),
            lambda: function(wide, weight_of(8)[:4]),
            lambda: function(wide, weight_of(8).requires_grad_()),
            lambda: function(wide, weight_of(8), impl="cudnn"),
            lambda: other(wide, weight_of(8)),
        ],
    }
    for expected, runs in calls.items():
        for run in runs:
            run()
            assert chosen.pop() == expected and not chosen
    monkeypatch.setattr(config, "capability", lambda device: 120)
    function(x, weight_of(8))
    assert chosen == ["cudnn"], "another GPU's figures"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_measurements_auto_takes_cudnn(name, chosen, monkeypatch):
    monkeypatch.setattr(config, "TRITON_FROM", {})
    for C in (1, 96, 1024):
        FUNCTIONS[name](torch.zeros(1, C, 2, 4, 4, device=DEVICE, dtype=torch.float16), weight_of(C, (2, 3, 3)))
    assert chosen == ["cudnn"] * 3


def test_the_table_names_operations_and_gpus():
    for capability, rows in config.TRITON_FROM.items():
        assert capability >= 80
        assert all(op in FUNCTIONS and isinstance(grad, bool) and least > 0 for (op, grad), least in rows.items())


def test_what_was_measured_fastest_gives_way_where_it_cannot_run(monkeypatch):
    x = torch.zeros(1, 8, 2, 4, 4, dtype=torch.float16)
    expected = _dispatch.choose("causal_conv3d", "auto", x)
    assert expected not in _dispatch.WITH_TRITON, "the interpreter is no choice of auto"
    assert _dispatch.choose("causal_conv3d", "auto", x, fastest="cudnn") == expected
    monkeypatch.setattr(_dispatch, "_candidates", lambda *_: ("triton", "cudnn", "reference"))
    limits = {"cudnn": "it is not for these"}.get
    assert _dispatch.choose("causal_conv3d", "auto", x, fastest="cudnn") == "cudnn"
    assert _dispatch.choose("causal_conv3d", "auto", x, fastest="cudnn", limits=limits) == "triton"


def test_what_is_missing_is_said(monkeypatch):
    uncached = _dispatch._why_not.__wrapped__
    why_not = functools.partial(uncached, "causal_conv3d", "cudnn", dtype=torch.float16, grad=True)
    monkeypatch.setattr(torch._C, "_has_cudnn", False)
    assert why_not(device="cuda") == "cudnn needs a torch that is built with cuDNN"
    monkeypatch.setattr(torch._C, "_has_cudnn", True)
    assert why_not(device="cuda") is None
    monkeypatch.setattr(_library, "triton_error", lambda: "triton is not installed")
    assert why_not(device="cuda") == "triton is not installed", "its passes are Triton's"
    monkeypatch.setattr(_dispatch, "INTERPRET", False)
    assert why_not(device="cpu").startswith("cudnn needs tensors on a CUDA device")
    with pytest.raises(Unavailable, match="norm_silu has no cudnn implementation"):
        norm_silu(torch.zeros(1, 2, 1, 1, 1), torch.ones(2), impl="cudnn")


def test_compiles_into_one_graph(monkeypatch):
    """Asked for by name, and where auto asks a table."""
    monkeypatch.setattr(config, "TRITON_FROM", {config.capability(torch.device(DEVICE)): {("causal_conv3d", True): 4}})
    x, weight = torch.randn(1, 4, 2, 3, 4, device=DEVICE).half(), weight_of(4, (2, 1, 3))
    for kwargs in (dict(impl="cudnn"), {}):
        torch._dynamo.reset()
        call = functools.partial(causal_conv3d, **kwargs)
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        tensors, dout = dict(x=x, weight=weight), torch.randn_like(x)
        expected, actual = (outputs_and_grads(lambda f=f, **ts: f(**ts), tensors, [dout]) for f in (call, compiled))
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


# What is read in place, and what is copied


@pytest.fixture
def read(monkeypatch):
    """(what the convolution read, its taps) of each call."""
    seen, convolution = [], kernels_cudnn._convolution

    def watched(x, weight, *args, **kwargs):
        seen.append((x, weight))
        return convolution(x, weight, *args, **kwargs)

    monkeypatch.setattr(kernels_cudnn, "_convolution", watched)
    return seen


def test_zeros_that_cudnn_adds_itself_are_not_copied(read):
    x = torch.randn(1, 4, 3, 4, 6, device=DEVICE).to(memory_format=LAST)
    causal_conv3d(x, torch.randn(4, 4, 1, 3, 5, device=DEVICE), stride=(1, 2, 1), impl="cudnn")
    upsample_conv3d(x, torch.randn(4, 4, 1, 3, 3, device=DEVICE), impl="cudnn")
    downsample_conv3d(x, torch.randn(4, 4, 2, 4, 2, device=DEVICE), factor=(1, 2, 2), cache=x[:, :, :1], impl="cudnn")
    causal_conv3d(x[:, :, 1:2], torch.randn(4, 4, 3, 3, 3, device=DEVICE), impl="cudnn")
    assert [x.data_ptr() == seen.data_ptr() for seen, _ in read] == [True, True, False, False]
    assert read[3][0].data_ptr() == x[:, :, 1:2].data_ptr() and read[3][1].shape[2] == 1, "one frame meets one tap"


def test_frames_before_x_are_copied_with_it_once(read):
    x, cache = torch.randn(2, 4, 3, 4, 6, device=DEVICE), torch.randn(2, 4, 2, 4, 6, device=DEVICE)
    causal_conv3d(x, torch.randn(4, 4, 3, 3, 3, device=DEVICE), cache=cache, impl="cudnn")
    causal_conv3d(x[:, :, :2], torch.randn(4, 4, 3, 3, 3, device=DEVICE), impl="cudnn")
    assert torch.equal(read[0][0], torch.cat([cache, x], 2))
    assert torch.equal(read[1][0], F.pad(x[:, :, :2], (0, 0, 0, 0, 1, 0))) and read[1][1].shape[2] == 2


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed", "expanded", "chunk of channels last"])
@pytest.mark.parametrize("C", [1, 3])
def test_packing_is_concatenation_and_padding(C, layout):
    big = torch.randn(2, C, 6, 3, 5, device=DEVICE).to(memory_format=LAST)
    place = (lambda t: t) if layout.startswith("chunk") else functools.partial(arrange, layout=layout)
    x, cache = place(big[:, :, 2:5]), place(big[:, :, :2])
    for past, (top, left), back in ((2, (0, 0), (0, 0)), (2, (1, 0), (0, 2)), (0, (0, 2), (1, 0)), (1, (0, 0), (1, 1))):
        before = cache[:, :, 2 - past :]
        zeros = torch.zeros_like(before)
        sides = left, back[1], top, back[0]
        with poison_empty():
            packed = kernels_passes.pack(x, before if past else None, (past, top, left), back)
            without = kernels_passes.pack(x, None, (past, top, left), back)
        assert packed.is_contiguous(memory_format=LAST)
        assert torch.equal(packed, F.pad(torch.cat([before, x], 2), sides))
        assert torch.equal(without, F.pad(torch.cat([zeros, x], 2), sides))


def test_rows_of_several_programs_are_whole():
    x = torch.randn(1, 70, 1, 1, 61, device=DEVICE).to(memory_format=LAST)
    assert torch.equal(kernels_passes.pack(x, None, (0, 0, 1), (1, 0)), F.pad(x, (1, 0, 0, 1)))


# Numerics and settings


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("norm_silu")])
def test_bfloat16(name):
    """Also in the interpreter, whose arithmetic on bf16 is wrong: these passes load, widen and round."""
    function, tensors, kwargs = draw(name, torch.bfloat16)
    tensors = {n: t.to(DEVICE) for n, t in tensors.items()}
    terms = functools.partial(terms_of_small, kwargs=kwargs)
    judged(function, functools.partial(plain, name), tensors, kwargs, terms, impl="cudnn", runs=1)


def test_the_convolution_is_rounded_once_before_the_rest():
    """What the docstring says of it: not less, and not more."""
    x, weight = torch.randn(1, 4, 1, 3, 5, device=DEVICE).half(), weight_of(4, (1, 3, 3))
    residual, norm = torch.randn(1, 4, 1, 3, 5, device=DEVICE).half(), torch.rand(4, device=DEVICE) + 0.5
    h = F.conv2d(x[:, :, 0], weight[:, :, 0], padding=1)[:, :, None]
    y, raw = causal_conv3d(x, weight, residual=residual, norm_weight=norm, return_raw=True, impl="cudnn")
    total = h.float() + residual.float()
    assert torch.equal(raw, total.half())
    expected = norm_silu(total, norm, impl="reference")
    torch.testing.assert_close(y.float(), expected, rtol=torch.finfo(torch.float16).eps, atol=1e-7)


@pytest.fixture
def settings():
    """The user's own, put back."""
    before = current()
    yield
    for (part, name), value in before.items():
        setattr(part, name, value)


def current():
    cudnn = torch.backends.cudnn
    names = [(cudnn, "enabled"), (cudnn, "benchmark"), (cudnn, "deterministic"), (cudnn.conv, "fp32_precision")]
    return {(part, name): getattr(part, name) for part, name in names}


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_the_settings_are_ours_within_and_the_users_after(precision, settings):
    cudnn = torch.backends.cudnn
    cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision = True, False, precision
    before = current()
    with pytest.raises(KeyError), kernels_cudnn._settings(torch.float32):
        assert list(current().values()) == [True, False, True, "ieee"]
        raise KeyError
    assert current() == before
    causal_conv3d(torch.randn(1, 2, 2, 3, 3, device=DEVICE), torch.randn(2, 2, 1, 1, 1, device=DEVICE), impl="cudnn")
    assert current() == before


def test_threads_take_turns_with_the_settings(settings):
    """Each would otherwise put back what the other had set."""
    torch.backends.cudnn.benchmark = True
    before, entered, order = current(), threading.Event(), []

    def other():
        entered.set()
        with kernels_cudnn._settings(torch.float16):
            order.append("other")

    thread = threading.Thread(target=other)
    with kernels_cudnn._settings(torch.float16):
        thread.start()
        entered.wait()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "other"] and current() == before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("norm_silu")])
def test_cudnn_is_what_aten_takes(name, dtype, monkeypatch):
    """aten has conditions of its own, and otherwise runs a kernel of its own."""
    function, tensors, kwargs = draw(name, dtype)
    tensors, taken, run = {n: t.to(DEVICE) for n, t in tensors.items()}, set(), kernels_cudnn._run

    def watched(aten, videos, *args):
        def call(*arguments):
            taken.add(torch._C._select_conv_backend(*arguments[len(videos) - 1 :][:9]))
            return aten(*arguments)

        return run(call, videos, *args)

    monkeypatch.setattr(kernels_cudnn, "_run", watched)
    call = functools.partial(function, **kwargs, impl="cudnn")
    outputs = call(**tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs_and_grads(lambda **ts: call(**ts), tensors, [torch.randn_like(o) for o in outputs])
    assert taken <= {torch._C._ConvBackend.Cudnn, torch._C._ConvBackend.CudnnTranspose} and len(taken) == 1
