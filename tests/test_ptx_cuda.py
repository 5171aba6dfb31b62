"""CUDA C++ as nvcc compiles it, executed without a GPU: norm_modulate against the fp64 oracle."""

from __future__ import annotations

import re

import ptx
import pytest
import torch
import torch.nn.functional as F
from ptx import nvcc

from sora_kernels.testing import assert_matches_oracle

if not nvcc.find():
    pytest.skip("nvcc is not installed", allow_module_level=True)

CASES = [("Li1ELi16", 512), ("Li1ELi48", 1536), ("Li4ELi24", 2048), ("Li16ELi32", 8192), ("loop", 1001)]


@pytest.mark.parametrize("sm", nvcc.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("traits, D", CASES, ids=[case[0] for case in CASES])
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
