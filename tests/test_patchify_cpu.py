"""The C++ kernels of the patchify family: what is theirs alone. The error rule is in test_patchify."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from functools import partial

import pytest
import torch
from test_patchify import EMBED, FINAL, embed_inputs, final_grad, final_inputs, op_samples

from sora_kernels import _library, final_layer, patch_embed3d
from sora_kernels.patchify import reference
from sora_kernels.testing import assert_matches_oracle, outputs_and_grads

ROOT = pathlib.Path(__file__).resolve().parent.parent


def calls(impl="auto", dtype=torch.float64):
    """name -> (function, its inputs, a gradient of its output); several blocks of tokens, several chunks"""
    embed, (final, settings) = embed_inputs(EMBED[-2], dtype), final_inputs(FINAL[-2], dtype)
    return {
        "patch_embed3d": (partial(patch_embed3d, impl=impl), embed, torch.randn(5, 70, 70).to(dtype)),
        "final_layer": (partial(final_layer, **settings, impl=impl), final, final_grad(FINAL[-2], dtype)),
    }


CALLS = pytest.mark.parametrize("name", calls())
PRODUCTS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # bf16 may be multiplied in pairs


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_of_nothing_to_multiply_the_bias_remains(impl, require):
    """No channels, or tokens of no width: sums without terms, over several blocks."""
    require("patch_embed3d", impl)
    bias = torch.randn(5)
    tokens = patch_embed3d(torch.empty(1, 0, 10, 10, 10), torch.empty(5, 0, 1, 1, 1), bias, impl=impl)
    assert torch.equal(tokens, bias.expand(1, 1000, 5))


@PRODUCTS
@CALLS
def test_cpu_results_do_not_depend_on_the_number_of_threads(name, dtype, require, for_any_threads):
    require(name, "cpu", dtype=dtype, grad=True)
    function, inputs, grad = calls("cpu", dtype)[name]
    for_any_threads(lambda: outputs_and_grads(function, inputs, [grad]))


ASKED = ["x", "weight", "bias", "shift scale", "weight scale", "x weight", "x shift", "weight shift bias"]


@pytest.mark.parametrize("asked", ASKED)
def test_cpu_gradients_of_a_shared_modulation_row_are_right_whichever_are_asked_for(asked, require):
    """With the weight's gradient those of the row come out of one product, without it from sums over tokens."""
    require("final_layer", "cpu", grad=True)

    (inputs, settings), grad, names = final_inputs(FINAL[-2]), final_grad(FINAL[-2], torch.float32), asked.split()

    def gradients(impl, dtype):
        given = {name: t.float().to(dtype) for name, t in inputs.items()}
        leaves = [given[name].requires_grad_() for name in names]
        return torch.autograd.grad(final_layer(**given, **settings, impl=impl), leaves, grad.to(dtype))

    ours, plain = gradients("cpu", torch.float32), gradients("reference", torch.float32)
    oracle = gradients("reference", torch.float64)
    for name, *values in zip(names, ours, oracle, plain, strict=True):
        assert_matches_oracle(*values, name, terms=130)


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
from test_patchify_cpu import calls
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
    command = [sys.executable, "-c", ISA_SCRIPT, str(ROOT / "tests"), str(tmp_path / "results.pt")]
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
        ("unpatchify3d_fwd", 2, lambda H: 0, "grid: expected three positive integers"),
        ("unpatchify3d_fwd", 4, lambda t: t[0], "out: expected .B, C, T, H, W., got Float .3, 2, 4, 6."),
        ("unpatchify3d_fwd", 4, lambda t: t.half(), "out: expected the dtype of tokens"),
        ("unpatchify3d_bwd", 0, lambda t: t[..., :4], "dout: expected whole patches for a grid of 2 x 2 x 3"),
        ("unpatchify3d_bwd", 0, lambda t: t[:1], r"dout: expected \(B, C, T, H, W\) = \(2, 3, 2, 4, 6\)"),
        ("final_layer_fwd", 0, lambda t: t.mT.contiguous().mT, "x: expected a last stride of 1"),
        ("final_layer_fwd", 1, lambda t: t.expand(2, 5, 5), "shift: expected a number of rows per clip"),
        ("final_layer_fwd", 3, lambda t: t[:11], r"weight: expected \(a multiple of 4, 5\)"),
        ("final_layer_fwd", 5, lambda T: 1, "grid: expected 12 tokens as x has, got 1 x 2 x 3"),
        ("final_layer_fwd", 10, lambda t: t[:, :2], r"out: expected \(B, C, T, H, W\) = \(2, 3, 2, 4, 6\)"),
        ("final_layer_bwd", 0, lambda t: t.half(), "dout: expected the dtype of x"),
        ("final_layer_bwd", 14, lambda t: t[:4], "dweight: expected the shape of weight"),
        ("final_layer_bwd", 12, lambda t: t.expand(2, 5, 5), "dshift: expected"),
    ]  # fmt: skip
    for op, index, change, message in wrong:
        args = list(samples[op])
        args[index] = change(args[index])
        with pytest.raises(RuntimeError, match=message):
            _library.call(op, "cpu")(*args)
