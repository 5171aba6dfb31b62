"""Training: what is resumed equals what was never stopped, and nothing bad is ever saved over something good."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sora_model import fit, train, world
from sora_model.checkpoint import CheckpointError, read_json, write_tensors
from sora_model.files import WriteError

TINY_VAE = train.VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
TINY_DIT = dataclasses.replace(train.DIT["toy"], dim=24, heads=2, layers=1, ffn_dim=32, text_dim=16, freq_dim=16)


def tiny(settings: fit.Settings, **changes) -> fit.Settings:
    return dataclasses.replace(settings, batch=4, save_every=2, warmup=1, **changes)


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


def saved_step(run) -> int:
    return int(load_file(run / "state.safetensors")["step"])


def losses(run) -> list[float]:
    return [(row["step"], row["loss"]) for row in fit.read_log(run)]


# --- resuming ---


@pytest.mark.parametrize("kind", ["vae", "dit"])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, monkeypatch, vae, kind):
    """The weights, their moving average, the moments of the optimiser and the losses; stopped at two places."""
    stop_at: set[int] = set()
    draw = train.generator_of

    def generator_of(seed, step):
        if step in stop_at and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            stop_at.remove(step)
            os.kill(os.getpid(), signal.SIGINT)
        return draw(seed, step)

    monkeypatch.setattr(train, "generator_of", generator_of)

    settings = dataclasses.replace(tiny(train.DIT_SETTINGS, steps=6), batch=2)

    def run(name: str) -> dict[str, torch.Tensor]:
        if kind == "vae":
            weights = train.train_vae(
                tmp_path / name, dataclasses.replace(settings, weight_decay=0.0), TINY_VAE, measured=1
            ).state_dict()
        else:
            dit, text = train.train_dit(tmp_path / name, vae, settings, TINY_DIT, clips=8)
            weights = dit.state_dict() | {f"text.{key}": value for key, value in text.state_dict().items()}
        return weights | load_file(tmp_path / name / "state.safetensors")

    whole = run("whole")
    stop_at |= {1, 3}
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
        settings = fit.Settings(steps=3, batch=1, lr=1e-2, workers=1, clip=1e6)
        loss_of = lambda goal: (model.weight.contiguous() - goal[0]).square().sum() + model.bias.sum()  # noqa: E731
        return fit.fit(model, lambda step: (goal,), loss_of, settings, tmp_path / name, label="test")["weight"]

    plain = trained(torch.contiguous_format, "plain")
    assert torch.equal(trained(torch.channels_last_3d, "last"), plain)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_inside_the_optimiser_waits_for_the_end_of_the_step(tmp_path, monkeypatch, when):
    settings = tiny(fit.Settings(steps=9, batch=4, lr=1e-2))
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
    assert state["adam.step.weight"] == 4
    parts = fit.fit(*ramp(), settings, tmp_path / "parts", label="test")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait_and_saves_nothing(tmp_path):
    model, batch_at, loss_of = ramp()

    def twice(step):
        for _ in range(2 if step == 3 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return batch_at(step)

    settings = tiny(fit.Settings(steps=9, batch=4, lr=1e-2))
    with pytest.raises(KeyboardInterrupt):
        fit.fit(model, twice, loss_of, settings, tmp_path, label="test")
    assert saved_step(tmp_path) == 2
    assert not list(tmp_path.glob(".sora-*"))


STOPPED = """
import os, signal, sys
from sora_model import cli, train
train.TOY_VAE = dict(base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
draw = train.vae_batch
def vae_batch(settings, step):
    if step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return draw(settings, step)
train.vae_batch = vae_batch
cli.main()
"""


def test_sigterm_ends_the_command_after_a_save_and_the_next_one_goes_on_from_it(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", STOPPED, "train", "vae", "--run", run, "--steps", 3, "--batch", 2]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM and "Traceback" not in done.stderr, done.stderr
    assert "stopped at step 2; the same command resumes from" in done.stdout
    left = sorted(entry.name for entry in run.iterdir())
    assert left == [".lock", "log.jsonl", "settings.json", "state.safetensors"] and saved_step(run) == 2
    train.train_vae(run, dataclasses.replace(train.VAE_SETTINGS, steps=3, batch=2), TINY_VAE, measured=1)
    assert saved_step(run) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_whoever_acts_upon_a_signal_is_told_after_the_save(tmp_path, number):
    model, batch_at, loss_of = ramp()

    def hang_up(step):
        if step == 3:
            os.kill(os.getpid(), number)
        return batch_at(step)

    told = []
    before = signal.signal(number, lambda *args: told.append(saved_step(tmp_path)))
    try:
        with pytest.raises(KeyboardInterrupt):
            fit.fit(model, hang_up, loss_of, tiny(fit.Settings(steps=9, batch=4, lr=1e-2)), tmp_path, label="test")
    finally:
        signal.signal(number, before)
    assert told == [4]


def test_a_run_goes_on_with_what_it_was_begun_with_only(tmp_path):
    settings = tiny(fit.Settings(steps=4, batch=4, lr=1e-2))
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
        (lambda s: s.pop("adam.exp_avg.weight"), "lacks 1 of .*'adam.exp_avg.weight'"),
        (lambda s: s.update({"adam.exp_avg_sq.bias": torch.ones(2)}), r"'adam.exp_avg_sq.bias' should have .*\(1,\)"),
        (lambda s: s.update({"model.weight": torch.ones(1, 4)}), "'model.weight' should have the shape"),
        (lambda s: s.update({"average.weight": torch.ones(1, 3)}), "1 unknown ones"),
        (lambda s: s["model.weight"].fill_(float("inf")), "'model.weight' holds NaN or infinite"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, change, said):
    settings = tiny(fit.Settings(steps=2, batch=4, lr=1e-2))
    fit.fit(*ramp(), settings, tmp_path, label="test")
    state = load_file(tmp_path / "state.safetensors")
    change(state)
    save_file(state, tmp_path / "state.safetensors")
    with pytest.raises(CheckpointError, match=said):
        fit.fit(*ramp(), dataclasses.replace(settings, steps=4), tmp_path, label="test")


def test_a_log_that_a_crash_cut_short_is_read_up_to_there(tmp_path):
    settings = tiny(fit.Settings(steps=20, batch=4, lr=1e-2))
    fit.fit(*ramp(), settings, tmp_path, label="test")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('3\n{"step": "x", "loss": 1, "seconds": 1}\n{"step": 30, "lo')
    train.write_record(tmp_path / "record", vae=tmp_path, dit=tmp_path, command=["sora"], step=20)
    fit.fit(*ramp(), dataclasses.replace(settings, steps=30), tmp_path, label="test")
    for log in (tmp_path / "log.jsonl", tmp_path / "record" / "vae_log.jsonl"):
        rows = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert rows == [10, 20, 30][: len(rows)] and len(rows) >= 2


def test_a_folder_in_use_is_refused(tmp_path, vae):
    model, batch_at, loss_of = ramp()
    settings, refused = tiny(fit.Settings(steps=1, batch=4, lr=1e-2)), []

    def meanwhile(step):
        for other in (
            lambda: fit.fit(*ramp(), settings, tmp_path, label="test"),
            lambda: train.train_dit(tmp_path, vae, settings, TINY_DIT, clips=2),
        ):
            with pytest.raises(WriteError, match="is in use by another run; wait for it, or use another folder"):
                other()
            refused.append(other)
        return batch_at(step)

    fit.fit(model, meanwhile, loss_of, settings, tmp_path, label="test")
    assert len(refused) == 2


def test_the_folder_of_another_kind_of_run_is_refused_before_any_clip_is_encoded(tmp_path, vae, monkeypatch):
    model, batch_at, loss_of = ramp()
    fit.fit(model, batch_at, loss_of, tiny(fit.Settings(steps=1, batch=4, lr=1e-2)), tmp_path, label="test")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(train, "encode_clips", lambda *args, **options: pytest.fail("clips were encoded"))
    with pytest.raises(CheckpointError, match="is the folder of another kind of run; use a folder of its own"):
        train.train_dit(tmp_path, vae, tiny(train.DIT_SETTINGS, steps=1), TINY_DIT, clips=2)
    assert sorted(tmp_path.iterdir()) == before


def test_latents_of_another_seed_number_or_vae_are_refused(tmp_path, vae, monkeypatch):
    """Left by a run that ended before its first save: nothing else tells what captions they go with."""
    settings = tiny(train.DIT_SETTINGS, steps=1)
    monkeypatch.setattr(train, "fit", lambda *args, **options: pytest.fail("these latents were taken"))
    latents = train.encode_clips(vae, range(4), progress=False)
    write_tensors(tmp_path / "old" / "latents.safetensors", {"latents": latents, "mean": vae.latents_mean})
    with pytest.raises(CheckpointError, match="was made with seed=None, not 0; use another folder, or remove it"):
        train.train_dit(tmp_path / "old", vae, settings, TINY_DIT, clips=4)

    class Ended(Exception):
        pass

    def end(*args, **options):
        raise Ended

    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(train, "fit", end)
        train.train_dit(tmp_path, vae, settings, TINY_DIT, clips=4)
    other = train.CausalVAE(TINY_VAE).requires_grad_(False)
    for said, coder, changed, clips in (
        ("seed=0, not 1", vae, dataclasses.replace(settings, seed=1), 4),
        ("clips=4, not 5", vae, settings, 5),
        ("vae=", other, settings, 4),
    ):
        with pytest.raises(CheckpointError, match=f"latents.safetensors was made with {said}"):
            train.train_dit(tmp_path, coder, changed, TINY_DIT, clips=clips)


def test_ctrl_c_while_clips_are_encoded_does_not_wait_for_all_of_them(vae, monkeypatch):
    encoded = []

    def encode(video):
        encoded.append(1)
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return torch.zeros(1, 1), None

    monkeypatch.setattr(vae, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        train.encode_clips(vae, range(400), frames=1, progress=False)
    assert len(encoded) < 25  # of 50 chunks, several at once


# --- what is not finite ---


def test_a_gradient_that_is_not_finite_is_refused_before_it_touches_the_weights(tmp_path):
    """Of a finite loss: the slope of a square root at zero."""
    model, batch_at, loss_of = ramp()

    def steep(x, y):
        return loss_of(x, y) + ((0 * model.weight).sqrt().sum() if len(calls) == 3 else 0)

    calls: list[int] = []
    settings = tiny(fit.Settings(steps=8, batch=4, lr=1e-2))
    with pytest.raises(FloatingPointError, match="norm of its gradients nan at step 2; lower the learning rate"):
        fit.fit(model, lambda step: calls.append(step) or batch_at(step), steep, settings, tmp_path, label="test")
    assert torch.isfinite(model.weight).all() and saved_step(tmp_path) == 2


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    model, batch_at, loss_of = ramp()
    settings = fit.Settings(steps=1, batch=4, lr=1.0)
    with pytest.raises(FloatingPointError, match="the loss is nan .* at step 0; lower the learning rate"):
        fit.fit(model, batch_at, lambda x, y: loss_of(x, y) * float("nan"), settings, tmp_path, label="test")


def test_a_state_that_is_not_finite_is_not_saved_over_a_good_one(tmp_path):
    model, batch_at, loss_of = ramp()
    model.register_buffer("spare", torch.zeros(2))

    def spoil(step):
        model.spare.fill_(0.0 if step < 3 else float("nan"))
        return batch_at(step)

    settings = tiny(fit.Settings(steps=8, batch=4, lr=1e-2))
    with pytest.raises(FloatingPointError, match="cannot write .*state.safetensors.*'model.spare' holds NaN"):
        fit.fit(model, spoil, loss_of, settings, tmp_path, label="test")
    assert saved_step(tmp_path) == 2


# --- batches ---


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_clips_count_alike_however_many_workers_share_them(tmp_path, size):
    settings = fit.Settings(steps=20, batch=size, lr=5e-2, weight_decay=0.0)

    def fitted(workers: int) -> torch.Tensor:
        run = tmp_path / str(workers)
        return fit.fit(*ramp(size), dataclasses.replace(settings, workers=workers), run, label="test")["weight"]

    alone = fitted(1)
    for workers in (2, 4):
        torch.testing.assert_close(fitted(workers), alone, atol=1e-5, rtol=0)


def test_fit_descends(tmp_path):
    settings = fit.Settings(steps=150, batch=8, lr=5e-2, weight_decay=0.0)
    weight = fit.fit(*ramp(8), settings, tmp_path, label="test")["weight"]
    torch.testing.assert_close(weight, torch.ones(1, 3), atol=0.02, rtol=0)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_vae_trains_on_batches_of_any_size(tmp_path, batch):
    """Also in the steps that take half as many clips."""
    settings = dataclasses.replace(train.VAE_SETTINGS, steps=5, batch=batch)
    sizes = {len(train.vae_batch(settings, step)) for step in range(5)}
    assert max(1, batch // 2) in sizes
    train.train_vae(tmp_path, settings, TINY_VAE, measured=1)
    assert saved_step(tmp_path) == 5


def test_vae_training_learns_and_measures_its_latents(tmp_path):
    config = train.VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1), temporal_downsample=(True,), num_res_blocks=1)
    videos = train.to_video(world.batch(range(10**12, 10**12 + 2), frames=5)[0])

    def error(vae: train.CausalVAE) -> float:
        with torch.no_grad():
            return (vae(videos, sample=False)[0] - videos).square().mean().item()

    settings = dataclasses.replace(tiny(train.VAE_SETTINGS, steps=12), lr=3e-3)
    torch.manual_seed(settings.seed)
    fresh = train.CausalVAE(config)
    train.start_direct(fresh)
    vae = train.train_vae(tmp_path, settings, config, measured=8)
    assert error(vae) < 0.5 * error(fresh)
    again = train.load_vae(tmp_path)
    assert again.config == vae.config and min(vae.config.latents_std) > 0
    latents = vae.normalize(train.encode_clips(vae, range(10**12, 10**12 + 8), progress=False))
    assert latents.mean((0, 2, 3, 4)).abs().max() < 0.5
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 0.5


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
        dataclasses.replace(train.DIT_SETTINGS, **changes)


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
