"""CUDA C++ of gate_residual, alone and fused, as nvcc compiles it, executed without a GPU against the fp64 oracle."""

from __future__ import annotations

import pytest
import torch
from ptx import nvcc
from ptx.sweeps import in_turns

from sora_kernels import Unavailable, _dispatch, gate_residual, gate_residual_norm_modulate
from sora_kernels.testing import assert_matches_oracle

if not nvcc.find():
    pytest.skip("nvcc is not installed", allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def double(t):
    return t.double() if isinstance(t, torch.Tensor) else t


def check(function, x, y, how, schedules, **rows):
    with nvcc.nvcc_on(**schedules):
        actual = function(x, y, **rows, **how, impl="cuda")
    oracle = function(x.double(), y.double(), **{k: double(t) for k, t in rows.items()}, **how, impl="reference")
    plain = function(x, y, **rows, **how, impl="reference")
    found = [r if isinstance(r, tuple) else (r,) for r in (actual, oracle, plain)]
    for name, *results in zip(("x_new", "out"), *found, strict=False):
        assert_matches_oracle(*results, name)


# width -> rows of a warp, of four and of sixteen; the last vectors of some threads beyond the row
@pytest.mark.parametrize(
    "D, y_norm, dtype", in_turns([40, 520, 1536, 2048, 6136, 8192], ["rms", None, "layer"], DTYPES), ids=str
)
def test_gate_residual_as_nvcc_compiles_it(D, y_norm, dtype):
    B, S = 2, 3 if D > 520 else 9
    x, y, gate = torch.randn(B, S, D).to(dtype), torch.randn(B, S, D).to(dtype) + 3, torch.randn(B, S, D).to(dtype)
    schedules = dict(sm=80 if y_norm == "rms" else 90, schedule=2, again=5)
    check(gate_residual, x, y, dict(y_norm=y_norm), schedules, gate=gate, gate_table=torch.randn(D))
    norm, F = "layer" if y_norm == "rms" else "rms", 1 if y_norm else 3
    rows = dict(gate=torch.randn(B, F, D).to(dtype), shift=torch.randn(B, D), scale=torch.randn(D).to(dtype))
    vectors = {name: torch.randn(D) for name in ("weight", "bias", "shift_table", "scale_table")}
    check(gate_residual_norm_modulate, x, y, dict(norm=norm, y_norm=y_norm), schedules, **rows, **vectors)


def test_each_byte_is_read_once_and_written_once():
    x, y, gate, scale = (torch.randn(1, S, 1536).bfloat16() for S in (8, 8, 1, 1))
    found = []
    with nvcc.nvcc_on(90, lambda name, counters: found.append(counters)):
        gate_residual(x, y, gate, impl="cuda")
        gate_residual_norm_modulate(x, y, gate, None, scale, impl="cuda")
    for counters, results, rows in zip(found, (1, 2), (1, 2), strict=True):
        assert counters.written == results * x.nbytes // 32
        assert counters.read == (2 * x.nbytes + rows * gate.nbytes) // 32


def test_without_a_gate_over_y_itself_and_with_absent_rows():
    x, y = torch.randn(2, 2, 5, 64).bfloat16()
    expected = gate_residual(x, y, None, impl="reference")
    with nvcc.nvcc_on(90, schedule=3):
        assert torch.equal(gate_residual(x, y, None, impl="cuda"), expected)
        over, out = y.clone(), torch.empty_like(x)
        gate_residual_norm_modulate(x, over, None, None, None, out=(over, out), impl="cuda")
    assert torch.equal(over, expected)
    reference = gate_residual_norm_modulate(x.double(), y.double(), None, None, None, impl="reference")[1]
    assert_matches_oracle(out, reference, gate_residual_norm_modulate(x, y, None, None, None, impl="reference")[1])


def test_the_norm_sees_what_was_stored():
    """x_new is rounded first: the result is that of the two functions one after the other."""
    x, y, gate = torch.randn(1, 4, 256).half() * 30, torch.randn(1, 4, 256).half(), torch.randn(256).half()
    with nvcc.nvcc_on(90):
        x_new, out = gate_residual_norm_modulate(x, y, gate, None, None, impl="cuda")
        again = gate_residual(x, y, gate, impl="cuda")
        zero = gate_residual_norm_modulate(x_new, torch.zeros_like(y), None, None, None, impl="cuda")
    assert torch.equal(x_new, again) and torch.equal(out, zero[1])


def test_views_of_one_projection_are_read_where_they_lie():
    x, y = torch.randn(2, 4, 2 * 64)[:, :, 64:].bfloat16(), torch.randn(4, 2, 64).bfloat16().transpose(0, 1)
    gate, shift, scale = torch.randn(2, 3 * 64).bfloat16().chunk(3, -1)
    how = dict(sm=80, schedule=4, again=9)
    check(gate_residual_norm_modulate, x, y, {}, how, gate=gate, shift=shift, scale=scale)


X = torch.zeros(1, 2, 64).bfloat16()
REFUSED = [
    (X[:, :, :12], {}, "rows of whole 16 bytes and of at most 16384 values; got 12"),
    (X.new_zeros(1, 1, 16392), {}, "of at most 16384 values; got 16392"),
    (X[:, :, 4:36], {}, r"begin at multiples of 8 elements; got x with strides \(128, 64, 1\) and offset 4"),
    (X, dict(out=torch.zeros(1, 2, 68).bfloat16()[:, :, :64]), "multiples of 8 elements; got out with strides"),
    (X, dict(index=torch.zeros(1, 2, dtype=torch.long), gate=torch.zeros(3, 64)), "cuda takes no index"),
    (X, dict(rounding="host"), "cuda rounds once, at the store"),
    (X.clone().requires_grad_(), {}, "gate_residual is forward-only in cuda"),
]  # fmt: skip


@pytest.mark.parametrize("x, how, message", REFUSED, ids=[m for *_, m in REFUSED])
def test_what_the_kernel_does_not_take_is_unavailable_with_the_reason(x, how, message):
    how = dict(gate=torch.zeros(x.shape[2]).bfloat16()) | how
    with nvcc.nvcc_on(90), pytest.raises(Unavailable, match=message):
        gate_residual(x, torch.zeros_like(x), **how, impl="cuda")


@pytest.mark.parametrize("op", ["gate_residual", "gate_residual_norm_modulate"])
def test_auto_does_not_choose_what_was_never_run(op):
    with nvcc.nvcc_on(90):
        assert "cuda" not in _dispatch._able.__wrapped__(op, "cpu", torch.bfloat16, False)
