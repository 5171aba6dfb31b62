"""Performance tests without a GPU: what the Triton compiler makes of every launch, for four generations of GPUs.

Loads must be 16 bytes wide, nothing may spill, shared memory must fit. It is no proof of speed, but a kernel that fails
here is slow everywhere. What was recorded of a kernel is not compiled again while the compiler would be given the same;
a few are, so that the record is known to be of this tree, and all of them by `pytest -m slow`.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import pathlib
import subprocess
import sys

import hazards
import pytest

SOURCES = pathlib.Path(__file__).parent.parent.glob("sora_kernels/*/kernels*.py")
FAMILIES = sorted({p.parent.name for p in SOURCES if "@triton.jit" in p.read_text()})
TARGETS = {80: 163, 90: 227, 100: 227, 120: 99}  # compute capability -> KiB of shared memory a block may use
# Rows of 5120 fill the register file: 8 live arrays x 8192 padded columns. A few words then go through L1.
STACK_BYTES = {"D=5120 backward per clip": 64, "D=5120 backward per token": 256}
# Nothing is aligned and the weight is of another dtype: an address for every element, and three products for one.
STACK_BYTES |= {"embed forward C=3 D=33": 104, "embed backward C=3 D=33": 16, "final forward C=3 D=33": 16}
STACK_BYTES |= {"odd 33 forward": 8}
STACK_BYTES |= {"group C=33 channels last backward": 16}
# A backward that is capped at 200 registers, so that more programs fit an SM.
STACK_BYTES |= {f"rms C={C} channels last backward": 24 for C in (192, 384)}
# A program's place, divided out of one number, lives as long as its sums.
STACK_BYTES |= {"rms C=96 channels first backward": 8}
ATTENTION = ("attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkdv_kernel")
LAYERS = ("Wan", "Hunyuan")  # how the cases of convolutions begin
# One head's weight (two halves of it where halves turn) and angle steps are shorter than a program's 16-byte loads.
NARROW = {"qk_norm_rope_fwd_kernel": 3, "qk_norm_rope_bwd_kernel": 3}
# The gradient of a token's sum.
NARROW |= {"qk_norm_stats_bwd_kernel": 1}
# Bias, the shared rows of scale and shift, and the statistics of tokens: vectors in the layout of the tile they meet.
NARROW |= {"final_layer_fwd_kernel": 10, "final_layer_bwd_kernel": 34}
# Parameters and statistics of channels, read once by a program, and three values of the group of each channel.
NARROW |= {"norm_silu_fwd_kernel": 12, "norm_silu_bwd_kernel": 6, "moments_kernel": 24}
NARROW |= {"epilogue_kernel": 6}
# The index of a token, and the order that it makes: words.
INDEXED = {"modulation_fwd_kernel": 1, "modulation_bwd_kernel": 5, "sum_runs_kernel": 2}
# Partial sums of a group, which is 4 channels wide.
PARTIALS = {"statistics_kernel", "sums_kernel"}
# A video is gathered as wide as the patch has neighbours in it, two elements for Wan.
GATHERS = {"patch_embed3d_fwd_kernel", "patch_embed3d_dweight_kernel"}
# And pixels, of three single bytes.
GATHERS |= {"embed_watermark_kernel"}
# And so are the features of a decoder's patches, where channels lie side by side.
STRIDED = "frames of patches channels last"
ODD = " C=3 D=33"  # rows of 33 and patches (2, 3, 5): no 16 bytes are aligned
ODD_CHANNELS = "group C=33 "  # nor of 33 channels, or of 105 pixels


# Written by: python tests/compile_kernels.py sm_80,sm_90,sm_100,sm_120 [family ...] --into (this file)
TABLE = pathlib.Path(__file__).parent.parent / "benchmarks/results/compiled/sass.jsonl"
RECORDED = [json.loads(line) for line in TABLE.read_text().splitlines()]
# Compiled again whatever is recorded: products on wgmma and without them, passes over memory, one for every GPU.
AGAIN = ("E=128 bfloat16 dense forward", "gates of 12x72", "Wan up forward", "sums of 6x128", "mark 4x480x832")


def compiled(tmp_path_factory, *processes, known=None):
    """What compile_kernels.py prints for these families, several of them with commas between them in one process."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    targets = ",".join(f"sm_{capability}" for capability in TARGETS)
    script = pathlib.Path(__file__).with_name("compile_kernels.py")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    rest = ["--known", known] if known else []
    commands = [[sys.executable, script, targets, *families.split(","), *rest] for families in processes]
    rows = []
    for process in [subprocess.Popen(command, **pipes) for command in commands]:
        out, error = process.communicate()
        assert process.returncode == 0, error
        rows += [json.loads(line) for line in out.splitlines()]
    return rows


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    pytest.importorskip("triton", reason="triton is not installed")
    if importlib.metadata.version("triton") != RECORDED[0]["triton"]:
        return compiled(tmp_path_factory, *FAMILIES)
    again = {row["given"] for row in RECORDED if row["case"].startswith(AGAIN)}
    known = tmp_path_factory.mktemp("rows") / "known.jsonl"
    known.write_text("".join(json.dumps(row) + "\n" for row in RECORDED if row["given"] not in again))
    assert {row["sm"] for row in RECORDED if row["given"] in again} == set(TARGETS)
    return compiled(tmp_path_factory, ",".join(FAMILIES), known=known)


pytestmark = pytest.mark.compile_only


def test_every_family_with_triton_kernels_is_compiled(rows):
    assert {(row["family"], row["sm"]) for row in rows} == set(itertools.product(FAMILIES, TARGETS))


def test_nothing_spills(rows):
    spilled = [r for r in rows if r["local"] or r["stack"] > STACK_BYTES.get(r["case"], 0)]
    assert not spilled, spilled


def test_shared_memory_fits(rows):
    assert all(row["shared"] <= TARGETS[row["sm"]] * 1024 for row in rows)


def test_every_global_load_of_a_dense_row_is_16_bytes_wide(rows):
    """A row of 64 of the per-token backward is one short load per thread, and is left out, as are partials 72 wide."""
    checked = [r for r in rows if r["family"] != "attention" and r["case"].split()[0] not in LAYERS]  # as below
    checked = [r for r in checked if r["case"] != "D=64 backward per token"]
    checked = [r for r in checked if r["kernel"] != "sum_partials_kernel" or not r["case"].startswith("16x72 ")]
    checked = [r for r in checked if r["kernel"] != "sum_partials_kernel" or r["family"] != "patchify"]
    checked = [r for r in checked if r["kernel"] not in GATHERS | PARTIALS and not r["case"].endswith(ODD)]
    checked = [r for r in checked if not r["case"].startswith((ODD_CHANNELS, STRIDED))]
    checked = [r for r in checked if r["kernel"] != "unpatchify3d_kernel" or " C=4 " not in r["case"]]  # 8 bytes a row
    few = {r["case"]: INDEXED if r["case"].endswith("by index") else NARROW for r in checked}
    narrow = [r for r in checked if r["vector_loads"] < r["loads"] - few[r["case"]].get(r["kernel"], 0)]
    assert checked and not narrow, narrow


def test_every_asynchronous_copy_is_16_bytes_wide(rows):
    """What a pipelined loop prefetches: tiles of tokens and weights. Left out: the statistics, a word a token, and
    fp32, whose tiles are as narrow as the registers of its products allow."""
    checked = [r for r in rows if r["family"] == "patchify" and not r["case"].endswith((ODD, "D=1536"))]
    narrow = [r for r in checked if r["vector_copies"] < r["copies"] and r["kernel"] != "final_layer_bwd_kernel"]
    assert any(r["copies"] for r in checked) and not narrow, narrow


def test_16_bit_products_of_patches_run_on_the_tensor_cores_of_hopper_and_blackwell(rows):
    """fp32 is multiplied in fp32; 256 sums a token leave room for 32 tokens, half of what wgmma takes."""
    found = {90: "wgmma", 100: "tcgen05"}
    checked = [r for r in rows if r["case"].endswith(" C=16 D=5120") and r["sm"] in found]
    checked = [r for r in checked if r["kernel"] not in ("unpatchify3d_kernel", "sum_partials_kernel")]
    assert len(checked) == 12 and all(r[found[r["sm"]]] for r in checked), checked


def check_attention(rows):
    """Tensor cores of each generation, and tiles of q, k, v and dO by loads 16 bytes wide; the other loads are the
    plan's, or a second part of the head that is too narrow for a whole program's 16 bytes per thread."""
    assert {row["kernel"] for row in rows} == {*ATTENTION, "attention_bwd_rows_kernel"}
    for row in rows:
        narrow = "E=256" in row["case"] and "backward" in row["case"]  # tiles of 32 rows: products of warps
        products = "rows" not in row["kernel"] and "float32" not in row["case"] and not narrow
        assert (row["wgmma"] > 0) == (products and row["sm"] == 90), row
        assert (row["tcgen05"] > 0) == (products and row["sm"] == 100), row
        assert row["vector_loads"] >= 2, row


def test_attention_uses_tensor_cores(rows):
    """Gates of its heads multiply no matrices."""
    check_attention([row for row in rows if row["family"] == "attention" and not row["case"].startswith("gates ")])


def test_attention_loads_boxes_through_the_tma(rows):
    rows = [row for row in rows if row["case"].startswith("boxes") and row["kernel"] != "attention_bwd_rows_kernel"]
    assert {(row["sm"], row["kernel"]) for row in rows} == set(itertools.product((90, 100), ATTENTION))
    loops = {"attention_bwd_dkdv_kernel": 1}  # of two boxes each, before it and in it
    assert all(row["boxes"] >= 4 * loops.get(row["kernel"], 2) and not row["vector_copies"] for row in rows), rows
    assert all(row["copies"] <= 12 for row in rows), "what is left are words: the plan's, delta and LSE"


def test_the_table_of_what_ptxas_made_is_that_of_this_tree(rows):
    """Registers, stack, shared memory, occupancy, groups of wgmma: what a change costs shows in that file."""
    check_table(rows)


def check_table(rows):
    if (installed := importlib.metadata.version("triton")) != RECORDED[0]["triton"]:
        pytest.skip(f"the table is of triton {RECORDED[0]['triton']}, here is {installed}")
    changed = [row for row in rows if row not in RECORDED]
    assert not changed, [tuple(row[name] for name in ("family", "case", "sm", "kernel")) for row in changed]
    assert len(RECORDED) == len(rows), "rows of kernels that are gone"


PRODUCTS = {  # kernels of matrix products on wgmma
    *ATTENTION, "conv_kernel", "dweight_kernel", "patch_embed3d_fwd_kernel", "patch_embed3d_dvideo_kernel",
    "patch_embed3d_dweight_kernel", "final_layer_fwd_kernel", "final_layer_bwd_kernel",
}  # fmt: skip


def check_products(rows):
    """ptxas leaves wgmma asynchronous: it does not wait after every single one, and says so when it does. And nothing
    is prefetched into memory that a product in flight reads."""
    rows = [row for row in rows if row["wgmma"]]
    serialized = [row for row in rows if row["serialized"] or row["drains"] == row["hgmma"]]
    assert rows and not serialized, serialized
    overwritten = [row for row in rows if row["overwritten"]]
    assert not overwritten, overwritten


LOOP = """
    %w = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x64x64xbf16, #shared, #smem, mutable>
    %a = ttg.memdesc_index %w[%c0_i32] : types
    %b = ttg.async_copy_global_to_local %p, %a mask %m : types
    %c = ttg.memdesc_index %w[%c1_i32] : types
    %d = ttg.async_copy_global_to_local %p, %c mask %m : types
    %z:3 = scf.for %i = %c0 to %D step %c64 iter_args(%sum = %zero, %at = %c0, %next = %c1) -> types {{
      %e = ttg.memdesc_index %w[%at] : types
      %f = ttg.memdesc_trans %e {{order = array<i32: 1, 0>}} : types
      %g = ttng.warp_group_dot %x, %f, %sum {{isAsync = true}} : types
      %h:2 = ttng.warp_group_dot_wait %g, %f {{pendings = {pending} : i32}} : types
      %j = ttg.memdesc_index %w[%next] : types
      %k = ttg.async_copy_global_to_local %p, %j mask %m : types
      scf.yield %h#0, %at, %next : types
    }} loc(#loc)
"""


@pytest.mark.parametrize("buffers, pending, faults", [(2, 0, 0), (2, 1, 1), (3, 1, 0), (3, 2, 1), (4, 2, 0)])
def test_a_prefetch_into_what_a_product_in_flight_reads_is_found(buffers, pending, faults):
    """Filled two iterations ahead, n buffers are enough for n − 2 products in flight."""
    assert len(hazards.overwritten(LOOP.format(buffers=buffers, pending=pending))) == faults


def test_products_of_hopper_stay_asynchronous_and_their_operands_in_place(rows):
    check_products(rows)
    assert {row["kernel"] for row in rows if row["wgmma"]} == PRODUCTS


def check_convolutions(rows):
    """Tensor cores of each generation for every 16-bit product whose tile has the 64 rows that wgmma takes, and tiles
    prefetched 16 bytes at a time: all of x's where its channels allow, of the weight's the part that is wide enough."""
    assert {row["kernel"] for row in rows} == {"conv_kernel", "dweight_kernel", "sum_partials_kernel"}
    for row in (row for row in rows if row["kernel"] != "sum_partials_kernel"):
        narrow = row["case"] == "Wan out backward" and row["kernel"] == "dweight_kernel"  # 3 channels: 16 rows
        products = not narrow and not row["case"].startswith("fp32")
        assert (row["wgmma"] > 0) == (products and row["sm"] == 90), row
        assert (row["tcgen05"] > 0) == (products and row["sm"] == 100), row
        if row["case"].split()[0] in LAYERS and not row["case"].startswith(("Wan out", "Wan in")):
            assert row["copies"] and row["vector_copies"] >= row["copies"] / 2, row


def test_convolutions_use_tensor_cores(rows):
    check_convolutions([row for row in rows if row["case"].split()[0] in LAYERS])


@pytest.mark.slow
def test_all_of_the_table_is_compiled_again(tmp_path_factory):
    check_table(compiled(tmp_path_factory, *FAMILIES))


@pytest.mark.slow
def test_every_case_on_every_gpu(tmp_path_factory):
    """What the other tests compile for Hopper alone, or for the widest and narrowest case only."""
    rows = compiled(tmp_path_factory, *(f"{family}_everywhere" for family in FAMILIES))
    for check in (
        test_every_family_with_triton_kernels_is_compiled, test_nothing_spills, test_shared_memory_fits,
        test_every_global_load_of_a_dense_row_is_16_bytes_wide, test_every_asynchronous_copy_is_16_bytes_wide,
        test_16_bit_products_of_patches_run_on_the_tensor_cores_of_hopper_and_blackwell,
        test_attention_uses_tensor_cores, test_attention_loads_boxes_through_the_tma,
        test_convolutions_use_tensor_cores, check_products,
    ):  # fmt: skip
        check(rows)


@pytest.mark.slow
def test_convolutions_of_every_layer(tmp_path_factory):
    rows = compiled(tmp_path_factory, "causal_conv_layers")
    check_convolutions(rows)
    check_products(rows)
    test_shared_memory_fits(rows)
    test_nothing_spills(rows)


@pytest.mark.slow
def test_norms_of_every_layer(tmp_path_factory):
    rows = compiled(tmp_path_factory, "causal_conv_norms")
    test_every_global_load_of_a_dense_row_is_16_bytes_wide(rows)
    test_shared_memory_fits(rows)
    test_nothing_spills(rows)


@pytest.mark.slow
def test_attention_of_every_width(tmp_path_factory):
    rows = compiled(tmp_path_factory, "attention_widths")
    check_attention(rows)
    check_products(rows)
    test_shared_memory_fits(rows)
    # On sm_100 ptxas settles for 128 registers and a few words in L1; so it does for heads of 256 and for fp32.
    few = [(r["case"], r["sm"], r["kernel"], r["stack"], r["local"]) for r in rows if r["stack"]]
    assert all(stack <= 32 and not local for *_, stack, local in few), few
    assert all(sm == 100 or "E=256" in case or "float32" in case for case, sm, *_ in few), few
