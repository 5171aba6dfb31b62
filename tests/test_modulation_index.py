"""Rows chosen by an index: token s of clip b has row index[b, s] of shift, scale and gate, written out nowhere."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_modulation import ARGUMENTS, FUNCTIONS, MODULATIONS, plain, with_norm

from sora_kernels import (
    Unavailable,
    _dispatch,
    _library,
    gate_residual,
    gate_residual_norm_modulate,
    norm_modulate,
)
from sora_kernels.modulation import reference
from sora_kernels.testing import assert_matches_oracle, outputs_and_grads, poison_empty

IMPLS = ("reference", "cpu", "triton")
EACH = pytest.mark.parametrize("impl", IMPLS)


def draw(function, B, S, D, R, dtype=torch.float32, rows=None, shared=(), drop=()):
    """Arguments of `function` with rows `[B, R, D]` in the dtype `rows`, or, for those in `shared`, `[R, D]`."""
    tensors = {}
    for name in ARGUMENTS[function]:
        kind = dtype if name in ("x", "y") else torch.float32 if name.endswith("table") else rows or dtype
        row = (R, D) if name in shared else (B, R, D)
        shape = (B, S, D) if name in ("x", "y") else row if name in MODULATIONS else (D,)
        tensors[name] = None if name in drop else torch.randn(shape).to(kind)
    return tensors


def orders(B, S, R):
    """Index tensors as models have them, and worse: none of a row's tokens beside each other, rows without any."""
    S3 = S // 3
    parts = torch.arange(S).div(max(S3, 1), rounding_mode="floor").clamp(max=R - 1)
    return {
        "in parts": parts.expand(B, S),
        "drawn": torch.randint(R, (B, S)),
        "one row": torch.full((B, S), R - 1, dtype=torch.int32),
        "backwards": torch.arange(B * S).view(B, S).flip(1).remainder(R).int(),
    }


def written_out(tensors, index):
    """The same call with a row for each token."""
    B, S = index.shape
    out = dict(tensors)
    for name in MODULATIONS:
        if (t := tensors.get(name)) is not None and t.ndim > 1:
            out[name] = t.expand(B, *t.shape[-2:])[torch.arange(B)[:, None], index.long()]
    return out


def check(function, impl, tensors, index, norm):
    """The error rule on outputs and gradients, against the oracle and plain PyTorch with rows written out per token."""
    grads = [torch.randn_like(tensors["x"]) for _ in range(2)][: 2 if function is gate_residual_norm_modulate else 1]
    with poison_empty():
        run = partial(with_norm(function, norm), impl=impl, index=index)
        actual = outputs_and_grads(run, tensors, grads)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    exact, eager = with_norm(getattr(reference, function.__name__), norm), None if function is gate_residual else norm
    oracle = outputs_and_grads(lambda **t: exact(**written_out(t, index)), wide, [g.double() for g in grads])
    baseline = outputs_and_grads(lambda **t: plain(eager, **written_out(t, index)), tensors, grads)
    assert actual.keys() == oracle.keys()
    for name, value in actual.items():
        terms = index.numel() if name.startswith("grad") and name not in ("grad x", "grad y") else 1
        assert_matches_oracle(value, oracle[name], baseline[name].to(value.dtype), name, terms)
    return actual


CASES = [  # B, S, D, R, norm, shared by clips, absent
    (2, 12, 64, 3, "layer", (), ("weight", "bias", "gate_table", "shift_table", "scale_table")),
    (2, 11, 33, 4, "rms", ("shift", "scale", "gate"), ("bias",)),
    (1, 70, 130, 2, "layer", ("scale",), ()),
    (3, 5, 24, 9, "rms", (), ("shift",)),
    (2, 6, 17, 1, "layer", ("gate",), ("scale", "weight")),
]


@FUNCTIONS
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@EACH
def test_outputs_and_gradients_match_rows_written_out(function, impl, dtype, case, require):
    require(function.__name__, impl, dtype=dtype, grad=True)
    if impl == "triton" and dtype == torch.bfloat16 and _dispatch.INTERPRET:
        pytest.skip("the Triton interpreter computes bf16 on raw bits; bf16 is tested as compiled code")
    B, S, D, R, norm, shared, absent = case
    for i, index in enumerate(orders(B, S, R).values()):
        if impl == "triton" and i != (S + D) % 4:
            continue  # each in some case
        check(function, impl, draw(function, B, S, D, R, dtype, None, shared, absent), index, norm)


@FUNCTIONS
@EACH
def test_rows_of_another_dtype_and_one_row_for_all_tokens(function, impl, require):
    require(function.__name__, impl, dtype=torch.float16, grad=True)
    tensors = draw(function, 2, 9, 40, 3, torch.float16, torch.float32, drop=("weight",))
    index = torch.randint(3, (2, 9))
    check(function, impl, tensors, index, "layer")
    if function is not gate_residual:
        check(function, impl, tensors | {"shift": torch.randn(40)}, index, "layer")


@FUNCTIONS
@pytest.mark.parametrize("order", orders(1, 9, 2))
def test_cpu_sums_of_rows_that_lie_in_several_chunks(function, order, require):
    """Chunks are of 16 tokens here: rows with tokens in one, in two, in all of them, and with none."""
    require(function.__name__, "cpu", grad=True)
    for S, R in ((70, 2), (300, 5), (100, 130)):
        check(function, "cpu", draw(function, 2, S, 19, R), orders(2, S, R)[order], "layer")


@FUNCTIONS
def test_triton_sums_of_rows_that_lie_in_several_chunks(function, require, monkeypatch):
    require(function.__name__, "triton", grad=True)
    from sora_kernels.modulation import kernels

    for programs, S, R in ((3, 24, 2), (7, 30, 40), (5, 21, 3)):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        check(function, "triton", draw(function, 2, S, 600, R), orders(2, S, R)["drawn"], "layer")


@FUNCTIONS
@EACH
def test_one_row_per_frame_gives_what_frames_give(function, impl, require):
    """Up to the order of sums over tokens."""
    require(function.__name__, impl, grad=True)
    tensors = draw(function, 2, 12, 40, 4)
    index = torch.arange(4, dtype=torch.int32).repeat_interleave(3).expand(2, 12)
    grads = [torch.randn(2, 12, 40) for _ in range(2)]
    by_frame, by_index = (
        outputs_and_grads(partial(function, impl=impl, **how), tensors, grads) for how in ({}, dict(index=index))
    )
    for name, value in by_frame.items():
        if name.startswith("output") or name in ("grad x", "grad y"):
            assert torch.equal(value, by_index[name]), name
        else:
            torch.testing.assert_close(by_index[name], value, rtol=1e-5, atol=1e-5)


@FUNCTIONS
@EACH
def test_gradients_are_the_same_bits_at_each_run_for_any_threads_and_integers(function, impl, require):
    require(function.__name__, impl, grad=True)
    S = 260 if impl == "cpu" else 24
    tensors, grads = draw(function, 2, S, 24, 3), [torch.randn(2, S, 24) for _ in range(2)]
    index = torch.randint(3, (2, S))
    wide = index.new_full((2, 2 * S), -1)
    wide[:, ::2] = index  # strided
    threads, results = torch.get_num_threads(), []
    for given, count in ((index, threads), (index, 1), (index.int(), 3), (wide[:, ::2], threads)):
        torch.set_num_threads(count)
        results.append(outputs_and_grads(partial(function, impl=impl, index=given), tensors, grads))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@FUNCTIONS
@EACH
def test_each_gradient_alone_equals_the_one_computed_with_all_others(function, impl, require):
    require(function.__name__, impl, grad=True)
    tensors, index = draw(function, 2, 20, 24, 3), torch.randint(3, (2, 20))
    grads = [torch.randn(2, 20, 24) for _ in range(2)]
    together = outputs_and_grads(partial(function, impl=impl, index=index), tensors, grads)
    for name in tensors:
        leaf = tensors[name].clone().requires_grad_()
        outputs = function(**{**tensors, name: leaf}, impl=impl, index=index)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        (alone,) = torch.autograd.grad(outputs, [leaf], grads[: len(outputs)])
        assert torch.equal(alone, together[f"grad {name}"]), name


@FUNCTIONS
def test_reference_passes_gradcheck(function):
    tensors = {n: t.double().requires_grad_() for n, t in draw(function, 2, 6, 5, 3, shared=("scale",)).items()}
    run = partial(getattr(reference, function.__name__), index=torch.tensor([[0, 2, 2, 0, 0, 2], [1, 0, 1, 2, 2, 0]]))
    assert torch.autograd.gradcheck(lambda *args: run(**dict(zip(tensors, args, strict=True))), tuple(tensors.values()))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_token_beyond_the_rows_has_rows_of_zeros(impl, require):
    """Where the values of an index are not looked at: such tokens have gradients, and rows none from them."""
    require("gate_residual_norm_modulate", impl, grad=True)
    B, S, D, R = 2, 7, 24, 3
    x, y, dx_new, dout = torch.randn(4, B, S, D)
    gate, shift, scale = torch.randn(3, B, R, D)
    tables, nothing = torch.randn(3, D), [None] * 2
    index = torch.tensor([[0, 3, 1, -1, 2, 2, 0], [1, 1, 2**31 - 1, 0, -(2**31), 5, 2]], dtype=torch.int32)
    known = (index >= 0) & (index < R)
    padded = [torch.cat([t, torch.zeros(B, 1, D)], 1) for t in (gate, shift, scale)]
    inside = index.where(known, R)

    def run(impl, gate, shift, scale, index):
        forward, backward = (_library.call(f"gate_residual_norm_modulate_{way}", impl) for way in ("fwd", "bwd"))
        outputs, rule = [torch.empty(B, S, D) for _ in range(2)], (False, None, 1e-6)
        forward(x, y, gate, shift, scale, *nothing, *tables, index, *rule, 0, *outputs)
        grads = [torch.empty_like(t) for t in (x, y, gate, shift, scale)]
        tables_in = tables[0], tables[2]
        of_tables = [torch.empty(D) for _ in range(3)]
        of_all = *grads, *nothing, *of_tables
        backward(dx_new, dout, outputs[0], y, gate, scale, *nothing, *tables_in, index, *rule, *of_all)
        return *outputs, *grads, *of_tables

    with poison_empty():
        actual = run(impl, gate, shift, scale, index)
        expected = run("reference", *padded, inside)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e[:, :R] if e.shape == (B, R + 1, D) else e, rtol=1e-4, atol=1e-4)


def test_cpu_kernels_read_no_row_beyond_those_there_are(require):
    """Where the public function has not looked: in a compiled graph."""
    require("norm_modulate", "cpu")
    x, scale = torch.randn(1, 3, 8), torch.randn(1, 2, 8)
    for row in (2, -1):
        index = torch.tensor([[0, 1, row]])
        run = torch.compile(lambda x, s, i: norm_modulate(x, None, s, index=i), backend="aot_eager", fullgraph=True)
        with pytest.raises(RuntimeError, match=rf"index: expected rows of 0 to 1, got {row} at \(0, 2\)"):
            run(x, scale, index)


X, ROWS, INDEX = torch.zeros(2, 6, 8), torch.zeros(3, 8), torch.zeros(2, 6, dtype=torch.int64)
BAD = {
    "beyond the rows": (dict(index=INDEX + 3), ValueError, "index must lie between 0 and R-1=2; got 3 to 3"),
    "below zero": (dict(index=INDEX - 1), ValueError, "index must lie between 0 and R-1=2; got -1 to -1"),
    "of floats": (dict(index=INDEX.float()), TypeError, r"index must be an int32 or int64 tensor \[B, S\]; got tor"),
    "of bytes": (dict(index=INDEX.byte()), TypeError, "index must be an int32 or int64 tensor.*got torch.uint8"),
    "a list": (dict(index=[0, 1]), TypeError, "index must be an int32 or int64 tensor.*got list"),
    "of one clip": (dict(index=INDEX[0]), ValueError, r"index must be \[B, S\] = \[2, 6\].*got \[6\]; .*expanded"),
    "too short": (dict(index=INDEX[:, :5]), ValueError, r"index must be \[B, S\] = \[2, 6\].*got \[2, 5\]"),
    "elsewhere": (dict(index=INDEX.to("meta")), ValueError, "index must be on x's device cpu; got meta"),
    "among no rows": (dict(scale=None), ValueError, "index must choose among rows .* of shift, scale; got none"),
    "among one": (dict(scale=ROWS[0]), ValueError, "index must choose among rows .* of shift, scale; got none"),
    "rows of no width": (dict(scale=ROWS[:, :7]), ValueError, r"scale must be \[D\], \[R, D\].*D=8.*got \[3, 7\]"),
    "no rows": (dict(scale=ROWS[:0]), ValueError, r"scale must be .* R ≥ 1 .*got \[0, 8\]"),
    "two counts": (dict(shift=ROWS[:2]), ValueError, r"scale must be .* one R ≥ 1 for all rows, here 2; got \[3, 8\]"),
    "another batch": (dict(scale=ROWS.expand(3, 3, 8)), ValueError, r"scale must be .*B=2.*got \[3, 3, 8\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_numbers(case):
    given, error, message = BAD[case]
    with pytest.raises(error, match=f"norm_modulate: {message}"):
        norm_modulate(**(dict(x=X, shift=None, scale=ROWS, index=INDEX) | given))


def test_cuda_says_that_it_takes_no_index():
    with pytest.raises(Unavailable, match="cuda"):
        norm_modulate(X, None, ROWS, index=INDEX, impl="cuda")


def test_an_index_without_values_is_not_looked_at():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, rows, index = torch.empty(2, 6, 8), torch.empty(3, 8), torch.zeros(2, 6, dtype=torch.int32)
        assert gate_residual(x, x, rows, index=index).shape == x.shape
    meta = X.to("meta")
    assert norm_modulate(meta, None, ROWS.to("meta"), index=INDEX.to("meta"), impl="reference").shape == X.shape


def test_an_index_may_differ_from_sample_to_sample_of_vmap():
    x, rows, index = torch.randn(3, 2, 6, 8), torch.randn(4, 8), torch.randint(4, (3, 2, 6))
    actual = torch.vmap(lambda x, i: norm_modulate(x, rows, None, index=i))(x, index)
    expected = torch.stack([norm_modulate(a, rows, None, index=i) for a, i in zip(x, index, strict=True)])
    assert torch.equal(actual, expected)


@EACH
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
@FUNCTIONS
def test_empty_tensors_give_empty_results_and_zero_gradients(function, impl, shape, require):
    require(function.__name__, impl, grad=True)
    for shared in ((), MODULATIONS):
        tensors, index = draw(function, *shape, 3, shared=shared), torch.zeros(shape[:2], dtype=torch.int64)
        grads = [torch.randn(shape) for _ in range(2)]
        with poison_empty():
            results = outputs_and_grads(partial(function, impl=impl, index=index), tensors, grads)
        for name, value in results.items():
            expected = tensors[name.removeprefix("grad ")].shape if name.startswith("grad") else torch.Size(shape)
            assert value.shape == expected and torch.count_nonzero(value) == 0, name
