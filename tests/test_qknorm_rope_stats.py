"""qk_norm_stats, and qk_norm_rope of heads that are divided over ranks: the numbers of one process, by every impl."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from test_qknorm_rope import Case, angles, make, plain

from sora_kernels import _dispatch, _library, qk_norm_rope, qk_norm_stats
from sora_kernels._dispatch import Unavailable
from sora_kernels.testing import LAYOUTS, arrange, assert_matches_oracle, outputs_and_grads, poison_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])


def op_samples() -> list[tuple[str, tuple]]:
    torch.manual_seed(0)
    q, k, empty = torch.randn(2, 7, 3, 8), torch.randn(2, 5, 1, 8), torch.empty_like
    return [
        ("qk_norm_stats_fwd", (q, k, torch.empty(2, 12))),
        ("qk_norm_stats_bwd", (torch.randn(2, 12), q, k, empty(q), empty(k))),
        ("qk_norm_stats_bwd", (torch.randn(2, 12), q, k, None, empty(k))),
    ]


def squares(q, k):
    """What a model would write, in the dtype that PyTorch would add up in."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.cat([x.square().sum((2, 3), dtype=wide) for x in (q, k)], 1)


SIZES = [((3, 5, 3, 7), (3, 4, 2, 7)), ((1, 2, 5, 24), (1, 2, 5, 24)), ((2, 3, 1, 2), (2, 1, 6, 2))]


def skip_bf16_in_the_interpreter(impl, dtype):
    if impl == "triton" and dtype == torch.bfloat16 and _dispatch.INTERPRET:
        pytest.skip("the Triton interpreter computes bf16 on raw bits; bf16 is tested as compiled code")


# The sums alone


@IMPLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_keep_the_error_rule(sizes, dtype, impl, require):
    require("qk_norm_stats", impl, dtype=dtype, grad=True)
    skip_bf16_in_the_interpreter(impl, dtype)
    inputs = {name: 3 * torch.randn(size).to(dtype) for name, size in zip("qk", sizes, strict=True)}
    dout = torch.randn(sizes[0][0], sizes[0][1] + sizes[1][1])
    with poison_empty():
        ours = outputs_and_grads(functools.partial(qk_norm_stats, impl=impl), inputs, [dout])
    oracle = outputs_and_grads(squares, {name: t.double() for name, t in inputs.items()}, [dout.double()])
    baseline = outputs_and_grads(squares, inputs, [dout])
    for name, result in ours.items():
        terms = max(math.prod(t.shape[2:]) for t in inputs.values()) if name == "output0" else 1
        assert_matches_oracle(result, oracle[name], baseline[name], name, terms)


def test_gradcheck():
    q, k, w = torch.randn(1, 3, 2, 4).double(), torch.randn(1, 2, 3, 4).double(), torch.randn(8).double()
    leaves = [t.requires_grad_() for t in (q, k, w)]

    def run(q, k, w):
        stats = qk_norm_stats(q, k) + 1.5  # of other ranks
        return qk_norm_rope(q, k, q_weight=w, across="width", stats=stats, width=20)

    assert torch.autograd.gradcheck(qk_norm_stats, leaves[:2], fast_mode=True)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@IMPLS
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_memory_layout_does_not_change_a_bit(layout, impl, require):
    require("qk_norm_stats", impl, grad=True)
    inputs = {name: torch.randn(size) for name, size in zip("qk", SIZES[0], strict=True)}
    arranged, dout = {n: arrange(t, layout) for n, t in inputs.items()}, arrange(torch.randn(3, 9), layout)
    run = functools.partial(outputs_and_grads, functools.partial(qk_norm_stats, impl=impl))
    ours = run(arranged, [dout])
    expected = run({n: t.clone().contiguous() for n, t in arranged.items()}, [dout.clone().contiguous()])
    assert all(torch.equal(t, expected[name]) for name, t in ours.items())


# Over ranks, which are here parts of one process


def divided(parts, impl, settings, q, k, q_weight=None, k_weight=None):
    """As ranks with so many heads of q, and of k, would compute it, each with its channels of the weights."""
    width, E = q.shape[2] * q.shape[3], q.shape[3]
    ranks = list(zip(*[x.split(heads, 2) for x, heads in zip((q, k), parts, strict=True)], strict=True))
    total = sum(qk_norm_stats(*rank, impl=impl) for rank in ranks)
    weights = [
        [None] * len(heads) if w is None else w.split([n * E for n in heads])
        for w, heads in zip((q_weight, k_weight), parts, strict=True)
    ]
    outs = [
        qk_norm_rope(*rank, q_weight=u, k_weight=v, **settings, stats=total, width=width, impl=impl)
        for rank, u, v in zip(ranks, *weights, strict=True)
    ]
    return tuple(torch.cat(out, 2) for out in zip(*outs, strict=True))


OVER_RANKS = {  # a case, and the heads of q and of k on each rank
    "uneven": (Case((1, 2, 3), (5, 5), 12, across="width"), ([2, 3], [2, 3])),
    "fewer keys": (Case((2, 1, 2), (6, 2), 6, rotary_dim=4, text=1, across="width"), ([3, 3], [1, 1])),
    "halves": (
        Case((1, 3, 1), (3, 3), 16, rotary_dim=10, text=2, text_at="start", across="width", interleaved=False),
        ([1, 1, 1], [1, 1, 1]),
    ),
}


def check(name, dtype, impl, device="cpu"):
    case, parts = OVER_RANKS[name]
    tensors, settings = make(case, dtype)
    tensors = {name: t.to(device) for name, t in tensors.items() if t is not None}
    grads = [torch.randn(tensors[x].shape).to(device, dtype) for x in "qk"]
    angle = angles(case.grid, case.split).to(device)
    with poison_empty():
        ours = outputs_and_grads(functools.partial(divided, parts, impl, settings), tensors, grads)

    def formula(**kw):
        return plain(**kw, q_bias=None, k_bias=None, angle=angle, case=case)

    oracle = outputs_and_grads(formula, {n: t.double() for n, t in tensors.items()}, [g.double() for g in grads])
    baseline = outputs_and_grads(formula, tensors, grads)
    for name, result in ours.items():
        x = tensors[name.split()[1][0]] if "_" in name else None
        assert_matches_oracle(result, oracle[name], baseline[name], name, 1 if x is None else x.numel() // len(result))


@IMPLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OVER_RANKS)
def test_ranks_keep_the_error_rule_of_one_process(name, dtype, impl, require):
    """Against a norm of the whole width, outputs and every gradient."""
    require("qk_norm_rope", impl, dtype=dtype, grad=True)
    skip_bf16_in_the_interpreter(impl, dtype)
    check(name, dtype, impl)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OVER_RANKS)
def test_ranks_keep_the_error_rule_on_gpu(name, dtype, impl):
    check(name, dtype, impl, "cuda")


def given(case, dtype=torch.float32):
    """Tensors with sums of squares as of two ranks more, and settings."""
    tensors, settings = make(case, dtype)
    tensors = {name: t for name, t in tensors.items() if t is not None}
    tensors["stats"] = 3 * squares(tensors["q"].float(), tensors["k"].float()) + 1
    return tensors, settings | dict(width=3 * case.heads[0] * case.E)


def of_given(width, eps=1e-6):
    def formula(q, k, q_weight, k_weight, stats):
        """In their own dtype, as plain PyTorch would; without a rotation."""
        results, heads = [], q.shape[2]
        for x, w, sums in zip((q, k), (q_weight, k_weight), stats.split((q.shape[1], k.shape[1]), 1), strict=True):
            own = width * x.shape[2] // heads
            rstd = (sums[..., None, None] / own + eps).rsqrt().to(x.dtype)
            results.append(x * rstd * w.view(x.shape[2:]))
        return tuple(results)

    return formula


@IMPLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(3, 3), (2, 4)], ids=str)
def test_the_gradient_of_the_sums_keeps_the_error_rule(heads, dtype, impl, require):
    require("qk_norm_rope", impl, dtype=dtype, grad=True)
    skip_bf16_in_the_interpreter(impl, dtype)
    tensors, settings = given(Case((1, 1, 5), heads, 7, rotary_dim=6, across="width"), dtype)
    grads, width = [torch.randn_like(tensors[x]) for x in "qk"], settings["width"]
    with poison_empty():
        ours = outputs_and_grads(
            lambda **kw: qk_norm_rope(**kw, across="width", width=width, impl=impl), tensors, grads
        )
    double = {name: t.double() for name, t in tensors.items()}
    oracle = outputs_and_grads(of_given(width), double, [g.double() for g in grads])
    baseline = outputs_and_grads(of_given(width), tensors, grads)
    for name, result in ours.items():
        x = tensors[name.split()[1][0]] if "_" in name else None
        terms = max(heads) * 7 if name == "grad stats" else 1 if x is None else x.numel() // len(result)
        assert_matches_oracle(result, oracle[name], baseline[name], name, terms)


SMALL = Case((1, 2, 2), (3, 2), 6, rotary_dim=4, text=1, across="width")


@IMPLS
def test_each_gradient_alone_equals_the_one_computed_with_all_others(impl, require):
    require("qk_norm_rope", impl, grad=True)
    tensors, settings = given(SMALL)
    settings["width"] = 3 * 6 * 6  # of three and of two heads here
    grads = [torch.randn_like(tensors[x]) for x in "qk"]
    run = functools.partial(qk_norm_rope, **settings, impl=impl)
    together = outputs_and_grads(run, tensors, grads)
    again = outputs_and_grads(run, tensors, grads)
    assert all(torch.equal(t, again[name]) for name, t in together.items())
    for name in tensors:
        leaf = tensors[name].clone().requires_grad_()
        (alone,) = torch.autograd.grad(run(**{**tensors, name: leaf}), [leaf], grads)
        assert torch.equal(alone, together[f"grad {name}"]), name


@IMPLS
def test_the_sums_are_read_where_they_lie(impl, require):
    require("qk_norm_rope", impl, grad=True)
    tensors, settings = given(SMALL)
    grads = [torch.randn_like(tensors[x]) for x in "qk"]
    run = functools.partial(qk_norm_rope, **settings, impl=impl)
    expected = outputs_and_grads(run, tensors, grads)
    for layout in ("sliced", "strided", "transposed"):
        ours = outputs_and_grads(run, tensors | dict(stats=arrange(tensors["stats"], layout)), grads)
        assert all(torch.equal(t, expected[name]) for name, t in ours.items()), layout


def test_cpu_results_do_not_depend_on_the_number_of_threads(require, for_any_threads):
    require("qk_norm_rope", "cpu", grad=True)
    case = Case((5, 7, 9), (2, 3), 6, rotary_dim=4, text=1, across="width")
    tensors, settings = make(case, torch.float32)
    tensors = {name: t for name, t in tensors.items() if t is not None}
    grads = [torch.randn_like(tensors[x]) for x in "qk"]

    def run(q, k, **weights):
        return qk_norm_rope(q, k, **weights, **settings, stats=qk_norm_stats(q, k, impl="cpu"), width=12, impl="cpu")

    for_any_threads(lambda: outputs_and_grads(run, tensors, grads))


@IMPLS
def test_ranks_round_as_a_host_does(impl, require):
    require("qk_norm_rope", impl, dtype=torch.float16)
    tensors, settings = given(SMALL, torch.float16)
    bare = {name: value for name, value in settings.items() if name in ("norm", "across", "width")}
    turning = {name: value for name, value in settings.items() if name not in (*bare, "norm")}
    normed = qk_norm_rope(**tensors, **bare, impl=impl)
    expected = qk_norm_rope(*normed, norm=None, **turning, impl=impl)
    host = qk_norm_rope(**tensors, **settings, rounding="host", impl=impl)
    assert all(map(torch.equal, host, expected))


@IMPLS
def test_values_too_large_for_the_dtype_are_added_up(impl, require):
    require("qk_norm_stats", impl, dtype=torch.float16)
    x = torch.full((1, 1, 2, 8), 32768.0, dtype=torch.float16)
    assert torch.equal(qk_norm_stats(x, x[:, :0], impl=impl), torch.full((1, 1), 16 * 32768.0**2))
    x[0, 0, 1, 3] = math.nan
    assert qk_norm_stats(x, x, impl=impl).isnan().all()


def test_private_ops_refuse_sums_that_they_cannot_read(require):
    require("qk_norm_stats", "cpu")
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8)
    sums, rope = (_library.call(op, "cpu") for op in ("qk_norm_stats_fwd", "qk_norm_rope_fwd"))
    back = _library.call("qk_norm_rope_bwd", "cpu")
    for stats in (torch.empty(2, 9), torch.empty(2, 10).half(), torch.empty(10)):
        with pytest.raises(RuntimeError, match=r"stats: expected a float32 \(B, tokens of q and of k\), got"):
            sums(q, k, stats)
    none, rest = (None,) * 4, (None, 1e4, 0, True, 1e-6)
    for norm, across, width in ((2, True, 24), (1, False, 24), (1, True, 0)):
        with pytest.raises(RuntimeError, match="stats: expected an RMS norm across a width of at least 1, got norm"):
            rope(q, k, *none, torch.ones(2, 10), *none, norm, across, *rest, width, width, False, q, k)
    with pytest.raises(RuntimeError, match="dstats: expected none without stats"):
        back(q, k, q, k, *none, None, *none, 1, True, *rest, 0, 0, *none, None, None, torch.empty(2, 10))
    with pytest.raises(RuntimeError, match="axes: expected the sizes, pairs and origins of three axes, or these"):
        rope(q, k, *none, None, *none, 1, True, [5, 1, 1, 4, 0, 0, 0, 0, 0, 0], *rest[1:], 0, 0, False, q, k)


def test_too_wide_for_triton(require):
    require("qk_norm_stats", "triton")
    x = torch.zeros(1, 1, 9, 2048)
    with pytest.raises(Unavailable, match="sums of up to 16384 values in a program.s registers; got 18432"):
        qk_norm_stats(x, x[:, :, :1], impl="triton")


x = torch.zeros(2, 5, 3, 8)
ERRORS = [
    (dict(q=1), TypeError, "q must be a tensor"),
    (dict(q=x[0]), ValueError, "q must be .B, S, H, E.; got shape .5, 3, 8."),
    (dict(k=x[:1]), ValueError, "k must have q's batch 2 and head width 8"),
    (dict(k=x.half()), TypeError, "k must have q's dtype torch.float32; got torch.float16"),
    (dict(impl="cuda"), Unavailable, "reference: usable"),
]
OF_ROPE = [
    (dict(stats=None), ValueError, "width is that of the heads on all ranks, for stats=; got no stats"),
    (dict(width=None), ValueError, "stats need width=, the channels of q's heads on all ranks; got None"),
    (dict(width=23), ValueError, "width must be an integer of at least 24; got 23"),
    (dict(k=x[:, :, :2], width=49), ValueError, "divided as the heads are, 3 of q and 2 of k here; got 49"),
    (dict(across="head"), ValueError, "for norm='rms' and across='width'; got norm='rms', across='head'"),
    (dict(norm="layer"), ValueError, "for norm='rms' and across='width'; got norm='layer', across='width'"),
    (dict(norm=None), ValueError, "for norm='rms' and across='width'; got norm=None"),
    (dict(stats=1.0), TypeError, "stats must be a tensor"),
    (dict(stats=torch.ones(2, 5)), ValueError, r"stats must have shape \[2, 10\].*added up\); got \[2, 5\]"),
    (dict(stats=torch.ones(2, 10).bfloat16()), TypeError, "stats must be float32, as qk_norm_stats gives them; got"),
    (dict(stats=torch.ones(2, 10, device="meta")), ValueError, "stats must be on q's device cpu; got meta"),
]


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[m for _, _, m in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error, match=message) as caught:
        qk_norm_stats(**dict(q=x, k=x) | change)
    assert "qk_norm_stats" in str(caught.value)


@pytest.mark.parametrize("change, error, message", OF_ROPE, ids=[m for _, _, m in OF_ROPE])
def test_errors_of_sums_that_do_not_fit(change, error, message):
    with pytest.raises(error, match=message) as caught:
        qk_norm_rope(**dict(q=x, k=x, across="width", stats=torch.ones(2, 10), width=48) | change)
    assert "qk_norm_rope" in str(caught.value)
