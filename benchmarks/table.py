"""The rows of a run as a table, then, plainly, where ours lose or miss a goal, and what has no figure and why."""

from __future__ import annotations

import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable

from . import targets

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
COLUMNS = (
    "op", "shape", "dtype", "mode", "impl", "p50 µs", "p20–p80", "GB/s", "% copy", "TFLOP/s", "% mm",
    "x eager", "x compile", "error", "bound", "MiB",
)  # fmt: skip


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
    for row in (row for row in rows if row["status"] == "ok" and (row["dims"] or {}).get("frames")):
        print(f"{row['shape']} {row['impl']}: {row['dims']['frames'] / row['p50_us'] * 1e6:.3g} frames/s")
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
    dtype = DTYPES.get(row["dtype"], row["dtype"])
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
