"""The families' own Triton tests with compiled code, executed without a GPU, bf16 included: error rule, determinism,
checks of memory, races and waits. Each run is a pytest of its own, whose triton is imported without the interpreter.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")
TESTS = pathlib.Path(__file__).parent
SMALL = {  # name -> capability, file, what of it, how many tests at least
    "modulation": (80, "test_modulation.py", "oracle and triton and bfloat16 and (D33 or D130 or D320) and not gpu", 9),
    "qknorm_rope": (90, "test_qknorm_rope.py", "without_a_gpu and bfloat16 and (case1 or case4)", 2),
    "norm_silu": (80, "test_causal_conv_norm_triton.py", "oracle and bfloat16 and last and 33", 2),
    "patchify": (90, "test_patchify.py", "error_rule and triton-cpu and dtype1 and case0", 2),
    "attention, wgmma": (90, "test_attention_triton.py", "bfloat16 and (cross-64 or causal_window_sink-64)", 2),
    "attention, mma": (80, "test_attention_triton.py", "bfloat16 and window_text_end-64", 1),
    "real sizes": (90, "ptx/cases_sizes.py", "", 8),
    "convolution": (90, "test_causal_conv_triton.py", "half_precision and bfloat16 and triton and everything", 1),
}
# Left out: bits that are the same for every memory layout. The interpreter keeps that; the compiler orders sums anew
# for an operand that is expanded or not aligned.
EVERYTHING = {  # name -> file, what of it, how many tests at least
    "modulation": ("test_modulation.py", "triton and not cuda and not gpu and not change_a_bit", 60),
    "qknorm_rope": ("test_qknorm_rope.py", "(without_a_gpu or triton) and not on_gpu", 18),
    "norm_silu": ("test_causal_conv_norm_triton.py", "bfloat16", 36),
    "patchify": ("test_patchify.py", "triton-cpu and dtype1", 10),
    "frames": ("test_patchify_uint8.py", "triton and not cuda", 10),
    "attention": ("test_attention_triton.py", "bfloat16", 40),
    "convolution": ("test_causal_conv_triton.py", "bfloat16 and triton and not on_a_gpu", 9),
}


def execute(sm: int, file: str, chosen: str, least: int, schedule: int = 0) -> None:
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    options = ["-q", "-p", "ptx.plugin", "-p", "no:cacheprovider", f"--ptx={sm}", f"--ptx-schedule={schedule}"]
    command = [sys.executable, "-m", "pytest", *options, str(TESTS / file), *(["-k", chosen] if chosen else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, f"only {passed and passed[1]} tests were executed\n{done.stdout[-2000:]}"
    assert re.search(r"launches executed as PTX: \w+ \d", done.stdout), done.stdout[-2000:]


@pytest.mark.parametrize("name", SMALL)
def test_compiled_kernels_keep_the_error_rule(name):
    execute(*SMALL[name])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [0, 1])
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("name", EVERYTHING)
def test_every_case_in_bf16(name, sm, schedule):
    execute(sm, *EVERYTHING[name], schedule=schedule)
