"""The table of Wan's models in docs/model.md: every cell is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_model_dit import inputs, run
from test_model_wan import FORMS, diffusers, pipeline, test_same_frames_as_diffusers, text  # noqa: F401

from sora_model.dit import SoraDiT
from sora_model.pipeline import Sora

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "model.md").read_text()
FORMS_OF = {  # the forms that are tested of each model
    "Wan 2.1 T2V 1.3B, 14B": ("2.1 text", "2.1 text, Euler"),
    "Wan 2.1 I2V 14B": ("2.1 image",),
    "Wan 2.1 FLF2V 14B": ("2.1 first and last",),
    "Wan 2.2 T2V-A14B": ("2.2 text, two experts",),
    "Wan 2.2 I2V-A14B": ("2.2 image, two experts", "2.2 first and last, two experts"),
    "Wan 2.2 TI2V-5B": ("2.2 small, text", "2.2 small, image"),
}
GIVEN = {"`generate`": 0, "`animate`": 1, "`animate`, `last=`": 2}


def table():
    """Cells by model and column."""
    lines = re.search(r"\| model \|.*?\n\n", PAGE, re.DOTALL)[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line)
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_frames_are_held_to_those_of_diffusers_where_the_table_says_yes():
    """A verb's yes is a form that this test has: loaded from a folder, and the same frames."""
    tried = next(mark.args[1] for mark in test_same_frames_as_diffusers.pytestmark if mark.args[0] == "form")
    assert table().keys() == FORMS_OF.keys() and set().union(*FORMS_OF.values()) == set(tried)
    for model, forms in FORMS_OF.items():
        given = {FORMS[form][4] for form in forms}
        for verb, count in GIVEN.items():
            assert table()[model][verb] == ("yes" if count in given else ""), (model, verb)


@pytest.mark.parametrize("model", FORMS_OF)
def test_the_other_cells(model, text, tmp_path):  # noqa: F811
    row, theirs = table()[model], pipeline(FORMS_OF[model][-1], text)
    theirs.save_pretrained(tmp_path)
    sora = Sora.from_pretrained(tmp_path, device="cpu")
    done = {"gradients": gradients(theirs), "streams": streams(sora.vae), "LoRA": lora(sora, tmp_path)}
    assert {name: row[name] for name in done} == {name: "yes" if holds else "" for name, holds in done.items()}


def gradients(theirs):
    """Are those of each transformer diffusers', of every weight, the latents, the text and the image?"""
    for host in filter(None, (theirs.transformer, getattr(theirs, "transformer_2", None))):
        per = "token" if theirs.config.get("expand_timesteps") else "clip"
        batch = inputs(host.config, (2, 4, 6), per, length=512)
        expected, actual = run(host, *batch), run(SoraDiT.from_wan(host), *batch)
        assert expected.keys() == actual.keys()
        for name, wanted in expected.items():
            bound = 1e-4 * max(wanted.abs().max().item(), 1e-2)
            torch.testing.assert_close(actual[name], wanted, rtol=0, atol=bound, msg=name)
    return True


def streams(vae):
    """Do chunks give what the whole gives?"""
    with torch.no_grad():
        side = 2 * vae.config.spatial_factor
        means = vae.encode(video := torch.rand(1, 3, 9, side, side))[0]
        coded = torch.cat([mean for mean, _ in vae.encode_stream(video)], 2)
        whole, chunks = vae.decode(means), torch.cat(list(vae.decode_stream(means)), 2)
    torch.testing.assert_close(coded, means, rtol=0, atol=2e-5 * means.abs().max().item())
    torch.testing.assert_close(chunks, whole, rtol=0, atol=2e-5)
    return whole.std() > 0.01


def lora(sora, folder):
    """Does a file change the weights, and leave them as they were?"""
    weight = sora.dit.blocks[0].self_attn.q.weight
    before, name = weight.clone(), "blocks.0.self_attn.q"
    save_file({f"{name}.lora_A.weight": torch.ones(1, 24), f"{name}.lora_B.weight": torch.ones(24, 1)}, folder / "l")
    sora.load_lora(folder / "l", expert="both" if sora.second else None)
    changed = torch.equal(weight, before + 1)
    sora.unload_loras()
    return changed and torch.equal(weight, before)
