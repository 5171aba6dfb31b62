"""Training: what is resumed equals what was never stopped, and nothing bad is ever saved over something good."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sora_model import fit, muon, presets, recipe, train, world
from sora_model.checkpoint import CheckpointError, read_json
from sora_model.dit import DiTConfig
from sora_model.files import WriteError
from sora_model.frames import to_video
from sora_model.recipe import Recipe
from sora_model.safety import credentials
from sora_model.steps import Settings, read_log
from sora_model.world.data import Bucket

TINY_VAE = train.VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
TINY_DIT = DiTConfig(
    dim=24, heads=2, layers=1, ffn_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=16
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_sigint():
    """Python's own handling, whatever tests before have left."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if before is not None:  # None: not of Python
        signal.signal(signal.SIGINT, before)


def tiny(settings: Settings, **changes) -> Settings:
    return dataclasses.replace(settings, **{"batch": 4, "save_every": 2, "warmup": 1} | changes)


def recipe_of(**changes) -> Recipe:
    """That of the shipped checkpoint with tiny parts; `vae_fit` and `dit_fit` may be given as what to change."""
    base = recipe.load()
    for name in ("vae_fit", "dit_fit"):
        changes[name] = tiny(getattr(base, name), **changes.get(name, {}))
    buckets = (Bucket(5, (32, 32)), Bucket(9, (16, 32), batch=2))
    return dataclasses.replace(base, **{"vae": TINY_VAE, "dit": TINY_DIT, "buckets": buckets, "draws": 2} | changes)


@pytest.fixture(scope="module")
def vae() -> train.CausalVAE:
    torch.manual_seed(5)
    return train.CausalVAE(TINY_VAE).requires_grad_(False)


def ramp(size: int = 4):
    """A model, and the batches of a task that it can learn, made of the step's number alone."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def batch_at(step):
        x = torch.randn(size, 3, generator=torch.Generator().manual_seed(step))
        return x, x.sum(1, keepdim=True)

    return model, batch_at, lambda x, y: (model(x) - y).square().mean()


def acting(act, model, batch_at, loss_of):
    """The same task, with `act(step)` called once while a step is computed."""
    acted: list[int] = []

    def loss(x, y, steps):
        if (step := int(steps[0])) not in acted:
            acted.append(step)
            act(step)
        return loss_of(x, y)

    def numbered(step):
        x, y = batch_at(step)
        return x, y, torch.full((len(x),), step)

    return model, numbered, loss


def saved_step(run) -> int:
    return int(load_file(run / "state.safetensors")["step"])


def losses(run) -> list[float]:
    return [(row["step"], row["loss"]) for row in read_log(run)]


# --- resuming ---


@pytest.mark.parametrize("kind", ["vae", "dit"])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, monkeypatch, vae, kind):
    """The weights, their moving average, the moments of the optimiser and the losses; stopped at two places."""
    stop_at: set[int] = set()
    optimise, steps = torch.optim.AdamW.step, []

    def step(self, *args):
        steps.append(1)
        if len(steps) in stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        optimise(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)

    how = recipe_of(vae_fit={"steps": 6, "batch": 1}, dit_fit={"steps": 6, "batch": 2})

    def run(name: str) -> dict[str, torch.Tensor]:
        if kind == "vae":
            weights = train.train_vae(tmp_path / name, how, measured=1).state_dict()
        else:
            dit, text = train.train_dit(tmp_path / name, vae, how)
            weights = dit.state_dict() | {f"text.{key}": value for key, value in text.state_dict().items()}
        return weights | load_file(tmp_path / name / "state.safetensors")

    whole = run("whole")
    steps.clear()
    stop_at |= {2, 4}
    for saved in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            run("parts")
        assert saved_step(tmp_path / "parts") == saved
    parts = run("parts")
    assert whole.keys() == parts.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, parts[name])] == []
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") != []


def test_gradients_and_weights_that_lie_differently_in_memory_meet_by_their_indices(tmp_path):
    """The fused AdamW pairs them by address."""

    def trained(layout: torch.memory_format, name: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Conv3d(3, 4, (2, 3, 3)).to(memory_format=layout)
        goal = torch.randn(1, *model.weight.shape, generator=torch.Generator().manual_seed(1))
        settings = Settings(steps=3, batch=1, lr=1e-2, workers=1, clip=1e6)
        loss_of = lambda goal: (model.weight.contiguous() - goal[0]).square().sum() + model.bias.sum()  # noqa: E731
        return fit.fit(model, lambda step: (goal,), loss_of, settings, tmp_path / name, label="test")["weight"]

    plain = trained(torch.contiguous_format, "plain")
    assert torch.equal(trained(torch.channels_last_3d, "last"), plain)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_inside_the_optimiser_waits_for_the_end_of_the_step(tmp_path, monkeypatch, when):
    settings = tiny(Settings(steps=9, batch=4, lr=1e-2))
    whole = fit.fit(*ramp(), settings, tmp_path / "whole", label="test")
    optimise, steps = torch.optim.AdamW.step, []

    def step(self, *args):
        steps.append(1)
        if len(steps) == 4 and when == "before":
            os.kill(os.getpid(), signal.SIGINT)
        optimise(self, *args)
        if len(steps) == 4 and when == "after":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(KeyboardInterrupt):
        fit.fit(*ramp(), settings, tmp_path / "parts", label="test")
    assert saved_step(tmp_path / "parts") == 4
    state = load_file(tmp_path / "parts" / "state.safetensors")
    assert state["optimiser.step.weight"] == 4
    parts = fit.fit(*ramp(), settings, tmp_path / "parts", label="test")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_batches_drawn_by_other_processes_are_the_same_ones(tmp_path, vae):
    """And a run may go on with another number of them."""
    runs = []
    for name, counts in (("thread", (0, 0)), ("processes", (2, 0)), ("others", (0, 1))):
        for steps, loaders in zip((2, 4), counts, strict=True):
            how = recipe_of(dit_fit={"steps": steps, "batch": 2, "decay": 0.0, "loaders": loaders})
            dit, _ = train.train_dit(tmp_path / name, vae, how)
        runs.append((dit.state_dict(), losses(tmp_path / name)))
    for weights, logged in runs[1:]:
        assert logged == runs[0][1] != []
        assert all(torch.equal(value, weights[name]) for name, value in runs[0][0].items())


@pytest.mark.parametrize("told", ["process", "thread"])
def test_a_second_ctrl_c_does_not_wait_and_saves_nothing(tmp_path, told):
    """Whichever thread the system hands the signal to: one that computes, here, and the one that waits for it."""

    def interrupt():
        if told == "thread":
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGINT)

    def twice(step):
        if step == 3:
            interrupt()
            noted = time.monotonic() + 60
            while signal.getsignal(signal.SIGINT) is not signal.default_int_handler and time.monotonic() < noted:
                time.sleep(0.01)
            interrupt()
            time.sleep(1)

    settings = tiny(Settings(steps=9, batch=4, lr=1e-2), workers=1)
    with pytest.raises(KeyboardInterrupt):
        fit.fit(*acting(twice, *ramp()), settings, tmp_path, label="test")
    assert saved_step(tmp_path) == 2
    assert not list(tmp_path.glob(".sora-*"))


STOPPED = """
import os, sys
from sora_model import cli, train
prepare, steps = train.to_video, []
def to_video(frames):
    steps.append(1)
    if len(steps) == 2:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return prepare(frames)
train.to_video = to_video
cli.main()
"""


def stopped_by(number: int, run) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """`sora train vae`, which is sent a signal while it computes its second step; and the changes of its recipe."""
    changes = ["vae_fit.steps=3", "vae_fit.batch=1", "vae.base_dim=4", "vae.z_dim=4", "dit.in_channels=4"]
    changes += ["dit.out_channels=4", "vae_fit.workers=1", "vae_fit.save_every=1"]
    command = [sys.executable, "-c", STOPPED, "train", "vae", *changes, "--run", str(run)]
    environment = os.environ | {"SIGNAL": str(int(number))}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment), changes


def test_sigterm_ends_the_command_after_a_save_and_the_next_one_goes_on_from_it(tmp_path):
    run = tmp_path / "run"
    done, changes = stopped_by(signal.SIGTERM, run)
    assert done.returncode == 128 + signal.SIGTERM and "Traceback" not in done.stderr, done.stderr
    assert "stopped at step 2; the same command resumes from" in done.stdout and "clips/s" in done.stdout
    left = sorted(entry.name for entry in run.iterdir())
    assert left == [".lock", "log.jsonl", "settings.json", "state.safetensors"] and saved_step(run) == 2
    train.train_vae(run, recipe.load(overrides=changes), measured=1)
    assert saved_step(run) == 3


def test_a_run_that_is_killed_loses_what_came_after_its_last_save_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    done, changes = stopped_by(signal.SIGKILL, run)
    assert done.returncode == -signal.SIGKILL and saved_step(run) == 1
    train.train_vae(run, recipe.load(overrides=changes), measured=1)
    assert saved_step(run) == 3 and [step for step, _ in losses(run)] == [3] and not list(run.glob(".sora-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_whoever_acts_upon_a_signal_is_told_after_the_save(tmp_path, number):
    def hang_up(step):
        if step == 3:
            os.kill(os.getpid(), number)

    told = []
    before = signal.signal(number, lambda *args: told.append(saved_step(tmp_path)))
    try:
        with pytest.raises(KeyboardInterrupt):
            settings = tiny(Settings(steps=9, batch=4, lr=1e-2))
            fit.fit(*acting(hang_up, *ramp()), settings, tmp_path, label="test")
    finally:
        signal.signal(number, before)
    assert told == [4]


def test_a_run_goes_on_with_what_it_was_begun_with_only(tmp_path):
    settings = tiny(Settings(steps=4, batch=4, lr=1e-2))
    fit.fit(*ramp(), settings, tmp_path, label="test", made_with={"data": [1]})

    def again(made_with=None, **changes):
        changed = dataclasses.replace(settings, **changes)
        return fit.fit(*ramp(), changed, tmp_path, label="test", made_with=made_with or {"data": (1,)})

    with pytest.raises(CheckpointError, match="begun with lr=0.01, not 0.5"):
        again(lr=0.5)
    with pytest.raises(CheckpointError, match=r"begun with data=\[1\], not \[2\]"):
        again({"data": [2]})
    with pytest.raises(CheckpointError, match="has 4 steps behind it, more than steps=3"):
        again(steps=3)
    assert read_json(tmp_path / "settings.json")["lr"] == 0.01
    again(steps=6)
    assert saved_step(tmp_path) == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("step"), "lacks 1 of .*'step'"),
        (lambda s: s.pop("optimiser.exp_avg.weight"), "lacks 1 of .*'optimiser.exp_avg.weight'"),
        (lambda s: s.update({"optimiser.exp_avg_sq.bias": torch.ones(2)}), r"'optimiser.exp_avg_sq.bias' .*\(1,\)"),
        (lambda s: s.update({"model.weight": torch.ones(1, 4)}), "'model.weight' should have the shape"),
        (lambda s: s.update({"average.weight": torch.ones(1, 3)}), "1 unknown ones"),
        (lambda s: s["model.weight"].fill_(float("inf")), "'model.weight' holds NaN or infinite"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, change, said):
    settings = tiny(Settings(steps=2, batch=4, lr=1e-2))
    fit.fit(*ramp(), settings, tmp_path, label="test")
    state = load_file(tmp_path / "state.safetensors")
    change(state)
    save_file(state, tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match=said):
        fit.fit(*ramp(), dataclasses.replace(settings, steps=4), tmp_path, label="test")


def test_a_log_that_a_crash_cut_short_is_read_up_to_there(tmp_path):
    settings = tiny(Settings(steps=20, batch=4, lr=1e-2))
    fit.fit(*ramp(), settings, tmp_path, label="test")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('3\n{"step": "x", "loss": 1, "seconds": 1}\n{"step": 30, "lo')
    train.write_record(tmp_path / "record", vae=tmp_path, dit=tmp_path, command=["sora"], step=20)
    fit.fit(*ramp(), dataclasses.replace(settings, steps=30), tmp_path, label="test")
    for log in (tmp_path / "log.jsonl", tmp_path / "record" / "vae_log.jsonl"):
        rows = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert rows == [10, 20, 30][: len(rows)] and len(rows) >= 2


def test_a_folder_in_use_is_refused(tmp_path, vae):
    settings, refused = tiny(Settings(steps=1, batch=4, lr=1e-2)), []

    def meanwhile(step):
        for other in (
            lambda: fit.fit(*ramp(), settings, tmp_path, label="test"),
            lambda: train.train_dit(tmp_path, vae, recipe_of()),
        ):
            with pytest.raises(WriteError, match="is in use by another run; wait for it, or use another folder"):
                other()
            refused.append(other)

    fit.fit(*acting(meanwhile, *ramp()), settings, tmp_path, label="test")
    assert len(refused) == 2


def test_the_folder_of_another_run_is_refused(tmp_path, vae):
    """Of another kind, VAE or recipe, or one that began with other weights: every loss would depend on it."""
    how = recipe_of(vae_fit={"steps": 1, "batch": 1}, dit_fit={"steps": 1, "batch": 1})
    train.train_vae(tmp_path / "vae", how, measured=1)
    begun = train.train_dit(tmp_path / "dit", vae, how)
    before = sorted(entry.name for entry in tmp_path.glob("*/*"))
    with pytest.raises(CheckpointError, match="vae was begun with"):
        train.train_dit(tmp_path / "vae", vae, how)
    other = train.CausalVAE(TINY_VAE).requires_grad_(False)
    for said, coder, changed, start in (
        ("vae=", other, how, None),
        ("start=", vae, how, begun),
        ("recipe=", vae, dataclasses.replace(how, draws=3), None),
        ("recipe=", vae, dataclasses.replace(how, buckets=how.buckets[:1]), None),
    ):
        with pytest.raises(CheckpointError, match=f"dit was begun with {said}"):
            train.train_dit(tmp_path / "dit", coder, changed, start=start)
    with pytest.raises(CheckpointError, match="dit was begun with .*=.*, not "):
        train.train_dit(tmp_path / "dit", vae, how, dtype=torch.bfloat16)
    assert sorted(entry.name for entry in tmp_path.glob("*/*")) == before


# --- the optimiser ---


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (8, 20), (1, 5)])
def test_orthogonal_keeps_singular_vectors_and_brings_singular_values_near_1(rows, columns):
    torch.manual_seed(0)
    x = torch.randn(3, rows, columns, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ muon.orthogonal(1000 * x) @ vh.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-10
    assert 0.5 < diagonal.min() and diagonal.max() < 1.3


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_matrices_go_by_muon_and_the_rest_by_adamw(dtype, rounding):
    """The first step from the formula; then, with momentum, the same bits for a matrix as for its transpose."""
    torch.manual_seed(0)
    tall, bias = torch.nn.Parameter(torch.randn(20, 8)), torch.nn.Parameter(torch.randn(8))
    wide, plain = torch.nn.Parameter(tall.detach().T.clone()), torch.nn.Parameter(bias.detach().clone())
    options = dict(lr=0.1, weight_decay=0.5, betas=(0.9, 0.99))
    optimiser, adamw = muon.Muon([bias], [wide, tall], dtype=dtype, **options), torch.optim.AdamW([plain], **options)
    before = tall.detach().clone()
    for step in range(3):
        tall.grad, bias.grad = torch.randn(20, 8), torch.randn(8)
        wide.grad, plain.grad = tall.grad.T.clone(), bias.grad.clone()
        optimiser.step()
        adamw.step()
        if step == 0:
            u, _, vh = torch.linalg.svd(tall.grad, full_matrices=False)
            change = (before * (1 - 0.1 * 0.5) - tall) / (0.1 * 0.2 * 20**0.5)
            values = u.mT @ change @ vh.mT
            apart = (values - torch.diag(values.diagonal())).abs().max()
            assert apart < rounding and (dtype == torch.float32 or apart > 1e-4)
            assert 0.5 < values.diagonal().min() and values.diagonal().max() < 1.3
        assert torch.equal(bias, plain) and torch.equal(tall, wide.T)


def test_muon_trains_the_matrices_of_the_blocks(tmp_path, vae):
    train.train_dit(tmp_path, vae, recipe_of(dit_fit={"steps": 1, "batch": 1}))
    kept = {name.removeprefix("optimiser.momentum.") for name in load_file(tmp_path / "state.safetensors")}
    blocks = {name for name in kept if name.startswith("dit.blocks.")}
    layers = [f"{a}_attn.{x}.weight" for a in ("self", "cross") for x in "qkvo"] + ["ffn.0.weight", "ffn.2.weight"]
    assert blocks == {f"dit.blocks.{i}.{layer}" for i in range(TINY_DIT.layers) for layer in layers}


# --- what is not finite ---


def test_a_gradient_that_is_not_finite_is_refused_before_it_touches_the_weights(tmp_path):
    """Of a finite loss: the slope of a square root at zero."""
    model, batch_at, loss_of = ramp()

    def steep(x, y, steps):
        return loss_of(x, y) + ((0 * model.weight).sqrt().sum() if steps[0] == 2 else 0)

    settings = tiny(Settings(steps=8, batch=4, lr=1e-2))
    with pytest.raises(FloatingPointError, match="norm of its gradients nan at step 2; lower the learning rate"):
        numbered = acting(lambda step: None, model, batch_at, loss_of)[1]
        fit.fit(model, numbered, steep, settings, tmp_path, label="test")
    assert torch.isfinite(model.weight).all() and saved_step(tmp_path) == 2


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    model, batch_at, loss_of = ramp()
    settings = Settings(steps=1, batch=4, lr=1.0)
    with pytest.raises(FloatingPointError, match="the loss is nan .* at step 0; lower the learning rate"):
        fit.fit(model, batch_at, lambda x, y: loss_of(x, y) * float("nan"), settings, tmp_path, label="test")


def test_a_state_that_is_not_finite_is_not_saved_over_a_good_one(tmp_path):
    model, *task = ramp()
    model.register_buffer("spare", torch.zeros(2))

    def spoil(step):
        model.spare.fill_(0.0 if step < 3 else float("nan"))

    settings = tiny(Settings(steps=8, batch=4, lr=1e-2), workers=1)
    with pytest.raises(FloatingPointError, match="cannot write .*state.safetensors.*'model.spare' holds NaN"):
        fit.fit(*acting(spoil, model, *task), settings, tmp_path, label="test")
    assert saved_step(tmp_path) == 2


# --- batches ---


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_clips_count_alike_however_many_workers_share_them(tmp_path, size):
    settings = Settings(steps=20, batch=size, lr=5e-2, weight_decay=0.0)

    def fitted(workers: int) -> torch.Tensor:
        run = tmp_path / str(workers)
        return fit.fit(*ramp(size), dataclasses.replace(settings, workers=workers), run, label="test")["weight"]

    alone = fitted(1)
    for workers in (2, 4):
        torch.testing.assert_close(fitted(workers), alone, atol=1e-5, rtol=0)


def test_fit_descends(tmp_path):
    settings = Settings(steps=150, batch=8, lr=5e-2, weight_decay=0.0)
    weight = fit.fit(*ramp(8), settings, tmp_path, label="test")["weight"]
    torch.testing.assert_close(weight, torch.ones(1, 3), atol=0.02, rtol=0)


def test_batches_of_the_vae_are_frames_of_the_world_and_windows_of_them():
    how = recipe_of(vae_fit={"steps": 40, "batch": 2})
    shapes = set()
    for step in range(40):
        videos = train.vae_batch(how, step)
        assert torch.equal(videos, train.vae_batch(how, step)) and videos.dtype == torch.uint8
        shapes.add(tuple(videos.shape[:4]))
        assert videos.float().std((1, 2, 3)).max() > 5  # something is to be seen
    assert {shape[1] for shape in shapes if shape[0] == 2} == {1, 5, 9}
    assert {(8, 5, 16, 16), (2, 5, 32, 32)} <= shapes and {shape[0] for shape in shapes} == {2, 8}
    assert {shape[1] for step in range(4) for shape in [tuple(train.vae_batch(how, step).shape)]} == {1}


def test_vae_training_learns_and_measures_its_latents(tmp_path):
    config = train.VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1), temporal_downsample=(True,), num_res_blocks=1)
    how = recipe_of(vae=config, vae_fit={"steps": 12, "batch": 2, "lr": 3e-3})
    videos = to_video(world.batch(range(10**12, 10**12 + 2), frames=5)[0])

    def error(vae: train.CausalVAE) -> float:
        with torch.no_grad():
            return (vae(videos, sample=False)[0] - videos).square().mean().item()

    torch.manual_seed(how.vae_fit.seed)
    fresh = train.CausalVAE(config)
    train.start_direct(fresh)
    vae = train.train_vae(tmp_path, how, measured=8)
    assert error(vae) < 0.5 * error(fresh)
    again = train.load_vae(tmp_path)
    assert again.config == vae.config and min(vae.config.latents_std) > 0
    clips = [world.sample(10**12 + i, frames=5, size=(32, 32)).video for i in range(8)]
    with torch.no_grad():
        latents = vae.normalize(vae.encode(to_video(np.stack(clips)))[0])
    assert latents.mean((0, 2, 3, 4)).abs().max() < 1e-4
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 1e-3


def test_training_the_decoder_alone_leaves_the_latents_as_they_are(tmp_path):
    """So a transformer goes on with it; and no gradient is computed of what stays."""
    how = recipe_of(vae=TINY_VAE, vae_fit={"steps": 8, "batch": 2, "lr": 3e-3})
    first = train.train_vae(tmp_path / "first", how, measured=1)
    longer = dataclasses.replace(how, vae_fit=dataclasses.replace(how.vae_fit, seed=1, steps=40))
    tuned = train.train_vae(tmp_path / "tuned", longer, start=first, decoder=True, measured=1)
    before, after = first.state_dict(), train.load_vae(tmp_path / "tuned").state_dict()
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert tuned.config == first.config and first.config.latents_std is not None

    videos = to_video(world.batch(range(10**12, 10**12 + 2), frames=5)[0])
    with torch.no_grad():
        errors = [(vae(videos, sample=False)[0] - videos).square().mean().item() for vae in (first, tuned)]
    assert errors[1] < 0.9 * errors[0]


def test_a_decoder_alone_without_a_vae_to_start_with_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give one by start="):
        train.train_vae(tmp_path, recipe_of(vae_fit={"steps": 1, "batch": 1}), decoder=True)
    assert not any(tmp_path.iterdir())


def test_a_vae_of_other_sizes_to_start_with_is_refused(tmp_path):
    other = train.CausalVAE(dataclasses.replace(TINY_VAE, base_dim=2 * TINY_VAE.base_dim))
    with pytest.raises(CheckpointError, match="start"):
        train.train_vae(tmp_path, recipe_of(vae=TINY_VAE, vae_fit={"steps": 1, "batch": 1}), start=other)
    assert not any(tmp_path.iterdir())


# --- the transformer's steps ---


def steps_of(monkeypatch, tmp_path, vae, how, **options):
    """`batch_at` and `loss_of` of a run, and its model."""
    taken = {}

    def fit(model, batch_at, loss_of, *args, on_save, **rest):
        taken.update(model=model, batch_at=batch_at, loss_of=loss_of)
        on_save(0, {name: value.detach() for name, value in model.state_dict().items()})

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", fit)
        train.train_dit(tmp_path, vae, how, **options)
    torch.nn.init.normal_(taken["model"]["dit"].head.weight, std=0.3)
    return taken["model"], taken["batch_at"], taken["loss_of"]


def test_a_step_draws_every_kind_of_clip_and_depends_on_its_number_alone(monkeypatch, tmp_path, vae):
    how = recipe_of(causal=0.5, apart=0.5, draws=3)
    model, batch_at, _ = steps_of(monkeypatch, tmp_path, vae, how)
    grids, causal, apart, known = set(), [], [], []
    for step in range(60):
        batch = batch_at(step)
        assert all(torch.equal(a, b) for a, b in zip(batch, batch_at(step), strict=True))
        video, ids, noise, times, tokens, by_frame = batch
        clips, frames = video.shape[:2]
        assert ids.shape[:2] == noise.shape[:2] == times.shape[:2] == tokens.shape[:2] == (clips, 3)
        assert noise.shape[3] == times.shape[2] == tokens.shape[2] == (frames - 1) // 4 + 1
        grids.add((clips, *video.shape[1:4]))
        causal.append(by_frame.float().mean().item())
        apart += (times != times[..., :1]).any(-1).flatten().tolist()
        known += [share for share in tokens.flatten(2).float().mean(-1).flatten().tolist()]
        assert (ids < 3 + len(world.VOCABULARY)).all() and ((0 < times) & (times < 1)).all()
    assert grids == {(4, 5, 32, 32), (2, 9, 16, 32)}
    assert set(causal) == {0.0, 1.0} and 0.3 < np.mean(causal) < 0.7
    assert 0.4 < np.mean(apart) < 0.6 and max(known) < 1 and 0.2 < np.mean(np.array(known) == 0) < 0.7


def test_the_loss_is_that_of_what_is_not_known(monkeypatch, tmp_path, vae):
    """Noise where a clip is known changes nothing; by hand, the error of the velocity over all other cells."""
    _, batch_at, loss_of = steps_of(monkeypatch, tmp_path, vae, recipe_of(causal=0.0))
    for step in range(8):
        video, ids, noise, times, tokens, causal = batch_at(step)
        if tokens.any():
            break
    loss = loss_of(video, ids, noise, times, tokens, causal)
    mask = tokens.repeat_interleave(2, 3).repeat_interleave(2, 4)[:, :, None].expand_as(noise)
    assert loss == loss_of(video, ids, torch.where(mask, 7.0, noise), times, tokens, causal)
    assert loss != loss_of(video, ids, torch.where(mask, noise, 7.0), times, tokens, causal)


def test_causal_steps_see_no_later_frame(monkeypatch, tmp_path, vae):
    how = recipe_of(buckets=(Bucket(9, (16, 16), batch=1),), draws=1, apart=1.0)
    model, batch_at, loss_of = steps_of(monkeypatch, tmp_path, vae, how)
    seen = []
    forward = model["dit"].forward
    monkeypatch.setattr(model["dit"], "forward", lambda *a, **k: seen.append(forward(*a, **k)) or seen[-1])
    video, ids, noise, times, tokens, _ = batch_at(0)
    none = torch.zeros_like(tokens)
    for causal in (True, False):
        for last in (noise[:, :, :, -1:], noise[:, :, :, -1:] + 1):
            changed = torch.cat([noise[:, :, :, :-1], last], 3)
            loss_of(video, ids, changed, times, none, torch.tensor([causal]))
    assert torch.equal(seen[0][:, :, :-1], seen[1][:, :, :-1])
    assert not torch.equal(seen[2][:, :, :-1], seen[3][:, :, :-1])


def test_checkpointing_changes_no_bit_and_bf16_only_rounds(monkeypatch, tmp_path, vae):
    def step(**options):
        model, batch_at, loss_of = steps_of(monkeypatch, tmp_path, vae, recipe_of(), **options)
        loss = loss_of(*batch_at(3))
        return loss, torch.autograd.grad(loss, list(model.parameters()))

    torch.manual_seed(0)
    loss, slopes = step()
    again, same = step(checkpointing=True)
    assert loss == again and all(torch.equal(a, b) for a, b in zip(slopes, same, strict=True))
    rounded, near = step(dtype=torch.bfloat16)
    assert 0 < abs(rounded - loss) < 0.05 * loss and {t.dtype for t in near} == {torch.float32}
    both, alike = step(dtype=torch.bfloat16, checkpointing=True)
    assert both == rounded and all(torch.equal(a, b) for a, b in zip(near, alike, strict=True))
    whole = torch.cat([t.flatten() for t in slopes])
    assert (torch.cat([t.flatten() for t in near]) - whole).norm() < 0.1 * whole.norm()


def test_training_begins_with_the_weights_it_is_given(monkeypatch, tmp_path, vae):
    torch.manual_seed(3)
    how = recipe_of(dit_fit={"steps": 1})
    start = train.train_dit(tmp_path / "first", vae, how)
    model, *_ = steps_of(monkeypatch, tmp_path, vae, how, start=start)
    for name, part in zip(("dit", "text"), start, strict=True):
        for key, value in part.state_dict().items():
            if key != "head.weight":
                assert torch.equal(model[name].state_dict()[key], value), key
    wider = recipe_of(dit=dataclasses.replace(TINY_DIT, dim=32))
    with pytest.raises(CheckpointError, match="start: dit"):
        train.train_dit(tmp_path / "second", vae, wider, start=start)


def test_fused_and_reference_losses_agree_over_hundreds_of_steps(tmp_path, vae):
    how = recipe_of(buckets=(Bucket(5, (16, 16), batch=2),), draws=1, dit_fit={"steps": 200, "save_every": 1000})
    for impl in ("auto", "reference"):
        train.train_dit(tmp_path / impl, vae, how, impl=impl)
    fused, plain = (np.array([loss for _, loss in losses(tmp_path / impl)]) for impl in ("auto", "reference"))
    assert len(fused) == 20 and fused[-5:].mean() < 0.9 * fused[:2].mean()
    np.testing.assert_allclose(fused, plain, rtol=2e-3)


def test_a_sheet_shows_each_prompt_in_a_row(tmp_path, tiny_checkpoint):
    from PIL import Image

    from sora_model.pipeline import Sora

    file = tmp_path / "samples" / "1.png"
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    train.write_sheet(file, sora, ["a red circle", "a ring"])
    sheet = np.asarray(Image.open(file))
    assert sheet.shape == (2 * 64, 5 * 64, 3)
    clip = sora.generate("a red circle", steps=10, seed=0)
    assert np.array_equal(sheet[:64, 64:128], clip.frames[4])
    pytest.importorskip("c2pa", reason="the extra [safety] is not installed")
    verdict = credentials.verify(file)
    assert verdict.answer == credentials.TRUSTED and verdict.actions[0]["parameters"]["steps"] == 10


# --- settings ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["dit_fit.steps=0"], "dit_fit does not describe a Settings: steps must be a whole number from 1"),
        (["dit.layers=x"], "dit does not describe a DiTConfig: .*layers must be a whole number"),
        (["dit.colour=1"], "dit does not describe a DiTConfig: .*colour"),
        (["speed=1"], "'speed=1' must be KEY=VALUE, KEY beginning with one of vae, dit, text"),
        (["draws"], "'draws' must be KEY=VALUE"),
        (["draws=0"], "draws must be a whole number from 1 to 1024; got 0"),
        (["vae.z_dim=8"], "dit.in_channels and dit.out_channels must be vae.z_dim=8; got 12"),
        (["buckets=[]"], "buckets must be a list of settings by name, at least one"),
        (["buckets=[{frames: 17, size: [64, 72]}]"], "which patches of .* do not divide"),
        (["buckets=[{frames: 17, size: [64, 70]}]"], "the width of a video must be a multiple of 8"),
        (["vae=3"], "vae must hold settings by name; got 3"),
        (["dit_fit.lr=${nothing}"], "cannot be read as YAML settings"),
    ],
)
def test_a_recipe_names_what_is_wrong(changes, said):
    with pytest.raises(CheckpointError, match=said):
        recipe.load(overrides=changes)


def test_recipes_come_from_files(tmp_path):
    assert recipe.load().dit == presets.DIT["toy"]
    assert recipe.load(overrides=["dit.layers=3", "dit_fit.lr=5e-4"]).dit.layers == 3
    file = tmp_path / "mine.yaml"
    with pytest.raises(CheckpointError, match="there is no file"):
        recipe.load(file)
    for text, said in (("[1, 2]", "must hold settings by name"), ("a: [", "cannot be read as YAML"), ("", "vae must")):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=said):
            recipe.load(file)
    file.write_text(recipe.TOY.read_text().replace("draws: 1 ", "draws: 7 "))
    assert recipe.load(file).draws == 7


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps must be a whole number from 1"),
        ({"steps": 2.0}, "steps"),
        ({"batch": True}, "batch must be a whole number from 1 to 4096; got True"),
        ({"batch": 10**9}, "batch"),
        ({"lr": float("nan")}, "lr must be a number from 0"),
        ({"lr": float("inf")}, "lr must be a number from 0"),
        ({"lr": "1"}, "lr must be a number from 0"),
        ({"clip": float("inf")}, "clip"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"betas": (0.9, 2)}, "betas must be a number from 0 to 1; got 2"),
        ({"ema": 1.5}, "ema must be a number from 0 to 1; got 1.5"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed must be a whole number from 0 to 2147483647"),
    ],
)
def test_settings_name_what_is_wrong(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(recipe.load().dit_fit, **changes)


def test_write_record_keeps_logs_and_draws_the_curve(tmp_path):
    for name in ("vae", "dit"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "settings.json").write_text("{}")
        rows = (f'{{"step": {step}, "loss": {1 / step}, "seconds": 1.0}}\n' for step in (10, 20))
        (folder / "log.jsonl").write_text("".join(rows))
    train.write_record(tmp_path / "out", vae=tmp_path / "vae", dit=tmp_path / "dit", command=["sora"], step=20)
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["step"] == 20 and record["command"] == ["sora"]
    assert (tmp_path / "out" / "dit_log.jsonl").read_text().count("\n") == 2
    if (tmp_path / "out" / "loss_curve.svg").exists():
        assert "<svg" in (tmp_path / "out" / "loss_curve.svg").read_text()
    else:
        with pytest.raises(ImportError):
            __import__("matplotlib")
