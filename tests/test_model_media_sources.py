"""Video files as phones, recorders and editors make them: turned, unevenly timed, with other streams, cut, damaged."""

from __future__ import annotations

import collections
import functools
from fractions import Fraction

import av
import numpy as np
import pytest

from sora_model import reader, reconstruct
from sora_model.media import MediaError, probe, read_video, write_video

CODECS = {"mp4": "libx264", "mov": "libx264", "matroska": "libx264", "webm": "libvpx-vp9", "avi": "libx264"}


def picture(index: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """Another corner in each colour, so that every turn and mirror shows; the middle grows brighter."""
    image = np.full((*size, 3), 40 + index * 4, np.uint8)
    image[:8, :8], image[:8, -8:], image[-8:, :8] = (200, 30, 30), (30, 200, 30), (30, 30, 200)
    return image


def fill(container, stream, count: int, times=None, size: tuple[int, int] = (32, 48), rate: int = 8) -> None:
    if not stream.codec_context.is_open:
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
    if times:
        stream.codec_context.time_base = Fraction(1, 1000)
    for index in range(count):
        frame = av.VideoFrame.from_ndarray(picture(index, size), format="rgb24").reformat(format="yuv420p")
        frame.pts, frame.time_base = (times[index], Fraction(1, 1000)) if times else (index, Fraction(1, rate))
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def make(path, kind: str = "mp4", count: int = 12, *, turn=None, aspect=None, times=None, options=None, **muxer):
    with av.open(str(path), "w", format=kind, options=muxer) as container:
        stream = container.add_stream(CODECS[kind], rate=8, options=options or {})
        if turn:
            stream.set_display_rotation(*turn)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        fill(container, stream, count, times)
    return path


TURNS = [(angle, *flip) for angle in (0, 90, 180, 270) for flip in ((False, False), (True, False), (False, True))][1:]


@pytest.mark.parametrize("turn", TURNS, ids=str)
@pytest.mark.parametrize("kind", ["mp4", "mov"])
def test_a_turned_or_mirrored_clip_comes_upright(tmp_path, kind, turn):
    angle, across, down = turn
    path = make(tmp_path / "phone", kind, 3, turn=turn)
    expected = np.rot90(picture(0), angle // 90)  # counterclockwise, as the display matrix counts
    expected = expected[:: -1 if down else 1, :: -1 if across else 1]
    back = list(read_video(path))
    assert [image.shape for image in back] == [expected.shape] * 3
    assert np.abs(back[0].astype(int) - expected).mean() < 6 < np.abs(back[0][::-1].astype(int) - expected).mean()
    assert (probe(path).height, probe(path).width) == expected.shape[:2]


def test_a_turned_matroska_comes_upright(tmp_path):
    back = next(read_video(make(tmp_path / "phone.mkv", "matroska", 2, turn=(90,))))
    assert np.abs(back.astype(int) - np.rot90(picture(0))).mean() < 6


def test_a_turn_that_is_no_quarter_is_refused(tmp_path):
    for reads in (read_video, probe):
        with pytest.raises(MediaError, match="turned by (29|30) degrees, and only quarter turns can be"):
            reads(make(tmp_path / "tilted.mp4", turn=(30,)))


def test_the_shape_of_pixels_is_told_turned_and_written(tmp_path, vae):
    path = make(tmp_path / "dv.mp4", aspect=Fraction(16, 11))
    assert probe(path).pixel_aspect == Fraction(16, 11) and (probe(path).width, probe(path).height) == (48, 32)
    reconstruct.reconstruct(vae, path, tmp_path / "out.mp4")
    assert probe(tmp_path / "out.mp4").pixel_aspect == Fraction(16, 11)
    assert probe(make(tmp_path / "tall.mp4", turn=(90,), aspect=Fraction(16, 11))).pixel_aspect == Fraction(11, 16)
    for wrong in (0, float("nan"), -1, "1", True):
        with pytest.raises((TypeError, ValueError), match="pixel_aspect must"):
            write_video(tmp_path / "x.mp4", [picture(0)], pixel_aspect=wrong)


UNEVEN = [0, 40, 80, 200, 240, 500, 540, 580, 1000, 1040, 1080, 1120]


@pytest.mark.parametrize("kind", ["mp4", "mov", "matroska"])
def test_times_that_vary_are_kept(tmp_path, kind, vae):
    path = make(tmp_path / "vfr", kind, times=UNEVEN)
    times = [float(time) for time, _ in read_video(path, times=True)]
    assert times == pytest.approx([t / 1000 for t in UNEVEN], abs=1e-3)
    assert len(list(read_video(path))) == 12
    reconstruct.reconstruct(vae, path, tmp_path / "out.mp4")
    assert [float(t) for t, _ in read_video(tmp_path / "out.mp4", times=True)] == pytest.approx(times, abs=1e-4)


@pytest.mark.parametrize("kind", CODECS)
def test_even_times_are_exactly_even(tmp_path, kind):
    """Whole milliseconds in Matroska; in an AVI none but the order of decoding, which is not that of pictures."""
    path = make(tmp_path / "even", kind)
    assert [time for time, _ in read_video(path, times=True)] == [Fraction(i, 8) for i in range(12)]


def test_bad_times_are_named_and_leave_nothing(tmp_path):
    for times, said in (
        ([0, 0.1, 0.1], "must increase, but frame 2"),
        ([0, 1], "holds 2 times"),
        ([0, float("nan"), 2], "that of frame 1 must be seconds"),
        ([-1, 0, 1], "that of frame 0"),
    ):
        with pytest.raises(ValueError, match=said):
            write_video(tmp_path / "x.mp4", [picture(i) for i in range(3)], times=times)
    assert not list(tmp_path.iterdir())


def test_frames_that_an_avi_dropped_leave_a_gap(tmp_path):
    with av.open(str(make(tmp_path / "whole.avi", "avi", options={"bf": "0", "g": "1"}))) as source:
        with av.open(str(tmp_path / "dropped.avi"), "w", format="avi") as container:
            stream = container.add_stream_from_template(source.streams.video[0])
            for index, packet in enumerate(source.demux(video=0)):
                if packet.size and index not in (3, 4, 7, 11):
                    packet.stream = stream
                    container.mux(packet)
    data = bytearray((tmp_path / "dropped.avi").read_bytes())
    at = data.index(b"strh") + 8 + 32  # the frames that the header counts: the last one too, which was dropped
    assert data[at : at + 4] == (11).to_bytes(4, "little")
    data[at : at + 4] = (12).to_bytes(4, "little")
    (tmp_path / "dropped.avi").write_bytes(data)
    times = [8 * time for time, _ in read_video(tmp_path / "dropped.avi", times=True)]
    assert times == [0, 1, 2, 5, 6, 8, 9, 10]


def sound(container):
    stream = container.add_stream("aac", rate=8000, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 8000, 0
    return stream, lambda: container.mux([*stream.encode(frame), *stream.encode()])


def with_cover(path, kind="mp4", video=True):
    """Sound, a cover picture before the video, two videos of which the second is the default."""
    with av.open(str(path), "w", format=kind) as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        _, play = sound(container)
        videos = [container.add_stream("ffv1", rate=8) for _ in range(2 * video)]
        if video:
            videos[1].disposition = av.stream.Disposition.default
            videos[0].disposition = av.stream.Disposition(0)
        black = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        black = black.reformat(format="yuvj420p")
        black.pts = 0
        for size, stream in zip(((16, 16), (32, 48)), videos, strict=False):
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        container.mux([*cover.encode(black), *cover.encode()])
        play()
        for size, stream in zip(((16, 16), (32, 48)), videos, strict=False):
            fill(container, stream, 5, size=size)
    return path


def test_the_video_is_read_and_neither_a_cover_nor_another_stream(tmp_path, vae, sora, tiny_checkpoint):  # noqa: F811
    path = with_cover(tmp_path / "clip.mp4")
    assert [image.shape for image in read_video(path)] == [(32, 48, 3)] * 5
    info = probe(path)
    assert (info.width, info.height, info.frames) == (48, 32, 5)
    assert sorted(info.left_out) == ["1 audio stream", "1 cover picture", "1 video stream"]
    assert reconstruct.reconstruct(vae, path, tmp_path / "out.mp4").left_out == info.left_out
    assert probe(tmp_path / "out.mp4").left_out == ()
    code, _, err = sora("reconstruct", path, "--weights", tiny_checkpoint, "--device", "cpu")
    assert code == 0 and "note: not in it: 1 audio stream, 1 video stream, 1 cover picture" in err
    with pytest.raises(MediaError, match="only a cover picture"):
        read_video(with_cover(tmp_path / "song.mp4", video=False))


@pytest.mark.parametrize("kind", ["mp4", "mov"])
def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path, kind, vae):
    whole = make(tmp_path / "whole", kind, 24, options={"bf": "2", "g": "12"})
    with av.open(str(whole)) as source, av.open(str(tmp_path / "edit"), "w", format=kind) as container:
        from_ = source.streams.video[0]
        stream = container.add_stream_from_template(from_)
        for packet in source.demux(from_):
            if packet.size:
                late = round(5 / 8 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - late, packet.dts - late, stream
                container.mux(packet)
    with av.open(str(tmp_path / "edit")) as container:
        assert container.streams.video[0].frames == 24
    assert probe(tmp_path / "edit").frames == 19 == len(list(read_video(tmp_path / "edit")))
    assert np.abs(next(read_video(tmp_path / "edit")).astype(int) - picture(5)).mean() < 6
    assert reconstruct.reconstruct(vae, tmp_path / "edit", tmp_path / "out.mp4").frames == 19


def test_every_stream_is_under_the_limit_of_pixels(tmp_path):
    """What FFmpeg decodes on opening, to learn what the streams hold: of the 20th, too, nothing larger than allowed."""
    with av.open(str(tmp_path / "many.avi"), "w", format="avi") as container:
        streams = [container.add_stream("ffv1", rate=8) for _ in range(20)]
        for index, stream in enumerate(streams):
            stream.height = stream.width = 512 if index == 19 else 32
            stream.pix_fmt = "yuv420p"
        for stream in streams:
            fill(container, stream, 1, size=(stream.height, stream.width))
    for limit, known in ((1 << 20, True), (1 << 12, False)):
        _, container, _ = reader._open(tmp_path / "many.avi", limit)
        with container:
            assert [s.codec_context.pix_fmt is not None for s in container.streams.video] == [True] * 19 + [known]


class Stream(collections.abc.Callable):
    """A file that cannot be gone back in, as a pipe is: sizes and counts stay unknown."""

    def __init__(self, path):
        self.file = open(path, "wb")
        self.write, self.close = self.file.write, self.file.close

    def __call__(self): ...

    def seekable(self):
        return False


def streamed(path, kind, **muxer):
    target = Stream(path)
    with av.open(target, "w", format=kind, options=muxer) as container:
        fill(container, container.add_stream(CODECS[kind], rate=8), 24)
    target.close()
    return path


def reordered(path, kind, codec, options, first=0):
    """24 frames, of which the packets before `first` are lost, as when a recording is cut without coding it anew."""
    with av.open(str(path) + ".whole", "w", format=kind) as container:
        fill(container, container.add_stream(codec, rate=8, options=options), 24)
    with av.open(str(path) + ".whole") as source, av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(source.demux(video=0)):
            if packet.size and index >= first:
                packet.stream = stream
                container.mux(packet)
    return path


OPEN = {"x264-params": "open-gop=1:keyint=6:min-keyint=6:bframes=2:b-adapt=0"}
VALID = {
    "fragments": (24, functools.partial(streamed, kind="mp4", movflags="frag_keyframe+empty_moov")),
    "fragments after samples": (24, functools.partial(make, count=24, options={"g": "6"}, movflags="frag_keyframe")),
    "a live recording": (24, functools.partial(streamed, kind="matroska", live="1")),
    "a piped webm": (24, functools.partial(streamed, kind="webm")),
    "a piped avi": (24, functools.partial(streamed, kind="avi")),
    "hidden references": (24, functools.partial(reordered, kind="webm", codec="libvpx", options={
        "auto-alt-ref": "1", "lag-in-frames": "8"})),
    "two fields a picture": (24, functools.partial(reordered, kind="matroska", codec="libx264", options={
        "flags": "+ildct+ilme", "x264-params": "interlaced=1"})),
    "a cut at a key frame": (18, functools.partial(
        reordered, kind="matroska", codec="libx264", options={"g": "6", "bf": "0"}, first=6)),
    "a cut before a key frame": (12, functools.partial(
        reordered, kind="mp4", codec="libx264", options={"g": "6", "bf": "0"}, first=8)),
    "a cut in an open group": (None, functools.partial(
        reordered, kind="matroska", codec="libx264", options=OPEN, first=8)),
}  # fmt: skip


@pytest.mark.parametrize("case", VALID)
def test_what_is_whole_is_not_called_cut(tmp_path, case):
    count, build = VALID[case]
    path = build(tmp_path / "valid")
    read = len(list(read_video(path)))
    assert read == count if count else 8 <= read <= 16
    assert probe(path).frames in (None, 24 if count == 24 else probe(path).frames)


def mutants(data: bytes, seed: int, cuts: int, flips: int):
    """(what was done, the bytes): cut at many places, or one to three bytes changed."""
    rng = np.random.default_rng(seed)
    for length in rng.integers(1, len(data), cuts):
        yield "cut", data[:length]
    whole = np.frombuffer(data, np.uint8)
    for _ in range(flips):
        changed, at = whole.copy(), rng.integers(0, len(data), rng.integers(1, 4))
        changed[at] = rng.integers(0, 256, len(at))
        yield "flip", changed.tobytes()


def outcomes(path, count: int, seed: int, cuts: int, flips: int) -> collections.Counter:
    found = collections.Counter()
    for what, data in mutants(path.read_bytes(), seed, cuts, flips):
        hurt = path.with_name("hurt")
        hurt.write_bytes(data)
        try:
            read = sum(1 for _ in read_video(hurt, max_pixels=1 << 16, max_frames=64))
            found[what, "whole" if read == count else "fewer" if read < count else "more"] += 1
        except MediaError as error:
            assert "cannot read" in str(error) or "max_" in str(error)
            found[what, "refused"] += 1
    return found


FRAGMENTS = {"movflags": "frag_keyframe+empty_moov", "options": {"g": "6"}}


@pytest.mark.parametrize("kind", CODECS)
def test_a_file_that_is_cut_or_damaged_comes_whole_or_not_at_all(tmp_path, kind):
    """A cut one never counts as whole for less. Of the bytes that can be changed a few make another valid file: the
    rate of a movie's edit list in an MP4, one bit of a VP8 frame."""
    path = make(tmp_path / "clip", kind)
    found = outcomes(path, 12, seed=1, cuts=60, flips=60)
    assert not any(found[what, result] for what in ("cut", "flip") for result in ("fewer", "more")), found
    assert found["cut", "refused"] >= 50 and found["flip", "refused"] and found["flip", "whole"], found


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*CODECS, "fragments"])
def test_many_files_that_are_cut_or_damaged(tmp_path, kind):
    path = make(tmp_path / "clip", **(FRAGMENTS if kind == "fragments" else {"kind": kind}))
    found = outcomes(path, 12, seed=2, cuts=1000, flips=1500)
    assert found["flip", "fewer"] + found["flip", "more"] <= (0.015 if kind == "fragments" else 0.005) * 1500, found
    if kind != "fragments":  # a recording that ends between two fragments is a whole one, only shorter
        assert not found["cut", "fewer"] + found["cut", "more"], found


def test_nothing_is_written_of_a_damaged_file(tmp_path, vae):
    data = bytearray(make(tmp_path / "clip.mkv", "matroska").read_bytes())
    del data[-300:]
    (tmp_path / "clip.mkv").write_bytes(data)
    with pytest.raises(MediaError, match="clip.mkv': it is cut short"):
        reconstruct.reconstruct(vae, tmp_path / "clip.mkv", tmp_path / "out.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mkv"]


@pytest.fixture(scope="module")
def vae(tiny_checkpoint):
    return reconstruct.load_vae(tiny_checkpoint, device="cpu")
