"""patch_embed3d, unpatchify3d, final_layer: the formula, the layouts, gradients, contract."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from functools import partial

import pytest
import torch

from sora_kernels import Unavailable, _library, final_layer, norm_modulate, patch_embed3d, unpatchify3d
from sora_kernels.patchify import reference
from sora_kernels.testing import LAYOUTS, arrange, assert_matches_oracle, outputs_and_grads, poison_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = ("reference", "cpu")
RUNS = [*((impl, "cpu") for impl in IMPLS), pytest.param("reference", "cuda", marks=pytest.mark.gpu)]
ROOT = pathlib.Path(__file__).resolve().parent.parent
NORMS = dict(layer=torch.nn.functional.layer_norm, rms=torch.nn.functional.rms_norm)


def op_samples() -> list[tuple[str, tuple]]:
    torch.manual_seed(0)
    empty = torch.empty_like
    video, weight, bias, pos = (
        torch.randn(2, 3, 2, 4, 6),
        torch.randn(5, 3, 1, 2, 2),
        torch.randn(5),
        torch.randn(1, 12, 5),
    )
    tokens = torch.randn(2, 12, 5)
    layout = ([2, 2, 3], [1, 2, 2], 3)
    features, clip = torch.randn(2, 12, 12), torch.randn(2, 3, 2, 4, 6)
    shift, scale, out_weight, out_bias = torch.randn(2, 1, 5), torch.randn(2, 1, 5), torch.randn(12, 5), torch.randn(12)
    inputs = (tokens, shift, scale, out_weight, out_bias)
    settings = ([2, 2, 3], [1, 2, 2], False, 1e-6)
    return [
        ("patch_embed3d_fwd", (video, weight, bias, pos, empty(tokens))),
        ("patch_embed3d_fwd", (video, weight, None, None, empty(tokens))),
        ("patch_embed3d_bwd", (tokens, video, weight, bias, pos, *map(empty, (video, weight, bias, pos)))),
        ("patch_embed3d_bwd", (tokens, video, weight, None, None, None, empty(weight), None, None)),
        ("unpatchify3d_fwd", (features, *layout, empty(clip))),
        ("unpatchify3d_bwd", (clip, *layout, empty(features))),
        ("final_layer_fwd", (*inputs, *settings, empty(clip))),
        ("final_layer_bwd", (clip, *inputs, *settings, *map(empty, inputs))),
        ("final_layer_bwd", (clip, tokens, None, None, out_weight, None, *settings, empty(tokens), *[None] * 4)),
    ]


# patch_embed3d

EMBED = [
    # B, C, (T, H, W) in patches, patch, D, bias, pos
    (2, 3, (2, 3, 4), (1, 2, 2), 5, True, 3),
    (1, 1, (3, 1, 5), (2, 1, 3), 7, True, 2),
    (3, 5, (1, 2, 1), (1, 1, 1), 1, False, 0),
    (1, 16, (1, 1, 1), (1, 2, 2), 33, False, 2),
    (5, 2, (2, 5, 7), (1, 1, 2), 70, True, 2),  # several blocks and chunks; pos summed over clips
    (1, 128, (1, 2, 3), (2, 4, 4), 40, True, 0),  # K = 4096
    (1, 16, (5, 6, 7), (1, 2, 2), 193, True, 3),
]


def embed_inputs(case, dtype=torch.float64):
    B, C, grid, patch, D, bias, pos = case
    torch.manual_seed(0)
    S = grid[0] * grid[1] * grid[2]
    inputs = dict(
        video=torch.randn(B, C, *(n * p for n, p in zip(grid, patch, strict=True))),
        weight=torch.randn(D, C, *patch) / 3,
        bias=torch.randn(D) if bias else None,
        pos={0: None, 2: torch.randn(S, D), 3: torch.randn(B, S, D)}[pos],
    )
    return {name: None if t is None else t.to(dtype) for name, t in inputs.items()}


def conv3d(video, weight, bias, pos):
    """What a model writes: a Conv3d, flattened to tokens, and an addition."""
    tokens = torch.nn.functional.conv3d(video, weight, bias, stride=weight.shape[2:]).flatten(2).mT
    return tokens if pos is None else tokens + pos


@pytest.mark.parametrize("case", EMBED)
def test_patch_embed3d_is_a_strided_conv3d(case):
    inputs = embed_inputs(case)
    B, S, D = case[0], case[2][0] * case[2][1] * case[2][2], case[4]
    grads = [torch.randn(B, S, D, dtype=torch.float64)]
    ours, theirs = (outputs_and_grads(f, inputs, grads) for f in (patch_embed3d, conv3d))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl, device", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EMBED)
def test_patch_embed3d_error_rule(case, dtype, impl, device, require):
    require("patch_embed3d", impl, device, dtype, grad=True)
    inputs = {name: None if t is None else t.to(device) for name, t in embed_inputs(case, dtype).items()}
    double = {name: None if t is None else t.double() for name, t in inputs.items()}
    shape = (case[0], case[2][0] * case[2][1] * case[2][2], case[4])
    grads = [torch.randn(shape).to(device, dtype)]
    with poison_empty():
        ours = outputs_and_grads(partial(patch_embed3d, impl=impl), inputs, grads)
    oracle = outputs_and_grads(conv3d, double, [grads[0].double()])
    baseline = outputs_and_grads(conv3d, inputs, grads)
    for name, result in ours.items():
        terms = shape[0] * shape[1] if name in ("grad weight", "grad bias", "grad pos") else 1
        assert_matches_oracle(result, oracle[name], baseline[name], name, terms)


@pytest.mark.parametrize("impl", IMPLS)
def test_patch_embed3d_rounds_once_for_mixed_dtypes(impl, require):
    require("patch_embed3d", impl, dtype=torch.bfloat16, grad=True)
    inputs = embed_inputs(EMBED[0], torch.float32)
    inputs["video"] = inputs["video"].bfloat16()
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    out = patch_embed3d(**leaves, impl=impl)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {name: t.grad.dtype for name, t in leaves.items()} == {name: t.dtype for name, t in inputs.items()}
    oracle = conv3d(*(t.detach().double() for t in inputs.values()))
    assert (out.double() - oracle).abs().max() <= 2**-8 * oracle.abs().max()


# unpatchify3d


@pytest.mark.parametrize("impl", IMPLS)
def test_unpatchify3d_element_by_element(impl, require):
    require("unpatchify3d", impl)
    (T, H, W), (pt, ph, pw), C = (2, 3, 1), (2, 1, 3), 2
    tokens = torch.arange(2.0 * T * H * W * pt * ph * pw * C).reshape(2, T * H * W, -1)
    out = unpatchify3d(tokens, (T, H, W), (pt, ph, pw), C, impl=impl)
    assert out.shape == (2, C, T * pt, H * ph, W * pw)
    for b, c, f, y, x in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        t, i, h, j, w, k = f // pt, f % pt, y // ph, y % ph, x // pw, x % pw
        assert out[b, c, f, y, x] == tokens[b, (t * H + h) * W + w, ((i * ph + j) * pw + k) * C + c]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_unpatchify3d_inverts_patchify_and_so_does_its_gradient(impl, layout, dtype, require):
    require("unpatchify3d", impl, dtype=dtype, grad=True)
    torch.manual_seed(0)
    video = torch.randn(2, 3, 4, 3, 10).to(dtype)
    tokens = reference.patchify3d(video, (2, 3, 5))
    assert torch.equal(unpatchify3d(tokens, (2, 1, 2), (2, 3, 5), 3, impl=impl), video)
    arranged = arrange(tokens, layout).requires_grad_()
    grad = arrange(video, layout)
    with poison_empty():
        out = unpatchify3d(arranged, (2, 1, 2), (2, 3, 5), 3, impl=impl)
        (result,) = torch.autograd.grad(out, arranged, grad)
    assert torch.equal(out, reference.unpatchify3d(arranged, (2, 1, 2), (2, 3, 5), 3))
    assert torch.equal(result, reference.patchify3d(grad, (2, 3, 5)))


# final_layer

FINAL = [
    # B, grid, patch, C, D, shape of shift, shape of scale, norm, bias
    (2, (2, 2, 3), (1, 2, 2), 3, 8, (2, 1, 8), (2, 1, 8), "layer", True),
    (2, (3, 1, 2), (2, 1, 3), 1, 5, (2, 3, 5), (2, 6, 5), "rms", False),
    (1, (1, 1, 1), (1, 1, 1), 16, 33, (33,), (1, 33), "layer", True),
    (3, (1, 2, 2), (1, 2, 1), 2, 16, None, (16,), "rms", True),
    (1, (2, 1, 2), (1, 1, 2), 2, 6, (1, 2, 6), None, "layer", False),
    (2, (2, 5, 13), (1, 2, 2), 5, 130, (2, 1, 130), (130,), "layer", True),  # a modulation row over several chunks
    (2, (13, 3, 5), (1, 2, 2), 16, 70, (2, 13, 70), (2, 195, 70), "rms", True),  # rows of tokens side by side
]


def final_inputs(case, dtype=torch.float64):
    B, grid, patch, C, D, shift, scale, norm, bias = case
    torch.manual_seed(0)
    features = patch[0] * patch[1] * patch[2] * C
    inputs = dict(
        x=torch.randn(B, grid[0] * grid[1] * grid[2], D) * 2 + 1,
        shift=None if shift is None else torch.randn(shift),
        scale=None if scale is None else torch.randn(scale) / 2,
        weight=torch.randn(features, D) / D**0.5,
        bias=torch.randn(features) if bias else None,
    )
    inputs = {name: None if t is None else t.to(dtype) for name, t in inputs.items()}
    return inputs, dict(grid=grid, patch=patch, norm=norm)


def composition(x, shift, scale, weight, bias, *, grid, patch, norm):
    """Norm, modulate, linear, einops' rearrange: everything in the dtype of x."""

    def rows(t):
        t = t[:, None] if t.ndim == 2 else t
        return t if t.ndim == 1 else t.repeat_interleave(x.shape[1] // t.shape[1], 1)

    y = NORMS[norm](x, x.shape[-1:], eps=1e-6)
    y = y if scale is None else y * (1 + rows(scale))
    y = y if shift is None else y + rows(shift)
    y = torch.nn.functional.linear(y, weight, bias)
    (T, H, W), (pt, ph, pw) = grid, patch
    y = y.reshape(-1, T, H, W, pt, ph, pw, weight.shape[0] // (pt * ph * pw))
    return torch.einsum("bthwijkc->bctihjwk", y).reshape(-1, y.shape[-1], T * pt, H * ph, W * pw)


def final_grad(case, dtype):
    B, grid, patch, C = case[:4]
    return torch.randn(B, C, *(n * p for n, p in zip(grid, patch, strict=True))).to(dtype)


@pytest.mark.parametrize("case", FINAL)
def test_final_layer_is_the_composition(case):
    inputs, settings = final_inputs(case)
    grads = [final_grad(case, torch.float64)]
    ours, theirs = (
        outputs_and_grads(lambda f=f, **kw: f(**kw, **settings), inputs, grads) for f in (final_layer, composition)
    )
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11)


def test_final_layer_is_the_ops_one_after_another():
    inputs, settings = final_inputs(FINAL[1])
    x, shift, scale, weight, _ = inputs.values()
    tokens = norm_modulate(x, shift, scale, norm="rms") @ weight.T
    expected = unpatchify3d(tokens, settings["grid"], settings["patch"], 1)
    torch.testing.assert_close(final_layer(**inputs, **settings), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl, device", RUNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FINAL)
def test_final_layer_error_rule(case, dtype, impl, device, require):
    require("final_layer", impl, device, dtype, grad=True)
    inputs, settings = final_inputs(case, dtype)
    inputs = {name: None if t is None else t.to(device) for name, t in inputs.items()}
    double = {name: None if t is None else t.double() for name, t in inputs.items()}
    grad = final_grad(case, dtype).to(device)
    with poison_empty():
        ours = outputs_and_grads(partial(final_layer, **settings, impl=impl), inputs, [grad])
    oracle = outputs_and_grads(lambda **kw: composition(**kw, **settings), double, [grad.double()])
    baseline = outputs_and_grads(lambda **kw: composition(**kw, **settings), inputs, [grad])
    for name, result in ours.items():
        terms = 1 if name in ("output0", "grad x") else case[0] * inputs["x"].shape[1]
        assert_matches_oracle(result, oracle[name], baseline[name], name, terms)


# All of them


def calls(impl="auto", dtype=torch.float64):
    """name -> (function, its inputs, a gradient of its output); several blocks of tokens, several chunks"""
    embed, (final, settings) = embed_inputs(EMBED[4], dtype), final_inputs(FINAL[5], dtype)
    return {
        "patch_embed3d": (partial(patch_embed3d, impl=impl), embed, torch.randn(5, 70, 70).to(dtype)),
        "final_layer": (partial(final_layer, **settings, impl=impl), final, final_grad(FINAL[5], dtype)),
    }


CALLS = pytest.mark.parametrize("name", calls())
PRODUCTS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # bf16 may be multiplied in pairs


@PRODUCTS
@CALLS
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", [*LAYOUTS[1:], "channels last", "transposed clips"])
def test_memory_layout_of_inputs_and_gradients_does_not_change_a_bit(layout, impl, name, dtype, require):
    require(name, impl, dtype=dtype, grad=True)
    function, inputs, grad = calls(impl, dtype)[name]

    def arranged(t):
        if t is None or layout in LAYOUTS:
            return t if t is None else arrange(t, layout)
        if layout == "transposed clips":
            return t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 2 else t
        return t.contiguous(memory_format=torch.channels_last_3d) if t.ndim == 5 else t

    awkward = {n: arranged(t) for n, t in inputs.items()}
    dense = {n: None if t is None else t.clone().contiguous() for n, t in awkward.items()}
    ours = outputs_and_grads(function, awkward, [arranged(grad)])
    expected = outputs_and_grads(function, dense, [arranged(grad).contiguous()])
    for n, result in ours.items():
        if impl == "cpu":
            assert torch.equal(result, expected[n]), n
        else:  # a library's matrix product may take another order of sums for other strides
            tolerance = 1e-4 if dtype == torch.float32 else 2**-7
            torch.testing.assert_close(result, expected[n], rtol=tolerance, atol=tolerance)


@CALLS
def test_gradcheck(name):
    function, inputs, _ = calls()[name]
    given = {n: t.requires_grad_() for n, t in inputs.items() if t is not None}
    absent = {n: None for n, t in inputs.items() if t is None}
    assert torch.autograd.gradcheck(
        lambda *args: function(**dict(zip(given, args, strict=True)), **absent), tuple(given.values()), fast_mode=True
    )


@CALLS
@pytest.mark.parametrize("impl", IMPLS)
def test_backward_repeats_bitwise(impl, name, require):
    require(name, impl, grad=True)
    function, inputs, grad = calls(impl, torch.float32)[name]
    first, second = (outputs_and_grads(function, inputs, [grad]) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@PRODUCTS
@CALLS
@pytest.mark.parametrize("impl", IMPLS)
def test_each_gradient_alone_equals_the_one_computed_with_all_others(impl, name, dtype, require):
    require(name, impl, dtype=dtype, grad=True)
    function, inputs, grad = calls(impl, dtype)[name]
    together = outputs_and_grads(function, inputs, [grad])
    for n, t in inputs.items():
        leaf = t.clone().requires_grad_()
        with poison_empty():
            (alone,) = torch.autograd.grad(function(**inputs | {n: leaf}), leaf, grad)
        assert torch.equal(alone, together[f"grad {n}"]), n


@CALLS
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl, name, require):
    require(name, impl, grad=True)
    function, inputs, grad = calls(impl, torch.float32)[name]
    expected = outputs_and_grads(function, inputs, [grad])
    with torch.autocast("cpu", torch.bfloat16):
        ours = outputs_and_grads(function, inputs, [grad])
    assert all(torch.equal(ours[n], expected[n]) for n in expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl, require):
    require("patch_embed3d", impl, grad=True)
    for shape in ((0, 3, 2, 4, 6), (2, 3, 0, 4, 6)):
        video = torch.empty(shape, requires_grad=True)
        S = shape[2] * 6
        weight, bias, pos = (torch.randn(s, requires_grad=True) for s in ((5, 3, 1, 2, 2), (5,), (S, 5)))
        with poison_empty():
            tokens = patch_embed3d(video, weight, bias, pos=pos, impl=impl)
            tokens.sum().backward()
        assert tokens.shape == (shape[0], S, 5)
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in (weight, bias, pos))
    x, shift, scale, weight = (torch.randn(s, requires_grad=True) for s in ((0, 6, 4), (4,), (0, 4), (8, 4)))
    with poison_empty():
        out = final_layer(x, shift, scale, weight, grid=(1, 2, 3), patch=(1, 2, 2), impl=impl)
        out.sum().backward()
    assert out.shape == (0, 2, 1, 4, 6) and x.grad.shape == x.shape and scale.grad.shape == scale.shape
    assert torch.equal(shift.grad, torch.zeros(4)) and torch.equal(weight.grad, torch.zeros(8, 4))
    assert unpatchify3d(torch.empty(0, 6, 8), (1, 2, 3), (1, 2, 2), 2, impl=impl).shape == (0, 2, 1, 4, 6)


@pytest.mark.parametrize("impl", IMPLS)
def test_of_nothing_to_multiply_the_bias_remains(impl, require):
    """No channels, or tokens of no width: sums without terms, over several blocks."""
    require("patch_embed3d", impl)
    bias = torch.randn(5)
    tokens = patch_embed3d(torch.empty(1, 0, 10, 10, 10), torch.empty(5, 0, 1, 1, 1), bias, impl=impl)
    assert torch.equal(tokens, bias.expand(1, 1000, 5))


# The C++ kernels


@PRODUCTS
@CALLS
def test_cpu_results_do_not_depend_on_the_number_of_threads(name, dtype, require):
    require(name, "cpu", dtype=dtype, grad=True)
    function, inputs, grad = calls("cpu", dtype)[name]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(outputs_and_grads(function, inputs, [grad]))
    finally:
        torch.set_num_threads(threads)
    for n, expected in results[0].items():
        assert all(torch.equal(other[n], expected) for other in results[1:]), n


def test_cpu_reads_a_strided_video_where_it_lies(require, monkeypatch):
    require("patch_embed3d", "cpu")
    wide = torch.randn(2, 5, 7, 8, 12).contiguous(memory_format=torch.channels_last_3d)
    video, weight = wide[:, 1:4, ::2, 2:6, 3:9], torch.randn(5, 3, 1, 2, 2)
    op, seen = _library.call("patch_embed3d_fwd", "cpu"), []
    monkeypatch.setattr(_library, "call", lambda *_: lambda v, *args: (seen.append(v), op(v, *args)))
    out = patch_embed3d(video, weight, impl="cpu")
    assert seen[0].data_ptr() == video.data_ptr() and seen[0].stride() == video.stride()
    torch.testing.assert_close(out, reference.patch_embed3d(video, weight), rtol=1e-5, atol=1e-5)


def test_cpu_offsets_beyond_32_bits(require):
    """One stored frame seen as clips 2^30 elements apart: address space, hardly memory."""
    require("patch_embed3d", "cpu")
    storage = torch.empty(4 * 2**30 + 48, dtype=torch.bfloat16)  # never touched between the clips
    video = storage.as_strided((5, 3, 1, 4, 4), (2**30, 16, 16, 4, 1))
    video.copy_(torch.randn(5, 3, 1, 4, 4))
    weight = torch.randn(7, 3, 1, 2, 2)
    expected = patch_embed3d(video.contiguous(), weight, impl="cpu")
    assert torch.equal(patch_embed3d(video, weight, impl="cpu"), expected)


ISA_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from sora_kernels.testing import outputs_and_grads
from tests.test_patchify import calls
results = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for name, (function, inputs, grad) in calls("cpu", dtype).items():
        plain = calls("reference")[name][0]
        double = outputs_and_grads(plain, {n: t.double() for n, t in inputs.items()}, [grad.double()])
        ours, baseline = (outputs_and_grads(f, inputs, [grad]) for f in (function, plain))
        results[f"{name} {dtype}"] = ours, double, baseline
torch.save(results, sys.argv[2])
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_cpu_meets_the_error_rule_on_each_instruction_set(isa, tmp_path, require):
    require("patch_embed3d", "cpu", grad=True)
    command = [sys.executable, "-c", ISA_SCRIPT, str(ROOT), str(tmp_path / "results.pt")]
    run = subprocess.run(command, env=os.environ | {"SORA_KERNELS_CPU_ISA": isa}, capture_output=True, text=True)
    if "this CPU supports no more than" in run.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert run.returncode == 0, run.stderr
    for call, (actual, oracle, plain) in torch.load(tmp_path / "results.pt").items():
        for name in oracle:
            terms = 1 if name in ("output0", "grad x", "grad video") else 350
            assert_matches_oracle(actual[name], oracle[name], plain[name], f"{call} {name}", terms)


def test_cpu_private_ops_refuse_what_they_cannot_read(require):
    require("patch_embed3d", "cpu")
    samples = {}
    for op, args in op_samples():
        samples.setdefault(op, args)
    wrong = [
        ("patch_embed3d_fwd", 0, lambda t: t.double(), r"video: expected float32.*Double"),
        ("patch_embed3d_fwd", 0, lambda t: t[:, :, :, :3], "video: expected multiples of the patch .1, 2, 2."),
        ("patch_embed3d_fwd", 1, lambda t: t[:, :2], "weight: expected .D, C, pt, ph, pw. with C = 3"),
        ("patch_embed3d_fwd", 1, lambda t: t.mT.contiguous().mT, "weight: expected a contiguous tensor"),
        ("patch_embed3d_fwd", 2, lambda t: t[:4], r"bias: expected \(length,\) = \(5\), got Float \(4\)"),
        ("patch_embed3d_fwd", 3, lambda t: t[:, :11], r"pos: expected \(1 or B, S, D\) = \(1, 12, 5\)"),
        ("patch_embed3d_fwd", 4, lambda t: t.half(), "out: expected the dtype of video"),
        ("patch_embed3d_fwd", 4, lambda t: t.mT.contiguous().mT, "out: expected a last stride of 1"),
        ("patch_embed3d_bwd", 0, lambda t: t[:, :11], r"dout: expected \(B, S, D\) = \(2, 12, 5\)"),
        ("patch_embed3d_bwd", 5, lambda t: t[:1], "dvideo: expected the shape of video"),
        ("patch_embed3d_bwd", 6, lambda t: t.mT.contiguous().mT, "dweight: expected a contiguous tensor"),
        ("patch_embed3d_bwd", 8, lambda t: t.expand(2, 12, 5), r"dpos: expected the shape of pos = \(1, 12, 5\)"),
        ("unpatchify3d_fwd", 0, lambda t: t[:, :11], r"tokens: expected \(B, S, features\) = \(2, 12, 12\)"),
        ("unpatchify3d_fwd", 2, lambda p: p[:2], "patch: expected three positive integers"),
        ("unpatchify3d_fwd", 4, lambda t: t.half(), "out: expected the dtype of tokens"),
        ("unpatchify3d_bwd", 0, lambda t: t[..., :4], r"dout: expected \(B, C, T, H, W\) = \(2, 3, 2, 4, 6\)"),
        ("final_layer_fwd", 0, lambda t: t.mT.contiguous().mT, "x: expected a last stride of 1"),
        ("final_layer_fwd", 1, lambda t: t.expand(2, 5, 5), "shift: expected a number of rows per clip"),
        ("final_layer_fwd", 3, lambda t: t[:11], r"weight: expected \(a multiple of 4, 5\)"),
        ("final_layer_fwd", 5, lambda g: [2, 2, 2], "grid: expected 12 tokens as x has, got 2 x 2 x 2"),
        ("final_layer_fwd", 9, lambda t: t[:, :2], r"out: expected \(B, C, T, H, W\) = \(2, 3, 2, 4, 6\)"),
        ("final_layer_bwd", 0, lambda t: t.half(), "dout: expected the dtype of x"),
        ("final_layer_bwd", 13, lambda t: t[:4], "dweight: expected the shape of weight"),
        ("final_layer_bwd", 11, lambda t: t.expand(2, 5, 5), "dshift: expected"),
    ]  # fmt: skip
    for op, index, change, message in wrong:
        args = list(samples[op])
        args[index] = change(args[index])
        with pytest.raises(RuntimeError, match=message):
            _library.call(op, "cpu")(*args)


def test_compiles_whole_with_dynamic_shapes():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(video, weight, out_weight, shift, scale):
        grid = (video.shape[2], video.shape[3] // 2, video.shape[4] // 2)
        tokens = patch_embed3d(video, weight)
        video = final_layer(tokens, shift, scale, out_weight, grid=grid, patch=(1, 2, 2))
        return unpatchify3d(tokens, grid, (1, 1, 1), tokens.shape[2]).sum() + video.sin().sum()

    for size in ((2, 4, 6), (3, 2, 8)):
        torch.manual_seed(0)
        shapes = (2, 3, *size), (5, 3, 1, 2, 2), (12, 5), (2, 1, 5), (5,)
        tensors = [torch.randn(s, requires_grad=True) for s in shapes]
        eager = run._torchdynamo_orig_callable(*tensors)
        compiled = run(*tensors)
        assert torch.equal(compiled, eager)
        for a, b in zip(torch.autograd.grad(compiled, tensors), torch.autograd.grad(eager, tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


video, weight = torch.zeros(2, 3, 2, 4, 6), torch.zeros(5, 3, 1, 2, 2)
tokens = torch.zeros(2, 12, 12)
ERRORS = {
    patch_embed3d: (
        dict(video=video, weight=weight),
        [
            (dict(video=[1]), TypeError, "video must be a tensor .B, C, T, H, W.; got list"),
            (dict(video=video[0]), ValueError, "video must be .B, C, T, H, W.; got shape .3, 2, 4, 6."),
            (dict(video=video.long()), TypeError, "video must be float32"),
            (dict(weight=weight[0]), ValueError, "weight must be .D, C, pt, ph, pw."),
            (dict(weight=weight[:, :2]), ValueError, "video's C=3 channels; got 2"),
            (dict(weight=torch.zeros(5, 3, 1, 3, 2)), ValueError, "video's H must be a multiple of the patch 3; got 4"),
            (dict(weight=torch.zeros(5, 3, 1, 0, 2)), ValueError, "the patch .* must be at least 1"),
            (dict(bias=torch.zeros(4)), ValueError, r"bias must have shape \[5\].*got \[4\]"),
            (dict(pos=torch.zeros(11, 5)), ValueError, r"pos must have shape \[12, 5\].*got \[11, 5\]"),
            (dict(pos=torch.zeros(1, 12, 5)), ValueError, r"pos must have shape \[2, 12, 5\]"),
            (dict(bias=torch.zeros(5, device="meta")), ValueError, "bias must be on video's device"),
            (dict(impl="cuda"), Unavailable, "reference: usable"),
        ],
    ),
    unpatchify3d: (
        dict(tokens=tokens, grid=(2, 2, 3), patch=(1, 2, 2), channels=3),
        [
            (dict(tokens=tokens[0]), ValueError, "tokens must be"),
            (dict(grid=(2, 2, 2)), ValueError, r"grid \(2, 2, 2\) makes 8 tokens; tokens has 12"),
            (dict(grid=(2.0, 2, 3)), ValueError, "grid must be three integers"),
            (dict(patch=(1, -2, 2)), ValueError, "patch must be at least 1"),
            (dict(channels=4), ValueError, r"pt\*ph\*pw\*C = 16 features for patch \(1, 2, 2\) and channels 4; got 12"),
            (dict(channels=0), ValueError, "channels must be an integer of at least 1; got 0"),
            (dict(impl="cuda"), Unavailable, "reference: usable"),
        ],
    ),
    final_layer: (
        dict(x=tokens, shift=None, scale=None, weight=torch.zeros(8, 12), grid=(2, 2, 3), patch=(1, 2, 2)),
        [
            (dict(x=tokens[0]), ValueError, "x must be"),
            (dict(grid=(1, 2, 3)), ValueError, "makes 6 tokens; x has 12; text tokens must be cut off first"),
            (dict(shift=torch.zeros(2, 5, 12)), ValueError, "shift has F=5 rows, which must divide S=12"),
            (dict(scale=torch.zeros(3, 12)), ValueError, "scale must be .*B=2, S=12, D=12.*got .3, 12."),
            (dict(weight=torch.zeros(8, 11)), ValueError, "x's width D=12; got 11"),
            (dict(weight=torch.zeros(7, 12)), ValueError, r"multiple of pt\*ph\*pw = 4 rows for patch .*; got 7"),
            (dict(bias=torch.zeros(7)), ValueError, r"bias must have shape \[8\]"),
            (dict(norm="batch"), ValueError, "norm must be one of 'layer', 'rms'"),
            (dict(eps=-1.0), ValueError, "eps must be positive"),
            (dict(weight=torch.zeros(8, 12, device="meta")), ValueError, "weight must be on x's device"),
            (dict(impl="cuda"), Unavailable, "reference: usable"),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "function, change, error, message",
    [(f, *case) for f, (_, cases) in ERRORS.items() for case in cases],
    ids=[f"{f.__name__}-{m}" for f, (_, cases) in ERRORS.items() for _, _, m in cases],
)
def test_errors(function, change, error, message):
    with pytest.raises(error, match=message) as caught:
        function(**ERRORS[function][0] | change)
    assert function.__name__ in str(caught.value)
