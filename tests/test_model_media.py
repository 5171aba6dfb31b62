"""Video files: what is written is read back, nothing half-written stays, and no file or name gets past the guards."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import weakref

import av
import numpy as np
import pytest

from sora_model import world
from sora_model.files import WriteError
from sora_model.media import MediaError, probe, read_video, write_video


def _clip(frames: int = 5, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    return world.sample(4, frames=frames, size=size).video


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def _through_420(video: np.ndarray) -> np.ndarray:
    """The clip after conversion to 4:2:0 and back, without a codec: the best that any H.264 file of it can hold."""
    from av.video.reformatter import ColorRange, Colorspace

    def once(image):
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        return frame.reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        ).to_ndarray(format="rgb24")

    return np.stack([once(image) for image in video])


@pytest.fixture
def clip_file(tmp_path):
    return write_video(tmp_path / "clip.mp4", _clip(), fps=8)


def test_round_trip_loses_little_more_than_chroma_subsampling(tmp_path):
    video = _clip(17)
    path = write_video(tmp_path / "clip.mp4", iter(video), fps=8)
    back = np.stack(list(read_video(path)))
    assert back.shape == video.shape and back.dtype == np.uint8
    assert _psnr(back, video) > _psnr(_through_420(video), video) - 1
    info = probe(path)
    assert (info.width, info.height, info.frames, info.fps, info.codec) == (64, 64, 17, 8.0, "h264")
    assert info.duration == pytest.approx(17 / 8)


@pytest.mark.parametrize("size", [(63, 65), (64, 33), (9, 64), (1, 1), (1, 7)])
def test_odd_sizes_come_back_as_they_went(tmp_path, size):
    video = np.full((3, *size, 3), (190, 60, 30), np.uint8)
    video[:, size[0] // 2 :] = (200, 70, 40)
    path = write_video(tmp_path / "clip.mp4", video)
    back = np.stack(list(read_video(path)))
    assert back.shape == video.shape and np.abs(back.astype(int) - video).max() <= 14
    assert (probe(path).height, probe(path).width) == size
    with av.open(str(path)) as container:
        stored = container.streams.video[0].codec_context
        assert (stored.height, stored.width) == tuple(n + n % 2 for n in size) and stored.pix_fmt == "yuv420p"


def test_colours_are_tagged_and_kept(tmp_path):
    colours = np.array(list(world.COLOURS.values()), np.uint8)
    path = write_video(tmp_path / "clip.mp4", np.broadcast_to(colours[:, None, None], (8, 32, 32, 3)))
    back = np.stack(list(read_video(path)))
    assert np.abs(back[:, 16, 16].astype(int) - colours).max() <= 4
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)


@pytest.mark.parametrize(("fps", "kept"), [(24, 24), (23.976, 23.976), (30000 / 1001, 30000 / 1001), (0.5, 0.5)])
def test_frame_rates(tmp_path, fps, kept):
    assert probe(write_video(tmp_path / "clip.mp4", _clip(), fps=fps)).fps == pytest.approx(kept, rel=1e-9)


def test_a_player_finds_the_index_before_the_frames(tmp_path):
    data = write_video(tmp_path / "clip.mp4", _clip(9)).read_bytes()
    assert b"ftyp" in data[:12] and data.index(b"moov") < data.index(b"mdat")


def test_same_frames_decode_to_the_same_frames(tmp_path):
    one, two = (list(read_video(write_video(tmp_path / f"{name}.mp4", _clip(9)))) for name in "ab")
    assert len(one) == 9 and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_frames_are_streamed_both_ways(tmp_path):
    alive, most = set(), 0

    def frames():
        nonlocal most
        for i in range(60):
            image = np.full((32, 32, 3), i, np.uint8)
            alive.add(i)
            weakref.finalize(image, alive.discard, i)
            most = max(most, len(alive))
            yield image
            del image

    path = write_video(tmp_path / "clip.mp4", frames())
    assert most <= 3
    source = read_video(path)
    first = next(source)
    assert first.shape == (32, 32, 3)
    source.close()
    count = sum(1 for _ in read_video(path))
    assert count == 60


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit, MemoryError])
def test_nothing_half_written_stays(tmp_path, clip_file, error):
    before = clip_file.read_bytes()

    def frames():
        yield from _clip(12)
        raise error("stop")

    for target in (clip_file, tmp_path / "new.mp4"):
        with pytest.raises(error, match="stop"):
            write_video(target, frames())
    assert os.listdir(tmp_path) == ["clip.mp4"] and clip_file.read_bytes() == before


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    code = (
        "import resource, sys, numpy as np\n"
        "from sora_model.media import MediaError, write_video\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "noise = np.random.default_rng(0).integers(0, 256, (100, 64, 64, 3), dtype=np.uint8)\n"
        "try:\n    write_video(sys.argv[1], noise)\n"
        "except MediaError as e:\n    print('refused', e)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.mp4")], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("refused") and "x.mp4" in run.stdout, run
    assert os.listdir(tmp_path) == []


def test_writing_prints_nothing(tmp_path, capfd):
    write_video(tmp_path / "clip.mp4", _clip())
    list(read_video(tmp_path / "clip.mp4"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("frames", "error", "match"),
    [
        ([], MediaError, "no frames"),
        (np.zeros((2, 8, 8, 3)), TypeError, "frame 0 must be uint8, got float64"),
        (np.zeros((2, 8, 8), np.uint8), ValueError, r"frame 0 must be \[H,W,3\]"),
        (np.zeros((2, 8, 8, 4), np.uint8), ValueError, r"frame 0 must be \[H,W,3\]"),
        ([np.zeros((0, 8, 3), np.uint8)], ValueError, "frame 0"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 10, 3), np.uint8)], ValueError, "frame 1 is 10x8"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), bool)], TypeError, "frame 1"),
        (5, TypeError, "int"),
    ],
)
def test_bad_frames_are_named(tmp_path, frames, error, match):
    with pytest.raises(error, match=match):
        write_video(tmp_path / "x.mp4", frames)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [{"fps": 0}, {"fps": float("nan")}, {"fps": "8"}, {"crf": 99}, {"crf": 18.5}])
def test_bad_options_are_named(tmp_path, options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        write_video(tmp_path / "x.mp4", _clip(), **options)
    assert os.listdir(tmp_path) == []


def _never():
    raise AssertionError("a frame was asked for before the path was tried")
    yield


@pytest.mark.parametrize("name", ["clip.avi", "clip", "no/such/folder.mp4", "folder.mp4", "a\0.mp4", "file/x.mp4"])
def test_unwritable_paths_fail_before_the_first_frame(tmp_path, name):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises((MediaError, WriteError, ValueError), match="cannot write"):
        write_video(f"{tmp_path}/{name}", _never())
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.mp4"]


def test_names_that_look_like_protocols_are_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b.mp4", "file:x.mp4", "-rf.mp4", "http:x.mp4"):
        write_video(name, _clip(2))
        assert len(list(read_video(name))) == 2
    assert sorted(os.listdir()) == ["-rf.mp4", "concat:a|b.mp4", "file:x.mp4", "http:x.mp4"]


def test_only_local_regular_files_are_read(tmp_path, clip_file):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    (tmp_path / "hls.mp4").write_text("#EXTM3U\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n")
    (tmp_path / "empty.mp4").touch()
    names = [f"concat:{clip_file}", f"file:{clip_file}", "http://localhost/clip.mp4", "pipe:0", "/dev/zero", ""]
    names += [f"{clip_file}\0.txt", tmp_path, *(tmp_path / f"{n}.mp4" for n in ("pipe", "list", "hls", "empty", "no"))]
    for name in names:
        for reader in (read_video, probe):
            with pytest.raises(MediaError, match="cannot read"):
                reader(name)
    with pytest.raises(TypeError, match="path"):
        read_video(3)


def test_a_truncated_file_is_refused(tmp_path, clip_file):
    whole = clip_file.read_bytes()
    cut = tmp_path / "cut.mp4"
    for length in (1, 7, 40, 300, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(MediaError, match="cut.mp4"):
            list(read_video(cut))


def test_damage_gives_frames_or_a_media_error_and_nothing_else(tmp_path, clip_file):
    whole = np.frombuffer(clip_file.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    hurt, refused = tmp_path / "hurt.mp4", 0
    for _ in range(150):
        data = whole.copy()
        at = rng.integers(0, len(data), rng.integers(1, 12))
        data[at] = rng.integers(0, 256, len(at))
        hurt.write_bytes(data.tobytes())
        try:
            for image in itertools.islice(read_video(hurt, max_pixels=1 << 16, max_frames=64), 64):
                assert image.dtype == np.uint8 and image.ndim == 3
        except MediaError:
            refused += 1
    assert 20 < refused < 150


def test_limits_are_refusals(tmp_path, clip_file):
    with pytest.raises(MediaError, match="64x64, 4096 pixels; the limit is max_pixels=4095"):
        read_video(clip_file, max_pixels=4095)
    with pytest.raises(MediaError, match="5 frames, the limit is max_frames=4"):
        read_video(clip_file, max_frames=4)
    assert len(list(read_video(clip_file, max_pixels=4096, max_frames=5))) == 5
    for limit in ({"max_pixels": 0}, {"max_frames": -1}, {"max_frames": 2.5}):
        with pytest.raises(ValueError, match=next(iter(limit))):
            read_video(clip_file, **limit)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    path = write_video(tmp_path / "bomb.mp4", np.zeros((2, 2048, 2048, 3), np.uint8))
    assert path.stat().st_size < 20_000
    with pytest.raises(MediaError, match="2048x2048"):
        read_video(path, max_pixels=1 << 20)


@pytest.mark.parametrize(("side", "reason"), [(1024, "larger than max_pixels"), (128, "frame 90 is 128x128")])
def test_a_stream_that_grows_behind_its_header_is_refused(tmp_path, side, reason):
    """Frames of 64 x 64 as announced, more than are looked at on opening, then the packets of a larger stream."""
    path = tmp_path / "grows.avi"
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("libx264", rate=8, options={"bf": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for image in _clip(90):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
        other = av.CodecContext.create("libx264", "w")
        other.width = other.height = side
        other.pix_fmt, other.time_base, other.options = "yuv420p", stream.time_base, {"bf": "0"}
        frame = av.VideoFrame.from_ndarray(np.full((side, side, 3), 90, np.uint8), format="rgb24")
        for packet in [*other.encode(frame.reformat(format="yuv420p")), *other.encode()]:
            packet.pts = packet.dts = 90
            packet.stream = stream
            container.mux(packet)
    with pytest.raises(MediaError, match=reason):
        for image in read_video(path, max_pixels=1 << 18):
            assert image.shape == (64, 64, 3)


def test_a_file_without_a_header_count_stops_at_max_frames(tmp_path):
    path = tmp_path / "live.mkv"
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for image in _clip(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    assert probe(path).frames is None and len(list(read_video(path))) == 12
    with pytest.raises(MediaError, match="more than max_frames=7"):
        list(read_video(path, max_frames=7))


def test_an_audio_file_is_not_a_video(tmp_path):
    path = tmp_path / "tone.mp4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="no video stream"):
        read_video(path)


def test_reading_closes_the_file(clip_file):
    def handles() -> int:
        gc.collect()
        return sum(os.path.realpath(f"/proc/self/fd/{n}") == str(clip_file) for n in os.listdir("/proc/self/fd"))

    list(read_video(clip_file))
    source = read_video(clip_file)
    next(source)
    source.close()
    del source
    read_video(clip_file)
    probe(clip_file)
    with pytest.raises(MediaError):
        read_video(clip_file, max_frames=1)
    assert handles() == 0
