"""rounding="host": the bits of a model that computes its modulation in 16 bits, operation by operation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sora_kernels import Unavailable, gate_residual, gate_residual_norm_modulate, norm_modulate
from sora_kernels.testing import outputs_and_grads

DTYPES = [torch.bfloat16, torch.float16]
B, S, F_, D = 2, 12, 3, 320


@pytest.fixture
def tensors():
    def draw(dtype, rows=None):
        rows = rows or dtype
        x, y = torch.randn(2, B, S, D).to(dtype)
        shift, scale, gate = torch.randn(3, B, F_, D).to(rows)
        return dict(x=x, y=y, gate=gate, shift=shift, scale=scale)

    return draw


def spread(row):
    return row.repeat_interleave(S // F_, 1)


def host(x, y, gate, shift, scale):
    """What a model of diffusers writes: PyTorch's own operations on tensors as they are."""
    x = (x + spread(gate) * y).to(x.dtype)
    return x, (F.layer_norm(x, [D]) * (1 + spread(scale)) + spread(shift)).to(x.dtype)


def differing(a, b):
    return (a != b).float().mean().item()


@pytest.mark.parametrize("rows", [None, torch.float32], ids=["rows of x's dtype", "fp32 rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_hosts_bits(dtype, rows, tensors):
    t = tensors(dtype, rows)
    x_new, out = gate_residual_norm_modulate(**t, eps=1e-5, rounding="host", impl="reference")
    their_x, theirs = host(**t)
    assert torch.equal(x_new, their_x)
    assert torch.equal(gate_residual(t["x"], t["y"], t["gate"], rounding="host", impl="reference"), their_x)
    assert differing(out, theirs) < 2e-3, "but for statistics summed in another order"
    alone = norm_modulate(their_x, t["shift"], t["scale"], eps=1e-5, rounding="host", impl="reference")
    assert torch.equal(alone, out)
    once = gate_residual_norm_modulate(**t, eps=1e-5, impl="reference")
    assert differing(once[1], theirs) > 0.1


def test_a_table_in_fp32_widens_what_follows_it(tensors):
    t, table = tensors(torch.bfloat16), torch.randn(D)
    out = norm_modulate(t["x"], t["shift"], t["scale"], scale_table=table, eps=1e-5, rounding="host", impl="reference")
    theirs = F.layer_norm(t["x"], [D]) * (1 + (spread(t["scale"]) + table)) + spread(t["shift"])
    assert theirs.dtype == torch.float32 and differing(out, theirs.bfloat16()) < 2e-3


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_triton_rounds_where_the_reference_does(norm, tensors, require):
    require("gate_residual_norm_modulate", "triton", dtype=torch.float16, grad=True)
    t = tensors(torch.float16)
    ours, reference = (
        gate_residual_norm_modulate(**t, norm=norm, rounding="host", impl=impl) for impl in ("triton", "reference")
    )
    assert torch.equal(ours[0], reference[0]) and differing(ours[1], reference[1]) < 2e-3
    gated = gate_residual(t["x"], t["y"], t["gate"], rounding="host", impl="triton")
    assert torch.equal(gated, ours[0])
    modulated = norm_modulate(gated, t["shift"], t["scale"], norm=norm, rounding="host", impl="triton")
    assert torch.equal(modulated, ours[1])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_gradients_do_not_depend_on_it(impl, tensors, require):
    require("norm_modulate", impl, dtype=torch.float16, grad=True)
    t = {name: v for name, v in tensors(torch.float16).items() if name in ("x", "shift", "scale")}
    grads = [torch.randn(B, S, D).half()]
    once, host = (
        outputs_and_grads(lambda r=r, **kw: norm_modulate(**kw, rounding=r, impl=impl), t, grads)
        for r in ("once", "host")
    )
    assert not torch.equal(once["output0"], host["output0"])
    assert all(torch.equal(once[name], host[name]) for name in once if name.startswith("grad"))


def test_in_fp32_there_is_one_rounding_and_every_implementation_takes_it(tensors, require):
    require("norm_modulate", "cpu")
    t = tensors(torch.float32)
    results = [norm_modulate(t["x"], t["shift"], t["scale"], rounding=r, impl="cpu") for r in ("once", "host")]
    assert torch.equal(*results)


def test_an_implementation_that_rounds_once_says_so(tensors, require):
    require("norm_modulate", "cpu")
    t = tensors(torch.bfloat16)
    with pytest.raises(Unavailable, match="cpu rounds once, at the store"):
        norm_modulate(t["x"], t["shift"], t["scale"], rounding="host", impl="cpu")
    auto, reference = (gate_residual(t["x"], t["y"], t["gate"], rounding="host", impl=i) for i in ("auto", "reference"))
    assert torch.equal(auto, reference)
    with pytest.raises(ValueError, match="rounding must be one of 'once', 'host'; got 'twice'"):
        gate_residual(t["x"], t["y"], t["gate"], rounding="twice")
