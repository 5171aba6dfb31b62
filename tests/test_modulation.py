"""The modulation family: every implementation against the fp64 oracle, in every row layout, forward and backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import sora_kernels
from sora_kernels import (
    Unavailable,
    _dispatch,
    _library,
    _rows,
    gate_residual,
    gate_residual_norm_modulate,
    norm_modulate,
)
from sora_kernels.modulation import reference
from sora_kernels.testing import LAYOUTS, arrange, assert_matches_oracle, outputs_and_grads, poison_empty

ROWS = {
    "[D]": lambda B, S, D: (D,),
    "[B,D]": lambda B, S, D: (B, D),
    "[B,1,D]": lambda B, S, D: (B, 1, D),
    "[B,F,D]": lambda B, S, D: (B, S // 3, D),
    "[B,S,D]": lambda B, S, D: (B, S, D),
    "[1,D]": lambda B, S, D: (1, D),
    "[1,F,D]": lambda B, S, D: (1, S // 3, D),
    "[1,S,D]": lambda B, S, D: (1, S, D),
}
MODULATIONS = ("gate", "shift", "scale")
ARGUMENTS = {
    norm_modulate: ("x", "shift", "scale", "weight", "bias", "shift_table", "scale_table"),
    gate_residual: ("x", "y", "gate", "gate_table"),
    gate_residual_norm_modulate: (
        "x", "y", "gate", "shift", "scale", "weight", "bias", "gate_table", "shift_table", "scale_table",
    ),
}  # fmt: skip
FUNCTIONS = pytest.mark.parametrize("function", list(ARGUMENTS), ids=lambda f: f.__name__)


def plain(norm, eps=1e-6, **t):
    """Plain PyTorch: the same formulas in x's own dtype, as a model without this library would write them."""
    x, D = t["x"], t["x"].shape[-1]
    t = {name: None if v is None else v.to(x.dtype) for name, v in t.items()}

    def rows(name):
        row, table = t.get(name), t.get(f"{name}_table")
        if row is not None and row.ndim > 1:
            row = row if row.ndim == 3 else row[:, None]
            row = row.repeat_interleave(x.shape[1] // row.shape[1], 1)
        row = 0 if row is None else row
        return row if table is None else row + table

    outputs = []
    if "y" in t:
        x = x + rows("gate") * t["y"]
        outputs.append(x)
    if norm:
        n = F.layer_norm(x, [D], None, None, eps) if norm == "layer" else F.rms_norm(x, [D], None, eps)
        n = n if t.get("weight") is None else n * t["weight"]
        n = n if t.get("bias") is None else n + t["bias"]
        outputs.append(n * (1 + rows("scale")) + rows("shift"))
    return tuple(outputs)


def draw(function, B, S, D, rows, dtype=torch.float32, device="cpu", mod_dtype=None, drop=()):
    """Fresh arguments for `function`: a dict of tensors, with None for those in `drop`."""
    tensors = {}
    for name in ARGUMENTS[function]:
        shape = (B, S, D) if name in ("x", "y") else ROWS[rows](B, S, D) if name in MODULATIONS else (D,)
        kind = dtype if name in ("x", "y") else torch.float32 if name.endswith("table") else mod_dtype or dtype
        tensors[name] = None if name in drop else torch.randn(shape, device=device).to(kind)
    return tensors


def with_norm(function, norm):
    return function if function.__name__ == "gate_residual" else partial(function, norm=norm)


def check(function, impl, tensors, norm):
    """The error rule of the project on outputs and on every gradient, with unwritten memory poisoned."""
    x = tensors["x"]
    grads = [torch.randn_like(x) for _ in range(2 if function is gate_residual_norm_modulate else 1)]
    with poison_empty():
        actual = outputs_and_grads(partial(with_norm(function, norm), impl=impl), tensors, grads)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    run = with_norm(getattr(reference, function.__name__), norm)
    oracle = outputs_and_grads(run, wide, [g.double() for g in grads])
    baseline = outputs_and_grads(partial(plain, norm if function is not gate_residual else None), tensors, grads)
    assert actual.keys() == oracle.keys() == baseline.keys()
    for name, value in actual.items():
        terms = x.shape[0] * x.shape[1] if name.startswith("grad") and name not in ("grad x", "grad y") else 1
        assert_matches_oracle(value, oracle[name], baseline[name].to(value.dtype), name, terms)


CASES = [  # B, S, D, rows, norm, absent
    (2, 12, 64, "[B,1,D]", "layer", ("weight", "bias", "gate_table", "shift_table", "scale_table")),
    (2, 12, 48, "[B,F,D]", "rms", ("bias", "shift_table")),
    (1, 9, 33, "[B,S,D]", "layer", ()),
    (3, 3, 130, "[B,D]", "rms", ("weight", "gate_table")),
    (2, 6, 17, "[D]", "layer", ("bias",)),
    (2, 7, 1, "[B,1,D]", "rms", ()),
    (1, 1, 70, "[B,S,D]", "rms", ("bias",)),
    (2, 3, 24, "[B,S,D]", "layer", ("shift", "weight")),
    (1, 21, 320, "[B,F,D]", "layer", ("scale", "bias", "scale_table")),
    (2, 5, 40, "[1,D]", "layer", ("bias",)),
    (3, 6, 24, "[1,F,D]", "rms", ("shift_table",)),
    (2, 4, 17, "[1,S,D]", "layer", ("weight", "bias")),
]
GPU_CASES = [(2, 1024, 1536, "[B,1,D]", "layer", ()), (1, 260, 5376, "[B,S,D]", "rms", ())]
CASE_IDS = [f"B{B}-S{S}-D{D}-{rows}-{norm}" for B, S, D, rows, norm, _ in CASES]


@FUNCTIONS
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_outputs_and_gradients_match_the_fp64_oracle(function, impl, dtype, case, require):
    require(function.__name__, impl, dtype=dtype, grad=True)
    if impl == "triton" and dtype == torch.bfloat16 and _dispatch.INTERPRET:
        pytest.skip("the Triton interpreter computes bf16 on raw bits; bf16 is tested as compiled code")
    B, S, D, rows, norm, absent = case
    check(function, impl, draw(function, B, S, D, rows, dtype, drop=absent), norm)


@FUNCTIONS
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_fp64_parameters_beside_fp32_tokens_get_fp64_gradients(function, impl, require):
    require(function.__name__, impl, grad=True)
    tensors = draw(function, 2, 12, 64, "[B,1,D]")
    tensors = {name: t if name in ("x", "y") else t.double() for name, t in tensors.items()}
    check(function, impl, tensors, "layer")


@pytest.mark.gpu
@FUNCTIONS
@pytest.mark.parametrize("case", [*CASES, *GPU_CASES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_triton_on_gpu_matches_the_fp64_oracle(function, dtype, case):
    B, S, D, rows, norm, absent = case
    check(function, "triton", draw(function, B, S, D, rows, dtype, "cuda", drop=absent), norm)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [1, 48, 1152, 1536, 3072, 5120, 5376, 16384, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_cuda_forward_matches_the_fp64_oracle(norm, dtype, D, require):
    require("norm_modulate", "cuda", "cuda", dtype)
    tensors = draw(norm_modulate, 2, 30, D, "[B,F,D]", dtype, "cuda")
    with torch.no_grad(), poison_empty():
        actual = norm_modulate(**tensors, norm=norm, impl="cuda")
    oracle = reference.norm_modulate(**{n: t.double() for n, t in tensors.items()}, norm=norm)
    assert_matches_oracle(actual, oracle, plain(norm, **tensors)[0])


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_rows_of_one_call_may_lie_in_different_layouts(impl, require):
    require("gate_residual_norm_modulate", impl, grad=True)
    B, S, D = 2, 12, 24
    tensors = draw(gate_residual_norm_modulate, B, S, D, "[B,1,D]")
    tensors |= {"gate": torch.randn(D), "shift": torch.randn(B, 4, D), "scale": torch.randn(B, D)}
    check(gate_residual_norm_modulate, impl, tensors, "layer")
    tensors |= {"gate": torch.randn(B, 1, D), "shift": torch.randn(B, 3, D), "scale": torch.randn(B, 6, D)}
    check(gate_residual_norm_modulate, impl, tensors, "rms")
    tensors |= {"gate": torch.randn(B, 2, D), "shift": torch.randn(B, 3, D), "scale": None}  # 12 rows serve both
    check(gate_residual_norm_modulate, impl, tensors, "layer")



@FUNCTIONS
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("mod_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", ["[B,F,D]", "[B,S,D]"])
def test_modulation_and_parameters_may_be_of_another_dtype(function, impl, rows, mod_dtype, require):
    require(function.__name__, impl, dtype=torch.float16, grad=True)
    check(function, impl, draw(function, 2, 6, 40, rows, torch.float16, mod_dtype=mod_dtype), "layer")


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_six_rows_per_token_in_one_tensor_beside_tables(function, dtype, require):
    """Wan 2.2 5B: `[B, S, 6, D]` in fp32, read as strided rows, and one `[6, D]` parameter; a clip row among them."""
    require(function.__name__, "cpu", grad=True)
    tensors = draw(function, 2, 5, 72, "[B,S,D]", dtype, drop=("weight", "bias"))
    six, table = torch.randn(2, 5, 6, 72), torch.randn(6, 72)
    for i, name in enumerate(MODULATIONS):
        if name in tensors:
            tensors |= {name: six[:, :, i], f"{name}_table": table[i]}
    check(function, "cpu", tensors, "layer")
    if "scale" in tensors:
        check(function, "cpu", tensors | {"scale": torch.randn(2, 1, 72)}, "rms")


SIZES = [  # B, S, D, rows: widths of public models, short and long rows, more tokens than one block of a sum holds
    *[(1, 6, D, "[B,1,D]") for D in (1152, 1536, 1920, 3072, 5120, 5376)],
    (2, 1500, 64, "[B,1,D]"), (1, 1200, 128, "[B,F,D]"), (1, 3, 100_003, "[B,1,D]"), (1, 3, 100_003, "[B,S,D]"),
    (1, 4500, 9, "[B,S,D]"), (1, 4500, 9, "[B,1,D]"),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_at_widths_of_models_and_at_extreme_shapes(dtype, size, require):
    require("gate_residual_norm_modulate", "cpu", dtype=dtype, grad=True)
    check(gate_residual_norm_modulate, "cpu", draw(gate_residual_norm_modulate, *size, dtype), "layer")


@FUNCTIONS
@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_memory_layout_of_inputs_and_gradients_does_not_change_a_bit(function, impl, layout, require):
    require(function.__name__, impl, grad=True)
    agrees_with_contiguous(function, impl, layout, D=40)


@FUNCTIONS
@pytest.mark.parametrize("layout", ["expanded", "constant"])
def test_triton_rows_at_multiples_of_16_elements_agree_to_the_bit(function, layout, require):
    """As compiled too: the same is known of their addresses as of a contiguous tensor's, and sums have its order."""
    require(function.__name__, "triton", grad=True)
    agrees_with_contiguous(function, "triton", layout, D=48)


def agrees_with_contiguous(function, impl, layout, D):
    tensors = {n: arrange(t, layout) for n, t in draw(function, 2, 6, D, "[B,F,D]").items()}
    grads = [arrange(torch.randn(2, 6, D), layout) for _ in range(2)]
    run = partial(function, impl=impl)
    contiguous = {n: t.clone().contiguous() for n, t in tensors.items()}
    dense = outputs_and_grads(run, contiguous, [g.contiguous() for g in grads])
    awkward = outputs_and_grads(run, tensors, grads)  # detaches, which keeps strides
    for name, value in dense.items():
        assert torch.equal(value, awkward[name]), name


@FUNCTIONS
def test_row_layouts_may_differ_between_arguments(function):
    tensors = draw(function, 2, 12, 16, "[B,S,D]")
    shapes = iter([(2, 4, 16), (2, 6, 16), (16,)])
    for name in MODULATIONS:
        if name in tensors:
            tensors[name] = torch.randn(next(shapes))
    check(function, "reference", tensors, "layer")


@FUNCTIONS
@pytest.mark.parametrize("rows", ["[B,1,D]", "[B,F,D]", "[B,S,D]"])
def test_triton_backward_splits_and_gathers_frames(function, rows, require, monkeypatch):
    """The two regimes of the reduction, reached at test size by a small bound of the partials."""
    require(function.__name__, "triton", grad=True)
    from sora_kernels.modulation import kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 5)
    check(function, "triton", draw(function, 2, 21, 40, rows), "layer")


@FUNCTIONS
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("rows", ["[B,1,D]", "[B,S,D]"])
def test_two_backward_runs_agree_bit_for_bit(function, impl, rows, require):
    require(function.__name__, impl, grad=True)
    tensors, grads = draw(function, 2, 18, 64, rows), [torch.randn(2, 18, 64) for _ in range(2)]
    first, second = (outputs_and_grads(partial(function, impl=impl), tensors, grads) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@FUNCTIONS
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_each_gradient_alone_equals_the_one_computed_with_all_others(function, impl, require):
    require(function.__name__, impl, grad=True)
    tensors = draw(function, 2, 6, 24, "[B,F,D]")
    grads = [torch.randn(2, 6, 24) for _ in range(2)]
    together = outputs_and_grads(partial(function, impl=impl), tensors, grads)
    for name in tensors:
        leaf = tensors[name].clone().requires_grad_()
        outputs = function(**{**tensors, name: leaf}, impl=impl)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        (alone,) = torch.autograd.grad(outputs, [leaf], grads[: len(outputs)])
        assert torch.equal(alone, together[f"grad {name}"]), name


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("rows", ["[B,1,D]", "[B,S,D]"])
def test_one_output_of_the_fused_function_may_go_unused(rows, impl, used, require):
    """What only the other output depends on then has gradients of zero, not what lay in memory."""
    require("gate_residual_norm_modulate", impl, grad=True)
    tensors = draw(gate_residual_norm_modulate, 2, 6, 24, rows)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    with poison_empty():
        gate_residual_norm_modulate(**leaves, impl=impl)[used].square().sum().backward()
    wide = {n: t.double().requires_grad_() for n, t in tensors.items()}
    reference.gate_residual_norm_modulate(**wide)[used].square().sum().backward()
    for name, leaf in leaves.items():
        expected = 0 if wide[name].grad is None else wide[name].grad
        torch.testing.assert_close(leaf.grad.double(), expected + torch.zeros_like(wide[name]), rtol=1e-4, atol=1e-4)


@FUNCTIONS
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty_tensors_give_empty_results_and_zero_gradients(function, impl, shape, require):
    require(function.__name__, impl, grad=True)
    tensors = draw(function, *shape, "[B,1,D]")
    results = outputs_and_grads(partial(function, impl=impl), tensors, [torch.randn(shape) for _ in range(2)])
    for name, value in results.items():
        expected = tensors[name.removeprefix("grad ")].shape if name.startswith("grad") else torch.Size(shape)
        assert value.shape == expected and torch.count_nonzero(value) == 0, name


@pytest.mark.parametrize("norm", ["layer", "rms"])
@FUNCTIONS
def test_reference_passes_gradcheck(function, norm):
    tensors = {n: t.double().requires_grad_() for n, t in draw(function, 2, 6, 5, "[B,F,D]").items()}
    run = with_norm(getattr(reference, function.__name__), norm)
    assert torch.autograd.gradcheck(lambda *args: run(**dict(zip(tensors, args, strict=True))), tuple(tensors.values()))


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_variance_survives_a_mean_far_from_zero(impl, require):
    """E[x²] − mean² loses every digit here: the spread is 1e-4 of the mean."""
    require("norm_modulate", impl)
    x = 1000 + 0.1 * torch.randn(2, 3, 256)
    with torch.no_grad():
        actual = norm_modulate(x, None, None, impl=impl)
    torch.testing.assert_close(actual.double(), F.layer_norm(x.double(), [256], eps=1e-6), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_out_is_written_in_place(impl, require):
    require("norm_modulate", impl)
    t = draw(gate_residual_norm_modulate, 2, 6, 40, "[B,1,D]")
    x, y, gate, shift, scale = (t[n] for n in ("x", "y", "gate", "shift", "scale"))
    buffer = torch.full((2, 9, 40), float("nan"))[:, :6]  # rows of a larger tensor
    expected = norm_modulate(x, shift, scale, impl=impl)
    assert norm_modulate(x, shift, scale, impl=impl, out=buffer) is buffer and torch.equal(buffer, expected)
    expected = gate_residual_norm_modulate(x, y, gate, shift, scale, impl=impl)
    pair = (x.clone(), buffer)
    results = gate_residual_norm_modulate(pair[0], y, gate, shift, scale, impl=impl, out=pair)
    assert all(a is b and torch.equal(a, e) for a, b, e in zip(results, pair, expected, strict=True))
    expected = gate_residual(x, y, gate, impl=impl)
    assert gate_residual(x, y, gate, impl=impl, out=x) is x and torch.equal(x, expected)


def test_chunks_of_one_projection_reach_the_kernel_without_a_copy():
    x = torch.randn(2, 6, 8)
    shift, scale, gate, *_ = torch.randn(2, 6, 6 * 8).chunk(6, dim=-1)
    for t in (shift, scale, gate, torch.randn(2, 6, 8)[:, 3]):
        view = _rows.view(t, x, 6)
        assert view.data_ptr() == t.data_ptr() and view.shape == (2, 6, 8)


def test_inductor_hands_out_destinations_without_a_copy(require):
    """A mutated argument is cloned by functionalisation; for a fresh destination Inductor has to undo that."""
    require("gate_residual_norm_modulate", "cpu")
    from torch._inductor.utils import run_and_get_code

    def two_ops(x, y, gate, shift, scale):
        x, n = gate_residual_norm_modulate(x, y, gate, shift, scale)
        return gate_residual(x, n, gate)

    tensors = [torch.randn(2, 6, 32), torch.randn(2, 6, 32), *torch.randn(3, 2, 32)]
    actual, (code,) = run_and_get_code(torch.compile(two_ops, fullgraph=True), *tensors)
    torch.testing.assert_close(actual, two_ops(*tensors))
    assert code.count("_norm_modulate_fwd_cpu.default(") == code.count("_gate_residual_fwd_cpu.default(") == 1
    assert "cpp_fused" not in code and ".copy_(" not in code and "clone" not in code


@FUNCTIONS
def test_an_explicit_implementation_never_falls_back(function):
    tensors = draw(function, 1, 2, 8, "[B,1,D]")
    wide = {n: t.double() for n, t in tensors.items()}
    with pytest.raises(Unavailable, match="triton takes float32, bfloat16 or float16; got torch.float64"):
        function(**wide, impl="triton")
    with pytest.raises(Unavailable, match="(?s)cannot run: .*reference: usable"):
        function(**tensors, impl="cuda")
    with pytest.raises(Unavailable, match="has no cudnn implementation"):
        function(**tensors, impl="cudnn")
    with pytest.raises(ValueError, match="one of auto, reference, cpu, triton, cudnn, sdpa, cuda; got 'trition'"):
        function(**tensors, impl="trition")


def test_a_compiled_library_older_than_the_code_is_a_reason(monkeypatch, require):
    """Python declares what the next build will have; before it, auto must not choose what is not there."""
    require("norm_modulate", "cpu")
    monkeypatch.setattr(_library, "has_kernel", lambda op, impl: False)
    _dispatch._why_not.cache_clear(), _dispatch._able.cache_clear()
    try:
        with pytest.raises(Unavailable, match="_cpu.so is older than this code and lacks norm_modulate"):
            norm_modulate(X, None, None, impl="cpu")
        torch.testing.assert_close(norm_modulate(X, None, None), torch.zeros_like(X))
    finally:
        _dispatch._why_not.cache_clear(), _dispatch._able.cache_clear()


@pytest.mark.parametrize("by", ["frame", "index"])
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_a_shift_without_a_scale_orders_the_sums_whether_its_gradient_is_wanted_or_not(impl, by, require):
    """Rows by frame or index cut the tokens into parts, whose sums the gradients of weight and bias add up."""
    require("norm_modulate", impl, grad=True)
    x, shift, dout = torch.randn(2, 90, 8), torch.randn(2, 3, 8), torch.randn(2, 90, 8)
    index = torch.randint(3, (2, 90)) if by == "index" else None
    weight, bias = torch.randn(2, 8).requires_grad_().unbind()

    def grads(shift):
        out = norm_modulate(x, shift, None, weight=weight, bias=bias, index=index, impl=impl)
        return torch.autograd.grad(out, [weight, bias], dout)

    for alone, together in zip(grads(shift), grads(shift.clone().requires_grad_()), strict=True):
        assert torch.equal(alone, together)


X = torch.zeros(2, 6, 8)
BAD = {
    "x of rank 2": (lambda: norm_modulate(X[0], None, None), ValueError, r"x must be \[B, S, D\]; got shape \[6, 8\]"),
    "integer x": (lambda: norm_modulate(X.int(), None, None), TypeError, "x must be float32.*got torch.int32"),
    "no tensor": (lambda: norm_modulate([1.0], None, None), TypeError, "x must be a tensor .* got list"),
    "rows do not divide": (
        lambda: norm_modulate(X, torch.zeros(2, 4, 8), None), ValueError, "shift has F=4 rows, which must divide S=6",
    ),
    "other width": (lambda: norm_modulate(X, None, torch.zeros(2, 7)), ValueError, r"scale .* D=8 .* got \[2, 7\]"),
    "other batch": (lambda: gate_residual(X, X, torch.zeros(3, 8)), ValueError, r"gate .* B=2.* got \[3, 8\]"),
    "y of another shape": (lambda: gate_residual(X, X[:, :5], X[0, 0]), ValueError, r"y must have shape \[2, 6, 8\]"),
    "y of another dtype": (lambda: gate_residual(X, X.half(), X[0, 0]), TypeError, "y must have x's dtype"),
    "table of rank 2": (
        lambda: gate_residual(X, X, X[0, 0], gate_table=X[0]), ValueError, r"gate_table must have shape \[8\]",
    ),
    "weight too long": (
        lambda: norm_modulate(X, None, None, weight=torch.ones(9)), ValueError, r"weight must have .*\[8\].*got \[9\]",
    ),
    "unknown norm": (lambda: norm_modulate(X, None, None, norm="batch"), ValueError, "one of 'layer', 'rms'"),
    "eps of zero": (lambda: norm_modulate(X, None, None, eps=0.0), ValueError, "eps must be positive; got 0.0"),
    "other device": (
        lambda: norm_modulate(X, torch.zeros(8, device="meta"), None), ValueError, "on x's device cpu; got meta",
    ),
    "out of another dtype": (
        lambda: norm_modulate(X, None, None, out=X.half()), TypeError, "out must have x's dtype torch.float32",
    ),
    "out with gradients": (
        lambda: norm_modulate(X.clone().requires_grad_(), None, None, out=X.clone()), ValueError, "is for inference",
    ),
    "bias too short": (
        lambda: norm_modulate(X, None, None, bias=torch.ones(7)), ValueError, r"bias must have .*\[8\].*got \[7\]",
    ),
    "no rows": (lambda: gate_residual(X, X, X[:, :0]), ValueError, "gate has F=0 rows, which must divide S=6"),
    "y on another device": (
        lambda: gate_residual(X, X.to("meta"), X[0, 0]), ValueError, "y must be on x's device cpu; got meta",
    ),
    "table on another device": (
        lambda: gate_residual_norm_modulate(X, X, X[0, 0], None, None, shift_table=X[0, 0].to("meta")),
        ValueError, "shift_table must be on x's device cpu; got meta; move it",
    ),
    "one out for two results": (
        lambda: gate_residual_norm_modulate(X, X, X[0, 0], None, None, out=X), ValueError, "out must be a pair.*Tensor",
    ),
    "the same out twice": (
        lambda: gate_residual_norm_modulate(X, X, X[0, 0], None, None, out=(X, X)), ValueError, "a pair of two tensors",
    ),
    "half a pair": (
        lambda: gate_residual_norm_modulate(X, X, X[0, 0], None, None, out=(0, X)), TypeError, "out must be a tensor",
    ),
    "strided out": (lambda: norm_modulate(X, None, None, out=X.mT.contiguous().mT), ValueError, "out must be dense"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_the_numbers(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def op_samples() -> list[tuple[str, tuple]]:
    """(op without its implementation, arguments) for the enumeration in test_registration."""
    B, S, D, frames = 2, 6, 8, 3
    x, y, dout, out, x_new, dx, dy = (torch.randn(B, S, D) for _ in range(7))
    gate, shift, scale, dgate, dshift, dscale = (torch.randn(B, frames, D) for _ in range(6))
    w, b, gt, st, ct, dw, db, dgt, dst, dct = (torch.rand(D) for _ in range(10))
    index = torch.tensor([[2, 0, 0, 2, 0, 0], [1, 1, 1, 2, 0, 1]])
    return [
        ("norm_modulate_fwd", (x, shift, scale, w, b, st, ct, index, True, 1e-6, 0, out)),
        ("norm_modulate_fwd", (x, None, None, None, None, None, None, None, False, 1e-6, 0, out)),
        ("norm_modulate_bwd", (dout, x, scale, w, b, ct, index, False, 1e-6, dx, dshift, dscale, dw, db, dst, dct)),
        ("norm_modulate_bwd", (dout, x, None, None, None, None, None, True, 1e-6, dx, *[None] * 6)),
        ("gate_residual_fwd", (x, y, gate, gt, None, None, 1e-6, 0, out)),
        ("gate_residual_fwd", (x, y, gate, gt, index, True, 1e-6, 0, out)),
        ("gate_residual_bwd", (dout, y, gate, gt, index, None, 1e-6, dy, dgate, dgt)),
        ("gate_residual_bwd", (dout, y, None, None, None, False, 1e-6, dy, None, None)),
        (
            "gate_residual_norm_modulate_fwd",
            (x, y, gate, shift, scale, w, b, gt, st, ct, None, False, None, 1e-6, 0, x_new, out),
        ),
        *[
            (
                "gate_residual_norm_modulate_bwd",
                (dx, dout, x_new, y, gate, scale, w, b, gt, ct, which, True, y_rms, 1e-6, dx.clone(), dy, dgate, dshift,
                 dscale, dw, db, dgt, dst, dct),
            )
            for which, y_rms in ((None, None), (index, False))
        ],
    ]  # fmt: skip


def test_functions_are_exported():
    for function in ARGUMENTS:
        assert getattr(sora_kernels, function.__name__) is function
