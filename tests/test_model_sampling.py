"""Sampling of one prompt: at once, around what is known, from a clip, and frame after frame."""

from __future__ import annotations

import pytest
import torch

from sora_model import flow, world
from sora_model.conditioning import place
from sora_model.dit import DiTConfig, SoraDiT
from sora_model.sampling import Sampler
from sora_model.text import WordTextConfig, WordTextEncoder

SHAPE = (3, 9, 4, 6)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    dit = SoraDiT(DiTConfig(dim=24, heads=2, layers=2, ffn_dim=32, in_channels=3, out_channels=3, text_dim=16))
    for name, p in dit.named_parameters():
        if "head" in name or p.ndim == 1:
            torch.nn.init.normal_(p, std=0.3)
    text = WordTextEncoder(WordTextConfig(words=world.VOCABULARY, dim=16))
    return dit.requires_grad_(False), text.requires_grad_(False)


def sampler(parts, **options):
    return Sampler(*parts, "a red circle", **{"steps": 4, "guidance": 3.0, "shift": 2.0} | options)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(seed: int = 0) -> torch.Tensor:
    return flow.draw_noise((1, *SHAPE), generator=seeded(seed))


def test_a_start_below_one_takes_the_steps_that_are_left():
    seen = []
    flow.sample(lambda x, t: seen.append(t.item()) or x, torch.ones(1, 1), steps=4, start=0.6)
    assert seen == pytest.approx([0.6, 0.5, 0.25])
    x = torch.randn(2, 3)
    assert torch.equal(flow.sample(lambda x, t: 1 / 0, x, steps=4, start=0.0), x)
    data, rest = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    half = 0.7 * data + 0.3 * rest
    torch.testing.assert_close(flow.sample(lambda x, t: rest - data, half, steps=5, start=0.3), data)
    told = []
    flow.sample(lambda x, t: x, x, steps=4, start=0.6, progress=lambda *n: told.append(n))
    assert told == [(1, 3), (2, 3), (3, 3)]
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="start must lie between 0 and 1"):
            flow.sample(lambda x, t: x, x, steps=1, start=bad)


def test_what_is_known_stays_and_the_rest_depends_on_it(parts):
    given = torch.randn(1, 3, 2, 4, 6)
    known = place((1, *SHAPE), {0: given, -1: given[:, :, :1]})
    made = sampler(parts).draw(noise(), known)
    assert torch.equal(made[:, :, :2], given) and torch.equal(made[:, :, -1:], given[:, :, :1])
    other = sampler(parts).draw(noise(), place((1, *SHAPE), {0: given + 1, -1: given[:, :, :1]}))
    assert (made - other)[:, :, 2:-1].abs().max() > 1e-2
    assert torch.equal(sampler(parts).draw(noise(), known), made)


def test_a_clip_is_kept_as_far_as_the_strength_leaves_it(parts):
    clip, draw = torch.randn(1, *SHAPE), sampler(parts).draw
    assert torch.equal(draw(noise(), clip=clip, strength=0.0), clip)
    assert torch.equal(draw(noise(), clip=clip, strength=1.0), draw(noise()))
    far = [(draw(noise(), clip=clip, strength=s) - clip).square().mean().item() for s in (0.1, 0.3, 0.6, 1.0)]
    assert far == sorted(far)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_stream_is_what_the_causal_model_draws_around_its_past(parts, guidance):
    """Each chunk: the clip so far known, and the new frames drawn from the same noise, all in one causal pass."""
    made = list(sampler(parts, guidance=guidance).stream(SHAPE, generator=seeded(), chunk=4, window=9))
    assert [part.shape[2] for part in made] == [4, 4, 1]
    from sora_model.attention import AttentionMode

    whole = sampler(parts, guidance=guidance, attention=AttentionMode(causal="frame"))
    generator, done = seeded(), torch.zeros(1, 3, 0, 4, 6)
    for part in made:
        count = part.shape[2]
        new = flow.draw_noise((1, 3, count, 4, 6), generator=generator)
        x = torch.cat([done, new], 2)
        known = place(x.shape, {0: done} if done.shape[2] else {})
        drawn = whole.draw(x, known)
        torch.testing.assert_close(part, drawn[:, :, -count:], rtol=0, atol=1e-4 * drawn.abs().max().item())
        done = torch.cat([done, part], 2)


def test_a_stream_goes_on_from_what_it_is_given(parts):
    begins = torch.randn(1, 3, 5, 4, 6)
    stream = lambda begins: torch.cat(list(sampler(parts).stream(SHAPE, generator=seeded(), begins=begins)), 2)  # noqa: E731
    made = stream(begins)
    assert made.shape == (1, 3, 4, 4, 6)
    assert (stream(begins + 1) - made).abs().max() > 1e-2
    assert list(sampler(parts).stream((3, 5, 4, 6), generator=seeded(), begins=begins)) == []


def test_pieces_begin_with_the_end_of_the_last(parts):
    made = list(sampler(parts).pieces(SHAPE, generator=seeded(), length=5, overlap=2))
    assert [part.shape[2] for part in made] == [5, 3, 1]
    generator, tail = seeded(), None
    for part in made:
        count = part.shape[2] + (0 if tail is None else 2)
        new = flow.draw_noise((1, 3, count, 4, 6), generator=generator)
        drawn = sampler(parts).draw(new, None if tail is None else place(new.shape, {0: tail}))
        assert torch.equal(part, drawn[:, :, -part.shape[2] :])
        tail = drawn[:, :, -2:]
    begins = torch.randn(1, 3, 8, 4, 6)
    (last,) = sampler(parts).pieces(SHAPE, generator=seeded(), length=5, overlap=2, begins=begins)
    noise = flow.draw_noise((1, 3, 3, 4, 6), generator=seeded())
    assert torch.equal(last, sampler(parts).draw(noise, place(noise.shape, {0: begins[:, :, -2:]}))[:, :, 2:])


def test_a_stream_of_any_length_takes_no_more_memory(parts, monkeypatch):
    import sora_model.sampling as module

    held = []
    memory = module.Memory
    monkeypatch.setattr(module, "Memory", lambda *a: held.append(memory(*a)) or held[-1])
    sizes = []
    for _ in sampler(parts, steps=1).stream((3, 60, 4, 6), generator=seeded(), chunk=2, window=6):
        sizes.append(held[0].layer(1).keys.untyped_storage().nbytes())
    assert len(sizes) == 30 and len(set(sizes[4:])) == 1
