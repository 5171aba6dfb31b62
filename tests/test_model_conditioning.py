"""Known cells keep their latents and have timestep 0; the masks of training are what they are said to be."""

from __future__ import annotations

import pytest
import torch

from sora_model import flow
from sora_model.conditioning import Known, conditioned, draw_mask, place, token_times
from sora_model.dit import DiTConfig, SoraDiT

PATCH = (1, 2, 2)
SHAPE = (1, 3, 5, 4, 6)


def test_parts_lie_where_they_are_said_to():
    first, last = torch.randn(1, 3, 1, 4, 6), torch.randn(1, 3, 2, 4, 6)
    known = place(SHAPE, {0: first, -2: last})
    assert known.mask[0, 0, :, 0, 0].tolist() == [True, False, False, True, True]
    noise = torch.randn(SHAPE)
    held = known.hold(noise)
    assert torch.equal(held[:, :, :1], first) and torch.equal(held[:, :, 3:], last)
    assert torch.equal(held[:, :, 1:3], noise[:, :, 1:3])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({4: (2,)}, "2 frames from frame 4 on do not lie in a clip of 5"),
        ({-6: (1,)}, "1 frames from frame -6 on"),
        ({0: (3,), 2: (1,)}, "frames 2 to 2 are given twice"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, said):
    with pytest.raises(ValueError, match=said):
        place(SHAPE, {key: torch.zeros(1, 3, *frames, 4, 6) for key, frames in parts.items()})


def test_known_wants_a_mask_of_its_latents():
    with pytest.raises(ValueError, match=r"mask must be bool \[1, 1, 5, 4, 6\]"):
        Known(torch.zeros(SHAPE), torch.zeros(1, 1, 5, 4, 6))
    with pytest.raises(ValueError, match="mask must be bool"):
        Known(torch.zeros(SHAPE), torch.zeros(1, 1, 5, 4, 5, dtype=torch.bool))


def test_times_of_tokens():
    t = torch.tensor([0.25, 0.5])
    mask = torch.zeros(2, 1, 5, 4, 6, dtype=torch.bool)
    mask[0, :, 0] = mask[1, :, 3:] = True
    assert token_times(t, mask, PATCH).tolist() == [[0, 0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.5, 0, 0]]
    own = torch.rand(2, 5)
    assert torch.equal(token_times(own, mask, PATCH), own * ~mask[:, 0, :, 0, 0])
    mask[0, :, 2, :2, 4:] = True  # one token of a frame
    times = token_times(t, mask, PATCH)
    assert times.shape == (2, 30) and times[0, 2 * 6 + 2] == 0 and (times[0, 6:] == 0).sum() == 1
    pairs = token_times(own[:, :4], mask[:, :, :4].new_zeros(2, 1, 4, 4, 6), (2, 2, 2))
    assert torch.equal(pairs, own[:, :4:2])
    mask[0, :, 2, 0, 4] = False
    with pytest.raises(ValueError, match=r"each patch of \(1, 2, 2\) cells must be known as a whole or not at all"):
        token_times(t, mask, PATCH)


@pytest.mark.parametrize("region", [False, True])
def test_a_sampler_leaves_what_is_known_as_it_is_and_the_model_sees_it_clean(region):
    torch.manual_seed(0)
    truth, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    mask = torch.zeros(1, 1, 5, 4, 6, dtype=torch.bool)
    mask[:, :, :2] = True
    if region:
        mask[..., 2:] = True
    known, seen = Known(truth, mask), []

    def velocity(x, times):
        seen.append((x[mask.expand_as(x)], times))
        return (x - truth) / times.reshape(1, -1)[:, -6:].max()  # straight to the truth

    made = flow.sample(conditioned(velocity, known, PATCH), known.hold(noise), steps=4)
    torch.testing.assert_close(made, truth)
    assert torch.equal(made[mask.expand_as(made)], truth[mask.expand_as(truth)])
    for inside, times in seen:
        assert torch.equal(inside, truth[mask.expand_as(truth)])
        assert times.shape == (1, 30 if region else 5)
        assert (times == 0).sum() == (2 * 6 + 3 * 4 if region else 2)


def test_the_transformer_takes_these_times():
    """What is known does not depend on the time of the rest, which sees it."""
    torch.manual_seed(0)
    config = DiTConfig(dim=24, heads=2, layers=2, ffn_dim=32, in_channels=3, out_channels=3, text_dim=8, freq_dim=16)
    model = SoraDiT(config)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    x, text = torch.randn(SHAPE), torch.randn(1, 4, 8)
    known = place(SHAPE, {0: x[:, :, :2]})
    by_frame = token_times(torch.tensor([0.7]), known.mask, PATCH)
    by_token = by_frame.repeat_interleave(6, 1)
    with torch.no_grad():
        v = model(x, 1000 * by_frame, text)
        torch.testing.assert_close(v, model(x, 1000 * by_token, text), rtol=0, atol=1e-5)
        assert (v - model(x, torch.tensor([700.0]), text)).abs().max() > 1e-3


def test_masks_of_training_know_what_they_should_and_never_everything():
    generator = torch.Generator().manual_seed(0)
    kinds = dict.fromkeys(("nothing", "first", "prefix", "suffix", "ends", "apart", "region"), 0)
    for _ in range(4000):
        mask = draw_mask((8, 3, 4), generator=generator)
        assert mask.dtype == torch.bool and mask.shape == (8, 3, 4) and not mask.all()
        frames = mask.flatten(1)
        if not torch.equal(frames.all(1), frames.any(1)):
            kinds["region"] += 1
            assert torch.equal(mask, mask[:1].expand_as(mask))
            continue
        known = "".join("x" if frame else "." for frame in frames.all(1).tolist())
        left = known.strip("x")
        if known == "........":
            kinds["nothing"] += 1
        elif "x" in left:
            kinds["apart"] += 1
        elif known.startswith("x") and known.endswith("x"):
            kinds["ends"] += 1
        elif known.startswith("x"):
            kinds["first" if known.count("x") == 1 else "prefix"] += 1
        else:
            kinds["suffix"] += 1
    shares = {kind: count / 4000 for kind, count in kinds.items()}
    for kind, least, most in (
        ("nothing", 0.45, 0.55), ("first", 0.08, 0.16), ("prefix", 0.06, 0.12), ("suffix", 0.025, 0.075),
        ("ends", 0.06, 0.12), ("apart", 0.08, 0.16), ("region", 0.02, 0.06),
    ):  # fmt: skip
        assert least < shares[kind] < most, (kind, shares)


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 3, 3), (2, 1, 5), (3, 2, 1)])
def test_masks_of_small_clips(grid):
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        assert not draw_mask(grid, generator=generator).all()


def test_frames_may_have_times_of_their_own():
    x0, noise = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    t = torch.rand(2, 4)
    for b in range(2):
        for f in range(4):
            expected = (1 - t[b, f]) * x0[b, :, f] + t[b, f] * noise[b, :, f]
            torch.testing.assert_close(flow.interpolate(x0, noise, t)[b, :, f], expected)
