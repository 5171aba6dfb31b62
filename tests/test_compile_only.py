"""Performance tests without a GPU: what the Triton compiler makes of every launch, for four generations of GPUs.

Loads must be 16 bytes wide, nothing may spill, shared memory must fit. It is no proof of speed, but a kernel that fails
here is slow everywhere.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

TARGETS = {80: 163, 90: 227, 100: 227, 120: 99}  # compute capability -> KiB of shared memory a block may use
# Rows of 5120 fill the register file: 8 live arrays x 8192 padded columns. A few words then go through L1.
STACK_BYTES = {"D=5120 backward per clip": 64, "D=5120 backward per token": 256}
# One head's weight (two halves of it where halves turn) and angle steps are shorter than a program's 16-byte loads.
NARROW = {"qk_norm_rope_fwd_kernel": 3, "qk_norm_rope_bwd_kernel": 3}


def compiled(tmp_path_factory, *families):
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    targets = ",".join(f"sm_{capability}" for capability in TARGETS)
    script = pathlib.Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, script, targets, *families]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    return compiled(tmp_path_factory)


pytestmark = pytest.mark.compile_only


def test_every_family_with_triton_kernels_is_compiled(rows):
    sources = pathlib.Path(__file__).parent.parent.glob("sora_kernels/*/kernels*.py")
    assert {row["family"] for row in rows} == {p.parent.name for p in sources if "@triton.jit" in p.read_text()}
    assert {row["sm"] for row in rows} == set(TARGETS)


def test_nothing_spills(rows):
    spilled = [r for r in rows if r["local"] or r["stack"] > STACK_BYTES.get(r["case"], 0)]
    assert not spilled, spilled


def test_shared_memory_fits(rows):
    assert all(row["shared"] <= TARGETS[row["sm"]] * 1024 for row in rows)


def test_every_global_load_of_a_dense_row_is_16_bytes_wide(rows):
    """A row of 64 of the per-token backward is one short load per thread, and is left out, as are partials 72 wide."""
    checked = [r for r in rows if r["case"] != "D=64 backward per token" and r["family"] != "attention"]
    checked = [r for r in checked if r["kernel"] != "sum_partials_kernel" or not r["case"].startswith("16x72 ")]
    narrow = [r for r in checked if r["vector_loads"] < r["loads"] - NARROW.get(r["kernel"], 0)]
    assert checked and not narrow, narrow


def check_attention(rows):
    """Tensor cores of each generation, and tiles of q, k, v and dO by loads 16 bytes wide; the other loads are the
    plan's, or a second part of the head that is too narrow for a whole program's 16 bytes per thread."""
    assert {row["kernel"] for row in rows} == {
        "attention_fwd_kernel", "attention_bwd_rows_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel"
    }  # fmt: skip
    for row in rows:
        narrow = "E=256" in row["case"] and "backward" in row["case"]  # tiles of 32 rows: products of warps
        products = "rows" not in row["kernel"] and "float32" not in row["case"] and not narrow
        assert (row["wgmma"] > 0) == (products and row["sm"] == 90), row
        assert (row["tcgen05"] > 0) == (products and row["sm"] == 100), row
        assert row["vector_loads"] >= 2, row


def test_attention_uses_tensor_cores(rows):
    check_attention([row for row in rows if row["family"] == "attention"])


@pytest.mark.slow
def test_attention_of_every_width(tmp_path_factory):
    rows = compiled(tmp_path_factory, "attention_widths")
    check_attention(rows)
    test_shared_memory_fits(rows)
    # On sm_100 ptxas settles for 128 registers and a few words in L1; so it does for heads of 256 and for fp32.
    few = [(r["case"], r["sm"], r["kernel"], r["stack"], r["local"]) for r in rows if r["stack"]]
    assert all(stack <= 32 and not local for *_, stack, local in few), few
    assert all(sm == 100 or "E=256" in case or "float32" in case for case, sm, *_ in few), few
