"""What torch.utils.flop_counter makes of attention: the pairs that are seen, whatever the implementation."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_attention import MODES, definition, make
from test_attention_heads import MODES as OF_HEADS
from test_attention_heads import definition as definition_of_heads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from sora_kernels import _library, spacetime_attention

IMPLS = ["reference", "cpu", "triton"]
ASK_A_NEW_PROCESS = """
import sys, torch, sora_kernels
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    sora_kernels.spacetime_attention(*torch.zeros(3, 1, 5, 2, 4))
assert counter.get_total_flops() == 4 * 5 * 5 * 2 * 4, counter.get_total_flops()
"""


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def backward(inputs, wanted="qkv", **settings):
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}
    out = spacetime_attention(**leaves, **settings)
    return lambda: torch.autograd.grad(out.sum(), [leaves[n] for n in wanted])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["cross", "window_text_end", "causal_window_sink_cache", "packed_window"])
def test_every_implementation_counts_the_pairs_that_are_seen(name, impl, require):
    require("spacetime_attention", impl, grad=True)
    inputs, mode = make(name, torch.float32)
    one = 2 * int(definition(name).sum()) * inputs["q"].shape[0] * 4 * 8
    assert count(lambda: spacetime_attention(**inputs, **mode, impl=impl)) == 2 * one
    assert count(backward(inputs, **mode, impl=impl)) == 5 * one
    if name == "cross":
        assert count(backward(inputs, "v", impl=impl)) == 2 * one
        assert count(backward(inputs, "q", impl=impl)) == 3 * one


@pytest.mark.parametrize("name", MODES)
def test_every_mode_without_running_it(name):
    with FakeTensorMode():
        inputs, mode = make(name, torch.float32)
        seen = count(lambda: spacetime_attention(**inputs, **mode))
    assert seen == 4 * int(definition(name).sum()) * inputs["q"].shape[0] * 4 * 8


@pytest.mark.parametrize("name", OF_HEADS)
def test_heads_with_rules_of_their_own(name):
    q_len, k_len, mode = OF_HEADS[name]
    q, k = torch.zeros(1, q_len, 4, 8), torch.zeros(1, k_len, 2, 8)
    assert count(lambda: spacetime_attention(q, k, k, **mode)) == 4 * 8 * int(definition_of_heads(name).sum())


def test_dense_attention_counts_as_that_of_pytorch():
    q, k, v = (torch.randn(2, n, 4, 8, requires_grad=True) for n in (6, 9, 9))

    def ours():
        spacetime_attention(q, k, v).sum().backward()

    def theirs():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # products of which each is counted
            F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).sum().backward()

    product = 2 * 2 * 4 * 8 * 6 * 9
    assert count(ours) == 7 * product, "the backward computes the scores once more"
    assert count(theirs) == 6 * product
    shapes = [t.transpose(1, 2).shape for t in (q, k, v)]
    assert count(ours) == sdpa_flop_count(*shapes) + sdpa_backward_flop_count(shapes[0], *shapes)


def test_padding_counts_and_is_not_looked_at():
    q = torch.zeros(2, 6, 1, 8)
    assert count(lambda: spacetime_attention(q, q, q, kv_lens=torch.tensor([3, 6]))) == 4 * 2 * 36 * 8


@pytest.mark.parametrize("mode", [{}, dict(window=(2, 1, 2), causal="frame")], ids=["dense", "window"])
def test_a_compiler_counts_with_open_sizes(mode):
    """It asks for the cost of an op whose sizes are symbols when it weighs what to compute again in the backward."""

    def attend(q):
        return spacetime_attention(q, q * 2, q * 3, **mode, **(dict(grid=(q.shape[1] // 4, 2, 2)) if mode else {}))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        for T in (3, 5):
            q = torch.randn(2, 4 * T, 2, 8, requires_grad=True)
            (ours,), (expected,) = (torch.autograd.grad(f(q).square().sum(), q) for f in (compiled, attend))
            torch.testing.assert_close(ours, expected)


def test_a_formula_of_symbols():
    """Dense attention stays one; a window is counted for the sizes that the compiler saw."""
    q, static, dynamic = torch.randn(2, 20, 2, 8), DimDynamic.STATIC, DimDynamic.DYNAMIC
    with FakeTensorMode(shape_env=ShapeEnv()) as fake:
        sizes = StatelessSymbolicContext([dynamic, dynamic, static, static])
        symbolic = fake.from_tensor(q, symbolic_context=sizes)
        T = symbolic.shape[1] // 4
        assert isinstance(T, torch.SymInt)
        dense = count(lambda: spacetime_attention(symbolic, symbolic, symbolic))
        formula = FlopCounterMode(display=False).flop_registry[torch.ops.sora_kernels._spacetime_attention_fwd_cpu]
        window = [T, 2, 2], [2, 1, 2], [1, 1, 1], [1, 1, 1], [1, 0, 0], 0, 0, False
        windowed = formula(symbolic, symbolic, symbolic, None, *window, 0.3, symbolic, None)
    assert int(dense) == 4 * 2 * 2 * 8 * 20 * 20
    assert int(windowed) == count(
        lambda: spacetime_attention(q, q, q, grid=(5, 2, 2), window=(2, 1, 2), causal="frame")
    )


def test_the_profiler_sees_the_op():
    q = torch.randn(1, 5, 2, 8)
    with torch.profiler.profile(with_flops=True) as profile:
        spacetime_attention(q, q, q, impl="reference")
    assert "sora_kernels::_spacetime_attention_fwd_reference" in {event.key for event in profile.key_averages()}


def test_the_counter_is_not_imported_for_it():
    """Importing it imports triton. What it has to know is handed over when somebody does."""
    subprocess.run([sys.executable, "-c", ASK_A_NEW_PROCESS], check=True)


def test_each_implementation_has_the_formula():
    registry = FlopCounterMode(display=False).flop_registry
    for op in ("spacetime_attention_fwd", "spacetime_attention_bwd"):
        assert all(_library.overload(op, impl)._overloadpacket in registry for impl in _library.impls(op))
