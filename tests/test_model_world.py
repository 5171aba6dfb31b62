"""The procedural world: physics against an event-by-event simulation, captions against the state, the read-out."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from sora_model import world
from sora_model.media import read_video, write_video
from sora_model.world import readout, render
from sora_model.world.captions import NOUNS, QUICK, SLOW, WAYS
from sora_model.world.render import coverage
from sora_model.world.scenes import area_left_of, extent

SMALL = (8, 8)
BOXES = ((64, 64), (64, 112), (96, 64))


def _stepwise(start: float, velocity: float, low: float, high: float, time: float) -> tuple[float, float, int]:
    """One axis from wall hit to wall hit: position, velocity and number of hits at ``time``."""
    hits = 0
    while True:
        to_wall = ((high if velocity > 0 else low) - start) / velocity if velocity else math.inf
        if to_wall > time:
            return start + velocity * time, velocity, hits
        start, time, velocity, hits = (high if velocity > 0 else low), time - to_wall, -velocity, hits + 1


@pytest.mark.parametrize("kind", world.SCENES)
def test_motion_is_that_of_elastic_reflections(kind):
    times = np.linspace(0, 30, 61)
    for seed in range(40):
        scene = world.sample(seed, scene=kind, size=SMALL, frames=1).scene
        state = scene.state(times)
        left, right, up, down = extent(scene.shape, scene.radius)
        limits = ((left, scene.box[0] - right), (up, scene.box[1] - down))
        for t, time in enumerate(times):
            both = [_stepwise(scene.start[a], scene.velocity[a], *limits[a], time) for a in (0, 1)]
            assert state.position[t] == pytest.approx([b[0] for b in both], abs=1e-9)
            assert state.velocity[t].tolist() == [b[1] for b in both]
            assert state.bounces[t] == sum(b[2] for b in both)


def test_the_object_touches_every_edge_it_reflects_from_and_never_crosses_one():
    for seed in range(30):
        scene = world.sample(seed, scene="bounce", size=SMALL, frames=1).scene
        times = np.linspace(0, 2 / np.abs(scene.velocity).min(), 20001)
        x, y = scene.state(times).position.T
        left, right, up, down = extent(scene.shape, scene.radius)
        gaps = (x.min() - left, 1 - (x.max() + right), y.min() - up, 1 - (y.max() + down))
        step = np.abs(scene.velocity).max() * (times[1] - times[0])
        assert all(-1e-9 <= gap <= step for gap in gaps), (seed, gaps)


@pytest.mark.parametrize("size", BOXES)
def test_occlusion_is_exact(size):
    """The visible fraction against counting points, the hidden time against the wall's width less the object's."""
    points = (np.arange(400) + 0.5) / 400 - 0.5
    for seed in range(12):
        scene = world.sample(seed, scene="occluder", size=size, frames=1).scene
        left, right, up, down = extent(scene.shape, scene.radius)
        crossing = (scene.wall.right - scene.wall.left + 4 * left) / abs(scene.velocity[0])
        times = np.linspace(0, crossing, 4001)
        state = scene.state(times)
        assert state.visible[0] == 1
        gap = scene.wall.right - scene.wall.left - left - right
        hidden = state.hidden.sum() * (times[1] - times[0])
        assert gap >= 0.05 and hidden == pytest.approx(gap / abs(scene.velocity[0]), abs=2e-3)
        assert state.reappears

        reach = 2 * scene.radius * world.scenes.TRIANGLE
        dx, dy = points[None, :] * reach, points[:, None] * reach
        inside = coverage(scene.shape, scene.radius * 1e6, dx * 1e6, dy * 1e6) > 0.5
        for t in range(0, len(times), 250):
            free = (state.position[t, 0] + dx < scene.wall.left) | (state.position[t, 0] + dx > scene.wall.right)
            assert state.visible[t] == pytest.approx((inside & free).sum() / inside.sum(), abs=0.01)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_rendered_area_and_centroid_are_those_of_the_shape(shape):
    rng = np.random.default_rng(0)
    total = float(area_left_of(shape, 1.0, np.array(math.inf)))
    for radius in (6.7, 9.0, 12.2, 30.0):
        for _ in range(50):
            cx, cy = rng.uniform(49, 51, 2)
            grid = np.arange(100) + 0.5
            cover = coverage(shape, radius, grid[None, :] - cx, grid[:, None] - cy)
            area = cover.sum()
            assert area == pytest.approx(total * radius**2, rel=0.02)
            assert (cover.sum(0) @ grid / area - cx) ** 2 + (cover.sum(1) @ grid / area - cy) ** 2 < 0.05**2


@pytest.mark.parametrize("size", [(64, 64), (63, 65), (128, 128), (64, 128), (180, 101)])
def test_centroid_floor(size):
    """Read-out minus truth is below 0.05 px. Off the walls' grid a touched wall shares pixels: bounce only."""
    scenes = world.SCENES if all(n % 64 == 0 for n in size) else ("bounce",)
    for seed in range(24 if min(size) <= 64 else 6):
        clip = world.sample(seed, scene=scenes[seed % len(scenes)], size=size, frames=9, split="all")
        whole = clip.state.visible == 1
        error = np.linalg.norm(readout.read(clip.video).position - clip.pixels, axis=1)[whole]
        assert whole.any() and error.max() < 0.05, (seed, clip.caption, error.max())


def test_a_seed_gives_the_same_bytes():
    for seed in range(20):
        one, two = world.sample(seed), world.sample(seed)
        assert one.video.tobytes() == two.video.tobytes() and one.caption == two.caption
    assert len({world.sample(seed).video.tobytes() for seed in range(200)}) == 200


def test_more_frames_continue_and_a_finer_rate_refines_the_same_clip():
    for seed in range(10):
        short = world.sample(seed, frames=9).video
        assert np.array_equal(world.sample(seed, frames=33).video[:9], short)
        assert np.array_equal(world.sample(seed, frames=17, fps=16).video[::2], short)


def test_a_larger_size_shows_the_same_scene():
    for seed in range(6):
        small, large = (world.sample(seed, size=(s, s), frames=5) for s in (64, 256))
        assert small.scene == large.scene
        pooled = large.video.reshape(5, 64, 4, 64, 4, 3).mean(axis=(2, 4))
        # A quarter of a pixel off, some 50 outline pixels would differ by a quarter of ~150: 0.3 on average.
        assert np.abs(pooled - small.video).mean() < 0.15


@pytest.mark.parametrize("size", [(8, 8), (31, 77), (77, 31), (65, 63), (8, 128), (128, 8), (270, 480)])
@pytest.mark.parametrize("frames", [1, 2, 40])
def test_any_size_and_length(size, frames):
    for kind in world.SCENES:
        clip = world.sample(5, scene=kind, size=size, frames=frames)
        assert clip.video.shape == (frames, *size, 3) and clip.video.dtype == np.uint8
        colour = np.array(world.COLOURS[clip.state.colour])
        nearest = np.abs(clip.video[0].astype(int) - colour).sum(-1).min()
        assert nearest < (10 if min(size) > 30 else 150)


def test_block_by_block_rendering_is_seamless(monkeypatch):
    whole = world.sample(3, frames=30).video
    monkeypatch.setattr(render, "_BLOCK", 1)
    assert np.array_equal(world.sample(3, frames=30).video, whole)


def test_captions_are_true():
    """Every claim a caption can make, checked against the state; every template condition met at least once."""
    claims = dict.fromkeys(("bounces", "slowly", "quickly", "again", "hides", "towards a", "way", "background"), 0)
    for seed in range(1000):
        frames, fps = ((17, 8), (5, 8), (1, 8), (9, 8), (40, 12))[seed % 5]
        clip = world.sample(seed, frames=frames, fps=fps, size=SMALL, split="all")
        text, state, scene = f" {clip.caption} ", clip.state, clip.scene
        thing = re.match(rf" (a|an|the) {state.colour} ({'|'.join(NOUNS[state.shape])}) ", text)
        assert thing and (thing[1] == "the" or (thing[1] == "an") == (state.colour == "orange")), text
        rest = text[thing.end() - 1 :]
        for way, wordings in WAYS.items():
            said = [w for w in wordings if re.search(rf" {w}( |$)(?!side)", rest)]
            if said:
                claims["way"] += 1
                axis, sign = int(way in ("up", "down")), 1 if way in ("right", "down") else -1
                assert state.velocity[0, axis] * sign > abs(state.velocity[0, 1 - axis]), text
        speed = float(np.hypot(*state.velocity[0]))
        if " bounces" in rest:
            claims["bounces"] += 1
            assert state.bounces[-1] >= 1
        if " slowly " in rest or " quickly " in rest:
            claims["slowly" if " slowly " in rest else "quickly"] += 1
            assert speed < SLOW if " slowly " in rest else speed > QUICK
        if any(w in rest for w in ("again", "reappears", "other side", "moment")):
            claims["again"] += 1
            assert state.reappears
        if "hides" in rest or "disappears" in rest:
            claims["hides"] += 1
            assert state.visible.min() <= 0.1
        assert (" wall " in rest or " bar " in rest) <= (scene.wall is not None)
        for colour in ("grey", "brown"):
            assert f"{colour} wall" not in rest or scene.wall.colour == colour
        if "towards a" in rest or "towards the wall" in rest:
            claims["towards a"] += 1
            assert state.visible.min() > 0.1
        if found := re.search(r"on a (\w+) background", rest):
            claims["background"] += 1
            assert found[1] == scene.background
        if frames == 1:
            assert not any(f" {verb} " in rest for verb in ("moves", "rolls", "passes", "glides", "goes")), text
    assert all(claims.values()), claims


def test_the_grammar_recognises_what_it_writes_and_the_vocabulary_is_complete():
    words = set()
    for seed in range(2500):
        caption = world.sample(seed, size=SMALL, frames=(17, 5, 1, 8)[seed % 4]).caption
        assert world.can_write(caption), caption
        words |= set(caption.split())
    assert words <= set(world.VOCABULARY)
    assert set(world.VOCABULARY) - words == set()
    assert list(world.VOCABULARY) == sorted(set(world.VOCABULARY))


def test_held_out_pairs_are_never_trained_on_and_their_halves_are():
    train = {(c.state.colour, c.state.shape) for c in (world.sample(s, size=SMALL, frames=1) for s in range(1500))}
    assert train == set(world.pairs("train")) and not train & set(world.HELD_OUT)
    assert {c for c, _ in train} == set(world.COLOURS) and {s for _, s in train} == set(world.SHAPES)
    held = {
        (c.state.colour, c.state.shape)
        for c in (world.sample(s, size=SMALL, frames=1, split="held_out") for s in range(100))
    }
    assert held == set(world.HELD_OUT)


def test_eval_prompts_are_never_captions_of_training_clips():
    prompts = world.eval_prompts()
    texts = [text for text, _ in prompts]
    assert len(texts) == len(set(texts)) == 40
    assert not [text for text in texts if world.can_write(text, "train")]
    assert all(set(text.split()) <= set(world.VOCABULARY) for text in texts)
    novel = [text for text, expected in prompts if not expected["held_out"]]
    assert len(novel) == 24 and not [text for text in novel if world.can_write(text, "all")]
    pairs = {(e["colour"], e["shape"]) for _, e in prompts if e["held_out"]}
    assert pairs == set(world.HELD_OUT)
    for key, values in (("colour", world.COLOURS), ("shape", world.SHAPES), ("scene", world.SCENES)):
        assert {e[key] for _, e in prompts} == set(values)
    assert {e["direction"] for _, e in prompts} == {None, *world.DIRECTIONS}
    for text, expected in prompts:
        assert expected["colour"] in text and any(noun in text for noun in NOUNS[expected["shape"]])


def _blurred(video: np.ndarray, sigma: float) -> np.ndarray:
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / (2 * sigma**2))
    out = video.astype(np.float32)
    for axis in (1, 2):
        pad = [(4, 4) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(out, pad, mode="edge")
        length = out.shape[axis]
        out = sum(k * padded.take(range(i, i + length), axis) for i, k in enumerate(kernel / kernel.sum()))
    return out


def _degrade(how: str, video: np.ndarray, folder) -> np.ndarray:
    if how == "exact":
        return video
    if how == "coded":
        return np.stack(list(read_video(write_video(folder / "clip.mp4", video, crf=30))))
    noise = np.random.default_rng(0).normal(0, 12, video.shape)
    return np.clip(_blurred(video, 1.0) + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("how", ["exact", "blurred and noisy", "coded"])
def test_readout_floor(how, tmp_path):
    """Colour is always read, shape in at least 97 % of the clips, way and reappearance in at least 97 %."""
    count = 120 if how == "exact" else 40
    right = dict.fromkeys(("colour", "shape", "moves", "reappears"), 0)
    videos, _, clips = world.batch(range(10_000, 10_000 + count), split="all")
    degraded = _degrade(how, videos.reshape(-1, 64, 64, 3), tmp_path).reshape(videos.shape)
    for clip, video in zip(clips, degraded, strict=True):
        expected = {
            "colour": clip.state.colour,
            "shape": clip.state.shape,
            "direction": clip.scene.direction,
            "reappears": clip.state.reappears,
        }
        for key, value in readout.score(video, expected).items():
            right[key] += value
    assert right["colour"] == count
    assert min(right.values()) >= 0.97 * count, right


def test_readout_sees_what_is_wrong():
    clip = world.sample(1, scene="occluder")
    truth = {
        "colour": clip.state.colour,
        "shape": clip.state.shape,
        "direction": clip.scene.direction,
        "reappears": True,
    }
    assert all(readout.score(clip.video, truth).values())
    assert not readout.score(clip.video, {**truth, "colour": "red" if truth["colour"] != "red" else "blue"})["colour"]
    assert not readout.score(clip.video, {**truth, "shape": "ring" if truth["shape"] != "ring" else "circle"})["shape"]
    assert not readout.score(clip.video[:, :, ::-1], truth)["moves"]
    assert not readout.score(np.repeat(clip.video[:1], 17, axis=0), truth)["moves"]
    gone = clip.video.copy()
    gone[int(np.argmax(clip.state.hidden)) :] = clip.video[int(np.argmax(clip.state.hidden))]
    assert readout.score(gone, truth) == {"colour": True, "shape": True, "moves": True, "reappears": False}
    assert readout.score(clip.video, {"colour": "red", "shape": "ring"})["moves"] is None


@pytest.mark.parametrize("scene", world.SCENES)
def test_readout_of_an_empty_clip_finds_nothing(scene):
    hidden = world.sample(2, scene="occluder")
    video = hidden.video[hidden.state.hidden] if scene == "occluder" else np.full((5, 64, 64, 3), 66, np.uint8)
    seen = readout.read(video)
    assert seen.colour is None and seen.shape is None and not seen.present.any() and not seen.reappears
    assert (seen.wall is not None) == (scene == "occluder")


def test_readout_survives_any_picture():
    rng = np.random.default_rng(0)
    for shape in ((1, 64, 64, 3), (17, 9, 64, 3), (4, 200, 30, 3)):
        for video in (
            rng.integers(0, 256, shape, dtype=np.uint8),
            rng.random(shape),
            np.zeros(shape, np.uint8),
        ):
            seen = readout.read(video)
            assert seen.position.shape == (shape[0], 2) and np.isfinite(seen.visible).all()


@pytest.mark.parametrize(
    "video",
    [np.zeros((64, 64, 3), np.uint8), np.zeros((2, 8, 8, 3), np.int64), np.full((2, 8, 8, 3), np.nan)],
)
def test_readout_refuses_what_is_not_a_clip(video):
    with pytest.raises(ValueError, match="video"):
        readout.read(video)


def test_prompt_spec_fixes_what_it_names():
    spec = {"colour": "cyan", "shape": "ring", "direction": "left", "background": "navy"}
    for kind in world.SCENES:
        for seed in range(10):
            scene = world.sample(seed, scene=kind, size=SMALL, prompt_spec=spec).scene
            assert (scene.colour, scene.shape, scene.direction, scene.background) == tuple(spec.values())
            assert scene.velocity[0] < 0


def test_batch_is_its_samples():
    videos, captions, clips = world.batch(range(5, 9), frames=5, size=(16, 24), scene="bounce")
    assert videos.shape == (4, 5, 16, 24, 3)
    for i, seed in enumerate(range(5, 9)):
        one = world.sample(seed, frames=5, size=(16, 24), scene="bounce")
        assert np.array_equal(videos[i], one.video) and captions[i] == one.caption == clips[i].caption


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
        ({"prompt_spec": {"colour": "green", "shape": "circle"}}, "split"),
        ({"prompt_spec": {"direction": "up"}, "scene": "occluder"}, "direction"),
    ],
)
def test_bad_arguments_are_named(options, name):
    with pytest.raises((ValueError, TypeError), match=name):
        world.sample(options.pop("seed", 0), **options)


def test_empty_batch_is_refused():
    with pytest.raises(ValueError, match="seeds"):
        world.batch([])
