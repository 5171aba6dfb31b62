"""Every op and every public function, by enumeration: opcheck, fullgraph compilation, dynamic shapes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pathlib
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import sora_kernels
from sora_kernels import _dispatch, _library

SAMPLES: list[tuple[str, tuple]] = []
for path in sorted(pathlib.Path(__file__).parent.glob("test_*.py")):
    if "def op_samples()" in path.read_text() and path.stem != "test_registration":
        SAMPLES += importlib.import_module(path.stem).op_samples()

OPS = [(op, impl) for op, impls in _library.ops().items() for impl in impls]


FIRST_CALLS = """
import sys, threading
sys.setswitchinterval(1e-6)
from sora_kernels import _library
start = threading.Barrier(8)
def first():
    start.wait()
    assert _library.load_error("cpu") is None
threads = [threading.Thread(target=first) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.skipif(_library.load_error("cpu") is not None, reason=str(_library.load_error("cpu")))
def test_threads_that_call_first_together_load_a_library_once():
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_every_op_has_samples():
    assert {op for op, _ in SAMPLES} == set(_library.ops())


@pytest.mark.parametrize("op, impl", OPS, ids=[f"{op}-{impl}" for op, impl in OPS])
def test_opcheck(op, impl):
    name, _, direction = op.rpartition("_")
    if reason := _dispatch.why_not(name, impl, "cpu", torch.float32, direction == "bwd"):
        pytest.skip(reason)
    for sample, args in SAMPLES:
        if sample == op:
            torch.library.opcheck(_library.overload(op, impl), args)


LISTENERS = {
    "nobody": contextlib.nullcontext,
    "a mode below autograd": TorchDispatchMode,
    "a mode above it": TorchFunctionMode,
    "a default device": lambda: torch.device("cpu"),
    "dual numbers": torch.autograd.forward_ad.dual_level,
    "the profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
}


@pytest.mark.parametrize("listener", LISTENERS)
def test_python_on_a_cpu_is_called_past_the_dispatcher_where_nobody_listens(listener):
    ran = []
    run = _library._at_once(lambda *args: ran.append(("kernel", args)), lambda *args: ran.append(("op", args)))
    args = torch.ones(2), torch.nn.Parameter(torch.ones(2)), None, 2, 1e-6, False, (1, 2, 2), [1, 2]
    with LISTENERS[listener]():
        run(*args)
    run(*args[:1], TwoTensor(torch.ones(2), torch.ones(2)))
    torch.func.vmap(lambda x: (run(x), x)[1])(torch.ones(2))
    torch.jit.trace(lambda x: (run(x), x + 1)[1], torch.ones(2), check_trace=False)
    names, given = zip(*ran, strict=True)
    assert names == ("kernel" if listener == "nobody" else "op", "op", "op", "op")
    assert all(a is b for a, b in zip(given[0], args, strict=True))


def test_a_convolution_on_a_cpu_is_seen_by_the_profiler_and_by_modes():
    x, weight = torch.randn(1, 2, 3, 4, 4), torch.randn(2, 2, 3, 3, 3)
    alone = sora_kernels.causal_conv3d(x, weight, impl="cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        watched = sora_kernels.causal_conv3d(x, weight, impl="cpu")
    assert "sora_kernels::_causal_conv3d_fwd_cpu" in {event.key for event in profile.key_averages()}
    graph = make_fx(lambda x: sora_kernels.causal_conv3d(x, weight, impl="cpu"))(x)
    assert "_causal_conv3d_fwd_cpu" in graph.code
    assert torch.equal(alone, watched) and torch.equal(alone, graph(x))


@pytest.mark.parametrize("op, impl", OPS, ids=[f"{op}-{impl}" for op, impl in OPS])
def test_only_destinations_are_written(op, impl):
    schema = _library.overload(op, impl)._schema
    assert not schema.returns
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written and written == [a.name for a in schema.arguments][-len(written) :], "destinations come last"


def heads(n, S=12, H=2, E=8):
    return [torch.randn(n, S, H, E) for _ in range(3)]


PLACES = torch.tensor([2, 0, 0, 2, 1, 0])  # of six tokens among three rows


def places(x):
    return PLACES.to(x.device).expand(x.shape[:2])


# name -> (function of tensors alone, its tensors for a batch of n)
CALLS = {
    "norm_modulate": (sora_kernels.norm_modulate, lambda n: (torch.randn(n, 6, 8), *torch.randn(2, n, 3, 8))),
    "gate_residual": (sora_kernels.gate_residual, lambda n: (*torch.randn(2, n, 6, 8), torch.randn(n, 8))),
    "gate_residual_norm_modulate": (
        sora_kernels.gate_residual_norm_modulate, lambda n: (*torch.randn(2, n, 6, 8), *torch.randn(3, n, 1, 8)),
    ),
    "gate_heads": (sora_kernels.gate_heads, lambda n: (torch.randn(n, 12, 2, 8), torch.randn(n, 12, 2))),
    "norm_modulate index": (
        lambda x, shift, scale: sora_kernels.norm_modulate(x, shift, scale, index=places(x)),
        lambda n: (torch.randn(n, 6, 8), torch.randn(3, 8), torch.randn(n, 3, 8)),
    ),
    "gate_residual_norm_modulate index": (
        lambda x, y, gate, scale: sora_kernels.gate_residual_norm_modulate(
            x, y, gate, None, scale, norm="rms", y_norm="rms", index=places(x)
        ),
        lambda n: (*torch.randn(2, n, 6, 8), *torch.randn(2, n, 3, 8)),
    ),
    "qk_norm_rope": (
        lambda q, k, u, v: sora_kernels.qk_norm_rope(q, k, q_weight=u, k_weight=v, grid=(3, 2, 2)),
        lambda n: (*heads(n)[:2], *torch.randn(2, 8)),
    ),
    "qk_norm_stats": (sora_kernels.qk_norm_stats, lambda n: heads(n)[:2]),
    "qk_norm_rope stats": (
        lambda q, k, s, u, v: sora_kernels.qk_norm_rope(
            q, k, q_weight=u, k_weight=v, across="width", stats=s, width=48, grid=(3, 5, 2), tokens=(7, 19)
        ),
        lambda n: (*heads(n)[:2], 1 + torch.rand(n, 24), *torch.randn(2, 16)),
    ),
    "patch_embed3d": (
        sora_kernels.patch_embed3d, lambda n: (torch.randn(n, 3, 2, 4, 4), torch.randn(5, 3, 1, 2, 2), torch.randn(5)),
    ),
    "unpatchify3d": (
        lambda x: sora_kernels.unpatchify3d(x, (2, 2, 2), (1, 2, 2), 3), lambda n: (torch.randn(n, 8, 12),),
    ),
    "final_layer": (
        lambda x, shift, scale, w, b: sora_kernels.final_layer(x, shift, scale, w, b, grid=(2, 2, 2), patch=(1, 2, 2)),
        lambda n: (torch.randn(n, 8, 6), *torch.randn(2, n, 6), torch.randn(12, 6), torch.randn(12)),
    ),
    "spacetime_attention": (sora_kernels.spacetime_attention, heads),
    "spacetime_attention windowed": (
        lambda q, k, v: sora_kernels.spacetime_attention(q, k, v, grid=(3, 2, 2), window=(2, 1, 2), causal="frame"),
        heads,
    ),
    "merge_attention": (
        lambda a, la, b, lb: sora_kernels.merge_attention((a, la), (b, lb))[0],
        lambda n: (*(t for _ in "ab" for t in (torch.randn(n, 6, 2, 8), torch.randn(n, 2, 6))),),
    ),
    "norm_silu": (sora_kernels.norm_silu, lambda n: (torch.randn(n, 4, 2, 3, 3), torch.randn(4))),
    "causal_conv3d": (
        sora_kernels.causal_conv3d,
        lambda n: (torch.randn(n, 4, 2, 3, 3), torch.randn(5, 4, 3, 3, 3), torch.randn(5)),
    ),
    "upsample_conv3d": (
        sora_kernels.upsample_conv3d,
        lambda n: (torch.randn(n, 4, 2, 3, 3), torch.randn(5, 4, 1, 3, 3), torch.randn(5)),
    ),
    "downsample_conv3d": (
        sora_kernels.downsample_conv3d,
        lambda n: (torch.randn(n, 4, 2, 4, 4), torch.randn(5, 4, 1, 3, 3), torch.randn(5)),
    ),
}  # fmt: skip
# No tensors, or no autograd. What gives integers is compiled in test_patchify_uint8 and test_watermark.
INTEGERS = {"video_to_uint8", "embed_watermark"}
NOT_OPS = {"Unavailable", "attention_plan", "attention_forward", "attention_backward", *INTEGERS}


def test_every_public_function_is_compiled_below():
    assert {name.split()[0] for name in CALLS} == set(sora_kernels.__all__) - NOT_OPS


def run(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(o.square().sum() for o in outputs).backward()
    return [*outputs, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", CALLS)
def test_activation_checkpointing_gives_the_same_gradients(name):
    """It unpacks each saved tensor a single time: a backward that asks for ctx.saved_tensors twice fails under it."""
    function, make = CALLS[name]
    tensors = make(2)
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, function, use_reentrant=False)
    for actual, expected in zip(run(checkpointed, tensors), run(function, tensors), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_that_wrap_others_get_destinations_of_their_own(name):
    """Two tensors in one give both results, and both gradients: each destination is made of an operand."""
    function, make = CALLS[name]
    apart = make(2), make(2)
    together = run(function, [TwoTensor(*pair) for pair in zip(*apart, strict=True)])
    for found, *expected in zip(together, *(run(function, tensors) for tensors in apart), strict=True):
        assert torch.equal(found.a, expected[0]) and torch.equal(found.b, expected[1])


def test_so_do_integers_that_are_given_or_made():
    videos, tile = (torch.rand(1, 3, 2, 4, 4) for _ in "ab"), torch.randn(3, 5)
    frames = [torch.randint(256, (1, 2, 9, 10, 3), dtype=torch.uint8) for _ in "ab"]
    for function, pair in ((sora_kernels.video_to_uint8, list(videos)),
                           (lambda frames: sora_kernels.embed_watermark(frames, tile), frames)):  # fmt: skip
        found = function(TwoTensor(*pair))
        assert torch.equal(found.a, function(pair[0])) and torch.equal(found.b, function(pair[1]))


@pytest.mark.parametrize("name", CALLS)
def test_on_meta_results_have_the_form_of_real_ones(name):
    """Shapes, strides and dtypes, of every gradient too."""
    function, make = CALLS[name]
    tensors = make(3)
    for found, real in zip(run(function, [t.to("meta") for t in tensors]), run(function, tensors), strict=True):
        assert (found.device.type, found.shape, found.stride()) == ("meta", real.shape, real.stride())
        assert found.dtype == real.dtype


TWICE = {  # functions of one tensor that stands for several arguments, and its shape
    "spacetime_attention": (lambda x: sora_kernels.spacetime_attention(x, x, x), (2, 6, 2, 8)),
    "qk_norm_rope": (lambda x: sora_kernels.qk_norm_rope(x, x, grid=(3, 1, 2)), (2, 6, 2, 8)),
    "norm_modulate": (lambda x: sora_kernels.norm_modulate(x, x, x), (2, 6, 8)),
    "gate_residual": (lambda x: sora_kernels.gate_residual(x, x, x), (2, 6, 8)),
    "gate_residual_norm_modulate": (
        lambda x: sora_kernels.gate_residual_norm_modulate(x, x, x, x, x), (2, 6, 8)
    ),
    "final_layer": (
        lambda x: sora_kernels.final_layer(x, x, x, x[0, :, :].mT @ x[0], grid=(3, 1, 2), patch=(1, 2, 2)), (2, 6, 8)
    ),
    "causal_conv3d": (
        lambda x: sora_kernels.causal_conv3d(x, x.new_ones(4, 4, 3, 3, 3), residual=x), (2, 4, 2, 3, 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
def test_one_tensor_for_several_arguments_compiles_whole(name):
    torch._dynamo.reset()
    function, shape = TWICE[name]
    x = torch.randn(shape)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, [x]), run(function, [x]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [{}, dict(window=(2, 1, 3)), dict(window=(2, 2, 2), causal="frame", sink=1),
                                  dict(window=[(2, 1, 3), (1, 2, 2)])])  # fmt: skip
def test_attention_of_any_length_compiles_once(rule):
    torch._dynamo.reset()

    def attend(q, k, v):
        return sora_kernels.spacetime_attention(q, k, v, **rule, **(dict(grid=(q.shape[1] // 6, 2, 3)) if rule else {}))

    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=graphs)
    for B, T in ((4, 5), (5, 7), (7, 11)):
        tensors = torch.randn(3, B, 6 * T, 2, 8)
        for actual, expected in zip(run(compiled, tensors), run(attend, tensors), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("name", CALLS)
def test_compiles_into_one_graph_with_dynamic_batch(name):
    """Forward and backward under fullgraph; a second batch size does not compile again; results stay the same."""
    torch._dynamo.reset()
    function, make = CALLS[name]
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    counts = []
    for n in (10, 11):  # no other size is 10: dimensions of one size would share a symbol
        tensors = make(n)
        for actual, expected in zip(run(compiled, tensors), run(function, tensors), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[1], "compiled again for another batch size"
