"""What is recorded of compiled kernels: the counts come out again, every kernel has some, no miss is glossed over."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from ptx import nvcc

from benchmarks import compiled, compiled_report, machine

ROOT = pathlib.Path(__file__).resolve().parent.parent
TRAFFIC, SASS = compiled_report.load(compiled.RESULTS)
AGAIN = ("norm_modulate D=3072 per token", "unpatchify3d C=16")
GPU = 90
NVCC = ", nvcc"


def test_the_counts_come_out_again_and_then_need_not(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    recorded = [row for row in TRAFFIC if row["sm"] == GPU and row["case"].startswith(AGAIN)]
    installed = machine.installed("triton")
    assert recorded
    if (known := recorded[0]["compiler"]) != f"triton {installed}":
        pytest.skip(f"the recorded rows are of {known}; triton {installed} may compile otherwise")
    command = [sys.executable, "-m", "benchmarks.compiled", "--sm", str(GPU), "--out", tmp_path]
    for words in AGAIN:
        command += ["--only", words]
    run = dict(cwd=ROOT, check=True, env=os.environ | {"TRITON_INTERPRET": "0"}, stdout=subprocess.PIPE, text=True)
    subprocess.run(command, **run)
    fresh, _ = compiled_report.load(tmp_path)
    compilers = {row["compiler"] for row in fresh}  # nvcc may be another, or none
    recorded = [row for row in recorded if row["compiler"] in compilers]
    fresh = [row for row in fresh if row["compiler"] in {row["compiler"] for row in recorded}]
    where = {"commit": None, "dirty": None}
    changed = [a["kernel"] for a, b in zip(fresh, recorded, strict=True) if a | where != b | where]
    assert not changed, f"run python -m benchmarks.compiled and commit its results: {changed} moves otherwise now"
    said = subprocess.run(command, **run).stdout.splitlines()
    assert [line for line in said if "not installed" not in line] == [
        f"{case}, sm_{GPU}: compiled as recorded" for case in dict.fromkeys(row["case"] for row in fresh)
    ]


def test_without_nvcc_its_rows_are_kept(tmp_path, monkeypatch, capsys):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(nvcc, "find", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that what main sets is undone
    monkeypatch.setattr(sys, "path", [*sys.path])
    target, name = tmp_path / "traffic.jsonl", AGAIN[0] + NVCC
    target.write_bytes((compiled.RESULTS / "traffic.jsonl").read_bytes())
    assert compiled.main(["--only", name, "--sm", str(GPU), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{name}, sm_{GPU}: nvcc is not installed; what is recorded of it is kept\n"
    assert compiled_report.read(target) == TRAFFIC


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
    assert kernels == {row["kernel"] for row in TRAFFIC if row["sm"] == sm and not row["case"].endswith(NVCC)}


@pytest.mark.parametrize("sm", compiled.SMS)
def test_nvcc_has_a_row_beside_each_of_triton_over_the_same_bytes(sm):
    rows = [row for row in TRAFFIC if row["sm"] == sm and row["mode"] == "fwd"]
    rows = [row for row in rows if row["case"].startswith("norm_modulate ") and not row["case"].endswith("by index")]
    fewest = {row["case"]: row["fewest"] for row in rows}
    by_nvcc = {case.removesuffix(NVCC): size for case, size in fewest.items() if case.endswith(NVCC)}
    assert by_nvcc and by_nvcc == {case: size for case, size in fewest.items() if not case.endswith(NVCC)}
    assert {row["compiler"].split()[0] for row in rows if row["case"].endswith(NVCC)} == {"nvcc"}


def test_every_miss_has_its_reason_and_every_reason_a_miss():
    moved = collections.Counter()
    for row in TRAFFIC:
        moved[row["case"], row["mode"], row["sm"]] += row["read"] + row["written"]
    missed = [
        (row, goal)
        for row in TRAFFIC
        for goal in compiled_report.misses(row, moved[row["case"], row["mode"], row["sm"]])
    ]
    assert not [(row["case"], goal) for row, goal in missed if "unexplained" in compiled_report.why(row, [goal])]
    given = {(row["kernel"], goal, compiled_report.why(row, [goal])) for row, goal in missed}
    assert given == {
        (kernel, goal, why)
        for kernel, goals in compiled_report.NOTES.items()
        for goal, reason in goals.items()
        for why in ([reason] if isinstance(reason, str) else reason.values())
    }
    assert all(call["verdict"] != "**missed**" for call in compiled_report.calls(TRAFFIC))


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
    assert compiled_report.kernels_table(rows).endswith(f"| {missed} (**unexplained**) |")


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
