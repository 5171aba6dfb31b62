"""`sora patch DIR`: what would be replaced in a pipeline on disk, its traffic, and whether it agrees with the host."""

from __future__ import annotations

import json

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
    assert "transformer: WanTransformer3DModel, impl='auto': 7 of 7 steps replaced" in result.output
    assert "vae: AutoencoderKLWan, impl='auto': 21 of 21 steps replaced" in result.output
    assert result.output.count("gradients within their bounds") == 2 and "PSNR" in result.output


def test_the_config_of_one_model_is_enough(pipeline):
    (part,) = directory.inspect(pipeline / "transformer", (2, 3, 4))
    assert part.verification is None and "not verified" in str(part) and not part.report.left
    assert part.before.passes > 2 * part.after.passes
    assert part.after.products == pytest.approx(part.before.products, rel=0.01)
    with pytest.raises(ValueError, match="a WanTransformer3DModel of this config does not take 2x3x99 tokens"):
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


@pytest.mark.parametrize("grid", ["2x3", "0x3x4", "axbxc", "1x2x3x4"])
def test_a_wrong_grid_is_named(pipeline, grid):
    result = sora(pipeline, "--grid", grid)
    assert isinstance(result.exception, ValueError) and f"got {grid!r}" in str(result.exception)
