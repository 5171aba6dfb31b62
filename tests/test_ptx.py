"""The families' own Triton tests with compiled code, executed without a GPU, bf16 included: error rule, determinism,
checks of memory, races and waits. Each run is a pytest of its own, whose triton is imported without the interpreter.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import compiled, compiled_report

pytest.importorskip("triton", reason="triton is not installed")
TESTS = pathlib.Path(__file__).parent
SMALL = {  # file -> what of it, how many tests at least; each kernel on both GPUs, but few of what it is compiled to
    "test_modulation.py": (
        "oracle and triton and bfloat16 and not gpu and (D130 and not gate_residual or D33 and gate_residual and not"
        " norm_modulate or D320 and gate_residual_norm_modulate)", 3
    ),
    "test_modulation_index.py": ("triton and bfloat16 and 130 and gate_residual_norm_modulate", 1),
    "test_modulation_branch.py": ("triton and bfloat16 and 130 and gate_residual_norm_modulate", 1),
    "test_qknorm_rope.py": ("without_a_gpu and bfloat16 and (case1 or case2 or case5)", 3),
    "test_qknorm_rope_stats.py": ("triton and bfloat16 and (fewer or 24) and not gpu", 2),
    "test_causal_conv_norm_triton.py": ("oracle and bfloat16 and last and 33", 2),
    "test_patchify.py": (
        "triton-cpu and dtype1 and (embed3d_error_rule and case0 or final_layer_error_rule and case6 or inverts and"
        " contiguous and size1)", 3
    ),
    "test_patchify_uint8.py": ("frames_are and triton-cpu and bfloat16 and contiguous and 12", 1),
    "test_watermark.py": (
        "triton-cpu and (frames_are and bfloat16 and not cuda and 261 or strides and (offset or expanded))", 3
    ),
    "test_attention_triton.py": ("bfloat16 and (window_text_end-64 or boxes and window-)", 2),
    "test_attention_gate.py": ("triton and error_rule and bfloat16 and (37 or 128)", 2),
    "test_causal_conv_triton.py": (
        "bfloat16 and (half_precision and triton- and everything and not replicate or shipped and 40)", 2
    ),
    "test_causal_conv_cudnn.py": ("test_bfloat16 and everything and not replicate", 1),
    "ptx/cases_alone.py": ("float32 and norm_silu and without", 1),
    "ptx/cases_sizes.py": ("token or mark or frames or rms and backward or 32_bits", 5),
    "ptx/cases_order.py": ("test_", 2),
}
# Left out: bits that are the same for every memory layout. The interpreter keeps that; the compiler orders sums anew
# for an operand that is expanded or not aligned.
EVERYTHING = {  # likewise
    "test_modulation.py": ("triton and not cuda and not gpu and not change_a_bit", 130),
    "test_modulation_index.py": ("triton and not frames_give", 60),
    "test_modulation_branch.py": ("triton and not layouts and not buffer", 38),
    "test_qknorm_rope.py": ("(without_a_gpu or triton) and not on_gpu", 55),
    "test_qknorm_rope_stats.py": ("triton and not gpu and not change_a_bit", 26),
    "test_causal_conv_norm_triton.py": ("bfloat16", 36),
    "test_patchify.py": ("triton-cpu and dtype1", 36),
    "test_patchify_uint8.py": ("triton and not cuda", 175),
    "test_watermark.py": ("triton and not cuda and not beyond", 28),
    "test_attention_triton.py": ("bfloat16", 56),
    "test_attention_gate.py": ("triton and (error_rule or alone)", 13),
    "test_causal_conv_triton.py": ("bfloat16 and triton and not cudnn- and not on_a_gpu", 11),
    "test_causal_conv_cudnn.py": ("test_bfloat16", 9),
    "ptx/cases_alone.py": ("test_", 72),
    "ptx/cases_sizes.py": ("test_", 14),
    "ptx/cases_every_size.py": ("test_", 93),
    "ptx/cases_long.py": ("test_", 10),
}


def kernels() -> set[str]:
    """The name of every kernel in the sources."""
    found = []
    for path in (TESTS.parent / "sora_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                if any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list):
                    found.append(node.name)
    assert len(found) == len(set(found)) > 20
    return set(found)


@dataclasses.dataclass
class Run:
    """What a pytest with the plugin printed, of each file how many tests passed, and what it says of each kernel."""

    output: str
    passed: collections.Counter
    executed: dict[str, dict[str, int]]

    def check(self, file: str, least: int) -> None:
        assert not re.search(rf"^(FAILED|ERROR) tests/{file}", self.output, re.M), self.output[-8000:]
        assert self.passed[file] >= least, f"only {self.passed[file]} tests were executed\n{self.output[-3000:]}"


def execute(sm: int, chosen: dict[str, str]) -> Run:
    """The tests of these files, as sm_N would run them, each launch in two schedules that must leave the same bits."""
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    options = ["-v", "-p", "ptx.plugin", "-p", "no:cacheprovider", f"--ptx={sm}", "--ptx-again=1"]
    keywords = " or ".join(f"({pathlib.Path(file).name} and ({what}))" for file, what in chosen.items())
    command = [sys.executable, "-m", "pytest", *options, *(TESTS / file for file in chosen), "-k", keywords]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode in (0, 1), done.stdout[-6000:] + done.stderr[-2000:]
    passed = collections.Counter(re.findall(r"^tests/(\S+\.py)::.* PASSED", done.stdout, re.M))
    executed = {
        kernel: {name: int(count) for name, count in re.findall(r"([^, ][^,]*) (\d+)", counts)}
        for kernel, counts in re.findall(r"^executed as PTX: (\w+): (.*)", done.stdout, re.M)
    }
    return Run(done.stdout, passed, executed)


SM = 80  # test_ptx_sm_90.py runs the same on 90, beside this file


@pytest.fixture(scope="module")
def small(request) -> Run:
    return execute(request.module.SM, {file: what for file, (what, _) in SMALL.items()})


@pytest.mark.parametrize("file", SMALL)
def test_compiled_kernels_keep_the_error_rule(small, file):
    small.check(file, SMALL[file][1])


def test_every_kernel_was_executed_in_bf16(small):
    assert {name for name, counts in small.executed.items() if counts.get("in bf16")} == kernels()


def test_what_the_compiler_makes_of_products_and_boxes_was_executed(small, request):
    """wgmma and TMA wherever a kernel has them at the sizes of models, and mma.sync on sm_80."""
    _, recorded = compiled_report.load(compiled.RESULTS)
    expected = {column: {row["kernel"] for row in recorded if row["sm"] == 90 and row[column]}
                for column in ("wgmma", "boxes")}  # fmt: skip
    executed = {name: {kernel for kernel, counts in small.executed.items() if counts.get(name)}
                for name in ("mma", "wgmma", "cp.async.bulk")}  # fmt: skip
    assert len(expected["wgmma"]) >= 10 and len(expected["boxes"]) >= 3
    if request.module.SM == 90:
        assert expected["wgmma"] <= executed["wgmma"] and expected["boxes"] <= executed["cp.async.bulk"]
    else:
        assert executed["mma"] == expected["wgmma"] and not executed["wgmma"] and not executed["cp.async.bulk"]


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("file", EVERYTHING)
def test_every_case_in_bf16(file, sm):
    what, least = EVERYTHING[file]
    execute(sm, {file: what}).check(file, least)
