"""What `sora eval` finds of long clips, restyled ones and circles: nothing where nothing is wrong, and each fault."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from sora_model import evaluate_long, evaluate_verbs, world

DEFAULTS = SimpleNamespace(frames=17, size=(64, 64), fps=8)
FIRST = 400


def quiet(*args):
    """Progress that nobody asked for."""


def same(video):
    return video


class Knowing:
    """In the place of a model: makes the true clip of the seed `FIRST` of one scene, and spoils it."""

    defaults = DEFAULTS

    def __init__(self, spoil, scene: str) -> None:
        self.spoil, self.scene = spoil, scene

    def made(self, frames: int = 17, **spec):
        truth = world.sample(FIRST, scene=self.scene, frames=frames, prompt_spec=spec)
        return SimpleNamespace(frames=self.spoil(truth.video))

    def generate(self, caption, *, seconds=None, **options):
        return self.made() if seconds is None else self.made(round(8 * seconds))

    def restyle(self, video, caption, **options):
        return self.made(style=world.parse(caption).style)

    def loop(self, video, caption, **options):
        return self.made(32)  # after which it is where it began


@pytest.fixture
def verbs_of(monkeypatch):
    monkeypatch.setattr(evaluate_verbs, "SCENES", ("loop",))
    assert world.draw(FIRST, scene="loop").period in (1, 2)

    def verbs(spoil):
        return evaluate_verbs.verbs(Knowing(spoil, "loop"), 1, 0, FIRST, same, quiet, None, {})

    return verbs


def test_a_style_that_came_and_a_motion_that_stayed_are_told_from_others(verbs_of):
    kept = verbs_of(same)["restyle"]
    assert kept["checkpoint"] == kept["true clips"] == kept["true clips, coded"]
    assert kept["checkpoint"]["style"]["mean"] == 1 and kept["checkpoint"]["position"]["mean"] < 0.3
    assert kept["left as it was"]["style"]["mean"] == 0 and kept["left as it was"]["position"]["mean"] < 1
    frozen = verbs_of(lambda video: video[np.zeros(len(video), int)])["restyle"]["checkpoint"]
    assert frozen["position"]["mean"] > 3 and frozen["motion"]["mean"] < 0.1


def test_a_circle_that_jumps_is_told_from_one_that_turns(verbs_of):
    closed = verbs_of(same)["loop"]
    assert closed["checkpoint"]["seam"]["mean"] < 0.5 and closed["true clips"]["seam"]["mean"] < 0.5
    jumps = verbs_of(lambda video: np.concatenate([video[:17], np.roll(video[17:], 9, axis=2)]))["loop"]
    assert jumps["checkpoint"]["seam"]["mean"] > 1 and jumps["cut"] == closed["cut"]


def test_long_clips_are_judged_beside_true_ones_whatever_made_them(monkeypatch):
    monkeypatch.setattr(evaluate_long, "SCENES", ("loop",))

    def length(spoil, *ways):
        return evaluate_long.length(Knowing(spoil, "loop"), 6, ways, 0, FIRST, same, quiet, None, {})

    curves, means = length(same, "once", "pieces")
    assert list(means) == ["checkpoint, at once", "checkpoint, pieces", "copy last frame", "constant velocity",
                           "true clips", "true clips, coded"]  # fmt: skip
    assert curves["checkpoint, pieces"] == curves["true clips"] and len(curves["true clips"]["motion"]) == 3
    assert means["true clips"]["motion"]["mean"] == pytest.approx(1, abs=0.02)
    assert means["copy last frame"]["motion"]["mean"] < 0.4 < means["true clips"]["there"]["mean"]

    def torn(video):  # as if every second part of a stream were drawn by itself
        return np.concatenate([np.roll(video[k : k + 4], 9 * (k // 4 % 2), axis=2) for k in range(0, len(video), 4)])

    seams = [means["checkpoint, pieces"], length(torn, "stream")[1]["checkpoint, stream"]]
    assert seams[0]["seam"]["mean"] < 0.5 and seams[1]["seam"]["mean"] > 2


def test_parts_begin_where_the_sampler_begins_them():
    assert evaluate_long.borders("stream", 17, 17) == [4, 8, 12, 16]
    assert evaluate_long.borders("pieces", 40, 17) == [17, 26, 35]
