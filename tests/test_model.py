"""Flow matching, text encoders and training."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from sora_model import fit, flow, train, world
from sora_model.checkpoint import CheckpointError, read_tensors
from sora_model.text import MAX_CHARACTERS, WordTextConfig, WordTextEncoder, check_prompt, split_words

# --- flow ---


def test_schedule_and_step_agree_with_the_flow_match_euler_scheduler():
    diffusers = pytest.importorskip("diffusers")
    steps, shift = 7, 5.0
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
    times = flow.schedule(steps, shift)
    torch.testing.assert_close(times.float(), theirs.sigmas.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((times[:-1] * flow.TIME_SCALE).float(), theirs.timesteps.float(), rtol=1e-6, atol=1e-3)

    noise, weight = torch.randn(2, 3, 4), torch.randn(4, 4) / 4
    expected = noise
    for t in theirs.timesteps:
        expected = theirs.step(expected @ weight * (t / 1000), t, expected).prev_sample
    actual = flow.sample(lambda x, t: x @ weight * t[:, None, None], noise, steps=steps, shift=shift)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_true_velocity_leads_back_to_the_data_in_one_step_or_many():
    data, noise = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    target = flow.velocity_target(data, noise)
    for steps, shift, solver in ((1, 1.0, "euler"), (9, 3.0, "euler"), (4, 2.0, "heun")):
        back = flow.sample(lambda x, t: target, noise, steps=steps, shift=shift, solver=solver)
        torch.testing.assert_close(back, data)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    x = flow.interpolate(data, noise, t)
    torch.testing.assert_close(x[0], data[0])
    torch.testing.assert_close(x[1], 0.7 * data[1] + 0.3 * noise[1])
    torch.testing.assert_close(x[2], noise[2])


def test_heun_is_of_second_order():
    # dx/dt = x from x(1) = 1: x(0) = 1/e
    def error(solver: str, steps: int) -> float:
        x = flow.sample(lambda x, t: x, torch.ones(1, 1, dtype=torch.float64), steps=steps, solver=solver)
        return abs(x.item() - torch.exp(torch.tensor(-1.0, dtype=torch.float64)).item())

    assert error("euler", 20) / error("euler", 40) == pytest.approx(2, rel=0.1)
    # the last step is one of Euler, whose local error is of second order too
    assert error("heun", 20) / error("heun", 40) == pytest.approx(4, rel=0.15)


def test_times_are_reproducible_inside_the_interval_and_shifted():
    def draw(**options):
        return flow.sample_times(20_000, generator=torch.Generator().manual_seed(3), **options)

    assert torch.equal(draw(), draw())
    for options in ({}, {"distribution": "uniform"}, {"shift": 3.0}):
        assert 0 <= draw(**options).min() and draw(**options).max() <= 1
    assert draw().median().item() == pytest.approx(0.5, abs=0.01)
    assert draw(shift=3.0).median().item() == pytest.approx(0.75, abs=0.01)
    assert draw(distribution="uniform").std().item() == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_extrapolates_from_the_null_prompt(batched):
    def model(x, t, text, lens):
        return x * text.sum((1, 2))[:, None] + t[:, None] * lens[:, None]

    x, t = torch.randn(1, 4), torch.rand(1)
    prompt = torch.randn(1, 2, 3), torch.tensor([2])
    null = torch.randn(1, 2, 3), torch.tensor([1])
    velocity = flow.guided(model, prompt, null, 4.0, batched=batched)(x, t)
    away = model(x, t, *null)
    torch.testing.assert_close(velocity, away + 4.0 * (model(x, t, *prompt) - away))
    torch.testing.assert_close(flow.guided(model, prompt, null, 1.0)(x, t), model(x, t, *prompt))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: flow.schedule(0), "steps must be a whole number of at least 1, got 0"),
        (lambda: flow.schedule(True), "steps"),
        (lambda: flow.schedule(4, shift=-1.0), "shift must be positive, got -1.0"),
        (lambda: flow.sample(lambda x, t: x, torch.ones(1, 1), steps=1, solver="rk4"), "solver"),
        (lambda: flow.sample_times(1, generator=torch.Generator(), distribution="beta"), "distribution"),
    ],
)
def test_flow_names_the_argument_that_is_wrong(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# --- text ---


@pytest.fixture
def encoder():
    torch.manual_seed(1)
    return WordTextEncoder(WordTextConfig(words=world.VOCABULARY, dim=16, layers=2, heads=2, max_tokens=12))


def test_words_are_lowered_and_freed_of_punctuation(encoder):
    assert split_words("A RED circle, bounces!  (don't)") == ["a", "red", "circle", "bounces", "don't"]
    assert torch.equal(encoder.tokenize(["A RED circle, bounces!"]), encoder.tokenize(["a red circle bounces"]))
    assert encoder.unknown("a red Elephant, an elephant and a giraffe") == ["elephant", "giraffe"]
    assert all(not encoder.unknown(prompt) for prompt, _ in world.eval_prompts())


def test_a_prompt_means_the_same_alone_and_in_a_batch_and_padding_is_zero(encoder):
    long, short = "a red circle moves to the right and bounces", "a ring"
    both, lens = encoder.encode([long, short])
    alone, one = encoder.encode([short])
    assert lens.tolist() == [9, 2] and one.tolist() == [2]
    torch.testing.assert_close(both[1:, :2], alone)
    assert both[1, 2:].abs().max() == 0
    assert (encoder.encode(["a ring"])[0] - encoder.encode(["ring a"])[0]).abs().max() > 1e-3


def test_forgetting_is_reproducible_and_empties_whole_prompts(encoder):
    ids = encoder.tokenize(["a red circle bounces"] * 4000)
    lost = encoder.forget(ids, words=0.05, prompts=0.1, generator=torch.Generator().manual_seed(0))
    again = encoder.forget(ids, words=0.05, prompts=0.1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lost, again)
    empty = encoder.tokenize([""])[0, 0]
    dropped = lost[:, 0] == empty
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.015)
    assert (lost[dropped, 1:] == 0).all()
    unknown = encoder.tokenize(["elephant"])[0, 0]
    assert (lost[~dropped] == unknown).float().mean().item() == pytest.approx(0.05, abs=0.01)


def test_bad_prompts_and_configs_are_named(encoder):
    with pytest.raises(ValueError, match="no word"):
        check_prompt("  ?! ")
    with pytest.raises(ValueError, match=f"at most {MAX_CHARACTERS}"):
        check_prompt("red " * 5000)
    with pytest.raises(TypeError, match="must be a str, got int"):
        check_prompt(7)
    with pytest.raises(ValueError, match="13 words"):
        encoder.encode(["red " * 13])
    with pytest.raises(ValueError, match="dim must be a multiple of heads"):
        WordTextConfig(words=("a",), dim=6, heads=4)
    with pytest.raises(ValueError, match="distinct"):
        WordTextConfig(words=("a", "a"))


# --- training ---

TINY_VAE = train.VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
TINY_DIT = dataclasses.replace(train.DIT["toy"], dim=24, heads=2, layers=1, ffn_dim=32, text_dim=16, freq_dim=16)


def tiny(settings: fit.Settings, **changes) -> fit.Settings:
    return dataclasses.replace(settings, batch=4, save_every=2, warmup=1, **changes)


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path):
    torch.manual_seed(5)
    vae = train.CausalVAE(TINY_VAE).requires_grad_(False)
    settings = tiny(train.DIT_SETTINGS, steps=5)

    def run(name: str, **options):
        dit, text = train.train_dit(tmp_path / name, vae, settings, TINY_DIT, clips=8, **options)
        return dit.state_dict() | {f"text.{key}": value for key, value in text.state_dict().items()}

    class Stopped(Exception):
        pass

    def stop(dit, text, step):
        if step == 4:
            raise Stopped

    whole = run("whole")
    with pytest.raises(Stopped):
        run("parts", on_save=stop)
    assert int(read_tensors(tmp_path / "parts" / "state.safetensors")["step"]) == 4
    parts = run("parts")
    assert whole.keys() == parts.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, parts[name])] == []
    rows = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 5


def test_training_stops_gently_on_ctrl_c_and_refuses_other_settings(tmp_path):
    model = torch.nn.Linear(3, 1)
    settings = tiny(fit.Settings(steps=30, batch=4, lr=1e-2), workers=2)

    def loss_at(step, part):
        if step == 7:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))[part]
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    with pytest.raises(KeyboardInterrupt):
        fit.fit(model, loss_at, settings, tmp_path, label="test")
    assert int(read_tensors(tmp_path / "state.safetensors")["step"]) == 7
    with pytest.raises(CheckpointError, match="begun with lr=0.01, not 0.5"):
        fit.fit(model, loss_at, dataclasses.replace(settings, lr=0.5), tmp_path, label="test")


def test_fit_descends_averages_the_workers_and_reports_a_loss_that_is_not_finite(tmp_path):
    def fitted(workers: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        settings = fit.Settings(steps=150, batch=8, lr=5e-2, weight_decay=0.0, workers=workers)

        def loss_at(step, part):
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))[part]
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        return fit.fit(model, loss_at, settings, tmp_path / str(workers), label="test")["weight"]

    torch.testing.assert_close(fitted(1), torch.ones(1, 3), atol=0.02, rtol=0)
    torch.testing.assert_close(fitted(1), fitted(4), atol=1e-4, rtol=0)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="nan at step 0; lower the learning rate"):
        fit.fit(
            model,
            lambda step, part: model(torch.ones(1, 1)).sum() * float("nan"),
            fit.Settings(steps=1, batch=1, lr=1.0, workers=1),
            tmp_path / "nan",
            label="test",
        )


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
        ({"steps": 0}, "steps"),
        ({"batch": 3}, "multiple of workers"),
        ({"lr": float("nan")}, "lr"),
        ({"seed": -1}, "seed"),
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
        (folder / "log.jsonl").write_text('{"step": 10, "loss": 0.5}\n{"step": 20, "loss": 0.25}\n')
    train.write_record(tmp_path / "out", vae=tmp_path / "vae", dit=tmp_path / "dit", command=["sora"], step=20)
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["step"] == 20 and record["command"] == ["sora"]
    assert (tmp_path / "out" / "dit_log.jsonl").read_text().count("\n") == 2
    if (tmp_path / "out" / "loss_curve.svg").exists():
        assert "<svg" in (tmp_path / "out" / "loss_curve.svg").read_text()
    else:
        with pytest.raises(ImportError):
            __import__("matplotlib")
