"""qk_norm_rope: the formula, gradients, contract, in every implementation."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from sora_kernels import _dispatch, _library
from sora_kernels._dispatch import Unavailable
from sora_kernels.qknorm_rope import qk_norm_rope
from sora_kernels.testing import LAYOUTS, arrange, assert_matches_oracle, outputs_and_grads, poison_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
NATIVE = pytest.mark.parametrize("impl", ["reference", "cpu"])


def op_samples() -> list[tuple[str, tuple]]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 3, 8), torch.randn(2, 7, 1, 8)
    affine, none = tuple(torch.randn(4, 8)), (None,) * 4
    on_the_fly = (*none, None, 2, False, [1, 2, 3, 2, 1, 1, 0, 5, 0], 1e4, 1, True, 1e-6, 0, 0)
    given = (None, torch.randn(7, 3), torch.randn(7, 3), None, None, 2, False, None, 1e4, 0, False, 1e-6, 0, 0)
    tables = *torch.randn(2, 2, 7, 1, 4), *torch.randn(2, 1, 7, 1, 4)
    by_clip = (None, *tables, 0, False, None, 1e4, 0, False, 1e-6, 0, 0)
    by_head = (None, torch.randn(6, 3, 4), torch.randn(6, 3, 4), None, None, 1, False, None, 1e4, 1, False, 1e-6, 0, 0)
    plain = (*none, None, 0, False, None, 1e4, 0, True, 1e-6, 0, 0)
    stats, part = torch.rand(2, 14), [4, 2, 3, 2, 1, 1, 0, 5, 0, 11, 17]
    across = (stats, *none, 1, True, part, 1e4, 0, True, 1e-6, 48, 16)
    weights = (torch.randn(24), torch.randn(8), None, None)
    dweights = (*map(torch.empty_like, weights[:2]), None, None)
    empty = torch.empty_like
    return [
        ("qk_norm_rope_fwd", (q, k, *affine, *on_the_fly, False, empty(q), empty(k))),
        ("qk_norm_rope_fwd", (q, k, *none, *given, True, empty(q), empty(k))),
        ("qk_norm_rope_fwd", (q, q, *none, *by_head, False, empty(q), empty(q))),
        ("qk_norm_rope_fwd", (q, k, *none, *by_clip, False, empty(q), empty(k))),
        ("qk_norm_rope_fwd", (q, k, *none, *plain, False, empty(q), empty(k))),
        ("qk_norm_rope_fwd", (q, k, *weights, *across, False, empty(q), empty(k))),
        ("qk_norm_rope_bwd", (q, k, q, k, *affine, *on_the_fly, *map(empty, (q, k, *affine)), None)),
        ("qk_norm_rope_bwd", (q, q, q, q, *none, *by_head, *map(empty, (q, q)), *none, None)),
        ("qk_norm_rope_bwd", (q, k, q, k, *none, *by_clip, *map(empty, (q, k)), *none, None)),
        ("qk_norm_rope_bwd", (q, k, q, k, *affine, *given, None, empty(k), None, *map(empty, affine[1:3]), None, None)),
        ("qk_norm_rope_bwd", (q, k, q, k, *weights, *across, empty(q), empty(k), *dweights, empty(stats))),
        ("qk_norm_rope_bwd", (q, k, q, k, *weights, *across, *none, None, None, empty(stats))),
    ]  # fmt: skip


def normalised(x, weight=None, bias=None, norm="rms", across="head", eps=1e-6):
    """The norm in x's own dtype, written with torch's own functions."""
    B, S, H, E = x.shape
    flat = x if across == "head" else x.reshape(B, S, H * E)
    shape = flat.shape[-1:]
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if norm == "rms":
        flat = torch.nn.functional.rms_norm(flat, shape, weight, eps)
    elif norm == "layer":
        flat = torch.nn.functional.layer_norm(flat, shape, weight, bias, eps)
    return flat.reshape(B, S, H, E)


def angles(grid, split, theta=1e4, origin=(0, 0, 0)):
    """Token by token, pair by pair, in Python's floats."""
    rows = []
    for position in itertools.product(*map(range, grid)):
        rows.append(
            [
                (p + o) * theta ** (-2 * j / (2 * n))
                for p, o, n in zip(position, origin, split, strict=True)
                for j in range(n)
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)


def rotated(x, angle, interleaved=True, first=0):
    """Complex multiplication of the tokens from `first` on and of the first channels of each head, in fp64."""
    n, pairs = angle.shape
    head, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    z = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    turn = torch.ones(x.shape[1], 1, pairs, dtype=torch.complex128)
    turn[first : first + n, 0] = torch.polar(torch.ones_like(angle), angle)
    z = torch.view_as_real(torch.view_as_complex(z.contiguous()) * turn)
    head = z.flatten(-2) if interleaved else z.transpose(-1, -2).flatten(-2)
    return torch.cat((head, rest), -1)


class Case(NamedTuple):
    grid: tuple[int, int, int]
    heads: tuple[int, int]  # of q and of k
    E: int
    rotary_dim: int | None = None
    text: int = 0
    text_at: str = "end"
    norm: str | None = "rms"
    across: str = "head"
    interleaved: bool = True
    by_head: bool = False  # other angles for each head, which must be given as freqs
    by_clip: bool = False  # other angles for each clip, likewise
    k_tokens: int = 0  # of k, where it has angles of its own, likewise

    @property
    def S(self) -> int:
        return math.prod(self.grid) + self.text

    @property
    def first(self) -> int:
        return self.text if self.text_at == "start" else 0

    @property
    def split(self) -> tuple[int, int, int]:
        width = self.rotary_dim or self.E
        return width // 2 - 2 * (width // 6), width // 6, width // 6


def plain(q, k, q_weight, k_weight, q_bias, k_bias, angle, case, k_angle=None):
    """What a model would write: everything in the dtype of q, without an upcast."""
    results = []
    for x, weight, bias, turn in ((q, q_weight, q_bias, angle), (k, k_weight, k_bias, k_angle)):
        y = normalised(x, weight, bias, case.norm, case.across)
        turn = angle if turn is None else turn
        turn = turn[:, None] if turn.ndim == 2 else turn
        first, last, pairs = case.first, case.first + turn.shape[-3], turn.shape[-1]
        cos, sin = turn.cos().to(y.dtype), turn.sin().to(y.dtype)
        head = y[:, first:last, :, : 2 * pairs]
        a, b = head.unflatten(-1, (-1, 2)).unbind(-1) if case.interleaved else head.chunk(2, -1)
        pair = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
        head = pair.flatten(-2) if case.interleaved else pair.transpose(-1, -2).flatten(-2)
        head = torch.cat((head, y[:, first:last, :, 2 * pairs :]), -1)
        results.append(torch.cat((y[:, :first], head, y[:, last:]), 1))
    return tuple(results)


CASES = [
    Case((2, 3, 4), (3, 1), 12),
    Case((1, 3, 2), (2, 2), 16, rotary_dim=10, text=3, norm="layer", interleaved=False),
    Case((3, 1, 5), (2, 3), 6, rotary_dim=4, text=1, across="width"),
    Case((2, 2, 2), (1, 1), 2, norm=None, interleaved=False),
    Case((1, 1, 1), (5, 5), 18, rotary_dim=14, text=2, text_at="start", norm="layer", across="width"),
]
GIVEN = [
    Case((1, 3, 2), (3, 3), 8, rotary_dim=6, text=1, text_at="start", across="width", interleaved=False, by_head=True),
    Case((1, 2, 2), (3, 1), 8, by_clip=True, k_tokens=3),
    Case((2, 1, 2), (1, 2), 6, rotary_dim=4, text=1, norm="layer", interleaved=False, by_clip=True, by_head=True,
         k_tokens=5),
    Case((1, 1, 3), (2, 3), 36, norm=None, by_head=True, k_tokens=2),
]  # fmt: skip


def make(case, dtype=torch.float64, seed=0):
    """(tensors, settings): a weight for every norm, and a bias for the one that has it."""
    torch.manual_seed(seed)
    heads = dict(q=case.heads[0], k=case.heads[1])
    width = {x: case.E if case.across == "head" else n * case.E for x, n in heads.items()}
    k_len = case.k_tokens + case.text if case.k_tokens else case.S
    tensors = dict(q=torch.randn(2, case.S, heads["q"], case.E), k=3 * torch.randn(2, k_len, heads["k"], case.E) + 1)
    for x in "qk":
        tensors[f"{x}_weight"] = 1 + 0.3 * torch.randn(width[x]) if case.norm else None
    for x in "qk":
        tensors[f"{x}_bias"] = torch.randn(width[x]) if case.norm == "layer" else None
    settings = dict(norm=case.norm, across=case.across, grid=case.grid, rotary_dim=case.rotary_dim, text_len=case.text)
    settings |= dict(text_at=case.text_at, interleaved=case.interleaved)
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}, settings


@pytest.mark.parametrize("case", CASES)
def test_formula(case):
    tensors, settings = make(case)
    origin = (3, 0, 11)
    results = qk_norm_rope(**tensors, **settings, origin=origin, theta=300.0, eps=1e-3)
    angle = angles(case.grid, case.split, 300.0, origin)
    for result, x in zip(results, "qk", strict=True):
        y = normalised(tensors[x], tensors[f"{x}_weight"], tensors[f"{x}_bias"], case.norm, case.across, 1e-3)
        torch.testing.assert_close(result, rotated(y, angle, case.interleaved, case.first), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_rounding_host_rounds_after_the_norm_and_keeps_the_gradients(case, impl, require):
    dtype = torch.float16
    require("qk_norm_rope", impl, dtype=dtype, grad=True)
    tensors, settings = make(case, dtype)
    settings |= dict(origin=(3, 5, 2))
    given = {name: t for name, t in tensors.items() if t is not None}
    grads = [torch.randn_like(tensors[x]) for x in "qk"]

    def run(**options):
        return outputs_and_grads(lambda **ts: qk_norm_rope(**ts, **settings, impl=impl, **options), given, grads)

    host, once = run(rounding="host"), run(rounding="once")
    bare = {name: settings[name] for name in ("norm", "across")}
    normed = qk_norm_rope(**tensors, **bare, impl=impl)
    turning = {name: value for name, value in settings.items() if name not in ("norm", "across")}
    expected = qk_norm_rope(*normed, norm=None, **turning, impl=impl)
    for i in range(2):
        assert torch.equal(host[f"output{i}"], expected[i])
        assert case.norm is None or not torch.equal(host[f"output{i}"], once[f"output{i}"])
    assert all(torch.equal(host[name], once[name]) for name in host if name.startswith("grad"))


def test_a_rounding_that_is_not_known_is_said():
    with pytest.raises(ValueError, match="rounding must be .*once.*host.*got 'twice'"):
        qk_norm_rope(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4), rounding="twice")


def test_default_split_is_wans():
    x = torch.randn(1, 8, 1, 128, dtype=torch.float64)
    default = qk_norm_rope(x, x, grid=(2, 2, 2))
    given = qk_norm_rope(x, x, grid=(2, 2, 2), split=(22, 21, 21))
    other = qk_norm_rope(x, x, grid=(2, 2, 2), split=(20, 22, 22))
    assert torch.equal(default[0], given[0])
    assert not torch.allclose(default[0], other[0])


def test_origin_continues_a_clip():
    x = torch.randn(1, 24, 2, 12)
    whole, _ = qk_norm_rope(x, x, grid=(4, 2, 3))
    later, _ = qk_norm_rope(x[:, 12:], x[:, 12:], grid=(2, 2, 3), origin=(2, 0, 0))
    assert torch.equal(whole[:, 12:], later)


@IMPLS
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[4]])
def test_some_of_a_grids_tokens_are_those_of_the_whole(case, impl, require):
    """Bit for bit, text before and behind them, and the gradients too: they begin and end within a row."""
    require("qk_norm_rope", impl, grad=True)
    inputs, settings = make(case, torch.float32)
    grid = settings.pop("grid")
    settings |= dict(origin=(2, 0, 5), impl=impl)
    grads = [torch.randn_like(inputs[x]) for x in "qk"]
    count, affine = math.prod(grid), {name: t for name, t in inputs.items() if "_" in name}
    whole = outputs_and_grads(lambda **kw: qk_norm_rope(**kw, **settings, grid=grid), inputs, grads)
    text = list(range(case.first)) or list(range(count, case.S))
    for start, stop in ((0, count), (count // 3, count - 1), (count, count)):
        mine = [case.first + n for n in range(start, stop)]
        some = text + mine if case.first else mine + text
        given = {x: inputs[x][:, some] for x in "qk"}
        part = outputs_and_grads(
            lambda tokens=(start, stop), **kw: qk_norm_rope(**kw, **affine, **settings, grid=grid, tokens=tokens),
            given, [g[:, some] for g in grads],
        )  # fmt: skip
        for name, t in part.items():
            assert torch.equal(t, whole[name][:, some]), (name, start, stop)


def test_freqs_equal_grid():
    tensors, settings = make(CASES[1])
    angle = angles(CASES[1].grid, CASES[1].split)
    on_the_fly = qk_norm_rope(**tensors, **settings)
    settings |= dict(grid=None, rotary_dim=None)
    for turn in (angle, angle[:, None].expand(-1, 2, -1)):
        given = qk_norm_rope(**tensors, **settings, freqs=(turn.cos(), turn.sin()))
        for a, b in zip(on_the_fly, given, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@IMPLS
def test_norm_alone_takes_different_lengths(impl, require):
    require("qk_norm_rope", impl)
    q, k, w = (torch.randn(*s) for s in ((1, 3, 2, 6), (1, 5, 2, 6), (12,)))
    q_out, k_out = qk_norm_rope(q, k, q_weight=w, k_weight=w, across="width", impl=impl)
    torch.testing.assert_close(q_out, normalised(q, w, across="width"))
    torch.testing.assert_close(k_out, normalised(k, w, across="width"))


@IMPLS
@pytest.mark.parametrize("text_at, text", [("end", slice(6, 10)), ("start", slice(0, 4))])
def test_text_is_normalised_not_rotated(text_at, text, impl, require):
    require("qk_norm_rope", impl)
    x = torch.randn(1, 10, 2, 6)
    out, _ = qk_norm_rope(x, x, grid=(1, 2, 3), text_len=4, text_at=text_at, origin=(1, 0, 0), impl=impl)
    same = torch.isclose(out, normalised(x), rtol=1e-5, atol=1e-6).flatten(2).all(-1)[0]
    assert same.nonzero().flatten().tolist() == list(range(10))[text]


# Numbers


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    tensors, settings = make(case)
    given = {
        name: t[:1].requires_grad_() if t.ndim == 4 else t.requires_grad_()
        for name, t in tensors.items()
        if t is not None
    }
    assert torch.autograd.gradcheck(
        lambda *args: qk_norm_rope(**dict(zip(given, args, strict=True)), **settings),
        tuple(given.values()),
        fast_mode=True,
    )


def given_angles(case):
    """Of q, and of k where it has its own: [tokens, pairs], or by head, or by clip and (head or 1)."""
    results = []
    for tokens, heads in ((case.S - case.text, case.heads[0]), (case.k_tokens, case.heads[1])):
        angle = torch.randn(tokens, 1, sum(case.split), dtype=torch.float64)
        angle = angle * torch.linspace(-1, 2, heads, dtype=torch.float64)[:, None] if case.by_head else angle
        angle = angle * torch.tensor([1.0, -3]).view(2, 1, 1, 1) if case.by_clip else angle
        results.append(angle if case.by_clip or case.by_head else angle[:, 0])
    return results if case.k_tokens else (results[0], None)


def table_of(angle, device="cpu"):
    return tuple(t.to(device) for t in (angle.cos(), angle.sin()))


def check(case, dtype, impl, device="cpu", seed=0, origin=(0, 0, 0)):
    """The error rule on outputs and every gradient, with unwritten memory poisoned."""
    tensors, settings = make(case, dtype, seed)
    tensors = {name: None if t is None else t.to(device) for name, t in tensors.items()}
    grads = [torch.randn(t.shape).to(device, dtype) for t in (tensors["q"], tensors["k"])]
    angle, k_angle = angles(case.grid, case.split, origin=origin), None
    if case in GIVEN:
        angle, k_angle = given_angles(case)
        settings |= dict(freqs=table_of(angle, device), grid=None, rotary_dim=None)
        settings |= {} if k_angle is None else dict(k_freqs=table_of(k_angle, device))
    angle, k_angle = (None if t is None else t.to(device) for t in (angle, k_angle))
    with poison_empty():
        ours = outputs_and_grads(lambda **kw: qk_norm_rope(**kw, **settings, origin=origin, impl=impl), tensors, grads)

    def formula(**kw):
        return plain(**kw, angle=angle, case=case, k_angle=k_angle)

    double = {name: None if t is None else t.double() for name, t in tensors.items()}
    oracle = outputs_and_grads(formula, double, [g.double() for g in grads])
    baseline = outputs_and_grads(formula, tensors, grads)
    for name, result in ours.items():
        x = tensors[name.split()[1][0]] if "_" in name else None
        terms = 1 if x is None else x.numel() // result.numel()
        assert_matches_oracle(result, oracle[name], baseline[name], name, terms)


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *GIVEN])
def test_error_rule(case, dtype, impl, require):
    require("qk_norm_rope", impl, dtype=dtype, grad=True)
    check(case, dtype, impl)


# The heads of public models: each width alone, 40 heads under one norm, grouped keys, 96 of 128 channels turning
MODELS = [
    *(Case((1, 2, 2), (3, 2), E, norm=norm, interleaved=norm == "rms")
      for E, norm in ((24, "rms"), (64, "layer"), (72, "rms"), (96, "layer"), (112, "rms"), (256, "layer"))),
    Case((1, 1, 2), (40, 40), 128, across="width"),
    Case((1, 2, 1), (24, 8), 128, rotary_dim=96, text=2, interleaved=False),
    Case((2, 1, 1), (48, 48), 64, text=3, text_at="start", norm="layer"),
]  # fmt: skip


@IMPLS
@pytest.mark.parametrize("case", MODELS)
def test_error_rule_of_public_models(case, impl, require):
    require("qk_norm_rope", impl, grad=True)
    check(case, torch.float32, impl)


# What the interpreter has time for; between them every branch of both kernels.
SMALL = [
    Case((2, 1, 2), (3, 1), 12),
    Case((1, 1, 2), (1, 2), 16, rotary_dim=10, text=1, norm="layer", interleaved=False),
    Case((1, 3, 1), (5, 2), 6, rotary_dim=4, text=1, across="width"),
    Case((2, 1, 1), (1, 1), 7, rotary_dim=6, text=1, text_at="start", norm="layer", across="width", interleaved=False),
    Case((1, 2, 1), (1, 1), 10, norm=None),
    *GIVEN,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL)
def test_error_rule_without_a_gpu(case, dtype, require):
    require("qk_norm_rope", "triton", dtype=dtype, grad=True)
    if dtype == torch.bfloat16 and _dispatch.INTERPRET:
        pytest.skip("the Triton interpreter computes bf16 on raw bits; bf16 is tested as compiled code")
    check(case, dtype, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [
    *CASES, *SMALL, *MODELS,
    Case((4, 9, 16), (40, 40), 128, across="width"),
    Case((4, 9, 16), (24, 8), 128, rotary_dim=96, text=77, interleaved=False),
    Case((2, 30, 45), (48, 48), 64, text=226, text_at="start", norm="layer"),
    Case((16, 4, 4), (16, 16), 72, text=3),
    Case((3, 5, 7), (24, 24), 112, interleaved=False),
    Case((1, 8, 8), (2, 2), 256, norm="layer", across="width"),
])  # fmt: skip
def test_error_rule_on_gpu(case, dtype, impl):
    check(case, dtype, impl, "cuda")


@pytest.mark.parametrize("E", [14, 56, 120])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_centres_constant_heads_exactly(dtype, E, require):
    """Of these widths 1/E in fp32 times the sum of E equal numbers is often not that number."""
    require("qk_norm_rope", "cpu")
    x = torch.arange(900, 2000).to(dtype).view(1, -1, 1, 1).expand(-1, -1, -1, E)
    assert not torch.cat(qk_norm_rope(x, x, norm="layer", impl="cpu")).any()


@IMPLS
def test_angles_are_exact_far_from_the_origin(impl, require):
    """At position 100,000 an angle in fp32 has lost every digit that matters; at 2^30 even its turns."""
    require("qk_norm_rope", impl, grad=True)
    case = Case((2, 1, 2), (1, 1), 24, norm=None, interleaved=False)
    for origin in ((5000, 3000, 100_000), (-70_001, 1 << 30, 0)):
        check(case, torch.float32, impl, origin=origin)


@pytest.mark.parametrize("theta", [1.0, 256.0, 1e6, 0.5])
def test_any_theta(theta, require):
    require("qk_norm_rope", "cpu")
    x = torch.randn(1, 12, 1, 12)
    oracle, _ = qk_norm_rope(x.double(), x.double(), grid=(3, 2, 2), theta=theta, impl="reference")
    ours, _ = qk_norm_rope(x, x, grid=(3, 2, 2), theta=theta, impl="cpu")
    torch.testing.assert_close(ours.double(), oracle, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens", [(1, 1, 9), (2, 3, 33), (1, 11, 53)])
@pytest.mark.parametrize("across", ["head", "width"])
def test_cpu_reduces_over_any_number_of_tokens(tokens, across, require):
    """One chunk, several, and as many as there may be with a ragged last one."""
    require("qk_norm_rope", "cpu", grad=True)
    check(Case(tokens, (40, 3), 8, rotary_dim=6, text=1, norm="layer", across=across), torch.float32, "cpu")


@pytest.mark.parametrize("across", ["head", "width"])
def test_triton_reduces_in_several_steps(across, require, monkeypatch):
    require("qk_norm_rope", "triton", grad=True)
    from sora_kernels.qknorm_rope import kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    check(Case((1, 1, 3), (3, 2), 8, norm="layer", across=across), torch.float32, "triton")


@IMPLS
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_memory_layout_does_not_change_a_bit(layout, impl, require):
    require("qk_norm_rope", impl, grad=True)
    inputs, settings = make(SMALL[1], torch.float32)
    grads = [torch.randn_like(t) for t in (inputs["q"], inputs["k"])]
    arranged = {name: arrange(t, layout) for name, t in inputs.items()}
    arranged_grads = [arrange(g, layout) for g in grads]

    def run(inputs, grads):
        return outputs_and_grads(lambda **kw: qk_norm_rope(**kw, **settings, impl=impl), inputs, grads)

    ours = run(arranged, arranged_grads)
    expected = run(
        {name: t.clone().contiguous() for name, t in arranged.items()}, [g.contiguous() for g in arranged_grads]
    )
    for name, result in ours.items():
        assert torch.equal(result, expected[name]), name


@IMPLS
def test_views_into_packed_qkv_are_not_copied(impl, require, monkeypatch):
    require("qk_norm_rope", impl, grad=True)
    calls, call = [], _library.call

    def spy(op, impl):
        return lambda *args: (calls.append(args), call(op, impl)(*args))[1]

    by_head = torch.randn(3, 1, 2, 4, 8).transpose(2, 3)
    for q, k, _ in (torch.randn(1, 4, 3, 2, 8).unbind(2), torch.randn(1, 4, 2, 3, 8).unbind(3), by_head):
        tensors, grads = dict(q=q, k=k), [k, q]
        monkeypatch.setattr(_library, "call", spy)
        ours = outputs_and_grads(lambda **kw: qk_norm_rope(**kw, grid=(1, 2, 2), impl=impl), tensors, grads)
        monkeypatch.setattr(_library, "call", call)
        forward, backward = calls[-2:]
        for given, t in zip((*forward[:2], *backward[:4]), (q, k, k, q, q, k), strict=True):
            assert (given.data_ptr(), given.stride()) == (t.data_ptr(), t.stride())
        tensors, grads = dict(q=q.contiguous(), k=k.contiguous()), [k.contiguous(), q.contiguous()]
        expected = outputs_and_grads(lambda **kw: qk_norm_rope(**kw, grid=(1, 2, 2), impl=impl), tensors, grads)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


@IMPLS
def test_given_freqs_of_any_dtype_and_layout(impl, require):
    require("qk_norm_rope", impl, grad=True)
    torch.manual_seed(0)
    x, w = torch.randn(1, 3, 2, 10), torch.randn(10)
    for dtype in (torch.float64, torch.float16):
        angle = torch.randn(2, 6, dtype=torch.float64)
        cos, sin = (f(angle).to(dtype)[:, ::2] for f in (torch.cos, torch.sin))
        keywords = dict(freqs=(cos, sin), text_len=1, norm="layer")
        ours, _ = qk_norm_rope(x, x, q_weight=w, **keywords, impl=impl)
        keywords["freqs"] = cos.double(), sin.double()
        oracle, _ = qk_norm_rope(x.double(), x.double(), q_weight=w.double(), **keywords, impl="reference")
        torch.testing.assert_close(ours.double(), oracle, rtol=0, atol=2e-6)


@IMPLS
@pytest.mark.parametrize("shape", [(1, 4), (1, 3, 4), (1, 1, 3, 4), (2, 1, 1, 4)])
def test_strides_of_axes_of_one_element_do_not_matter(shape, impl, require):
    require("qk_norm_rope", impl, grad=True)
    torch.manual_seed(0)
    q, k = (torch.randn(2, 1, 3, 8, requires_grad=True) for _ in range(2))
    angle = torch.rand(shape) * 6
    cos, sin = arrange(angle.cos(), "sliced"), angle.sin()
    for keys in (None, (cos, sin)):
        results = []
        for tables in ((cos, sin), (cos.clone(memory_format=torch.contiguous_format), sin)):
            q_out, k_out = qk_norm_rope(q, k, freqs=tables, k_freqs=keys, impl=impl)
            results.append([q_out, k_out, *torch.autograd.grad((q_out * k_out.flip(0)).sum(), (q, k))])
        assert cos.stride() != sin.stride() and all(map(torch.equal, *results))


@IMPLS
@pytest.mark.parametrize("case", GIVEN[2:])
def test_tables_are_read_where_they_lie(case, impl, require, monkeypatch):
    """Those of LTX-2 are `[B, H, S, pairs]`; those of every clip and head may be one expanded row."""
    require("qk_norm_rope", impl, grad=True)
    inputs, settings = make(case, torch.float32)
    settings |= dict(grid=None, rotary_dim=None)
    grads = [torch.randn_like(t) for t in (inputs["q"], inputs["k"])]
    tables = [table_of(angle.float()) for angle in given_angles(case)]
    calls, call = [], _library.call
    monkeypatch.setattr(_library, "call", lambda op, impl: lambda *args: (calls.append(args), call(op, impl)(*args))[1])

    def run(tables):
        freqs = dict(zip(("freqs", "k_freqs"), tables, strict=True))
        return outputs_and_grads(lambda **kw: qk_norm_rope(**kw, **settings, **freqs, impl=impl), inputs, grads)

    expected = run(tables)
    across = [tuple(t.transpose(-3, -2).contiguous().transpose(-3, -2) for t in pair) for pair in tables]
    wide = [tuple(torch.stack((t, t), -2).flatten(-2)[..., : t.shape[-1]] for t in pair) for pair in tables]
    one = [tuple(t if t.ndim == 4 else t.expand(2, *t.shape) for t in pair) for pair in tables]
    for arranged in (across, wide, one):
        calls.clear()
        assert all(torch.equal(a, b) for a, b in zip(run(arranged).values(), expected.values(), strict=True))
        for args, at in zip(calls, (7, 9), strict=True):
            given = [t for pair in arranged for t in pair]
            assert [t.data_ptr() for t in args[at : at + 4]] == [t.data_ptr() for t in given]


@IMPLS
@pytest.mark.parametrize("across", ["head", "width"])
def test_backward_repeats_bitwise(across, impl, require):
    require("qk_norm_rope", impl, grad=True)
    grid = (1, 2, 2) if impl == "triton" else (5, 7, 9)
    case = Case(grid, (2, 3), 6, rotary_dim=4, text=1, norm="layer", across=across)
    inputs, settings = make(case, torch.float32)
    grads = [torch.randn_like(t) for t in (inputs["q"], inputs["k"])]

    def run():
        return outputs_and_grads(lambda **kw: qk_norm_rope(**kw, **settings, impl=impl), inputs, grads)

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_cpu_results_do_not_depend_on_the_number_of_threads(require, for_any_threads):
    require("qk_norm_rope", "cpu", grad=True)
    inputs, settings = make(Case((5, 7, 9), (2, 3), 6, rotary_dim=4, text=1, norm="layer"), torch.float32)
    grads = [torch.randn_like(t) for t in (inputs["q"], inputs["k"])]
    run = lambda **kw: qk_norm_rope(**kw, **settings, impl="cpu")  # noqa: E731
    for_any_threads(lambda: outputs_and_grads(run, inputs, grads))


@IMPLS
def test_each_gradient_alone_equals_the_one_computed_with_all_others(impl, require):
    require("qk_norm_rope", impl, grad=True)
    inputs, settings = make(Case((1, 1, 2), (1, 2), 6, rotary_dim=4, norm="layer", interleaved=False), torch.float32)
    grads = [torch.randn_like(t) for t in (inputs["q"], inputs["k"])]
    together = outputs_and_grads(lambda **kw: qk_norm_rope(**kw, **settings, impl=impl), inputs, grads)
    for name in inputs:
        leaf = inputs[name].clone().requires_grad_()
        outputs = qk_norm_rope(**{**inputs, name: leaf}, **settings, impl=impl)
        (alone,) = torch.autograd.grad(outputs, [leaf], grads)
        assert torch.equal(alone, together[f"grad {name}"]), name


SCRIPT = """
import torch
from sora_kernels import qk_norm_rope, qk_norm_stats
torch.manual_seed(0)
q, w = torch.randn(2, 13, 3, 20), torch.randn(60)
settings = dict(across="width", grid=(2, 2, 3), text_len=1, origin=(100, 7, 0))
ours, _ = qk_norm_rope(q, q, q_weight=w, impl="cpu", **settings)
oracle, _ = qk_norm_rope(q.double(), q.double(), q_weight=w.double(), impl="reference", **settings)
sums = qk_norm_stats(q, q, impl="cpu")
ranks, _ = qk_norm_rope(q, q, q_weight=w, impl="cpu", stats=sums, width=60, **settings)
print(max((t - oracle).abs().max().item() for t in (ours, ranks)))
"""


def test_every_instruction_set_is_right(require):
    require("qk_norm_rope", "cpu")
    for isa in ("baseline", "avx2"):
        command = dict(args=[sys.executable, "-c", SCRIPT], env=os.environ | {"SORA_KERNELS_CPU_ISA": isa})
        assert float(subprocess.run(**command, capture_output=True, text=True, check=True).stdout) < 2e-6, isa


@IMPLS
def test_gradient_of_one_output(impl, require):
    require("qk_norm_rope", impl, grad=True)
    q, k = (torch.randn(1, 2, 1, 4, requires_grad=True) for _ in range(2))
    q_out, k_out = qk_norm_rope(q, k, grid=(1, 2, 1), impl=impl)
    k_out.sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q)) and k.grad.abs().max() > 0


@NATIVE
def test_weights_of_another_dtype(impl, require):
    require("qk_norm_rope", impl, grad=True)
    torch.manual_seed(0)
    x, w = torch.randn(1, 4, 2, 6).bfloat16(), torch.randn(6, requires_grad=True)
    out, _ = qk_norm_rope(x, x, q_weight=w, grid=(1, 2, 2), impl=impl)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
    oracle = (qk_norm_rope(x.double(), x.double(), q_weight=w.double(), grid=(1, 2, 2))[0]).bfloat16()
    torch.testing.assert_close(out, oracle, rtol=8e-3, atol=0)


@IMPLS
def test_an_fp64_weight_beside_fp32_heads(impl, require):
    require("qk_norm_rope", impl, grad=True)
    x, w = torch.randn(1, 2, 1, 4), torch.randn(4, dtype=torch.float64, requires_grad=True)
    out, _ = qk_norm_rope(x, x, q_weight=w, impl=impl)
    out.sum().backward()
    (expected,) = torch.autograd.grad(normalised(x.double(), w).sum(), [w])
    assert w.grad.dtype == torch.float64
    torch.testing.assert_close(w.grad, expected, rtol=1e-5, atol=1e-5)


@IMPLS
@pytest.mark.parametrize("shape", [(0, 6, 2, 4), (1, 0, 2, 4), (1, 6, 0, 4)])
def test_empty(shape, impl, require):
    require("qk_norm_rope", impl, grad=True)
    x, w, b = torch.empty(shape, requires_grad=True), *torch.ones(2, 4).requires_grad_().unbind()
    settings = dict(norm="layer", grid=(1, 2, 3) if shape[1] else None, impl=impl)
    q, k = qk_norm_rope(x, x, q_weight=w, q_bias=b, **settings)
    with poison_empty():
        dx, dw, db = torch.autograd.grad(q.sum() + k.sum(), (x, w, b))
    assert q.shape == k.shape == dx.shape == shape
    assert torch.equal(dw, torch.zeros(4)) and torch.equal(db, torch.zeros(4))


@IMPLS
@pytest.mark.parametrize("B, H", [(0, 2), (2, 0)])
def test_nothing_turns_by_tables_of_its_own(B, H, impl, require):
    require("qk_norm_rope", impl, grad=True)
    q, k = (torch.empty(B, S, H, 4, requires_grad=True) for S in (6, 3))
    tables = {name: (torch.ones(B, S, H, 2), torch.zeros(B, S, H, 2)) for name, S in (("freqs", 6), ("k_freqs", 3))}
    q_out, k_out = qk_norm_rope(q, k, **tables, impl=impl)
    grads = torch.autograd.grad(q_out.sum() + k_out.sum(), (q, k))
    assert [t.shape for t in (q_out, k_out)] == [t.shape for t in grads] == [q.shape, k.shape]


def test_too_wide_for_triton(require):
    require("qk_norm_rope", "triton")
    x = torch.zeros(1, 1, 9, 2048)
    qk_norm_rope(x, x, impl="reference")
    with pytest.raises(Unavailable, match="norms of up to 16384 values in a program.s registers; got 18432"):
        qk_norm_rope(x, x, across="width", impl="triton")


def test_compiles_whole_with_dynamic_shapes():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(q, k, w):
        return qk_norm_rope(q, k, q_weight=w, grid=(q.shape[1] // 6, 2, 3), text_len=0)

    for T in (2, 3):
        q, k, w = (torch.randn(*s, requires_grad=True) for s in ((1, 6 * T, 2, 8), (1, 6 * T, 1, 8), (8,)))
        out = run(q, k, w)
        expected = qk_norm_rope(q, k, q_weight=w, grid=(T, 2, 3))
        assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])
        ours, theirs = (torch.autograd.grad(o[0].sum() + o[1].square().sum(), (q, k, w)) for o in (out, expected))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


x = torch.zeros(2, 6, 2, 8)


def twice(*shape):
    return (torch.ones(shape),) * 2


ERRORS = [
    (dict(q=1), TypeError, "q must be a tensor"),
    (dict(q=x.int()), TypeError, "q must be float32"),
    (dict(q=x[0]), ValueError, "q must be .B, S, H, E.; got shape .6, 2, 8."),
    (dict(k=x[..., :4]), ValueError, "k must have q's batch 2 and head width 8"),
    (dict(k=x.bfloat16()), TypeError, "k must have q's dtype torch.float32; got torch.bfloat16"),
    (dict(k=x.to("meta")), ValueError, "k must be on q's device"),
    (dict(grid=(2, 2, 2)), ValueError, "grid .2, 2, 2. and text_len 0 make 8 tokens; q has S=6"),
    (dict(grid=(2, 3)), ValueError, "grid must be three integers"),
    (dict(grid=(0, 2, 3)), ValueError, "grid must be at least 1"),
    (dict(text_len=7), ValueError, "text_len must be an integer between 0 and S=6; got 7"),
    (dict(text_at="middle"), ValueError, "text_at must be one of 'end', 'start'; got 'middle'"),
    (dict(rotary_dim=3), ValueError, "rotary_dim must be even"),
    (dict(rotary_dim=10), ValueError, "at most the head width E=8; got 10"),
    (dict(q=x[..., :7], k=x[..., :7]), ValueError, "rotary_dim must be even.*got 7"),
    (dict(split=(1, 1, 1)), ValueError, r"split \(1, 1, 1\) must sum to rotary_dim/2 = 4; got 3"),
    (dict(split=(5, -1, 0)), ValueError, "split must be at least 0"),
    (dict(tokens=(0, 6), grid=None), ValueError, "tokens are those of a grid=.T, H, W.; got none"),
    (dict(tokens=6), ValueError, r"tokens must be two integers \(start, stop\); got 6"),
    (dict(tokens=(1, 7)), ValueError, r"tokens \(start, stop\) must lie in the grid's 6, in order; got \(1, 7\)"),
    (dict(tokens=(4, 2)), ValueError, r"in order; got \(4, 2\)"),
    (dict(tokens=(0, 5)), ValueError, r"tokens \(0, 5\) of grid \(1, 2, 3\) and text_len 0 make 5 tokens; q has S=6"),
    (dict(theta=0.0), ValueError, "theta must be positive"),
    (dict(eps=0.0), ValueError, "eps must be positive"),
    (dict(origin=(0, 0)), ValueError, "origin must be three integers"),
    (dict(norm="group"), ValueError, "norm must be one of 'rms', 'layer', None; got 'group'"),
    (dict(across="batch"), ValueError, "across must be one of 'head', 'width'"),
    (dict(q_weight=torch.ones(16)), ValueError, r"q_weight must have shape \[8\].*got \[16\]"),
    (dict(across="width", k_weight=torch.ones(8)), ValueError, r"k_weight must have shape \[16\].*got \[8\]"),
    (dict(norm=None, q_weight=torch.ones(8)), ValueError, "with norm=None leave it out"),
    (dict(norm="layer", k_bias=torch.ones(16)), ValueError, r"k_bias must have shape \[8\].*got \[16\]"),
    (dict(q_bias=torch.ones(8)), ValueError, "q_bias belongs to norm='layer'; got norm='rms'"),
    (dict(norm=None, k_bias=torch.ones(8)), ValueError, "k_bias applies to normalised values; with norm=None"),
    (dict(q_weight=torch.ones(8, device="meta")), ValueError, "q_weight must be on q's device cpu; got meta"),
    (dict(freqs=(x, x)), ValueError, "not both"),
    (dict(grid=None, freqs=x), TypeError, "freqs must be a pair"),
    (dict(grid=None, freqs=twice(5, 4)), ValueError, r"freqs\[0\] must have shape \[6, 4\]"),
    (dict(grid=None, freqs=twice(6, 5)), ValueError, "rotary_dim must be even"),
    (dict(grid=None, freqs=twice(6)), ValueError, r"freqs\[0\] must be \[tokens.*got shape \[6\]"),
    (dict(grid=None, freqs=twice(6, 3, 4)), ValueError, r"must have shape \[6, 2, 4\].*got \[6, 3, 4\]"),
    (dict(grid=None, freqs=twice(3, 6, 1, 4)), ValueError, r"must have shape \[2, 6, 1, 4\].*got \[3, "),
    (dict(grid=None, freqs=twice(1, 6, 3, 4)), ValueError, r"must have shape \[1, 6, 2, 4\].*got \[1, "),
    (dict(grid=None, freqs=(twice(6, 2, 4)[0], twice(6, 4)[0])), ValueError, r"freqs\[1\] must have shape \[6, 2, 4\]"),
    (dict(k_freqs=twice(6, 4)), ValueError, "k_freqs are those of k beside freqs"),
    (dict(grid=None, freqs=twice(6, 4), k_freqs=x), TypeError, "k_freqs must be a pair"),
    (dict(grid=None, freqs=twice(6, 4), k_freqs=twice(6, 3)), ValueError, r"k_freqs\[0\] must have shape \[6, 4\].*3"),
    (dict(grid=None, freqs=twice(6, 4), k_freqs=twice(5, 4)), ValueError, r"k_freqs\[0\] must have shape \[6, 4\].*5"),
    (dict(grid=None, freqs=twice(6, 2, 4), k=x[:, :, :1]), ValueError, "k must have q's 2 heads; got 1"),
    (dict(grid=None, freqs=(torch.ones(6, 4, device="meta"),) * 2), ValueError, "must be on q's device cpu; got meta"),
    (dict(grid=None, freqs=(torch.ones(6, 4, requires_grad=True),) * 2), ValueError, "constants here"),
    (dict(grid=None, freqs=twice(6, 4), split=(2, 1, 1)), ValueError, "split belongs to grid"),
    (dict(grid=None, rotary_dim=4), ValueError, "rotary_dim needs grid"),
    (dict(k=x[:, :3]), ValueError, "q has 6, k has 3"),
    (dict(impl="fast"), ValueError, "impl must be one of"),
    (dict(impl="cuda"), Unavailable, "reference: usable"),
]  # fmt: skip


@pytest.mark.parametrize("change, error, message", ERRORS, ids=[m for _, _, m in ERRORS])
def test_errors(change, error, message):
    arguments = dict(q=x, k=x, grid=(1, 2, 3)) | change
    with pytest.raises(error, match=message) as caught:
        qk_norm_rope(**arguments)
    assert "qk_norm_rope" in str(caught.value)
