"""`pytest benchmarks --benchmark-only`: the suite's own definitions as pytest-benchmark tests.

    pytest benchmarks --benchmark-only --op norm_modulate --shape cpu-8192x1536 --benchmark-autosave
    pytest benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=median:10%

Options of our own: --op, --shape, --impl (repeatable), --mode, --dtype, --device, --peers, as benchmarks.run
has them. Without pytest-benchmark nothing is collected here, and the reason is said.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import run, shapes, suite

MODES = {"fwd": ("fwd",), "bwd": ("bwd",), "both": suite.MODES}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sora", "benchmarks of the operations")
    for name, kind in (("op", "operation"), ("shape", "shape"), ("impl", "implementation or peer")):
        group.addoption(f"--{name}", action="append", default=[], help=f"only this {kind}; may be repeated")
    group.addoption("--mode", choices=sorted(MODES), default="both", help="forward, backward or both")
    group.addoption("--dtype", choices=sorted(run.DTYPES), default=None, help="fp32 on a CPU, bf16 on a GPU")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--peers", action="store_true", help="torch.compile and other libraries too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "candidate" not in metafunc.fixturenames:
        return
    option, known = metafunc.config.option, suite.discover()
    device = torch.device(option.device)
    ops = _named("--op", option.op, known) or list(known)
    ids = _named("--shape", option.shape, shapes.SHAPES) or list(shapes.DEFAULT[device.type])
    cases = []
    for shape in ids:
        for op in ops:
            _named("--impl", option.impl, known[op].names)
            for mode in MODES[option.mode]:
                names = run.candidates(known[op], shapes.SHAPES[shape], option, device)
                cases += [(op, shape, mode, name) for name in names if known[op].has(name, mode)]
    metafunc.parametrize(("op", "shape", "mode", "candidate"), cases, ids=["-".join(case) for case in cases])


def _named(option: str, given: list[str], known) -> list[str]:
    for name in given:
        if name not in known:
            raise pytest.UsageError(f"{option}: there is no {name!r}; there are {', '.join(known)}")
    return given
