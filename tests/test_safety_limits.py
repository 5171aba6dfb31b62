"""What one request may ask for and take: refused before anything is computed, whoever asks and by whichever way."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from sora_model import Sora, files, machine, media
from sora_model.machine import TooLargeError
from sora_model.media import MediaError
from sora_model.safety import limits
from sora_model.safety.limits import Limits, LimitsError

CLIP = np.zeros((5, 64, 64, 3), np.uint8)


@pytest.fixture(autouse=True)
def none_left():
    yield
    limits.use(None)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return Sora.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture
def idle(tiny, monkeypatch):
    """A model that computes nothing: what is refused has to be so beforehand."""

    def never(*args, **options):
        raise AssertionError("computed before the limits were looked at")

    for part in (tiny.dit, tiny.vae, tiny.text):
        monkeypatch.setattr(part, "forward", never)
    monkeypatch.setattr(tiny.text, "encode", never)
    monkeypatch.setattr(tiny.vae, "encode_stream", never)
    return tiny


@pytest.mark.parametrize(
    ("given", "call", "said"),
    [
        ({"characters": 9}, lambda s: s.generate("a red ball"), "prompt has 10 characters; at most 9"),
        ({"seconds": 1}, lambda s: s.generate("a ball", seconds=1.5), "seconds must lie between 0 and 1, got 1.5"),
        ({"side": 32}, lambda s: s.generate("a ball", size=(32, 64)), "the width must be .* from 16 to 32, got 64"),
        ({"steps": 4}, lambda s: s.generate("a ball", steps=5), "steps must lie between 1 and 4, got 5"),
        ({"memory": 1 << 18}, lambda s: s.generate("a ball", size=(64, 64)), "0 MiB are free or allowed; "),
        ({"seconds": 1}, lambda s: s.extend(CLIP, "a ball", seconds=2), "seconds must lie between 0 and 1, got 2"),
        ({"seconds": 1}, lambda s: s.loop(CLIP, "a ball", seconds=float("nan")), "seconds must lie .* got nan"),
        ({"seconds": 1}, lambda s: s.connect(CLIP, CLIP, "a ball", seconds=9), "seconds must lie .* got 9"),
    ],
    ids=["characters", "seconds", "side", "steps", "memory", "extend", "nan", "connect"],
)
def test_what_is_asked_for_is_limited_before_anything_is_computed(idle, given, call, said):
    limits.use(Limits(**given))
    with pytest.raises(ValueError, match=said):
        call(idle)


@pytest.mark.parametrize(
    "call",
    [
        lambda sora, clip: sora.edit(clip, "a ball"),
        lambda sora, clip: sora.inpaint(clip, "a ball", box=(0, 0, 16, 16)),
        lambda sora, clip: sora.extend(clip, "a ball"),
        lambda sora, clip: sora.connect(clip, clip, "a ball", seconds=900),
    ],
    ids=["edit", "inpaint", "extend", "connect"],
)
def test_a_clip_that_is_given_counts_too(idle, monkeypatch, call):
    """Of whatever length it is: what it is made into is held to the memory, not the clip of the defaults alone."""
    clip = np.broadcast_to(CLIP[:1], (3000, 64, 64, 3))
    monkeypatch.setattr(machine, "_free", lambda: 64 << 20)
    with pytest.raises(TooLargeError, match="frames needs about .* and 64 MiB are free"):
        call(idle, clip)


def test_time_ends_the_work_between_its_steps(tiny, monkeypatch):
    limits.use(Limits(time=100))
    now = [0.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    made = tiny.generate("a ball", steps=4, size=(16, 16), seconds=0.5)
    done = []

    def progress(stage, count, total):
        done.append((stage, count))
        now[0] += 60

    with pytest.raises(LimitsError, match="took more than the time=100 seconds .* fewer steps"):
        tiny.generate("a ball", steps=4, size=(16, 16), seconds=0.5, progress=progress)
    assert done == [("denoise", 1), ("denoise", 2)] and len(made.frames) == 4
    for call in (tiny.edit, tiny.extend):
        now[0], done[:] = 0, []
        with pytest.raises(LimitsError, match="took more than"):
            call(CLIP, "a ball", steps=4, size=(16, 16), progress=progress)
        assert len(done) == 2


def test_files_that_are_read_are_limited(tiny, tmp_path):
    video, image = tmp_path / "v.mp4", tmp_path / "i.png"
    media.write_video(video, CLIP)
    Image.fromarray(CLIP[0]).save(image)
    for given, path, said in (
        (Limits(read_bytes=100), video, r"has \d+ bytes, and the limits allow read_bytes=100"),
        (Limits(read_pixels=4000), video, "64x64, 4096 pixels; the limit is max_pixels=4000"),
        (Limits(read_frames=4), video, "holds 5 frames, the limit is max_frames=4"),
        (Limits(read_bytes=50), image, r"has \d+ bytes, and the limits allow read_bytes=50"),
        (Limits(read_pixels=4000), image, "is 64x64, and the limits allow read_pixels=4000"),
    ):
        limits.use(given)
        with pytest.raises(MediaError, match=said):
            tiny.edit(path, "a ball", size=(64, 64))
    limits.use(None)
    assert len(list(media.read_video(video))) == 5


def test_a_video_that_does_not_fit_the_memory_is_refused_as_it_is_read(tiny, tmp_path, monkeypatch):
    media.write_video(tmp_path / "v.mp4", (CLIP[0] for _ in range(300)))
    monkeypatch.setattr(machine, "_free", lambda: 4 << 20)
    from sora_model.verbs import _read

    with pytest.raises(TooLargeError, match="too long: its first 171 frames take half of the memory"):
        _read(tmp_path / "v.mp4", 8)


@pytest.mark.parametrize("name", ["bomb.png", "a.eps", "nul\0.png", "cut.png", "second.tiff", "pipe.png"])
def test_an_image_is_no_way_in(tiny, tmp_path, name, monkeypatch):
    path = tmp_path / name
    if name == "bomb.png":
        Image.new("1", (2000, 2000)).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)
    elif name == "a.eps":  # which Pillow would have another program read
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    elif name == "cut.png":
        Image.fromarray(CLIP[0]).save(path)
        path.write_bytes(path.read_bytes()[:60])
    elif name == "second.tiff":  # with a second image that has no size, for which Pillow raises TypeError
        Image.fromarray(CLIP[0]).save(path)
        data = bytearray(path.read_bytes())
        table = int.from_bytes(data[4:8], "little")
        end = table + 2 + 12 * int.from_bytes(data[table : table + 2], "little")
        data[end : end + 4] = len(data).to_bytes(4, "little")
        path.write_bytes(data + bytes(6))
    elif name == "pipe.png":  # for which it would wait
        os.mkfifo(path)
        monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("the pipe was opened"))
    with pytest.raises(MediaError, match="cannot be read as an image|not an MP4|there is no file|cannot read"):
        tiny.animate(path, "a ball")


def test_files_are_written_in_their_folder_alone(tiny, tmp_path, monkeypatch, sora):
    inside, outside = tmp_path / "in", tmp_path / "outside"
    inside.mkdir(), outside.mkdir()
    (inside / "link").symlink_to(outside)
    (inside / "file.mp4").symlink_to(outside / "target.mp4")
    (outside / "old.mp4").write_text("old")
    os.link(outside / "old.mp4", inside / "hard.mp4")
    limits.use(Limits(folder=inside))
    for path in (
        outside / "a.mp4", inside / "../outside/a.mp4", inside / "link/a.mp4", inside / "file.mp4", "a.mp4",
        tmp_path / "in2.mp4", outside / "old.mp4",
    ):  # fmt: skip
        with pytest.raises(files.WriteError, match="lies outside of .*/in', where alone the limits allow to write"):
            media.write_video(path, CLIP)
        with pytest.raises(files.WriteError, match="lies outside"):
            files.write_bytes(path, b"")
    with pytest.raises(files.WriteError, match="lies outside"), files.exclusive(outside / "run"):
        pass
    with pytest.raises(files.WriteError, match="lies outside"):
        tiny.save_pretrained(outside / "model")
    assert sorted(p.name for p in outside.iterdir()) == ["old.mp4"]
    media.write_video(inside / "hard.mp4", CLIP)  # renamed over, so that the other name keeps what it had
    assert (outside / "old.mp4").read_text() == "old" and len(list(media.read_video(inside / "hard.mp4"))) == 5
    code, _, err = sora("world", "render", "--out", outside / "new", "--n", 1)
    assert code == 1 and "lies outside of" in err and not (outside / "new").exists()


def test_a_file_of_limits_holds_for_commands(tmp_path, monkeypatch, sora):
    (tmp_path / "limits.yaml").write_text("clips: 2\nfolder: made\nsteps: 3\n")
    monkeypatch.setenv(limits.VARIABLE, str(tmp_path / "limits.yaml"))
    assert limits.current() == Limits(clips=2, folder=tmp_path / "made", steps=3)
    (tmp_path / "made").mkdir()
    code, _, err = sora("generate", "a ball", "--n", 3, "--steps", 1, "--out", "made/a.mp4")
    assert code == 1 and "--n must be a whole number from 1 to 2; got 3" in err
    code, _, err = sora("generate", "a ball", "--out", "a.mp4")
    assert code == 1 and "'a.mp4' lies outside of" in err and len(err.splitlines()) == 1
    assert list((tmp_path / "made").iterdir()) == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "must hold names and values"),
        ("pixels: 4", "unknown 'pixels'; known are characters, seconds, side"),
        ("steps: many", "steps must be a whole number from 1"),
        ("steps: 0", "got 0"),
        ("side: null", "side must be a whole number"),
        ("seconds: .nan", "seconds must be a number"),
        ("memory: -1", "memory must be"),
        ("folder: 7", "folder must be the path of a folder or None; got 7"),
        ("steps: [", "while parsing"),
        pytest.param("[" * 5000, "maximum recursion depth", id="deep"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_bad_limits_are_one_error_and_never_no_limits(tmp_path, monkeypatch, text, said):
    path = tmp_path / "l.yaml"
    path.write_text(text)
    monkeypatch.setenv(limits.VARIABLE, str(path))
    with pytest.raises(LimitsError) as error:
        files.check_writable(tmp_path / "a")
    assert said in str(error.value) and str(path) in str(error.value)
    path.unlink()
    with pytest.raises(LimitsError, match="No such file"):
        machine.available(__import__("torch").device("cpu"))
