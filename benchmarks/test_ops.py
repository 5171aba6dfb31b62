"""Each operation x shape x mode x candidate as one pytest-benchmark test; see conftest.py for how to choose them.

A candidate is first held to the fp64 oracle: a wrong one fails and is not timed. Groups are of what may be compared;
`extra_info` has the fewest bytes, FLOPs, GB/s, % of a copy measured here, and the error beside its bound. Rows such as
`cpu+call` are the cost of Python around a call. Candidates run one after the other, as pytest-benchmark runs tests: for
ratios of candidates that take turns, `python -m benchmarks.run` is the better clock.
"""

from __future__ import annotations

import functools
from functools import partial

import pytest
import torch

from benchmarks import peers, run, shapes, suite, timing
from sora_kernels._dispatch import Unavailable

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install '.[bench]'")


@functools.lru_cache(maxsize=1)  # the inputs of one shape at a time: cases come in that order
def prepared(op: str, shape: str, dtype: torch.dtype, device: torch.device) -> suite.Prepared:
    return suite.Prepared(suite.discover()[op], shapes.SHAPES[shape], dtype, device)


@functools.lru_cache
def copy_bandwidth(dtype: torch.dtype, device: torch.device) -> float:
    return timing.ceilings(device, (dtype,), budget_s=0.5).copy


def test_op(benchmark, pytestconfig, op, shape, mode, candidate):
    device = torch.device(pytestconfig.getoption("device"))
    dtype = run.DTYPES[pytestconfig.getoption("dtype") or ("bf16" if device.type == "cuda" else "fp32")]
    ready = prepared(op, shape, dtype, device)
    try:
        call, verdict = ready.candidate(candidate, mode)
    except (peers.Missing, Unavailable) as error:
        pytest.skip(ready.why_not(candidate, mode, error))
    synchronised = partial(_synchronised, call) if device.type == "cuda" else call
    benchmark.group = f"{op} {shape} {mode} {str(dtype).removeprefix('torch.')}"
    with torch.set_grad_enabled(mode == "bwd"):
        benchmark(synchronised)
    if suite.is_call(candidate):
        return
    moved, copy = ready.case.bytes(mode), copy_bandwidth(dtype, device)
    flops = ready.benchmark.flops(shapes.SHAPES[shape], mode)
    benchmark.extra_info.update(verdict, bytes=moved, flops=flops, copy_gb_s=copy / 1e9)
    if benchmark.stats:  # none with --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info.update(gb_s=moved / seconds / 1e9, percent_copy=100 * moved / seconds / copy)


def _synchronised(call) -> None:
    call()
    torch.cuda.synchronize()
