"""The commands that make a clip: each writes what its verb gives in Python, and says one line where it cannot."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from test_model_verbs import untrained

from sora_model import choose, media, world
from sora_model.pipeline import Clip, Sora

PROMPT, FAST = "a red circle bounces around", {"steps": 2, "seed": 3}
OPTIONS = ("--steps", 2, "--seed", 3, "--weights", "folder")


@pytest.fixture
def model(sora, monkeypatch):
    """That of the commands, tiny; in their folder are clip.mp4, other.mp4 and first.png."""
    model = untrained(temporal=False)
    monkeypatch.setattr(Sora, "from_pretrained", lambda source, device=None, expert=None: model)
    for name, seed in (("clip", 5), ("other", 6)):
        media.write_video(f"{name}.mp4", world.sample(seed, frames=9, size=(32, 48)).video, fps=8)
    Image.fromarray(world.sample(5, frames=1, size=(32, 48)).video[0]).save("first.png")
    return model


@pytest.mark.parametrize(
    ("command", "options", "verb"),
    [
        ("animate first.png", "", lambda s: s.animate("first.png", PROMPT, **FAST)),
        (
            "animate first.png", "--last other.mp4 --seconds 0.75",
            lambda s: s.animate("first.png", PROMPT, last="other.mp4", seconds=0.75, **FAST),
        ),
        ("extend clip.mp4", "", lambda s: s.extend("clip.mp4", PROMPT, **FAST)),
        (
            "extend clip.mp4", "--seconds 0.5 --backward",
            lambda s: s.extend("clip.mp4", PROMPT, seconds=0.5, backward=True, **FAST),
        ),
        ("connect clip.mp4 other.mp4", "", lambda s: s.connect("clip.mp4", "other.mp4", PROMPT, **FAST)),
        ("loop clip.mp4", "--seconds 0.5", lambda s: s.loop("clip.mp4", PROMPT, seconds=0.5, **FAST)),
        ("interpolate clip.mp4", "--factor 3", lambda s: s.interpolate("clip.mp4", PROMPT, factor=3, **FAST)),
        ("edit clip.mp4", "--strength 0.3", lambda s: s.edit("clip.mp4", PROMPT, strength=0.3, **FAST)),
        ("restyle clip.mp4", "", lambda s: s.restyle("clip.mp4", PROMPT, **FAST)),
        (
            "inpaint clip.mp4", "--box 0,0,16,16 --guidance 1.5",
            lambda s: s.inpaint("clip.mp4", PROMPT, box=(0, 0, 16, 16), guidance=1.5, **FAST),
        ),
        (
            "generate", "--long pieces --seconds 2",
            lambda s: s.generate(PROMPT, long="pieces", seconds=2, **FAST),
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:this checkpoint was trained on")
def test_a_command_writes_what_its_verb_gives(sora, model, command, options, verb):
    code, out, err = sora(*command.split(), PROMPT, *options.split(), *OPTIONS, "--out", "made.mp4")
    assert code == 0, err
    assert "wrote made.mp4" in out
    clip = verb(model)
    clip.save("same.mp4")  # marked alike
    assert media.probe("made.mp4").fps == clip.fps
    made, same = (np.stack(list(media.read_video(name))).astype(int) for name in ("made.mp4", "same.mp4"))
    assert made.shape == same.shape and np.abs(made - same).mean() < 0.05 * same.std()  # x264 may code again otherwise


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("animate", "none.png", PROMPT), "there is no file 'none.png'"),
        (("generate", PROMPT, "--guidance", "3,2"), "guidance must be one number, as this checkpoint has one transf"),
        (("animate", "note.txt", PROMPT), "it is not an MP4, MOV, WebM, MKV or AVI video, nor an image of PNG, JPEG,"),
        (("animate", ".", PROMPT), "cannot read '.': it is not a regular file"),
        (("extend", "clip.mp4", "?!"), "prompt holds no word"),
        (("extend", "clip.mp4", PROMPT, "--seconds", 0), "seconds=0.0 at 8 frames per second is less than one frame"),
        (("generate", PROMPT, "--lora", "none.safetensors"), "there is no LoRA file 'none.safetensors'"),
        (("inpaint", "clip.mp4", PROMPT, "--box", "1,2,x"), "--box must be LEFT,TOP,RIGHT,BOTTOM in pixels"),
        (("edit", "clip.mp4", PROMPT, "--strength", 3), "strength must be a number from 0 to 1; got 3.0"),
        (("generate", PROMPT, "--long", "whole"), "long must be one of once, stream, pieces or None; got 'whole'"),
        (("generate", PROMPT, "--n", 2, "--pick", "worst"), "--pick must be all or best; got 'worst'"),
        (("generate", "an elephant", "--n", 2, "--pick", "best"), "clips can be judged for captions of the world only"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_no_file(sora, model, tmp_path, arguments, said):
    (tmp_path / "note.txt").write_text("a note")
    before = sorted(tmp_path.iterdir())
    code, _, err = sora(*arguments, *OPTIONS, "--out", "made.mp4")
    assert code == 1 and said in err and "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_several_clips_are_a_file_each_or_the_best_of_them(sora, model, tmp_path):
    code, out, _ = sora("generate", PROMPT, "--n", 3, *OPTIONS, "--out", "made.mp4")
    assert code == 0 and [f"made-{seed}.mp4" in out for seed in (3, 4, 5)] == [True] * 3
    assert not (tmp_path / "made.mp4").exists()
    clips = [model.generate(PROMPT, seed=seed, steps=2) for seed in (3, 4, 5)]
    code, out, _ = sora("generate", PROMPT, "--n", 3, "--pick", "best", *OPTIONS, "--out", "made.mp4")
    verdicts = [choose.judge(clip) for clip in clips]
    wanted = verdicts.index(max(verdicts)) + 3
    assert code == 0 and [f"seed {seed}: " in out for seed in (3, 4, 5)] == [True] * 3
    assert f"wrote made.mp4: seed {wanted}" in out
    made, *all_ = (
        np.stack(list(media.read_video(name))).astype(int)
        for name in ("made.mp4", "made-3.mp4", "made-4.mp4", "made-5.mp4")
    )
    apart = [np.abs(made - other).mean() for other in all_]
    assert apart.index(min(apart)) == wanted - 3 and min(apart) < 0.05 * made.std()


def test_the_clip_that_shows_what_is_said_is_chosen():
    """Beside one of another colour, one whose shape is another and one that goes out of sight."""
    truth = world.sample(3, scene="bounce", frames=17, prompt_spec={"style": "flat"})
    other = world.sample(4, scene="bounce", frames=17, prompt_spec={"style": "flat"})
    gone = truth.video.copy()
    gone[9:] = truth.video[0, 0, 0]
    clips = [Clip(video, 8.0, truth.caption, i, 1, 1.0) for i, video in enumerate((other.video, gone, truth.video))]
    chosen, verdicts = choose.best(clips)
    assert chosen is clips[2] and verdicts[2].truth == 1 and verdicts[2].steady == 1
    assert verdicts[2].rigidity > 0.95 and verdicts[2] > verdicts[1] > verdicts[0]
    with pytest.raises(ValueError, match="there is no clip to choose from"):
        choose.best([])
