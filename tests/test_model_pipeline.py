"""From a sentence to a clip: the shipped checkpoint, a tiny directory of Wan's structure, and everything that must
be refused."""

from __future__ import annotations

import base64
import json
import pickle
import re
import shutil
import struct
import warnings
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sora_model import estimate, files, machine, media, reconstruct, world
from sora_model.checkpoint import CheckpointError, read_json, read_tensors, write_json, write_tensors
from sora_model.pipeline import TOY, Clip, Sora, TooLargeError
from sora_model.text import UMT5TextEncoder, WordTextConfig, WordTextEncoder
from sora_model.vae import CausalVAE


@pytest.fixture(scope="module")
def toy() -> Sora:
    return Sora.from_pretrained("toy", device="cpu")


@pytest.fixture
def copied(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A directory of the structure of Wan2.1-T2V-1.3B-Diffusers, written by diffusers and transformers, tiny and
    random."""
    return make_wan_directory(tmp_path_factory.mktemp("wan") / "Wan-tiny")


def make_wan_directory(folder):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    vocabulary = ["<pad>", "</s>", "<unk>", *world.VOCABULARY]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=len(vocabulary),
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            tie_word_embeddings=False,
        )
    ).save_pretrained(folder / "text_encoder")
    diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=48, num_layers=2, rope_max_seq_len=64,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.1, 0.9, 1.3, 0.7],
    ).save_pretrained(folder / "vae")  # fmt: skip
    diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    parts = {
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }
    write_json(folder / "model_index.json", {"_class_name": "WanPipeline", "_diffusers_version": "0.33.0", **parts})
    return folder


# --- the shipped checkpoint ---


@pytest.mark.parametrize(
    "prompt", ["a red circle moves right", "a blue square passes behind a wall", "a yellow triangle"]
)
def test_the_shipped_checkpoint_shows_the_colour_that_the_prompt_names(toy, prompt):
    clip = toy.generate(prompt, steps=12, seed=1)
    assert clip.frames.shape == (17, 64, 64, 3) and clip.frames.dtype == np.uint8 and clip.fps == 8
    assert prompt.split()[1] in world.readout.read(clip.frames).tracks


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_frames_are_the_decoded_video_clamped_scaled_and_rounded(toy, impl, monkeypatch):
    """To the bit, also beyond [-1, 1], where the decoder does not clamp."""
    decoded, stream = [], toy.vae.decode_stream

    def recorded(*args, **kwargs):
        for video in stream(*args, **kwargs):
            decoded.append(1.5 * video)
            yield decoded[-1]

    monkeypatch.setattr(toy.vae, "decode_stream", recorded)
    frames = toy.generate("a red circle moves right", steps=2, seconds=9 / 8, seed=1, impl=impl).frames
    video = torch.cat(decoded, 2)[0]
    expected = video.clamp(-1, 1).movedim(0, -1).add(1).mul(127.5).round().to(torch.uint8)
    assert video.abs().max() > 1 and np.array_equal(frames, expected.numpy()[: len(frames)])


def test_the_shipped_checkpoint_is_small_and_tells_how_it_was_made_and_how_good_it_is():
    assert sum(file.stat().st_size for file in TOY.rglob("*.safetensors")) <= 12 * 2**20
    record = read_json(TOY / "training.json")
    assert record["command"] and record["step"] == record["dit"]["steps"]
    losses = [json.loads(line)["loss"] for line in (TOY / "dit_log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:5])
    result = read_json(TOY / "eval.json")
    assert len({row["prompt"] for row in result["clips"]}) == len(result["clips"]) >= 40
    for question in result["score"]:
        answers = [row[question] for row in result["clips"] if row[question] is not None]  # not every caption poses it
        assert result["score"][question] == pytest.approx(sum(answers) / len(answers), abs=1e-3)


def test_same_seed_same_clip_and_another_seed_another(toy):
    def make(seed):
        return toy.generate("a green ring bounces", steps=3, seed=seed).frames

    assert np.array_equal(make(5), make(5))
    assert np.abs(make(5).astype(int) - make(6)).max() > 20


def test_the_shipped_checkpoint_runs_in_every_attention_mode(toy):
    options = dict(seconds=0.6, size=(32, 32), steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        full, everything, window, causal = (
            toy.generate("a red circle bounces", attention=mode, **options).frames.astype(int)
            for mode in (None, "window=99x99x99", "window=3x1x1,stride=1x2x2", "causal=frame")
        )
    assert np.abs(everything - full).max() <= 1
    for other in (window, causal):
        assert np.abs(other - full).max() > 1


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_reference_and_auto_give_the_same_clip_within_rounding(toy, guidance):
    options = dict(steps=4, seed=3, seconds=1.1, guidance=guidance)
    auto = toy.generate("a purple square slides left", **options).frames
    reference = toy.generate("a purple square slides left", impl="reference", **options).frames
    assert auto.std() > 5
    assert np.abs(auto.astype(int) - reference).max() <= 2


def test_length_and_rate_are_those_asked_for(toy):
    clip = toy.generate("a red ring", steps=1, seconds=0.5, fps=12)
    assert clip.frames.shape[0] == 6 and clip.fps == 12
    assert toy.generate("a red ring", steps=1, seconds=0.1).frames.shape[0] == 1
    with pytest.warns(UserWarning, match="trained on 64x64 and up to 17 frames; others may look wrong"):
        assert toy.generate("a red ring", steps=1, seconds=0.1, size=(32, 80)).frames.shape == (1, 32, 80, 3)


def test_a_saved_clip_reads_back_and_the_streamed_frames_are_the_same(toy, tmp_path, monkeypatch):
    clip = toy.generate("a white circle bounces", steps=3, seed=2)
    assert isinstance(clip, Clip) and clip.save(tmp_path / "a.mp4") == tmp_path / "a.mp4"
    frames = np.stack(list(media.read_video(tmp_path / "a.mp4")))
    assert np.abs(frames.astype(int) - clip.frames).mean() < 4
    written = []
    keep = lambda path, frames, fps, **_: written.append((path, np.stack(list(frames)), fps))  # noqa: E731
    monkeypatch.setattr(media, "write_video", keep)
    toy.generate_to(tmp_path / "b.mp4", "a white circle bounces", steps=3, seed=2)
    path, streamed, fps = written[0]
    assert path == tmp_path / "b.mp4" and fps == 8 and np.array_equal(streamed, clip.frames)


def test_progress_is_told_and_unknown_words_are_reported(toy):
    told = []
    with pytest.warns(UserWarning, match="does not know: elephant, trumpet"):
        toy.generate("a red elephant, a trumpet", steps=2, seconds=0.6, progress=lambda *event: told.append(event))
    assert told[:2] == [("denoise", 1, 2), ("denoise", 2, 2)] and told[-1] == ("decode", 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy.generate("a red circle", steps=1, seconds=0.1)


def test_a_clip_says_in_one_line_what_it_is_and_plays_in_a_notebook(toy, tmp_path):
    clip = toy.generate("a <red> circle", steps=1, seconds=0.5, seed=3)
    assert repr(clip) == "Clip('a <red> circle': 4 frames of 64x64, 0.5 s, seed 3, 1 steps, guidance 3)"
    html = clip._repr_html_()
    assert html.startswith("<video ") and "<red>" not in html and "&lt;red&gt;" in html
    (data,) = re.findall(r'src="data:video/mp4;base64,([^"]+)"', html)
    (tmp_path / "shown.mp4").write_bytes(base64.b64decode(data))
    shown = np.stack(list(media.read_video(tmp_path / "shown.mp4")))
    assert shown.shape == clip.frames.shape and np.abs(shown.astype(int) - clip.frames).mean() < 4


def test_the_time_of_a_long_clip_is_said_before_it_is_made(toy, monkeypatch):
    monkeypatch.setattr(estimate, "rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(toy, "_frames", lambda *args: iter([np.zeros((1, 64, 64, 3), np.uint8)]))
    with pytest.warns(UserWarning, match=r"this takes about \d+ minutes on this machine"):
        toy.generate("a red circle", steps=500)
    monkeypatch.setattr(estimate, "rate", lambda device, dtype: 1e12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy.generate("a red circle", steps=500)


# --- Wan ---


def test_the_wan_text_encoder_pads_with_zeros_to_512(wan):
    text, lens = UMT5TextEncoder.from_directory(wan).encode(["a red  circle", "&quot;ring&quot;"])
    assert text.shape == (2, 512, 16) and lens.tolist() == [4, 4]
    assert text[0, 4:].abs().max() == 0 and text[0, :4].abs().min() > 0


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: shutil.rmtree(d / "tokenizer"), "lacks the folder 'tokenizer'"),
        (lambda d: (d / "vae" / "config.json").unlink(), r"config\.json is missing"),
        (
            lambda d: change_config(d / "text_encoder", relative_attention_max_distance=1),
            "relative_attention_max_distance must be a whole number from 9 to 1048576; got 1",
        ),
        (
            lambda d: (d / "text_encoder" / "config.json").write_text(
                json.dumps(read_json(d / "text_encoder" / "config.json") | {"dropout_rate": float("nan")})
            ),
            "dropout_rate must be a number from 0 to 1; got nan",
        ),
        (
            lambda d: change_config(d / "scheduler" / "scheduler_config.json", flow_shift=-2),
            "shift must be a number from 0.001 to 1000; got -2",
        ),
        (
            lambda d: edit(
                d / "transformer" / "diffusion_pytorch_model.safetensors", lambda s: s.pop("proj_out.bias")
            ),
            "head.bias|proj_out.bias",
        ),
        (
            lambda d: (d / "text_encoder" / "model.safetensors").write_bytes(b"\0" * 64),
            "text_encoder.model.safetensors .* is not a whole safetensors file",
        ),
    ],
)
def test_a_damaged_wan_directory_is_refused(wan, tmp_path, damage, said):
    folder = shutil.copytree(wan, tmp_path / "wan")
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        Sora.from_pretrained(folder)


# --- bad checkpoints ---


def edit(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


class Exploit:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was loaded",))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


DIT = ("transformer", "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: (d / "model_index.json").unlink(), r"model_index\.json is missing"),
        (lambda d: (d / "model_index.json").write_text("[1]"), "must hold a JSON object"),
        (
            lambda d: (d / "model_index.json").write_text('{"_class_name": "StableDiffusion"}'),
            "'StableDiffusion'; supported",
        ),
        (lambda d: (d / "vae" / "config.json").write_bytes(b"\xff{"), "not valid JSON"),
        (lambda d: (d / "vae" / "model.safetensors").unlink(), "missing .found there: config.json"),
        (lambda d: truncate(d.joinpath(*DIT)), "not a whole safetensors file"),
        (lambda d: d.joinpath(*DIT).write_bytes(b""), "not a whole safetensors file"),
        (lambda d: d.joinpath(*DIT).write_bytes(struct.pack("<Q", 2**63) + b"{}"), "not a whole safetensors file"),
        (lambda d: d.joinpath(*DIT).write_bytes(pickle.dumps(Exploit())), "not a whole safetensors file"),
        (lambda d: edit(d.joinpath(*DIT), lambda s: s.pop("head.bias")), "lacks 1 of .*'head.bias'"),
        (lambda d: edit(d.joinpath(*DIT), lambda s: s.update(extra=torch.ones(1))), "1 unknown ones .'extra'"),
        (
            lambda d: edit(d.joinpath(*DIT), lambda s: s.update({"head.bias": torch.ones(3)})),
            r"head.bias.*\(16,\).*\(3,\)",
        ),
        (lambda d: edit(d.joinpath(*DIT), lambda s: s["head.bias"].fill_(float("nan"))), "NaN"),
        (lambda d: change_config(d / "transformer", dim=-1), "dim must be a whole number from 1"),
        (lambda d: change_config(d / "transformer", depth=2), "does not describe a DiTConfig"),
        (lambda d: change_config(d / "vae", z_dim=6, latents_mean=None, latents_std=None), "shape"),
        (lambda d: change_config(d / "text_encoder", words=["a b"]), "words must be distinct"),
    ],
)
def test_a_bad_checkpoint_is_refused_with_what_was_expected_and_found(copied, damage, said):
    damage(copied)
    with pytest.raises(CheckpointError, match=said):
        Sora.from_pretrained(copied)


def change_config(path, **changes):
    """Of a config, or of a folder with one."""
    file = path if path.suffix == ".json" else path / "config.json"
    write_json(file, read_json(file) | changes)


def test_pickles_are_refused_unopened(tmp_path):
    for name in ("model.pt", "model.ckpt", "diffusion_pytorch_model.bin"):
        file = tmp_path / name
        file.write_bytes(pickle.dumps(Exploit()))
        with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
            Sora.from_pretrained(file)
        file.unlink()
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        Sora.from_pretrained(tmp_path / "nowhere")


def test_parts_of_different_checkpoints_do_not_go_together(tiny_checkpoint):
    one = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    other = WordTextEncoder(WordTextConfig(words=("a",), dim=8))
    with pytest.raises(CheckpointError, match="takes text of width 16, the text encoder gives 8"):
        Sora(one.dit, one.vae, other, one.defaults)


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(2)})

    def fail(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr("sora_model.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, {"x": torch.zeros(2)})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "b.json", {"x": float("nan")})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(read_tensors(path)["x"], torch.ones(2))


# --- bad requests ---


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"prompt": ""}, ValueError, "no word"),
        ({"prompt": "red " * 4000}, ValueError, "characters; at most"),
        ({"prompt": None}, TypeError, "prompt must be a str"),
        ({"size": (65, 64)}, ValueError, "height must be a multiple of 16, got 65; 64 or 80 would fit"),
        ({"size": (64, 8)}, ValueError, "width must be a whole number from 16 to 8192, got 8"),
        ({"size": (-64, 64)}, ValueError, "got -64"),
        ({"size": (10**9, 10**9)}, ValueError, "from 16 to 8192"),
        ({"size": 64}, ValueError, r"size must be \(height, width\), got 64"),
        ({"size": (64.0, 64)}, ValueError, "got 64.0"),
        ({"seconds": 0}, ValueError, "seconds=0 at 8 frames per second is less than one frame; ask for at least"),
        ({"seconds": -1}, ValueError, "seconds must lie between"),
        ({"seconds": float("nan")}, ValueError, "seconds must lie between"),
        ({"seconds": 0.01}, ValueError, "less than one frame"),
        ({"seconds": "2"}, TypeError, "seconds must be a number"),
        ({"fps": 0}, ValueError, "fps must lie between"),
        ({"steps": 0}, ValueError, "steps must lie between 1"),
        ({"steps": 2.5}, TypeError, "steps must be a whole number"),
        ({"seed": -1}, ValueError, "seed must lie between 0"),
        ({"guidance": float("inf")}, ValueError, "guidance must lie between"),
        ({"guidance": (3.0, 2.0)}, ValueError, r"guidance must be one number, .* got \(3.0, 2.0\)"),
        ({"impl": "fast"}, ValueError, "impl must be one of auto, reference"),
        ({"attention": "window"}, ValueError, "attention must be 'full', or settings such as"),
        ({"attention": 3}, TypeError, "attention must be an AttentionMode, text or None; got int"),
        (
            {"size": (4096, 4096), "seconds": 3600},
            TooLargeError,
            "4096x4096 with 28800 frames needs about .* would fit",
        ),
        ({"size": (4096, 4096), "seconds": 60, "impl": "reference"}, TooLargeError, "would fit"),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_computed(tiny_checkpoint, monkeypatch, options, kind, said):
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    monkeypatch.setattr(sora.text, "encode", lambda prompts: pytest.fail("the request was not refused"))
    with pytest.raises(kind, match=said):
        sora.generate(**{"prompt": "a red circle"} | options)


def test_what_would_fit_is_offered_and_does_fit(tiny_checkpoint, monkeypatch):
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    monkeypatch.setattr(machine, "available", lambda device: 40 * 2**20)
    with pytest.raises(TooLargeError) as caught:
        sora.generate("a red circle", size=(512, 1024), seconds=20, steps=1)
    import re

    width, height = map(int, re.search(r"free; (\d+)x(\d+) with", str(caught.value)).groups())
    assert width == 2 * height
    sora._plan("a red circle", seconds=20, size=(height, width), steps=1)


def test_frames_are_decoded_in_tiles_where_the_memory_is_short_and_only_there(tiny_checkpoint, monkeypatch):
    sora, size = Sora.from_pretrained(tiny_checkpoint, device="cpu"), (128, 192)
    asked, stream = [], sora.vae.decode_stream

    def watched(latents, *, tile, **options):
        asked.append(tile)
        return stream(latents, tile=tile, **options)

    monkeypatch.setattr(sora.vae, "decode_stream", watched)
    options = dict(size=size, seconds=0.6, steps=1)
    with pytest.warns(UserWarning, match="trained on"):
        whole = sora.generate("a red circle", **options).frames
        most, least = (sora.vae.fit_tile("decode", *size, budget)[1] for budget in (1 << 40, 0))
        clip = 2 * 5 * size[0] * size[1] * 3
        monkeypatch.setattr(machine, "available", lambda device: (most + least) // 2 + clip)
        tiled = sora.generate("a red circle", **options).frames
        monkeypatch.setattr(machine, "available", lambda device: least // 2)
        with pytest.raises(TooLargeError, match="192x128 with 5 frames needs about"):
            sora.generate("a red circle", **options)
    assert asked[0] == size and asked[1] != size and len(asked) == 2
    assert whole.std() > 1 and np.abs(tiled.astype(int) - whole).max() <= 1


def test_a_clip_that_is_written_needs_no_memory_for_its_frames(tiny_checkpoint, monkeypatch):
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    options = dict(seconds=3600, size=(64, 64), steps=1)
    _, needed = sora._memory(28801, 64, 64, "auto", False, 1 << 40)
    monkeypatch.setattr(machine, "available", lambda device: needed)
    sora._plan("a red circle", **options, held=False)
    with pytest.raises(TooLargeError, match="28800 frames needs about"):
        sora._plan("a red circle", **options)


def test_generate_to_never_holds_the_clip(tiny_checkpoint, tmp_path, monkeypatch):
    """Of a minute's chunks, two are alive and the first, which the writer keeps: all would be, were they collected."""
    sora, write, decode = Sora.from_pretrained(tiny_checkpoint, device="cpu"), media.write_video, CausalVAE._decode
    arrays, videos, most = [], [], []

    def alive(refs):
        return len({id(ref()) for ref in refs if ref() is not None})

    def watched(frames):
        for frame in frames:
            arrays.append(weakref.ref(frame if frame.base is None else frame.base))
            most.append(alive(arrays))
            yield frame

    def decoded(self, *arguments):
        videos.append(weakref.ref(video := decode(self, *arguments)))
        most.append(alive(videos))
        return video

    monkeypatch.setattr(media, "write_video", lambda path, frames, fps, **o: write(path, watched(frames), fps, **o))
    monkeypatch.setattr(CausalVAE, "_decode", decoded)
    with pytest.warns(UserWarning, match="trained on"):
        sora.generate_to(tmp_path / "a.mp4", "a red circle", steps=1, size=(16, 16), seconds=60, fps=2)
    assert len(arrays) == media.probe(tmp_path / "a.mp4").frames == 120 and len(videos) == 31
    assert max(most) <= 3


def test_weights_larger_than_memory_are_refused_before_they_are_read(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(machine, "available", lambda device: 1000)
    with pytest.raises(TooLargeError, match="weights in .* take .* 0 MiB of memory are free"):
        Sora.from_pretrained(tiny_checkpoint)


def test_a_prompt_of_too_many_words_and_a_path_that_cannot_be_written_leave_nothing(tiny_checkpoint, tmp_path):
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    with pytest.raises(ValueError, match="33 words"):
        sora.generate("red " * 33)
    with pytest.raises(files.WriteError, match="there is no folder"):
        sora.generate_to(tmp_path / "none" / "a.mp4", "a red circle", steps=1)
    with pytest.raises(TypeError, match="no argument 'sze'"):
        sora.generate_to(tmp_path / "a.mp4", "a red circle", sze=(64, 64))

    def fail(*event):
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        sora.generate_to(tmp_path / "a.mp4", "a red circle", steps=1, seconds=0.1, progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_numpy_numbers_are_numbers(tiny_checkpoint):
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    options = dict(seconds=0.5, size=(32, 48), fps=10, seed=4, steps=2, guidance=1.5)
    plain = sora.generate("a red circle", **options)
    of_numpy = dict(
        seconds=np.float32(0.5), size=(np.int64(32), np.int16(48)), fps=np.float64(10), seed=np.int64(4),
        steps=np.uint8(2), guidance=np.float16(1.5),
    )  # fmt: skip
    clip = sora.generate("a red circle", **of_numpy)
    assert np.array_equal(clip.frames, plain.frames) and type(clip.seed) is int and type(clip.fps) is float
    for wrong in (dict(seed=np.float32(1)), dict(steps=np.bool_(True)), dict(size=(32.0, 48)), dict(fps="8")):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(wrong))}.* must be"):
            sora.generate("a red circle", **wrong)


def test_a_surrounding_autocast_changes_nothing(tiny_checkpoint, tmp_path):
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    options = dict(seconds=0.5, size=(32, 48), fps=10, steps=2)
    plain = sora.generate("a red circle", **options)
    path = plain.save(tmp_path / "clip.mp4")
    psnr = reconstruct.reconstruct(sora.vae, path, tmp_path / "a.mp4").psnr
    means = torch.cat(list(reconstruct.encode_file(sora.vae, path, extra="pad")), 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(sora.generate("a red circle", **options).frames, plain.frames)
        assert media.probe(sora.generate_to(tmp_path / "b.mp4", "a red circle", **options)).frames == 5
        assert reconstruct.reconstruct(sora.vae, path, tmp_path / "c.mp4").psnr == psnr
        assert torch.equal(torch.cat(list(reconstruct.encode_file(sora.vae, path, extra="pad")), 2), means)
        assert torch.is_autocast_enabled("cpu")
