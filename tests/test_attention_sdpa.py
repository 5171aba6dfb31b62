"""Attention by PyTorch's own flash kernel: numbers, which calls it takes, and when "auto" leaves them to it."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_attention import explicit

from sora_kernels import Unavailable, _dispatch, _library, attention_backward, attention_forward, spacetime_attention
from sora_kernels.attention import config, kernels_sdpa
from sora_kernels.testing import assert_matches_oracle, outputs_and_grads, poison_empty

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(device="cpu", dtype=torch.float32, Sq=33, Sk=70, H=3, E=24):
    shapes = dict(q=(2, Sq, H, E), k=(2, Sk, H, E), v=(2, Sk, H, E))
    return {name: torch.randn(shape, device=device).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [dict(), dict(Sq=130, Sk=3), dict(Sq=1, Sk=5), dict(E=64)], ids=str)
def test_error_rule_of_the_output_the_lse_and_every_gradient(dtype, device, sizes):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("on a GPU PyTorch's flash kernel takes 16 bits only")
    inputs = make(device, dtype, **sizes)
    B, Sq, H, _ = inputs["q"].shape
    grads = [torch.randn_like(inputs["q"]), torch.randn(B, H, Sq, device=device)]
    scale = 0.3

    def ours(**tensors):
        return spacetime_attention(**tensors, scale=scale, return_lse=True, impl="sdpa")

    def formula(**tensors):
        return explicit(**tensors, scale=scale)

    with poison_empty():
        results = outputs_and_grads(ours, inputs, grads)
    double = {name: t.double() for name, t in inputs.items()}
    oracle = outputs_and_grads(formula, double, [g.double() for g in grads])
    baseline = outputs_and_grads(formula, inputs, [grads[0], grads[1].to(dtype)])
    baseline["output1"] = baseline["output1"].float()
    for name, result in results.items():  # sums over keys or over queries, of products that are sums over the head
        terms = max(inputs["q" if name in ("grad k", "grad v") else "k"].shape[1], inputs["q"].shape[3])
        assert_matches_oracle(result, oracle[name], baseline[name], name, terms)
    again = outputs_and_grads(ours, inputs, grads)
    assert all(torch.equal(again[name], results[name]) for name in results), "two runs agree bit for bit"


@pytest.mark.parametrize("device", DEVICES)
def test_operands_that_are_slices_and_expanded_are_read_as_they_are(device):
    inputs = make(device, torch.bfloat16, Sq=9, Sk=9, H=2, E=8)
    packed = torch.stack(list(inputs.values()), 3).flatten(2, 3)  # heads of q, k, v in turns
    offset = torch.cat([packed.flatten().new_full((1,), float("nan")), packed.flatten()])[1:].view(packed.shape)
    views = dict(zip("qkv", (offset[:, :, i::3] for i in range(3)), strict=True))
    dout = torch.randn(1, 1, 2, 8, device=device).bfloat16().expand(2, 9, 2, 8)

    def ours(**tensors):
        return spacetime_attention(**tensors, impl="sdpa")

    results, expected = (outputs_and_grads(ours, tensors, [dout.clone()]) for tensors in (views, inputs))
    strided = outputs_and_grads(ours, views, [dout])
    for name in expected:
        assert torch.equal(results[name], expected[name]) and torch.equal(strided[name], expected[name]), name


def not_numbers(t: torch.Tensor) -> torch.Tensor:
    """0 for a number, 1 for NaN, 2 and 3 for the infinities."""
    return t.isnan() + 2 * t.isposinf() + 3 * t.isneginf()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e30"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    "impl, Sq, keys", [("sdpa", 3, (1, 3, 15, 16, 33)), ("cpu", 1 << 16, (4,)), ("cpu", 1 << 13, (33,))]
)
def test_what_is_no_number_reaches_what_it_reaches_in_the_reference(impl, Sq, keys, name, value, require):
    """Wherever it stands; with few keys PyTorch's kernel on a CPU would give 0. 1e30 overflows in the scores only."""
    require("spacetime_attention", impl)
    for dtype, Sk in itertools.product(DTYPES if impl == "sdpa" and value != "1e30" else DTYPES[:1], keys):
        inputs = make(dtype=dtype, Sq=Sq, Sk=Sk, H=1, E=8)
        tokens = inputs[name].shape[1]
        for token in range(tokens) if Sq == 3 else (0, tokens // 2, tokens - 1):
            drawn = {n: t.clone() for n, t in inputs.items()}
            drawn[name][1, token, 0, token % 8] = float(value)
            if value == "1e30" and name != "v":
                drawn["k" if name == "q" else "q"][1, -1, 0, token % 8] = float(value)
            pairs = zip(
                *(spacetime_attention(**drawn, return_lse=True, impl=i) for i in (impl, "reference")), strict=True
            )
            for got, want in pairs:
                assert torch.equal(not_numbers(got), not_numbers(want)), f"{dtype}, {Sk} keys, token {token}"
                numbers = want.isfinite()
                torch.testing.assert_close(got[numbers], want[numbers], rtol=2e-2, atol=2e-2)


def test_the_halves_for_schedules_of_ones_own():
    inputs = make()
    dout = torch.randn_like(inputs["q"])
    out, lse = attention_forward(**inputs, impl="sdpa")
    grads = attention_backward(dout, **inputs, out=out, lse=lse, deterministic=False, impl="sdpa")
    expected = outputs_and_grads(lambda **t: explicit(**t)[0], inputs, [dout])
    for name, grad in zip("qkv", grads, strict=True):
        torch.testing.assert_close(grad, expected[f"grad {name}"])


REFUSED = {
    "without kv_lens, window, causal": dict(kv_lens=torch.tensor([3, 4])),
    "without kv_lens, window": dict(grid=(3, 1, 2), causal="frame"),
    "scale above 0; got -0.5": dict(scale=-0.5),
    "scale above 0; got 0": dict(scale=0),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_take_is_said(reason):
    with pytest.raises(Unavailable, match=reason):
        spacetime_attention(**make(Sq=6, Sk=6), **REFUSED[reason], impl="sdpa")


def test_heads_and_sizes_it_does_not_take_are_said():
    inputs = make(H=4)
    with pytest.raises(Unavailable, match="as many key heads as query heads; got 2 and 4"):
        spacetime_attention(inputs["q"], inputs["k"][:, :, :2], inputs["v"][:, :, :2], impl="sdpa")
    with pytest.raises(Unavailable, match="no empty tensors"):
        spacetime_attention(**make(Sk=0), impl="sdpa")
    with pytest.raises(Unavailable, match="heads of up to 256; got 264"):
        spacetime_attention(**make(E=264), impl="sdpa")


# What "auto" takes on a GPU, which is only pretended


@pytest.fixture
def chosen(monkeypatch):
    """The implementation that "auto" takes for these arguments on a GPU of sm_90."""
    monkeypatch.setattr(_dispatch, "_why_not", lambda op, impl, *_: "not on a GPU" if impl == "cpu" else None)
    monkeypatch.setattr(_dispatch, "_able", _dispatch._able.__wrapped__)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(config, "capability", lambda device: 90)

    def choose(dtype=torch.bfloat16, rule=None, **sizes):
        seen = []
        with torch._subclasses.FakeTensorMode(), monkeypatch.context() as patch:
            patch.setattr(_library, "call", lambda op, impl: lambda *_: seen.append(impl))
            spacetime_attention(**make("cuda", dtype, **sizes), **(rule or {}))
        return seen.pop()

    return choose


def test_auto_leaves_dense_16_bits_to_pytorch_and_takes_triton_for_the_rest(chosen):
    for dtype in (torch.bfloat16, torch.float16):
        assert chosen(dtype) == "sdpa_or_next"
    assert chosen(Sq=12, Sk=12, rule=dict(grid=(2, 2, 3))) == "sdpa_or_next", "a grid alone hides nothing"
    assert chosen(torch.float32) == "triton_or_next"
    assert chosen(E=20) == "triton_or_next"
    assert chosen(rule=dict(scale=-1.0)) == "triton_or_next"
    assert chosen(Sq=12, Sk=12, rule=dict(grid=(2, 2, 3), window=(1, 2, 2))) == "triton_or_next"
    assert chosen(Sk=70, E=512) == "reference"


def test_auto_takes_triton_where_it_was_measured_faster(chosen, monkeypatch):
    monkeypatch.setattr(config, "TRITON_FASTER", {90: frozenset({64})})
    assert chosen(E=64) == "triton_or_next" and chosen(E=128) == "sdpa_or_next"
    monkeypatch.setattr(config, "TRITON_FASTER", {100: frozenset({64})})
    assert chosen(E=64) == "sdpa_or_next", "another GPU's figures"


def test_a_fixed_order_is_asked_of_pytorch_for_one_call_only():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with kernels_sdpa._fixed_order(True):
        assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(KeyError), kernels_sdpa._fixed_order(True):
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fill
    with kernels_sdpa._fixed_order(False):
        assert not torch.are_deterministic_algorithms_enabled()
