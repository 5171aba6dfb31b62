"""Measure the operations and the model: against fp64 first, then against eager, `torch.compile` and installed peers.

    python -m benchmarks.run --op NAME|all [--shape ID] [--impl NAME] [--mode fwd|bwd|both]
        [--peers] [--json FILE]
    python -m benchmarks.run --base REV [--fail-under 0.95]      beside a revision instead: see benchmarks.compare

Exit status: 0 if every measured implementation of ours was right, 1 if one was wrong, crashed, or was asked
for by name and cannot run here, 2 for a bad request.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TextIO

import torch

from sora_kernels._dispatch import WITH_TRITON
from sora_kernels.info import end_with_the_reader
from sora_model.machine import available

from . import compare, machine, peers, report, shapes, suite, table, timing
from .models import MODELS, ModelBenchmark
from .progress import Progress
from .suite import IMPLS, MODES, Benchmark, Result

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

INTERRUPTED = "interrupted: the rows above are those of the cases that ended"


class BadRequest(Exception):
    """What was asked for does not exist or cannot be done here. The message lists what does exist."""


@dataclass(frozen=True)
class Job:
    """A case to measure: seconds a mode -> its rows."""

    name: str
    rows: Callable[[float], Iterator[dict[str, object]]]


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except (BadRequest, compare.BadBase) as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    device = _device(args.device)
    _check(args, device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    benchmarks = suite.discover()
    asked = [_known("op", op, [*benchmarks, *MODELS, "all"]) for op in args.op]
    every = not asked or "all" in asked
    ops, models = ([name for name in known if every or name in asked] for known in (benchmarks, MODELS))
    known = dict.fromkeys([*shapes.SHAPES, *(shape for model in MODELS.values() for shape in model.cases)])
    named = [_known("shape", shape, known) for shape in args.shape]
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    for impl in args.impl:
        for op in ops:
            _known(f"impl of {op}", impl, benchmarks[op].names)
    if args.impl or args.base is not None or args.graph:  # these are of operations
        if not every and models:
            raise BadRequest(f"{models[0]} is a model, which takes no --impl, --base and --graph")
        models = []
    modes = MODES if args.mode == "both" else (args.mode,)
    cases = [(benchmarks[op], shapes.SHAPES[i]) for i in _fitting(named, device, ops) for op in ops]
    if not named and device.type == "cpu":
        cases = [(b, shape) for b, shape in cases if b.op != "spacetime_attention"]
        cases += [(b, shapes.SHAPES[i]) for i in shapes.CPU_ATTENTION for b in map(benchmarks.get, ops)
                  if b.op == "spacetime_attention"]  # fmt: skip
    if args.base is not None:
        ours = ((b, shape, tuple(args.impl) or suite.our_impls(b.op, device)) for b, shape in cases)
        return compare.compare(
            args.base, ours, modes, dtype=dtype, device=device, budget_s=args.budget, seed=args.seed,
            threads=args.threads or 0, fail_under=args.fail_under,
        )  # fmt: skip
    wholes = [(MODELS[op], shape) for op in models for shape in _fitting_cases(MODELS[op], named, device)]
    if not cases and not wholes:
        raise BadRequest(f"none of {', '.join(asked)} has a shape {', '.join(named)}")
    sink = _sink(args.json)

    facts = machine.facts(device)
    ceilings = timing.ceilings(device, (dtype,), budget_s=min(2.0, args.budget))
    print(f"{facts['device']}, {_ceilings_line(ceilings)}; commit {facts['commit']}{' (dirty)' * bool(facts['dirty'])}")
    if sink:
        _append(sink, args.json, {"format": report.FORMAT, "machine": machine.described(device)})
    common = dtype, ceilings, facts, device

    def of_op(benchmark: Benchmark, shape: shapes.Shape, budget_s: float) -> Iterator[dict[str, object]]:
        results = suite.measure(
            benchmark, shape, candidates(benchmark, shape, args, device), modes=modes, dtype=dtype,
            device=device, budget_s=budget_s, graph=args.graph, seed=args.seed,
        )  # fmt: skip
        return (make_row(benchmark, shape, result, *common, args.graph) for result in results)

    def of_model(model: ModelBenchmark, shape: str, budget_s: float) -> Iterator[dict[str, object]]:
        how = dict(dtype=dtype, device=device, budget_s=budget_s, compiled=args.peers, seed=args.seed)
        dims = model.dims(model.cases[shape])
        results = model.measure(shape, modes, **how)
        return (record(model.name, model.family, shape, dims, result, *common) for result in results)

    jobs = [Job(f"{b.name} at {shape.id}", partial(of_op, b, shape)) for b, shape in cases]
    jobs[len(ops) : len(ops)] = [Job(f"{m.name} at {shape}", partial(of_model, m, shape)) for m, shape in wholes]
    rows, ended = _measured(jobs, Progress(len(jobs), args.minutes, args.budget), len(modes), sink, args.json)
    if sink:
        sink.close()
    table.print_table(rows)
    if ended:
        print(ended)
    if sink:
        print(f"{len(rows)} rows in {args.json}; sora bench report {args.json} draws them")
    ours = [row for row in rows if row["kind"].startswith("ours")]
    unable = any(row["impl"] in args.impl and row["status"] == "unavailable" for row in ours)
    return 130 if ended == INTERRUPTED else int(unable or any(row["status"] == "failed" for row in ours))


def _measured(
    jobs: list[Job], progress: Progress, modes: int, sink: TextIO | None, path: str | None
) -> tuple[list[dict[str, object]], str]:
    """(the rows, why it ended early or nothing). Each row is on file before the next is measured."""
    rows: list[dict[str, object]] = []
    try:
        for done, job in enumerate(jobs):
            if (budget := progress.begin(job.name, modes)) is None:
                return rows, f"the time is up; not measured: {', '.join(job.name for job in jobs[done:])}"
            for row in job.rows(budget):
                rows.append(row)
                if sink:
                    _append(sink, path, row)
    except suite.DeviceLost as error:
        return rows, f"the device is in an error state, and nothing after this was measured: {error}"
    except KeyboardInterrupt:
        return rows, INTERRUPTED
    return rows, ""


def make_row(
    benchmark: Benchmark,
    shape: shapes.Shape,
    result: Result,
    dtype: torch.dtype,
    ceilings: timing.Ceilings,
    facts: dict[str, object],
    device: torch.device,
    graph: bool = False,
) -> dict[str, object]:
    name, family, dims = benchmark.name, suite.family(benchmark), benchmark.dims(shape)
    return record(name, family, shape.id, dims, result, dtype, ceilings, facts, device, graph)


def record(
    op: str,
    family: str,
    shape: str,
    dims: dict[str, object],
    result: Result,
    dtype: torch.dtype,
    ceilings: timing.Ceilings,
    facts: dict[str, object],
    device: torch.device,
    graph: bool = False,
) -> dict[str, object]:
    """One line of the results. Figures are null where there is none; `status` and `reason` say why."""
    stats, name = result.stats, str(dtype).removeprefix("torch.")
    copy, matmul = result.copy or ceilings.copy, ceilings.matmul[name]
    bandwidth = stats and result.bytes / stats.p50
    rate = stats and result.flops / stats.p50
    if device.type == "cuda":
        timer = "CUDA graph, cold L2" if graph and result.mode == "fwd" else "events, cold L2"
    else:
        timer = "host clock"
    if suite.impl_of(result.impl) in IMPLS:  # tables compare whole calls, and what allocates with what allocates
        kind = "ours" if result.impl in IMPLS else "ours, call alone" if suite.is_call(result.impl) else "ours, out="
    else:
        kind = "baseline" if result.impl in ("eager", "compile") else "peer"
    return {
        "op": op, "family": family, "impl": result.impl, "kind": kind,
        "impl_version": peers.version(result.impl), "shape": shape, "dims": dims,
        "dtype": name,
        "mode": result.mode, "status": result.status, "reason": result.reason,
        "p20_us": stats and stats.p20 * 1e6, "p50_us": stats and stats.p50 * 1e6,
        "p80_us": stats and stats.p80 * 1e6,
        "samples": stats and stats.samples, "timer": timer,
        "bytes": result.bytes, "gb_s": stats and bandwidth / 1e9,
        "percent_copy": stats and 100 * bandwidth / copy,
        "flops": result.flops, "tflop_s": stats and rate / 1e12,
        "percent_matmul": stats and 100 * rate / matmul,
        "copy_gb_s": copy / 1e9, "matmul_tflop_s": matmul / 1e12,
        "max_error": result.max_error, "error_bound": result.error_bound, "error_in": result.error_in,
        "peak_memory": result.peak_memory,
        **facts,
    }  # fmt: skip


def candidates(
    benchmark: Benchmark, shape: shapes.Shape, args: argparse.Namespace, device: torch.device
) -> tuple[str, ...]:
    """Ours, then eager, which every ratio is taken against, then what --peers adds."""
    ours = args.impl or suite.our_impls(benchmark.op, device)
    if not args.impl and benchmark.outputs and "cpu" in ours:
        ours = (*ours, suite.with_out("cpu"))
    if not args.impl and shape.id == "tiny":
        ours = (*ours, *map(suite.call_of, ours[:1]))
    others = ("compile", *benchmark.peers) if args.peers else ()
    return tuple(dict.fromkeys((*ours, "eager", *others)))


def _ceilings_line(ceilings: timing.Ceilings) -> str:
    matmul = ", ".join(f"{dtype} matmul {rate / 1e12:.3g} TFLOP/s" for dtype, rate in ceilings.matmul.items())
    return f"measured copy {ceilings.copy / 1e9:.4g} GB/s, {matmul}"


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadRequest("--device cuda: torch sees no CUDA device here; use --device cpu")
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def _known(what: str, name: str, known: Iterable[str]) -> str:
    if name not in known:
        raise BadRequest(f"unknown {what} {name!r}; there are: {', '.join(known)}")
    return name


def _check(args: argparse.Namespace, device: torch.device) -> None:
    if args.threads is not None and not 1 <= args.threads <= 1024:
        raise BadRequest(f"--threads: expected 1 to 1024, got {args.threads}")
    if not args.budget > 0:
        raise BadRequest(f"--budget: expected seconds > 0, got {args.budget}")
    if args.minutes is not None and not args.minutes > 0:
        raise BadRequest(f"--minutes: expected more than 0, got {args.minutes}")
    if not 0 <= args.seed < 2**63:
        raise BadRequest(f"--seed: expected 0 to {2**63 - 1}, got {args.seed}")
    if args.graph and device.type != "cuda":
        raise BadRequest("--graph: CUDA graphs need a CUDA device")
    if args.fail_under is not None and not (args.base and 0 < args.fail_under <= 1):
        raise BadRequest(f"--fail-under: expected a ratio above 0, up to 1, and --base; got {args.fail_under}")
    if args.base is not None and (args.json or args.peers or args.graph or args.minutes):
        raise BadRequest("--base: compares ours alone, without --peers, --graph, --json and --minutes")
    interpreted = device.type == "cuda" or not set(WITH_TRITON).isdisjoint(args.impl)
    if os.environ.get("TRITON_INTERPRET") == "1" and interpreted:
        raise BadRequest("TRITON_INTERPRET=1 is set, and the interpreter's time means nothing; unset it")


def _fitting(named: list[str], device: torch.device, ops: list[str]) -> list[str]:
    """The shapes of operations that fit, of those that were named or else of the device's own.

    The fp64 oracle with its gradients is the largest thing a measurement holds: some 24 times x.
    """
    ids = [name for name in named if name in shapes.SHAPES] if named else list(shapes.DEFAULT[device.type])
    need = {shape.id: 24 * 8 * shape.elements for shape in shapes.SHAPES.values()}
    return _affordable(ids if ops else [], need, device, bool(named))


def _fitting_cases(model: ModelBenchmark, named: list[str], device: torch.device) -> list[str]:
    ids = [name for name in named if name in model.cases] if named else list(model.default[device.type])
    need = {name: model.memory(case) for name, case in model.cases.items()}
    return _affordable(ids, need, device, bool(named))


def _affordable(ids: list[str], need: Mapping[str, int], device: torch.device, named: bool) -> list[str]:
    """Those that fit into the memory there is; one that was asked for by name and does not is refused."""
    have = available(device)
    fitting = [name for name in need if need[name] <= have]
    for name in ids:
        if name not in fitting:
            message = (
                f"--shape {name}: the check against fp64 needs about {need[name] / 2**30:.1f} GiB, of which "
                f"{have / 2**30:.1f} are free on {device}; shapes that fit: {', '.join(fitting) or 'none'}"
            )
            if named:
                raise BadRequest(message)
            print(f"left out: {message}")
    return [name for name in ids if name in fitting]


def _sink(path: str | None):
    if path is None:
        return None
    try:
        # O_NONBLOCK: a named pipe without a reader is refused, instead of waited for
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
        handle = os.open(path, flags, 0o666)
        os.set_blocking(handle, True)
        return os.fdopen(handle, "w", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadRequest(f"--json {path}: cannot write there: {getattr(error, 'strerror', error)}") from error


def _append(sink, path: str, row: dict[str, object]) -> None:
    try:
        sink.write(json.dumps(row) + "\n")
        sink.flush()
    except OSError as error:
        with contextlib.suppress(OSError):
            sink.close()  # which tries once more
        raise BadRequest(f"--json {path}: cannot write there: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", action="append", default=[], metavar="NAME", help="repeatable; default: all")
    parser.add_argument(
        "--shape", action="append", default=[], metavar="ID", help="repeatable; default: a list per device"
    )
    parser.add_argument("--impl", action="append", default=[], metavar="NAME",
                        help=f"repeatable: {', '.join(IMPLS)}; default: all that run")  # fmt: skip
    parser.add_argument(
        "--mode", choices=(*MODES, "both"), default="both", help="both: forward and backward, a row each"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--peers", action="store_true", help="also torch.compile and the libraries that are installed")
    parser.add_argument("--base", metavar="REV", help="compare with a revision, in turns, with 95 %% intervals")
    parser.add_argument("--fail-under", type=float, metavar="RATIO",
                        help="with --base: exit status 1 where a ratio is below it, its interval below 1")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="append one line per row as it comes")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--budget", type=float, default=2.0, metavar="S", help="seconds per op, shape and mode (default 2)"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="share M minutes out over all cases")
    parser.add_argument("--graph", action="store_true", help="time the forward from a CUDA graph, without launch gaps")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    end_with_the_reader()
    sys.exit(main())
