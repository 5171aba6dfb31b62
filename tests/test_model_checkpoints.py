"""Checkpoints: which files are read, what is refused before it takes memory, dtypes, and values that are not finite."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_pipeline import change_config, edit, make_wan_directory

from sora_model import checkpoint, flow, machine, recipe, train
from sora_model.alike import checksum, sum_of_bits
from sora_model.checkpoint import FP8, CheckpointError, read_json, read_wan_directory, write_json, write_tensors
from sora_model.dit import DiTConfig, SoraDiT
from sora_model.pipeline import _PARTS, Defaults, Sora
from sora_model.text import WordTextConfig, WordTextEncoder
from sora_model.vae import CausalVAE

ROOT = Path(__file__).resolve().parent.parent
PROMPT, SHORT = "a red circle", dict(steps=1, seconds=0.6, size=(32, 32))


@pytest.fixture
def copied(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return make_wan_directory(tmp_path_factory.mktemp("wan") / "Wan-tiny")


@pytest.fixture
def quietly(recwarn):
    """The tiny model says that it was trained on other sizes."""


# --- which files are read ---


def model_of(fill: float, folder, *names: str, index: str | None = None) -> None:
    """A "model" of one tensor a file, and a config."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for k, name in enumerate(names):
        save_file({f"t{k}": torch.full((1,), fill)}, folder / name)
    if index is not None:
        write_json(folder / index, {"weight_map": {f"t{k}": name for k, name in enumerate(names)}})


SHARDS = tuple(f"-0000{k}-of-00002.safetensors" for k in (1, 2))


@pytest.mark.parametrize("index", ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"])
def test_a_sharded_variant_is_read_alone_and_gives_way_to_the_plain_weights(tmp_path, index):
    model_of(16.0, tmp_path / "m", *(f"model.fp16{shard}" for shard in SHARDS), index=index)
    assert {name: value.item() for name, value in read_wan_directory(tmp_path / "m")[1].items()} == {"t0": 16, "t1": 16}
    model_of(32.0, tmp_path / "m", *(f"model{shard}" for shard in SHARDS), index="model.safetensors.index.json")
    assert {value.item() for value in read_wan_directory(tmp_path / "m")[1].values()} == {32}


def test_one_file_and_its_variant(tmp_path):
    model_of(16.0, tmp_path / "m", "model.fp16.safetensors")
    assert read_wan_directory(tmp_path / "m")[1]["t0"] == 16
    model_of(32.0, tmp_path / "m", "model.safetensors")
    assert read_wan_directory(tmp_path / "m")[1]["t0"] == 32
    model_of(8.0, tmp_path / "m", *(f"model{shard}" for shard in SHARDS), index="model.safetensors.index.json")
    assert read_wan_directory(tmp_path / "m")[1]["t1"] == 8, "an index goes before a file"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a pointer of Git LFS, .* lfs pul"),
        (b"GGUF\3\0\0\0" + bytes(64), "is a GGUF file, whose quantised weights"),
        (b"PK\3\4" + bytes(64), "is a zip archive, as PyTorch's pickles are"),
        (b"\n<!doctype html><html>Not found</html>" + bytes(9), "is a web page, as a download that failed"),
        (bytes(64), "is not a whole safetensors file"),
    ],
)
def test_what_is_often_found_in_the_place_of_weights_is_told_by_name(content, said, tmp_path):
    model_of(1.0, tmp_path / "m", "model.safetensors")
    (tmp_path / "m" / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"model.safetensors .* bytes. {said}"):
        read_wan_directory(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.json is " + (said[3:] if any(content) else "not valid JSON")):
        read_wan_directory(tmp_path / "m")


def test_quantised_weights_alone_are_told_by_name(tmp_path):
    model_of(1.0, tmp_path / "m")
    (tmp_path / "m" / "wan2.1-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="Q4_K_M.gguf is a GGUF file"):
        read_wan_directory(tmp_path / "m")


def test_a_lora_is_no_checkpoint(tmp_path):
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is a LoRA: load the model that it changes, then load_lora, or --lora"):
        Sora.from_pretrained(tmp_path / "a.safetensors", device="cpu")


def test_what_macos_puts_beside_every_file_is_no_model(tmp_path, wan):
    folder = shutil.copytree(wan, tmp_path / "wan")
    for file in list(folder.rglob("*.*")):
        (file.parent / f"._{file.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    assert Sora.from_pretrained(folder, device="cpu").generate(PROMPT, **SHORT).frames.std() > 0
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="vae holds no .*safetensors file"):
        Sora.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    ("names", "index", "said"),
    [
        (("a.safetensors", "b.safetensors"), None, "holds 2 safetensors files or indexes, a.safetensors and b"),
        (("a.fp16.safetensors", "a.bf16.safetensors"), None, "holds 2 safetensors .*: keep the one to load"),
        (tuple(f"a{shard}" for shard in SHARDS), None, "or shards without their index"),
        (("model.bin",), None, "is a pickle"),
    ],
)
def test_weights_of_which_it_is_not_clear_what_to_read_are_refused(tmp_path, names, index, said):
    model_of(1.0, tmp_path / "m", *names, index=index)
    with pytest.raises(CheckpointError, match=said):
        read_wan_directory(tmp_path / "m")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..", "a\0b", ""])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, name):
    model_of(1.0, tmp_path / "m", index="model.safetensors.index.json")
    write_json(tmp_path / "m" / "model.safetensors.index.json", {"weight_map": {"t": name}})
    with pytest.raises(CheckpointError, match="outside its own folder|is missing|is a folder"):
        read_wan_directory(tmp_path / "m")


# --- sizes ---


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("transformer", {"layers": 2**20}, "config asks for at least .* parameters, and the weights are"),
        ("transformer", {"ffn_dim": 2**20}, "config asks for at least|should have the shape"),
        ("vae", {"decoder_base_dim": 4096}, "config asks for at least|no VAE has"),
        ("vae", {"num_res_blocks": 4096}, "config asks for at least|no VAE has"),
        ("vae", {"base_dim": 4096, "decoder_base_dim": 4}, "config asks for at least|no VAE has"),
        ("text_encoder", {"dim": 8192, "layers": 64}, "lacks|should have the shape"),
    ],
)
def test_sizes_that_are_not_those_of_the_weights_take_neither_memory_nor_time(
    copied, monkeypatch, part, changes, said
):
    """Nothing is built: the header of the weights is enough."""
    change_config(copied / part, **changes)
    monkeypatch.setattr(checkpoint, "load_into", lambda module, state, where: pytest.fail(f"{where} was built"))
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path, **options: pytest.fail(f"{path} was read"))
    built, register = [], torch.nn.Module.register_parameter

    def counted(module, name, parameter):
        built.append(parameter is not None and not parameter.is_meta)
        register(module, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", counted)
    with pytest.raises(CheckpointError, match=said):
        checkpoint.read_part(copied / part, *_PARTS[part])
    assert not any(built) and len(built) < 20_000


@pytest.mark.parametrize(
    ("part", "changes"),
    [("transformer", {"num_layers": 2**20}), ("vae", {"decoder_base_dim": 4096}), ("vae", {"num_res_blocks": 4096})],
)
def test_sizes_of_a_wan_directory_are_checked_before_they_take_memory(wan, tmp_path, monkeypatch, part, changes):
    folder = shutil.copytree(wan, tmp_path / "wan")
    change_config(folder / part, **changes)
    monkeypatch.setattr(torch.nn, "Conv3d", lambda *args, **options: pytest.fail("a layer was built"))
    with pytest.raises(CheckpointError, match="config asks for at least|no VAE has|no model has"):
        {"transformer": SoraDiT, "vae": CausalVAE}[part].from_wan(folder / part)


@pytest.mark.parametrize("layers", [2**20, 0, 2, True, "1"])
def test_the_layers_of_a_wan_text_encoder_are_those_of_its_weights(wan, tmp_path, layers):
    folder = shutil.copytree(wan, tmp_path / "wan")
    change_config(folder / "text_encoder", num_layers=layers)
    with pytest.raises(CheckpointError, match=f"num_layers must be 1, as in the weights; got {layers!r}"):
        Sora.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("change", [{"vocab_size": 2**31}, {"d_ff": 2**24}, {"relative_attention_num_buckets": 2**20}])
def test_the_sizes_of_a_wan_text_encoder_are_those_of_its_weights(wan, tmp_path, monkeypatch, change):
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(wan, tmp_path / "wan")
    change_config(folder / "text_encoder", **change)
    monkeypatch.setattr(
        transformers.UMT5EncoderModel, "from_pretrained", lambda *args, **options: pytest.fail("it was allocated")
    )
    with pytest.raises(CheckpointError, match="text_encoder: tensor .* should have the shape"):
        Sora.from_pretrained(folder, device="cpu")


# --- dtypes ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_of_our_own_is_taken_in_the_dtype_asked_for(tiny_checkpoint, quietly, dtype):
    whole, half = (Sora.from_pretrained(tiny_checkpoint, device="cpu", dtype=d) for d in (None, dtype))
    dtypes = {name: value.dtype for name, value in half.dit.named_parameters()}
    assert dtypes["blocks.0.self_attn.q.weight"] == dtypes["head.weight"] == dtype
    assert dtypes["head_table"] == dtypes["time_embedding.0.weight"] == torch.float32
    assert {value.dtype for value in whole.dit.parameters()} == {torch.float32}
    frames = [sora.generate(PROMPT, **SHORT | {"steps": 3}).frames.astype(int) for sora in (whole, half)]
    off = abs(frames[0] - frames[1])
    assert 0 < off.max() and off.mean() < 4


def test_no_source_is_refused_by_name():
    with pytest.raises(TypeError, match="source must be the folder of a checkpoint, or 'toy'; got None"):
        Sora.from_pretrained(None)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.complex64, torch.float8_e4m3fn, 16])
def test_another_dtype_is_refused_by_name(tiny_checkpoint, tmp_path, dtype):
    with pytest.raises(TypeError, match="dtype must be one of torch.float32, .* or None; got"):
        Sora.from_pretrained(tiny_checkpoint, dtype=dtype)
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    with pytest.raises(TypeError, match="dtype must be one of torch.float32, .*; got"):
        sora.save_pretrained(tmp_path / "saved", dtype=dtype)
    assert not (tmp_path / "saved").exists()


FOREIGN = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64)


@pytest.mark.parametrize("dtype", FOREIGN)
def test_weights_of_a_foreign_dtype_are_refused_by_name(copied, wan, tmp_path, dtype):
    ours, theirs = copied / "transformer" / "model.safetensors", shutil.copytree(wan, tmp_path / "wan")
    edit(ours, lambda state: state.update({"head.bias": state["head.bias"].to(dtype)}))
    with pytest.raises(CheckpointError, match="'head.bias' is .*; weights must be of torch.float32, "):
        Sora.from_pretrained(copied, device="cpu")
    parts = {"vae": "quant_conv.bias", "text_encoder": "shared.weight"}
    parts |= {} if dtype in FP8 else {"transformer": "proj_out.bias"}  # which is taken in fp8
    for part, name in parts.items():
        file = next((theirs / part).glob("*.safetensors"))
        before = file.read_bytes()
        state = load_file(file)
        save_file(state | {name: state[name].to(dtype)}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"{name}' is .*; weights must be of torch.float32, "):
            Sora.from_pretrained(theirs, device="cpu")
        file.write_bytes(before)


def test_modules_of_a_foreign_dtype_are_refused(wan):
    diffusers = pytest.importorskip("diffusers")
    for kind, ours, part in (
        (diffusers.WanTransformer3DModel, SoraDiT, "transformer"),
        (diffusers.AutoencoderKLWan, CausalVAE, "vae"),
    ):
        theirs = kind.from_pretrained(wan / part)
        next(theirs.parameters()).data = next(theirs.parameters()).data.to(torch.float8_e4m3fnuz)
        with pytest.raises(CheckpointError, match=f"{kind.__name__}: tensor .* is torch.float8_e4m3fnuz"):
            ours.from_wan(theirs)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(tiny_checkpoint, quietly, default):
    def made() -> tuple:
        sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
        noise = flow.draw_noise((3,), generator=torch.Generator().manual_seed(1))
        times = flow.sample_times(3, generator=torch.Generator().manual_seed(1))
        return sora.generate(PROMPT, **SHORT).frames, noise, times, sora.vae.latents_mean

    expected = made()
    torch.set_default_dtype(default)
    try:
        actual = made()
    finally:
        torch.set_default_dtype(torch.float32)
    assert (actual[0] == expected[0]).all()
    assert all(torch.equal(a, e) and a.dtype == e.dtype for a, e in zip(actual[1:], expected[1:], strict=True))


# --- values ---


def test_what_would_not_be_finite_in_half_precision_is_not_written(tiny_checkpoint, tmp_path):
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    sora.text.embedding.weight.data[0, 0] = 1e5
    with pytest.raises(FloatingPointError, match="cannot write text_encoder in torch.float16: .*'embedding.weight'"):
        sora.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    sora.save_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert Sora.from_pretrained(tmp_path / "saved", device="cpu").text.embedding.weight[0, 0] > 9e4
    with pytest.raises(FloatingPointError, match="'x' holds NaN or infinite"):
        write_tensors(tmp_path / "a.safetensors", {"x": torch.tensor([1.0, float("inf")])})
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: s.dit.head.bias.data.fill_(float("nan")), "transformer gives NaN or infinite latents"),
        (lambda s: s.text.norm.bias.data.fill_(float("inf")), "transformer gives NaN or infinite latents"),
        (lambda s: s.vae.decoder.conv_out.bias.data.fill_(float("nan")), "VAE gives NaN or infinite pixels"),
        (lambda s: s.vae.latents_std.fill_(float("inf")), "VAE gives NaN or infinite pixels"),
    ],
)
def test_a_clip_of_values_that_are_not_finite_is_an_error_not_a_black_clip(
    tiny_checkpoint, tmp_path, quietly, spoil, said
):
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    spoil(sora)
    with pytest.raises(FloatingPointError, match=said):
        sora.generate(PROMPT, **SHORT)
    with pytest.raises(FloatingPointError, match=said):
        sora.generate_to(tmp_path / "a.mp4", PROMPT, **SHORT)
    assert list(tmp_path.iterdir()) == []


def test_a_wan_text_encoder_that_is_not_whole_or_not_finite_is_refused(wan, tmp_path):
    folder = shutil.copytree(wan, tmp_path / "wan")
    file = folder / "text_encoder" / "model.safetensors"
    whole = load_file(file)
    for change, said in (
        (lambda state: state.pop("encoder.final_layer_norm.weight"), "lacks 1 of the .* tensors .*final_layer_norm"),
        (lambda state: state["encoder.final_layer_norm.weight"].fill_(float("nan")), "holds NaN or infinite"),
    ):
        state = {name: value.clone() for name, value in whole.items()}
        change(state)
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            Sora.from_pretrained(folder, device="cpu")


DEFAULTS = dict(frames=17, size=(64, 64), fps=8.0, steps=20, guidance=5.0, shift=3.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frames", 0), ("frames", True), ("frames", "17"), ("size", 64), ("size", (64,)), ("size", (64, 0)), ("fps", 0),
        ("fps", float("nan")), ("steps", 10**5), ("guidance", None), ("guidance", float("inf")), ("guidance", ()),
        ("guidance", (1, 2, 3)), ("shift", 0), ("shift", float("inf")), ("shift", 10**400),
    ],
)  # fmt: skip
def test_defaults_name_what_is_wrong(copied, name, value):
    with pytest.raises(ValueError, match=f"{name} must be "):
        Defaults(**DEFAULTS | {name: value})
    index = read_json(copied / "model_index.json") | {name: value}
    (copied / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"model_index.json does not describe a Defaults: {name} must be "):
        Sora.from_pretrained(copied, device="cpu")


def test_guidance_of_two_transformers_in_a_checkpoint_of_one_is_refused(copied):
    """It was read, and every clip ended with a TypeError."""
    write_json(copied / "model_index.json", read_json(copied / "model_index.json") | {"guidance": [3.0, 4.0]})
    with pytest.raises(CheckpointError, match="guidance must be one number for one transformer"):
        Sora.from_pretrained(copied, device="cpu")


@pytest.mark.parametrize("part", [5, True, "x", [], ["diffusers", "WanTransformer3DModel"], {}])
def test_a_second_transformer_that_is_not_there_is_missed(wan, tmp_path, part):
    folder = shutil.copytree(wan, tmp_path / "wan")
    write_json(folder / "model_index.json", read_json(folder / "model_index.json") | {"transformer_2": part})
    with pytest.raises(CheckpointError, match="lacks the folder 'transformer_2' of a Wan checkpoint"):
        Sora.from_pretrained(folder, device="cpu")


def test_tokens_that_the_text_encoder_lacks_are_refused(wan, tmp_path):
    folder = shutil.copytree(wan, tmp_path / "wan")
    file = folder / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["red"] = 4096
    file.write_text(json.dumps(tokenizer))
    sora = Sora.from_pretrained(folder, device="cpu")
    with pytest.raises(CheckpointError, match="up to number 4096; the text encoder takes 512 of"):
        sora.generate(PROMPT, **SHORT)


# --- patches in time ---


@pytest.mark.parametrize("patch", [2, 3])
def test_patches_of_several_frames_generate_clips_of_any_length(quietly, monkeypatch, patch):
    torch.manual_seed(0)
    sizes = dict(dim=24, heads=2, layers=1, ffn_dim=32, in_channels=4, out_channels=4, text_dim=16)
    dit = SoraDiT(DiTConfig(**sizes, patch=(patch, 2, 2)))
    torch.nn.init.normal_(dit.head.weight, std=0.3)
    vae = CausalVAE(train.VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1))
    text = train.WordTextEncoder(train.WordTextConfig(words=train.world.VOCABULARY, dim=16))
    sora = Sora(dit, vae, text, recipe.load().defaults)
    for frames in (1, 2, 5, 6, 13, 14):
        clip = sora.generate(PROMPT, steps=1, size=(32, 32), seconds=frames / 8)
        assert len(clip.frames) == frames and clip.frames.std() > 0
    memory = sora._memory(sora._padded(9), 32, 32, "auto", True, 1 << 40)[1]
    monkeypatch.setattr(machine, "available", lambda device: memory)
    with pytest.raises(machine.TooLargeError, match="frames at this size") as caught:
        sora.generate(PROMPT, steps=1, size=(32, 32), seconds=40)
    offered = int(str(caught.value).split(" frames at this size")[0].split()[-1])
    assert len(sora.generate(PROMPT, steps=1, size=(32, 32), seconds=offered / 8).frames) == offered


@pytest.mark.parametrize("kind", ["Sora.from_pretrained({own!r}, device='cpu')", "SoraDiT.from_wan({wan!r})"])
def test_reading_a_checkpoint_does_not_import_the_compiler(kind, tiny_checkpoint, wan, tmp_path):
    """That of PyTorch, which draws numbers on the meta device: 150 MiB, and as long as torch itself."""
    script = f"""
import sys
from sora_model import Sora, SoraDiT
{kind.format(own=str(tiny_checkpoint), wan=str(wan / "transformer"))}
found = sys.modules.keys() & {{"torch._dynamo", "sympy", "triton", "torch.onnx"}}
assert not found, found
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_what_is_made_without_memory_has_the_shapes_and_leaves_the_generator_as_it_was():
    config, before = WordTextConfig(words=("a", "b"), dim=8), torch.get_rng_state()
    with checkpoint.unfilled():
        empty = WordTextEncoder(config).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert {value.device.type for value in empty.values()} == {"meta"}
    filled = WordTextEncoder(config).state_dict()
    assert {name: value.shape for name, value in filled.items()} == {name: value.shape for name, value in empty.items()}
    assert filled["position"].std() > 0 and filled["embedding.weight"].std() > 0.5, "outside, numbers are drawn"


class Kept(torch.nn.Module):
    def __init__(self, *tensors):
        super().__init__()
        for i, t in enumerate(tensors):
            self.register_buffer(f"t{i}", t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("size", [(), (0,), (1,), (7,), (5, 13)])
def test_a_checksum_tells_every_bit_apart_wherever_the_values_lie(dtype, size):
    octets = torch.randint(256, (sum(size) * 16 + 8, 8), dtype=torch.uint8)
    t = octets.flatten().view(torch.uint8 if dtype == torch.bool else dtype)[: torch.Size(size).numel()].view(size)
    t = t > 99 if dtype == torch.bool else t
    found = checksum(Kept(t))
    apart = torch.cat([t.new_zeros(1) if t.dtype != torch.float8_e4m3fn else t.flatten()[:1], t.flatten()])
    strided = torch.stack([t.flatten()] * 3, 1)[:, 1].view(size) if t.numel() else t
    assert checksum(Kept(strided)) == found and checkpoint.fingerprint(Kept(strided)) == checkpoint.fingerprint(Kept(t))
    assert sum_of_bits(apart[len(apart) - t.numel() :]) == sum_of_bits(t)
    if t.numel():
        other = t.clone()
        if dtype == torch.bool:
            other.view(-1)[-1] ^= True
        else:
            other.view(-1)[-1:].view(torch.uint8)[0] ^= 1
        assert checksum(Kept(other)) != found
    assert checksum(Kept(t[None])) != found and checksum(Kept(t, t)) != found
    assert checksum(Kept(t, torch.empty(3, device="meta"))) == found
