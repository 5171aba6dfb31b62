"""The README and docs/ tell the truth: their code runs, their generated blocks are those of the recorded results."""

from __future__ import annotations

import pathlib
import re
import shutil

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
BLOCKS = {
    f"{page.name} {number}": block
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


def test_there_are_python_blocks():
    assert {name.split()[0] for name in BLOCKS} == {page.name for page in PAGES} - {"commands.md", "cuda.md"}
    assert sum(name.startswith("README") for name in BLOCKS) >= 2
    for name, block in BLOCKS.items():
        assert block.count("\n") < 40, name


@pytest.mark.parametrize("name", BLOCKS)
def test_code_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(BLOCKS[name], name, "exec"), {})


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) < 180, "move it to docs/ and link"


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


def test_the_clip_is_what_its_command_makes(tmp_path, monkeypatch):
    from PIL import Image, ImageSequence

    monkeypatch.syspath_prepend(ROOT / "examples")
    import readme_clip

    command = f'sora generate "{readme_clip.PROMPT}" --seed {readme_clip.SEED}'
    assert command in README.read_text()
    frames = readme_clip.main(tmp_path / "clip.gif")
    shown = [np.asarray(image.convert("RGB")) for image in ImageSequence.Iterator(Image.open(readme_clip.TARGET))]
    assert readme_clip.TARGET.stat().st_size < 2**20
    small = np.stack(shown)[:, :: readme_clip.SCALE, :: readme_clip.SCALE].astype(int)
    # 256 colours a frame, and other processors round otherwise: within 2 of 255 on average
    assert np.abs(small - frames).mean() < 2, "run python examples/readme_clip.py and look at docs/clip.gif"


def test_the_page_of_commands_has_every_command():
    from typer.main import get_command

    from sora_model import cli

    text = (ROOT / "docs" / "commands.md").read_text()
    for name, command in get_command(cli.app).commands.items():
        for part in getattr(command, "commands", {"": None}):
            assert f"`sora {name} {part}".rstrip() in text, f"{name} {part}"
