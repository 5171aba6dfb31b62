"""The benchmarks of the VAE: right before fast, complete rows, and plots drawn from recorded lines."""

from __future__ import annotations

import json
import os

import pytest
import torch
from test_benchmarks import FIELDS

from benchmarks import model_memory, report, run, stream_memory, suite, targets, timing, vae_decode
from benchmarks.models import MODELS
from sora_model.vae import CausalVAE, VAEConfig

TINY = vae_decode.Case((3, 2, 3), VAEConfig(base_dim=4, z_dim=2, dim_mult=(1, 2), num_res_blocks=1,
                                            temporal_downsample=(True,)))  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(vae_decode.CASES, "toy", TINY)
    known = timing.Ceilings(2e9, {"float32": 1e12})
    monkeypatch.setattr(timing, "ceilings", lambda *_, **__: known)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)


def decode(tmp_path, *arguments):
    target = tmp_path / "rows.jsonl"
    command = ["--op", "vae_decode", "--device", "cpu", "--shape", "toy", "--budget", "0.001", "--json", str(target)]
    return run.main([*command, *arguments]), report.read_jsonl(target)


def test_a_decode_gives_complete_rows_that_the_report_takes(tmp_path, tiny, capsys):
    pytest.importorskip("diffusers")
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    status, rows = decode(folder)
    own = suite.our_impls("causal_conv3d", torch.device("cpu"))[0]
    assert status == 0 and [row["impl"] for row in rows] == [own, "diffusers"]
    assert [row["kind"] for row in rows] == ["ours", "peer"]
    for row in rows:
        assert set(row) == FIELDS and row["status"] == "ok" and row["op"] == "vae_decode" and row["family"] == "vae"
        assert 0 < row["max_error"] <= row["error_bound"] < 1e-3 and row["peak_memory"] > 0
        assert row["dims"]["frames"] == 5 and row["dims"]["height"] == 4 and row["dims"]["chunk"] == 2
    assert "frames/s" in capsys.readouterr().out
    assert "| vae_decode | toy | float32 | fwd |" in report.figures(report.load_rows(tmp_path / "results"))


def test_a_wrong_decode_gets_no_figure(tmp_path, tiny, monkeypatch):
    right = vae_decode.ours
    monkeypatch.setattr(vae_decode, "ours", lambda vae, chunk: lambda z: right(vae, chunk)(z) * (1 + 1e-4))
    status, rows = decode(tmp_path)
    assert status == 1 and rows[0]["status"] == "failed" and "exceeds its bound" in rows[0]["reason"]
    assert rows[0]["p50_us"] is None


def test_flops_are_those_of_the_convolutions():
    """Against torch's own count of the convolutions of diffusers' decoder, whose chunks convolve padding too."""
    from torch.utils.flop_counter import FlopCounterMode

    vae = CausalVAE(TINY.config).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        vae_decode.theirs(vae)(torch.zeros(1, 2, *TINY.grid))
    convolutions = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "conv" in str(op))
    assert vae_decode.flops(TINY) == pytest.approx(convolutions, rel=0.05)


def test_goals_of_decodes():
    row = {"status": "ok", "op": "vae_decode", "mode": "fwd", "kind": "ours", "percent_copy": 1, "tflop_s": 1}
    wan32 = row | {"shape": "wan-32", "dtype": "float32"}
    cpu = [wan32 | {"impl": "cpu", "p50_us": 100}, wan32 | {"impl": "diffusers", "kind": "peer", "p50_us": 140}]
    gpu = [row | {"shape": "wan-480p", "dtype": "bfloat16", "impl": "triton", "p50_us": 1e6, "dims": {"frames": 81}}]
    assert targets.shortfalls(cpu + gpu) == [
        "below its goal of 1.5 x diffusers: vae_decode cpu fwd float32 at wan-32, 1.4",
        "below its goal of 135 frames/s: vae_decode triton fwd bfloat16 at wan-480p, 81",
    ]
    step = {"status": "ok", "op": "dit", "shape": "dit-wan1.3b-step", "mode": "fwd+bwd", "dtype": "bfloat16"}
    slow = step | {"kind": "ours", "impl": "triton", "p50_us": 100}, step | {"kind": "baseline", "p50_us": 120}
    assert targets.shortfalls([slow[0], slow[1] | {"impl": "compile"}]) == [
        "below its goal of 1.3 x compile: dit triton fwd+bwd bfloat16 at dit-wan1.3b-step, 1.2"
    ]
    for op, shape, *mode in (*targets.FASTER_THAN, *targets.FRAMES_S):
        assert shape in MODELS[op].cases and set(mode) <= set(MODELS[op].modes.values())


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is read in Linux's /proc")
def test_memory_of_a_whole_model_is_measured_in_a_process_of_its_own(tmp_path):
    """Each beside the same weights on disk, which were made once."""
    pytest.importorskip("diffusers")
    target = tmp_path / "models.jsonl"
    sizes = ["--model", "tiny", "--folder", str(tmp_path), "--size", "32x64", "--json", str(target)]
    model_memory.make(tmp_path / "tiny", "tiny")
    made = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert model_memory.main(sizes) == 0
    rows = report.read_jsonl(target, model_memory.FIELDS)
    assert [row["by"] for row in rows] == ["ours", "diffusers"] and len(made) == 2
    assert {file: file.stat().st_mtime_ns for file in made} == made
    for row in rows:
        assert (row["width"], row["height"]) == (32, 64)  # in the order of the sora command
        assert 1 < row["weights_mib"] < 20 and 10 < row["peak_mib"] < 1000 and row["seconds"] > 0 and row["commit"]
    for arguments in (["--size", "30x64"], ["--frames", "4"], ["--model", "x"]):
        with pytest.raises(SystemExit):
            model_memory.main(arguments)


def test_memory_is_measured_in_a_process_of_its_own_and_drawn_from_the_lines_on_file(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    target = tmp_path / "memory.jsonl"
    sizes = ["--frames", "5", "--base", "8", "--latent", "8", "--coder", "ours", "--json", str(target)]
    assert stream_memory.main([*sizes, "--code", "decode"]) == 0
    capsys.readouterr()
    for code, vae in zip(stream_memory.CODES, stream_memory.VAES, strict=True):
        assert stream_memory.main([*sizes, "--vae", vae, "--code", code, "--tile", "32", "--here"]) == 0
        row = json.loads(capsys.readouterr().out)
        assert row["tile"] == 32 and row["code"] == code and row["seconds"] > 0 and row["commit"]
        assert row["vae"] == vae and row["pixels"] == (64 if vae == "2.1" else 128)
    (row,) = rows = report.read_jsonl(target, stream_memory.FIELDS)
    assert row["coder"] == "ours" and row["tile"] is None and row["frames"] == 5 and 4 < row["peak_mib"] < 400
    rows += [row | {"frames": 9}, row | {"coder": "diffusers"}, row | {"tile": 32}]
    for name, drawn in (("a", rows), ("b", rows), ("c", [*rows, row | {"frames": 17}])):
        stream_memory.draw(drawn, tmp_path / f"{name}.svg")
    a, b, c = ((tmp_path / f"{name}.svg").read_text() for name in "abc")
    assert a == b != c and len(a) < 100_000
    for arguments in (["--frames", "6"], ["--plot", "a.svg"], ["--plot", "a.pdf", "--json", "x"]):
        with pytest.raises(SystemExit):
            stream_memory.main(arguments)
