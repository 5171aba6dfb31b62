"""How time is taken.

CUDA: device events around one call, with a cold L2 (a buffer larger than the cache is *read* before each
sample: the lines it leaves behind are clean, so the timed call does not pay for writing them back). The read
also keeps the device busy while the host enqueues the call, so the launch itself stays out of the figure.

CPU: the host clock around enough calls to fill `SAMPLE_S`; caches are as the previous call left them.

Both: the candidates take turns, in an order shuffled from round to round, so that drift of clocks, a busy
neighbour and what the call before left in the caches fall on all of them alike; p20, p50, p80 over the rounds.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SAMPLE_S = 100e-6  # a CPU sample lasts at least this long, or the clock's own noise shows
FLUSH_BYTES = 1 << 30  # read between samples: well above any L2, and long enough to hide the launch of a backward
MIN_ROUNDS, MAX_ROUNDS, MAX_CALLS = 5, 1000, 1 << 14


@dataclass(frozen=True)
class Stats:
    """Seconds per call: percentiles over `samples` rounds of `calls` calls each."""

    p20: float
    p50: float
    p80: float
    samples: int
    calls: int = 1

    @classmethod
    def of(cls, seconds: list[float], calls: int = 1) -> Stats:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(*(ordered[round(q * last)] for q in (0.2, 0.5, 0.8)), samples=len(ordered), calls=calls)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    budget_s: float = 1.0,
    *,
    device: torch.device | str = "cpu",
    warmup: int = 2,
) -> dict[str, Stats]:
    """Time the candidates in turn, round after round, until `budget_s` is spent (at least `MIN_ROUNDS`)."""
    if budget_s <= 0:
        raise ValueError(f"budget_s: expected seconds > 0, got {budget_s}")
    device = torch.device(device)
    fns = dict(candidates)
    if not fns:
        return {}
    for fn in fns.values():
        for _ in range(max(warmup, 1)):
            fn()
    timed = clock(device)
    calls = {name: 1 if device.type == "cuda" else calls_per_sample(fn) for name, fn in fns.items()}

    order, shuffle, seconds = list(fns), random.Random(0).shuffle, {name: [] for name in fns}
    end = time.perf_counter() + budget_s
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() >= end:
            break
        shuffle(order)
        for name in order:
            seconds[name].append(timed(fns[name], calls[name]))
    return {name: Stats.of(seconds[name], calls[name]) for name in fns}


def captured(fn: Callable[[], object]) -> Callable[[], None]:
    """`fn` as the replay of a CUDA graph: for calls of several small launches, whose gaps would be timed too.

    The warm-up runs on a side stream, as capture demands.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


Clock = Callable[[Callable[[], object], int], float]
"""(fn, calls) -> seconds a call."""


def clock(device: torch.device) -> Clock:
    return _cuda_clock(device) if device.type == "cuda" else host_clock


def host_clock(fn: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - start) / calls


def calls_per_sample(fn: Callable[[], object], sample_s: float = SAMPLE_S) -> int:
    calls = 1
    while calls < MAX_CALLS and calls * host_clock(fn, calls) < sample_s:
        calls *= 2
    return calls


def _cuda_clock(device: torch.device) -> Clock:
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.zeros(max(2 * l2, FLUSH_BYTES) // 4, device=device)
    sink = torch.zeros((), device=device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(fn: Callable[[], object], calls: int) -> float:
        torch.sum(flush, dim=0, out=sink)
        start.record()
        fn()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3

    return timed


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, as measured: copy in bytes/s (read + written), matmul in FLOP/s."""

    copy: float
    matmul: dict[str, float]


def ceilings(device: torch.device | str, dtypes: tuple[torch.dtype, ...], budget_s: float = 2.0) -> Ceilings:
    """Measure copy bandwidth and, per dtype, a square matrix product on random data (zeros run faster)."""
    device = torch.device(device)
    share = budget_s / (1 + len(dtypes))
    copy, moved = copying(device)
    bandwidth = moved / interleaved({"copy": copy}, share, device=device)["copy"].p50
    side, matmul = 8192 if device.type == "cuda" else 1024, {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(a)
        stats = interleaved({"matmul": lambda a=a, b=b, c=product: torch.mm(a, b, out=c)}, share, device=device)
        matmul[str(dtype).removeprefix("torch.")] = 2 * side**3 / stats["matmul"].p50
    return Ceilings(bandwidth, matmul)


def copying(device: torch.device | str) -> tuple[Callable[[], object], int]:
    """A copy between buffers larger than any cache, and the bytes it reads and writes."""
    size = 1 << 30 if torch.device(device).type == "cuda" else 64 << 20
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


def peak_memory(fn: Callable[[], object], device: torch.device | str) -> int | None:
    """Bytes that one call allocates through torch at its peak, above what was allocated before it.

    On CUDA the caching allocator counts them; on the CPU the profiler's record of allocations is summed up.
    None where the profiler keeps no such record.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = fn()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces itself on stderr, each time
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        kept = fn()
        del kept
    results = getattr(profile.profiler, "kineto_results", None)
    if results is None:
        return None
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = peak = 0
    for _, nbytes in changes:
        held += nbytes
        peak = max(peak, held)
    return peak
