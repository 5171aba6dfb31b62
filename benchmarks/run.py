"""Measure public operations: against fp64 first, then against eager, `torch.compile` and installed peers.

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
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable

import torch

from sora_kernels._dispatch import WITH_TRITON
from sora_kernels.info import end_with_the_reader
from sora_model.machine import available

from . import compare, machine, peers, shapes, suite, targets, timing
from .suite import IMPLS, MODES, Benchmark, Result

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = (
    "op", "shape", "dtype", "mode", "impl", "p50 µs", "p20–p80", "GB/s", "% copy", "TFLOP/s", "% mm",
    "x eager", "x compile", "error", "bound", "MiB",
)  # fmt: skip


class BadRequest(Exception):
    """What was asked for does not exist or cannot be done here. The message lists what does exist."""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except (BadRequest, compare.BadBase) as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    device = _device(args.device)
    if args.threads is not None:
        if not 1 <= args.threads <= 1024:
            raise BadRequest(f"--threads: expected 1 to 1024, got {args.threads}")
        torch.set_num_threads(args.threads)
    if not args.budget > 0:
        raise BadRequest(f"--budget: expected seconds > 0, got {args.budget}")
    if args.stop_after is not None and not args.stop_after > 0:
        raise BadRequest(f"--stop-after: expected seconds > 0, got {args.stop_after}")
    if not 0 <= args.seed < 2**63:
        raise BadRequest(f"--seed: expected 0 to {2**63 - 1}, got {args.seed}")
    if args.graph and device.type != "cuda":
        raise BadRequest("--graph: CUDA graphs need a CUDA device")
    benchmarks = suite.discover()
    asked = [_known("op", op, [*benchmarks, "all"]) for op in args.op]
    ops = tuple(benchmarks) if not asked or "all" in asked else tuple(asked)
    ids = [_known("shape", i, shapes.SHAPES) for i in args.shape] or list(shapes.DEFAULT[device.type])
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    for impl in args.impl:
        for op in ops:
            _known(f"impl of {op}", impl, benchmarks[op].names)
    interpreted = device.type == "cuda" or not set(WITH_TRITON).isdisjoint(args.impl)
    if os.environ.get("TRITON_INTERPRET") == "1" and interpreted:
        raise BadRequest("TRITON_INTERPRET=1 is set, and the interpreter's time means nothing; unset it")
    modes = MODES if args.mode == "both" else (args.mode,)
    ids = _fitting(ids, device, named=bool(args.shape))
    cases = [(benchmarks[op], shapes.SHAPES[i]) for i in ids for op in ops]
    if args.fail_under is not None and not (args.base and 0 < args.fail_under <= 1):
        raise BadRequest(f"--fail-under: expected a ratio above 0, up to 1, and --base; got {args.fail_under}")
    if args.base is not None:
        if args.json or args.peers or args.graph:
            raise BadRequest("--base: compares ours alone, without --peers, --graph and --json")
        ours = ((b, shape, tuple(args.impl) or suite.our_impls(b.op, device)) for b, shape in cases)
        return compare.compare(
            args.base, ours, modes, dtype=dtype, device=device, budget_s=args.budget, seed=args.seed,
            threads=args.threads or 0, fail_under=args.fail_under,
        )  # fmt: skip
    sink = _sink(args.json)

    facts = machine.facts(device)
    ceilings = timing.ceilings(device, (dtype,), budget_s=min(2.0, args.budget))
    print(f"{facts['device']}, {_ceilings_line(ceilings)}; commit {facts['commit']}{' (dirty)' * bool(facts['dirty'])}")
    rows, lost, end = [], None, time.monotonic() + (args.stop_after or float("inf"))
    for done, (benchmark, shape) in enumerate(cases):
        if time.monotonic() > end:
            left = ", ".join(f"{b.name} at {s.id}" for b, s in cases[done:])
            print(f"stopped after {args.stop_after:.0f} s; not measured: {left}")
            break
        results = suite.measure(
            benchmark, shape, candidates(benchmark, shape, args, device), modes=modes, dtype=dtype,
            device=device, budget_s=args.budget, graph=args.graph, seed=args.seed,
        )  # fmt: skip
        try:
            for result in results:
                rows.append(make_row(benchmark, shape, result, dtype, ceilings, facts, device, args.graph))
                if sink:
                    _append(sink, args.json, rows[-1])
        except suite.DeviceLost as error:
            lost = error
            break
    if sink:
        sink.close()
    print_table(rows)
    if lost:
        print(f"the device is in an error state, and nothing after this was measured: {lost}")
    ours = [row for row in rows if row["kind"].startswith("ours")]
    named = [row for row in ours if row["impl"] in args.impl and row["status"] == "unavailable"]
    return int(bool(named) or any(row["status"] == "failed" for row in ours))


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


def print_table(rows: list[dict[str, object]]) -> None:
    """The rows that have figures; then, plainly, where we lose or miss a goal, and what has no figure and why."""
    timed: dict[tuple[object, ...], dict[str, dict[str, object]]] = defaultdict(dict)
    for row in rows:
        if row["status"] == "ok":
            timed[_case(row)][row["impl"]] = row
    lines = [_cells(row, timed[_case(row)]) for row in rows if row["status"] == "ok"]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 240
    columns, lines = _narrowed(COLUMNS, lines, width)
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(columns, lines))
    else:
        table = Table(*columns, box=box.SIMPLE_HEAD)
        for line in lines:
            table.add_row(*line)
        Console(width=width).print(table)
    for own in timed.values():
        for ours in (r for r in own.values() if r["kind"] == "ours"):
            for other in (r for r in own.values() if r["kind"][:4] != "ours" and r["p50_us"] < ours["p50_us"]):
                ratio = other["p50_us"] / ours["p50_us"]
                print(f"slower than {other['impl']}: {_name(ours)} at {ours['shape']}, {ratio:.2f}x")
    for line in targets.shortfalls(rows):
        print(line)
    missing: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for row in rows:
        if row["status"] != "ok":
            missing[row["status"], _name(row), row["reason"]].append(row["shape"])
    for (status, name, reason), at in missing.items():
        print(f"{status}: {name} at {', '.join(dict.fromkeys(at))}: {reason}")


def plain_table(columns: Iterable[str], lines: list[tuple[str, ...]]) -> str:
    table = [tuple(columns), *lines]
    widths = _widths(table)
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table)


def _narrowed(columns: tuple[str, ...], lines: list[tuple[str, ...]], width: int) -> tuple:
    """The table without as many of its lesser columns as it takes to fit; the rows on file have them all."""
    for lesser in ("MiB", "TFLOP/s", "GB/s", "p20–p80", "dtype", "% mm"):
        if sum(w + 3 for w in _widths([columns, *lines])) <= width:
            break
        at = columns.index(lesser)
        columns, *lines = ((*line[:at], *line[at + 1 :]) for line in (columns, *lines))
    return columns, lines


def _widths(table: list[tuple[str, ...]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*table, strict=True)]


def _cells(row: dict[str, object], own: dict[str, dict[str, object]]) -> tuple[str, ...]:
    """`own` holds the rows of the same case: the ratios are against its eager and compile."""
    dtype = {str(v).removeprefix("torch."): k for k, v in DTYPES.items()}[row["dtype"]]
    memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.1f}"
    eager, compiled = (
        f"{own[name]['p50_us'] / row['p50_us']:.2f}" if name in own else "" for name in ("eager", "compile")
    )
    return (
        row["op"], row["shape"], dtype, row["mode"], row["impl"], f"{row['p50_us']:.1f}",
        f"{row['p20_us']:.1f}–{row['p80_us']:.1f}", f"{row['gb_s']:.1f}", f"{row['percent_copy']:.0f}",
        f"{row['tflop_s']:.3g}", f"{row['percent_matmul']:.2g}", eager, compiled,
        *("–" if row[name] is None else f"{row[name]:.1e}" for name in ("max_error", "error_bound")), memory,
    )  # fmt: skip


def _case(row: dict[str, object]) -> tuple[object, ...]:
    return row["op"], row["shape"], row["dtype"], row["mode"]


def _name(row: dict[str, object]) -> str:
    return f"{row['op']} {row['impl']} {row['mode']}"


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


def _fitting(ids: list[str], device: torch.device, *, named: bool) -> list[str]:
    """The shapes that fit; one that was asked for by name and does not is refused.

    The fp64 oracle with its gradients is the largest thing a measurement holds: some 24 times x.
    """
    have = available(device)
    need = {shape.id: 24 * 8 * shape.elements for shape in shapes.SHAPES.values()}
    fitting = [name for name in shapes.SHAPES if need[name] <= have]
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
    parser.add_argument("--stop-after", type=float, metavar="S", help="begin no further case after S seconds")
    parser.add_argument("--graph", action="store_true", help="time the forward from a CUDA graph, without launch gaps")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    end_with_the_reader()
    sys.exit(main())
