"""`make demo` with a stand-in for Python: in which order things happen, and what is left when it fails or is ended."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYTHON = """#!/bin/bash
case "$*" in
  *setup.py*) sleep ${BUILD_SECONDS:-1}; echo "compiler says so"; exit ${BUILD_FAILS:-0} ;;
  *demo*) echo "$* impl=${SORA_KERNELS_IMPL:-auto} prompt=$PROMPT" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path) -> pathlib.Path:
    """A folder in which everything is installed and nothing is built."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", ".venv/.created", ".venv/.torch", ".venv/.model"):
        (tmp_path / name).write_text("torch==0" if name.endswith(".torch") else "")
    (tmp_path / ".venv" / "bin" / "python").write_text(PYTHON)
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    return tmp_path


def make(folder: pathlib.Path, *arguments: str, **environment: str) -> subprocess.Popen:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SORA", "MAKE", "PROMPT"))}
    return subprocess.Popen(
        ["make", "demo", *arguments], cwd=folder, env=inherited | environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_the_clip_is_shown_before_the_libraries_are_built_and_the_check_after(checkout):
    out, err = make(checkout, "PROMPT=it's $5").communicate(timeout=60)
    clip, check = (line for line in out.splitlines() if "demo" in line and "==>" not in line)
    assert clip == "-m sora_model.demo clip impl=reference prompt=it's $5"
    assert check == "-m sora_model.demo check impl=auto prompt=it's $5" and not err
    assert out.index("demo clip") < out.index("waiting for the compiler") < out.index("demo check")
    assert "compiler says so" in (checkout / "build" / "demo.log").read_text()
    again, _ = make(checkout).communicate(timeout=60)
    assert again == "-m sora_model.demo impl=auto prompt=\n", "what is built is used at once"


def test_a_failed_build_is_shown_after_the_clip(checkout):
    process = make(checkout, BUILD_FAILS="1")
    out, err = process.communicate(timeout=60)
    assert process.returncode and "demo clip" in out and "demo check" not in out
    assert "compiler says so" in err and "Building csrc/ failed" in err


def test_the_build_ends_with_the_demo(checkout):
    process = make(checkout, BUILD_SECONDS="54321")
    while "waiting" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    for _ in range(50):
        left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        if "sleep 54321" not in left:
            break
        time.sleep(0.1)
    assert "sleep 54321" not in left
