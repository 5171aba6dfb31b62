"""The `sora` command: what it writes, what it says, and how it fails."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model_pipeline import make_wan_directory

import sora_kernels
from sora_model import cli, demo, evaluate, media, train, world
from sora_model.files import write_atomically
from sora_model.pipeline import Sora


@pytest.fixture
def sora(monkeypatch, tmp_path, capsys):
    """Runs the command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sora", *map(str, arguments)])
        # the consoles of the module were bound to the streams of another test
        for name, stderr in (("out", False), ("err", True)):
            monkeypatch.setattr(cli, name, cli.Console(stderr=stderr, width=200))
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_generate_writes_the_clip_that_python_makes(sora, tiny_checkpoint, tmp_path):
    code, out, err = sora(
        "generate", "a red circle, an elephant", "--weights", tiny_checkpoint, "--out", "a.mp4",
        "--seconds", 0.6, "--size", "48x32", "--fps", 10, "--seed", 4, "--steps", 2, "--guidance", 1.5,
        "--attention", "window=1x2x2", "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and "wrote a.mp4" in out
    assert "does not know: elephant" in err
    info = media.probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.frames, info.fps) == (48, 32, 6, 10.0)
    same = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    with pytest.warns(UserWarning, match="elephant"):
        clip = same.generate(
            "a red circle, an elephant", seconds=0.6, size=(32, 48), fps=10, seed=4, steps=2, guidance=1.5,
            attention="window=1x2x2",
        )  # fmt: skip
    written = np.stack(list(media.read_video(tmp_path / "a.mp4")))
    other = same.generate("a red circle", seconds=0.6, size=(32, 48), fps=10, seed=5, steps=2, guidance=1.5)
    off, apart = (np.abs(written.astype(int) - made.frames).mean() for made in (clip, other))
    assert off < 0.75 * apart


def test_generate_takes_a_wan_directory(sora, tmp_path):
    folder = make_wan_directory(tmp_path / "Wan-tiny")
    code, out, err = sora(
        "generate", "a red circle bounces", "--weights", folder, "--out", "wan.mp4", "--device", "cpu",
        "--seconds", 0.5, "--size", "48x32", "--fps", 10, "--seed", 3, "--steps", 2,
    )  # fmt: skip
    assert code == 0 and "wrote wan.mp4" in out, err
    info = media.probe(tmp_path / "wan.mp4")
    assert (info.width, info.height, info.frames, info.fps) == (48, 32, 5, 10.0)
    same = Sora.from_pretrained(folder, device="cpu")
    options = dict(seconds=0.5, size=(32, 48), fps=10, steps=2)
    clip, other = (same.generate("a red circle bounces", seed=seed, **options) for seed in (3, 4))
    written = np.stack(list(media.read_video(tmp_path / "wan.mp4")))
    clip.save(tmp_path / "python.mp4")
    other.save(tmp_path / "other.mp4")
    through_h264 = [np.stack(list(media.read_video(tmp_path / name))) for name in ("python.mp4", "other.mp4")]
    off, apart = (np.abs(written.astype(int) - frames).mean() for frames in through_h264)
    assert off < 0.1 * apart
    shutil.rmtree(folder / "vae")
    code, out, err = sora("generate", "a red circle", "--weights", folder, "--out", "none.mp4")
    assert code == 1 and "lacks the folder 'vae'" in err and not (tmp_path / "none.mp4").exists()


def test_generate_makes_the_default_folder(sora, tiny_checkpoint, tmp_path):
    code, _, _ = sora("generate", "a ring", "--weights", tiny_checkpoint, "--steps", 1, "--seconds", 0.1)
    assert code == 0 and media.probe(tmp_path / "out" / "clip.mp4").frames == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["", "--out", "a.mp4"], "no word"),
        (["red " * 2000, "--out", "a.mp4"], "characters; at most 4096"),
        (["a ring", "--size", "64"], "--size must be WIDTHxHEIGHT"),
        (["a ring", "--size", "-64x64"], "--size must be WIDTHxHEIGHT"),
        (["a ring", "--size", "65x64"], "width must be a multiple of 16, got 65; 64 or 80"),
        (["a ring", "--size", "999999999x64"], "from 16 to 8192"),
        (["a ring", "--seconds", "-1"], "seconds must lie between"),
        (["a ring", "--seconds", "nan"], "seconds must lie between"),
        (["a ring", "--steps", "0"], "steps must lie between"),
        (["a ring", "--size", "4096x4096", "--seconds", "3600"], "would fit"),
        (["a ring", "--impl", "warp"], "impl must be one of"),
        (["a ring", "--attention", "window=3"], "attention must be 'full', or settings such as"),
        (["a ring", "--impl", "cuda", "--steps", "1", "--device", "cpu"], "cuda"),
        (["a ring", "--out", "nowhere/a.mp4"], "no folder 'nowhere'"),
        (["a ring", "--out", "a.avi"], "must end in .mp4"),
        (["a ring", "--out", "folder.mp4"], "not a regular file"),
        (["a ring", "--weights", "none"], "there is no checkpoint at none"),
        (["a ring", "--weights", "model.ckpt"], "is a pickle, which can run code"),
        (["a ring", "--device", "abacus"], "device must be 'cpu' or 'cuda', got 'abacus'"),
    ],
)
def test_a_mistake_is_one_line_and_a_code_and_leaves_nothing(sora, tiny_checkpoint, tmp_path, arguments, said):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    before = sorted(tmp_path.iterdir())
    weights = [] if "--weights" in arguments else ["--weights", tiny_checkpoint]
    to = [] if "--out" in arguments else ["--out", "a.mp4"]
    code, out, err = sora("generate", *arguments, *weights, *to)
    assert code == 1 and not out
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and said in lines[0], err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(sora, tiny_checkpoint, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = sora("generate", "a ring", "--weights", tiny_checkpoint, "--out", "locked/a.mp4")
    assert code == 1 and "cannot write 'locked/a.mp4'" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_leaves_nothing(sora, tiny_checkpoint, tmp_path, monkeypatch, number):
    before = signal.signal(number, signal.SIG_DFL)

    def told(self, path, prompt, **options):
        with write_atomically(path) as part:
            part.write_bytes(b"half")
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Sora, "generate_to", told)
    try:
        code, out, _ = sora("generate", "a ring", "--weights", tiny_checkpoint, "--out", "a.mp4")
    finally:
        signal.signal(number, before)
    assert code == 128 + number and not out and list(tmp_path.iterdir()) == []


def test_a_transformer_is_trained_on_the_vae_of_a_finished_checkpoint(sora, tiny_checkpoint, tmp_path, monkeypatch):
    """Of which there is no run, and so no settings and no log."""
    dit = dataclasses.replace(train.DIT["toy"], dim=24, heads=2, layers=1, ffn_dim=32, text_dim=16)
    monkeypatch.setitem(train.DIT, "toy", dit)
    arguments = ("train", "dit", "--run", "dit", "--vae", tiny_checkpoint / "vae", "--steps", 1, "--batch", 1)
    code, _, err = sora(*arguments, "--clips", 1, "--checkpoint", "made")
    assert code == 0, err
    record = json.loads((tmp_path / "made" / "training.json").read_text())
    assert record["vae"] == str(tiny_checkpoint / "vae") and record["dit"]["batch"] == 1
    assert not (tmp_path / "made" / "vae_log.jsonl").exists()
    (tmp_path / "file").touch()
    code, _, err = sora(*arguments, "--clips", 1, "--checkpoint", "file")
    assert code == 1 and "cannot write 'file': File exists" in err
    for wrong in (("--clips", 2**33), ("--seed", 2**40), ("--lr", "inf"), ("--device", "abacus")):
        code, _, err = sora(*arguments, "--clips", 1, *wrong)
        assert code == 1 and err.startswith(f"error: {wrong[0][2:]} must "), err


@pytest.mark.parametrize("arguments", [["fly"], ["generate"], ["generate", "a", "--steps", "many"], ["train", "gan"]])
def test_wrong_usage_exits_with_2(sora, arguments):
    code, _, err = sora(*arguments)
    assert code == 2 and "Traceback" not in err


def test_the_commands_train_resume_evaluate_and_describe(sora, tmp_path, monkeypatch):
    vae = train.VAEConfig(base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
    monkeypatch.setattr(
        train, "TOY_VAE", {k: getattr(vae, k) for k in ("base_dim", "z_dim", "dim_mult", "num_res_blocks")}
    )
    dit = dataclasses.replace(train.DIT["toy"], dim=24, heads=2, layers=1, ffn_dim=32, text_dim=16)
    monkeypatch.setitem(train.DIT, "toy", dit)
    monkeypatch.setattr(world, "eval_prompts", lambda: PROMPTS)
    true_clips = evaluate._true_clips
    monkeypatch.setattr(evaluate, "_true_clips", lambda sora, count: true_clips(sora, 3))
    assert sora("train", "vae", "--run", "vae", "--steps", 2, "--batch", 4)[0] == 0
    arguments = ("--run", "dit", "--vae", "vae", "--checkpoint", "made", "--batch", 4, "--clips", 4)
    for steps in (2, 3):  # the second run resumes the first
        code, _, err = sora("train", "dit", *arguments, "--steps", steps)
        assert code == 0, err
    record = json.loads((tmp_path / "made" / "training.json").read_text())
    assert record["step"] == 3 and record["dit"]["steps"] == 3 and record["vae"]["batch"] == 4
    code, _, err = sora(
        "train", "dit", "--run", "dit", "--vae", "vae", "--lr", 0.5, "--steps", 3, "--batch", 4, "--clips", 4
    )
    assert code == 1 and "begun with lr=" in err
    code, _, err = sora("train", "dit", "--run", "other", "--vae", "none")
    assert code == 1 and "missing" in err

    code, out, err = sora("eval", "--weights", "made", "--out", "eval.json", "--steps", 1)
    assert code == 0, err
    assert "of unseen pairs" in out
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["prompts"] == 2 and result["steps"] == 1 and result["floor"]["colour"] == 1.0

    code, out, err = sora("info", "--weights", "made")
    assert code == 0 and "transformer" in out and "made for 64x64, 17 frames at 8 per second" in out


PROMPTS = [
    ("a red ball", {"scene": "bounce", "colour": "red", "shape": "circle", "direction": None, "reappears": None}),
    ("a blue ring", {"scene": "bounce", "colour": "blue", "shape": "ring", "direction": "left", "reappears": None}),
]


def test_evaluate_scores_a_perfect_model_with_the_read_out_floor(tiny_checkpoint):
    """Clips of the world itself, in the place of generated ones, must score as the floor does."""
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    prompts = []
    for seed in range(12):
        sample = world.sample(seed, scene="bounce")
        expected = {
            "colour": sample.scene.colour,
            "shape": sample.scene.shape,
            "direction": None,
            "held_out": seed == 0,
        }
        prompts.append((str(seed), expected))

    class Perfect:
        defaults, vae, device = sora.defaults, sora.vae, sora.device

        def generate(self, prompt, **options):
            return dataclasses.make_dataclass("Made", ["frames", "fps"])(
                world.sample(int(prompt), scene="bounce").video, 8
            )

    result = evaluate.evaluate(Perfect(), prompts=prompts, true_clips=4)
    assert result["score"] == {"colour": 1.0, "shape": 1.0, "moves": None, "reappears": None}
    wrong = [(prompt, expected | {"colour": "none"}) for prompt, expected in prompts]
    assert evaluate.evaluate(Perfect(), prompts=wrong, true_clips=1)["score"]["colour"] == 0.0


def test_bench_passes_its_arguments_on_or_says_what_is_missing(sora, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    code, _, err = sora("bench", "--op", "norm_modulate")
    assert code == 1 and "run this in a checkout" in err
    called = []
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        cli.subprocess,
        "run",
        lambda command, check: called.append(command) or subprocess.CompletedProcess(command, 3),
    )
    assert sora("bench", "--op", "norm_modulate", "--help")[0] == 3
    assert called == [[sys.executable, "-m", "benchmarks.run", "--op", "norm_modulate", "--help"]]


def test_the_module_runs_as_a_program(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "sora_model.cli", "generate", "?!", "--weights", str(tiny_checkpoint)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: prompt holds no word") and not done.stdout
    assert shutil.which("sora") is None or not done.stderr.count("Traceback")


def test_the_demo_makes_the_clip_and_tells_a_wrong_operation_from_a_right_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SECONDS_PER_OP", 1e-3)
    monkeypatch.setattr(demo, "COMPILE_BUDGET_S", 0)
    monkeypatch.setenv("PROMPT", "A red circle, bounces/../!")
    with pytest.raises(SystemExit) as done:
        demo.main()
    assert done.value.code == 0
    assert media.probe(tmp_path / "out" / "a-red-circle-bounces.mp4").frames == 17

    def slightly_wrong(op, impl="auto", **arguments):
        return op(**arguments, impl=impl) * (1 if impl == "reference" else 1.001)

    for name in ("gate_residual", "norm_silu"):
        monkeypatch.setattr(sora_kernels, name, functools.partial(slightly_wrong, getattr(sora_kernels, name)))
    console = cli.Console(record=True, width=100, file=io.StringIO())
    assert demo.table(console) == ["gate_residual", "norm_silu"]
    printed = console.export_text()
    assert "beyond its bound: gate_residual, norm_silu" in printed
    assert all(op in printed for op in demo.cases(torch.device("cpu")))

    monkeypatch.setenv("PROMPT", "?!")
    with pytest.raises(SystemExit) as done:
        demo.main()
    assert done.value.code == 1
