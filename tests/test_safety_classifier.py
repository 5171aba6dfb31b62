"""The classifier of a checkpoint's own clips: its numbers, its fit, and what it answers."""

from __future__ import annotations

import json
import pathlib
import re

import numpy as np
import pytest
import torch

from benchmarks.calibrate_watermark import encoded
from sora_model import world
from sora_model.checkpoint import CheckpointError
from sora_model.safety import classifier, convnet

ROOT = pathlib.Path(__file__).resolve().parent.parent


def true(seed: int, **how) -> np.ndarray:
    return world.sample(seed, **{"frames": 9, "size": (64, 64)} | how).video


def blurred(clip: np.ndarray) -> np.ndarray:
    """What a poor VAE would make of a clip."""
    x = torch.from_numpy(clip).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return x.round().byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def clips() -> tuple[list[np.ndarray], list[np.ndarray]]:
    found = [true(seed) for seed in range(48)]
    return [encoded(blurred(clip), 23) for clip in found[::2]], [encoded(clip, 23) for clip in found[1::2]]


@pytest.fixture(scope="module")
def fitted(clips) -> classifier.Classifier:
    return classifier.fit(*clips)


def test_numbers_are_of_the_detail_and_not_of_size_or_length():
    still = np.repeat(true(0)[:1], 16, axis=0)
    found = classifier.features(still)
    assert found.shape == (33,) and np.isfinite(found).all()
    np.testing.assert_allclose(classifier.features(still[:8])[:16], found[:16], atol=1e-9)  # the spectrum of one frame
    tiled = np.tile(still, (1, 2, 2, 1))
    assert np.abs(classifier.features(tiled)[:16] - found[:16]).max() < 1  # of one a window fades other edges
    noise = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)
    assert (classifier.features(noise)[:16] > found[:16]).all()


def test_detail_that_flickers_has_power_over_time():
    rng = np.random.default_rng(0)
    still = np.repeat(rng.integers(64, 192, (1, 32, 32, 3), dtype=np.uint8), 16, axis=0)
    flicker = still.copy()
    flicker[::2, ::2] += 40
    before, after = classifier.features(still), classifier.features(flicker)
    assert (before[16:20] < -10).all() and before[20] == pytest.approx(1)
    assert after[19] > -3 and after[16:19].max() < -10  # every second frame: 4 periods in 8
    assert after[20] < 0.95


def test_what_differs_is_told_apart_on_other_clips(fitted):
    for seed in range(100, 112):
        clip = true(seed)
        assert fitted.judge(encoded(blurred(clip), 23)).score > fitted.judge(encoded(clip, 23)).score, seed
    made = [fitted.judge(encoded(blurred(true(seed)), 28)).answer for seed in range(200, 212)]
    others = [fitted.judge(encoded(true(seed), 28)).answer for seed in range(200, 212)]
    assert made.count("likely") >= 8 and others.count("likely") <= 2, (made, others)


def test_lines_are_drawn_by_clips_that_were_kept_apart():
    rng = np.random.default_rng(0)
    made, others = rng.normal(1, 1, (400, 33)), rng.normal(0, 1, (4000, 33))
    fitted = classifier.fit_features(made, others)
    fresh = rng.normal(0, 1, (20000, 33))
    passed = ((fresh - fitted.mean) / fitted.std @ np.array(fitted.weights) + fitted.bias >= fitted.high).mean()
    assert passed <= 0.02
    assert fitted.low <= fitted.high


def test_what_is_unlike_everything_is_unclear(fitted):
    flashes = np.random.default_rng(0).integers(0, 2, (9, 64, 64, 3), dtype=np.uint8) * np.uint8(255)
    flashes[::2] = 0
    assert fitted.judge(flashes).answer == "unclear"


def test_a_classifier_is_kept_as_json(fitted, tmp_path):
    fitted.save(tmp_path / "mine.json")
    assert classifier.Classifier.load(tmp_path / "mine.json") == fitted


@pytest.mark.parametrize("held", [b"", b"[]", b"{}", b"\xff", b'{"inverse": 3}', b"[" * 5000, None])
def test_what_is_no_classifier_is_one_error(fitted, tmp_path, held):
    fitted.save(path := tmp_path / "mine.json")
    path.write_bytes(path.read_bytes().replace(b'"bias": ', b'"bias": NaN, "was": ') if held is None else held)
    with pytest.raises(ValueError, match="mine.json' is no classifier that `save` wrote"):
        classifier.Classifier.load(path)


@pytest.fixture(scope="module")
def network(clips) -> convnet.Network:
    return convnet.fit(*clips, steps=40, batch=16)


def test_a_network_tells_apart_what_differs_on_other_clips(network):
    scores = {kind: [network.judge(encoded(how(true(seed)), 28)).score for seed in range(200, 212)]
              for kind, how in (("made", blurred), ("true", lambda clip: clip))}  # fmt: skip
    above = sum(one > other for one in scores["made"] for other in scores["true"]) / 144
    assert above > 0.9, scores
    assert network.low <= network.high
    assert network.judge(true(300, size=(96, 80))).answer in classifier.ANSWERS  # of another size


def test_a_network_is_the_same_again_and_kept_as_safetensors(network, tmp_path):
    clips = [true(seed) for seed in range(16)]
    twice = [convnet.fit(clips[:8], clips[8:], steps=2, batch=4) for _ in range(2)]
    assert twice[0].judge(clips[0]) == twice[1].judge(clips[0])
    network.save(path := tmp_path / "mine.safetensors")
    again = convnet.Network.load(path)
    assert again.judge(clips[0]).score == network.judge(clips[0]).score
    assert (again.low, again.high) == pytest.approx((network.low, network.high))
    (tmp_path / "text").write_text("no network")
    for other in (tmp_path / "text", ROOT / "sora_model" / "checkpoints" / "toy" / "vae" / "model.safetensors"):
        with pytest.raises(CheckpointError):
            convnet.Network.load(other)


@pytest.mark.parametrize(
    "frames, told",
    [
        (np.zeros((9, 64, 64, 3), np.float32), r"uint8 \[T, H, W, 3\]; got float32 \[9, 64, 64, 3\]"),
        (np.zeros((9, 64, 64), np.uint8), r"uint8 \[T, H, W, 3\]; got uint8 \[9, 64, 64\]"),
        (np.zeros((7, 64, 64, 3), np.uint8), "at least 8 of 32x32 .* got 7 of 64x64"),
        (np.zeros((9, 64, 31, 3), np.uint8), "at least 8 of 32x32 .* got 9 of 31x64"),
    ],
)
def test_frames_that_cannot_be_judged(frames, told):
    with pytest.raises(ValueError, match=told):
        classifier.features(frames)
    with pytest.raises(ValueError, match=told):
        convnet.fit([frames] * 8, [frames] * 8)


def test_too_few_clips_are_refused():
    with pytest.raises(ValueError, match="at least 8 clips of both kinds; got 2 and 9"):
        classifier.fit([true(0)] * 2, [true(1)] * 9)
    with pytest.raises(ValueError, match="at least 8 clips of both kinds; got 9 and 2"):
        convnet.fit([true(0)] * 9, [true(1)] * 2)


def test_the_page_tells_what_was_measured():
    rows = json.loads((ROOT / "benchmarks" / "results" / "classifier.json").read_text())
    text = (ROOT / "docs" / "safety.md").read_text()
    assert sum(row["n"] for row in rows if not row["made"]) >= 2000
    for row in rows:
        auc = f"{row['auc']:.3f} | {row['tpr_at_1_percent']:.0%}" if row["made"] else "– | –"
        told = f"| {row['clips']} | {row['n']} | {auc} | {row['likely']} | {row['unclear']} | {row['unlikely']} |"
        assert re.search(re.escape(told), text), told
    made = [row for row in rows if row["made"]]
    aucs, shares = ([row[name] for row in made] for name in ("auc", "tpr_at_1_percent"))
    said = f"{min(shares):.0%} to {max(shares):.0%}".replace("% to", " to").replace("%", " %")
    assert said in (readme := (ROOT / "README.md").read_text())
    assert f"AUC {min(aucs):.2f} to {max(aucs):.2f}" in readme
