"""Clips of several sizes as one sequence: what each gives alone, outputs and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_model_verbs import untrained

from sora_model.attention import AttentionMode
from sora_model.dit import DiTConfig, SoraDiT
from sora_model.packed import generate, packed

SIZES = (3, 4, 6), (1, 2, 2), (2, 6, 4)
MODES = {"full": None, "window": AttentionMode(window=(3, 3, 3)), "causal": AttentionMode(causal="frame")}


@pytest.fixture(scope="module")
def dit() -> SoraDiT:
    torch.manual_seed(0)
    dit = SoraDiT(DiTConfig(dim=24, heads=2, layers=2, ffn_dim=32, in_channels=4, out_channels=4, text_dim=8))
    torch.nn.init.normal_(dit.head.weight, std=0.3)
    return dit


def inputs(times: str):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    latents = [draw(4, *size).requires_grad_() for size in SIZES]
    text = draw(len(SIZES), 5, 8).requires_grad_()
    timesteps = []
    for i, (frames, height, width) in enumerate(SIZES):
        tokens = frames * height * width // 4
        count = {"clip": (), "frame": (frames,), "token": (tokens,), "mixed": [(), (frames,), (tokens,)][i]}[times]
        timesteps.append(1000 * torch.rand(count, generator=generator))
    return latents, timesteps, text, torch.tensor([5, 2, 3])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("times", ["clip", "frame", "token", "mixed"])
def test_packed_clips_are_what_each_is_alone(dit, times, mode):
    latents, timesteps, text, lens = inputs(times)
    leaves = [*latents, text, *dit.parameters()]
    together = packed(dit, latents, timesteps, text, lens, attention=MODES[mode])
    alone = []
    for i, (clip, t) in enumerate(zip(latents, timesteps, strict=True)):
        one = text[i : i + 1], lens[i : i + 1]
        alone.append(dit(clip[None], t.reshape(1, -1), *one, attention=MODES[mode])[0])
    weights = [torch.randn(out.shape, generator=torch.Generator().manual_seed(2)) for out in alone]
    grads = []
    for outs in (together, alone):
        loss = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
        grads.append(torch.autograd.grad(loss, leaves))
    for out, wanted in zip(together, alone, strict=True):
        assert out.shape == wanted.shape and (out - wanted).abs().max() < 1e-5 * wanted.abs().max()
    for own, wanted in zip(*grads, strict=True):
        assert (own - wanted).abs().max() <= 2e-5 * wanted.abs().max().clamp_min(1e-3)


def test_packed_clips_do_not_see_each_other(dit):
    latents, timesteps, text, lens = inputs("clip")
    out = packed(dit, latents, timesteps, text, lens)
    other = packed(dit, [latents[0], latents[1] + 1, latents[2]], timesteps, text, lens)
    assert torch.equal(out[0], other[0]) and torch.equal(out[2], other[2]) and not torch.equal(out[1], other[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a[0].pop(), "latents, timesteps and text must be of as many clips, at least one; got 2, 3 and 3"),
        (lambda a: a[0].__setitem__(1, torch.zeros(4, 1, 3, 2)), "3 rows, which patches of 2 do not divide"),
        (lambda a: a[1].__setitem__(2, torch.zeros(5)), r"timesteps must be one for each clip \[1\], frame"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(dit, change, said):
    given = list(inputs("clip"))
    given[0], given[1] = list(given[0]), list(given[1])
    change(given)
    with pytest.raises(ValueError, match=said):
        packed(dit, *given)


def test_checkpointing_changes_no_gradient(dit):
    latents, timesteps, text, lens = inputs("frame")
    again = SoraDiT(dit.config, checkpointing=True)
    again.load_state_dict(dit.state_dict())
    grads = [
        torch.autograd.grad(sum(out.square().sum() for out in packed(model, latents, timesteps, text, lens)), latents)
        for model in (dit, again)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.filterwarnings("ignore:this checkpoint was trained on")
def test_clips_of_several_sizes_are_generated_together():
    """Each to rounding what `Sora.generate` makes of it alone."""
    sora = untrained(temporal=False)
    requests = [
        {"prompt": "a red circle", "size": (32, 64), "seconds": 0.5, "seed": 1},
        {"prompt": "a blue square bounces around", "size": (48, 16), "seconds": 1.0, "seed": 2},
        {"prompt": "a ring"},
    ]
    told = []
    clips = generate(sora, requests, steps=2, progress=lambda *stage: told.append(stage))
    for clip, request in zip(clips, requests, strict=True):
        alone = sora.generate(**request, steps=2)
        assert (clip.prompt, clip.seed, clip.frames.shape) == (alone.prompt, alone.seed, alone.frames.shape)
        assert np.abs(clip.frames.astype(int) - alone.frames).max() <= 1
    assert told == [("denoise", 1, 2), ("denoise", 2, 2)] + [("decode", i, 3) for i in (1, 2, 3)]
    with pytest.raises(ValueError, match="guidance"):
        generate(sora, requests, guidance=1e6)
    with pytest.raises(TypeError, match="request 1 takes prompt, seconds, size, fps and seed; got 'steps'"):
        generate(sora, [requests[0], {"prompt": "a ring", "steps": 3}])
    with pytest.raises(TypeError, match="request 0 must be a dict, such as {'prompt': 'a red ball'}; got 'a ring'"):
        generate(sora, ["a ring"])
    with pytest.raises(ValueError, match="requests must be at least one"):
        generate(sora, [])
