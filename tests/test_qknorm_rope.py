"""qk_norm_rope: the formula, the conventions of public models, gradients, contract, in every implementation."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from sora_kernels._dispatch import Unavailable
from sora_kernels.qknorm_rope import op as qknorm_op
from sora_kernels.qknorm_rope import qk_norm_rope
from sora_kernels.testing import LAYOUTS, arrange, assert_matches_oracle, outputs_and_grads, poison_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])


def op_samples() -> list[tuple[str, tuple]]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 3, 8), torch.randn(2, 7, 1, 8)
    weights = torch.randn(8), torch.randn(8)
    on_the_fly = (None, None, 1, False, [1, 2, 3], [2, 1, 1], 1e4, [0, 5, 0], True, 1e-6)
    given = (torch.randn(7, 3), torch.randn(7, 3), 2, False, [], [], 1e4, [0, 0, 0], False, 1e-6)
    plain = (None, None, 0, False, [], [], 1e4, [0, 0, 0], True, 1e-6)
    empty = torch.empty_like
    return [
        ("qk_norm_rope_fwd", (q, k, *weights, *on_the_fly, empty(q), empty(k))),
        ("qk_norm_rope_fwd", (q, k, None, None, *given, empty(q), empty(k))),
        ("qk_norm_rope_fwd", (q, k, None, None, *plain, empty(q), empty(k))),
        ("qk_norm_rope_bwd", (q, k, q, k, *weights, *on_the_fly, *map(empty, (q, k, *weights)))),
        ("qk_norm_rope_bwd", (q, k, q, k, *weights, *given, None, empty(k), None, empty(weights[1]))),
    ]


def normalised(x, weight=None, norm="rms", across="head", eps=1e-6):
    """The norm in x's own dtype, written with torch's own functions."""
    B, S, H, E = x.shape
    flat = x if across == "head" else x.reshape(B, S, H * E)
    shape, cast = flat.shape[-1:], None if weight is None else weight.to(x.dtype)
    if norm == "rms":
        flat = torch.nn.functional.rms_norm(flat, shape, cast, eps)
    elif norm == "layer":
        flat = torch.nn.functional.layer_norm(flat, shape, cast, None, eps)
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


def rotated(x, angle, interleaved=True):
    """Complex multiplication of the first tokens and channels of each head, in fp64."""
    n, pairs = angle.shape
    head, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    z = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    turn = torch.ones(x.shape[1], 1, pairs, dtype=torch.complex128)
    turn[:n, 0] = torch.polar(torch.ones_like(angle), angle)
    z = torch.view_as_real(torch.view_as_complex(z.contiguous()) * turn)
    head = z.flatten(-2) if interleaved else z.transpose(-1, -2).flatten(-2)
    return torch.cat((head, rest), -1)


def plain(q, k, q_weight, k_weight, angle, norm, across, interleaved):
    """What a model would write: everything in the dtype of q, without an upcast."""
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = normalised(x, weight, norm, across)
        n, pairs = angle.shape
        cos, sin = (f(angle)[:, None].to(y.dtype) for f in (torch.cos, torch.sin))
        head = y[:, :n, :, : 2 * pairs]
        a, b = head.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else head.chunk(2, -1)
        pair = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
        head = pair.flatten(-2) if interleaved else pair.transpose(-1, -2).flatten(-2)
        head = torch.cat((head, y[:, :n, :, 2 * pairs :]), -1)
        results.append(torch.cat((head, y[:, n:]), 1))
    return tuple(results)


CASES = [
    # grid, heads of q and k, E, rotary_dim, text_len, norm, across, interleaved
    ((2, 3, 4), (3, 1), 12, None, 0, "rms", "head", True),
    ((1, 3, 2), (2, 2), 16, 10, 3, "layer", "head", False),
    ((3, 1, 5), (2, 3), 6, 4, 1, "rms", "width", True),
    ((2, 2, 2), (1, 1), 2, None, 0, None, "head", False),
    ((1, 1, 1), (5, 5), 18, 14, 2, "layer", "width", True),
]


def make(case, dtype=torch.float64, seed=0):
    grid, (Hq, Hk), E, rotary_dim, text_len, norm, across, interleaved = case
    torch.manual_seed(seed)
    S = math.prod(grid) + text_len
    inputs = dict(q=torch.randn(2, S, Hq, E), k=3 * torch.randn(2, S, Hk, E) + 1)
    for name, heads in (("q_weight", Hq), ("k_weight", Hk)):
        inputs[name] = 1 + 0.3 * torch.randn(E if across == "head" else heads * E) if norm else None
    inputs = {name: None if t is None else t.to(dtype) for name, t in inputs.items()}
    settings = dict(norm=norm, across=across, grid=grid, rotary_dim=rotary_dim, text_len=text_len)
    return inputs, settings | dict(interleaved=interleaved)


def split_of(case):
    n = (case[3] or case[2]) // 2
    side = (case[3] or case[2]) // 6
    return n - 2 * side, side, side


@pytest.mark.parametrize("case", CASES)
def test_formula(case):
    inputs, settings = make(case)
    origin = (3, 0, 11)
    results = qk_norm_rope(**inputs, **settings, origin=origin, theta=300.0, eps=1e-3)
    angle = angles(case[0], split_of(case), 300.0, origin)
    for result, name in zip(results, "qk", strict=True):
        y = normalised(inputs[name], inputs[f"{name}_weight"], case[5], case[6], 1e-3)
        torch.testing.assert_close(result, rotated(y, angle, case[7]), rtol=1e-12, atol=1e-12)


def test_default_split_is_wans():
    x = torch.randn(1, 8, 1, 128, dtype=torch.float64)
    default = qk_norm_rope(x, x, grid=(2, 2, 2))
    given = qk_norm_rope(x, x, grid=(2, 2, 2), split=(22, 21, 21))
    other = qk_norm_rope(x, x, grid=(2, 2, 2), split=(20, 22, 22))
    assert torch.equal(default[0], given[0])
    assert not torch.allclose(default[0], other[0])


def test_origin_continues_a_clip():
    torch.manual_seed(0)
    x = torch.randn(1, 24, 2, 12)
    whole, _ = qk_norm_rope(x, x, grid=(4, 2, 3))
    later, _ = qk_norm_rope(x[:, 12:], x[:, 12:], grid=(2, 2, 3), origin=(2, 0, 0))
    assert torch.equal(whole[:, 12:], later)


def test_freqs_equal_grid():
    inputs, settings = make(CASES[1])
    angle = angles(CASES[1][0], split_of(CASES[1]))
    on_the_fly = qk_norm_rope(**inputs, **settings)
    settings |= dict(grid=None, rotary_dim=None)
    given = qk_norm_rope(**inputs, **settings, freqs=(angle.cos(), angle.sin()))
    for a, b in zip(on_the_fly, given, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@IMPLS
def test_norm_alone_takes_different_lengths(impl, require):
    require("qk_norm_rope", impl)
    torch.manual_seed(0)
    q, k, w = (torch.randn(*s) for s in ((1, 3, 2, 6), (1, 5, 2, 6), (12,)))
    q_out, k_out = qk_norm_rope(q, k, q_weight=w, k_weight=w, across="width", impl=impl)
    torch.testing.assert_close(q_out, normalised(q, w, across="width"))
    torch.testing.assert_close(k_out, normalised(k, w, across="width"))


def test_text_is_normalised_not_rotated():
    torch.manual_seed(0)
    x = torch.randn(1, 10, 2, 6, dtype=torch.float64)
    out, _ = qk_norm_rope(x, x, grid=(1, 2, 3), text_len=4)
    torch.testing.assert_close(out[:, 6:], normalised(x)[:, 6:])
    assert not torch.allclose(out[:, 1:6], normalised(x)[:, 1:6])


# The conventions of public models, as diffusers computes them


def test_wan_in_diffusers():
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    torch.manual_seed(0)
    for E, (T, H, W) in ((12, (3, 2, 5)), (128, (2, 3, 2)), (40, (1, 4, 3))):
        dim, heads = 2 * E, 2
        rope = wan.WanRotaryPosEmbed(E, (1, 2, 2), 64)
        attention = wan.WanAttention(dim, heads, E, eps=1e-5, processor=wan.WanAttnProcessor())
        norm_q = torch.nn.RMSNorm(dim, eps=1e-5)
        torch.nn.init.normal_(norm_q.weight)
        attention.norm_q = norm_q
        seen = {}

        def record(query, key, value, seen=seen, **_):
            seen.update(q=query, k=key)
            return value

        tokens = torch.randn(2, T * H * W, dim)
        freqs = rope(torch.empty(1, 4, T, 2 * H, 2 * W))
        original, wan.dispatch_attention_fn = wan.dispatch_attention_fn, record
        try:
            attention(tokens, rotary_emb=freqs)
        finally:
            wan.dispatch_attention_fn = original
        q, k = (f(tokens).unflatten(2, (heads, E)) for f in (attention.to_q, attention.to_k))
        weights = dict(q_weight=norm_q.weight, k_weight=attention.norm_k.weight)
        ours = qk_norm_rope(q, k, **weights, across="width", grid=(T, H, W), eps=1e-5)
        for a, name in zip(ours, "qk", strict=True):
            torch.testing.assert_close(a, seen[name], rtol=2e-6, atol=2e-6)


def test_hunyuan_video_in_diffusers():
    hunyuan = pytest.importorskip("diffusers.models.transformers.transformer_hunyuan_video")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    torch.manual_seed(0)
    rope = hunyuan.HunyuanVideoRotaryPosEmbed(2, 1, [4, 6, 6], theta=256.0)
    freqs = rope(torch.empty(1, 4, 3, 4, 6))
    x = torch.randn(2, 18 + 5, 2, 16)
    theirs = embeddings.apply_rotary_emb(normalised(x)[:, :18], freqs, sequence_dim=1)
    theirs = torch.cat((theirs, normalised(x)[:, 18:]), 1)
    ours, _ = qk_norm_rope(x, x, grid=(3, 2, 3), split=(2, 3, 3), theta=256.0, text_len=5)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def test_cogvideox_in_diffusers():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    torch.manual_seed(0)
    cos, sin = embeddings.get_3d_rotary_pos_embed(16, ((0, 0), (2, 3)), (2, 3), 4)
    x = torch.randn(1, 24, 2, 16)
    theirs = embeddings.apply_rotary_emb(normalised(x, norm="layer"), (cos, sin), sequence_dim=1)
    ours, _ = qk_norm_rope(x, x, norm="layer", grid=(4, 2, 3), split=(2, 3, 3))
    torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=3e-6)


def test_ltx_turns_the_whole_width():
    ltx = pytest.importorskip("diffusers.models.transformers.transformer_ltx")
    torch.manual_seed(0)
    heads, E = 2, 10
    freqs = ltx.LTXVideoRotaryPosEmbed(heads * E)(torch.empty(1, 12, 3), 2, 2, 3)
    weight, x = torch.randn(heads * E), torch.randn(1, 12, heads, E)
    theirs = ltx.apply_rotary_emb(normalised(x, weight, across="width").flatten(2), freqs)
    wide = x.flatten(2).unsqueeze(2)
    cos, sin = (f[0, :, ::2] for f in freqs)
    ours, _ = qk_norm_rope(wide, wide, q_weight=weight, freqs=(cos, sin))
    torch.testing.assert_close(ours.squeeze(2), theirs, rtol=2e-6, atol=2e-6)


# Numbers


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    inputs, settings = make(case)
    given = {
        name: t[:1].requires_grad_() if t.ndim == 4 else t.requires_grad_()
        for name, t in inputs.items()
        if t is not None
    }
    assert torch.autograd.gradcheck(
        lambda *args: qk_norm_rope(**dict(zip(given, args, strict=True)), **settings),
        tuple(given.values()),
        fast_mode=True,
    )


def check(case, dtype, impl, device="cpu", seed=0, origin=(0, 0, 0)):
    """The error rule on outputs and every gradient, with unwritten memory poisoned."""
    inputs, settings = make(case, dtype, seed)
    inputs = {name: None if t is None else t.to(device) for name, t in inputs.items()}
    grads = [torch.randn(t.shape).to(device, dtype) for t in (inputs["q"], inputs["k"])]
    angle = angles(case[0], split_of(case), origin=origin).to(device)
    with poison_empty():
        ours = outputs_and_grads(lambda **kw: qk_norm_rope(**kw, **settings, origin=origin, impl=impl), inputs, grads)

    def formula(**kw):
        return plain(*(kw[n] for n in ("q", "k", "q_weight", "k_weight")), angle, *case[5:])

    double = {name: None if t is None else t.double() for name, t in inputs.items()}
    oracle = outputs_and_grads(formula, double, [g.double() for g in grads])
    baseline = outputs_and_grads(formula, inputs, grads)
    for name, result in ours.items():
        x = inputs[name.split()[1][0]] if "weight" in name else None
        terms = 1 if x is None else x.numel() // result.numel()
        assert_matches_oracle(result, oracle[name], baseline[name], name, terms)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_error_rule(case, dtype, impl, require):
    require("qk_norm_rope", impl, dtype=dtype, grad=True)
    check(case, dtype, impl)


# What the interpreter has time for; between them every branch of both kernels.
SMALL = [
    ((2, 1, 2), (3, 1), 12, None, 0, "rms", "head", True),
    ((1, 1, 2), (1, 2), 16, 10, 1, "layer", "head", False),
    ((1, 3, 1), (5, 2), 6, 4, 1, "rms", "width", True),
    ((2, 1, 1), (1, 1), 7, 6, 0, "layer", "width", False),
    ((1, 2, 1), (1, 1), 10, None, 0, None, "head", True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL)
def test_error_rule_in_the_interpreter(case, dtype, require):
    require("qk_norm_rope", "triton", dtype=dtype, grad=True)
    check(case, dtype, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [
    *CASES, *SMALL,
    ((4, 9, 16), (40, 40), 128, None, 0, "rms", "width", True),
    ((4, 9, 16), (24, 8), 128, 96, 77, "rms", "head", False),
    ((2, 30, 45), (48, 48), 64, None, 226, "layer", "head", True),
    ((16, 4, 4), (16, 16), 72, None, 3, "rms", "head", True),
    ((3, 5, 7), (24, 24), 112, None, 0, "rms", "head", False),
    ((1, 8, 8), (2, 2), 256, None, 0, "layer", "width", True),
])  # fmt: skip
def test_error_rule_on_gpu(case, dtype, impl):
    check(case, dtype, impl, "cuda")


@IMPLS
def test_angles_are_exact_far_from_the_origin(impl, require):
    """At position 100,000 an angle in fp32 has lost every digit that matters; at 2^30 even its turns."""
    require("qk_norm_rope", impl, grad=True)
    case = ((2, 1, 2), (1, 1), 24, None, 0, None, "head", False)
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
    check((tokens, (40, 3), 8, 6, 1, "rms", across, True), torch.float32, "cpu")


@pytest.mark.parametrize("across", ["head", "width"])
def test_triton_reduces_in_several_steps(across, require, monkeypatch):
    require("qk_norm_rope", "triton", grad=True)
    from sora_kernels.qknorm_rope import kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    check(((1, 1, 3), (3, 1), 4, None, 0, "layer", across, True), torch.float32, "triton")


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
def test_views_into_packed_qkv_are_not_copied(impl, require):
    require("qk_norm_rope", impl, grad=True)
    by_head = torch.randn(3, 1, 2, 4, 8).transpose(2, 3)
    for q, k, _ in (torch.randn(1, 4, 3, 2, 8).unbind(2), torch.randn(1, 4, 2, 3, 8).unbind(3), by_head):
        assert qknorm_op.dense(q) is q, "a view with a dense last axis goes to the kernels as it is"
        ours = qk_norm_rope(q, k, grid=(1, 2, 2), impl=impl)
        expected = qk_norm_rope(q.contiguous(), k.contiguous(), grid=(1, 2, 2), impl=impl)
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


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
@pytest.mark.parametrize("across", ["head", "width"])
def test_backward_repeats_bitwise(across, impl, require):
    require("qk_norm_rope", impl, grad=True)
    case = ((1, 2, 2) if impl == "triton" else (5, 7, 9), (2, 3), 6, 4, 1, "rms", across, True)
    inputs, settings = make(case, torch.float32)
    grads = [torch.randn_like(t) for t in (inputs["q"], inputs["k"])]

    def run():
        return outputs_and_grads(lambda **kw: qk_norm_rope(**kw, **settings, impl=impl), inputs, grads)

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_cpu_results_do_not_depend_on_the_number_of_threads(require):
    require("qk_norm_rope", "cpu", grad=True)
    inputs, settings = make(((5, 7, 9), (2, 3), 6, 4, 1, "rms", "head", True), torch.float32)
    grads = [torch.randn_like(t) for t in (inputs["q"], inputs["k"])]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(outputs_and_grads(lambda **kw: qk_norm_rope(**kw, **settings, impl="cpu"), inputs, grads))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@IMPLS
def test_each_gradient_alone_equals_the_one_computed_with_all_others(impl, require):
    require("qk_norm_rope", impl, grad=True)
    inputs, settings = make(((1, 1, 2), (1, 2), 6, 4, 0, "rms", "head", False), torch.float32)
    grads = [torch.randn_like(t) for t in (inputs["q"], inputs["k"])]
    together = outputs_and_grads(lambda **kw: qk_norm_rope(**kw, **settings, impl=impl), inputs, grads)
    for name in inputs:
        leaf = inputs[name].clone().requires_grad_()
        outputs = qk_norm_rope(**{**inputs, name: leaf}, **settings, impl=impl)
        (alone,) = torch.autograd.grad(outputs, [leaf], grads)
        assert torch.equal(alone, together[f"grad {name}"]), name


SCRIPT = """
import torch
from sora_kernels import qk_norm_rope
torch.manual_seed(0)
q, w = torch.randn(2, 13, 3, 20), torch.randn(60)
settings = dict(across="width", grid=(2, 2, 3), text_len=1, origin=(100, 7, 0))
ours, _ = qk_norm_rope(q, q, q_weight=w, impl="cpu", **settings)
oracle, _ = qk_norm_rope(q.double(), q.double(), q_weight=w.double(), impl="reference", **settings)
print((ours - oracle).abs().max().item())
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


@pytest.mark.parametrize("impl", ["reference", "cpu"])
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
    x, w = torch.empty(shape, requires_grad=True), torch.ones(4, requires_grad=True)
    q, k = qk_norm_rope(x, x, q_weight=w, **(dict(grid=(1, 2, 3)) if shape[1] else {}), impl=impl)
    with poison_empty():
        (q.sum() + k.sum()).backward()
    assert q.shape == k.shape == x.grad.shape == shape
    assert torch.equal(w.grad, torch.zeros(4))


def test_too_wide_for_triton(require):
    require("qk_norm_rope", "triton")
    x = torch.zeros(1, 1, 9, 2048)
    qk_norm_rope(x, x, impl="reference")
    with pytest.raises(Unavailable, match="16384 normalised channels in registers; got 18432"):
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
    (dict(rotary_dim=3), ValueError, "rotary_dim must be even"),
    (dict(rotary_dim=10), ValueError, "at most the head width E=8; got 10"),
    (dict(q=x[..., :7], k=x[..., :7]), ValueError, "rotary_dim must be even.*got 7"),
    (dict(split=(1, 1, 1)), ValueError, r"split \(1, 1, 1\) must sum to rotary_dim/2 = 4; got 3"),
    (dict(split=(5, -1, 0)), ValueError, "split must be at least 0"),
    (dict(theta=0.0), ValueError, "theta must be positive"),
    (dict(eps=0.0), ValueError, "eps must be positive"),
    (dict(origin=(0, 0)), ValueError, "origin must be three integers"),
    (dict(norm="group"), ValueError, "norm must be one of 'rms', 'layer', None; got 'group'"),
    (dict(across="batch"), ValueError, "across must be one of 'head', 'width'"),
    (dict(q_weight=torch.ones(16)), ValueError, r"q_weight must have shape \[8\].*got \[16\]"),
    (dict(across="width", k_weight=torch.ones(8)), ValueError, r"k_weight must have shape \[16\].*got \[8\]"),
    (dict(norm=None, q_weight=torch.ones(8)), ValueError, "with norm=None leave it out"),
    (dict(freqs=(x, x)), ValueError, "not both"),
    (dict(grid=None, freqs=x), TypeError, "freqs must be a pair"),
    (dict(grid=None, freqs=(torch.ones(5, 4),) * 2), ValueError, r"freqs\[0\] must have shape \[6, 4\]"),
    (dict(grid=None, freqs=(torch.ones(6, 5),) * 2), ValueError, "rotary_dim must be even"),
    (dict(grid=None, freqs=(torch.ones(6, 4, requires_grad=True),) * 2), ValueError, "constants here"),
    (dict(grid=None, freqs=(torch.ones(6, 4),) * 2, split=(2, 1, 1)), ValueError, "split belongs to grid"),
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
