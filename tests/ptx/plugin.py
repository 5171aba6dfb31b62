"""pytest -p ptx.plugin --ptx=90 ...: the project's own Triton tests with compiled code, executed as sm_90 would.

Run in tests/, or with it on PYTHONPATH. Tests marked gpu run too where they take the CPU for their device.
--ptx-schedule=N draws another order of warps and of asynchronous copies.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # before conftest, which would choose the interpreter

import collections

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx", type=int, default=80, metavar="SM", help="the compute capability to compile for")
    parser.addoption("--ptx-schedule", type=int, default=0, metavar="SEED", help="of warps and asynchronous copies")


LAUNCHES: collections.Counter = collections.Counter()


def count(kernel, counters) -> None:
    LAUNCHES[kernel.__name__] += 1


def pytest_configure(config: pytest.Config) -> None:
    """Before collection: test modules ask at import whether Triton runs here."""
    from .launcher import triton_on

    device = triton_on(config.getoption("--ptx"), count, schedule=config.getoption("--ptx-schedule"))
    device.__enter__()
    config.add_cleanup(lambda: device.__exit__(None, None, None))


def pytest_terminal_summary(terminalreporter) -> None:
    executed = ", ".join(f"{name} {count}" for name, count in sorted(LAUNCHES.items()))
    terminalreporter.write_line(f"launches executed as PTX: {executed or 'none'}")
