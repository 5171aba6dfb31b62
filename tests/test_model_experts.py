"""Wan 2.2's two experts on different processes: each loads its own, and the clip is that of one process."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from in_ranks import in_ranks
from safetensors.torch import save_file
from test_model_pipeline import make_wan_directory
from test_model_wan import FORMS, PROMPT, pipeline

from sora_model import experts, parallel
from sora_model.cli import app
from sora_model.dit import SoraDiT
from sora_model.media import read_video
from sora_model.pipeline import Sora

HOW = dict(steps=4, size=(64, 32), seconds=9 / 16, fps=16, seed=3)
PAIRS = {2: (4.0, 3.0), 4: (4.0, 1.0)}  # of two halves of four, one follows guidance and one divides the heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    form, path = "2.2 text, two experts", tmp_path_factory.mktemp("experts")
    assert form in FORMS
    pipeline(form, make_wan_directory(path / "text")).save_pretrained(path / "wan")
    return path / "wan"


def computed(monkeypatch):
    """How often each transformer is called, by id."""
    calls, forward = {}, SoraDiT.forward

    def counted(self, *args, **kwargs):
        calls[id(self)] = calls.get(id(self), 0) + 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SoraDiT, "forward", counted)
    return calls


def command(folder, to, guidance):
    sizes = ["--steps", "4", "--size", "32x64", "--seconds", str(9 / 16), "--fps", "16", "--seed", "3"]
    options = [*sizes, "--guidance", guidance, "--no-credentials"]
    return ["generate", PROMPT, "--weights", str(folder), *options, "--out", str(to)]


def _apart(rank, place, folder):
    world = torch.distributed.get_world_size()
    sora = Sora.from_pretrained(folder, device="cpu", expert=experts.own())
    held, other = (sora.dit, sora.second)[:: 1 if rank < world // 2 else -1]
    assert all(p.is_meta for p in other.parameters()) and not any(p.is_meta for p in held.parameters())
    with pytest.MonkeyPatch.context() as patch, parallel.sampling(sora, guidance=PAIRS[world]):
        calls = computed(patch)
        clip = sora.generate(PROMPT, guidance=PAIRS[world], **HOW)
    assert sora.experts is None and set(calls) == {id(held)}
    torch.save((calls[id(held)], clip.frames), f"{place}/{rank}.pt")
    if world > 2:
        held.head_table.data += rank == 3
        message = "the checksum of the second transformer is '\\w+' on rank 2, '\\w+' on rank 3"
        with pytest.raises(ValueError, match=message), parallel.sampling(sora):
            pass
        return
    with parallel.sampling(sora), pytest.raises(ValueError, match=r"seed is 0 on rank 0, 1 on rank 1"):
        sora.generate(PROMPT, **HOW | {"seed": rank})
    both = Sora.from_pretrained(folder, device="cpu")
    for wrong, said in ((sora if rank else both, "None, 'low'"), (sora if rank == 0 else both, "'high', None")):
        with pytest.raises(ValueError, match=f"'low' on the second .* it is {said}"), parallel.sampling(wrong):
            pass
    app([*command(folder, f"{place}/together.mp4", "4.0,3.0"), "--apart"], standalone_mode=False)


@pytest.mark.parametrize("world", PAIRS)
def test_the_clip_is_that_of_one_process(folder, tmp_path, monkeypatch, world):
    in_ranks(_apart, world, tmp_path, folder)
    sora, calls = Sora.from_pretrained(folder, device="cpu"), computed(monkeypatch)
    alone = sora.generate(PROMPT, guidance=PAIRS[world], **HOW).frames.astype(int)
    assert alone.std() > 5 and min(calls.values()) > 0
    for rank in range(world):
        count, frames = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert count == calls[id(sora.dit if rank < world // 2 else sora.second)]
        assert abs(frames - alone).max() <= 1 and (frames != alone).mean() < 0.001  # pixels rounded the other way
    if world == 2:
        app(command(folder, tmp_path / "alone.mp4", "4.0,3.0"), standalone_mode=False)
        files = (np.stack([*read_video(tmp_path / f"{name}.mp4")]).astype(int) for name in ("together", "alone"))
        assert abs(np.subtract(*files)).mean() < 0.01 * alone.std()


def _of_guidance(rank, place, folder):
    sora = Sora.from_pretrained(folder, device="cpu")
    with parallel.sampling(sora, guidance=(1.0, 3.0)):
        assert sora.dit.parallel is not None and sora.second.parallel is not None
        torch.save(sora.generate(PROMPT, guidance=(1.0, 3.0), **HOW).frames, f"{place}/{rank}.pt")


def test_processes_that_hold_both_divide_both_by_the_guidance_of_each(folder, tmp_path):
    in_ranks(_of_guidance, 2, tmp_path, folder)
    alone = Sora.from_pretrained(folder, device="cpu").generate(PROMPT, guidance=(1.0, 3.0), **HOW).frames.astype(int)
    for rank in range(2):
        frames = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert abs(frames - alone).max() <= 1 and (frames != alone).mean() < 0.001


def test_where_experts_apart_do_not_fit_it_is_said(folder, tiny_checkpoint, sora, monkeypatch, tmp_path):
    message = r"expert must be None \(leave out --apart\): .* has one transformer, not two experts; got 'high'"
    with pytest.raises(ValueError, match=message):
        Sora.from_pretrained(tiny_checkpoint, expert="high")
    with pytest.raises(ValueError, match="expert must be 'high', 'low' or None; got 'both'"):
        Sora.from_pretrained(folder, expert="both")
    with pytest.raises(ValueError, match="has one of two experts: sample inside of parallel.sampling"):
        Sora.from_pretrained(folder, device="cpu", expert="low").generate(PROMPT, **HOW)
    code, _, said = sora(*command(folder, tmp_path / "clip.mp4", "3.0"), "--apart")
    assert code == 1 and "need an even number of processes; there are 1: start 2 under torchrun" in said
    monkeypatch.setattr(experts, "Ranks", lambda: types.SimpleNamespace(rank=0, size=3))
    with pytest.raises(ValueError, match="there are 3: 2 or 4 would fit"):
        experts.own()


def test_a_lora_of_both_changes_the_expert_that_is_here(folder, tmp_path):
    name = "transformer.blocks.0.attn1.to_q"
    halves = {f"{name}.lora_A.weight": torch.ones(2, 24), f"{name}.lora_B.weight": torch.ones(24, 2)}
    save_file(halves, tmp_path / "lora.safetensors")
    sora = Sora.from_pretrained(folder, device="cpu", expert="low")
    before = sora.second.blocks[0].self_attn.q.weight.clone()
    sora.load_lora(tmp_path / "lora.safetensors", expert="both")
    torch.testing.assert_close(sora.second.blocks[0].self_attn.q.weight, before + 2)
    assert sora.dit.blocks[0].self_attn.q.weight.is_meta
    sora.unload_loras()
    assert torch.equal(sora.second.blocks[0].self_attn.q.weight, before)
