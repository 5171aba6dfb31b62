"""`sora info` of a copy of Wan: names and shapes in the files' headers against the configs, and no weight is read."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model_dit import original, wan
from test_model_pipeline import change_config
from test_model_vae import original as original_vae
from test_model_wan import a_lora, folders, text, text_of  # noqa: F401

from sora_model import wan_check
from sora_model.checkpoint import CheckpointError
from sora_model.cli import info
from sora_model.pipeline import Sora

AGREE = "names and shapes of the tensors are those that the configs ask for"


def state_of(folder):
    state = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    return state


def kept(folder, state):
    """The weights of a folder, in one file."""
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(state, folder / "model.safetensors")


@pytest.fixture
def copied(folders, tmp_path):  # noqa: F811
    return lambda form: shutil.copytree(folders(form), tmp_path / "wan")


@pytest.mark.parametrize("form", ["2.1 first and last", "2.2 text, two experts", "2.2 small, image"])
def test_whole_copies_are_told_and_no_weight_is_read(copied, form, capsys, monkeypatch):
    folder = copied(form)
    monkeypatch.setattr("sora_model.checkpoint.read_tensors", lambda *a, **how: pytest.fail("weights were read"))
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", None)
    info(str(folder))
    assert AGREE in text_of(capsys)


PARTS = {  # part -> a form that has it, a tensor of it, and one of two axes
    "transformer": ("2.1 text", "blocks.1.attn1.to_q.bias", "blocks.0.ffn.net.2.weight"),
    "transformer_2": ("2.2 text, two experts", "scale_shift_table", "proj_out.weight"),
    "vae": ("2.1 text", "decoder.conv_in.bias", "encoder.conv_in.weight"),
    "text_encoder": ("2.1 text", "encoder.final_layer_norm.weight", "shared.weight"),
    "image_encoder": ("2.1 image", "pre_layrnorm.bias", "encoder.layers.0.mlp.fc1.weight"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("look", [info, lambda path: Sora.from_pretrained(path, device="cpu")], ids=["info", "load"])
def test_what_a_part_lacks_or_has_in_another_shape_is_named(copied, part, look, capsys):
    """And nothing else."""
    form, lost, matrix = PARTS[part]
    folder = copied(form)
    state = state_of(folder / part)
    kept(folder / part, {name: value for name, value in state.items() if name != lost})
    with pytest.raises(CheckpointError, match=rf"{part} is .* lacks 1 of the .* tensors \('.*\w+'\) and has 0 unknown"):
        look(str(folder))
    kept(folder / part, state | {matrix: state[matrix][:-1].clone()})
    said = rf"{part}: tensor .* should have the shape .*, but has \({len(state[matrix]) - 1}, "
    with pytest.raises(CheckpointError, match=said):
        look(str(folder))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("part", PARTS)
def test_what_is_too_much_is_named_at_most_ten_times(copied, part, capsys):
    folder = copied(PARTS[part][0])
    kept(folder / part, state_of(folder / part) | {f"more.{i:02}": torch.zeros(1) for i in range(12)})
    if part.endswith("encoder"):  # of which transformers reads what it knows
        info(str(folder))
        told = text_of(capsys)
        assert f"{part} holds 12 tensors that nothing reads" in told and AGREE in told
    else:
        with pytest.raises(CheckpointError, match="has 12 unknown ones") as error:
            info(str(folder))
        told = str(error.value)
    assert len(re.findall(r"'more\.\d\d'", told)) == 10 and "'more.09', ..." in told


def test_a_tied_embedding_may_be_kept_under_either_name_or_both(copied, capsys):
    folder = copied("2.1 text")
    state = state_of(folder / "text_encoder")
    table = state.pop("shared.weight")
    for names in (("encoder.embed_tokens.weight",), ("shared.weight", "encoder.embed_tokens.weight")):
        kept(folder / "text_encoder", state | {name: table.clone() for name in names})
        info(str(folder))
        assert AGREE in text_of(capsys)
    kept(folder / "text_encoder", state)
    with pytest.raises(CheckpointError, match="text_encoder is .* it lacks 2 of"):
        info(str(folder))


def test_an_image_encoder_of_older_names_agrees(copied, capsys):
    folder = copied("2.1 image")
    state = state_of(folder / "image_encoder")
    kept(folder / "image_encoder", {f"vision_model.{name}": value for name, value in state.items()})
    info(str(folder))
    assert AGREE in text_of(capsys)
    assert Sora.from_pretrained(folder, device="cpu").image.dim == 18
    change_config(folder / "image_encoder", num_hidden_layers=2**20)
    with pytest.raises(CheckpointError, match="num_hidden_layers must be 3, as in the weights; got 1048576"):
        info(str(folder))


# --- one file, or the folder of one model ---


def of_wan():
    """A transformer by Wan's own names, with heads of 128."""
    return {original(name): value for name, value in wan(attention_head_dim=128).state_dict().items()}


def saved(tmp_path, state, name="wan.safetensors"):
    save_file(state, tmp_path / name)
    return tmp_path / name


def test_a_file_by_wans_own_names_says_what_it_is(tmp_path, capsys):
    for prefix in ("", "model.diffusion_model."):
        info(str(saved(tmp_path, {f"{prefix}{name}": value for name, value in of_wan().items()})))
        told = text_of(capsys)
        assert "is a transformer of Wan: 2 layers of width 256, from 4 to 4 latent channels" in told
        assert "one model. In Python SoraDiT.from_wan" in told


def test_the_vaes_own_file_too(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    state = diffusers.AutoencoderKLWan(base_dim=4, num_res_blocks=2).state_dict()
    own = {original_vae(name, False): value for name, value in state.items()}
    info(str(saved(tmp_path, own, "vae.safetensors")))
    assert "is a VAE of Wan: 16 latent channels of 8x8 pixels, 194 tensors" in text_of(capsys)
    del own["decoder.head.2.bias"]
    with pytest.raises(CheckpointError, match=r"vae.safetensors is .* it lacks 1 of the 194 .*'decoder.conv_out.bias'"):
        info(str(saved(tmp_path, own, "vae.safetensors")))


def test_a_folder_of_one_model_says_what_it_is(copied, tmp_path, capsys):
    folder = copied("2.2 small, image")
    for part, said in (("transformer", "transformer of Wan: 2 layers of width 24"), ("vae", "VAE of Wan: 6 latent")):
        info(str(folder / part))
        assert f"{part} is a {said}" in text_of(capsys)
        with pytest.raises(CheckpointError, match=f"{part} holds one model, not a checkpoint .* `sora info` says"):
            Sora.from_pretrained(folder / part, device="cpu")
    state = state_of(folder / "transformer")
    kept(folder / "transformer", {name: value for name, value in state.items() if "blocks.1" not in name})
    with pytest.raises(CheckpointError, match=r"lacks 27 of the .* \('blocks.1.cross_attn.k.bias', .*, \.\.\.\)"):
        info(str(folder / "transformer"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n"), "is a pointer of Git LFS"),
        (lambda p: p.write_bytes(b"GGUF" + bytes(99)), "is a GGUF file, whose quantised weights are not read here"),
        (lambda p: p.write_bytes(a_lora()), "is a LoRA, which changes a model's weights: load the model, then"),
        (lambda p: (save_file(of_wan(), p), cut(p)), "is not a whole safetensors file: .* it is truncated"),
        (lambda p: save_file({"unet.weight": torch.zeros(1)}, p), "holds no model of Wan: its first tensor is 'unet.w"),
        (
            lambda p: save_file({n: v for n, v in of_wan().items() if "ffn.2" not in n}, p),
            r"lacks 4 of the .* tensors \('blocks.0.ffn.2.bias', .*\) and has 0 unknown",
        ),
        (
            lambda p: save_file(of_wan() | {"blocks.1.vace.weight": torch.zeros(1)}, p),
            r"lacks 0 of the .* has 1 unknown ones \('blocks.1.vace.weight'\)",
        ),
    ],
)  # fmt: skip
def test_what_often_lies_in_the_place_of_a_file_is_named(make, said, tmp_path):
    make(path := tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match=said):
        info(str(path))


def test_one_shard_is_not_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="one of several shards of a model: give their folder"):
        wan_check.look(saved(tmp_path, of_wan(), "wan-00001-of-00002.safetensors"))
