"""The procedural world: exact physics, captions against the state, determinism, rendering, the data for training."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest

from sora_model import world
from sora_model.world import captions, readout, render, shapes
from sora_model.world.base import Setting, Thing
from sora_model.world.data import Bucket, WorldData, loader
from sora_model.world.measures_text import text_truth
from sora_model.world.palette import COLOURS, INSIDE
from sora_model.world.scenes import REGISTRY

LONG = np.arange(0, 60, 0.02)


def drawn(scene, seeds, **options):
    return [(seed, world.draw(seed, scene=scene, **options)) for seed in seeds]


# --- physics ---


@pytest.mark.parametrize("count", [1, 2, 3])
def test_bounces_conserve_energy_and_collisions_momentum(count):
    """For a minute: kinetic energy always, momentum over every collision, each velocity's part along an edge."""
    met = 0
    for seed, scene in drawn("bounce", range(6), prompt_spec={"count": count}):
        state = scene.state(LONG)
        mass = state.extra["mass"]
        energy = (mass * (state.velocity**2).sum(-1)).sum(-1)
        assert energy == pytest.approx(energy[0], rel=1e-9), seed
        around = np.array([event.time + d for event in state.events for d in (-1e-9, 1e-9)])
        velocity = scene.state(around).velocity
        for event, before, after in zip(state.events, velocity[::2], velocity[1::2], strict=True):
            momentum = (mass[:, None] * (after - before)).sum(0)
            if event.kind == "collide":
                met += 1
                assert np.abs(momentum).max() < 1e-9 and len(event.who) == 2
            else:
                (i,) = event.who
                assert sorted(np.abs(after[i] + before[i]) < 1e-9) in ([False, True], [True, True])
    assert met > 50 or count == 1


@pytest.mark.parametrize("scene", ["bounce", "parabola", "occluder", "turn_back", "loop"])
def test_nothing_leaves_the_frame_or_enters_another(scene):
    """Outlines touch, and no more, at any time; the camera's turns aside."""
    for seed, one in drawn(scene, range(10), aspect=(1.0, 1.6, 0.6)[0 if scene != "bounce" else 1]):
        state = one.state(LONG)
        where = state.extra.get("home", state.position)
        width, height = one.setting.box
        for i, thing in enumerate(state.things):
            left, right, up, down = shapes.extent(thing.shape, thing.radius)
            x, y = where[:, i].T
            gaps = (x.min() - left, width - x.max() - right, y.min() - up, height - y.max() - down)
            assert min(gaps) > -1e-9, (seed, gaps)
            for j in range(i):
                other = state.things[j]
                keys = (thing.shape, thing.radius), (other.shape, other.radius)
                near = np.argsort(np.linalg.norm(where[:, i] - where[:, j], axis=1))[:100]
                assert all(shapes.gap(*keys, *(where[t, i] - where[t, j])) > -1e-9 for t in near), seed


def test_contact_is_where_the_gap_is_nought():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        one, two = ((rng.choice(shapes.FIGURES), rng.uniform(0.05, 0.2)) for _ in range(2))
        angle, aim = rng.uniform(0, 2 * math.pi), rng.uniform(-0.2, 0.2)
        dx, dy = math.cos(angle), math.sin(angle)
        vx, vy = -math.cos(angle + aim), -math.sin(angle + aim)
        time, nx, ny = shapes.contact(one, two, dx, dy, vx, vy)
        along = np.linspace(0, 2, 400)
        gaps = np.array([shapes.gap(one, two, dx + vx * t, dy + vy * t) for t in along])
        if math.isinf(time):
            assert gaps.min() > -1e-3
            continue
        hits += 1
        assert shapes.gap(one, two, dx + vx * time, dy + vy * time) == pytest.approx(0, abs=1e-9)
        assert gaps[along < time - 1e-9].min() > 0 and math.hypot(nx, ny) == pytest.approx(1)
        assert nx * vx + ny * vy < 0
    assert hits > 150


def test_flights_are_parabolas_and_each_landing_keeps_the_restitution():
    for seed, scene in drawn("parabola", range(12)):
        state = scene.state(LONG)
        gravity, restitution = state.extra["gravity"], state.extra["restitution"]
        for i in range(len(state.things)):
            landings = [e.time for e in state.events if e.kind == "land" and e.who == (i,)]
            for time in landings[:6]:
                before, after = (scene.state(np.array([time + d])).velocity[0, i, 1] for d in (-1e-6, 1e-6))
                assert after == pytest.approx(-restitution * before, abs=1e-4), seed
            spans = [t for t in np.arange(0.01, landings[4], 0.05) if min(abs(t - x) for x in landings) > 0.02]
            for t in spans:
                y, v = (scene.state(np.array([t - 0.01, t, t + 0.01])).position[:, i, 1], scene.state(np.array([t])))
                assert (y[0] - 2 * y[1] + y[2]) / 1e-4 == pytest.approx(gravity, rel=1e-4)
                assert v.velocity[0, i, 1] == pytest.approx((y[2] - y[0]) / 0.02, abs=1e-6)


@pytest.mark.parametrize("scene", world.SCENES)
def test_velocities_are_derivatives_and_events_do_not_depend_on_the_frames(scene):
    for seed, one in drawn(scene, range(5)):
        fine, coarse = one.state(np.arange(0, 8, 1 / 64)), one.state(np.arange(0, 8, 1 / 4))
        last = min(fine.times[-1], coarse.times[-1])
        assert [e for e in fine.events if e.time <= last] == [e for e in coarse.events if e.time <= last]
        assert np.allclose(fine.position[::16], coarse.position, atol=1e-12)
        assert np.allclose(fine.visible[::16], coarse.visible, atol=1e-12)
        step = 1e-5
        both = (one.state(fine.times[1::9] + d).position for d in (step, -step))
        slope = next(both) - next(both)
        gaps = np.abs(slope / (2 * step) - fine.velocity[1::9]).max(axis=(1, 2))
        assert (gaps < 1e-3).mean() > 0.97, (seed, gaps.max())  # all but frames within 1e-5 s of an event


def test_a_loop_closes_and_never_ends():
    for seed, scene in drawn("loop", range(10)):
        period = scene.state(LONG).extra["period"]
        one, two = scene.state(LONG), scene.state(LONG + period)
        assert np.allclose(one.position, two.position, atol=1e-9) and np.allclose(one.velocity, two.velocity, atol=1e-8)
        assert period in (1.0, 2.0), seed


# --- what is visible, and what is rendered ---


def areas(clip, thing: int) -> np.ndarray:
    """Shares of the thing's whole area that the rendering shows, a flat style's."""
    amount = readout.shares(clip.video.astype(np.float32), clip.scene.setting.background)
    one = clip.state.things[thing]
    return amount[one.colour].sum((1, 2)) / (shapes.area(one.shape, one.radius) * min(clip.size) ** 2)


@pytest.mark.parametrize("scene", ["bounce", "parabola", "occluder", "turn_back", "bite", "loop"])
def test_the_rendered_area_is_the_true_visible_one(scene):
    seen = []
    for seed in range(6):
        clip = world.sample(seed, scene=scene, size=(128, 128), frames=17, prompt_spec={"style": "flat"})
        for i in range(len(clip.state.things)):
            error = areas(clip, i) - clip.state.visible[:, i]
            assert np.abs(error).max() < 0.02, (seed, clip.caption, error)
        seen.append(clip.state.visible)
    if scene in ("occluder", "turn_back", "bite"):
        assert min(v.min() for v in seen) < 0.7


def test_a_stroke_grows_as_painted_and_stays():
    for seed in range(6):
        clip = world.sample(seed, scene="paint", size=(128, 128), frames=33, prompt_spec={"style": "flat"})
        amount = readout.shares(clip.video.astype(np.float32), clip.scene.setting.background)
        for i, thing in enumerate(clip.state.things):
            length = math.dist(*clip.state.extra["ends"][i])
            whole = (2 * thing.radius * length + math.pi * thing.radius**2) * 128**2
            assert np.abs(amount[thing.colour].sum((1, 2)) / whole - clip.state.visible[:, i]).max() < 0.02
        assert (np.diff(clip.state.visible, axis=0) >= 0).all() and clip.state.visible[-1].min() == 1


def test_a_bite_stays_for_a_minute_and_is_hidden_when_it_is_taken():
    for seed, scene in drawn("bite", range(8)):
        state = scene.state(LONG)
        left = state.extra["left"]
        assert (np.diff(left) <= 1e-12).all() and left[-1] < left[0] == 1
        assert len(np.unique(left)) == 1 + len(state.events)
        for time, centre in zip(state.extra["bite_time"], state.extra["bite_centre"], strict=True):
            now = scene.state(np.array([time]))
            away = np.linalg.norm(now.extra["eater"][0] - now.position[0, 0] - centre)
            assert away + state.extra["bite_radius"] < state.extra["eater_radius"], seed


def test_boxes_are_seen_through_a_pinhole():
    """Corners by the textbook's projection; the outline's share that shows against counting pixels."""
    for seed in range(6):
        clip = world.sample(seed, scene="orbit", size=(128, 128), frames=9, prompt_spec={"style": "flat"})
        state = clip.state
        camera, boxes = state.extra["camera"], state.extra["boxes"]
        forward = np.array([0, 0.35, 0]) - camera
        forward /= np.linalg.norm(forward, axis=1, keepdims=True)
        right = np.cross(forward, [0, 1, 0])
        right /= np.linalg.norm(right, axis=1, keepdims=True)
        up = np.cross(right, forward)
        top = np.stack([boxes[:, 0], boxes[:, 3], boxes[:, 1]], -1)  # the middle of each lid
        ray = top[None] - camera[:, None]
        depth = (ray * forward[:, None]).sum(-1)
        at = np.stack([0.5 + 1.62 * (ray * right[:, None]).sum(-1) / depth,
                       0.52 - 1.62 * (ray * up[:, None]).sum(-1) / depth], -1)  # fmt: skip
        corners = state.extra["corners"][:, :, 4:]
        for t in range(9):
            for n in range(len(boxes)):
                (ax, ay), (bx, by), (cx, cy), (dx, dy) = corners[t, n]
                lines = np.array([[cy - ay, ax - cx], [dy - by, bx - dx]])
                crossing = np.linalg.solve(lines, [lines[0] @ (ax, ay), lines[1] @ (bx, by)])
                assert crossing == pytest.approx(at[t, n], abs=1e-9)
        amount = readout.shares(clip.video.astype(np.float32), clip.scene.setting.background)
        for n, thing in enumerate(state.things):
            inside = (amount[thing.colour] > 0.35).sum((1, 2)) / 128**2
            whole = np.array([abs(sum(p[0] * q[1] - p[1] * q[0] for p, q in zip(h, h[1:] + h[:1], strict=True))) / 2
                              for h in (_hull(c) for c in state.extra["corners"][:, n])])  # fmt: skip
            assert inside / whole == pytest.approx(state.visible[:, n], abs=0.04), (seed, n)


def _hull(points):
    from sora_model.world.scenes.orbit import _hull as hull

    return hull(points)


@pytest.mark.parametrize("shape", shapes.FIGURES)
def test_rendered_area_and_centroid_are_those_of_the_shape(shape):
    rng = np.random.default_rng(0)
    setting = Setting((1.0, 1.0), "flat", "black")
    for radius in (6.7, 9.0, 12.2, 30.0):
        thing = Thing("red", shape, radius / 100)
        at = rng.uniform(49, 51, (20, 2))
        total, centre = readout.centroids(readout.rendered(thing, setting, at, (100, 100)))
        assert total == pytest.approx(shapes.area(shape, radius), rel=0.03)
        assert np.linalg.norm(centre - at, axis=1).max() < 0.05


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (96, 64), (128, 128)])
def test_centroid_floor(size):
    """Read-out minus truth of what is wholly visible is below 0.05 px in flat colours, below 0.2 px in any style."""
    for scene in ("bounce", "parabola", "occluder", "turn_back", "loop"):
        for style, most in (("flat", 0.05), (world.sample(size[1], scene=scene).scene.setting.style, 0.2)):
            clip = world.sample(size[1], scene=scene, size=size, frames=9, split="all", prompt_spec={"style": style})
            tracks = readout.read(clip.video, style).tracks
            for i, thing in enumerate(clip.state.things):
                whole = clip.state.visible[:, i] == 1
                error = np.linalg.norm(tracks[thing.colour].position - clip.pixels[:, i], axis=1)[whole]
                touching = [e.time for e in clip.state.events if e.kind == "collide"]
                apart = [all(abs(t - x) > 0.1 for x in touching) for t in clip.state.times[whole]]
                assert (error[apart] < most).all(), (scene, style, clip.caption, error)


def test_a_larger_size_shows_the_same_scene():
    for seed in range(8):
        small, large = (world.sample(seed, size=(s, s), frames=3, prompt_spec={"style": "flat"}) for s in (64, 256))
        assert small.scene == large.scene
        pooled = large.video.reshape(3, 64, 4, 64, 4, 3).mean(axis=(2, 4))
        assert np.abs(pooled - small.video).mean() < 0.5


@pytest.mark.parametrize("style", world.STYLES)
def test_a_style_or_a_background_changes_the_picture_alone(style):
    for scene in world.SCENES:
        plain = world.sample(5, scene=scene, prompt_spec={"style": "flat"})
        styled = world.sample(5, scene=scene, prompt_spec={"style": style})
        assert np.array_equal(plain.state.position, styled.state.position)
        assert styled.scene.setting.style == style and readout.read(styled.video).style == style, scene


@pytest.mark.parametrize("size", [(8, 8), (31, 77), (77, 31), (65, 63), (32, 128), (135, 240)])
@pytest.mark.parametrize("scene", world.SCENES)
def test_any_size_and_length(scene, size):
    for frames in (1, 2, 20):
        clip = world.sample(5, scene=scene, size=size, frames=frames)
        assert clip.video.shape == (frames, *size, 3) and clip.video.dtype == np.uint8
        assert world.parse(clip.caption) == clip.program
    amounts = readout.shares(clip.video.astype(np.float32), clip.scene.setting.background)
    least = 0.5 * min(INSIDE.values())
    shown = clip.state.visible.max(0) > 0.9
    for i in np.flatnonzero(shown):
        assert amounts[clip.state.things[i].colour].max() > least or min(size) < 20


def test_block_by_block_rendering_is_seamless(monkeypatch):
    for scene in world.SCENES:
        whole = world.sample(3, scene=scene, frames=12).video
        with monkeypatch.context() as patch:
            patch.setattr(render, "_BLOCK", 1)
            assert np.array_equal(world.sample(3, scene=scene, frames=12).video, whole), scene


# --- determinism ---


def test_a_seed_gives_the_same_bytes_in_any_process():
    code = (
        "import hashlib; from sora_model import world; h = hashlib.sha256()\n"
        "for s in range(16): c = world.sample(s); h.update(c.video.tobytes() + c.caption.encode())\n"
        "print(h.hexdigest())"
    )
    digest = hashlib.sha256()
    for seed in range(16):
        clip = world.sample(seed)
        digest.update(clip.video.tobytes() + clip.caption.encode())
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert other.stdout.strip() == digest.hexdigest()
    assert len({world.sample(seed).video.tobytes() for seed in range(60)}) == 60


@pytest.mark.parametrize("scene", world.SCENES)
def test_more_frames_continue_and_a_finer_rate_refines_the_same_clip(scene):
    for seed in range(3):
        short = world.sample(seed, scene=scene, frames=9).video
        assert np.array_equal(world.sample(seed, scene=scene, frames=33).video[:9], short)
        assert np.array_equal(world.sample(seed, scene=scene, frames=17, fps=16).video[::2], short)


# --- captions ---


@pytest.mark.parametrize("scene", world.SCENES)
def test_captions_parse_back_to_their_program_and_every_template_is_written(scene):
    used, words = set(), set()
    templates = [t for name, _, _, t in captions._grammar() if name == scene]
    for seed in range(250):
        frames = (17, 17, 9, 1, 40, 3)[seed % 6]
        clip = world.sample(seed, scene=scene, frames=frames, size=(8, 8), split="all")
        for index in range(3):
            text, program = clip.wording(index)
            assert world.parse(text) == program, text
            assert world.parse(text.upper() + ".") == program
            words |= set(captions._plain(text).split())
            used |= {
                k for k, p in enumerate(captions._patterns()) if p[1] == scene and p[0].fullmatch(captions._plain(text))
            }
    assert words <= set(world.VOCABULARY)
    assert len(used) == len(templates), [
        captions._grammar()[k] for k, p in enumerate(captions._patterns()) if p[1] == scene and k not in used
    ]


def test_the_vocabulary_is_small_and_sorted_and_the_grammar_whole():
    assert list(world.VOCABULARY) == sorted(set(world.VOCABULARY)) and len(world.VOCABULARY) < 200
    for _, account, count, template in captions._grammar():
        used = captions.slots(template)
        assert all(used.count(x) == 1 for x in "abc"[:count]), template
        assert set(used) <= {*"abc"[:count], "camera", "pace", *captions.SLOTS, *(f"{x}_way" for x in "abc"[:count])}
        assert isinstance(account, tuple)
    texts = [t for *_, t in captions._grammar()]
    assert len(texts) == len(set(texts)), "two rules with one wording could not be told apart"


def test_what_captions_say_is_true_of_the_state():
    claims = dict.fromkeys(("hide", "return", "collide", "edge", "land", "bite", "way", "fast"), 0)
    for seed in range(400):
        clip = world.sample(seed, size=(8, 8), frames=(17, 5, 9, 40)[seed % 4])
        program, state = clip.program, clip.state
        assert program.things == tuple((t.colour, t.shape) for t in state.things)
        for i, way in enumerate(program.ways):
            if way in ("left", "right", "up", "down") and program.scene in ("bounce", "occluder"):
                claims["way"] += 1
                axis, sign = int(way in ("up", "down")), 1 if way in ("right", "down") else -1
                assert state.velocity[0, i, axis] * sign > abs(state.velocity[0, i, 1 - axis])
        for kind in ("edge", "collide", "land", "bite"):
            if kind in program.account:
                claims[kind] += 1
                assert state.kinds().count(kind) >= program.account.count(kind)
        if program.scene == "bite":
            assert program.account.count("bite") in (n := len(state.events), n - 1)
        if program.scene == "bounce" and len(program.account) == 2:
            order = [k for k in dict.fromkeys(state.kinds(0)) if k in program.account]
            assert tuple(order) == program.account
        if "hide" in program.account or "leave" in program.account:
            claims["hide"] += 1
            assert state.visible[:, 0].min() <= 0.1
        if "return" in program.account:
            claims["return"] += 1
            gone = int(np.argmax(state.visible[:, 0] <= 0.1))
            assert state.visible[gone:, 0].max() >= 0.5
        if program.pace and program.scene == "bounce":
            claims["fast"] += 1
            assert (np.hypot(*state.velocity[0, 0]) > 0.5) == (program.pace == "fast")
    assert all(claims.values()), claims


def test_held_out_pairs_are_never_trained_on_and_their_halves_are():
    train = {(t.colour, t.shape) for s in range(1500) for t in world.draw(s).things}
    assert train == set(world.pairs("train")) and not train & set(world.HELD_OUT)
    assert {c for c, _ in train} == set(COLOURS) and {s for _, s in train} == set(world.SHAPES)
    held = {(t.colour, t.shape) for s in range(200) for t in world.draw(s, split="held_out").things[:1]}
    assert held == set(world.HELD_OUT)


def test_eval_prompts_say_what_their_program_says():
    prompts = world.eval_prompts()
    assert len(prompts) == 8 * len(world.SCENES)
    assert all(world.parse(text) == program for text, program in prompts)
    held = [p for text, p in prompts if not world.can_write(text, "train")]
    assert len(held) == len(prompts) // 2 and all(p.things[0] in world.HELD_OUT for p in held)
    assert {p.scene for _, p in prompts} == set(REGISTRY)


@pytest.mark.parametrize("text", ["", "hello", "a red", "a red ball moves", "a red ball a blue ring", "a mauve ball"])
def test_other_text_is_no_caption(text):
    assert world.parse(text) is None and not world.can_write(text)


# --- the read-out ---


def test_text_truth_of_true_clips():
    answers = {}
    for seed in range(40):
        clip = world.sample(10_000 + seed, split="all")
        for claim, answer in text_truth(clip.video, clip.program).items():
            answers.setdefault(claim, []).append(answer)
    for claim, given in answers.items():
        said = [a for a in given if a is not None]
        assert len(said) > 3 and np.mean(said) >= 0.95, (claim, given)


def test_readout_of_an_empty_clip_finds_nothing():
    seen = readout.read(np.full((5, 64, 64, 3), 66, np.uint8))
    assert seen.colour is None and seen.shape() is None and not seen.tracks


def test_readout_survives_any_picture():
    rng = np.random.default_rng(0)
    for shape in ((1, 64, 64, 3), (5, 9, 64, 3), (2, 100, 30, 3)):
        for video in (rng.integers(0, 256, shape, dtype=np.uint8), rng.random(shape), np.zeros(shape, np.uint8)):
            for track in readout.read(video).tracks.values():
                assert track.position.shape == (shape[0], 2) and np.isfinite(track.area).all()


@pytest.mark.parametrize(
    "video",
    [np.zeros((64, 64, 3), np.uint8), np.zeros((2, 8, 8, 3), np.int64), np.full((2, 8, 8, 3), np.nan)],
)
def test_readout_refuses_what_is_not_a_clip(video):
    with pytest.raises(ValueError, match="video"):
        readout.read(video)


def test_pieces_counts_what_is_apart():
    solid = np.zeros((2, 12, 12), bool)
    solid[0, 1:4, 1:4] = solid[0, 6:9, 6:9] = solid[0, 11, 11] = True
    solid[1, 1:10, 1] = solid[1, 9, 1:10] = solid[1, 1:10, 9] = solid[1, 1, 1:10] = True
    assert readout.pieces(solid, 4).tolist() == [2, 1] and readout.pieces(solid, 1).tolist() == [3, 1]


# --- the data for training ---


def test_batches_are_functions_of_seed_and_step_in_any_process():
    buckets = [Bucket(5, (16, 16)), Bucket(9, (16, 24), batch=2), Bucket(1, (24, 16))]
    data = WorldData(batch=3, buckets=buckets, seed=3, steps=6)
    batches = [data.at(step) for step in range(6)]
    for (video, texts, clips), (_, bucket) in zip(batches, ((s, data.bucket(s)) for s in range(6)), strict=True):
        assert tuple(video.shape) == (bucket.batch or 3, bucket.frames, *bucket.size, 3)
        assert all(np.array_equal(v, c.video) for v, c in zip(video.numpy(), clips, strict=True))
        assert all(world.parse(text).things == tuple((t.colour, t.shape) for t in c.state.things)
                   for text, c in zip(texts, clips, strict=True))  # fmt: skip
    resumed = list(loader(data, first=4, workers=1))
    assert len(resumed) == 2
    for (video, texts, _), (again, said, _) in zip(batches[4:], resumed, strict=True):
        assert np.array_equal(video, again) and texts == said
    seeds = [clip.seed for _, _, clips in batches for clip in clips]
    assert len(set(seeds)) == len(seeds)
    assert not set(seeds) & {c.seed for s in range(6) for c in WorldData(batch=3, buckets=buckets, seed=4).at(s)[2]}
    assert {(b.frames, b.size) for b in map(data.bucket, range(6))} <= {(b.frames, b.size) for b in buckets}


def test_weights_decide_what_is_drawn():
    data = WorldData(batch=40, buckets=[Bucket(1, (8, 8)), Bucket(2, (8, 8), weight=0)], scenes={"loop": 1, "bite": 3})
    names = [clip.scene.name for step in range(5) for clip in data.at(step)[2]]
    assert set(names) == {"loop", "bite"} and 120 < names.count("bite") < 180


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"buckets": []}, "buckets"),
        ({"buckets": [Bucket(weight=0)]}, "buckets"),
        ({"scenes": {"juggle": 1}}, "juggle"),
        ({"scenes": {"loop": -1}}, "scenes"),
        ({"batch": 0}, "batch"),
        ({"seed": -1}, "seed"),
        ({"split": "test"}, "split"),
    ],
)
def test_bad_data_is_named(options, name):
    with pytest.raises(ValueError, match=name):
        WorldData(**options)


# --- bad arguments ---


def test_prompt_spec_fixes_what_it_names():
    spec = {"colour": "cyan", "shape": "ring", "style": "outline", "background": "navy", "count": 2}
    for seed in range(6):
        scene = world.sample(seed, scene="bounce", size=(8, 8), prompt_spec=spec).scene
        assert (scene.things[0].colour, scene.things[0].shape, len(scene.things)) == ("cyan", "ring", 2)
        assert (scene.setting.style, scene.setting.background) == ("outline", "navy")


def test_batch_is_its_samples():
    videos, texts, clips = world.batch(range(5, 9), frames=5, size=(16, 24), scene="bounce")
    assert videos.shape == (4, 5, 16, 24, 3)
    for i, seed in enumerate(range(5, 9)):
        one = world.sample(seed, frames=5, size=(16, 24), scene="bounce")
        assert np.array_equal(videos[i], one.video) and texts[i] == one.caption == clips[i].caption
    with pytest.raises(ValueError, match="seeds"):
        world.batch([])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"scene": "juggle"}, "scene"),
        ({"frames": 0}, "frames"),
        ({"frames": 2.0}, "frames"),
        ({"fps": 0}, "fps"),
        ({"fps": math.nan}, "fps"),
        ({"split": "test"}, "split"),
        ({"size": 64}, "size"),
        ({"size": (64, 64, 3)}, "size"),
        ({"size": (0, 64)}, "size"),
        ({"size": (-64, 64)}, "size"),
        ({"size": (8, 8000)}, "size"),
        ({"size": (10**6, 10**6)}, "GiB"),
        ({"frames": 10**9}, "frames fit"),
        ({"prompt_spec": "red ball"}, "prompt_spec"),
        ({"prompt_spec": {"color": "red"}}, "color"),
        ({"prompt_spec": {"colour": "mauve"}}, "mauve"),
        ({"prompt_spec": {"colour": "green", "shape": "circle"}, "scene": "bounce"}, "split"),
        ({"prompt_spec": {"count": 3}, "scene": "bite"}, "count"),
        ({"prompt_spec": {"style": "neon", "background": "cream"}}, "neon"),
        ({"prompt_spec": {"shape": "box"}, "scene": "loop"}, "box"),
    ],
)
def test_bad_arguments_are_named(options, name):
    with pytest.raises((ValueError, TypeError), match=name):
        world.sample(options.pop("seed", 0), **options)
