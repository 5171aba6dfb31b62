"""`sora patch DIR`: what would be replaced in a pipeline on disk, its traffic, and whether it agrees with the host."""

from __future__ import annotations

import json
import os
import struct

import hosts
import pytest
import torch
from hosts.wan import TINY, vae, wan
from torch import nn
from typer.testing import CliRunner

from sora_kernels.integrations import directory, patch_model
from sora_model import cli

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    parts = {"tokenizer": None, "text_encoder": None, "scheduler": None}
    diffusers.WanPipeline(**parts, vae=vae(), transformer=wan(num_layers=1)).save_pretrained(folder)
    return folder


def sora(*args):
    return CliRunner().invoke(cli.app, ["patch", *map(str, args)])


def test_a_pipeline_is_reported_part_by_part_and_verified(pipeline):
    result = sora(pipeline, "--grid", "2x3x4", "--verify")
    assert result.exit_code == 0, result.output
    assert "transformer: WanTransformer3DModel, impl='auto': 7 of 7 steps replaced" in result.output.splitlines()
    assert "vae: AutoencoderKLWan, impl='auto': 21 of 21 steps replaced" in result.output.splitlines()
    assert result.output.count("gradients within their bounds") == 2 and "PSNR" in result.output


def test_the_config_of_one_model_is_enough(pipeline):
    (part,) = directory.inspect(pipeline / "transformer", (2, 3, 4))
    assert part.verification is None and "not verified" in str(part) and not part.report.left
    assert part.before.passes > 2 * part.after.passes
    assert part.after.products == pytest.approx(part.before.products, rel=0.01)
    with pytest.raises(ValueError, match="a WanTransformer3DModel of .*config.json does not take 2x3x99 tokens"):
        list(directory.inspect(pipeline / "transformer", (2, 3, 99)))


@pytest.mark.parametrize("name", hosts.cases())
def test_a_config_of_every_known_class_is_enough(name, tmp_path):
    model = hosts.cases()[name].make()
    model.save_config(tmp_path)
    (part,) = directory.inspect(tmp_path, (4, 4, 6))
    assert part.report == patch_model(model)
    if type(model).__name__.startswith(("HunyuanVideo15", "HunyuanVideoFramepack", "Mochi")):
        assert part.before is part.after is None and "not counted, its forward depends on numbers" in str(part)
    else:
        assert part.after.passes < 0.9 * part.before.passes


def test_a_model_of_real_size_takes_no_memory(tmp_path):
    with torch.device("meta"):
        diffusers.WanTransformer3DModel(**TINY | {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 1,
            "ffn_dim": 13824, "rope_max_seq_len": 128}).save_config(tmp_path)  # fmt: skip
    small, large = (next(directory.inspect(tmp_path, (t, 45, 80))) for t in (1, 21))
    assert 20 < (large.after.passes / small.after.passes) <= 21


def test_traffic_is_what_operators_read_and_write():
    class Model(nn.Module):
        def forward(self, x, w, row):
            y = x.transpose(0, 1).contiguous()  # reads x, writes y
            y = y.add_(row.expand(6, 5))  # reads and writes y once more, and 5 values of the row
            return torch.mm(y, w)

    x, w, row = torch.randn(5, 6), torch.randn(5, 7), torch.randn(1, 5)
    found = directory.traffic(Model(), x, w, row)
    assert found == directory.Traffic(products=4 * (30 + 35 + 42), passes=4 * (2 * 30 + 30 + 5))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "must hold a model_index.json or config.json of diffusers; it has neither"),
     ("{", "must be JSON"), ("[]", "must be an object of JSON; got list"),
     (json.dumps({"_class_name": "UNet2DModel"}), "must hold one of the classes of diffusers: .*WanTransformer3DModel"),
     (json.dumps({}), "got .*: None")],
)  # fmt: skip
def test_a_folder_without_a_known_model(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        list(directory.inspect(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_layers": 10**8}, r"config.json must have at most 1000 layers; got {'num_layers': 100000000}"),
     ({"num_layers": "two"}, "no WanTransformer3DModel can be made of .*config.json; TypeError: 'str' object"),
     ({"attention_head_dim": 7}, "no WanTransformer3DModel can be made of .*config.json; AssertionError"),
     ({"patch_size": [1, 0, 2]}, "of .*config.json does not take 2x3x4 tokens; ZeroDivisionError"),
     ({"eps": "small"}, "of .*config.json does not take 2x3x4 tokens; TypeError")],
)  # fmt: skip
def test_a_config_that_its_class_stumbles_over(pipeline, tmp_path, changes, message):
    config = json.loads((pipeline / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        list(directory.inspect(tmp_path, (2, 3, 4)))


def test_json_without_an_end_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json must be JSON; maximum recursion depth"):
        list(directory.inspect(tmp_path))


@pytest.mark.parametrize("name", ["../elsewhere", "{}/elsewhere"])
def test_an_index_leads_nowhere_outside_of_its_folder(pipeline, tmp_path, name):
    (tmp_path / "elsewhere").symlink_to(pipeline / "transformer")
    (tmp_path / "folder").mkdir()
    index = {name.format(tmp_path): ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "folder" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="folder must hold one of the .*; got no models"):
        list(directory.inspect(tmp_path / "folder"))


HEADERS = {
    "empty": b"", "a pointer": b"version https://git-lfs.github.com/spec/v1", "endless": b"\xff" * 16,
    "a list": struct.pack("<Q", 2) + b"[]", "without tensors": struct.pack("<Q", 2) + b"{}",
}  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_weights_that_are_none_are_named(pipeline, tmp_path, header):
    (tmp_path / "config.json").symlink_to(pipeline / "transformer" / "config.json")
    (tmp_path / "a.safetensors").write_bytes(HEADERS[header])
    with pytest.raises(ValueError, match="a.safetensors must (be a file of safetensors|hold tensors)"):
        list(directory.inspect(tmp_path, (2, 3, 4)))


def test_weights_are_regular_files_of_safetensors_and_nothing_else_is_loaded(pipeline, tmp_path):
    (tmp_path / "config.json").symlink_to(pipeline / "transformer" / "config.json")
    (tmp_path / "._a.safetensors").write_bytes(b"of a Mac")
    (tmp_path / "a.safetensors").mkdir()
    os.mkfifo(tmp_path / "b.safetensors")
    (part,) = directory.inspect(tmp_path, (2, 3, 4))
    assert part.before is not None
    torch.save(wan(num_layers=1).state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model.safetensors"):
        list(directory.inspect(tmp_path, (2, 3, 4), verify=True))


@pytest.mark.parametrize("grid", ["2x3", "0x3x4", "axbxc", "1x2x3x4"])
def test_a_wrong_grid_is_named(pipeline, grid):
    result = sora(pipeline, "--grid", grid)
    assert isinstance(result.exception, ValueError) and f"got {grid!r}" in str(result.exception)
