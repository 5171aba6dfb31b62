"""Whole checkpoints of the Wan family against diffusers' pipelines: the same noise gives the same frames."""

from __future__ import annotations

import itertools
import re
import shutil

import numpy as np
import pytest
import torch
from test_model_mutations import HOSTILE
from test_model_pipeline import change_config, make_wan_directory

from sora_kernels.testing import max_error
from sora_model import flow, machine, packed, wan
from sora_model.checkpoint import CheckpointError, read_json
from sora_model.machine import Turns
from sora_model.pipeline import Sora
from sora_model.reconstruct import load_vae
from sora_model.solvers import Hosted

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPT, NEGATIVE = "a red circle moves right", "a blue square"
UNIPC = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
VAE = {
    "2.1": dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
    "2.2": dict(
        base_dim=4, z_dim=6, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True, patch_size=2, in_channels=12,
        out_channels=12, scale_factor_spatial=16,
    ),
}  # fmt: skip
FORMS = {  # VAE; latent channels in addition; of the transformer; of the pipeline; given frames
    "2.1 text": ("2.1", 0, {}, {}, 0),
    "2.1 text, Euler": ("2.1", 0, {}, {"scheduler": "FlowMatchEulerDiscreteScheduler"}, 0),
    "2.1 image": ("2.1", 8, {"image_dim": 18, "added_kv_proj_dim": 24}, {}, 1),
    "2.1 first and last": ("2.1", 8, {"image_dim": 18, "added_kv_proj_dim": 24, "pos_embed_seq_len": 10}, {}, 2),
    "2.2 text, two experts": ("2.1", 0, {}, {"boundary_ratio": 0.875}, 0),
    "2.2 image, two experts": ("2.1", 8, {}, {"boundary_ratio": 0.9}, 1),
    "2.2 first and last, two experts": ("2.1", 8, {}, {"boundary_ratio": 0.9}, 2),
    "2.2 small, text": ("2.2", 0, {}, {"expand_timesteps": True}, 0),
    "2.2 small, image": ("2.2", 0, {}, {"expand_timesteps": True}, 1),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a text encoder and a tokenizer."""
    return make_wan_directory(tmp_path_factory.mktemp("text") / "wan")


def random(model, seed):
    """Every weight away from its beginning, norms and places too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1 if p.ndim == 1 or p.shape[0] == 1 else 0.0)
    return model.eval()


def pipeline(form, text):
    """A pipeline of diffusers of tiny random parts."""
    version, more, sizes, settings, given = FORMS[form]
    torch.manual_seed(1)
    z_dim = VAE[version]["z_dim"]
    mean, std = [0.1 * i for i in range(z_dim)], [1 + 0.2 * i for i in range(z_dim)]
    parts = {
        "vae": diffusers.AutoencoderKLWan(**VAE[version], latents_mean=mean, latents_std=std),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(text / "tokenizer"),
        "text_encoder": transformers.UMT5EncoderModel.from_pretrained(text / "text_encoder"),
    }
    sizes = dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=z_dim + more, out_channels=z_dim, text_dim=16,
        freq_dim=32, ffn_dim=48, num_layers=2, rope_max_seq_len=64,
    ) | sizes  # fmt: skip
    for seed, name in enumerate(("transformer", "transformer_2")[: 1 + ("boundary_ratio" in settings)]):
        parts[name] = random(diffusers.WanTransformer3DModel(**sizes), seed)
    if settings.get("scheduler"):
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        parts["scheduler"] = diffusers.UniPCMultistepScheduler(**UNIPC)
    if "image_dim" in sizes:
        clip = transformers.CLIPVisionConfig(
            hidden_size=18, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=32,
            patch_size=16,
        )  # fmt: skip
        parts["image_encoder"] = transformers.CLIPVisionModel(clip).eval()
        size = {"shortest_edge": 32}
        parts["image_processor"] = transformers.CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    kind = diffusers.WanImageToVideoPipeline if given else diffusers.WanPipeline
    more = {name: value for name, value in settings.items() if name != "scheduler"}
    made = kind(**parts, **more)
    made.set_progress_bar_config(disable=True)
    return made


def decoded(sora, monkeypatch):
    """What the VAE makes of the clips of `sora`, before it becomes pixels."""
    videos, stream = [], sora.vae.decode_stream

    def recorded(*args, **kwargs):
        for video in stream(*args, **kwargs):
            videos.append(video)
            yield video

    monkeypatch.setattr(sora.vae, "decode_stream", recorded)
    return videos


@pytest.mark.parametrize("form", FORMS)
def test_same_frames_as_diffusers(form, text, tmp_path, monkeypatch):
    from PIL import Image

    theirs = pipeline(form, text)
    theirs.save_pretrained(tmp_path)
    sora = Sora.from_pretrained(tmp_path, device="cpu")
    height, width = 64, 32
    *_, settings, given = FORMS[form]
    images = np.random.default_rng(0).integers(0, 255, (2, height, width, 3), dtype=np.uint8)
    guidance = (4.0, 3.0) if "boundary_ratio" in settings else 4.0
    how = dict(steps=4, size=(height, width), seconds=9 / 16, fps=16, guidance=guidance, negative=NEGATIVE, seed=3)
    videos = decoded(sora, monkeypatch)
    if given:
        clip = sora.animate(images[0], PROMPT, last=images[1] if given > 1 else None, **how)
        assert (clip.frames[0] == images[0]).all() and (given < 2 or (clip.frames[-1] == images[1]).all())
    else:
        clip = sora.generate(PROMPT, **how)
    noise = flow.draw_noise((1, *sora.vae.config.latent_shape(9, height, width)), generator=torch.manual_seed(3))
    options = dict(image=Image.fromarray(images[0])) if given else {}
    options |= dict(last_image=Image.fromarray(images[1])) if given > 1 else {}
    options |= dict(guidance_scale_2=3.0) if "boundary_ratio" in settings else {}
    frames = []
    for dtype in (torch.float32, torch.float64):  # how far fp32 is from fp64 differs from processor to processor
        with torch.no_grad():
            frames += theirs.to(dtype)(
                prompt=PROMPT, negative_prompt=NEGATIVE, height=height, width=width, num_frames=9,
                num_inference_steps=4, guidance_scale=4.0, latents=noise.to(dtype), output_type="pt", **options,
            ).frames  # fmt: skip
    baseline, expected = frames
    actual = (torch.cat(videos, 2)[0].transpose(0, 1) / 2 + 0.5).clamp(0, 1)
    assert actual.std() > 0.01
    assert max_error(actual, expected) <= max(2e-5, 2 * max_error(baseline, expected))
    pixels = (expected.permute(0, 2, 3, 1) * 255).numpy()
    own = slice(1 if given else 0, -1 if given > 1 else None)
    assert np.abs(clip.frames[own] - pixels[own]).max() <= 0.5 + 0.01


# --- samplers of diffusers ---


SCHEDULERS = {
    "UniPC": {"_class_name": "UniPCMultistepScheduler", **UNIPC},
    "Euler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0},
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize(("start", "steps"), [(1.0, 1), (1.0, 6), (0.6, 6), (0.02, 3), (0.0, 3)])
def test_a_straight_path_is_followed_to_its_end_from_anywhere_on_it(kind, start, steps):
    clip, noise = torch.randn(2, 1, 3, 2, 2, 2)
    begin, times, done = flow.interpolate(clip, noise, torch.tensor([start])), [], []

    def velocity(x, t):
        held = flow.interpolate(clip, noise, t.float())  # t in whole thousandths
        torch.testing.assert_close(x, held, rtol=0, atol=1.1e-3 * (noise - clip).abs().max().item())
        times.append(t.item())
        return noise - clip

    solver = Hosted(SCHEDULERS[kind])
    how = dict(steps=steps, shift=5.0, start=start, progress=lambda *told: done.append(told))
    end = solver(velocity, begin, **how)
    torch.testing.assert_close(end, clip, rtol=0, atol=1e-5)
    assert times == sorted(set(times), reverse=True) and len(times) <= steps + (start < 1)
    assert done == [(i + 1, len(times)) for i in range(len(times))]
    if start:
        assert times[0] == pytest.approx(start, abs=1.001e-3)  # whole thousandths again


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "the scheduler is a None; supported are UniPCMultistepScheduler, Flow"),
        ({"_class_name": "DDIMScheduler"}, "the scheduler is a 'DDIMScheduler'; supported"),
        ({"_class_name": "UniPCMultistepScheduler"}, "prediction_type='epsilon'; flow matching needs 'flow_pred"),
        (SCHEDULERS["UniPC"] | {"use_flow_sigmas": False}, "use_flow_sigmas=False; flow matching needs True"),
        (SCHEDULERS["UniPC"] | {"solver_type": "other"}, "no UniPCMultistepScheduler can be made"),
        (SCHEDULERS["Euler"] | {"stochastic_sampling": True}, "stochastic_sampling=True; flow matching needs False"),
        (SCHEDULERS["Euler"] | {"num_train_timesteps": 500}, "num_train_timesteps=500; flow matching needs 1000"),
    ],
)
def test_samplers_that_are_refused(config, said):
    with pytest.raises(CheckpointError, match=said):
        Hosted(config)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_hostile_values_in_a_samplers_config_are_refused_or_run(kind):
    defaults = getattr(diffusers, SCHEDULERS[kind]["_class_name"])().config
    whole = {name: value for name, value in defaults.items() if not name.startswith("_")} | SCHEDULERS[kind]
    told = {"ran": 0, "refused": 0}
    for name, value in list(itertools.product(whole, HOSTILE))[::11]:
        try:
            solver = Hosted(whole | {name: value})
        except CheckpointError:
            told["refused"] += 1
        else:
            end = solver(lambda x, t: x, torch.ones(1, 2, dtype=torch.float32), steps=4, shift=2.0, start=0.7)
            assert torch.isfinite(end).all(), (name, value)
            told["ran"] += 1
    assert min(told.values()) > 3, told


# --- loading ---


@pytest.fixture(scope="module")
def folders(text, tmp_path_factory):
    """One folder of each form that is asked for, saved once."""
    made = {}

    def folder(form):
        if form not in made:
            made[form] = tmp_path_factory.mktemp("form")
            pipeline(form, text).save_pretrained(made[form], max_shard_size="20KB")
        return made[form]

    return folder


def test_each_form_has_the_settings_of_its_model(folders):
    for form, expected in {
        "2.1 image": (81, (480, 832), 16, 50, 5.0, 3.0),
        "2.2 text, two experts": (81, (480, 832), 16, 40, (4.0, 3.0), 3.0),
        "2.2 image, two experts": (81, (480, 832), 16, 40, (3.5, 3.5), 3.0),
        "2.2 small, image": (121, (704, 1280), 24, 50, 5.0, 3.0),
    }.items():
        d = Sora.from_pretrained(folders(form), device="cpu").defaults
        assert (d.frames, d.size, d.fps, d.steps, d.guidance, d.shift) == expected, form


def test_the_vae_of_an_image_to_video_checkpoint_is_read_alone(folders):
    assert load_vae(folders("2.1 image"), device="cpu").config.z_dim == 4


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("2.1 text", "Wan 2.1, from text: 2 layers of width 24"),
        ("2.1 image", "Wan 2.1, from an image: 2 layers of width 24"),
        ("2.1 first and last", "Wan 2.1, from a first and a last image: 2 layers"),
        ("2.2 text, two experts", "Wan 2.2 of two experts, from text: 2 layers"),
        ("2.2 image, two experts", "Wan 2.2 of two experts, from an image: 2 layers"),
        ("2.2 small, image", "Wan 2.2, from text or an image: 2 layers"),
    ],
)
def test_a_folder_says_which_model_it_is_without_being_loaded(folders, form, said):
    folder = folders(form)
    assert wan.which(wan.configs(folder)[0], read_json(folder / "model_index.json")).startswith(said)
    sora = Sora.from_pretrained(folder, device="cpu")
    held = {"transformer": sora.dit, "transformer_2": sora.second, "vae": sora.vae, "text_encoder": sora.text.model}
    held |= {"image_encoder": sora.image.model} if sora.image else {}
    for part in wan.parts_of(folder):
        files = (folder / part.name).glob("*.safetensors")
        assert part.parameters == sum(p.numel() for p in held.pop(part.name).parameters()), part.name
        assert 4 * part.parameters <= part.bytes == sum(file.stat().st_size for file in files)
    assert not any(held.values())


def test_weights_larger_than_memory_are_refused_with_the_dtype_that_would_fit(folders, monkeypatch):
    """Of what is stored in fp32 and of what is stored in half precision alike."""
    folder = folders("2.2 text, two experts")
    parts = {part.name: part for part in wan.parts_of(folder)}
    others = 4 * parts["vae"].parameters + parts["text_encoder"].bytes
    both = parts["transformer"].parameters + parts["transformer_2"].parameters
    monkeypatch.setattr(machine, "available", lambda device: 4 * both + others)
    Sora.from_pretrained(folder, device="cpu")
    for free, said in ((4 * both + others - 1, "dtype=torch.bfloat16, of .* would fit"), (2 * both, "a smaller model")):
        monkeypatch.setattr(machine, "available", lambda device, free=free: free)
        with pytest.raises(machine.TooLargeError, match=f"weights in .* take .* of memory are free; .*{said}"):
            Sora.from_pretrained(folder, device="cpu")
    monkeypatch.setattr(machine, "available", lambda device: 2 * both + others)
    assert Sora.from_pretrained(folder, device="cpu", dtype=torch.bfloat16).second is not None


def test_the_command_says_which_model_it_is_and_what_it_takes(folders, capsys, monkeypatch):
    from sora_model.cli import info

    info(str(folders("2.2 image, two experts")))
    said = text_of(capsys)
    assert "Wan 2.2 of two experts, from an image" in said and "transformer_2" in said
    assert "a clip of 81 frames of 832x480 takes" in said and said.count(": fits") == 2 and "in bfloat16: " in said
    monkeypatch.setattr(machine, "available", lambda device: 100 * 2**20)
    info(str(folders("2.2 image, two experts")))
    assert re.search(r"in float32: .* and \d+ MiB: 416x240 with as many frames would fit", text_of(capsys))
    monkeypatch.setattr(machine, "available", lambda device: 1000)
    info(str(folders("2.2 image, two experts")))
    assert text_of(capsys).count("too little memory") == 2


def text_of(capsys):
    """What was printed, without the breaks of lines."""
    return " ".join(capsys.readouterr().out.split())


def only(folder, name, content):
    """A file in the place of all weights of a folder."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / name).write_bytes(content)


def a_lora():
    from safetensors.torch import save

    return save({f"blocks.0.self_attn.q.lora_{half}.weight": torch.ones(2, 2) for half in "AB"})


def first(folder):
    return next(folder.glob("*-00001-of-*"))


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (lambda d: first(d).unlink(), "-00001-of-.* is missing"),
        (lambda d: next(d.glob("*.index.json")).unlink(), "shards without their index"),
        (lambda d: only(d, "wan.gguf", b"GGUF"), "wan.gguf is a GGUF file, whose quantised weights are not read"),
        (lambda d: only(d, "wan.safetensors", b"GGUF" + bytes(99)), "is a GGUF file, whose quantised weights"),
        (lambda d: only(d, "wan.safetensors", a_lora()), "a LoRA, which changes a model's weights"),
        (lambda d: only(d, "wan.bin", b"PK"), "wan.bin is a pickle, which can run code"),
        (
            lambda d: first(d).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            "is a pointer of Git LFS, not the file itself: run `git lfs pull`",
        ),
        (lambda d: first(d).write_text("<!DOCTYPE html>"), "is a web page, as a download that failed leaves it"),
        (lambda d: first(d).write_bytes(first(d).read_bytes()[:-9]), "is not a whole safetensors file"),
    ],
)
def test_what_often_lies_in_the_place_of_weights_is_named(folders, tmp_path, mistake, said):
    from sora_model.cli import info

    folder = shutil.copytree(folders("2.1 text"), tmp_path / "wan")
    mistake(folder / "transformer")
    for look in (info, lambda path: Sora.from_pretrained(path, device="cpu")):
        with pytest.raises(CheckpointError, match=said):
            look(str(folder))


@pytest.mark.parametrize(
    ("form", "damage", "said"),
    [
        ("2.2 text, two experts", lambda d: shutil.rmtree(d / "transformer_2"), "lacks the folder 'transformer_2'"),
        (
            "2.2 text, two experts", lambda d: change_config(d / "model_index.json", boundary_ratio=None),
            "has boundary_ratio=None and a transformer_2: the one, in model_index.json, is the time",
        ),
        (
            "2.2 text, two experts", lambda d: change_config(d / "model_index.json", boundary_ratio=2),
            "boundary_ratio must be a number from 0 to 1; got 2",
        ),
        (
            "2.1 text", lambda d: change_config(d / "model_index.json", boundary_ratio=0.9),
            "has boundary_ratio=0.9 and no transformer_2",
        ),
        ("2.1 image", lambda d: shutil.rmtree(d / "image_encoder"), "lacks the folder 'image_encoder'"),
        ("2.1 image", lambda d: shutil.rmtree(d / "image_processor"), "image_processor is missing: a Wan checkpoint"),
        (
            "2.1 image", lambda d: (d / "image_encoder" / "config.json").write_text("{"),
            "image_encoder/config.json is not valid JSON",
        ),
        (
            "2.1 image", lambda d: change_config(d / "image_encoder", hidden_act="x"),
            "the image encoder in .* cannot be read",
        ),
        (
            "2.1 text", lambda d: change_config(d / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler"),
            "scheduler_config.json: the scheduler is a 'DDIMScheduler'",
        ),
        (
            "2.2 text, two experts", lambda d: next((d / "transformer_2").glob("*-00002-*")).unlink(),
            "-00002-of-.* is missing",
        ),
    ],
)  # fmt: skip
def test_damaged_folders(folders, tmp_path, form, damage, said):
    folder = shutil.copytree(folders(form), tmp_path / "wan")
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        Sora.from_pretrained(folder, device="cpu")


def test_parts_of_different_checkpoints_do_not_go_together(folders):
    two = Sora.from_pretrained(folders("2.2 text, two experts"), device="cpu")
    seeing = Sora.from_pretrained(folders("2.1 image"), device="cpu")
    parts = dict(vae=two.vae, text=two.text, defaults=two.defaults)
    with pytest.raises(CheckpointError, match="the two transformers are not of one size"):
        Sora(two.dit, second=seeing.dit, boundary=0.9, **parts)
    with pytest.raises(CheckpointError, match="sees an image of width 18, the image encoder gives None"):
        Sora(seeing.dit, **parts)
    with pytest.raises(CheckpointError, match="sees an image of width None, the image encoder gives 18"):
        Sora(two.dit, image=seeing.image, **parts)


SHORT = dict(steps=1, seconds=5 / 16, size=(32, 32))
IMAGE = np.zeros((32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("form", "call", "said"),
    [
        ("2.1 image", lambda s: s.generate(PROMPT, **SHORT), "this checkpoint makes clips from an image: give one"),
        ("2.1 image", lambda s: s.edit(IMAGE, PROMPT, **SHORT), "this checkpoint makes clips from an image: give one"),
        (
            "2.1 image", lambda s: s.extend(IMAGE, PROMPT, backward=True, **SHORT | {"seconds": 0.1}),
            "sees the first frame of a clip: it must be given",
        ),
        ("2.1 first and last", lambda s: s.animate(IMAGE, PROMPT, **SHORT), "sees the last frame of a clip: it must"),
        ("2.1 text", lambda s: s.generate(PROMPT, **SHORT, guidance=(3, 4)), "guidance must be one number, as this"),
        ("2.1 text", lambda s: s.generate(PROMPT, **SHORT, shift=0), "shift must lie between 0.001 and 1000"),
        ("2.1 text", lambda s: s.generate(PROMPT, **SHORT, negative="..."), "negative holds no word"),
    ],
)  # fmt: skip
def test_bad_requests(folders, form, call, said):
    sora = Sora.from_pretrained(folders(form), device="cpu")
    with pytest.raises((ValueError, TypeError), match=said):
        call(sora)


def test_clips_are_drawn_together_by_the_checkpoints_own_sampler(folders):
    sora = Sora.from_pretrained(folders("2.1 text"), device="cpu")
    requests = [
        dict(prompt=PROMPT, size=(32, 32), seconds=5 / 16), dict(prompt=NEGATIVE, size=(32, 48), seconds=1 / 16),
    ]  # fmt: skip
    for request, clip in zip(requests, packed.generate(sora, requests, steps=3), strict=True):
        alone = sora.generate(**request, steps=3)
        assert np.abs(clip.frames.astype(int) - alone.frames).max() <= 1 and clip.frames.std() > 1
    for form in ("2.2 text, two experts", "2.1 image"):
        with pytest.raises(ValueError, match="by checkpoints of one transformer, from text; draw these one by one"):
            packed.generate(Sora.from_pretrained(folders(form), device="cpu"), requests)


def test_what_is_asked_for_matters(folders):
    """Guidance of each expert, what it leads away from, and the shift."""
    sora = Sora.from_pretrained(folders("2.2 text, two experts"), device="cpu")
    how = SHORT | dict(steps=3, guidance=(4.0, 3.0))
    clip = sora.generate(PROMPT, **how)
    assert (sora.generate(PROMPT, **how).frames == clip.frames).all() and "guidance 4 and 3" in repr(clip)
    for change in (dict(guidance=(5.0, 3.0)), dict(guidance=(4.0, 2.0)), dict(negative=NEGATIVE), dict(shift=8.0)):
        assert (sora.generate(PROMPT, **how | change).frames != clip.frames).any(), change


def test_parts_take_turns(folders, monkeypatch):
    """Each on the device while it is at work, and no other: the same clip."""
    folder = folders("2.2 image, two experts")
    expected = Sora.from_pretrained(folder, device="cpu").animate(IMAGE, PROMPT, **SHORT | {"steps": 3}).frames
    sora = Sora.from_pretrained(folder, device="cpu", offload=True)
    names = {id(getattr(sora, name)): name for name in ("text", "dit", "second", "vae")}
    order, call = [], Turns.__call__
    monkeypatch.setattr(Turns, "__call__", lambda self, part: (order.append(names[id(part)]), call(self, part)))
    assert (sora.animate(IMAGE, PROMPT, **SHORT | {"steps": 3}).frames == expected).all()
    assert [name for name, _ in itertools.groupby(order)] == ["vae", "text", "dit", "second", "vae"]


def test_given_frames_are_coded_in_tiles_where_the_memory_is_short(folders, monkeypatch):
    sora = Sora.from_pretrained(folders("2.2 image, two experts"), device="cpu")
    video, tiles, stream = torch.rand(1, 3, 5, 64, 96), [], sora.vae.encode_stream

    def recorded(*args, tile, **kwargs):
        tiles.append(tile)
        return stream(*args, tile=tile, **kwargs)

    monkeypatch.setattr(sora.vae, "encode_stream", recorded)
    whole, asked = sora._coded(video, "auto"), []
    monkeypatch.setattr(machine, "available", lambda device: 123)
    monkeypatch.setattr(sora.vae, "fit_tile", lambda *given, impl: (asked.append(given), ((32, 40), 0))[1])
    torch.testing.assert_close(sora._coded(video, "auto"), whole, rtol=0, atol=1e-5 * whole.abs().max().item())
    assert tiles == [(64, 96), (32, 40)] and asked == [("encode", 64, 96, 123)]


def test_a_part_that_left_is_what_it_was(monkeypatch):
    """To a device whose memory is another, as a GPU's."""
    first, second = torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(4)
    turns = Turns(torch.device("cpu"), [first, second])
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device: t.clone())
    home = {id(t): t.data_ptr() for module in (first, second) for t in module.state_dict(keep_vars=True).values()}

    def away(module):
        return [t.data_ptr() != home[id(t)] for t in module.state_dict(keep_vars=True).values()]

    assert turns.largest == 16 * 4 + 8 and turns.whole == 9 * 4 + turns.largest
    turns(first)
    assert all(away(first)) and not any(away(second))
    turns(second)
    assert not any(away(first)) and all(away(second))
    turns.leave()
    assert not any(away(first) + away(second))
