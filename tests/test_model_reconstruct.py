"""Video files through the VAE: the frames that Python's own encode and decode give, in memory flat in the length."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from test_model_pipeline import make_wan_directory

from sora_model import machine, media, reconstruct, world
from sora_model.checkpoint import CheckpointError
from sora_model.frames import to_video
from sora_model.machine import TooLargeError
from sora_model.reconstruct import encode_file, load_vae


@pytest.fixture(scope="module")
def vae(tiny_checkpoint):
    return load_vae(tiny_checkpoint, device="cpu")


def file_of(folder, frames, size=(16, 24), name="clip.mp4"):
    video = np.random.default_rng(0).integers(0, 255, (frames, *(n // 8 for n in size), 3), dtype=np.uint8)
    return media.write_video(folder / name, video.repeat(8, 1).repeat(8, 2), fps=10)


def video_of(path):
    return np.stack(list(media.read_video(path)))


def test_only_the_vae_of_a_checkpoint_is_read(tiny_checkpoint, tmp_path):
    folder = make_wan_directory(tmp_path / "Wan-tiny")
    for part in ("transformer", "text_encoder"):
        (folder / part).rename(tmp_path / part)
    for source, dim in ((folder, 4), (tiny_checkpoint, 4), ("toy", 16)):
        loaded = load_vae(source, device="cpu")
        assert loaded.config.base_dim == dim
        assert not any(p.requires_grad or p.dtype != torch.float32 for p in loaded.parameters())
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        load_vae(tmp_path / "none")
    (folder / "model_index.json").write_text('{"_class_name": "LTXPipeline"}')
    with pytest.raises(CheckpointError, match="'LTXPipeline'; supported are"):
        load_vae(folder)


def test_a_file_is_encoded_as_its_frames_are(vae, tmp_path):
    path = file_of(tmp_path, 9)
    mean, _ = vae.encode(to_video(video_of(path)[None]))
    pieces = list(encode_file(vae, path))
    assert [m.shape[2] for m in pieces] == [1, 1, 1] and not pieces[0].requires_grad
    torch.testing.assert_close(torch.cat(pieces, 2), mean, atol=1e-5, rtol=0)
    assert [m.shape[2] for m in encode_file(vae, path, chunk=2)] == [2, 1]


def test_extra_frames_are_refused_padded_or_trimmed(vae, tmp_path):
    path = file_of(tmp_path, 7)
    video = to_video(video_of(path)[None])
    with pytest.raises(ValueError, match=r"clip.mp4'.*4n\+1 frames; got 7; 5 or 9 would fit; extra='pad' or 'trim'"):
        encode_file(vae, path)
    padded = torch.cat([video, video[:, :, -1:].expand(-1, -1, 2, -1, -1)], 2)
    for extra, expected in (("pad", padded), ("trim", video[:, :, :5])):
        mean = torch.cat(list(encode_file(vae, path, extra=extra)), 2)
        torch.testing.assert_close(mean, vae.encode(expected)[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="extra must be one of refuse, pad, trim; got 'crop'"):
        encode_file(vae, path, extra="crop")


def test_a_count_that_only_the_stream_tells_is_refused_at_its_end(vae, tmp_path, monkeypatch):
    path = file_of(tmp_path, 7)
    probe = media.probe
    monkeypatch.setattr(media, "probe", lambda p: reconstruct.media.VideoInfo(**{**vars(probe(p)), "frames": None}))
    means = encode_file(vae, path)
    assert [next(means).shape[2] for _ in range(2)] == [1, 1]
    with pytest.raises(ValueError, match="got 7; 5 or 9 would fit"):
        next(means)


@pytest.mark.parametrize("frames", [1, 6, 9])
def test_a_reconstruction_is_encode_then_decode_of_as_many_frames(vae, tmp_path, frames):
    source, told, written = file_of(tmp_path, frames), [], []
    write = media.write_video

    def spy(path, images, fps, **options):
        return write(path, (written.append(image) or image for image in images), fps, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media, "write_video", spy)
        result = reconstruct.reconstruct(vae, source, tmp_path / "out.mp4", progress=lambda *event: told.append(event))
    video = video_of(source)
    padding = -(frames - 1) % 4
    padded = np.concatenate([video, video[-1:].repeat(padding, 0)])
    with torch.no_grad():
        back = vae.decode(vae.encode(to_video(padded[None]))[0])[0].movedim(0, -1)[:frames]
    expected = back.add(1).mul(127.5).round().to(torch.uint8).numpy()
    assert np.abs(np.stack(written).astype(int) - expected).max() <= 1
    error = np.square(np.stack(written).astype(float) - video).mean()
    assert result.psnr == pytest.approx(10 * math.log10(255**2 / error))
    assert result.frames == frames and told[0] == (0, frames) and told[-1] == (frames, frames)
    info = media.probe(tmp_path / "out.mp4")
    assert (info.frames, info.fps, info.width, info.height) == (frames, 10, 24, 16)


def test_a_vae_that_gives_nan_is_an_error_not_a_black_clip(tiny_checkpoint, tmp_path):
    path, vae = file_of(tmp_path, 5), load_vae(tiny_checkpoint, device="cpu")
    vae.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="VAE gives NaN or infinite pixels"):
        reconstruct.reconstruct(vae, path, tmp_path / "out.mp4")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_no_more_than_a_few_frames_live_at_once(vae, tmp_path, monkeypatch):
    """Of the frames read, those of two chunks; of the chunks written, two and the first, which the writer keeps."""
    source, write, read = file_of(tmp_path, 41), media.write_video, media.read_video
    alive: dict[str, list[weakref.ref]] = {"read": [], "written": []}
    most = dict.fromkeys(alive, 0)

    def watched(name, frames):
        for item in frames:
            frame = item[1] if name == "read" else item
            alive[name].append(weakref.ref(frame if frame.base is None else frame.base))
            most[name] = max(most[name], len({id(ref()) for ref in alive[name] if ref() is not None}))
            yield item

    monkeypatch.setattr(media, "read_video", lambda path, **options: watched("read", read(path, **options)))
    monkeypatch.setattr(
        media, "write_video", lambda path, frames, *a, **options: write(path, watched("written", frames), *a, **options)
    )
    reconstruct.reconstruct(vae, source, tmp_path / "out.mp4")
    assert len(alive["read"]) == len(alive["written"]) == 41
    assert most["read"] <= 9 and most["written"] <= 3


def test_frames_too_large_for_the_memory_are_coded_in_tiles_or_refused(vae, tmp_path, monkeypatch):
    source = file_of(tmp_path, 5, size=(128, 256))
    whole = reconstruct.reconstruct(vae, source, tmp_path / "whole.mp4")
    asked = []
    for kind in ("encode_stream", "decode_stream"):
        stream = getattr(vae, kind)
        monkeypatch.setattr(
            vae, kind, lambda *a, tile, stream=stream, **k: asked.append(tile) or stream(*a, tile=tile, **k)
        )
    most, least = (sum(vae.fit_tile(k, 128, 256, budget)[1] for k in ("encode", "decode")) for budget in (1 << 40, 0))
    assert least < most
    monkeypatch.setattr(machine, "available", lambda device: (least + most) // 2)
    tiled = reconstruct.reconstruct(vae, source, tmp_path / "tiled.mp4")
    assert set(asked) - {(128, 256)} and tiled.psnr == pytest.approx(whole.psnr, abs=1e-3)
    monkeypatch.setattr(machine, "available", lambda device: least // 3)
    with pytest.raises(TooLargeError, match=r"clip.mp4' is 256x128.* are free; 64x32 would fit; scale the video down"):
        reconstruct.reconstruct(vae, source, tmp_path / "none.mp4")
    assert not (tmp_path / "none.mp4").exists()


def test_the_command_says_what_is_lost_and_what_does_not_fit(sora, tiny_checkpoint, tmp_path):  # noqa: F811
    file_of(tmp_path, 6)
    weights = ("--weights", tiny_checkpoint, "--device", "cpu")
    code, out, err = sora("reconstruct", "clip.mp4", "--out", "back.mp4", *weights)
    assert code == 0 and "wrote back.mp4: 6 frames, PSNR " in out and out.strip().endswith("dB"), err
    assert sora("reconstruct", "clip.mp4", *weights)[0] == 0
    assert media.probe(tmp_path / "out" / "reconstruction.mp4").frames == 6
    before = sorted(tmp_path.iterdir())
    whole = (tmp_path / "clip.mp4").read_bytes()
    damaged = tmp_path.parent / "damaged.mp4"
    damaged.write_bytes(whole[: len(whole) // 2])
    odd = media.write_video(tmp_path.parent / "odd.mp4", world.sample(0, frames=5, size=(60, 64)).video)
    for source, to, said in (
        (damaged, "a.mp4", "damaged.mp4"),
        ("none.mp4", "a.mp4", "No such file"),
        (odd, "a.mp4", "is 64x60: the height of a video must be a multiple of 8; got 60; 56 or 64 would fit"),
        ("clip.mp4", "a.avi", "must end in .mp4"),
        ("clip.mp4", "none/a.mp4", "no folder 'none'"),
    ):
        code, out, err = sora("reconstruct", source, "--out", to, *weights)
        lines = [line for line in err.splitlines() if line.startswith("error:")]
        assert code == 1 and not out and len(lines) == 1 and said in lines[0], err
    assert sora("reconstruct", "clip.mp4", "--out", "a.mp4", *weights, "--impl", "warp")[0] == 1
    assert sorted(tmp_path.iterdir()) == before
