"""The `sora` command: what it writes, what it says, and how it fails."""

from __future__ import annotations

import base64
import dataclasses
import functools
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model_pipeline import make_wan_directory

import sora_kernels
from benchmarks import shapes
from sora_kernels import _library
from sora_model import cli, demo, evaluate, evaluate_long, evaluate_verbs, media, reconstruct, train, world
from sora_model.files import write_atomically
from sora_model.pipeline import Sora
from sora_model.safety import credentials

ROOT = Path(__file__).parents[1]


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
        (["a ring", "--out", "folder.mp4"], "what is there is a folder"),
        (["a ring", "--weights", "none"], "there is no checkpoint at none"),
        (["a ring", "--weights", "model.ckpt"], "is a pickle, which can run code"),
        (["a ring", "--device", "abacus"], "device must be 'cpu' or 'cuda', got 'abacus'"),
        (["a ring", "--device", "meta"], "device must be 'cpu' or 'cuda', got 'meta'"),
        (["a ring", "--device", "mps"], "device must be 'cpu' or 'cuda', got 'mps'"),
        (["a ring", "--device", ""], "device must be 'cpu' or 'cuda', got ''"),
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


TINY = (
    "vae={base_dim: 4, z_dim: 4, dim_mult: [1, 1, 1, 1], num_res_blocks: 1, temporal_downsample: [false, true, true]}",
    "dit={dim: 24, heads: 2, layers: 1, ffn_dim: 32, in_channels: 4, out_channels: 4, text_dim: 16}",
    "buckets=[{frames: 5, size: [32, 32]}]", "draws=2",
)  # fmt: skip


def test_a_transformer_is_trained_on_the_vae_of_a_finished_checkpoint(sora, tiny_checkpoint, tmp_path, monkeypatch):
    """Of which there is no run, and so no settings and no log."""
    arguments = ("train", "dit", *TINY, "dit_fit.steps=1", "dit_fit.batch=1", "--run", "dit")
    arguments += ("--vae", tiny_checkpoint / "vae")
    code, _, err = sora(*arguments, "--checkpoint", "made")
    assert code == 0, err
    record = json.loads((tmp_path / "made" / "training.json").read_text())
    assert record["vae"] == str(tiny_checkpoint / "vae") and record["dit"]["batch"] == 1
    assert not (tmp_path / "made" / "vae_log.jsonl").exists()
    assert (tmp_path / "dit" / "samples" / "000001.png").exists()
    assert json.loads((tmp_path / "dit" / "settings.json").read_text())["dtype"] == "torch.float32"
    seen, plain = [], train.train_dit
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_dit", lambda *args, **options: seen.append(options) or plain(*args, **options))
        code, _, err = sora(*arguments[:-4], "--run", "half", *arguments[-2:], "--dtype", "bf16", "--checkpointing",
                            "--checkpoint", "made")  # fmt: skip
    assert code == 0, err
    assert seen[0]["dtype"] == torch.bfloat16 and seen[0]["checkpointing"]
    assert json.loads((tmp_path / "half" / "settings.json").read_text())["dtype"] == "torch.bfloat16"
    (tmp_path / "file").touch()
    code, _, err = sora(*arguments, "--checkpoint", "file")
    assert code == 1 and "cannot write 'file': File exists" in err
    for wrong, said in (
        (["dit_fit.seed=1099511627776"], "seed must"), (["dit_fit.lr=.inf"], "lr must"), (["fit=1"], "KEY=VALUE"),
        (["--device", "abacus"], "device must"), (["--dtype", "fp8"], "dtype must be one of fp32, bf16, auto"),
        (["--config", "none.yaml"], "there is no file none.yaml"), (["--start", "none"], "no checkpoint at none"),
    ):  # fmt: skip
        code, _, err = sora(*arguments, *wrong)
        assert code == 1 and err.startswith("error: ") and said in err, err


def test_world_render_writes_clips_and_their_truth(sora, tmp_path):
    arguments = ("--n", 2, "--seed", 3, "--size", "48x32", "--seconds", 1, "--out", "made/here")
    code, out, err = sora("world", "render", "--scene", "occluder", "--style", "neon", *arguments)
    assert code == 0, err
    for seed in (3, 4):
        clip = world.sample(seed, scene="occluder", frames=8, size=(32, 48), prompt_spec={"style": "neon"})
        truth = json.loads((tmp_path / "made" / "here" / f"occluder-{seed}.json").read_text())
        assert truth["caption"] == clip.caption in out and truth["position"] == clip.state.position.tolist()
        frames = np.stack(list(media.read_video(tmp_path / "made" / "here" / f"occluder-{seed}.mp4")))
        assert frames.shape == clip.video.shape and np.abs(frames.astype(int) - clip.video).mean() < 8
    for wrong in (("--scene", "juggle"), ("--style", "oil"), ("--size", "0x8"), ("--seconds", "-1"), ("--fps", "nan"),
                  ("--split", "test"), ("--size", "9x900")):  # fmt: skip
        code, _, err = sora("world", "render", *wrong)
        assert code == 1 and len(err.splitlines()) == 1 and wrong[0].strip("-")[:4] in err.lower(), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["fly"], ["generate"], ["generate", "a", "--steps", "many"], ["train", "gan"]])
def test_wrong_usage_exits_with_2(sora, arguments):
    code, _, err = sora(*arguments)
    assert code == 2 and "Traceback" not in err


def test_the_commands_train_resume_evaluate_and_describe(sora, tmp_path, monkeypatch):
    monkeypatch.setattr(world, "eval_prompts", lambda each: PROMPTS)
    true_clips = evaluate._true_clips
    monkeypatch.setattr(evaluate, "_true_clips", lambda sora, count, size: true_clips(sora, 3, size))
    assert sora("train", "vae", *TINY, "vae_fit.steps=2", "vae_fit.batch=4", "--run", "vae")[0] == 0
    arguments = ("train", "dit", *TINY, "dit_fit.batch=2", "--run", "dit", "--vae", "vae", "--checkpoint", "made")
    for steps in (2, 3):  # the second run resumes the first
        code, _, err = sora(*arguments, f"dit_fit.steps={steps}")
        assert code == 0, err
    record = json.loads((tmp_path / "made" / "training.json").read_text())
    assert record["step"] == 3 and record["dit"]["steps"] == 3 and record["vae"]["batch"] == 4
    code, _, err = sora(*arguments, "dit_fit.lr=0.5")
    assert code == 1 and "begun with lr=" in err
    code, _, err = sora("train", "dit", "--run", "other", "--vae", "none")
    assert code == 1 and "missing" in err

    monkeypatch.setattr(world, "SCENES", ("occluder", "bite"))
    monkeypatch.setattr(evaluate_verbs, "SCENES", ("loop",))
    monkeypatch.setattr(evaluate_long, "SCENES", ("occluder",))
    arguments = ("--steps", 1, "--continuations", 1, "--occlusions", 1, "--long", 4, "--sizes", "96x64")
    code, out, err = sora("eval", "--weights", "made", "--out", "eval.json", *arguments)
    assert code == 0, err
    assert "of unseen pairs" in out and "constant velocity" in out.replace("\n", " ") and "96x64" in out
    written = (tmp_path / "eval.html").read_text()
    page = re.sub(r"base64,[^\"]*", "", written)  # in which any letters may follow
    if importlib.util.find_spec("c2pa"):
        (tmp_path / "in.mp4").write_bytes(base64.b64decode(re.search(r'base64,([^"]*)"', written)[1]))
        assert credentials.verify(tmp_path / "in.mp4").answer == credentials.TRUSTED
    assert page.count("<video") > 8 and "http" not in page and "Half-lives" in page
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["prompts"] == 2 and result["steps"] == 1 and result["floor"]["colour"] == 1.0
    beside = {"copy last frame", "constant velocity", "true clips", "true clips, coded"}
    assert set(result["length_means"]) == set(result["length"]) == {"checkpoint, at once"} | beside
    assert result["length_means"]["true clips"]["motion"]["mean"] == pytest.approx(1, abs=0.05)
    assert result["length_means"]["copy last frame"]["motion"]["mean"] < 0.5
    assert set(result["verbs"]["restyle"]["true clips"]) >= {"style", "position", "motion", "rigidity"}
    assert set(result["verbs"]["loop"]) == {"checkpoint", "cut", "true clips", "true clips, coded"}
    assert result["sizes"]["96x64"]["floor"]["colour"] == 1.0 and result["sizes"]["96x64"]["intervals"]["vae"]
    for predictor in result["permanence"].values():
        assert sum(one["number"] for one in predictor["bins"]) > 3

    code, out, err = sora("info", "made")
    assert code == 0 and "transformer" in out and "made for 64x64, 17 frames at 8 per second" in out


PROMPTS = [(text, world.parse(text)) for text in ("a red ball", "a blue ring moves left")]


def test_evaluate_scores_a_perfect_model_with_the_read_out_floor(tiny_checkpoint):
    """Clips of the world itself, in the place of generated ones, must score as the floor does."""
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    prompts = [(str(seed), world.sample(seed, scene="bounce").program) for seed in range(6)]

    class Perfect:
        defaults, vae, device = sora.defaults, sora.vae, sora.device

        def generate(self, prompt, **options):
            return dataclasses.make_dataclass("Made", ["frames", "fps"])(
                world.sample(int(prompt), scene="bounce").video, 8
            )

    result = evaluate.evaluate(Perfect(), prompts=prompts, true_clips=4, continuations=0, verbs=0)
    assert all(share in (None, 1.0) for share in result["score"].values()) and result["score"]["colour"] == 1.0
    wrong = [(prompt, dataclasses.replace(program, style="neon")) for prompt, program in prompts]
    styles = [program.style for _, program in prompts]
    assert (
        evaluate.evaluate(Perfect(), prompts=wrong, true_clips=1, continuations=0, verbs=0)["score"]["style"]
        == styles.count("neon") / 6
    )


@pytest.mark.parametrize(
    ("asked", "said"), [({"sizes": [(64, 97)]}, "multiple of 16, got 97"), ({"long": 1e6}, "seconds must lie between")]
)
def test_an_evaluation_refuses_what_cannot_be_made_before_any_work(tiny_checkpoint, monkeypatch, asked, said):
    """It came last, after the clips of all prompts had been made."""
    sora = Sora.from_pretrained(tiny_checkpoint, device="cpu")
    monkeypatch.setattr(sora, "generate", lambda *args, **options: pytest.fail("a clip was made"))
    with pytest.raises(ValueError, match=said):
        evaluate.evaluate(sora, prompts=PROMPTS, steps=1, **asked)


def test_a_size_of_several_is_refused_by_the_name_of_its_option(sora):
    code, _, err = sora("eval", "--sizes", "64x64,96")
    assert code == 1 and "error: --sizes must be WIDTHxHEIGHT in pixels, such as 64x64, got '96'" in err


def test_bench_runs_in_a_checkout_from_any_folder_and_says_what_is_missing_elsewhere(sora, monkeypatch, tmp_path):
    from benchmarks import page, run

    called = []
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT])
    monkeypatch.setattr(run, "main", lambda arguments: called.append(arguments) or 3)
    assert sora("bench", "--op", "norm_modulate", "--help")[0] == 3
    monkeypatch.setattr(page, "main", lambda arguments: called.append(arguments) or 4)
    assert sora("bench", "report", "rows.jsonl", "--out", "page.html")[0] == 4
    assert called == [["--op", "norm_modulate", "--help"], ["rows.jsonl", "--out", "page.html"]]
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "sora_model" / "cli.py"))
    code, _, err = sora("bench", "--op", "norm_modulate")
    assert code == 1 and "get a copy of the project" in err and len(err.splitlines()) == 1


ODD = ["clip[v2].mp4", ":smile:.mp4", "[bold]x.mp4", "tab\tline\nx.mp4", "\x1b[31mred.mp4", "\udcff.mp4"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_text_of_the_user_is_printed_as_it_is(sora, tiny_checkpoint, tmp_path, name):
    weights = ("--weights", tiny_checkpoint, "--steps", 1, "--seconds", 0.1)
    code, out, err = sora("generate", "a ring, [/b] :smile: [red]elephant", *weights, "--out", name)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    assert code == 0 and out == f"wrote {shown}\n" and (tmp_path / name).exists(), err
    assert "does not know: " in err and "[red]" not in err.replace("[red]elephant", "")
    for arguments in (("generate", "a ring", *weights, "--out", f"{name}/x.mp4"), ("reconstruct", f"no{name}")):
        code, out, err = sora(*arguments)
        assert code == 1 and not out and err.count("error:") == 1 and "Traceback" not in err
        assert "\x1b" not in err and len(err.splitlines()) == 1
    code, out, err = sora("info", f"[/b]{name}")
    assert code == 1 and not out and "[/b]" in err and "Traceback" not in err


def test_a_terminal_without_unicode_is_no_error(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "sora_model.cli", "generate", "a ring", "--weights", str(tiny_checkpoint)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    arguments = [*command, "--steps", "1", "--seconds", "0.1", "--out", "é.mp4"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, rb"wrote \xe9.mp4" + b"\n"), done.stderr


def test_reasons_are_printed_one_a_line(sora, tiny_checkpoint, monkeypatch):
    def unavailable(*args, **options):
        sora_kernels.norm_modulate(torch.ones(1, 2, 8), None, None, impl="cuda")

    monkeypatch.setattr(Sora, "generate_to", unavailable)
    code, _, err = sora("generate", "a ring", "--weights", tiny_checkpoint)
    lines = err.splitlines()
    assert code == 1 and lines[0].startswith("error: norm_modulate: impl='cuda' cannot run: "), err
    assert lines[-1] == "  reference: usable" and sum(line.startswith("  cuda: ") for line in lines) == 1, err


@pytest.mark.parametrize("command", [["generate", "a ring"], ["reconstruct", "a.mp4"], ["eval"], ["train", "vae"]])
def test_only_what_can_run_a_whole_model_is_offered(sora, tmp_path, command):
    for impl in ("cuda", "cudnn", "warp"):
        code, _, err = sora(*command, "--impl", impl)
        assert code == 1 and "impl must be one of auto, reference, cpu, triton" in err and f"got '{impl}'" in err, err
    assert not list(tmp_path.iterdir())


def test_help_promises_what_is_there(sora):
    for command, said in ((("train", "vae"), "[default: cpu]"), (("train", "dit"), "[default: cpu]")):
        out = sora(*command, "--help")[1]
        device = out[out.index("--device") :].split("--")[1]
        assert said in " ".join(device.split()) and "GPU" not in device
    makefile = (ROOT / "Makefile").read_text()
    shapes_named = re.findall(r"--shape ([\w.-]+)", makefile)
    ops_named = re.findall(r"--op ([\w.-]+)", makefile)
    assert shapes_named and set(shapes_named) <= set(shapes.SHAPES) and set(ops_named) <= {*sora_kernels.__all__, "all"}


def test_outputs_are_tried_before_any_work(sora, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the checkpoint was loaded before the output was tried")

    monkeypatch.setattr(Sora, "from_pretrained", never)
    monkeypatch.setattr(reconstruct, "load_vae", never)
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/null")
    before = sorted(tmp_path.iterdir())
    for name in ("folder.mp4", "pipe.mp4", "device.mp4", "none/x.mp4", "/dev/null", "x" * 300 + ".mp4"):
        for command in (("generate", "a ring"), ("reconstruct", "a.mp4"), ("eval",)):
            code, out, err = sora(*command, "--out", name)
            assert code == 1 and not out and err.startswith("error: cannot write") and len(err.splitlines()) == 1, err
    assert sorted(tmp_path.iterdir()) == before and stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_what_is_replaced_keeps_its_permissions_and_its_link(sora, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(world, "eval_prompts", lambda each: PROMPTS[:1])
    (tmp_path / "secret").write_text("old")
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "link").symlink_to("secret")
    monkeypatch.setattr(evaluate, "_true_clips", lambda sora, count, size: ([], [], 1.0, {}))
    options = ("--steps", 1, "--continuations", 0, "--verbs", 0)
    code, _, err = sora("eval", "--weights", tiny_checkpoint, *options, "--out", "link")
    assert code == 0, err
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "secret").read_text())["prompts"] == 1
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("command", [["sora_kernels.info"], ["sora_model.cli", "info"]])
def test_a_reader_that_ends_early_is_no_error(command):
    """`| head -1`, of a command that writes without a buffer."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE,
                          env=environment, timeout=120)  # fmt: skip
    os.close(writing)
    # typer ends as a shell says that a signal ended it; the other program by the signal itself
    assert done.returncode == (128 + signal.SIGPIPE if "info" in command else -signal.SIGPIPE) and not done.stderr


def test_an_instruction_set_that_is_not_there_is_one_error(tiny_checkpoint, tmp_path):
    if not (Path(_library.__file__).parent / "_cpu.so").exists():
        pytest.skip("the compiled library _cpu.so is not built")
    generate = ["sora_model.cli", "generate", "a ring", "--weights", str(tiny_checkpoint), "--out", f"{tmp_path}/a.mp4"]
    environment = os.environ | {"SORA_KERNELS_CPU_ISA": "bogus"}
    done, told = (
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        for command in (generate, ["sora_kernels.info"])
    )
    assert done.returncode == 1 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert "SORA_KERNELS_CPU_ISA=bogus: expected baseline, avx2 or avx512" in done.stderr
    assert told.returncode == 0 and "not loaded: SORA_KERNELS_CPU_ISA=bogus" in told.stdout


@pytest.mark.parametrize(
    "settings, lines",
    [
        (dict(SORA_KERNELS_IMPL="", SORA_KERNELS_CPU_ISA=""), []),
        (dict(SORA_KERNELS_IMPL="cpu"), ["SORA_KERNELS_IMPL=cpu"]),
        (
            dict(SORA_KERNELS_IMPL="bogus", SORA_KERNELS_CPU_ISA="bogus"),
            [
                "SORA_KERNELS_IMPL=bogus: expected auto, reference, cpu, triton, cudnn, sdpa, cuda",
                "SORA_KERNELS_CPU_ISA=bogus: expected baseline, avx2 or avx512",
            ],
        ),
    ],
)
def test_info_says_what_the_environment_sets_and_what_is_wrong_with_it(settings, lines):
    if not (Path(_library.__file__).parent / "_cpu.so").exists():
        pytest.skip("the compiled library _cpu.so is not built")
    script = "from sora_kernels import info, _dispatch; info.main([]); print('auto is', _dispatch.FORCED)"
    environment = os.environ | dict(SORA_KERNELS_IMPL="", SORA_KERNELS_CPU_ISA="") | settings
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = [line.split(maxsplit=1)[1] for line in run.stdout.splitlines() if line.startswith("settings")]
    assert told == lines
    assert f"auto is {settings['SORA_KERNELS_IMPL'] or 'auto'}" in run.stdout


def test_the_module_runs_as_a_program(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "sora_model.cli", "generate", "?!", "--weights", str(tiny_checkpoint)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: prompt holds no word") and not done.stdout
    assert shutil.which("sora") is None or not done.stderr.count("Traceback")


def test_an_interrupted_start_ends_without_a_word(tmp_path):
    """Of what is imported some prints a page of lines, and some goes on, as here."""
    typed = """
import importlib.abc, os, runpy, signal, sys
class Typed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass
sys.meta_path.insert(0, Typed())
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["sora", "--version"]
runpy.run_module("sora_model", run_name="__main__", alter_sys=True)
"""
    command, environment = [sys.executable, "-c", typed], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_an_interrupted_demo_ends_without_a_word(tmp_path, monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Sora, "from_pretrained", interrupted)
    monkeypatch.setattr(sys, "argv", ["demo"])
    with pytest.raises(SystemExit, match="130"):
        runpy.run_module("sora_model.demo", run_name="__main__")
    assert "Traceback" not in capsys.readouterr().err


def test_the_demo_makes_the_clip_and_tells_a_wrong_operation_from_a_right_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SECONDS_A_ROW", 1e-3)
    monkeypatch.setattr(demo, "COMPILE_BUDGET_S", 0)
    for name, small in {"GRID": (2, 4, 4), "S": 32, "VIDEO": (1, 24, 2, 16, 16)}.items():
        monkeypatch.setattr(demo, name, small)
    monkeypatch.setenv("PROMPT", "A red circle, bounces/../!")
    with pytest.raises(SystemExit) as done:
        demo.main()
    assert done.value.code == 0
    assert media.probe(tmp_path / "out" / "a-red-circle-bounces.mp4").frames == 17

    def wrong_gradient(op, impl="auto", **arguments):
        out = op(**arguments, impl=impl)
        return out if impl == "reference" else out.detach() + (out - out.detach()) * 1.001

    def slightly_wrong(op, impl="auto", **arguments):
        return op(**arguments, impl=impl) * (1 if impl == "reference" else 1.001)

    faults = {"gate_residual": slightly_wrong, "norm_silu": slightly_wrong, "gate_heads": wrong_gradient}
    for name, fault in faults.items():
        monkeypatch.setattr(sora_kernels, name, functools.partial(fault, getattr(sora_kernels, name)))
    console = cli.console(record=True, width=100, file=io.StringIO())
    assert demo.table(console) == ["gate_residual", "gate_heads", "norm_silu"]
    printed = console.export_text()
    assert "beyond its bound: gate_residual, gate_heads, norm_silu" in printed
    public = {op.removesuffix("_fwd") for op in _library.ops() if op.endswith("_fwd")}
    assert demo.cases(torch.device("cpu")).keys() == public and all(op in printed for op in public)
    backward = {op.removesuffix("_bwd") for op in _library.ops() if op.endswith("_bwd")}
    assert printed.count("fwd  ") >= len(public) and printed.count("bwd  ") >= len(backward)
    assert f"0 of {len(public) + len(backward)} were compiled" in printed

    monkeypatch.setenv("PROMPT", "?!")
    with pytest.raises(SystemExit) as done:
        demo.main()
    assert done.value.code == 1


@pytest.mark.parametrize(
    "given, found",
    [
        ({}, {"OMP_WAIT_POLICY": "passive"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_waiting_threads_sleep_before_torch_is_imported_unless_told_otherwise(given, found):
    """libgomp reads how long they spin when torch loads it: beside a busy process that takes several times the time."""
    code = """
import os, sys, sora_model.cli as cli
def told():
    return {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ}
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(told(), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
cli.main()
"""
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | given, capture_output=True, text=True)
    assert done.stdout.strip() == str(found), done.stderr


def test_version_is_that_of_the_package(sora):
    assert sora("--version") == (0, f"sora {sora_kernels.__version__}\n", "")


def test_notes_come_before_the_work(sora, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    said = []

    def spy(work):
        def begin(*args, **kwargs):
            said.append(capsys.readouterr().err)
            return work(*args, **kwargs)

        return begin

    arguments = ("--weights", tiny_checkpoint, "--steps", 1, "--seconds", 0.3, "--size", "32x32", "--out", "a.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(Sora, "_frames", spy(Sora._frames))
        code, _, err = sora("generate", "a red elephant", *arguments)
    assert code == 0 and "note" not in err
    assert "note: this checkpoint was trained on 64x64 and up to 17 frames; others may look wrong" in said[0]
    assert "does not know: elephant. It knows: a, again," in said[0]

    monkeypatch.setattr(media, "write_video", spy(media.write_video))
    code, _, err = sora("reconstruct", "a.mp4", "--weights", tiny_checkpoint, "--out", "b.mp4")
    assert code == 0 and "note" not in err
    assert "note: this VAE was trained on clips of the procedural world alone" in said[1]


def test_help_shows_the_default_of_every_option():
    import typer.main
    from click import Context

    def options(command, path):
        for name, part in getattr(command, "commands", {}).items():
            yield from options(part, f"{path} {name}")
        for option in command.params:
            yield f"{path} {option.name}", option, command

    missing = []
    for path, option, command in options(typer.main.get_command(cli.app), "sora"):
        if option.param_type_name == "option" and option.name not in ("help", "version") and "train" not in path:
            record = option.get_help_record(Context(command))
            if not option.is_flag and not option.required and "[default: " not in " ".join(record):
                missing.append(path)
    assert not missing


def test_info_lists_the_words_of_a_checkpoint(sora, tiny_checkpoint):
    code, out, _ = sora("info", tiny_checkpoint)
    assert code == 0 and f"it knows {len(world.VOCABULARY)} words: {', '.join(world.VOCABULARY)}" in out
