"""Types of the public functions: mypy reads `typed_calls.py`, and what it may call there works."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import typed_calls

import sora_kernels
import sora_model

ROOT = pathlib.Path(__file__).resolve().parent.parent
CALLS = pathlib.Path(typed_calls.__file__)


def mypy(*arguments: str) -> subprocess.CompletedProcess:
    # one cache for all runs: reading torch's own types is most of the first one
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_typical_calls_have_their_types_and_wrong_ones_are_refused():
    result = mypy(str(CALLS))
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_wrong_type_would_be_found(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import torch, sora_kernels\nx = torch.ones(1, 2, 8)\nlse: int = sora_kernels.norm_modulate(x, None, None)\n"
    )
    result = mypy(str(wrong))
    assert result.returncode == 1
    assert 'expression has type "Tensor", variable has type "int"' in result.stdout, result.stdout + result.stderr


def test_every_public_name_is_in_the_typed_calls():
    text = CALLS.read_text()
    for package in (sora_kernels, sora_model):
        missing = [name for name in package.__all__ if f"{package.__name__}.{name}" not in text]
        assert not missing, f"add a call to tests/typed_calls.py: {missing}"


def test_typical_calls_work():
    typed_calls.run()
