"""The benchmark suite: honest timing, correctness before figures, complete rows, reports from results alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from test_attention import MODES, definition

import sora_kernels
from benchmarks import (
    bench_attention,
    bench_causal_conv,
    gpu,
    machine,
    peers,
    report,
    run,
    shapes,
    suite,
    summary,
    table,
    targets,
    timing,
    verified,
)
from sora_kernels import _dispatch, _library
from sora_kernels.testing import outputs_and_grads

FIELDS = {
    "op", "family", "impl", "kind", "impl_version", "shape", "dims", "dtype", "mode", "status", "reason",
    "p20_us", "p50_us", "p80_us", "samples", "timer", "bytes", "gb_s", "percent_copy", "flops", "tflop_s",
    "percent_matmul", "copy_gb_s", "matmul_tflop_s", "max_error", "error_bound", "error_in", "peak_memory",
    "device", "driver", "threads", "allocator", "cuda", "python", "torch", "triton", "commit", "dirty", "date",
}  # fmt: skip
OP = "norm_modulate"


def invoke(tmp_path, *arguments, budget="0.02"):
    target = tmp_path / "rows.jsonl"
    status = run.main(["--device", "cpu", "--budget", budget, "--json", str(target), *arguments])
    return status, report.read_jsonl(target) if target.exists() else []


@pytest.fixture
def quick_ceilings(monkeypatch):
    known = timing.Ceilings(2e9, {"float32": 1e12, "bfloat16": 1e12})
    monkeypatch.setattr(timing, "ceilings", lambda *_, **__: known)


# Timing


def test_interleaved_takes_turns_in_an_order_that_changes():
    calls = []
    candidates = {name: functools.partial(calls.append, name) for name in "abc"}
    # a call long enough that one is a sample
    slow = {name: lambda fn=fn: (fn(), time.sleep(2e-4)) for name, fn in candidates.items()}
    stats = timing.interleaved(slow, 0.02, warmup=1)
    rounds = calls[6:]  # after one warm-up and one estimate each
    assert len(rounds) == 3 * stats["a"].samples >= 15
    turns = [rounds[i : i + 3] for i in range(0, len(rounds), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1


def test_interleaved_tells_a_slow_call_from_a_fast_one_and_orders_its_percentiles():
    stats = timing.interleaved({"fast": lambda: time.sleep(1e-4), "slow": lambda: time.sleep(2e-3)}, 0.1)
    assert stats["slow"].p50 > 2e-3 and stats["slow"].p20 > 3 * stats["fast"].p20
    assert all(s.p20 <= s.p50 <= s.p80 for s in stats.values())


def test_percentiles_are_those_of_the_samples():
    stats = timing.Stats.of([float(i) for i in reversed(range(101))])
    assert (stats.p20, stats.p50, stats.p80, stats.samples) == (20, 50, 80, 101)


def test_a_very_short_call_is_repeated_until_the_clock_can_see_it():
    stats = timing.interleaved({"pass": lambda: None}, 0.01)["pass"]
    assert stats.calls >= 256 and 0 < stats.p50 < 1e-5


def test_peak_memory_counts_what_a_call_holds_at_once():
    x = torch.randn(1000, 100)
    one = timing.peak_memory(lambda: x.exp(), "cpu")
    assert one == 400_000
    assert timing.peak_memory(lambda: (x.exp(), x.exp()), "cpu") == 2 * one
    assert timing.peak_memory(lambda: [x.exp().sum() for _ in range(3)], "cpu") < 1.1 * one


def test_ceilings_are_positive_rates_and_refuse_no_budget():
    found = timing.ceilings("cpu", (torch.float32,), budget_s=0.02)
    assert 1e8 < found.copy < 1e13 and 1e8 < found.matmul["float32"] < 1e15
    with pytest.raises(ValueError, match="budget_s"):
        timing.interleaved({"pass": lambda: None}, 0)


# The command


def test_a_run_gives_complete_rows(tmp_path, capsys):
    status, rows = invoke(tmp_path, "--op", OP, "--shape", "toy", "--impl", "reference", "--threads", "1")
    assert status == 0
    assert [(r["impl"], r["mode"]) for r in rows] == [
        ("reference", "fwd"), ("eager", "fwd"), ("reference", "bwd"), ("eager", "bwd"),
    ]  # fmt: skip
    shape = shapes.SHAPES["toy"]
    D = shape.model.dim
    for row in rows:
        assert set(row) == FIELDS
        assert row["status"] == "ok" and row["family"] == "modulation" and row["threads"] == 1
        assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["p50_us"] / 1e3)
        assert row["percent_copy"] == pytest.approx(100 * row["gb_s"] / row["copy_gb_s"])
        assert row["tflop_s"] == pytest.approx(row["flops"] / row["p50_us"] / 1e6)
        assert 0 < row["max_error"] <= row["error_bound"] < 1e-3
        assert row["peak_memory"] >= 4 * shape.elements
    # fp32: x, out, two rows per clip of B = 2, two tables
    assert rows[0]["bytes"] == 4 * (2 * shape.elements + 2 * 2 * D + 2 * D)
    # dout, x, dx; scale, dscale, dshift; its table, two gradients of tables
    assert rows[2]["bytes"] == 4 * (3 * shape.elements + 3 * 2 * D + 3 * D)
    assert OP in capsys.readouterr().out


@pytest.mark.parametrize("shape, forward, backward", [("cpu-8192x1536", 2, 3), ("cpu-rms", 3, 5)])
def test_bytes_of_norm_silu_are_those_of_its_passes(tmp_path, quick_ceilings, shape, forward, backward):
    """The statistics of a group need x before it is normalised, and sums over x and dout before dx."""
    status, rows = invoke(tmp_path, "--op", "norm_silu", "--shape", shape, "--impl", "reference")
    video = 4 * bench_causal_conv.layer(shapes.SHAPES[shape]).elements
    found = {row["mode"]: round(row["bytes"] / video) for row in rows if row["impl"] == "reference"}
    assert status == 0 and found == {"fwd": forward, "bwd": backward}


def test_reused_outputs_are_measured_beside_fresh_ones_and_kept_apart(tmp_path, capsys, quick_ceilings):
    if _dispatch.why_not(OP, "cpu", "cpu"):
        pytest.skip("the C++ kernels are not built")
    status, rows = invoke(tmp_path, "--op", "gate_residual_norm_modulate", "--shape", "tiny", "--threads", "1")
    assert status == 0
    assert [(r["impl"], r["kind"], r["mode"], r["status"]) for r in rows] == [
        ("cpu", "ours", "fwd", "ok"), ("cpu+out", "ours, out=", "fwd", "ok"),
        ("cpu+call", "ours, call alone", "fwd", "ok"), ("eager", "baseline", "fwd", "ok"),
        ("cpu", "ours", "bwd", "ok"), ("cpu+call", "ours, call alone", "bwd", "ok"),
        ("eager", "baseline", "bwd", "ok"),
    ]  # fmt: skip
    out, (whole, _, call, _, back, back_call, _) = capsys.readouterr().out, rows
    assert "than cpu+out" not in out and "than cpu+call" not in out
    for of, alone in ((whole, call), (back, back_call)):
        assert 0 < alone["p20_us"] < of["p50_us"] and alone["bytes"] == 0 and alone["max_error"] is None


def test_a_call_alone_is_measured_without_its_op_and_leaves_it_in_place(monkeypatch):
    ran, original = [], _library.call
    monkeypatch.setattr(_library, "call", lambda op, impl: lambda *args: (ran.append(op), original(op, impl)(*args)))
    x, watched = torch.randn(1, 2, 8), _library.call
    call = suite._around_nothing(sora_kernels.norm_modulate)
    assert call(x=x, shift=None, scale=None, impl="reference").shape == x.shape and not ran
    with pytest.raises(ValueError, match="norm must be one of"):
        call(x=x, shift=None, scale=None, norm="none")
    assert _library.call is watched
    case = suite.Prepared(suite.discover()[OP], shapes.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    backward, _ = case.candidate("reference+call", "bwd")
    ran.clear()  # the forward that it goes back through
    assert [grad.shape for grad in backward()] == [case.case.inputs[name].shape for name in case.case.leaves]
    assert not ran and _library.call is watched


def test_rows_of_another_allocator_are_a_table_of_their_own(monkeypatch):
    assert machine.facts("cpu")["allocator"] is None
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    monkeypatch.setenv("MALLOC_CONF", "dirty_decay_ms:-1")
    allocator = machine.facts("cpu")["allocator"]
    rows = [make_row(threads=2), make_row(threads=2, allocator=allocator, p50=50.0)]
    table = report.figures(rows)
    assert "2 threads, libjemalloc.so.2 dirty_decay_ms:-1, torch" in table and "2 threads, torch" in table
    assert "| 100 (90–120) |" in table and "| 50 (45–60) |" in table


def test_rows_are_appended_to_the_file(tmp_path, quick_ceilings):
    arguments = ("--op", OP, "--shape", "toy", "--impl", "reference", "--mode", "fwd")
    assert len(invoke(tmp_path, *arguments)[1]) == 2
    assert len(invoke(tmp_path, *arguments)[1]) == 4


@pytest.mark.parametrize("op", ["norm_modulate", "gate_residual", "gate_residual_norm_modulate"])
@pytest.mark.parametrize("shape", ["cpu-frames", "cpu-tokens", "cpu-rms"])
def test_eager_and_reference_agree_in_every_row_layout(op, shape):
    full = shapes.SHAPES[shape]
    small = dataclasses.replace(full, grid=(2, 3, 2), model=dataclasses.replace(full.model, dim=33))
    benchmark = suite.discover()[op]
    results = list(suite.measure(benchmark, small, ("reference", "eager", "diffusers"), budget_s=1e-3))
    passed = {(r.impl, r.mode) for r in results if r.status == "ok"}
    assert passed >= {(i, m) for i in ("reference", "eager") for m in ("fwd", "bwd")}
    assert not [r for r in results if r.status == "failed"]


def test_a_pipe_that_nobody_reads_is_refused_and_a_full_disk_named(tmp_path, capsys, quick_ceilings):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "pipe", "No such device"), ("/dev/full", "No space left")):
        arguments = ["--op", OP, "--shape", "toy", "--impl", "reference", "--mode", "fwd", "--budget", "0.01"]
        assert run.main([*arguments, "--json", str(path)]) == 2
        assert f"--json {path}: cannot write there: {reason}" in capsys.readouterr().err


def wrong(error):
    """The public function with its result spoiled."""
    function = getattr(sora_kernels, OP)

    @functools.wraps(function)
    def spoiled(*args, **kwargs):
        return error(function(*args, **kwargs))

    return spoiled


@pytest.mark.parametrize(
    "spoil",
    [lambda out: out * (1 + 1e-4), lambda out: out.index_fill(1, torch.tensor([7]), float("nan"))],
    ids=["slightly off", "NaN in one row"],
)
def test_a_wrong_implementation_gets_no_figure(tmp_path, capsys, monkeypatch, quick_ceilings, spoil):
    monkeypatch.setattr(sora_kernels, OP, wrong(spoil))
    status, rows = invoke(tmp_path, "--op", OP, "--shape", "toy", "--impl", "reference", "--mode", "fwd")
    assert status == 1
    refused, eager = rows
    assert refused["status"] == "failed" and "exceeds its bound" in refused["reason"]
    assert all(refused[f] is None for f in ("p20_us", "p50_us", "p80_us", "gb_s", "percent_copy", "tflop_s"))
    assert refused["max_error"] > refused["error_bound"]
    assert eager["status"] == "ok" and eager["p50_us"] > 0
    assert f"failed: {OP} reference fwd at toy: wrong" in capsys.readouterr().out


def test_an_output_that_was_not_written_is_seen(tmp_path, monkeypatch, quick_ceilings):
    def unwritten(x, *args, **kwargs):
        return torch.empty_like(x)

    unwritten.__module__ = "sora_kernels.modulation.op"
    monkeypatch.setattr(sora_kernels, OP, unwritten)
    status, rows = invoke(tmp_path, "--op", OP, "--shape", "toy", "--impl", "reference", "--mode", "fwd")
    assert status == 1 and rows[0]["max_error"] == float("inf")


def test_a_crash_is_a_row_and_does_not_end_the_run(tmp_path, monkeypatch, quick_ceilings):
    def crash(out):
        raise RuntimeError("boom")

    monkeypatch.setattr(sora_kernels, OP, wrong(crash))
    status, rows = invoke(tmp_path, "--op", OP, "--shape", "toy", "--impl", "reference")
    assert status == 1
    assert [r["status"] for r in rows] == ["failed", "ok"] * 2 and rows[0]["reason"] == "RuntimeError: boom"


def test_an_implementation_named_but_unavailable_gives_its_reason(tmp_path, capsys, quick_ceilings):
    status, rows = invoke(tmp_path, "--op", OP, "--shape", "toy", "--impl", "cuda", "--mode", "fwd")
    assert status == 1 and rows[0]["status"] == "unavailable"
    assert "cuda needs tensors on a CUDA device" in rows[0]["reason"]
    assert rows[0]["reason"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "norm_modulat"], "unknown op 'norm_modulat'; there are: .*norm_modulate"),
        (["--shape", "sora"], "unknown shape 'sora'; there are: .*wan14b-720p.*toy"),
        (["--op", OP, "--impl", "rocm"], "unknown impl of norm_modulate 'rocm'; .*cudnn, sdpa, cuda"),
        (["--threads", "0"], "--threads: expected 1 to 1024, got 0"),
        (["--threads", "99999999999"], "--threads: expected 1 to 1024"),
        (["--seed", "99999999999999999999"], "--seed: expected 0 to 9223372036854775807, got 99999999999999999999"),
        (["--minutes", "nan"], "--minutes: expected more than 0, got nan"),
        (["--op", "dit", "--impl", "cpu"], "dit is a model, which takes no --impl, --base and --graph"),
        (["--op", OP, "--shape", "dit-toy"], "none of norm_modulate has a shape dit-toy"),
        (["--budget", "-1"], "--budget: expected seconds > 0, got -1"),
        (["--graph"], "--graph: CUDA graphs need a CUDA device"),
        (["--json", "/proc/nowhere/rows.jsonl"], "--json /proc/nowhere/rows.jsonl: cannot write there"),
        (["--json", "a\0b"], "--json .*: cannot write there"),
    ],
)
def test_a_bad_request_says_what_exists(capsys, arguments, said):
    assert run.main(["--device", "cpu", *arguments]) == 2
    out = capsys.readouterr()
    assert re.search(said, out.err) and not out.out


def test_a_shape_too_large_for_the_machine_is_refused_before_it_starts(capsys, monkeypatch):
    monkeypatch.setattr(run, "available", lambda device: 1 << 30)
    assert run.main(["--device", "cpu", "--shape", "wan14b-720p"]) == 2
    err = capsys.readouterr().err
    assert "needs about 69.2 GiB" in err and "toy" in err.split("shapes that fit:")[1]


def test_a_peer_that_is_not_installed_says_why(monkeypatch):
    benchmark, shape = suite.discover()[OP], shapes.SHAPES["toy"]
    monkeypatch.setitem(sys.modules, "quack", None)
    (result,) = suite.measure(benchmark, shape, ("quack",), modes=("fwd",), budget_s=1e-3)
    assert result.status == "unavailable" and "quack-kernels is not usable here" in result.reason


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_losses_are_said_with_and_without_rich(capsys, monkeypatch, rich):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    rows = [
        make_row(impl="cpu", p50=200.0),
        make_row(impl="eager", p50=100.0, kind="baseline"),
        make_row(impl="compile", p50=300.0, kind="baseline"),
        make_row(impl="cuda", status="unavailable", reason="no nvcc"),
        make_row(impl="cuda", status="unavailable", reason="no nvcc", shape="latte-xl"),
    ]
    table.print_table(rows)
    out = capsys.readouterr().out
    assert "slower than eager: norm_modulate cpu fwd at toy, 0.50x" in out and "slower than compile" not in out
    assert "below its goal of 4 x eager: norm_modulate cpu fwd float32 at toy, 0.5\n" in out
    assert "of 1.3 x compile" not in out
    assert "unavailable: norm_modulate cuda fwd at toy, latte-xl: no nvcc" in out
    (line,) = (line.split() for line in out.splitlines() if " cpu " in line and "toy," not in line)
    assert line[5:7] == ["200.0", "180.0–240.0"] and line[11:13] == ["0.50", "1.50"]


def test_goals_are_of_the_fastest_of_ours_and_of_operations_that_are_measured():
    slow = make_row(impl="cuda", dtype="bfloat16", percent_copy=20.0)
    missed = make_row(dtype="bfloat16", percent_copy=60.0, p50=50.0)
    met = make_row(dtype="bfloat16", percent_copy=91.0, shape="latte-xl")
    attention = make_row(op="spacetime_attention", dtype="bfloat16", tflop_s=300.0)
    wide, narrow = (
        make_row(op="causal_conv3d", dtype="bfloat16", percent_matmul=70.0, shape=f"{C}", dims={"channels": C})
        for C in (192, 96)
    )
    of_96 = dict(op="causal_conv3d", dtype="bfloat16", shape="96", dims={"channels": 96}, percent_matmul=65.0)
    rival, own = make_row("torch-cudnn", 90.0, "peer", **of_96), make_row("cudnn", 105.0, **of_96)
    assert targets.shortfalls([slow, missed, met, attention, wide, narrow, rival, own]) == [
        "below its goal of 90 % copy: norm_modulate triton fwd bfloat16 at toy, 60",
        "below its goal of 500 TFLOP/s: spacetime_attention triton fwd bfloat16 at toy, 300",
        "below its goal of 75 % matmul: causal_conv3d triton fwd bfloat16 at 192, 70",
        "below its goal of 1 x torch-cudnn: causal_conv3d triton fwd bfloat16 at 96, 0.9",
        "triton is faster than cudnn: causal_conv3d fwd bfloat16 at 96, 96 channels, 1.05 x",
    ]
    tiny = [
        make_row("cpu", 23.0, shape="tiny"),
        make_row("eager", 30.0, "baseline", shape="tiny"),
        make_row("cpu+call", 18.0, "ours, call alone", shape="tiny"),
        make_row("cpu", 40.0, shape="tiny", mode="bwd"),
        make_row("cpu", 24.0, shape="tiny", op="gate_residual"),
        make_row("cpu+call", 14.0, "ours, call alone", shape="tiny", op="gate_residual"),
    ]
    assert targets.shortfalls(tiny) == [
        "above its goal of 15 µs of Python a call: norm_modulate cpu fwd float32 at tiny, 18"
    ]
    assert "| 23 (21–28), Python 18 |" in report.figures(tiny)
    named = {*targets.PERCENT_COPY, *targets.TFLOP_S, *targets.SPEEDUP, *targets.PERCENT_MATMUL, *targets.NEVER_BELOW}
    assert named <= {*suite.discover(), *sora_kernels.__all__}
    for op, peer in targets.NEVER_BELOW.items():
        assert peer in suite.discover()[op].peers
    assert all(suite.impl_of(peer) not in _dispatch.IMPLS for b in suite.discover().values() for peer in b.peers)


def test_a_loss_to_eager_is_forgiven_up_to_the_call_that_was_measured():
    def case(ours, eager, **at):
        return [make_row("cpu", ours, **at), make_row("eager", eager, "baseline", **at)]

    at = dict(op="gate_residual", mode="bwd")
    call = make_row("cpu+call", 20.0, "ours, call alone", shape="tiny", **at)
    rows = [call, *case(60.0, 45.0, **at), *case(60.0, 39.0, shape="other", **at), *case(60.0, 59.0, op="gate_heads")]
    assert targets.shortfalls(rows) == [
        "slower than eager by more than its call of 20 µs: gate_residual cpu bwd float32 at other, by 21 µs",
        "slower than eager by more than its call of 0 µs: gate_heads cpu fwd float32 at toy, by 1 µs",
    ]


def test_a_narrow_terminal_loses_the_lesser_columns_only():
    columns, lines = table._narrowed(table.COLUMNS, [("0123456789",) * len(table.COLUMNS)], 110)
    assert {"op", "shape", "impl", "p50 µs", "x eager", "error", "bound"} <= set(columns)
    assert "MiB" not in columns and len(lines[0]) == len(columns) < len(table.COLUMNS)


# Reports


def make_row(impl="triton", p50=100.0, kind="ours", **changes):
    figures = {"p20_us": 0.9 * p50, "p50_us": p50, "p80_us": 1.2 * p50, "percent_copy": 8000 / p50}
    row = dict.fromkeys(FIELDS) | figures | {
        "family": "modulation", "op": OP, "impl": impl, "kind": kind, "shape": "toy", "dtype": "float32", "mode": "fwd",
        "status": "ok",
        "gb_s": 1.0, "tflop_s": 0.1, "percent_matmul": 1.0, "max_error": 1e-6, "error_bound": 2e-6,
        "device": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "copy_gb_s": 4300.0, "commit": "1a2b3c",
        "dirty": False, "date": "2026-11-20T10:00:00+00:00",
    }  # fmt: skip
    return row | changes


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "nvidia-h200"
    folder.mkdir(parents=True)
    rows = [
        make_row(p50=80.0),
        make_row(impl="cuda", p50=160.0),
        make_row(impl="eager", p50=240.0, kind="baseline"),
        make_row(impl="compile", p50=60.0, kind="baseline"),
        make_row(impl="diffusers", p50=400.0, kind="peer", impl_version="0.42"),
        make_row(p50=999.0, date="2026-11-19T10:00:00+00:00"),
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "results"


def test_the_readme_block_is_made_from_the_results_and_is_stable(tmp_path, results):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- figures:begin -->\nold\n<!-- figures:end -->\nafter\n")
    arguments = ["--readme", str(readme), "--results", str(results)]
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| `norm_modulate` | toy | **0.75× (slower)** | 3.00× | – | – |" in text
    assert "999" not in text  # an older figure of the same case gives way
    stamp = readme.stat().st_mtime_ns
    assert report.main(arguments) == 0
    assert readme.read_text() == text and readme.stat().st_mtime_ns == stamp


def test_a_page_has_every_mode_and_peer_of_its_family(results, tmp_path):
    for name in report.FAMILIES:
        (tmp_path / f"{name}.md").write_text("<!-- figures:begin -->\nold\n<!-- figures:end -->\n")
    (tmp_path / "numerics.md").write_text("<!-- compiled:begin -->\nold\n<!-- compiled:end -->\n")
    (tmp_path / "world.md").write_text("<!-- continued:begin -->\nold\n<!-- continued:end -->\n")
    assert len(report.update_pages(tmp_path, results)) == len(report.FAMILIES) + 2
    assert (
        "| norm_modulate | toy | float32 | fwd | triton | 80 (72–96) | 100 "
        "| 3.00× | **0.75× (slower)** | 5.00× (diffusers 0.42) |"
    ) in (tmp_path / "modulation.md").read_text()
    assert "No figures have been recorded yet." in (tmp_path / "attention.md").read_text()
    assert not report.update_pages(tmp_path, results)


def test_the_summary_prefers_rows_without_page_faults_and_the_largest_shape():
    small, large = make_row(shape="small", bytes=10), make_row(shape="large", bytes=1000)
    kept = make_row(shape="large", bytes=1000, allocator="jemalloc", p50=50.0)
    eager = dict(impl="eager", kind="baseline", p50_us=75.0)
    rows = [small, large, kept, kept | eager, large | eager | dict(p50_us=9999.0)]
    (case,) = summary.cases(rows).popitem()[1].values()
    assert case["fwd"]["ours"] is kept and summary.ratio(case, "fwd", "eager") == 1.5
    assert summary.ratio(case, "fwd", "compile") is None and summary.ratio(case, "bwd", "eager") is None


def test_the_plot_is_drawn_again_for_other_rows_only(results, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    target = tmp_path / "summary.svg"
    assert report.update_plot(target, results) and not report.update_plot(target, results)
    svg = target.read_text()
    assert "norm_modulate" in svg and "forward vs torch.compile" in svg and "<dc:date>" not in svg
    (results / "nvidia-h200" / "b.jsonl").write_text(json.dumps(make_row(p50=1.0, date="2026-12-19T10:00:00+00:00")))
    assert report.update_plot(target, results)


def test_the_readme_has_the_largest_shape_and_counts_the_rest_with_their_losses():
    small, large = make_row(shape="small", bytes=10), make_row(shape="large", bytes=1000)
    rows = [small, small | dict(impl="eager", kind="baseline", p50_us=small["p50_us"] / 2), large]
    text = report.figures(rows)
    assert "| large |" in text and "| small |" not in text
    assert "1 further cases, 1 of them slower than eager, compile or a peer" in text
    assert "| small |" in report.figures(rows, every=True)


def test_a_readme_without_markers_is_left_alone(tmp_path, results, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    assert report.main(["--readme", str(readme), "--results", str(results)]) == 1
    assert "<!-- figures:begin -->" in capsys.readouterr().err and readme.read_text() == "no markers\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"op": "norm_mod', "b.jsonl:1 is half a line: the run was stopped while it wrote"),
        ("oops", "b.jsonl:1 is no line of JSON"),
        ('{"format": 99, "machine": {}}', "b.jsonl:1: expected rows of format 1, got format 99; another version"),
        ("[]", "b.jsonl:1: expected rows of format 1, got a list"),
        ('{"op": "norm_modulate", "p50": 3}', "b.jsonl:1: expected a row of a benchmark, got one without bytes,"),
    ],
)
def test_a_broken_results_file_is_named(results, tmp_path, capsys, line, said):
    (results / "nvidia-h200" / "b.jsonl").write_text(line + "\n")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- figures:begin -->\n<!-- figures:end -->")
    assert report.main(["--readme", str(readme), "--results", str(results)]) == 1
    assert said in capsys.readouterr().err


JUNIT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.test_modulation" name="test_backward[triton-bfloat16-layer]"/>
<testcase classname="tests.test_modulation" name="test_triton_on_gpu[bfloat16-1]"/>
<testcase classname="tests.test_modulation" name="test_cuda_forward[1]"><failure message="x"/></testcase>
<testcase classname="tests.test_modulation" name="test_cuda_forward[2]"/>
<testcase classname="tests.test_attention" name="test_triton_forward[1]"><skipped/></testcase>
<testcase classname="tests.test_patchify_triton" name="test_every_patch[float16-1]"/>
<testcase classname="tests.test_layout" name="test_names"/>
</testsuite></testsuites>"""


def test_test_records_say_what_passed_where(tmp_path):
    (tmp_path / "pytest.xml").write_text(JUNIT)
    facts = {"device": "NVIDIA H200", "date": "2026-11-20T10:00", "commit": "1a2b3c", "dirty": False}
    verified.record(tmp_path / "pytest.xml", tmp_path / "run" / "verified.json", facts)
    report.add(tmp_path / "run", tmp_path / "results")
    said = functools.partial(verified.verified_on, results=tmp_path / "results")
    assert said("modulation", "triton") == "verified on NVIDIA H200 (2026-11-20, 1a2b3c)"
    assert said("modulation", "cuda") == "1 of 2 tests fail on NVIDIA H200 (2026-11-20, 1a2b3c)"
    assert said("patchify", "triton") == "verified on NVIDIA H200 (2026-11-20, 1a2b3c)", "a file's name says both"
    assert said("attention", "triton") == said("modulation", "cpu") == "not yet run on a GPU"
    matrix = report.verification(tmp_path / "results")
    assert re.search(r"`norm_modulate` \|.* triton: verified on NVIDIA H200 .*; cuda: 1 of 2 tests fail", matrix)
    assert re.search(r"`norm_modulate` \| fwd \+ bwd \| fwd \+ bwd \| fwd \+ bwd \| – \| – \| fwd \+ bwd \|", matrix)


def test_a_run_is_filed_under_its_device(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "bench.jsonl").write_text(json.dumps(make_row()) + "\n")
    (target,) = report.add(out, tmp_path / "results")
    assert target == tmp_path / "results" / "nvidia-h200" / "202611201000-1a2b3c.jsonl"
    assert report.load_rows(tmp_path / "results") == [make_row()]
    with pytest.raises(report.BadResults, match="neither bench.jsonl nor verified.json"):
        report.add(tmp_path, tmp_path / "results")


# The GPU machine's command


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_without_a_gpu_it_says_what_it_left_out(tmp_path, capsys):
    test = tmp_path / "test_tiny.py"
    test.write_text("import pytest\n\n@pytest.mark.gpu\ndef test_triton_on_gpu(): pass\n")
    out = tmp_path / "out"
    status = gpu.main(["--out", str(out), "--minutes", "5", "--tests", str(test)])
    said = capsys.readouterr().out
    assert status == 0
    assert "no GPU" in said and "build        skipped" in said and "tests        skipped" in said
    assert "would measure norm_modulate" in said and "collect      ok" in said
    assert (out / "summary.txt").read_text() == said
    assert "test_triton_on_gpu" in (out / "pytest.log").read_text()


def test_a_step_that_overruns_or_fails_is_reported_and_the_next_one_runs(tmp_path, capsys):
    session = gpu.Session(tmp_path, time.monotonic() + 60, "tests")
    log = tmp_path / "log"
    steps = [
        session.step("slow", ["sh", "-c", "echo begun; sleep 60; echo never"], log, 1.0),
        session.step("bad", ["sh", "-c", "echo broken; exit 3"], log, 60),
        session.step("good", ["sh", "-c", "echo fine"], log, 60),
    ]
    assert [step.status for step in steps] == ["timeout", "failed", "ok"]
    assert steps[0].seconds < 30 and steps[1].note == "exit 3, see log"
    said = capsys.readouterr().out
    assert "begun" in said and "broken" in said and "fine" not in said
    assert log.read_text().split() == ["begun", "broken", "fine"]


def test_the_gpu_command_first_confirms_what_is_predicted_of_cuda(tmp_path, monkeypatch):
    """Every kernel in CUDA C++, tested, sanitised and timed beside its rivals before anything else takes the time."""
    ran = []

    def step(self, name, command, log, limit, **env):
        ran.append((name, command))
        return self.done(gpu.Step(name, "ok"))

    monkeypatch.setattr(gpu.machine, "facts", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(gpu.Session, "step", step)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu._library, "load_error", lambda name: None)
    gpu.Session(tmp_path, time.monotonic() + 60, "tests").on_gpu()
    names = [name for name, _ in ran]
    first = names[names.index("info") + 1 : names.index("verify")]
    written = [op for op, impl in _dispatch.NAMED_ONLY if impl == "cuda"]
    assert first[:3] == ["cuda tests", "cuda memcheck", "cuda racecheck"]
    assert {name.partition(":")[0] for name in first[3:]} == {f"cuda {op}" for op in written}
    assert len(set(first)) == len(first)
    for name, command in ran:
        if name in first[3:]:
            arguments = run._parser().parse_args(command[command.index("benchmarks.run") + 1 :])
            assert "cuda" in arguments.impl and len(arguments.impl) > 1 and arguments.device == "cuda"
            assert set(arguments.shape) <= set(shapes.SHAPES)


def test_without_a_cuda_library_nothing_is_confirmed_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu._library, "load_error", lambda name: "not built")
    gpu.Session(tmp_path, time.monotonic() + 60, "tests").confirm()
    assert "cuda         skipped       0 s  no CUDA library: not built" in capsys.readouterr().out


def test_a_bad_request_of_the_gpu_command_is_refused(tmp_path, capsys):
    for arguments, said in (
        (["--out", str(tmp_path), "--minutes", "0"], "--minutes: expected more than 0"),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere: cannot write there"),
    ):
        with pytest.raises(SystemExit) as stopped:
            gpu.main(arguments)
        assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_the_suite_needs_torch_alone():
    """A GPU machine has torch and triton, and may have nothing else of ours."""
    missing = ["av", "rich", "typer", "PIL", "safetensors", "diffusers", "transformers", "matplotlib"]
    code = (
        f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
        "import benchmarks.gpu\nfrom benchmarks import run, shapes, suite\n"
        "case = suite.discover()['norm_modulate'], shapes.SHAPES['toy'], ('reference', 'diffusers')\n"
        "print([r.status for r in suite.measure(*case, modes=('fwd',), budget_s=1e-3)])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True)
    assert found.stdout == "['ok', 'unavailable']\n", found.stderr


def test_every_benchmark_names_inputs_that_exist(monkeypatch):
    monkeypatch.setattr(bench_attention, "_masks", lambda *_: [])  # of every shape they take minutes, and have no name

    def draw(*size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device="meta")

    for op, benchmark in suite.discover().items():
        inputs = {name for shape in shapes.SHAPES.values() for name in benchmark.inputs(shape, torch.float32, draw)}
        named = {*benchmark.differentiable, *benchmark.backward_reads, *benchmark.backward_writes}
        assert named <= inputs, op
        assert set(benchmark.backward_writes) <= set(benchmark.differentiable), op
        forward, backward = (benchmark.flops(shapes.SHAPES["toy"], mode) for mode in suite.MODES)
        least = {"unpatchify3d": 0, "qk_norm_stats": forward // 2}.get(op, forward + 1)  # moves values; dq = 2 q dsum
        assert backward >= (least if benchmark.differentiable else 0), op
        assert forward > 0 or op == "unpatchify3d", op
    assert all(name in shapes.SHAPES for names in shapes.DEFAULT.values() for name in names)
    assert peers.version("eager") is None


@pytest.mark.parametrize("name", ["grid_alone", "window_stride", "window_text_start", "causal_window_sink"])
def test_flex_attention_is_asked_for_what_the_mode_means(name):
    tokens, _, mode = MODES[name]
    i = torch.arange(tokens)
    mask = bench_attention._mask_function(tokens, mode, torch.device("cpu"))(0, 0, i[:, None], i[None])
    assert torch.equal(mask, definition(name))


def test_attention_is_timed_with_boxes_in_both_directions(require, monkeypatch):
    require("spacetime_attention", "triton", grad=True)
    from sora_kernels.attention import kernels_forward

    described, describe = [], kernels_forward.describe
    monkeypatch.setattr(kernels_forward, "describe", lambda *a: described.append(describe(*a)) or described[-1])
    _, _, mode = MODES["window_even"]
    inputs = {name: torch.randn(1, 48, 1, 16) for name in "qkv"}
    grads = [torch.randn(1, 48, 1, 16)]
    ours = outputs_and_grads(lambda **kw: bench_attention._Boxed.apply(*kw.values(), mode), inputs, grads)
    assert len(described) == 6 and None not in described, "k and v twice, then q and dO"
    plain = functools.partial(sora_kernels.spacetime_attention, **mode, impl="triton")
    expected = outputs_and_grads(plain, inputs, grads)
    assert len(described) == 6 and all(torch.equal(ours[name], expected[name]) for name in expected)


# pytest-benchmark


def pytest_benchmarks(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-p", "no:cacheprovider", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, cwd=machine.ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_suite_runs_as_pytest_benchmarks(tmp_path):
    """Every candidate of a case, with what the record of a run has, in the file that --benchmark-compare reads."""
    file = tmp_path / "saved.json"
    asked = ("--op", "norm_modulate", "--shape", "tiny", "--benchmark-max-time=0.02", f"--benchmark-json={file}")
    done = pytest_benchmarks(tmp_path, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads(file.read_text())["benchmarks"]
    rows = {f"{row['params']['mode']} {row['params']['candidate']}": row for row in saved}
    assert set(rows) == {"fwd cpu", "fwd cpu+out", "fwd cpu+call", "fwd eager", "bwd cpu", "bwd cpu+call", "bwd eager"}
    for name, row in rows.items():
        assert row["group"] == f"norm_modulate tiny {name.split()[0]} float32"
        if "+call" in name:
            assert row["extra_info"] == {}
            continue
        info = row["extra_info"]
        assert info["max_error"] <= info["error_bound"] and info["bytes"] > 0 and info["flops"] > 0
        assert info["gb_s"] == pytest.approx(info["bytes"] / row["stats"]["median"] / 1e9)
        assert info["percent_copy"] == pytest.approx(100 * info["gb_s"] / info["copy_gb_s"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [(["--op", "nrom"], "--op: there is no 'nrom'; there are"), (["--shape", "huge"], "--shape: there is no 'huge'"),
     (["--op", "norm_modulate", "--impl", "abacus"], "--impl: there is no 'abacus'; there are cpu, triton")],
)  # fmt: skip
def test_what_there_is_not_is_named_by_pytest_too(tmp_path, asked, said):
    done = pytest_benchmarks(tmp_path, *asked)
    assert done.returncode != 0 and said in done.stdout + done.stderr


def test_a_wrong_candidate_is_not_timed_by_pytest(monkeypatch):
    prepared = suite.Prepared(suite.discover()[OP], shapes.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    right, verdict = prepared.candidate("cpu", "fwd")
    assert verdict["max_error"] <= verdict["error_bound"] and right() is not None
    plain = sora_kernels.norm_modulate
    monkeypatch.setattr(sora_kernels, "norm_modulate", lambda **kwargs: plain(**kwargs) * 1.01)
    with pytest.raises(suite.Wrong, match="wrong: error .* in output 0 exceeds its bound"):
        prepared.candidate("cpu", "fwd")


def test_the_toy_blocks_have_intervals_baselines_and_dashes_for_what_no_clip_has(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"words": ["a", "red"]}')
    shares = {"colour": 1.0, "way": None}
    mean = {"mean": 3.456, "low": 2.0, "high": 5.5, "clips": 9}
    result = {
        "prompts": 64, "score": shares, "held_out": shares, "floor": shares, "vae": shares | {"psnr": 31.5},
        "intervals": {"score": {"colour": [0.9, 1.0], "way": None}, "held_out": {"colour": None, "way": None}},
        "continuation": {"checkpoint": {"position@1s": mean}, "copy last frame": {"seam": mean}},
        "permanence": {"checkpoint": {"half_life": 1.234}, "copy last frame": {"half_life": None}},
    }  # fmt: skip
    (tmp_path / "eval.json").write_text(json.dumps(result))
    lines = report.toy(tmp_path / "eval.json").splitlines()
    assert lines[2] == "| clips of the 64 prompts | 100% (90%–100%) | – |"
    assert lines[5] == "| read-out of true clips after the VAE (31.5 dB) | 100% | – |"
    assert lines[-1] == "It knows 2 words: a, red."
    lines = report.continued(tmp_path / "eval.json").splitlines()
    assert lines[0] == "| true clips continued | checkpoint | copy last frame |"
    assert "| position error to 1s, px | 3.5 (2–5.5) | – |" in lines
    assert "| jump at the seam, px | – | 3.5 (2–5.5) |" in lines
    assert lines[-1] == "| half-life behind a wall, s | 1.2 | – |"
