"""CUDA C++ as nvcc compiles it, executed without a GPU: norm_modulate against the fp64 oracle."""

from __future__ import annotations

import hashlib
import importlib.util
import pathlib
import re
import shutil
import subprocess

import ptx
import pytest
import torch
import torch.nn.functional as F
from ptx.build import cache_directory
from ptx.parser import kernels

from sora_kernels.testing import assert_matches_oracle

ROOT = pathlib.Path(__file__).parent.parent
SCALAR_TYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
MANGLED = {torch.float16: "6__half", torch.float32: "f", torch.bfloat16: "13__nv_bfloat16"}


@pytest.fixture(scope="module", params=["80", "90a"])
def module(request) -> str:
    """The PTX of modulation.cu, kept on disk beside the core of the executor."""
    if not (nvcc := shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")):
        pytest.skip("nvcc is not installed")
    source = ROOT / "csrc" / "cuda" / "modulation.cu"
    include = pathlib.Path(importlib.util.find_spec("torch").origin).parent / "include"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [source, *sorted((ROOT / "csrc" / "common").glob("*"))]
    key = hashlib.sha256("".join([version, torch.__version__, *(p.read_text() for p in sources)]).encode())
    cached = cache_directory() / f"modulation-{request.param}-{key.hexdigest()[:16]}.ptx"
    if not cached.exists():
        flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-DUSE_CUDA", f"-I{ROOT / 'csrc'}"]
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{request.param}")
        command = [nvcc, "-ptx", f"-arch=compute_{request.param}", *flags, "-isystem", include, "-o", partial, source]
        subprocess.run(command, check=True)
        partial.replace(cached)
    return cached.read_text()


def parameters(x, out, shift, scale, shift_table, scale_table, rms, eps) -> ptx.Struct:
    """NormModulateParams by value."""
    B, S, D = x.shape
    fields, layout = [B, S, D, shift.shape[1]], "<4q"
    for tensor in (x, out):
        fields += [tensor, *tensor.stride()[:2]]
        layout += "Qqq"
    for rows in (shift, scale):
        fields += [rows, SCALAR_TYPES[rows.dtype], *rows.stride()[:2]]
        layout += "Qb7xqq"
    for vector in (None, None, shift_table, scale_table):
        fields += [0 if vector is None else vector, SCALAR_TYPES[torch.float32]]
        layout += "Qb7x"
    return ptx.Struct(layout + "?3xf", (*fields, rms, eps))


CASES = [  # the kernel's traits, D, rows of a block
    ("Li1ELi16", 512, 4), ("Li1ELi48", 1536, 4), ("Li4ELi24", 2048, 1), ("Li16ELi32", 8192, 1), ("loop", 1001, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("traits, D, rows", CASES, ids=[case[0] for case in CASES])
def test_norm_modulate_as_nvcc_compiles_it(module, traits, D, rows, dtype):
    form = f"norm_modulate_loop_kernelI{MANGLED[dtype]}E" if traits == "loop" else f"TraitsI{MANGLED[dtype]}{traits}E"
    (name,) = (n for n in kernels(module) if form in n)
    B, S = 2, 4
    x = torch.randn(B, S, D).to(dtype)
    shift, scale = (torch.randn(B, 2, D).to(dtype) * 0.3 for _ in range(2))
    tables = [torch.randn(D) * 0.1 for _ in range(2)]
    out = ptx.unwritten(B, S, D, dtype=dtype)
    struct = parameters(x, out, shift, scale, *tables, False, 1e-6)
    grid = (-(-B * S // rows),)
    counters = ptx.run_again(module, grid, [struct], 1, name=name, names=["p"])

    def formula(x, shift, scale, tables):
        shift, scale = (t.repeat_interleave(S // 2, 1) + table for t, table in zip((shift, scale), tables, strict=True))
        return F.layer_norm(x, [D], eps=1e-6) * (1 + scale) + shift

    oracle = formula(*(t.double() for t in (x, shift, scale)), [t.double() for t in tables])
    baseline = formula(x, shift, scale, [t.to(dtype) for t in tables])
    assert_matches_oracle(out, oracle, baseline, name)
    if traits != "loop":  # each byte read once from DRAM, each sector written whole
        assert counters.written == out.nbytes // 32
        assert counters.read == (x.nbytes + shift.nbytes + scale.nbytes + 8 * D) // 32
    assert re.search(r"modulation\.cu:\d+", counters.program.origin[10].line[-1])
