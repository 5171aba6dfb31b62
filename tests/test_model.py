"""Flow matching and text encoders."""

from __future__ import annotations

import pytest
import torch

from sora_model import flow, world
from sora_model.text import WordTextConfig, WordTextEncoder, check_prompt, split_words

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
    with pytest.raises(ValueError, match="at most 4096"):
        check_prompt("red " * 5000)
    with pytest.raises(TypeError, match="must be a str, got int"):
        check_prompt(7)
    with pytest.raises(ValueError, match="13 words"):
        encoder.encode(["red " * 13])
    with pytest.raises(ValueError, match="dim must be a multiple of heads"):
        WordTextConfig(words=("a",), dim=6, heads=4)
    with pytest.raises(ValueError, match="distinct"):
        WordTextConfig(words=("a", "a"))
