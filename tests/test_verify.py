"""python -m sora_kernels.verify: it finds what is planted, says it, and `info` remembers."""

from __future__ import annotations

import json
import re

import pytest
import torch

import sora_kernels
from sora_kernels import _library, info, verify
from sora_kernels.testing import max_error

CASES = list(verify._cases())
OF = "gate_residual"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sora_kernels" / "verified.json"


@pytest.fixture
def planted(monkeypatch):
    """`planted(fault)`: the reference's forward of gate_residual, then `fault(out)`."""

    def plant(fault):
        right = _library.call(f"{OF}_fwd", "reference")

        def kernel(*args):
            right(*args)
            fault(args[-1])

        monkeypatch.setitem(_library._overloads[f"{OF}_fwd"], "cpu", kernel)

    return plant


@pytest.fixture
def small(monkeypatch):
    """Of every operation only the first, small case."""
    first = {case.op: case for case in reversed(CASES)}
    monkeypatch.setattr(verify, "_cases", lambda: iter(first.values()))


def test_every_public_operation_has_a_case():
    public = {name for name in sora_kernels.__all__ if f"{name}_fwd" in _library.ops()}
    assert {case.op for case in CASES} == public


def test_everything_here_is_right_and_info_remembers(small, cache, capsys, require):
    require(OF, "cpu", grad=True)
    assert verify.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    rows = {tuple(line.split()[:2]) for line in out.splitlines() if line[:1].isalpha()}
    assert {(op, impl) for op in {case.op for case in CASES} for impl in ("cpu", "reference")} <= rows
    assert "0 of 0" not in out and "triton needs a CUDA device: Triton's interpreter says nothing of one" in out
    (entry,) = json.loads(cache.read_text()).values()
    assert entry["faults"] == [] and entry["checked"] >= 26 * 3
    info.main([])
    said = capsys.readouterr().out
    assert f"{entry['checked']} of {entry['checked']} right  ({info._cpu_name()})" in said
    cache.write_text(cache.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.0"'))
    info.main([])
    assert "usable; backward: embed_watermark is forward-only in cpu\n" in said
    assert "with torch 2.0 then: run python -m sora_kernels.verify again" in capsys.readouterr().out


FAULTS = {
    "a value beyond the bound": lambda out: out.view(-1)[7].add_(0.02),
    "a value nobody wrote": lambda out: out.view(-1)[-1].fill_(float("nan")),
    "another value each time": lambda out: out.mul_(1 + 1e-7 * torch.randint(1, 9, ())),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(name, planted, small, capsys):
    planted(FAULTS[name])
    assert verify.main(["--device", "cpu", "--op", OF]) == 1
    out = capsys.readouterr().out
    assert "FAULT" in out and f"\n  {OF} cpu fp32\n" in out and f"{OF} reference" not in out.partition("Beyond")[2]


def test_a_kernel_that_fails_is_a_fault_with_its_message_once(planted, small, capsys):
    def fails(out):
        raise RuntimeError("no such kernel\nand a traceback")

    planted(fails)
    assert verify.main(["--device", "cpu", "--op", OF]) == 1
    out = capsys.readouterr().out
    assert out.count("RuntimeError: no such kernel") == 1 and "traceback" not in out


def test_a_forward_only_implementation_is_checked_forward(planted, monkeypatch):
    planted(lambda out: None)
    monkeypatch.setitem(_library._impls, f"{OF}_bwd", ("reference",))
    case = next(case for case in CASES if case.op == OF)
    assert verify.check(case, "cpu", torch.float32, torch.device("cpu")) <= 1


@pytest.mark.parametrize("op", ["norm_modulate", "spacetime_attention", "causal_conv3d"])
def test_the_baseline_is_plain_pytorch(op):
    """The formula without upcasts errs more than with them: the bound is that of the rule, not of our own reference."""
    case = next(case for case in CASES if case.op == op)
    inputs = {name: torch.randn(shape).bfloat16() for name, shape in case.shapes.items()}
    oracle = case.formula(**{n: t.double() for n, t in inputs.items()}, **case.arguments)
    with verify._Plain():
        plain = case.formula(**inputs, **case.arguments)
    assert plain.dtype == torch.bfloat16
    assert max_error(plain, oracle) > 1.2 * max_error(case.formula(**inputs, **case.arguments), oracle) > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--op", "norm_modulat"], "--op must be one of causal_conv3d, .*got 'norm_modulat'"),
        (["--device", "tpu"], "--device 'tpu' cannot be used: "),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N; got 'meta'"),
        pytest.param(["--device", "cuda"], "--device 'cuda' cannot be used: ",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)  # fmt: skip
def test_bad_arguments_are_said_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        verify.main(arguments)
    assert exit.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, last), last


def test_a_record_that_cannot_be_kept_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said = info.record_verification(torch.device("cpu"), 3, [])
    assert said.startswith("Not kept") and info.last_verification(info._cpu_name()) is None
