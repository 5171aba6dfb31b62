"""CUDA C++ as nvcc compiles it, executed without a GPU: norm_modulate and its gradients against the fp64 oracle."""

from __future__ import annotations

import re

import ptx
import pytest
import torch
import torch.nn.functional as F
from ptx import nvcc
from ptx.sweeps import in_turns

from sora_kernels import Unavailable, norm_modulate
from sora_kernels.modulation import kernels
from sora_kernels.testing import assert_matches_oracle, outputs_and_grads

if not nvcc.find():
    pytest.skip("nvcc is not installed", allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASES = [("Li1ELi16", 512), ("Li1ELi48", 1536), ("Li4ELi24", 2048), ("Li16ELi32", 8192), ("loop", 1001)]


@pytest.mark.parametrize("traits, D, dtype, sm", in_turns(CASES, DTYPES, list(nvcc.ARCHITECTURES)), ids=str)
def test_norm_modulate_as_nvcc_compiles_it(traits, D, dtype, sm):
    B, S = 2, 4
    x = torch.randn(B, S, D).to(dtype)
    shift, scale = (torch.randn(B, 2, D).to(dtype) * 0.3 for _ in range(2))
    tables = [torch.randn(D) * 0.1 for _ in range(2)]
    out = ptx.unwritten(B, S, D, dtype=dtype)
    assert traits in nvcc.kernel_of(D, dtype)[0]
    counters = nvcc.norm_modulate(sm, x, shift, scale, None, None, *tables, False, 1e-6, out, again=1)

    def formula(x, shift, scale, tables):
        shift, scale = (t.repeat_interleave(S // 2, 1) + table for t, table in zip((shift, scale), tables, strict=True))
        return F.layer_norm(x, [D], eps=1e-6) * (1 + scale) + shift

    oracle = formula(*(t.double() for t in (x, shift, scale)), [t.double() for t in tables])
    baseline = formula(x, shift, scale, [t.to(dtype) for t in tables])
    assert_matches_oracle(out, oracle, baseline, traits)
    if traits != "loop":  # each byte read once from DRAM, each sector written whole
        assert counters.written == out.nbytes // 32
        assert counters.read == (x.nbytes + shift.nbytes + scale.nbytes + 8 * D) // 32
    assert re.search(r"modulation\.cu:\d+", counters.program.origin[10].line[-1])


# width, for rows of one warp, of up to four and of up to twelve; tokens of a clip, modulation rows, programs: chunks of
# a row with and without a rest, rows that a program has whole, one row a token
GRADIENTS = [(264, 11, 1, 1), (2048, 5, 1, 2), (1032, 6, 6, 4), (4096, 4, 2, 3)]


@pytest.mark.parametrize("D, S, F, programs, norm, dtype", in_turns(GRADIENTS, ["layer", "rms"], DTYPES), ids=str)
def test_gradients_of_norm_modulate_as_nvcc_compiles_them(D, S, F, programs, norm, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    rows = {name: torch.randn(2, F, D).to(dtype) * 0.3 for name in ("shift", "scale")}
    vectors = {name: torch.randn(D) * 0.3 for name in ("weight", "bias", "shift_table", "scale_table")}
    if norm == "layer" and F > 1:
        rows |= {"scale": rows["scale"].float()}  # beside tokens of another dtype
    tensors, dout = {"x": torch.randn(2, S, D).to(dtype), **rows, **vectors}, torch.randn(2, S, D).to(dtype)

    def gradients(tensors, dout, impl):
        return outputs_and_grads(lambda **t: norm_modulate(**t, norm=norm, impl=impl), tensors, [dout])

    with nvcc.nvcc_on(80 if norm == "rms" else 90, schedule=2, again=7):
        actual = gradients(tensors, dout, "cuda")
    oracle = gradients({name: t.double() for name, t in tensors.items()}, dout.double(), "reference")
    plain = gradients({name: t.to(dtype) for name, t in tensors.items()}, dout, "reference")
    for name in oracle:
        plain[name] = plain[name].to(actual[name].dtype)
        assert_matches_oracle(actual[name], oracle[name], plain[name], name, 2 * S)


def test_a_gradient_has_the_same_bits_whichever_others_are_wanted():
    x, scale, weight = torch.randn(1, 6, 512), torch.randn(1, 2, 512), torch.randn(512)
    dout, found = torch.randn(1, 6, 512), {}
    for wanted in (("x", "scale", "weight"), ("x",), ("scale",), ("weight",)):
        tensors = dict(x=x, scale=scale, weight=weight)
        leaves = [tensors[name].requires_grad_() for name in wanted]
        with nvcc.nvcc_on(90):
            out = norm_modulate(shift=None, **tensors, impl="cuda")
            for name, grad in zip(wanted, torch.autograd.grad(out, leaves, dout), strict=True):
                assert torch.equal(grad, found.setdefault(name, grad)), (name, wanted)
        for leaf in leaves:
            leaf.requires_grad_(False)


@pytest.mark.parametrize("D, dtype, most", [(1001, torch.float16, 6144), (6152, torch.bfloat16, 6144),
                                             (4612, torch.float32, 4608)], ids=str)  # fmt: skip
def test_gradients_of_rows_that_a_block_does_not_hold_are_unavailable(D, dtype, most):
    x = torch.randn(1, 2, D).to(dtype).requires_grad_()
    message = f"rows of whole 16 bytes and of at most {most} values of {dtype}; got {D}"
    with nvcc.nvcc_on(90), pytest.raises(Unavailable, match=message):
        norm_modulate(x, None, None, impl="cuda")
