"""What is recorded of compiled kernels: the counts come out again, every kernel has some, no miss is glossed over."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import compiled, compiled_report, machine

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAFFIC, SASS = compiled_report.load(compiled.RESULTS)
AGAIN = ("norm_modulate D=1536 per clip", "unpatchify3d")
GPU = 90


def test_the_counts_come_out_again(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    recorded = [row for row in TRAFFIC if row["sm"] == GPU and row["case"].startswith(AGAIN)]
    installed = machine.installed("triton")
    assert recorded
    if {row["triton"] for row in recorded} != {installed}:
        pytest.skip(f"the recorded rows are of triton {recorded[0]['triton']}; {installed} may compile otherwise")
    command = [sys.executable, "-m", "benchmarks.compiled", "--sm", str(GPU), "--out", tmp_path]
    for words in AGAIN:
        command += ["--only", words]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    fresh, _ = compiled_report.load(tmp_path)
    where = {"commit": None, "dirty": None}
    changed = [a["kernel"] for a, b in zip(fresh, recorded, strict=True) if a | where != b | where]
    assert not changed, f"run python -m benchmarks.compiled and commit its results: {changed} moves otherwise now"


def test_the_summary_is_that_of_the_rows(tmp_path):
    for name in ("traffic.jsonl", "sass.jsonl", "README.md"):
        if (compiled.RESULTS / name).exists():
            (tmp_path / name).write_bytes((compiled.RESULTS / name).read_bytes())
    assert not compiled_report.update(tmp_path), "run python -m benchmarks.compiled --summary and commit its README"


@pytest.mark.parametrize("sm", compiled.SMS)
def test_every_triton_kernel_has_a_row(sm):
    sources = "".join(path.read_text() for path in (ROOT / "sora_kernels").rglob("*.py"))
    kernels = set(re.findall(r"@triton\.jit.*\ndef (\w+_kernel)\(", sources))
    assert len(kernels) > 20
    assert kernels == {row["kernel"] for row in TRAFFIC if row["sm"] == sm}


def altered(**changes) -> list[dict]:
    """The forward of a call that meets every goal, with what one of its kernels did changed."""
    rows = [row for row in TRAFFIC if row["case"] == AGAIN[0] and row["mode"] == "fwd" and row["sm"] == GPU]
    assert len(rows) == 1 and compiled_report.calls(rows)[0]["verdict"] == "met"
    assert not compiled_report.misses(rows[0], rows[0]["read"] + rows[0]["written"])
    return [rows[0] | {name: change(rows[0]) for name, change in changes.items()}]


def test_bytes_above_the_fewest_miss_the_goal_unless_they_are_named():
    rows = altered(read=lambda row: row["read"] + row["fewest"] // 20)
    assert compiled_report.calls(rows)[0]["verdict"] == "**missed**"
    assert "**missed**" in compiled_report.bytes_table(rows) and " 1 without such a reason" in (
        compiled_report.summary(rows, [])
    )
    rows = altered(
        read=lambda row: row["read"] + row["fewest"] // 20, above=lambda row: {"dshift_ptr": row["fewest"] // 20}
    )
    assert compiled_report.calls(rows)[0]["verdict"] == "met but for the named"


@pytest.mark.parametrize(
    "changes, missed",
    [
        ({"sectors": lambda row: row["ideal_sectors"] * 1.1}, "sectors"),
        ({"asked_by_16": lambda row: row["asked"] * 0.9}, "16 bytes"),
        ({"wavefronts": lambda row: row["ideal_wavefronts"] * 1.2}, "wavefronts"),
    ],
)
def test_an_access_that_misses_its_goal_is_said_to(changes, missed):
    rows = altered(**changes)
    assert compiled_report.kernels_table(rows).endswith(f"| {missed} |")


def test_bytes_are_counted_once_whatever_views_show_them():
    x = torch.zeros(4, 6)
    seen = compiled.Bytes()
    assert seen.new(x[:, :4]) == 64
    assert seen.new(x[1:3]) == 16
    assert seen.new(x[:1].expand(9, 6)) == 8
    assert seen.new(x) == 8 and seen.new(x) == 0


def test_rows_of_other_cases_are_kept(tmp_path):
    target, names = tmp_path / "traffic.jsonl", ["a", "b"]
    compiled.record([{"case": "b", "mode": "fwd", "sm": 80, "read": 1}, {"case": "gone", "mode": "fwd", "sm": 80}],
                    target, [*names, "gone"])  # fmt: skip
    compiled.record([{"case": "a", "mode": "fwd", "sm": 80}, {"case": "b", "mode": "fwd", "sm": 90}], target, names)
    compiled.record([{"case": "b", "mode": "fwd", "sm": 80, "read": 2}], target, names)
    rows = map(json.loads, target.read_text().splitlines())
    found = [(row["case"], row["sm"], row.get("read")) for row in rows]
    assert found == [("a", 80, None), ("b", 80, 2), ("b", 90, None)]
