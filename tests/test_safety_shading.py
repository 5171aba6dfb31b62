"""The mark in the noise: normal noise without the key, read with it, and carried by the model's own flow."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_model import Sora, media
from sora_model.safety import shading
from sora_model.safety.credentials import Origin
from sora_model.safety.watermark import Detection
from sora_model.sampling import Sampler

KEY, IDENTITY, SHAPE = b"k" * 32, 0x1234ABCD, (1, 8, 5, 8, 8)


def drawn(seed: int = 0, shape=SHAPE, key: bytes = KEY) -> torch.Tensor:
    return shading.draw(shape, IDENTITY, generator=torch.Generator().manual_seed(seed), key=key)


def test_the_noise_is_normal_and_independent_from_clip_to_clip():
    noise = drawn(shape=(1, 16, 20, 32, 32))
    assert noise.dtype == torch.float32 and noise.shape == (1, 16, 20, 32, 32)
    moments = [float((noise.double() ** k).mean()) for k in (1, 2, 3, 4)]
    for moment, expected, spread in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(moment - expected) < 5 * math.sqrt(spread / noise.numel()), moments
    levels = torch.linspace(-3, 3, 25, dtype=torch.float64)
    shares = (noise.flatten().double()[:, None] <= levels).double().mean(0)
    assert (shares - torch.special.ndtr(levels)).abs().max() < 1.95 / math.sqrt(noise.numel())  # Kolmogorov, 0.1 %
    assert torch.equal(drawn(1), drawn(1))
    same = float((drawn(1).sign() == drawn(2).sign()).double().mean())
    assert abs(same - 0.5) < 4 * 0.5 / math.sqrt(math.prod(SHAPE))


def test_it_is_read_by_its_key_alone_from_what_is_left_of_it():
    noise = drawn()
    found = shading.read(noise, key=KEY)
    assert found.z > 30 and found.p == 0 and found.identity([7, IDENTITY, IDENTITY ^ 0xFF]) == IDENTITY
    rest = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    weak = shading.read(0.3 * (noise + 1.5 * rest), key=KEY)  # of any scale
    assert weak.present and weak.z < found.z and weak.identity([7, IDENTITY]) == IDENTITY
    assert shading.read(noise[:, :, :3], key=KEY).present, "a beginning is marked as the whole is"
    for other, key in ((noise, b"K" * 32), (rest, KEY), (torch.zeros(SHAPE), KEY)):
        unseen = shading.read(other, key=key)
        assert not unseen.present and unseen.z < 5.5 and unseen.identity([IDENTITY]) is None


def test_p_bounds_the_share_of_unmarked_noise():
    nulls = [shading.read(torch.randn(1, 4, 2, 4, 4), key=str(key).encode()) for key in range(12)]
    assert all(1.5 < one.z < 5.5 for one in nulls) and sum(one.p < 0.1 for one in nulls) <= 5
    assert all(0 < one.p <= 1 for one in nulls)


def test_what_the_flow_keeps_is_found_again(tiny_checkpoint, monkeypatch):
    """A model whose velocity is small: the way back ends near the noise that the way forth began with."""
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    monkeypatch.setattr(shading, "secret", lambda: KEY)
    begun = []
    draw = Sampler.draw

    def kept(self, noise, *arguments, **options):
        begun.append(noise)
        return draw(self, noise, *arguments, **options)

    monkeypatch.setattr(Sampler, "draw", kept)
    one, other = (sora.generate("a red ball", steps=2, seed=3, shade=shade) for shade in (True, False))
    assert (one.frames != other.frames).any() and one.origin.settings["shade"] and "shade" not in other.origin.settings
    assert one.origin.identity != other.origin.identity
    found = shading.read(begun[0])
    assert found.present and found.identity([other.origin.identity, one.origin.identity]) == one.origin.identity
    assert not shading.read(begun[1]).present

    x0 = 0.7 * begun[0]
    monkeypatch.setattr(sora, "_coded", lambda video, impl: x0)
    monkeypatch.setattr(Sampler, "velocity", lambda self: lambda x, t: begun[0] - x0)  # the straight path
    back = shading.invert(sora, one.frames)
    assert torch.allclose(back, begun[0], atol=1e-5) and shading.detect(sora, one.frames).present
    with pytest.raises(ValueError, match="no frames"):
        shading.detect(sora, [])


def test_what_cannot_be_marked_is_one_error(tiny_checkpoint):
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    with pytest.raises(ValueError, match="shade must be true or false; got 'yes'"):
        sora.generate("a ball", shade="yes")
    assert Origin({"shade": True}).identity != Origin({}).identity


def test_the_command_looks_in_the_noise_where_the_pixels_hold_nothing(sora, monkeypatch, tmp_path):
    media.write_video("a.mp4", np.zeros((3, 64, 64, 3), np.uint8))
    monkeypatch.setattr(Sora, "from_pretrained", lambda weights: str(weights))
    for z, code in ((9.0, 0), (3.0, 5)):
        monkeypatch.setattr(
            shading, "detect", lambda model, frames, z=z: Detection(z, 1e-9, 1.0, False, (1.0,) * 32) if model else None
        )
        said = sora("detect", "a.mp4", "--weights", "some")
        assert said[0] == code and f"a.mp4: in the noise z {z}, p 1e-09" in said[1]
    assert "in the noise" not in sora("detect", "a.mp4")[1]


def test_the_page_tells_what_was_measured():
    root = Path(__file__).parents[1]
    own, plain = json.loads((root / "benchmarks" / "results" / "shading.json").read_text()).values()
    text = " ".join((root / "docs" / "safety.md").read_text().split())
    seen = [[one[name]["found"] for name in ("frames", "H.264 crf 23")] for one in (own, plain)]
    told = "own guidance {} were found in their frames as they were and {} through H.264 of crf 23; of 16 without "
    told += "guidance {} and {}"
    assert told.format(*seen[0], *seen[1]) in text and own["frames"]["n"] == plain["frames"]["n"] == 16
    most, other = (max(one[name]["largest_z"] for one in (own, plain)) for name in ("frames", "another key"))
    assert f"z was {most:.0f} at most, and {other:.1f} with another's key" in text
