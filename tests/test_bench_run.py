"""A whole run: time shared out, progress said, a line for the machine, rows kept, the model beside the operations."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from test_benchmarks import FIELDS

from benchmarks import dit, machine, patched, progress, report, run, suite, timing
from benchmarks.models import MODELS
from sora_kernels._dispatch import why_not

TOY = dit.Case("toy", (2, 2, 3), layers=1, text=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    known = timing.Ceilings(2e9, {"float32": 1e12})
    monkeypatch.setattr(timing, "ceilings", lambda *_, **__: known)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    monkeypatch.setitem(dit.CASES, "dit-toy", TOY)


def measured(tmp_path, *arguments):
    target = tmp_path / "rows.jsonl"
    status = run.main(["--device", "cpu", "--budget", "0.001", "--json", str(target), *arguments])
    return status, target


def test_the_time_is_shared_out_and_what_is_left_is_said():
    now, out = [0.0], io.StringIO()
    shared = progress.Progress(4, 1.0, 5.0, clock=lambda: now[0], out=out)
    assert shared.begin("a", 2) == pytest.approx(15 / 2 / 2)  # a quarter, half of it for checking, two modes
    now[0] = 12.5  # it took 5 seconds more than its timing
    assert shared.begin("b", 1) == 5.0  # no more than was asked for
    now[0] = 56.0
    assert shared.begin("c", 1) == progress.LEAST_S
    now[0] = 60.5
    assert shared.begin("d", 1) is None
    assert out.getvalue().splitlines() == [
        "[1/4] a, 0:00 gone, about 1:00 left",
        "[2/4] b, 0:12 gone, about 0:37 left",
        "[3/4] c, 0:56 gone, about 0:04 left",
    ]
    endless = progress.Progress(3, None, 5.0, clock=lambda: now[0], out=out)
    assert [endless.begin("a", 2) for _ in range(3)] == [5.0] * 3


def test_a_file_begins_with_its_machine_and_keeps_the_rows_of_an_interrupted_run(tmp_path, monkeypatch, capsys):
    measure, cases = suite.measure, []

    def interrupted(benchmark, *arguments, **how):
        cases.append(benchmark.name)
        if len(cases) == 2:
            raise KeyboardInterrupt
        return measure(benchmark, *arguments, **how)

    monkeypatch.setattr(suite, "measure", interrupted)
    how = ("--op", "norm_modulate", "--op", "gate_residual", "--shape", "toy", "--impl", "reference", "--mode", "fwd")
    status, target = measured(tmp_path, *how)
    said = capsys.readouterr()
    first, *rows = map(json.loads, target.read_text().splitlines())
    assert status == 130 and cases == ["norm_modulate", "gate_residual"] and "interrupted" in said.out
    assert first["format"] == report.FORMAT and first["machine"]["command"] == sys.argv[1:]
    assert [row["impl"] for row in rows] == ["reference", "eager"] == [r["impl"] for r in report.read_jsonl(target)]
    assert "[1/2] norm_modulate at toy, 0:00 gone" in said.err and "2 rows in" in said.out


def test_time_that_is_up_ends_a_run_and_names_what_it_left_out(tmp_path, capsys):
    status, target = measured(tmp_path, "--op", "norm_modulate", "--shape", "toy", "--minutes", "1e-9")
    assert status == 0 and report.read_jsonl(target) == []
    assert "the time is up; not measured: norm_modulate at toy" in capsys.readouterr().out


def test_a_device_that_vanishes_keeps_the_rows_before(tmp_path, monkeypatch, capsys):
    def vanishing(*arguments, **how):
        yield from suite_measure(*arguments, **how)
        raise suite.DeviceLost("norm_modulate cuda bwd at toy: illegal memory access")

    suite_measure = suite.measure
    monkeypatch.setattr(suite, "measure", vanishing)
    how = ("--op", "norm_modulate", "--shape", "toy", "--impl", "reference", "--mode", "fwd")
    _, target = measured(tmp_path, *how)
    assert len(report.read_jsonl(target)) == 2 and "the device is in an error state" in capsys.readouterr().out


def test_the_model_is_measured_beside_diffusers_with_the_same_weights(tmp_path, capsys):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    if reason := why_not("spacetime_attention", "cpu", "cpu"):
        pytest.skip(reason)
    status, target = measured(tmp_path, "--op", "dit", "--op", "dit_block", "--shape", "dit-toy")
    rows = report.read_jsonl(target)
    assert status == 0, capsys.readouterr().out
    assert [(r["op"], r["impl"], r["kind"], r["mode"], r["status"]) for r in rows] == [
        (op, impl, kind, mode, "ok")
        for op in dit.OPS for mode in ("fwd", "fwd+bwd") for impl, kind in (("cpu", "ours"), ("eager", "baseline"))
    ]  # fmt: skip
    for row in rows:
        assert set(row) == FIELDS and row["family"] == "dit" and 0 < row["max_error"] <= row["error_bound"] < 1e-3
        assert row["dims"]["tokens"] == 12 and row["dims"]["layers"] == 1 and row["peak_memory"] > 0


def test_a_wrong_transformer_gets_no_figure(monkeypatch):
    right = dit.ours

    def wrong(model, op, grid, impl):
        call, weights = right(model, op, grid, impl)
        return (call if impl == "reference" else lambda *given: call(*given) * (1 + 1e-3)), weights

    monkeypatch.setattr(dit, "ours", wrong)
    monkeypatch.setattr(suite, "our_impls", lambda *_: ("cpu",))
    how = dict(modes=("fwd",), dtype=torch.float32, device=torch.device("cpu"), budget_s=1e-3)
    (own, *_) = dit.measure("dit", TOY, **how)
    assert own.status == "failed" and "exceeds its bound" in own.reason and own.stats is None


@pytest.mark.parametrize("op", dit.OPS)
def test_flops_of_a_transformer_are_those_of_its_matrix_products(op):
    """Against torch's own count of diffusers' module, which leaves out attention on a CPU."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from torch.utils.flop_counter import FlopCounterMode

    model, (T, H, W) = dit.SoraDiT(TOY.config(op)), TOY.grid
    given = dit.inputs(op, TOY, TOY.grid, model, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        dit.theirs(model, op, TOY.grid, False)[0](*given)
    S, D = T * H * W, model.config.dim
    attention = 4 * S * (S + TOY.text) * D
    assert dit.flops(op, TOY) == pytest.approx(counter.get_total_flops() + attention, rel=1e-3)


def test_every_model_benchmark_has_its_defaults_and_a_size():
    for name, model in MODELS.items():
        assert name == model.name and set(model.default) == {"cpu", "cuda"}
        for names in model.default.values():
            for case in map(model.cases.__getitem__, names):
                assert model.memory(case) > 1 << 20 and model.dims(case)["grid"] == case.grid


def test_a_model_too_large_for_the_machine_is_refused_before_it_starts(capsys, monkeypatch):
    monkeypatch.setattr(run, "available", lambda device: 1 << 30)
    assert run.main(["--device", "cpu", "--op", "dit", "--shape", "dit-wan14b-480p"]) == 2
    assert "--shape dit-wan14b-480p: the check against fp64 needs about" in capsys.readouterr().err


def test_the_page_on_dropping_in_has_the_record_of_what_it_gains():
    file = machine.RESULTS / "amd-epyc-avx512" / "patched" / "blocks.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(row["dtype"], row["mode"]) for row in rows} >= {("bfloat16", "eager"), ("float32", "compiled blocks")}
    assert patched.table(rows) in (machine.ROOT / "docs" / "dropping_in.md").read_text()
