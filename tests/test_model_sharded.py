"""Weights, clips and tokens divided among processes train what one process trains; any number of them goes on."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from in_ranks import in_ranks
from safetensors.torch import load_file
from test_model_training import TINY_VAE, recipe_of
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from sora_model import sharded, train, world
from sora_model.checkpoint import CheckpointError
from sora_model.dit import SoraDiT
from sora_model.ranks import RankError
from sora_model.steps import read_log
from sora_model.text import WordTextConfig, WordTextEncoder

# two groups, of one and two clips, in two parts, of which one is empty; causal steps, frames with times of their own
STEPS = {"batch": 3, "lr": 1e-3, "decay": 0.0, "warmup": 1, "save_every": 2, "workers": 1, "ema": 0.9}


def recipe(**changes):
    """Of one size: the shortest clips that the causal ring can divide."""
    how = recipe_of(dit_fit=STEPS | changes)
    return dataclasses.replace(how, buckets=how.buckets[:1], draws=1, apart=0.5, causal=0.5)


def vae():
    torch.manual_seed(5)
    return train.CausalVAE(dataclasses.replace(TINY_VAE, temporal_downsample=(False, False, False)))


def begun():
    """Parts of which every gradient is far from zero."""
    torch.manual_seed(6)
    how = recipe()
    dit = SoraDiT(how.dit)
    torch.nn.init.normal_(dit.head.weight, std=0.3)
    return dit, WordTextEncoder(WordTextConfig(words=world.VOCABULARY, dim=how.dit.text_dim, **how.text))


def _four(rank, folder):
    saved = []
    on_save = lambda *parts: saved.append(parts)  # noqa: E731
    train.train_dit(f"{folder}/run", vae(), recipe(steps=2), start=begun(), cp=2, accumulate=2, on_save=on_save)
    assert [step for *_, step in saved] == ([2] if rank == 0 else [])
    train.train_dit(f"{folder}/one", vae(), recipe(steps=1), start=begun(), cp=2, accumulate=2)
    train.train_dit(f"{folder}/half", vae(), recipe(steps=1), start=begun(), cp=2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="cp=3 must divide the 4 processes; 1, 2, 4 would"):
        train.train_dit(f"{folder}/no", vae(), recipe(steps=2), cp=3)
    with pytest.raises(ValueError, match="batch=3 clips are fewer than the 4 groups of processes; raise cp"):
        train.train_dit(f"{folder}/no", vae(), recipe(steps=2), shard=True)


def _two(rank, folder):
    with pytest.raises(CheckpointError, match="was begun with lr=0.001, not 0.002"):
        train.train_dit(f"{folder}/run", vae(), recipe(steps=4, lr=2e-3), start=begun(), shard=True)
    dit, _ = train.train_dit(f"{folder}/run", vae(), recipe(steps=4), start=begun(), shard=True)
    assert (type(dit) is SoraDiT) == (rank == 0)
    with pytest.raises(CheckpointError, match="has 4 steps behind it, more than steps=3"):
        train.train_dit(f"{folder}/run", vae(), recipe(steps=3), start=begun(), shard=True)


def test_four_processes_then_two_train_what_one_trains(tmp_path):
    in_ranks(_four, 4, tmp_path)
    assert [step for step, _ in sharded._saves(tmp_path / "run")] == [2]
    Path(tmp_path, "store").unlink()
    in_ranks(_two, 2, tmp_path)
    assert [step for step, _ in sharded._saves(tmp_path / "run")] == [4]
    train.train_dit(tmp_path / "alone", vae(), recipe(steps=4), start=begun())
    losses = [read_log(tmp_path / run)[-1]["loss"] for run in ("run", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for run, dtype, tolerance in (("one", torch.float32, 1e-4), ("half", torch.bfloat16, 0.05)):
        train.train_dit(tmp_path / f"{run} alone", vae(), recipe(steps=1), start=begun(), dtype=dtype)
        assert_gradients_agree(tmp_path, run, tolerance)


def assert_gradients_agree(folder, run, tolerance):
    """Of the first step; later ones are of weights that Muon and Adam make of the smallest rounding errors too."""
    dcp_to_torch_save(folder / run / "step-1", folder / "state.pt")
    together, one = torch.load(folder / "state.pt"), load_file(folder / f"{run} alone" / "state.safetensors")
    assert together.keys() == one.keys()
    moments = [name for name in one if name.startswith(("optimiser.momentum.", "optimiser.exp_avg."))]
    assert len(moments) > 30
    for name in moments:
        assert (together[name] - one[name]).norm() <= tolerance * one[name].norm(), name


def _one_dies(rank, folder):
    steps, compute = iter(range(99)), sharded._gradients

    def gradients(*args):
        if rank == 1 and next(steps) == 2:
            os._exit(7)
        return compute(*args)

    sharded._gradients = gradients
    try:
        train.train_dit(f"{folder}/run", vae(), recipe(steps=4), shard=True)
    except RankError as error:
        Path(folder, "error").write_text(str(error))


def test_a_process_that_dies_leaves_a_checkpoint_and_a_message(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 7"):
        in_ranks(_one_dies, 2, tmp_path)
    assert "rank 0 of 2 lost another process at step 2" in (tmp_path / "error").read_text()
    assert [step for step, _ in sharded._saves(tmp_path / "run")] == [2]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train.train_dit(tmp_path / "run", vae(), recipe(steps=4), accumulate=2)
    finally:
        dist.destroy_process_group()
    assert read_log(tmp_path / "run")[-1]["step"] == 4
