"""The examples run: with small sizes, and each of them shows what it says."""

from __future__ import annotations

import importlib
import pathlib
import re

import pytest
import torch

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_every_example_has_a_test():
    text = pathlib.Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        if path.stem == "gallery":  # test_readme.py runs it
            continue
        assert f'example("{path.stem}")' in text, path.name


def test_a_block_is_the_same_in_plain_torch(example):
    assert example("dit_block").main() < 1e-4


def test_training_learns_and_repeats_itself(example, capsys):
    example("training").main(15)
    first, last = re.match(
        r"loss (\S+) -> (\S+) in 15 steps; two runs, the same bits: True", capsys.readouterr().out
    ).groups()
    assert float(last) < 0.9 * float(first)


def test_a_block_compiles_whole(example, capsys):
    torch._dynamo.reset()
    example("compiled").main("aot_eager")
    assert "without a graph break" in capsys.readouterr().out


def test_a_cuda_graph_says_that_it_needs_a_gpu(example, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert example("cuda_graph").main() == "this example needs a GPU: torch finds none here"


@pytest.mark.gpu
def test_a_cuda_graph_gives_what_the_block_gives(example):
    assert "captured and replayed" in example("cuda_graph").main()


def test_wan_in_diffusers_is_patched(example, capsys):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    assert example("wan_in_diffusers").tiny() < 1e-4
    assert "spacetime_attention" in capsys.readouterr().out
