"""pytest -p ptx.plugin --ptx=90 ...: the project's own Triton tests with compiled code, executed as sm_90 would.

Run in tests/, or with it on PYTHONPATH. Tests marked gpu run too where they take the CPU for their device.
--ptx-schedule=N draws another order of programs and warps and of asynchronous copies; --ptx-again=N runs each launch
twice, the second time in that order, and asks for the same bits. At the end it says what was executed.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # before conftest, which would choose the interpreter

import collections

import pytest
import torch

TOLD = ("mma", "wgmma", "cp.async.bulk")  # classes of instructions, where a kernel has them


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx", type=int, default=80, metavar="SM", help="the compute capability to compile for")
    parser.addoption("--ptx-schedule", type=int, default=0, metavar="SEED", help="of programs, warps and copies")
    parser.addoption("--ptx-again", type=int, metavar="SEED", help="run each launch again in this order")


EXECUTED: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)


def count(kernel, counters) -> None:
    executed = EXECUTED[kernel.__name__]
    executed["launches"] += 1
    executed["in bf16"] += any(t.dtype == torch.bfloat16 for t in counters.tensors.values())
    executed.update({name: n for name, n in counters.instructions().items() if name in TOLD})


def pytest_configure(config: pytest.Config) -> None:
    """Before collection: test modules ask at import whether Triton runs here."""
    from .launcher import triton_on

    schedules = dict(schedule=config.getoption("--ptx-schedule"), again=config.getoption("--ptx-again"))
    device = triton_on(config.getoption("--ptx"), count, **schedules)
    device.__enter__()
    config.add_cleanup(lambda: device.__exit__(None, None, None))


def pytest_terminal_summary(terminalreporter) -> None:
    for kernel, executed in sorted(EXECUTED.items()):
        told = ", ".join(f"{name} {n}" for name, n in executed.items() if n)
        terminalreporter.write_line(f"executed as PTX: {kernel}: {told}")
