"""Recorded results -> tables of the README and of docs/, all tables, a plot. Numbers are never written by hand.

python -m benchmarks.report              regenerate the blocks of README.md and docs/, and all of results/*.{md,svg}
python -m benchmarks.report --add DIR    first file a run's rows and test records under results/<device>/

`benchmarks.page` makes one page of any results, to look at.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from . import compiled_report, machine, summary, verified

README = machine.ROOT / "README.md"
DOCS = machine.ROOT / "docs"
FAMILIES = {  # page of docs/ -> the families of its figures
    "attention": ("attention",), "causal_conv": ("causal_conv", "vae"), "modulation": ("modulation",),
    "patchify": ("patchify",), "qknorm_rope": ("qknorm_rope",), "watermark": ("watermark",),
}  # fmt: skip
ALL = "benchmarks/results/README.md"
Row = dict
FORMAT = 1  # raised when a field of the rows changes its meaning
REQUIRED = frozenset((
    "op", "family", "impl", "kind", "impl_version", "shape", "dims", "dtype", "mode", "status", "reason", "p20_us",
    "p50_us", "p80_us", "bytes", "gb_s", "percent_copy", "flops", "tflop_s", "percent_matmul", "copy_gb_s",
    "matmul_tflop_s", "max_error", "error_bound", "error_in", "peak_memory", "device", "driver", "threads", "torch",
    "commit", "dirty", "date",
))  # fmt: skip
ANOTHER = "another version of the suite may have written it: measure again, or read it with that version"


class BadResults(Exception):
    """A results file, a folder or a marker is not as expected. The message says which and what to do."""


def load_rows(results: Path = machine.RESULTS) -> list[Row]:
    """Every row of `results/<device>/*.jsonl`; of rows that measure the same thing, the newest."""
    paths = (path for path in sorted(results.glob("*/*.jsonl")) if path.parent.name != compiled_report.FOLDER)  # counts
    return newest(row for path in paths for row in read_jsonl(path))


def newest(rows: Iterable[Row]) -> list[Row]:
    found: dict[tuple, Row] = {}
    for row in rows:
        key = *machine_of(row), *(row[f] for f in ("op", "shape", "dtype", "mode", "impl"))
        if key not in found or row["date"] >= found[key]["date"]:
            found[key] = row
    return list(found.values())


def read_jsonl(path: Path, or_these: frozenset[str] = REQUIRED) -> list[Row]:
    """The rows of a file, without the lines that say where a run took place; each has the fields of a row, or these."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            half = "half a line: the run was stopped while it wrote" if line.startswith("{") else "no line of JSON"
            raise BadResults(f"{path}:{number} is {half} ({error.msg}); delete the line or the file") from error
        if not isinstance(row, dict) or row.get("format", FORMAT) != FORMAT:
            found = f"format {row['format']}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise BadResults(f"{path}:{number}: expected rows of format {FORMAT}, got {found}; {ANOTHER}")
        if "machine" in row:
            continue
        if not (REQUIRED <= row.keys() or or_these <= row.keys()):
            lacking = ", ".join(sorted(REQUIRED - row.keys())[:4])
            raise BadResults(f"{path}:{number}: expected a row of a benchmark, got one without {lacking}; {ANOTHER}")
        rows.append(row)
    return rows


def add(folder: Path, results: Path = machine.RESULTS) -> list[Path]:
    """File what `benchmarks.gpu --out folder` left (bench.jsonl, verified.json) under `results/<device>/`."""
    rows = read_jsonl(folder / "bench.jsonl") if (folder / "bench.jsonl").exists() else []
    records = json.loads((folder / "verified.json").read_text()) if (folder / "verified.json").exists() else {}
    if not rows and not records:
        raise BadResults(
            f"{folder} holds neither bench.jsonl nor verified.json; it should be the --out of benchmarks.gpu"
        )
    written = []
    by_device: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_device[row["device"]].append(row)
    for device, own in by_device.items():
        stamp = re.sub(r"[^0-9]", "", own[0]["date"])[:12]
        target = results / machine.slug(device) / f"{stamp}-{own[0]['commit']}.jsonl"
        verified.write_beside(target, "".join(json.dumps(row) + "\n" for row in own))
        written.append(target)
    for device in {entry["device"] for impls in records.values() for entry in impls.values()}:
        target = results / machine.slug(device) / "verified.json"
        known = json.loads(target.read_text()) if target.exists() else {}
        for family, impls in records.items():
            own = {impl: entry for impl, entry in impls.items() if entry["device"] == device}
            known[family] = known.get(family, {}) | own
        verified.write_beside(target, json.dumps(known, indent=1, sort_keys=True) + "\n")
        written.append(target)
    return written


def figures(rows: Iterable[Row], *, every: bool = False) -> str:
    """One table per device: our fastest implementation of each case beside eager, compile, the best peer.

    Of each op the largest shape measured in each dtype, or every one; those left out are counted, losses by themselves.
    """
    by_device: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        by_device[machine_of(row)].append(row)
    if not by_device:
        return "No figures have been recorded yet."
    return "\n\n".join(_device_table(own, every) for _, own in sorted(by_device.items()))


def machine_of(row: Row) -> tuple[str, int, str]:
    """Rows of different machines, threads or allocators are not compared."""
    return row["device"], row["threads"] or 0, row.get("allocator") or ""


def _device_table(rows: list[Row], every: bool) -> str:
    last = max(rows, key=lambda r: r["date"])
    where = (
        f", {last['threads']} thread{'s' * (last['threads'] > 1)}" if last["threads"] else f", driver {last['driver']}"
    )
    where += f", {last['allocator']}" if last.get("allocator") else ""
    commits = ", ".join(dict.fromkeys(r["commit"] + ("-dirty" if r["dirty"] else "") for r in rows))
    lines = [
        f"**{last['device']}**{where}, torch {last['torch']}, measured copy {last['copy_gb_s']:.3g} GB/s, "
        f"{last['date'][:10]}, commit {commits}",
        "",
        "| op | shape | dtype | | fastest | µs (p20–p80) | % copy | vs eager | vs compile | vs best peer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cases: dict[tuple, list[Row]] = defaultdict(list)
    largest: dict[tuple, tuple] = {}
    for row in rows:
        cases[row["op"], row["shape"], row["dtype"], row["mode"]].append(row)
        of = row["op"], row["dtype"]
        largest[of] = max(largest.get(of, (0, "")), (row["bytes"] or 0, row["shape"]))
    left_out = lost = 0
    for (op, shape, dtype, mode), case in sorted(
        cases.items(), key=lambda c: (c[0][0], c[0][1], c[0][2], c[0][3] == "bwd")
    ):
        if not every and shape != largest[op, dtype][1]:
            left_out += 1
            lost += _is_lost(case)
            continue
        ours = [r for r in case if r["kind"] == "ours" and r["status"] == "ok"]
        if not ours:
            wrong = "; ".join(f"{r['impl']}: {r['reason']}" for r in case if r["kind"] == "ours")
            lines.append(f"| {op} | {shape} | {dtype} | {mode} | no figure: {_cell(wrong)} | | | | | |")
            continue
        best = min(ours, key=lambda r: r["p50_us"])
        against = {r["impl"]: r for r in case if r["kind"] != "ours" and r["status"] == "ok"}
        peers = [r for r in against.values() if r["kind"] == "peer"]
        peer = min(peers, key=lambda r: r["p50_us"], default=None)
        ratios = [_ratio(against.get(name), best) for name in ("eager", "compile")]
        ratios.append(f"{_ratio(peer, best)} ({_library(peer)})" if peer else "–")
        time = f"{best['p50_us']:.0f} ({best['p20_us']:.0f}–{best['p80_us']:.0f})"
        if call := next((r for r in case if r["impl"] == f"{best['impl']}+call"), None):
            time += f", Python {call['p50_us']:.0f}"
        cells = (op, shape, dtype, mode, best["impl"], time, f"{best['percent_copy']:.0f}", *ratios)
        lines.append(f"| {' | '.join(cells)} |")
    if left_out:
        lines += ["", f"{left_out} further cases, {lost} of them slower than eager, compile or a peer: [{ALL}]({ALL})."]
    return "\n".join(lines)


def _is_lost(case: list[Row]) -> bool:
    """Whether another is faster than the fastest of ours, or none of ours is right."""
    ours, others = [], []
    for row in case:
        if row["status"] == "ok":
            (ours if row["kind"] == "ours" else others).append(row["p50_us"])
    return min(others, default=math.inf) < min(ours, default=math.inf) or not ours


def _ratio(other: Row | None, ours: Row) -> str:
    if other is None:
        return "–"
    ratio = other["p50_us"] / ours["p50_us"]
    return f"{ratio:.2f}×" if ratio >= 1 else f"**{ratio:.2f}× (slower)**"


def _library(row: Row) -> str:
    return " ".join(filter(None, (row["impl"], row["impl_version"])))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


WITHOUT_A_GPU = {
    "reference": "tested",
    "cpu": "tested",
    "triton": "interpreter fp32, fp16; compiled for sm_80–120; every kernel executed in bf16 on sm_80 and 90",
    "cudnn": "its passes as triton, around convolutions on the CPU",
    "sdpa": "tested on the CPU",
    "cuda": "compiled for sm_80, 90a, 100; PTX of 80 and 90a executed; SASS audited",
}


def verification(results: Path = machine.RESULTS) -> str:
    """The capability matrix: which directions of a function each implementation has, and where its tests passed;
    functions that are alike share a row."""
    import sora_kernels
    from sora_kernels import _library

    columns = ["function", *WITHOUT_A_GPU, "compiled code executed", "on a GPU"]
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)  # cells -> functions
    functions = [getattr(sora_kernels, name) for name in sora_kernels.__all__]
    ops = [(f.__module__.split(".")[1], f.__name__) for f in functions if _library.impls(f"{f.__name__}_fwd")]
    for family, op in sorted(ops):
        cells, said = [], defaultdict(list)
        for impl in WITHOUT_A_GPU:
            directions = [way for way in ("fwd", "bwd") if impl in _library.impls(f"{op}_{way}")]
            cells.append(" + ".join(directions) or "–")
            if directions and impl != "cpu":
                said[verified.verified_on(family, impl, results)].append(impl)
        gpu = "; ".join(f"{', '.join(impls)}: {what}" for what, impls in said.items())
        gpu = "not yet" if set(said) == {verified.NOT_RUN} else gpu
        alike[(*cells, compiled_report.executed(op, results), gpu)].append(f"`{op}`")
    rows = [columns, ["---"] * len(columns), *([", ".join(names), *cells] for cells, names in alike.items())]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    how = "; ".join(f"{impl}: {what}" for impl, what in WITHOUT_A_GPU.items())
    return "\n".join([*lines, "", f"What `make test` does without a GPU: {how}."])


CONTINUED = (
    "position@1s", "motion", "rigidity", "reappears", "swaps", "count_errors", "regrowth", "penetration", "seam",
)  # fmt: skip


EVALUATION = machine.ROOT / "sora_model" / "checkpoints" / "toy" / "eval.json"


def toy(evaluation: Path = EVALUATION) -> str:
    """What the file that `sora eval` wrote says of how the shipped checkpoint follows words, with 95 % intervals."""
    result = json.loads(evaluation.read_text())
    questions = list(result["score"])
    lines = [f"| | {' | '.join(questions)} |", f"|---|{'---|' * len(questions)}"]
    for name, key in (
        (f"clips of the {result['prompts']} prompts", "score"),
        ("of these, colour and shape never seen together", "held_out"),
        ("read-out of true clips", "floor"),
        (f"read-out of true clips after the VAE ({result['vae']['psnr']} dB)", "vae"),
    ):
        ranges = result.get("intervals", {}).get(key) or {}
        cells = (_ranged(result[key][question], ranges.get(question), ".0%") for question in questions)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    words = json.loads((evaluation.parent / "text_encoder" / "config.json").read_text())["words"]
    return "\n".join([*lines, "", f"It knows {len(words)} words: {', '.join(words)}."])


def continued(evaluation: Path = EVALUATION) -> str:
    """What that file says of true clips that the checkpoint went on from, and the baselines, with 95 % intervals."""
    from sora_model.world.measures_summary import label

    result = json.loads(evaluation.read_text())
    by_name = result["continuation"]
    lines = [f"| true clips continued | {' | '.join(by_name)} |", f"|---|{'---|' * len(by_name)}"]
    for measure in CONTINUED:
        found = (measures.get(measure) for measures in by_name.values())
        cells = ("–" if one is None else _ranged(one["mean"], (one["low"], one["high"]), ".2g") for one in found)
        lines.append(f"| {label(measure)} | {' | '.join(cells)} |")
    lives = (_ranged(result["permanence"][name]["half_life"], None, ".2g") for name in by_name)
    return "\n".join([*lines, f"| half-life behind a wall, s | {' | '.join(lives)} |"])


def _ranged(mean: float | None, ends: tuple[float, float] | None, form: str) -> str:
    """A mean with the ends of its interval, where there is one."""
    if mean is None:
        return "–"
    return f"{mean:{form}}" + (f" ({ends[0]:{form}}–{ends[1]:{form}})" if ends else "")


def replace_block(text: str, name: str, body: str) -> str:
    """`text` with what stands between `<!-- name:begin -->` and `<!-- name:end -->` replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise BadResults(
            f"the page needs one line {begin} and, after it, one line {end}: the table goes between them"
        )
    head, rest = text.split(begin)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def update_readme(readme: Path = README, results: Path = machine.RESULTS) -> bool:
    """Regenerate the block `figures` and, where they are, `verified` and `toy`; whether any changed."""
    before = readme.read_text(encoding="utf-8")
    after = replace_block(before, "figures", summary.table(load_rows(results)))
    for name, block in (
        ("verified", lambda: verification(results)),
        ("toy", toy),
    ):
        if f"<!-- {name}:begin -->" in after:
            after = replace_block(after, name, block())
    if after != before:
        verified.write_beside(readme, after)
    return after != before


def update_pages(docs: Path = DOCS, results: Path = machine.RESULTS) -> list[Path]:
    """Regenerate the figures of the families' pages, the counts on that of numbers, the toy's on that of its world;
    those that changed."""
    changed, rows = [], load_rows(results)
    blocks = {"numerics": ("compiled", compiled_report.headline(results)), "world": ("continued", continued())}
    for name, families in FAMILIES.items():
        table = figures(row for row in rows if row["family"] in families)
        blocks[name] = "figures", table.replace(f"[{ALL}]({ALL})", f"[every figure](../{ALL})")
    for name, (block, body) in blocks.items():
        path = docs / f"{name}.md"
        before = path.read_text(encoding="utf-8")
        after = replace_block(before, block, body)
        if after != before:
            verified.write_beside(path, after)
            changed.append(path)
    return changed


def update_plot(target: Path = machine.RESULTS / "summary.svg", results: Path = machine.RESULTS) -> bool:
    """Draw the README's plot where it is not of these results; whether it was drawn."""
    rows = load_rows(results)
    if target.exists() and f"rows {summary.digest(rows)}" in target.read_text(encoding="utf-8"):
        return False
    verified.write_beside(target, summary.plot(rows))
    return True


def update_tables(target: Path = machine.ROOT / ALL, results: Path = machine.RESULTS) -> bool:
    """Regenerate the block `figures` of `target`, which has every one; whether anything changed."""
    before = target.read_text(encoding="utf-8")
    after = replace_block(before, "figures", figures(load_rows(results), every=True))
    if after != before:
        verified.write_beside(target, after)
    return after != before


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--add", type=Path, metavar="DIR", help="the --out of benchmarks.gpu")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=machine.RESULTS)
    args = parser.parse_args(argv)
    try:
        for path in add(args.add, args.results) if args.add else ():
            print(f"wrote {path}")
        updates = {args.readme: update_readme(args.readme, args.results)}
        if args.results == machine.RESULTS:
            updates[machine.ROOT / ALL] = update_tables()
            updates |= dict.fromkeys(update_pages(), True)
            updates[machine.RESULTS / "summary.svg"] = update_plot()
        for path, changed in updates.items():
            print(f"{path}: {'updated' if changed else 'already up to date'}")
    except (BadResults, OSError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
