"""Recorded rows -> one page to look at: rooflines, bars beside peers, growth with length, errors beside their bounds.

    python -m benchmarks.page RESULTS... [--out report.html]       or: sora bench report RESULTS...

RESULTS are files that `--json` has written, or folders of them. The page needs no network. Losses stand where wins do.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import machine, page_plots, report, stream_memory, verified
from .report import BadResults, Row

HERE = Path(__file__).parent
FILTERS = ("machine", "op", "shape", "dtype", "mode")
MODES = page_plots.MODES
LENGTHS = {"tokens": "tokens", "frames": "frames"}  # dims that grow with a clip
NOT_SIZES = {*LENGTHS, "grid", "height", "width"}  # what follows from them
PRODUCTS = 16  # FLOPs a byte: from there on, matrix products are what takes time
STREAM = stream_memory.FIELDS


@dataclass(frozen=True)
class Case:
    """What may be compared: everything measured of one operation, at one shape, on one machine."""

    machine: str
    op: str
    shape: str
    dtype: str
    mode: str
    rows: tuple[Row, ...]

    @property
    def timed(self) -> list[Row]:
        return sorted((row for row in self.rows if row["status"] == "ok"), key=lambda row: row["p50_us"])

    @property
    def best(self) -> Row | None:
        """The fastest of ours whose figure is of a whole call."""
        return next((row for row in self.timed if row["kind"] == "ours"), None)

    def ratios(self) -> dict[str, float]:
        """Their time over ours: of eager, of compile, and of the fastest peer."""
        if not self.best:
            return {}
        theirs = {row["impl"]: row["p50_us"] for row in self.timed if row["kind"] in ("baseline", "peer")}
        peers = [row["impl"] for row in self.timed if row["kind"] == "peer"]
        kept = [name for name in ("eager", "compile", *peers[:1]) if name in theirs]
        return {name: theirs[name] / self.best["p50_us"] for name in kept}

    @property
    def lost(self) -> bool:
        """Another is faster, or ours is wrong."""
        wrong = any(row["kind"] == "ours" and row["status"] == "failed" for row in self.rows)
        return wrong or any(ratio < 1 for ratio in self.ratios().values())

    @property
    def attributes(self) -> str:
        lost = f'data-lost="{"1" if self.lost else ""}"'
        return " ".join([*(f'data-{name}="{html.escape(getattr(self, name))}"' for name in FILTERS), lost])


def load(paths: Iterable[Path]) -> list[Row]:
    """The rows of files and of folders of files; of rows that measure the same thing, the newest."""
    rows = []
    for path in paths:
        if not path.exists():
            raise BadResults(f"{path} does not exist; give files that --json has written, or folders of them")
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise BadResults(f"{path} holds no file .jsonl; `make bench` and `--json` of benchmarks.run write them")
        for file in files:
            if path == file or not _other(file):
                rows += [_stream(row) if STREAM <= row.keys() else row for row in report.read_jsonl(file, STREAM)]
    if not rows:
        raise BadResults(f"no rows in {', '.join(map(str, paths))}; a run writes one for each candidate")
    return report.newest(rows)


def _other(file: Path) -> bool:
    """What is counted of compiled code, patched models and whole ones is recorded beside the rows, and is none."""
    return file.parent.name in ("compiled", "patched", "model_memory")


def _stream(row: Row) -> Row:
    """What `benchmarks.stream_memory` records, as a row: a point of a curve over frames."""
    size = f"{row['frames']} frames of {row['pixels']}px" + (f" in tiles of {row['tile']}" if row["tile"] else "")
    return dict.fromkeys(report.REQUIRED) | row | {
        "op": f"vae {row.get('vae', '2.1')} {row['code']}, whole clip", "impl": row["coder"], "shape": size,
        "mode": "fwd", "dtype": "float32",
        "kind": "ours" if row["coder"] == "ours" else "peer", "status": "ok", "p50_us": row["seconds"] * 1e6,
        "peak_memory": row["peak_mib"] * 2**20, "dims": {n: row[n] for n in ("frames", "base", "pixels", "tile")},
    }  # fmt: skip


def name_of(row: Row) -> str:
    """Of a machine and how it was used, which rows of different ones are not compared across."""
    device, threads, allocator = report.machine_of(row)
    used = [f"{threads} thread{'s' * (threads > 1)}"] if threads else []
    return ", ".join([device, *used, *allocator.split()[:1]])


def cases_of(rows: Iterable[Row]) -> list[Case]:
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[name_of(row), row["op"], row["shape"], row["dtype"], row["mode"]].append(row)
    ordered = sorted(found.items(), key=lambda item: (item[0][1], item[0][0], item[0][2:4], item[0][4] == "bwd"))
    return [Case(*key, rows=tuple(own)) for key, own in ordered]


def page(rows: list[Row]) -> str:
    """The whole document."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BadResults("the page is drawn with matplotlib, which is not installed: pip install '.[bench]'") from error
    curves = [row for row in rows if STREAM <= row.keys()]
    cases = cases_of(row for row in rows if not STREAM <= row.keys())
    by_op: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_op[case.op].append(case)
    sections = [_overview(cases)]
    sections += [_section(op, own) for op, own in by_op.items()]
    by_curve: dict[str, list[Row]] = defaultdict(list)
    for row in curves:
        by_curve[row["op"]].append(row)
    sections += [
        f"<section><h2>{html.escape(op)}</h2><div class=figures>{''.join(_lengths(cases_of(own)))}</div></section>"
        for op, own in sorted(by_curve.items())
    ]
    newest = max(rows, key=lambda row: row["date"])
    told = (
        "Times are medians of interleaved calls, whiskers from p20 to p80. Shares are of a copy and a matrix product "
        "measured in the same run, counting the fewest bytes an operation can move. An error is the largest against "
        "fp64, beside the bound it may not exceed. A red edge: another was faster, or ours was wrong. What is above a "
        "roof runs beside a product of torch that is slow in that dtype, or from a cache."
    )
    commits = ", ".join(dict.fromkeys(row["commit"] + "-dirty" * bool(row["dirty"]) for row in rows))
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>sora_kernels benchmarks</title><style>{_read('page.css')}</style>"
        f"<h1>sora_kernels benchmarks</h1><p>{told}</p>{_filters(cases_of(rows))}{''.join(sections)}"
        f"<footer>{len(rows)} rows, the newest of {newest['date'][:10]}, torch {html.escape(newest['torch'])}; "
        f"commits {html.escape(commits)}</footer><script>{_read('page.js')}</script></html>\n"
    )


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _filters(cases: list[Case]) -> str:
    labels = []
    for name in FILTERS:
        there = dict.fromkeys(getattr(case, name) for case in cases)
        options = "".join(
            f'<option value="{html.escape(v)}">{html.escape(MODES.get(v, v))}</option>' for v in sorted(there)
        )
        labels.append(f"<label>{name}<select name={name}><option value=''>all</option>{options}</select></label>")
    check = "<label class=check><input type=checkbox name=lost> losses only</label>"
    return f"<nav>{''.join(labels)}{check}<button type=button>reset</button><output></output></nav>"


def _figure(svg: str, caption: str, **shared: str) -> str:
    attributes = " ".join(f'data-{name}="{html.escape(value)}"' for name, value in shared.items())
    return f"<figure class=plot {attributes}><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>"


def _overview(cases: list[Case]) -> str:
    """A plot for each machine: every ratio of every case."""
    by_machine: dict[str, list[tuple[str, str, str, float, str]]] = defaultdict(list)
    for case in cases:
        for rival, ratio in case.ratios().items():
            told = f"{case.op} {MODES.get(case.mode, case.mode)} at {case.shape}, {case.dtype}: {ratio:.2f}× {rival}"
            by_machine[case.machine].append((case.attributes, case.op, rival, ratio, told))
    figures = [
        _figure(page_plots.overview(name, ratios), name, machine=name) for name, ratios in sorted(by_machine.items())
    ]
    return f"<section id=overview><h2>Every case at a glance</h2>{''.join(figures)}</section>" if figures else ""


def _section(op: str, cases: list[Case]) -> str:
    figures = []
    by_roof: dict[tuple[str, str], list[tuple[str, Row]]] = defaultdict(list)
    for case in cases:
        by_roof[case.machine, case.dtype] += [(case.attributes, row) for row in case.timed if row["bytes"]]
    for (where, dtype), points in by_roof.items():
        if svg := page_plots.roofline(f"{op}, {dtype}, {where}", points):
            figures.append(_figure(svg, f"{where}, {dtype}", machine=where, dtype=dtype))
    figures += _lengths(cases)
    cards = "".join(map(_card, cases))
    return (
        f"<section><h2>{html.escape(op)}</h2><div class=figures>{''.join(figures)}</div>"
        f"<div class=cases>{cards}</div></section>"
    )


def _lengths(cases: list[Case]) -> list[str]:
    """A plot for each set of sizes that was measured at several lengths."""
    plots: dict[tuple[str, ...], dict[tuple[str, str, str], dict[float, Row]]] = defaultdict(lambda: defaultdict(dict))
    for case in cases:
        for row in case.timed:
            dims = row["dims"] or {}
            what = next((name for name in LENGTHS if dims.get(name)), None)
            if what is None or row["kind"] == "ours, call alone":
                continue
            sizes = json.dumps({n: v for n, v in dims.items() if n not in NOT_SIZES}, sort_keys=True)
            shared = f'data-op="{html.escape(case.op)}" data-mode="{case.mode}"'
            plots[case.machine, case.dtype, what, sizes][shared, row["impl"], case.mode][dims[what]] = row
    figures = []
    for (where, dtype, what, sizes), series in plots.items():
        points = {key: sorted(at.items()) for key, at in series.items() if len(at) > 1}
        if points:
            shapes = dict.fromkeys(row["shape"] for at in points.values() for _, row in at)
            name = f"{cases[0].op} by {what}, {dtype}, {where}, {sizes}"
            caption = f"{where}, {dtype}: {', '.join(shapes)}"
            figures.append(_figure(page_plots.lengths(name, what, points), caption, machine=where, dtype=dtype))
    return figures


def _card(case: Case) -> str:
    ratios = "".join(
        f"<b{' class=loss' * (ratio < 1)}>{ratio:.2f}× {html.escape(rival)}</b>"
        for rival, ratio in case.ratios().items()
    )
    slowest = max((row["p80_us"] for row in case.timed), default=1)
    bars = "".join(_candidate(row, slowest) for row in case.timed)
    wrong = "".join(
        f"<p class=wrong>{html.escape(row['impl'])} failed: {html.escape(row['reason'])}</p>"
        for row in case.rows if row["status"] == "failed"
    )  # fmt: skip
    missing = [row for row in case.rows if row["status"] == "unavailable"]
    why = "<br>".join(f"{html.escape(row['impl'])}: {html.escape(row['reason'])}" for row in missing)
    absent = f"<details><summary>{len(missing)} not measured here</summary>{why}</details>" if missing else ""
    kind = "lost" if case.lost else "" if ratios else "alone"
    return (
        f"<article class='case {kind}' {case.attributes}><h3>{html.escape(case.shape)}</h3>"
        f"<small>{MODES.get(case.mode, case.mode)}, {case.dtype}, {html.escape(case.machine)}</small>"
        f"<div class=ratios>{ratios}</div>{bars}{wrong}{absent}</article>"
    )


def _candidate(row: Row, slowest: float) -> str:
    """A bar with whiskers, its time, and beneath: its share of a ceiling, its error beside the bound, its memory."""
    at = "; ".join(f"--{name}: {100 * row[f'{name}_us'] / slowest:.2f}%" for name in ("p20", "p50", "p80"))
    facts = []
    if row["bytes"]:
        of = "matmul" if row["flops"] >= PRODUCTS * row["bytes"] else "copy"
        facts.append(f"{row[f'percent_{of}']:.0f} % of {of}")
    if row["max_error"] is not None:
        part = row["max_error"] / row["error_bound"] if row["error_bound"] else 0.0
        told = f"error {row['max_error']:.1e} of {row['error_bound']:.1e} in {row['error_in']}"
        meter = f"<meter value={min(part, 1):.3f}></meter> {part:.2g} of bound"
        facts.append(f'<span title="{html.escape(told)}">error {meter}</span>')
    if row["peak_memory"]:
        facts.append(f"{row['peak_memory'] / 2**20:.3g} MiB")
    name = " ".join(filter(None, (row["impl"], row["impl_version"])))
    ours = " ours" * row["kind"].startswith("ours")
    return (
        f"<div class='candidate{ours}'><b title='{html.escape(name)}'>{html.escape(row['impl'])}</b>"
        f"<div class=bar style='{at}'><i></i><u></u></div><span>{_time(row['p50_us'])}</span>"
        f"<small>{''.join(f'<span>{fact}</span>' for fact in facts)}</small></div>"
    )


def _time(us: float) -> str:
    for unit, name in ((1e6, "s"), (1e3, "ms")):
        if us >= unit:
            return f"{us / unit:.3g} {name}"
    return f"{us:.3g} µs"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__.split("\n\n")[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS", default=[machine.RESULTS],
                        help="files or folders of rows (default: benchmarks/results)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    args = parser.parse_args(argv)
    try:
        verified.write_beside(args.out, page(load(args.results)))
    except (BadResults, OSError) as error:
        print(f"benchmarks.page: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}, {args.out.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
