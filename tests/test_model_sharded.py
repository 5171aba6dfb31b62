"""Weights, clips and tokens divided among processes train what one process trains; any number of them goes on."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from in_ranks import as_torchrun_does, in_ranks
from safetensors.torch import load_file
from test_cli import TINY
from test_model_training import TINY_VAE, recipe_of
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from sora_model import Sora, deferred, sharded, train, world
from sora_model.checkpoint import CheckpointError
from sora_model.dit import SoraDiT
from sora_model.ranks import RankError, started
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
    how = dict(start=begun(), cp=2, accumulate=2, checkpointing=True)
    train.train_dit(f"{folder}/one", vae(), recipe(steps=1), **how)
    train.train_dit(f"{folder}/half", vae(), recipe(steps=1), start=begun(), cp=2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="cp=3 must divide the 4 processes; 1, 2, 4 would"):
        train.train_dit(f"{folder}/no", vae(), recipe(steps=2), cp=3)
    with pytest.raises(ValueError, match="batch=3 clips are fewer than the 4 groups of processes; raise cp"):
        train.train_dit(f"{folder}/no", vae(), recipe(steps=2), shard=True)


def _two(rank, folder):
    for name, values in {"cp": (1, 2), "shard": (False, True), "checkpointing": (True, False)}.items():
        message = f"all processes must be started alike: {name} is {values[0]} on rank 0, {values[1]} on rank 1"
        with pytest.raises(ValueError, match=message):
            train.train_dit(f"{folder}/unlike", vae(), recipe(steps=1), **{name: values[rank]})
    with pytest.raises(ValueError, match="dit.heads is 2 on rank 0, 4 on rank 1"):
        how = recipe(steps=1)
        sizes = dataclasses.replace(how.dit, heads=2 + 2 * rank, dim=48)
        train.train_dit(f"{folder}/unlike", vae(), dataclasses.replace(how, dit=sizes), cp=2)
    with pytest.raises(CheckpointError, match="was begun with lr=0.001, not 0.002"):
        train.train_dit(f"{folder}/run", vae(), recipe(steps=4, lr=2e-3), start=begun(), shard=True)
    with pytest.raises(CheckpointError, match="alone was begun without --shard, --cp or --accumulate: leave them out"):
        train.train_dit(f"{folder}/alone", vae(), recipe(steps=4), start=begun(), shard=True)
    dit, _ = train.train_dit(f"{folder}/run", vae(), recipe(steps=4, workers=2), start=begun(), shard=True)
    assert (type(dit) is SoraDiT) == (rank == 0)
    with pytest.raises(CheckpointError, match="has 4 steps behind it, more than steps=3"):
        train.train_dit(f"{folder}/run", vae(), recipe(steps=3), start=begun(), shard=True)


def test_four_processes_then_two_train_what_one_trains(tmp_path):
    in_ranks(_four, 4, tmp_path)
    assert [step for step, _ in sharded._saves(tmp_path / "run")] == [2]
    Path(tmp_path, "store").unlink()
    train.train_dit(tmp_path / "alone", vae(), recipe(steps=4), start=begun())
    in_ranks(_two, 2, tmp_path)
    assert [step for step, _ in sharded._saves(tmp_path / "run")] == [4]
    with pytest.raises(CheckpointError, match="run was begun with --shard, --cp or --accumulate: give them"):
        train.train_dit(tmp_path / "run", vae(), recipe(steps=6), start=begun())
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


def drawn(monkeypatch, where, seen=lambda module: dict(module.state_dict())):
    """The weights with which `train_dit` begins, and the most bytes of tensors that it has held until then."""
    kept = {}

    def fit(module, *args, **how):
        run.stop()
        kept.update(seen(module))

    monkeypatch.setattr(where, "fit", fit)
    sizes = dict(dim=120, heads=2, layers=6, ffn_dim=501)  # neither divides by three
    how = recipe(steps=1)
    how = dataclasses.replace(how, dit=dataclasses.replace(how.dit, **sizes))
    coder = vae()
    run = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    run.start()
    train.train_dit("nowhere", coder, how, shard=where is sharded)
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return kept, max(itertools.accumulate(changes))


def _drawn_apart(rank, folder):
    seen = lambda module: {name: value.full_tensor() for name, value in module.state_dict().items()}  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        torch.save(drawn(patch, sharded, seen), f"{folder}/{rank}.pt")


def test_no_process_holds_the_weights_that_it_begins_with_and_they_are_those_of_one(tmp_path, monkeypatch):
    in_ranks(_drawn_apart, 3, tmp_path)
    expected, all_bytes = drawn(monkeypatch, train)
    weights = sum(value.nbytes for value in expected.values())
    assert all_bytes > weights > 5e6
    for rank in range(3):
        found, most = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
        assert most < 0.55 * weights  # a third, one weight whole, and the generator's state at each


class Scaled(torch.nn.Module):
    def __init__(self, change):
        super().__init__()
        self.weight = torch.nn.Parameter(change(torch.empty(4, 3)))


def test_a_weight_that_is_drawn_and_then_changed_is_drawn_again():
    def make():
        torch.manual_seed(3)
        changes = [
            lambda t: t.normal_().div_(24**0.5), lambda t: t.uniform_().erfinv_().mul_(0.1).clamp_(-0.2, 0.2),
            lambda t: t.uniform_().bernoulli_(0.5).mul_(2), lambda t: torch.nn.init.xavier_uniform_(t).flatten(1),
        ]  # fmt: skip
        return torch.nn.Sequential(*map(Scaled, changes))

    expected = make()
    module, values = deferred.build(make)
    assert all(p.is_meta for p in module.parameters())
    deferred.fill(module, values, torch.device("cpu"))
    for value, one in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, one)
    assert torch.equal(torch.rand(3), (make(), torch.rand(3))[1])  # the generator is where the constructor leaves it


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.normal_()[1:].zero_() and t, "zero_.* changes a weight that has no memory yet in part, or by"),
        (lambda t: t.normal_().add_(t), "add_.* changes a weight that has no memory yet in part, or by another one"),
        (lambda t: t.normal_() * 2, "weight is not made by torch.empty and then filled"),
        (lambda t: t, "weight is not made by torch.empty and then filled"),
        (torch.nn.init.trunc_normal_, "weight is not made by torch.empty and then filled"),  # fills nothing on meta
    ],
    ids=["in part", "by another", "computed", "empty", "unfilled"],
)
def test_a_weight_that_cannot_be_drawn_again_is_refused(change, said):
    with pytest.raises(NotImplementedError, match=said):
        deferred.build(lambda: Scaled(change))


def _one_of_three_dies(rank, folder):
    steps, compute = iter(range(99)), sharded._gradients

    def gradients(*args):
        if rank == 1 and next(steps) == 2:
            os._exit(7)
        return compute(*args)

    sharded._gradients = gradients
    try:
        with started("cpu", wait=120):
            train.train_dit(f"{folder}/run", vae(), recipe(steps=4), shard=True)
    except RankError as error:
        Path(folder, f"error {rank}").write_text(str(error))


def _one_dies_elsewhere(rank, folder):
    """In the collectives of the first save, and then in those of the optimiser, both of which every process has."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    whole, step = sharded._whole, sharded.Muon.step
    closed = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typically caused by")

    def lost(*args, **how):
        raise closed

    for said, (place, name, kept) in {
        "while step 2 was saved": (sharded, "_whole", whole), "at step 0": (sharded.Muon, "step", step),
    }.items():
        setattr(place, name, lost)
        with pytest.raises(RankError, match=f"rank {rank} of 2 lost another process {said} .*; the last save is whole"):
            train.train_dit(f"{folder}/{name}", vae(), recipe(steps=4), shard=True)
        setattr(place, name, kept)


def test_a_process_that_is_lost_to_a_save_or_the_optimiser_is_told_as_any_other(tmp_path):
    in_ranks(_one_dies_elsewhere, 2, tmp_path)


def test_a_process_that_dies_leaves_a_checkpoint_and_is_named(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="exit code 7"):
        as_torchrun_does(_one_of_three_dies, 3, tmp_path)
    for rank in (0, 2):
        assert f"rank {rank} of 3 lost rank 1 at step 2 (" in (tmp_path / f"error {rank}").read_text()
    assert [step for step, _ in sharded._saves(tmp_path / "run")] == [2]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        train.train_dit(tmp_path / "run", vae(), recipe(steps=4), accumulate=2)
    finally:
        dist.destroy_process_group()
    assert read_log(tmp_path / "run")[-1]["step"] == 4


def _command(rank, folder, command):
    from sora_model.cli import app

    app(command, standalone_mode=False)


def test_the_checkpoint_of_a_divided_run_is_one_file_of_the_averaged_weights_for_one_process(tmp_path, tiny_checkpoint):
    made, coder, samples = tmp_path / "made", tiny_checkpoint / "vae", "samples=[]"
    command = ["train", "dit", "--shard", *TINY, "dit.ffn_dim=33", "dit_fit.steps=2", "dit_fit.batch=2", samples]
    command += ["--run", f"{tmp_path}/run", "--vae", f"{coder}", "--checkpoint", f"{made}"]
    as_torchrun_does(_command, 2, tmp_path, command)  # of which one has 17 rows of the 33
    (file,) = (made / "transformer").glob("*.safetensors*")
    dcp_to_torch_save(tmp_path / "run" / "step-2", tmp_path / "state.pt")
    state, sora = torch.load(tmp_path / "state.pt"), Sora.from_pretrained(made)
    parts = {"dit": sora.dit, "text": sora.text}
    loaded = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.named_parameters()}
    averaged = {key.removeprefix("average."): value for key, value in state.items() if key.startswith("average.")}
    averaged = {key: value.half().float() for key, value in averaged.items()}  # as files have them
    assert loaded.keys() == averaged.keys() and len(load_file(file)) == sum(key.startswith("dit.") for key in averaged)
    assert all(torch.equal(loaded[key], value) for key, value in averaged.items())
    assert any(not torch.equal(state[f"model.{key}"].half().float(), value) for key, value in averaged.items())
    how = {"seconds": 0.2, "size": (32, 32), "steps": 1}
    clip = sora.generate("a red ball moves up", **how).frames
    dit, text = type(sora.dit)(sora.dit.config), type(sora.text)(sora.text.config)
    for name, part in {"dit": dit, "text": text}.items():
        for key, value in part.named_parameters():
            value.data.copy_(averaged[f"{name}.{key}"])
    gathered = Sora(dit.eval(), train.load_vae(coder), text.eval(), sora.defaults)
    assert (clip == gathered.generate("a red ball moves up", **how).frames).all() and clip.std() > 0
