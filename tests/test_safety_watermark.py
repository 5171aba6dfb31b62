"""The mark in the pixels: found by its key alone, through what takes records away, and never where it is not."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest

from sora_model import Clip, media, world
from sora_model.safety import certificates, credentials, store, watermark
from sora_model.safety.credentials import Origin

KEY, IDENTITY = b"k" * 32, 0x1234ABCD
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return np.asarray(world.sample(1, frames=9, size=(128, 128)).video)


@pytest.fixture(scope="module")
def marked(plain) -> np.ndarray:
    return np.stack(list(watermark.embed(plain, IDENTITY, key=KEY)))


def test_the_tiles_are_orthogonal_and_differ_from_key_to_key():
    sync, codes = watermark._patterns(KEY)
    tiles = np.concatenate([sync[None], codes]).reshape(watermark.BITS + 1, -1) / watermark.TILE
    assert np.abs(tiles @ tiles.T - np.eye(watermark.BITS + 1)).max() < 1e-5
    other = watermark._patterns(b"K" * 32)[0]
    assert abs(float((sync * other).mean())) < 0.3 and np.abs(tiles.mean(1)).max() < 1e-6


def test_the_mark_is_faint_and_found_by_its_key_alone(plain, marked):
    assert np.abs(marked.astype(int) - plain).max() <= 12
    psnr = 10 * np.log10(255**2 / np.square(marked.astype(float) - plain).mean())
    assert psnr > 38
    found = watermark.detect(marked, key=KEY)
    assert found.present and found.z > 8 and found.p < 1e-10 and (found.scale, found.mirrored) == (1.0, False)
    for frames, key in ((plain, KEY), (marked, b"K" * 32), (marked, b"")):
        unseen = watermark.detect(frames, key=key)
        assert not unseen.present and unseen.z < 5.5 and unseen.p > 1e-4 and unseen.identity([IDENTITY]) is None


def test_the_mark_is_that_of_the_formula_before_it_was_fused():
    """round(frame + gain * mark) in PyTorch, frame by frame, from which it may differ where the sum lies at a half."""
    import torch
    import torch.nn.functional as F

    rng = np.random.default_rng(0)
    frame = (rng.integers(0, 256, (75, 133, 1)) * np.linspace(0, 1, 133)[:, None] + rng.random((75, 133, 3)) * 40) / 1.2
    frame = frame.round().astype(np.uint8)
    sync, codes = watermark._patterns(KEY)
    signs = torch.tensor(watermark._signs(IDENTITY)).view(-1, 1, 1)
    tile = (sync + (signs * codes).sum(0) / watermark.BITS**0.5) / 2**0.5
    mark = 1.5 * (256 * 256 / (75 * 133)) ** 0.25 * tile.repeat(2, 3)[:75, :133]
    shown = torch.from_numpy(frame).double()
    mean, square = (F.avg_pool2d(g[None, None], 8, ceil_mode=True)[0, 0] for g in (shown[..., 1], shown[..., 1] ** 2))
    busy = (square - mean * mean).clamp(min=0).sqrt().div(8).clamp(max=1)
    gain = (1 + busy / 2).repeat_interleave(8, 0).repeat_interleave(8, 1)[:75, :133]
    exact = (shown + (gain * mark).unsqueeze(-1)).clamp(0, 255).numpy()
    ours = next(watermark.embed([frame], IDENTITY, key=KEY))
    assert np.abs(ours - exact).max() <= 0.5 + 1e-5 and (ours != exact.round()).mean() < 1e-3


def encoded(frames, path, crf=23):
    media.write_video(path, frames, crf=crf)
    return np.stack(list(media.read_video(path)))


@pytest.mark.parametrize(
    "attack",
    [
        lambda frames, path: encoded(frames, path, 28),
        lambda frames, path: encoded(frames[:, 11:, 5:], path),
        lambda frames, path: encoded(frames[:, :, ::-1], path),
        lambda frames, path: encoded(frames[::3], path),
        lambda frames, path: encoded(frames // 2, path),
        lambda frames, path: np.repeat(np.repeat(frames, 2, 1), 2, 2),
    ],
    ids=["crf 28", "cut", "mirrored", "a third of the frames", "half as bright", "twice the size"],
)
def test_it_survives_what_takes_a_record_away(marked, tmp_path, attack):
    found = watermark.detect(attack(marked, tmp_path / "a.mp4"), key=KEY)
    assert found.present, found
    others = np.random.default_rng(0).integers(0, 2**32, 200).tolist()
    assert found.identity([*others, IDENTITY]) == IDENTITY


def test_an_identity_is_told_beyond_a_margin_only(marked):
    found = watermark.detect(marked, key=KEY)
    assert found.identity([]) is None and found.identity([IDENTITY ^ 0xFFFF0000]) is None
    assert found.identity([IDENTITY, IDENTITY ^ 1]) is None, "two that differ in one bit cannot be told apart"
    assert found.identity([IDENTITY, IDENTITY ^ 0xFF]) == IDENTITY
    weak = watermark.Detection(watermark.THRESHOLD - 0.1, 1e-3, 1.0, False, found.bits)
    assert not weak.present and weak.identity([IDENTITY]) is None


def test_no_unmarked_clip_is_marked_and_p_is_no_less_than_its_share():
    """Small clips, many keys: p is a bound, so at most about so many of them lie below it."""
    found = []
    for seed in range(3):
        rest = watermark.residual(world.sample(seed, frames=3, size=(64, 64)).video)
        found += [watermark.search(rest, f"{seed} {key}".encode()) for key in range(10)]
    assert max(one.z for one in found) < watermark.THRESHOLD - 0.5
    assert sum(one.p < 0.05 for one in found) <= 4 and 3 < np.median([one.z for one in found]) < 5


def test_the_key_is_made_once_and_its_owner_alone_reads_it(monkeypatch, tmp_path):
    monkeypatch.setenv(certificates.VARIABLE, str(tmp_path / "new"))
    key = watermark.secret()
    path = tmp_path / "new" / "watermark.key"
    assert len(key) == 32 and watermark.secret() == key and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(p.name for p in path.parent.iterdir()) == [".gitignore", "watermark.key"]


@pytest.mark.parametrize("held", [b"", b"short", bytes(64), None], ids=["empty", "short", "long", "others can read it"])
def test_a_key_that_is_none_marks_nothing(monkeypatch, tmp_path, held):
    """An empty one is known to everyone."""

    def work():
        raise AssertionError("frames were asked for")
        yield

    monkeypatch.setenv(certificates.VARIABLE, str(tmp_path / "new"))
    watermark.secret()
    path = tmp_path / "new" / "watermark.key"
    if held is None:
        path.chmod(0o644)
    else:
        path.write_bytes(held)
    told = "others can read the mark's key .* chmod 600" if held is None else f"must be 32 bytes, got {len(held)}"
    with pytest.raises(certificates.CredentialsError, match=told):
        media.write_video(tmp_path / "a.mp4", work(), origin=Origin())
    with pytest.raises(certificates.CredentialsError, match=told):
        watermark.detect([np.zeros((64, 64, 3), np.uint8)])
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("frames", [[], [np.zeros((8, 64, 3), np.uint8)]], ids=["none", "too small"])
def test_what_cannot_hold_a_mark_is_one_error(frames):
    with pytest.raises(ValueError, match="no frames to look for|64x8 are too small"):
        watermark.detect(frames, key=KEY)


def test_what_a_model_made_is_marked_and_nothing_else_is(tmp_path, plain):
    for name, origin, kept in (("a", Origin({"seed": 1}), False), ("b", Origin(source="algorithmicMedia"), True),
                               ("c", None, True)):  # fmt: skip
        media.write_video(tmp_path / f"{name}.mp4", plain, origin=origin)
        assert watermark.detect(media.read_video(tmp_path / f"{name}.mp4")).present is not kept, name
    with credentials.signing(False), pytest.warns(UserWarning, match="without credentials"):
        media.write_video(tmp_path / "d.mp4", plain, origin=Origin({"seed": 1}))
    assert not watermark.detect(media.read_video(tmp_path / "d.mp4")).present
    assert Origin({"seed": 1}).identity == Origin({"seed": 1}).identity != Origin({"seed": 2}).identity


def test_a_stripped_file_is_found_again(tmp_path, plain, monkeypatch, sora):
    pytest.importorskip("c2pa", reason="the extra [safety] is not installed")
    monkeypatch.setenv(certificates.VARIABLE, str(tmp_path / "home"))
    clips = [Clip(plain, 8, "a ring", seed, 2, 3.0) for seed in range(3)]
    for seed, clip in enumerate(clips):
        clip.save(f"{seed}.mp4")
    media.write_video("stripped.mp4", media.read_video("1.mp4"), crf=23)
    media.write_video("plain.mp4", plain)
    assert credentials.verify("stripped.mp4").answer == credentials.NONE and len(store.identities()) == 3
    assert credentials.verify("1.mp4").binding in {f"{one:08x}" for one in store.identities()}
    code, out, _ = sora("detect", "stripped.mp4")
    assert code == 0 and out.startswith("stripped.mp4: marked by this installation: z ")
    assert "  as 1.mp4, 20" in out and "\n    c2pa.created trainedAlgorithmicMedia" in out and "seed 1" in out
    assert "altered, by sora local (assertion.bmffHash.mismatch)" in out
    code, out, _ = sora("detect", "plain.mp4")
    assert code == 5 and "no mark found" in out and "says nothing of where it comes from" in out
    (tmp_path / "home" / "manifests.sqlite").unlink()
    code, out, _ = sora("detect", "stripped.mp4")
    assert code == 0 and "as what cannot be told" in out


def test_of_a_clip_made_from_a_marked_one_the_last_is_told(tmp_path, plain, monkeypatch, sora):
    """Whose frames hold both marks, neither plainly the stronger one."""
    pytest.importorskip("c2pa", reason="the extra [safety] is not installed")
    monkeypatch.setattr(watermark, "MARGIN", 0.4)  # identities are drawn: now and then one has more of the bits
    monkeypatch.setenv(certificates.VARIABLE, str(tmp_path / "home"))
    media.write_video("first.mp4", plain, origin=Origin({"seed": 1}))
    told = {"inputs": (credentials.Input.of(Path("first.mp4")),)}
    media.write_video("second.mp4", media.read_video("first.mp4"), origin=Origin({"seed": 2}, **told))
    media.write_video("stranger.mp4", media.read_video("first.mp4"), origin=Origin({"seed": 2}))
    for made, last in (("second.mp4", "second.mp4"), ("first.mp4", "first.mp4"), ("stranger.mp4", None)):
        media.write_video("stripped.mp4", media.read_video(made), crf=23)
        code, out, _ = sora("detect", "stripped.mp4")
        assert code == 0 and (f"  as {last}, 20" if last else "as what cannot be told") in out, out


def test_a_file_that_can_hold_no_record_is_found_again_too(tmp_path, plain, monkeypatch, sora):
    import av

    pytest.importorskip("c2pa", reason="the extra [safety] is not installed")
    monkeypatch.setenv(certificates.VARIABLE, str(tmp_path / "home"))
    media.write_video("first.mp4", plain, origin=Origin({"seed": 1}))
    with av.open("stripped.webm", "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=8, options={"crf": "20"})
        stream.height, stream.width, stream.pix_fmt = *plain.shape[1:3], "yuv420p"
        for frame in media.read_video("first.mp4"):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    code, out, err = sora("detect", "stripped.webm")
    assert code == 0 and "  as first.mp4, 20" in out and "  stripped.webm: altered, by sora local" in out and not err
    with pytest.raises(certificates.CredentialsError, match="holds no credentials: it is no MP4"):
        credentials.verify("stripped.webm")


def test_a_store_that_cannot_be_used_is_one_error(tmp_path, plain, monkeypatch, sora):
    pytest.importorskip("c2pa", reason="the extra [safety] is not installed")
    monkeypatch.setenv(certificates.VARIABLE, str(tmp_path / "home"))
    clips = [Clip(plain, 8, "a ring", 0, 2, 3.0)]
    clips[0].save("0.mp4")
    media.write_video("stripped.mp4", media.read_video("0.mp4"), crf=23)
    (tmp_path / "home" / "manifests.sqlite").unlink()
    (tmp_path / "home" / "manifests.sqlite").mkdir()
    with pytest.warns(UserWarning, match="its record is not kept: cannot use .*manifests.sqlite': unable to open"):
        clips[0].save("again.mp4")
    assert credentials.verify("again.mp4").answer == credentials.TRUSTED
    (tmp_path / "home" / "manifests.sqlite").rmdir()
    (tmp_path / "home" / "manifests.sqlite").write_text("no database")
    code, out, err = sora("detect", "stripped.mp4")
    assert code == 1 and "marked by this installation" in out and "Traceback" not in err
    assert err.startswith("error: cannot use the store of records") and "file is not a database; where it is" in err


def test_the_page_tells_what_was_measured():
    held = json.loads((ROOT / "benchmarks" / "results" / "watermark.json").read_text())
    text = (ROOT / "docs" / "safety.md").read_text()
    for name, found in held.items():
        counted = found["nulls"]
        shares = ", ".join(f"{counted['below_p'][p]:.{d}%}" for p, d in (("0.01", 2), ("0.001", 3), ("0.0001", 3)))
        told = f"| {name} | {counted['clips']:,}, {counted['tests']:,} | {counted['beyond']} | "
        assert told + f"{counted['interval'][1]:.2%} | {counted['largest_z']:.2f} | {shares} |" in text
        assert found["threshold"] == watermark.THRESHOLD
    (psnr, *rows) = zip(*(found["robustness"] for found in held.values()), strict=True)
    assert ", ".join(f"{one['mean']:.1f}" for one in psnr) + " dB PSNR" in text
    for row in rows:
        cells = [f"{one['found']}, {one['told']} ({one['mean_z']:.1f})" for one in row]
        assert f"| {row[0]['attack']} | {' | '.join(cells)} |" in text
        assert not any(one["told_wrong"] for one in row)
    searches = sum(found["nulls"]["tests"] for found in held.values())
    assert f"over {searches:,} searches" in (ROOT / "CHANGELOG.md").read_text()
