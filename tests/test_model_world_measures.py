"""The measures of the world: perfect on true clips up to the read-out's floor, and every planted fault is caught."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sora_model import world
from sora_model.world import measures, measures_long
from sora_model.world.measures import measure
from sora_model.world.measures_summary import half_life, mean_of, permanence_curve, summary
from sora_model.world.measures_text import text_truth
from sora_model.world.render import paint

FLAT = {"style": "flat"}


def clip_of(scene: str, seed: int, frames: int = 25, **spec) -> world.Sample:
    return world.sample(seed, scene=scene, frames=frames, prompt_spec=FLAT | spec)


def mean(found: dict, name: str) -> float:
    return float(np.mean(found[name]))


def hiding(seed: int = 0, **spec) -> world.Sample:
    """A clip whose first object hides and comes out again, and the truth's frame where it does."""
    while True:
        clip = clip_of("occluder", seed, 33, **spec)
        if measures.hidden_spells(clip.state.visible[:, 0]):
            return clip
        seed += 1


@pytest.mark.parametrize("scene", world.SCENES)
def test_true_clips_are_perfect_to_the_floor(scene):
    clips = [measure(c.video, c, known=5) for c in (world.sample(90 + s, scene=scene, frames=25) for s in range(3))]
    found = {name: value["mean"] for name, value in summary(clips).items()}
    for name, value in found.items():
        kind = name.split("@")[0]
        if kind in ("position", "velocity"):
            assert value < (0.4 if scene == "orbit" else 0.25), name
        elif kind in ("motion", "rigidity", "counted", "reappears", "change_iou"):
            assert value == pytest.approx(1, abs=0.04), name
        else:
            assert value < 0.05, name
    assert found["counted"] == 1 and found["count_errors"] == 0
    wanted = {"bite": "regrowth", "paint": "faded", "orbit": "motion", "parabola": "gravity_error"}
    assert wanted.get(scene, "rigidity") in found


@pytest.mark.parametrize("scene", ["bounce", "parabola", "turn_back", "loop", "orbit"])
def test_a_frozen_clip_has_no_motion_and_errs_more_the_longer(scene):
    clip = clip_of(scene, 3)
    found = measure(clip.video[np.minimum(np.arange(25), 4)], clip, known=5)
    assert mean(found, "motion") < 0.05
    if scene in ("bounce", "parabola"):
        assert mean(found, "position@1s") > mean(found, "position@0.25s") > 0.5


def test_an_object_that_does_not_come_out_again_is_missed():
    clip = hiding(count=1)
    start, end = measures.hidden_spells(clip.state.visible[:, 0])[0]
    video = clip.video.copy()
    video[start:] = clip.video[start]
    found = measure(video, clip)
    assert found["reappears"][0] == 0 and mean(found, "motion") < 0.7 and mean(found, "counted") < 0.95
    assert mean(found, "count_errors") > 0
    late = clip.video.copy()  # and one that comes out a second late
    late[start:] = clip.video[np.maximum(np.arange(start, 33) - 8, start)]
    assert measure(late, clip)["reappears"][0] == 0
    assert measure(clip.video, clip)["reappears"][0] == 1
    assert measure(clip.video, clip)["hidden_s"][0] == pytest.approx((end - start) / 8)


def test_another_colour_in_its_place_is_a_swap_and_no_return():
    clip = hiding(count=1)
    thing = clip.scene.things[0]
    other = "green" if thing.colour != "green" else "purple"
    dyed = replace(clip.scene, things=(replace(thing, colour=other),))
    painted = paint(dyed, dyed.state(clip.state.times), clip.size)
    start, _ = measures.hidden_spells(clip.state.visible[:, 0])[0]
    video = clip.video.copy()
    video[start:] = painted[start:]
    found = measure(video, clip)
    assert found["reappears"][0] == 0 and found["swapped"][0] == 1 and mean(found, "swaps") > 0.2


def test_two_objects_that_exchange_their_colours_are_caught():
    clip = clip_of("bounce", 8, count=2)
    one, two = clip.scene.things
    crossed = replace(clip.scene, things=(replace(one, colour=two.colour), replace(two, colour=one.colour)))
    video = clip.video.copy()
    video[12:] = paint(crossed, crossed.state(clip.state.times), clip.size)[12:]
    found = measure(video, clip)
    assert mean(found, "swaps") > 0.4 and mean(measure(clip.video, clip), "swaps") == 0
    assert mean(found, "counted") > 0.9


@pytest.mark.parametrize("how", ["radius", "shape"])
def test_an_outline_that_wobbles_is_not_rigid(how):
    clip = clip_of("bounce", 11, count=1, shape="square")
    thing = clip.scene.things[0]
    other = replace(thing, radius=0.85 * thing.radius) if how == "radius" else replace(thing, shape="circle")
    wobbled = replace(clip.scene, things=(other,))
    state = replace(clip.state, scene=wobbled)
    video = clip.video.copy()
    video[::2] = paint(wobbled, state, clip.size)[::2]
    found, true = measure(video, clip), measure(clip.video, clip)
    assert np.mean(found["rigidity"][::2]) < 0.9 < 0.98 < min(true["rigidity"])
    own = measures.own_rigidity(measures.read(video), thing.colour, "square")
    assert min(own) < 0.9 and min(measures.own_rigidity(measures.read(clip.video), thing.colour, "square")) > 0.95


@pytest.mark.parametrize("style", world.STYLES)
def test_a_bite_that_heals_is_regrowth(style):
    clip = world.sample(4, scene="bite", frames=33, prompt_spec={"style": style})
    whole = replace(clip.scene, bites=tuple((1e9, *at) for _, *at in clip.scene.bites))
    healed = clip.video.copy()
    healed[28:] = paint(whole, replace(whole.state(clip.state.times)), clip.size)[28:]
    true, found = measure(clip.video, clip), measure(healed, clip)
    assert mean(true, "regrowth") < 0.06 and mean(true, "change_iou") > 0.99
    assert np.mean(found["regrowth"][-4:]) > 0.9 and mean(found, "regrowth") > 3 * mean(true, "regrowth")
    assert mean(found, "change_iou") < mean(true, "change_iou") - 0.01


def test_paint_that_goes_is_faded():
    clip = clip_of("paint", 2, 25)
    gone = clip.video.copy()
    gone[20:] = clip.video[0]
    assert mean(measure(clip.video, clip), "faded") < 0.02
    assert np.mean(measure(gone, clip)["faded"][-3:]) > 0.9


def test_a_second_object_out_of_nothing_is_counted():
    clip = clip_of("loop", 3, count=1)
    shown = measures.read(clip.video, "flat").tracks[clip.scene.things[0].colour].silhouette
    seen = shown > 0.9
    doubled = clip.video.copy()
    for t in range(10, 14):
        doubled[t][np.roll(seen[t], 30, axis=1)] = doubled[t][np.unravel_index(seen[t].argmax(), seen[t].shape)]
    found = measure(doubled, clip)
    assert mean(found, "count_errors") == pytest.approx(8 / 25) and mean(found, "counted") == pytest.approx(21 / 25)


def test_objects_that_pass_through_each_other_penetrate_and_lost_speed_is_lost_energy():
    clip = next(c for c in (clip_of("bounce", s, count=2) for s in range(50)) if "collide" in c.state.kinds()[:1])
    straight = np.array(clip.scene.start) + np.array(clip.scene.velocity) * clip.state.times[:, None, None]
    through = paint(clip.scene, replace(clip.state, position=straight), clip.size)
    assert max(measure(through, clip)["penetration"]) > 2 > 0.3 > max(measure(clip.video, clip)["penetration"])
    slow = clip_of("bounce", 2, count=1)
    half = paint(slow.scene, slow.scene.state(slow.state.times / 2), slow.size)
    assert mean(measure(half, slow), "energy_error") == pytest.approx(0.75, abs=0.1)
    assert mean(measure(slow.video, slow), "energy_error") < 0.05


def test_a_wrong_gravity_is_seen():
    clip = clip_of("parabola", 5, count=1)
    other = replace(clip.scene, gravity=0.5 * clip.scene.gravity)
    found = measure(paint(other, other.state(clip.state.times), clip.size), clip)
    assert mean(found, "gravity_error") > 0.3 > 0.1 > mean(measure(clip.video, clip), "gravity_error")


def test_a_jump_at_a_seam_stands_out():
    clip = clip_of("loop", 3, 32, count=1)
    assert max(measures_long.seam(clip.video, [8, 16, 24])) < 1
    jumped = clip.video.copy()
    jumped[16:] = np.roll(clip.video[16:], 5, axis=2)
    assert max(measures_long.seam(jumped, [16])) > 3 and max(measures_long.seam(jumped, [8, 24])) < 1
    often = np.concatenate([np.roll(clip.video[k : k + 4], 5 * (k // 4 % 2), axis=2) for k in range(0, 32, 4)])
    assert np.mean(measures_long.seam(often, list(range(4, 32, 4)))) > 3  # not what is usual, however many


def test_drift_is_told_by_the_second():
    clip = clip_of("loop", 3, 64, count=1)
    things = [(t.colour, t.shape) for t in clip.scene.things]
    true = measures_long.drift(clip.video, things, 8)
    assert true["there"] == true["counted"] == [1.0] * 4
    assert min(true["rigid"]) > 0.95 and true["moves"] == pytest.approx([1.0] * 4, abs=0.05)
    worn = clip.video.copy()
    worn[32:] = worn[32]
    worn[48:] = clip.video[0, 0, 0]
    found = measures_long.drift(worn, things, 8)
    assert found["there"] == [1, 1, 1, 0] and found["moves"][2] == pytest.approx(0, abs=0.1)


def test_what_hardly_moves_from_the_start_has_little_of_the_true_motion():
    """It keeps the pace that it began with: only a true clip's tells it from one that moves as it should."""
    clip = clip_of("loop", 3, 64, count=1)
    things = [(t.colour, t.shape) for t in clip.scene.things]
    pace = measures_long.pace(clip.video, things)
    slow = world.sample(3, scene="loop", frames=64, fps=80, prompt_spec=FLAT | {"count": 1})
    found = measures_long.drift(slow.video, things, 8, pace=pace)
    assert min(found["moves"]) > 0.5 and max(found["motion"]) < 0.2
    assert measures_long.drift(clip.video, things, 8, pace=pace)["motion"] == pytest.approx([1.0] * 4, abs=0.05)
    assert "motion" not in measures_long.drift(clip.video, things, 8)


def test_intervals_hold_the_mean_and_shrink_with_clips():
    rng = np.random.default_rng(0)
    clips = [{"x": list(rng.normal(1, 1, rng.integers(1, 9)))} for _ in range(400)]
    few, many = mean_of(clips[:25], "x"), mean_of(clips, "x")
    assert few["low"] < few["mean"] < few["high"] and many["low"] < 1 < many["high"]
    assert many["high"] - many["low"] < 0.5 * (few["high"] - few["low"])
    assert mean_of([{"y": [1.0]}], "x") is None and mean_of(clips, "x") == many


def test_half_life_is_that_of_the_draws():
    rng = np.random.default_rng(0)
    seconds = rng.uniform(0.1, 3, 4000)
    back = rng.random(4000) < 2 ** (-seconds / 0.8)
    assert half_life(list(zip(seconds, back.astype(float), strict=True))) == pytest.approx(0.8, rel=0.06)
    assert half_life([(1.0, 1.0)]) is None
    curve = permanence_curve([{"hidden_s": [0.3, 0.9], "reappears": [1.0, 0.0]}])
    assert [b["share"] for b in curve["bins"]] == [1.0, 0.0] and 0.3 < curve["half_life"] < 0.9


def test_bad_arguments_are_named():
    clip = clip_of("loop", 0, 5)
    with pytest.raises(ValueError, match="shape"):
        measure(clip.video[:4], clip)
    with pytest.raises(ValueError, match="known"):
        measure(clip.video, clip, known=5)


@pytest.mark.parametrize(
    ("text", "fault", "claim"),
    [
        ("a red ball moves right and bounces off the edge", "mirror", "way"),
        ("a red ball moves right and bounces off the edge", "freeze", "account"),
        ("a red ball hits a blue ring", "freeze", "account"),
        ("a red ball first hits a blue ring, then bounces off the edge", "stop", "account"),
        ("a red ball passes behind a wall and reappears", "stop", "account"),
        ("the camera turns away from a red ball and returns", "stop", "account"),
        ("a red ball flies right and lands", "freeze", "account"),
        ("a red ball falls and lands, then a blue ring does", "backwards", "account"),
        ("a red ball is bitten twice", "freeze", "account"),
        ("a brush draws first a red line, then a blue line", "exchange", "account"),
        ("a red ball circles clockwise", "mirror", "way"),
        ("a red ball swings to and fro", "freeze", "account"),
        ("a red ball circles clockwise", "blue", "colour"),
        ("a red ball circles clockwise", "none", "count"),
    ],
)
def test_text_truth_tells_a_clip_that_does_what_its_caption_says_from_one_that_does_not(text, fault, claim):
    program = world.parse(text)
    seed, shape = 0, program.things[0][1]
    while True:
        spec = FLAT | {"colour": "red", "shape": shape, "count": len(program.things), "background": "black"}
        clip = world.sample(seed, scene=program.scene, frames=25, prompt_spec=spec, split="all")
        claims = clip.scene.claims(clip.state)
        if program.account in claims.accounts and program.ways[0] in (None, claims.ways[0]):
            break
        seed += 1
    program = replace(program, things=tuple((t.colour, t.shape) for t in clip.state.things))
    assert text_truth(clip.video, program)[claim] is True
    video = clip.video
    if fault == "mirror":
        video = video[:, :, ::-1]
    elif fault == "freeze":
        video = video[np.zeros(25, int)]
    elif fault == "stop":
        stop = int(np.argmin(clip.state.visible[:, 0])) if program.scene in ("occluder", "turn_back") else 2
        video = video[np.minimum(np.arange(25), stop)]
    elif fault == "exchange":
        program = replace(program, things=program.things[::-1])
    elif fault == "backwards":
        program = replace(program, things=program.things[::-1], ways=program.ways[::-1])
    elif fault == "blue":
        program = replace(program, things=(("blue", shape),))
    else:
        video = np.concatenate([video[:, :, 32:], video[:, :, :32]], 2) * 0 + clip.video[0, 0, 0]
    assert text_truth(video, program)[claim] is False
