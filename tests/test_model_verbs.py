"""What is given stays as it is, frame for frame, and what is made depends on it; every verb, on two kinds of VAE."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sora_model import media, world
from sora_model.dit import DiTConfig, SoraDiT
from sora_model.frames import covering
from sora_model.pipeline import Clip, Defaults, Sora
from sora_model.text import WordTextConfig, WordTextEncoder
from sora_model.vae import CausalVAE, VAEConfig

PROMPT, FAST = "a red circle", {"steps": 2, "seed": 3}


def untrained(temporal: bool) -> Sora:
    torch.manual_seed(0)
    dit = SoraDiT(DiTConfig(dim=24, heads=2, layers=1, ffn_dim=32, in_channels=4, out_channels=4, text_dim=16))
    torch.nn.init.normal_(dit.head.weight, std=0.3)
    vae = CausalVAE(VAEConfig(
        base_dim=4, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(False, temporal), patch=2
    ))  # fmt: skip
    text = WordTextEncoder(WordTextConfig(words=world.VOCABULARY, dim=16))
    defaults = Defaults(frames=9, size=(32, 48), fps=8.0, steps=4, guidance=2.0, shift=2.0)
    for part in (dit, vae, text):
        part.eval().requires_grad_(False)
    return Sora(dit, vae, text, defaults)


@pytest.fixture(scope="module", params=[False, True], ids=["frames", "pairs"])
def sora(request):
    """Latents of one frame each, or of two after the first."""
    return untrained(request.param)


@pytest.fixture(scope="module")
def clip():
    return world.sample(5, frames=9, size=(32, 48)).video


def test_an_image_comes_alive(sora, clip):
    made = sora.animate(clip[0], PROMPT, **FAST)
    assert isinstance(made, Clip) and made.frames.shape == clip.shape and made.fps == 8 and made.prompt == PROMPT
    assert np.array_equal(made.frames[0], clip[0])
    assert not np.array_equal(made.frames, sora.animate(255 - clip[0], PROMPT, **FAST).frames)
    assert np.array_equal(made.frames, sora.animate(clip[0], PROMPT, **FAST).frames)
    ends = sora.animate(clip[0], PROMPT, last=clip[-1], **FAST)
    step = sora.vae.config.temporal_factor
    assert np.array_equal(ends.frames[0], clip[0]) and np.array_equal(ends.frames[-step], clip[-1])
    assert np.array_equal(ends.frames[-1], clip[-1])
    assert not np.array_equal(ends.frames[4], made.frames[4])


def test_what_is_given_is_seen_in_a_clip_longer_than_those_of_training(sora, clip, recwarn):
    """All frames together, whatever a long clip of `generate` is made by."""
    made, other = (sora.animate(image, PROMPT, seconds=2, **FAST).frames for image in (clip[0], 255 - clip[0]))
    assert len(made) >= 16 and not np.array_equal(made[1:], other[1:])
    with pytest.raises(TypeError, match="what begins with frames is made all at once; it takes no argument 'long'"):
        sora.animate(clip[0], PROMPT, long="stream", **FAST)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("frames", [1, 9, 20])
def test_a_clip_goes_on(sora, clip, backward, frames):
    given = np.concatenate([clip] * 3)[:frames]
    longer = sora.extend(given, PROMPT, seconds=1.5, backward=backward, **FAST).frames
    assert len(longer) == frames + 12
    assert np.array_equal(longer[-frames:] if backward else longer[:frames], given)
    other = sora.extend(255 - given, PROMPT, seconds=1.5, backward=backward, **FAST).frames
    new, changed = (video[:12] if backward else video[frames:] for video in (longer, other))
    assert not np.array_equal(new, changed)
    assert len({frame.tobytes() for frame in new}) == 12


def test_two_clips_meet_and_one_meets_itself(sora, clip):
    other = world.sample(6, frames=7, size=(32, 48)).video
    met = sora.connect(clip, other, PROMPT, seconds=0.5, **FAST).frames
    assert len(met) == 9 + 4 + 7
    assert np.array_equal(met[:9], clip) and np.array_equal(met[-7:], other)
    again = sora.connect(clip, 255 - other, PROMPT, seconds=0.5, **FAST).frames
    assert not np.array_equal(met[9:13], again[9:13])
    looped = sora.loop(clip, PROMPT, seconds=0.5, **FAST).frames
    assert len(looped) == 13 and np.array_equal(looped[:9], clip)
    assert np.array_equal(looped[9:], sora.connect(clip, clip, PROMPT, seconds=0.5, **FAST).frames[9:13])


@pytest.mark.parametrize("factor", [2, 3, 20])
def test_frames_between_frames(clip, factor):
    sora = untrained(temporal=False)
    made = sora.interpolate(clip, PROMPT, factor=factor, **FAST)
    assert len(made.frames) == 8 * factor + 1 and made.fps == 8 * factor
    assert np.array_equal(made.frames[::factor], clip)
    new = np.delete(made.frames, slice(None, None, factor), 0)
    assert len({frame.tobytes() for frame in new}) == len(new) == 8 * (factor - 1)
    assert np.array_equal(sora.interpolate(clip[:1], PROMPT, factor=factor, **FAST).frames, clip[:1])


def test_frames_that_are_halves_of_latents_have_none_between_them(clip):
    with pytest.raises(ValueError, match="interpolate needs a VAE whose latents are frames; in .* a latent is 2"):
        untrained(temporal=True).interpolate(clip, PROMPT)


def test_a_clip_is_edited_as_far_as_the_strength_allows(sora, clip):
    kept = sora.edit(clip, PROMPT, strength=0.0, **FAST).frames
    with torch.no_grad():
        video = torch.as_tensor(clip).movedim(-1, 0)[None].float() / 127.5 - 1
        coded = sora.vae.decode(sora.vae.encode(video)[0])[0].movedim(0, -1)
    assert np.abs(kept - ((coded + 1) * 127.5).numpy()).max() < 1
    free = sora.edit(clip, PROMPT, strength=1.0, **FAST).frames
    assert np.array_equal(free, sora.generate(PROMPT, seconds=9 / 8, **FAST).frames)
    little, much = (sora.edit(clip, PROMPT, strength=s, **FAST).frames.astype(float) for s in (0.2, 0.9))
    assert 0 < np.square(little - kept).mean() < np.square(much - kept).mean()
    assert np.array_equal(sora.restyle(clip, PROMPT, strength=0.2, **FAST).frames,
                          sora.edit(clip, PROMPT, strength=0.2, **FAST).frames)  # fmt: skip
    assert len(sora.edit(clip[:6], PROMPT, **FAST).frames) == 6


def test_what_lies_in_a_box_is_drawn_anew(sora, clip):
    made = sora.inpaint(clip[:4], PROMPT, box=(18, 3, 30, 14), **FAST).frames
    changed = (made != clip[:4]).any((0, 3))
    assert changed[:16, 16:32].mean() > 0.9
    changed[:16, 16:32] = False
    assert not changed.any()


def test_files_are_given_by_their_paths(sora, clip, tmp_path):
    Image.fromarray(clip[0]).save(tmp_path / "first.png")
    made = sora.animate(tmp_path / "first.png", PROMPT, **FAST)
    assert np.array_equal(made.frames, sora.animate(clip[0], PROMPT, **FAST).frames)
    media.write_video(tmp_path / "clip.mp4", clip.repeat(2, 0), fps=16)
    shown = np.stack(list(media.read_video(tmp_path / "clip.mp4")))[::2]
    made = sora.extend(str(tmp_path / "clip.mp4"), PROMPT, seconds=0.25, **FAST).frames
    assert len(made) == 9 + 2 and np.array_equal(made[:9], shown)
    whole = sora.extend(sora.generate(PROMPT, **FAST), PROMPT, seconds=0.25, **FAST)
    assert len(whole.frames) == 11


def test_other_sizes_cover_the_frame_and_are_cut_around_the_centre(clip):
    image = np.zeros((1, 10, 40, 3), np.uint8)
    image[:, :, 10:30] = 200
    cut = covering(image, (10, 20))
    assert cut.shape == (1, 10, 20, 3) and (cut == 200).all()
    assert covering(image, (30, 30)).shape == (1, 30, 30, 3)
    assert covering(clip, (32, 48)) is clip
    assert untrained(False).animate(clip[0], PROMPT, size=(48, 32), **FAST).frames.shape == (9, 48, 32, 3)


@pytest.mark.parametrize("long", ["stream", "pieces"])
def test_a_long_clip_is_made_in_parts_that_follow_one_another(long, tmp_path, recwarn):
    """The first part is that of a short clip; the same by file; memory is asked for that of a part."""
    sora = untrained(False)
    made = sora.generate(PROMPT, seconds=5, long=long, **FAST).frames
    assert len(made) == 40 and len({frame.tobytes() for frame in made}) == 40
    first = sora.generate(PROMPT, seconds=4 / 8 if long == "stream" else 9 / 8, long=long, **FAST).frames
    assert np.array_equal(made[: len(first)], first)
    if long == "stream":
        assert np.array_equal(made, sora.generate(PROMPT, seconds=5, **FAST).frames)
    else:
        assert np.array_equal(first, sora.generate(PROMPT, seconds=9 / 8, **FAST).frames)
    sora.generate_to(tmp_path / "a.mp4", PROMPT, seconds=5, long=long, **FAST)
    assert len(list(media.read_video(tmp_path / "a.mp4"))) == 40
    parts, whole = (sora._memory(n, 32, 48, "auto", False, 1 << 40, m)[1] for n, m in ((10_000, 9), (10_000, None)))
    assert parts < whole / 100 and parts == sora._memory(100, 32, 48, "auto", False, 1 << 40, 9)[1]


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_an_image_that_cannot_be_written_to_is_taken_without_a_warning(clip):
    """As Pillow's are."""
    from PIL import Image

    image = Image.fromarray(clip[0])
    assert (untrained(False).animate(image, PROMPT, seconds=0.25, steps=1).frames[0] == clip[0]).all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, c: s.generate(PROMPT, long="whole"), "long must be one of once, stream, pieces or None"),
        (lambda s, c: untrained(True).generate(PROMPT, long="stream"), "'stream' needs a checkpoint whose latents"),
        (lambda s, c: s.animate(c.astype(np.float32), PROMPT), "image must be frames, uint8 .*got float32"),
        (lambda s, c: s.animate(c[:0], PROMPT), "image must be frames"),
        (lambda s, c: s.extend(c[..., 0], PROMPT), "clip must be frames"),
        (lambda s, c: s.extend(c, PROMPT, seconds=0), "seconds=0 at 8 frames per second is less than one frame"),
        (lambda s, c: s.extend("none.mp4", PROMPT), "there is no file 'none.mp4'"),
        (lambda s, c: s.edit(c, PROMPT, strength=2), "strength must be a number from 0 to 1; got 2"),
        (lambda s, c: s.inpaint(c, PROMPT, box=(0, 0, 50, 10)), "box must lie within 48x32"),
        (lambda s, c: s.inpaint(c, PROMPT, box=(9, 0, 9, 10)), "box must lie within"),
        (lambda s, c: s.inpaint(c, PROMPT, box=np.array([0, 0, 50, 10])), "box must lie within 48x32"),
        (lambda s, c: s.inpaint(c, PROMPT, box=np.array([0, 0, 5.5, 9])), "box must be four whole numbers"),
        (lambda s, c: s.inpaint(c, PROMPT, box=(0, 0, 5)), "box must be four whole numbers"),
        (lambda s, c: s.inpaint(c, PROMPT, box=(0, 0, 48, 32)), "nothing is known"),
        (lambda s, c: s.interpolate(c, PROMPT, factor=1), "factor must be a whole number from 2 to 64; got 1"),
        (lambda s, c: s.animate(c[0], ""), "prompt holds no word"),
    ],
)
def test_what_cannot_be_is_refused(clip, call, said):
    with pytest.raises((ValueError, media.MediaError), match=said):
        call(untrained(False), clip)
