"""CUDA C++ of gate_residual, alone and fused, and of its gradients, as nvcc compiles it, executed without a GPU against
the fp64 oracle."""

from __future__ import annotations

import ptx
import pytest
import torch
from ptx import nvcc
from ptx.sweeps import in_turns

from sora_kernels import Unavailable, _dispatch, _library, gate_residual, gate_residual_norm_modulate
from sora_kernels.modulation import kernels
from sora_kernels.testing import assert_matches_oracle, outputs_and_grads

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


def gradients(function, tensors, douts, how, impl):
    return outputs_and_grads(lambda **t: function(**t, **how, impl=impl), tensors, douts)


def check_gradients(function, tensors, douts, how, schedules):
    with nvcc.nvcc_on(**schedules):
        actual = gradients(function, tensors, douts, how, "cuda")
    wide = {name: t.double() for name, t in tensors.items()}
    oracle = gradients(function, wide, [d if d is None else d.double() for d in douts], how, "reference")
    dtype, tokens = tensors["x"].dtype, tensors["x"].shape[0] * tensors["x"].shape[1]
    plain = gradients(function, {name: t.to(dtype) for name, t in tensors.items()}, douts, how, "reference")
    for name in oracle:
        assert_matches_oracle(actual[name], oracle[name], plain[name].to(actual[name].dtype), name, tokens)


def drawn(D, S, F, dtype, wanted=("gate", "shift", "scale")):
    tensors = {"x": torch.randn(2, S, D).to(dtype), "y": torch.randn(2, S, D).to(dtype) + 1}
    tensors |= {name: torch.randn(2, F, D).to(dtype) * 0.5 for name in wanted}
    return tensors | {f"{name}_table": torch.randn(D) * 0.5 for name in wanted}


# width, for rows of one warp, of up to four and of up to twelve; tokens of a clip, modulation rows, programs: chunks of
# a row with and without a rest, rows that a program has whole, one row a token
BACKWARD = [
    (264, 7, 1, 1, "layer", None), (1032, 4, 4, 3, "rms", "layer"), (2056, 3, 1, 2, "layer", "rms"),
]  # fmt: skip
SWEEP = [
    pytest.param(D, *way, *norms, dtype, marks=pytest.mark.slow)
    for D in (8, 512, 520, 1536, 3072, 4608)
    for way in ((9, 1, 4), (6, 3, 2), (4, 2, 8), (3, 3, 1))
    for norms in (("layer", "layer"), ("rms", "rms"), ("layer", None))
    for dtype in DTYPES
]


@pytest.mark.parametrize("D, S, F, programs, norm, y_norm, dtype", in_turns(BACKWARD, DTYPES) + SWEEP, ids=str)
def test_gradients_as_nvcc_compiles_them(D, S, F, programs, norm, y_norm, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    schedules = dict(sm=80 if norm == "rms" else 90, schedule=2, again=7)
    tensors = drawn(D, S, F, dtype) | dict(weight=torch.randn(D), bias=torch.randn(D))
    douts = [torch.randn(2, S, D).to(dtype) for _ in range(2)]
    check_gradients(gate_residual_norm_modulate, tensors, douts, dict(norm=norm, y_norm=y_norm), schedules)
    check_gradients(gate_residual, drawn(D, S, F, dtype, ["gate"]), douts[:1], dict(y_norm=y_norm), schedules)


@pytest.mark.parametrize("D, y_norm", [(5128, None), (6144, "layer")])
def test_gradients_of_the_widest_rows(D, y_norm):
    tensors, douts = drawn(D, 2, 1, torch.bfloat16), [torch.randn(2, 2, D).bfloat16() for _ in range(2)]
    check_gradients(gate_residual_norm_modulate, tensors, douts, dict(y_norm=y_norm), dict(sm=90, schedule=3, again=4))


@pytest.mark.parametrize("y_norm", [None, "rms"])
@pytest.mark.parametrize("used", [0, 1])
def test_gradients_where_one_result_is_used(used, y_norm):
    """Of an output that nothing depends on none arrives, and its rows get zeros."""
    tensors = drawn(136, 5, 5, torch.bfloat16)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    dout, found = torch.randn(2, 5, 136).bfloat16(), []
    with nvcc.nvcc_on(90, schedule=3, again=5):
        results = gate_residual_norm_modulate(**leaves, y_norm=y_norm, impl="cuda")
        actual = torch.autograd.grad(results[used], list(leaves.values()), dout)
    for dtype in (torch.float64, torch.bfloat16):
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
        results = gate_residual_norm_modulate(**leaves, y_norm=y_norm, impl="reference")
        grads = torch.autograd.grad(results[used], list(leaves.values()), dout.to(dtype), allow_unused=True)
        found.append([torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), grads, strict=True)])
    for name, result, oracle, plain in zip(tensors, actual, *found, strict=True):
        assert_matches_oracle(result, oracle, plain.to(result.dtype), name, 10)
        if used == 0 and name.startswith(("shift", "scale")):
            assert not result.any(), name


def test_each_byte_of_the_gradients_is_read_once_and_written_once(monkeypatch):
    """Partials included, and with a gradient of gate that is written where it belongs, without any."""
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    found = []
    for S, parts in ((6, 3), (1, 0)):
        x, y, gate, scale = (torch.randn(1, n, 1536).bfloat16() for n in (S, S, 1, 1))
        leaves = [t.requires_grad_() for t in (x, y, gate)]
        with nvcc.nvcc_on(90, lambda name, counters: found.append((name, counters))):
            x_new = gate_residual(*leaves, impl="cuda")
            pair = gate_residual_norm_modulate(*leaves, None, scale, impl="cuda")
            found.clear()
            torch.autograd.grad(x_new, leaves, torch.randn_like(x))
            torch.autograd.grad(pair, leaves, [torch.randn_like(x), torch.randn_like(x)])
        assert [name for name, _ in found] == (
            ["gate_residual_bwd_kernel", *["sum_partials_kernel"] * (parts > 0)]
            + ["modulation_bwd_kernel", *["sum_partials_kernel"] * (parts > 0)]
        )
        kernel, fused = (counters for name, counters in found if name != "sum_partials_kernel")
        row, partials = gate.nbytes, parts * gate.nbytes * 2 or gate.nbytes
        assert 32 * kernel.read == 2 * x.nbytes + row and 32 * kernel.written == x.nbytes + partials
        assert 32 * fused.read == 4 * x.nbytes + 2 * row and 32 * fused.written == 2 * x.nbytes + partials


def test_a_gradient_has_the_same_bits_whichever_others_are_wanted(monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    tensors, douts, found = drawn(512, 6, 3, torch.float32), torch.randn(2, 2, 6, 512).unbind(), {}
    for wanted in (tuple(tensors), ("x",), ("y",), ("gate", "scale_table"), ("gate_table", "shift")):
        leaves = [tensors[name].requires_grad_() for name in wanted]
        with nvcc.nvcc_on(90):
            results = gate_residual_norm_modulate(**tensors, y_norm="rms", impl="cuda")
            for name, grad in zip(wanted, torch.autograd.grad(results, leaves, douts), strict=True):
                assert torch.equal(grad, found.setdefault(name, grad)), (name, wanted)
        for leaf in leaves:
            leaf.requires_grad_(False)


def test_without_its_barrier_the_sums_of_rows_race(monkeypatch):
    text = nvcc.compiled("modulation_gate_backward", 90)
    planted = text.replace("bar.sync \t0;", "")
    assert planted != text
    monkeypatch.setattr(nvcc, "compiled", lambda name, sm: planted)
    y, dout = torch.randn(2, 1, 4, 1536).bfloat16().unbind()
    with pytest.raises(ptx.Fault) as found, nvcc.nvcc_on(90, schedule=4):
        _library.call("gate_residual_bwd", "cuda")(dout, y, *[None] * 3, False, 1e-6, torch.empty_like(y), None, None)
    assert found.value.kind in ("race", "uninitialised"), found.value


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
    (X.new_zeros(1, 1, 6152).requires_grad_(), dict(y_norm="rms"), "at most 6144 values of torch.bfloat16; got 6152"),
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
