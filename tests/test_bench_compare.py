"""A revision beside the present tree: honest intervals, exit codes, and no worktree left behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

from benchmarks import compare, machine, run

LIST = ["git", "-C", str(machine.ROOT), "worktree", "list"]
if subprocess.run(LIST, capture_output=True).returncode:
    pytest.skip(f"{machine.ROOT} is no git repository: there is no revision to compare with", allow_module_level=True)
CASE = ("--op", "norm_modulate", "--shape", "tiny", "--impl", "reference", "--mode", "fwd", "--budget", "0.02")


@pytest.fixture
def left(monkeypatch, tmp_path):
    """The worktrees that comparisons of this test have left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def left():
        listed = subprocess.run(LIST, capture_output=True, text=True, check=True).stdout
        return [line for line in listed.splitlines() if str(tmp_path) in line] + list(tmp_path.glob("sora-base-*"))

    return left


def test_the_interval_holds_the_median_and_narrows_with_more_rounds():
    draw = torch.Generator().manual_seed(1)
    few = (1.1 + 0.05 * torch.randn(20, generator=draw)).tolist()
    many = (1.1 + 0.05 * torch.randn(800, generator=draw)).tolist()
    for ratios in (few, many):
        ratio, low, high = compare.interval(ratios)
        assert low < ratio < high and low < 1.1 < high and 1.07 < ratio < 1.13
        assert compare.interval(ratios) == (ratio, low, high)
    assert compare.interval(many)[2] - compare.interval(many)[1] < 0.02
    assert compare.interval([2.0] * 10) == (2.0, 2.0, 2.0)


def test_a_revision_is_compared_case_by_case_and_its_worktree_is_gone(left, capfd):
    assert run.main(["--device", "cpu", "--base", "HEAD", *CASE, "--fail-under", "0.01"]) == 0
    said = capfd.readouterr().out
    found = re.search(r"([\d.]+)× \[([\d.]+), ([\d.]+)\]  norm_modulate reference fwd at tiny, [\d.]+ µs", said)
    ratio, low, high = map(float, found.groups())
    assert 0.1 < low <= ratio <= high < 10
    assert left() == []


def test_a_slower_tree_fails_and_one_that_only_may_be_slower_does_not(monkeypatch, capfd):
    seconds = {"slow": (0.8, 1.0), "noisy": (0.5, 1.0)}

    def rounds(theirs, ours, calls, budget_s):
        base, own = seconds[kind]
        return [(base, own)] * 10 if kind == "slow" else [(base, own), (2 * own, own)] * 5 + [(base, own)]

    monkeypatch.setattr(compare, "_rounds", rounds)
    monkeypatch.setattr(compare, "_worktree", lambda *_: contextlib.nullcontext((machine.ROOT, "1a2b3c")))
    monkeypatch.setattr(compare, "_process", lambda tree: contextlib.nullcontext(lambda asked: {"calls": 1}))
    statuses = {}
    for kind in seconds:
        statuses[kind] = run.main(["--device", "cpu", "--base", "HEAD", *CASE, "--fail-under", "0.95"])
    said = capfd.readouterr().out
    assert statuses == {"slow": 1, "noisy": 0}
    assert " 0.800× [0.800, 0.800]" in said and "1 below 0.95×, with an interval below 1" in said


def test_a_process_says_what_it_lacks_and_compares_the_rest_and_its_death_is_an_error():
    with compare._process(machine.ROOT) as ask:
        asked = dict(op="norm_modulate", shape="tiny", impl="cuda", mode="fwd", seed=0, threads=1)
        asked |= dict(dtype="float32", device="cpu")
        assert "cuda needs tensors on a CUDA device" in ask(asked)["reason"]
        assert ask(asked | {"op": "gone"}) == {"reason": "KeyError: 'gone'", "failed": True}
        assert ask(asked | {"impl": "reference"})["calls"] >= 1 and ask({"calls": 2})["seconds"] > 0
        with pytest.raises(compare.BadBase, match="ended with exit code 1; its last words are above"):
            ask({})


def test_an_interrupted_comparison_leaves_no_worktree(left):
    command = [sys.executable, "-m", "benchmarks.run", "--device", "cpu", "--base", "HEAD", *CASE, "--budget", "60"]
    process = subprocess.Popen(command, cwd=machine.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert b"(base) beside this tree" in process.stdout.readline() and len(left()) == 2
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert left() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base", "nowhere"], "--base nowhere: there is no such commit in"),
        (["--base", "--help"], "expected one argument"),
        (["--base", "HEAD:README.md"], "--base HEAD:README.md: "),
        (["--base", "HEAD", "--peers"], "--base: compares ours alone, without --peers"),
        (["--fail-under", "0.9"], "--fail-under: expected a ratio above 0, up to 1, and --base; got 0.9"),
        (["--base", "HEAD", "--fail-under", "7"], "--fail-under: expected a ratio above 0, up to 1"),
    ],
)
def test_a_bad_request_is_refused_before_anything_runs(left, capsys, arguments, said):
    try:
        assert run.main(["--device", "cpu", *arguments]) == 2
    except SystemExit as refused:  # argparse
        assert refused.code == 2
    assert said in capsys.readouterr().err and left() == []
