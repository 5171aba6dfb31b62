"""The few figures of the README and its plot: of each operation the largest shape, led by what holds everywhere.

Fresh outputs cost page faults, which an allocator that keeps freed memory does not have; where an operation was
measured under one, those rows are taken, for ours and for the others alike.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable

Row = dict
OPS = (
    "norm_modulate", "gate_residual", "gate_residual_norm_modulate", "qk_norm_rope", "norm_silu", "patch_embed3d",
    "final_layer", "spacetime_attention", "spacetime_attention:tiles", "causal_conv3d",
)  # fmt: skip
MODES, AGAINST = {"fwd": "forward", "bwd": "backward"}, ("compile", "eager")
Case = dict[str, dict[str, Row]]
"""mode -> "ours", "eager", "compile" -> row."""


def cases(rows: Iterable[Row]) -> dict[str, dict[str, Case]]:
    """device -> op -> its case: in fp32 on a CPU, in bf16 on a GPU, on the most threads that were measured."""
    found: dict[str, dict[str, Case]] = {}
    right = [row for row in rows if row["status"] == "ok"]
    for device in sorted({row["device"] for row in right}):
        own = [row for row in right if row["device"] == device]
        threads = max(row["threads"] or 0 for row in own)
        dtypes = {row["dtype"] for row in own}
        dtype = "bfloat16" if not threads and "bfloat16" in dtypes else "float32"
        own = [row for row in own if (row["threads"] or 0) == threads and row["dtype"] == dtype]
        by_op = {op: case for op in OPS if (case := _case([row for row in own if row["op"] == op]))}
        if by_op:
            found[device] = by_op
    return found


def _case(rows: list[Row]) -> Case:
    rows = [row for row in rows if row.get("allocator")] or rows
    shape = max(((row["bytes"] or 0, row["shape"]) for row in rows), default=(0, ""))[1]
    case: Case = {}
    for mode in MODES:
        own = [row for row in rows if (row["shape"], row["mode"]) == (shape, mode)]
        ours = [row for row in own if row["kind"] == "ours"]
        if ours:
            case[mode] = {"ours": min(ours, key=lambda row: row["p50_us"])}
            case[mode] |= {row["impl"]: row for row in own if row["impl"] in AGAINST}
    return case


def ratio(case: Case, mode: str, other: str) -> float | None:
    """The other's time over ours: above 1 where ours is faster."""
    at = case.get(mode, {})
    return at[other]["p50_us"] / at["ours"]["p50_us"] if other in at else None


def table(rows: Iterable[Row]) -> str:
    """At most ten rows a device."""
    found = cases(rows)
    if not found:
        return "No figures have been recorded yet."
    return "\n\n".join(_device_table(device, by_op) for device, by_op in found.items())


def _device_table(device: str, by_op: dict[str, Case]) -> str:
    any_row = next(iter(next(iter(by_op.values())).values()))["ours"]
    threads = any_row["threads"]
    where = f"{threads} thread{'s' * (threads > 1)}" if threads else f"driver {any_row['driver']}"
    lines = [
        f"**{device}**, {where}, {any_row['dtype']}, torch {any_row['torch']}, {any_row['date'][:10]}",
        "",
        "| operation | shape | forward vs `compile` | vs eager | backward vs `compile` | vs eager |",
        "|---|---|---|---|---|---|",
    ]
    default = False
    for op, case in by_op.items():
        ours = [case[mode]["ours"] for mode in case]
        usual = bool(threads) and not ours[0].get("allocator")
        default |= usual
        cells = [_ratio(ratio(case, mode, other)) for mode in MODES for other in AGAINST]
        lines.append(f"| `{op}`{'¹' * usual} | {ours[0]['shape']} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(["", "¹ under the default allocator; the others under jemalloc"] if default else [])])


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×" if value >= 1 else f"**{value:.2f}× (slower)**"


def digest(rows: Iterable[Row]) -> str:
    """What a plot of these rows carries, so that one of others can be told from it."""
    return hashlib.sha256(table(rows).encode()).hexdigest()[:16]


def plot(rows: list[Row]) -> str:
    """SVG: bars of the ratios, of the first device."""
    import matplotlib
    from matplotlib.figure import Figure

    found = cases(rows)
    device, by_op = next(iter(found.items())) if found else ("", {})
    bars = [(mode, other) for mode in MODES for other in AGAINST]
    colours = ("#2a6f97", "#89c2d9", "#b5651d", "#f2cc8f")
    with matplotlib.rc_context({"svg.hashsalt": "sora_kernels", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(9, 1.2 + 0.62 * len(by_op)))
        axes = figure.add_subplot()
        for index, ((mode, other), colour) in enumerate(zip(bars, colours, strict=True)):
            values = [(place, r) for place, case in enumerate(by_op.values()) if (r := ratio(case, mode, other))]
            at = [place + 0.2 * (index - 1.5) for place, _ in values]
            widths = [r - 1 for _, r in values]
            label = f"{MODES[mode]} vs {'torch.compile' if other == 'compile' else other}"
            axes.barh(at, widths, left=1, height=0.2, color=colour, label=label)
        axes.set_xscale("log", base=2)
        ticks = (0.5, 1, 2, 4, 8)
        axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(by_op)), list(by_op))
        axes.invert_yaxis()
        axes.axvline(1, color="#444", linewidth=0.8)
        axes.set_title(f"their time over ours, {device}: right of 1× ours is faster", fontsize=10, loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=4)
        buffer = io.StringIO()
        metadata = {"Date": None, "Description": f"rows {digest(rows)}"}
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=metadata)
    lines = (line.rstrip() for line in buffer.getvalue().splitlines())
    return "\n".join(lines) + "\n"
