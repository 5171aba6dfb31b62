"""The README tells the truth: its code runs, its generated blocks are those of the recorded results."""

from __future__ import annotations

import pathlib
import re

import pytest

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_are_python_blocks():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_generated_blocks_are_up_to_date(tmp_path):
    from benchmarks import report

    copy = tmp_path / "README.md"
    copy.write_text(README.read_text())
    assert not report.update_readme(copy), "run python -m benchmarks.report and commit the README"
    tables = tmp_path / "tables.md"
    tables.write_text((README.parent / report.ALL).read_text())
    assert not report.update_tables(tables), f"run python -m benchmarks.report and commit {report.ALL}"
