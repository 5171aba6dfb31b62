"""gate_heads: the formula, gradients, contract, in every implementation; LTX-2's own."""

from __future__ import annotations

import pytest
import torch

from sora_kernels import _dispatch, gate_heads, spacetime_attention
from sora_kernels._dispatch import Unavailable
from sora_kernels.testing import LAYOUTS, arrange, assert_matches_oracle, outputs_and_grads, poison_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
SIZES = [(2, 5, 3, 8), (1, 1, 1, 1), (1, 7, 2, 37), (2, 3, 5, 128)]


def op_samples() -> list[tuple[str, tuple]]:
    torch.manual_seed(0)
    x, gate = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3)
    empty = torch.empty_like
    return [
        ("gate_heads_fwd", (x, gate, 2.0, empty(x))),
        ("gate_heads_bwd", (x, x, gate, 2.0, empty(x), empty(gate))),
        ("gate_heads_bwd", (x, x, gate, 1.0, None, empty(gate))),
    ]


def formula(x, gate, scale=2.0):
    """What a model writes: everything in the dtypes it has."""
    return x * (scale * torch.sigmoid(gate)).unsqueeze(-1).to(x.dtype)


def make(size, dtype=torch.float32):
    torch.manual_seed(0)
    return dict(x=torch.randn(size).to(dtype), gate=3 * torch.randn(size[:3]).to(dtype))


@pytest.mark.parametrize("scale", [2.0, 1, -0.5])
def test_formula(scale):
    inputs = {name: t.double() for name, t in make(SIZES[0]).items()}
    torch.testing.assert_close(gate_heads(**inputs, scale=scale), formula(**inputs, scale=scale), rtol=1e-13, atol=0)


def test_gradcheck():
    x, gate = (t.double().requires_grad_() for t in make(SIZES[0]).values())
    assert torch.autograd.gradcheck(gate_heads, (x, gate), fast_mode=True)


@IMPLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_error_rule(size, dtype, impl, require):
    require("gate_heads", impl, dtype=dtype, grad=True)
    if impl == "triton" and dtype == torch.bfloat16 and _dispatch.INTERPRET:
        pytest.skip("the Triton interpreter computes bf16 on raw bits; bf16 is tested as compiled code")
    inputs = make(size, dtype)
    grads = [torch.randn_like(inputs["x"])]
    with poison_empty():
        ours = outputs_and_grads(lambda **kw: gate_heads(**kw, impl=impl), inputs, grads)
    oracle = outputs_and_grads(formula, {n: t.double() for n, t in inputs.items()}, [grads[0].double()])
    baseline = outputs_and_grads(formula, inputs, grads)
    for name, result in ours.items():
        assert_matches_oracle(result, oracle[name], baseline[name], name, size[3] if name == "grad gate" else 1)


@IMPLS
def test_gates_of_another_dtype_and_far_from_zero(impl, require):
    require("gate_heads", impl, grad=True)
    x, gate = torch.randn(1, 5, 1, 4).half(), torch.tensor([-200.0, -20, 0, 20, 200]).view(1, 5, 1).requires_grad_()
    out = gate_heads(x, gate, impl=impl)
    out.float().sum().backward()
    factor = 2 * gate.detach().double().sigmoid()
    torch.testing.assert_close(out.double(), x.double() * factor[..., None], rtol=1e-3, atol=1e-8)
    expected = x.double().sum(-1) * factor * (1 - factor / 2)
    torch.testing.assert_close(gate.grad.double(), expected, rtol=1e-5, atol=2e-6)


@IMPLS
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_memory_layout_does_not_change_a_bit(layout, impl, require):
    require("gate_heads", impl, grad=True)
    inputs = make(SIZES[2])
    arranged, dout = {n: arrange(t, layout) for n, t in inputs.items()}, arrange(torch.randn(SIZES[2]), layout)

    def run(inputs, dout):
        return outputs_and_grads(lambda **kw: gate_heads(**kw, impl=impl), inputs, [dout])

    ours, again = run(arranged, dout), run(arranged, dout)
    expected = run({n: t.clone().contiguous() for n, t in arranged.items()}, dout.contiguous())
    for name, result in ours.items():
        assert torch.equal(result, expected[name]) and torch.equal(result, again[name]), name


@IMPLS
def test_each_gradient_alone_equals_both(impl, require):
    require("gate_heads", impl, grad=True)
    inputs, dout = make(SIZES[0]), torch.randn(SIZES[0])
    both = outputs_and_grads(lambda **kw: gate_heads(**kw, impl=impl), inputs, [dout])
    for name in inputs:
        leaf = inputs[name].clone().requires_grad_()
        (alone,) = torch.autograd.grad(gate_heads(**{**inputs, name: leaf}, impl=impl), leaf, dout)
        assert torch.equal(alone, both[f"grad {name}"])


def test_ltx2_in_diffusers():
    """Its attention with a gate on each head, up to the last projection."""
    ltx = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")
    attention = ltx.LTX2Attention(24, heads=3, kv_heads=3, dim_head=8, apply_gated_attention=True)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 7, 24)
    with torch.no_grad():
        q, k, v = (f.unflatten(2, (3, 8)) for f in
                   (attention.norm_q(attention.to_q(x)), attention.norm_k(attention.to_k(x)), attention.to_v(x)))
        out = gate_heads(spacetime_attention(q, k, v), attention.to_gate_logits(x))
        torch.testing.assert_close(attention.to_out[0](out.flatten(2)), attention(x), rtol=1e-5, atol=1e-5)


x = torch.zeros(2, 5, 3, 8)
ERRORS = [
    (dict(x=x[0]), ValueError, "x must be .B, S, H, E.; got shape .5, 3, 8."),
    (dict(x=x.int()), TypeError, "x must be float32"),
    (dict(gate=None), TypeError, "gate must be a tensor"),
    (dict(gate=x[..., 0, 0]), ValueError, r"gate must have shape \[2, 5, 3\].*got \[2, 5\]"),
    (dict(gate=x[..., 0].int()), TypeError, "gate must be float32"),
    (dict(gate=x[..., 0].to("meta")), ValueError, "gate must be on x's device cpu; got meta"),
    (dict(scale="2"), TypeError, "scale must be a number; got str '2'"),
    (dict(impl="cuda"), Unavailable, "reference: usable"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[m for _, _, m in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error, match=message) as caught:
        gate_heads(**dict(x=x, gate=x[..., 0]) | change)
    assert "gate_heads" in str(caught.value)
