"""The README and docs/ tell the truth: their code runs, their generated blocks are those of the recorded results."""

from __future__ import annotations

import pathlib
import re
import shutil

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
BLOCKS = {
    f"{page.name} {number}": block
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


def test_there_are_python_blocks():
    assert {name.split()[0] for name in BLOCKS} == {page.name for page in PAGES}
    assert sum(name.startswith("README") for name in BLOCKS) >= 2
    for name, block in BLOCKS.items():
        assert block.count("\n") < 40, name


@pytest.mark.parametrize("name", BLOCKS)
def test_code_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[name], name, "exec"), {})


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_generated_blocks_are_up_to_date(tmp_path):
    from benchmarks import report

    copy = tmp_path / "README.md"
    copy.write_text(README.read_text())
    assert not report.update_readme(copy), "run python -m benchmarks.report and commit the README"
    tables = tmp_path / "tables.md"
    tables.write_text((ROOT / report.ALL).read_text())
    assert not report.update_tables(tables), f"run python -m benchmarks.report and commit {report.ALL}"
    pages = shutil.copytree(report.DOCS, tmp_path / "docs")
    assert not report.update_pages(pages), "run python -m benchmarks.report and commit docs/"
    plot = shutil.copy(ROOT / "benchmarks" / "results" / "summary.svg", tmp_path)
    assert not report.update_plot(pathlib.Path(plot)), "run python -m benchmarks.report and commit summary.svg"
