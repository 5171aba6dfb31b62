"""The plots of the page: matplotlib's SVG, in the page's own ink, each point with what the filter asks of it.

An artist's `gid` is a key of `marks`; after drawing, that group carries the attributes and the tooltip of its mark.
"""

from __future__ import annotations

import html
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

Row = dict
INK = "#010203"  # replaced by the page's ink, which is light where the page is dark
COLOURS = {
    "cuda": "#1d70b8", "triton": "#2a8fd6", "cpu": "#2a8fd6", "cudnn": "#1b9aaa", "sdpa": "#5f7adb",
    "reference": "#8aa4c8", "ours": "#2a8fd6", "eager": "#8f8f8f", "compile": "#e08a1e", "diffusers": "#b0508e",
    "liger": "#3f9b5c", "quack": "#c7a008", "comfy": "#d0573f", "flex": "#7a5cc0", "natten": "#46a29f",
}  # fmt: skip
OTHERS = ("#a15f3b", "#6d8b3c", "#c2607e", "#557a95", "#9466aa")
MARKERS = {"fwd": "o", "bwd": "s"}
MODES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "training step"}


def colour(impl: str) -> str:
    name = impl.partition("+")[0]
    return COLOURS.get(name) or OTHERS[sum(map(ord, name)) % len(OTHERS)]


class Plot:
    """A figure, and the marks of its artists by their gid."""

    def __init__(self, width: float, height: float, columns: int = 1, left: float = 0.6, right: float = 1.0) -> None:
        """In inches; beside the axes there is room for labels on the left and for names on the right."""
        import matplotlib
        from matplotlib.figure import Figure

        matplotlib.use("Agg")
        self.figure = Figure(figsize=(width, height))
        margins = dict(left=left / width, right=1 - right / width, top=1 - 0.15 / height, bottom=0.5 / height)
        self.axes = self.figure.subplots(1, columns, squeeze=False, gridspec_kw=margins | {"wspace": 0.35})[0]
        self.marks: dict[str, str] = {}
        for axes in self.axes:
            axes.spines[["top", "right"]].set_visible(False)

    def mark(self, attributes: str, told: str) -> str:
        gid = f"mark-{len(self.marks)}"
        self.marks[gid] = f"<g class=mark {attributes}><title>{html.escape(told)}</title>"
        return gid

    def svg(self, name: str, label: str) -> str:
        """`name` tells the definitions inside this plot from those of the others on the page."""
        import matplotlib

        style = {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
        buffer = io.StringIO()
        with matplotlib.rc_context(style):
            metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
            self.figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
        text = buffer.getvalue()[buffer.getvalue().index("<svg") :]
        text = re.sub(r'<g id="(mark-\d+)">', lambda found: self.marks[found[1]], text)
        text = re.sub(r'<g id="[^"]*">', "<g>", text).replace(INK, "currentColor")
        text = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", text)
        return re.sub(r"\n\s*", "\n", text.replace("<svg ", f'<svg role=img aria-label="{html.escape(label)}" ', 1))


def _inked(draw: Callable[..., str]) -> Callable[..., str]:
    """Everything that is not data is drawn in `INK`."""

    def inked(*args: Any, **kwargs: Any) -> str:
        import matplotlib

        names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        with matplotlib.rc_context(dict.fromkeys(names, INK) | {"font.size": 9, "axes.linewidth": 0.6}):
            return draw(*args, **kwargs)

    return inked


@_inked
def roofline(name: str, rows: list[tuple[str, Row]]) -> str | None:
    """FLOP/s over FLOPs a byte, beneath what was measured of a copy and of a matrix product; (attributes, row)."""
    from matplotlib.ticker import NullFormatter

    rows = [(attributes, row) for attributes, row in rows if row["flops"] and row["bytes"]]
    if not rows:
        return None
    plot = Plot(5.2, 3.4)
    (axes,) = plot.axes
    axes.set(xscale="log", yscale="log")
    copy, matmul = (sorted(r[f] for _, r in rows)[len(rows) // 2] for f in ("copy_gb_s", "matmul_tflop_s"))
    at = [row["flops"] / row["bytes"] for _, row in rows]
    ridge = 1e3 * matmul / copy
    left, right = min(*at, ridge) / 3, max(*at, ridge) * 4  # a decade at least, which has a tick
    axes.plot([left, ridge, right], [left * copy / 1e3, matmul, matmul], color=INK, linewidth=1, alpha=0.6)
    axes.text(1.4 * left, left * copy / 1e3, f"copy {copy:.3g} GB/s", va="top", fontsize=8)
    axes.text(right, 1.1 * matmul, f"matmul {matmul:.3g} TFLOP/s", ha="right", va="bottom", fontsize=8)
    named = set()
    for (attributes, row), x in zip(rows, at, strict=True):
        told = f"{row['impl']} {row['mode']} at {row['shape']}: {row['tflop_s']:.3g} TFLOP/s, {row['gb_s']:.3g} GB/s"
        axes.plot(
            [x], [row["tflop_s"]], MARKERS.get(row["mode"], "D"), color=colour(row["impl"]), markersize=5, alpha=0.85,
            gid=plot.mark(attributes, told), markeredgewidth=0,
            label=None if row["impl"] in named else row["impl"],
        )  # fmt: skip
        named.add(row["impl"])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="FLOPs a byte (○ forward, □ backward)", ylabel="TFLOP/s")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), handletextpad=0.1)
    return plot.svg(name, f"Roofline of {name}")


@_inked
def lengths(name: str, what: str, series: dict[tuple[str, str, str], list[tuple[float, Row]]]) -> str:
    """Time and peak memory over the length of a clip; (attributes, impl, mode) -> (length, row), in order."""
    from matplotlib.ticker import LogLocator, NullFormatter

    plot = Plot(8.4, 3.0, columns=2, right=1.7)
    figures = (("p50_us", 1e-3, "milliseconds"), ("peak_memory", 2**-20, "MiB at the peak"))
    for axes, (field, unit, label) in zip(plot.axes, figures, strict=True):
        for (attributes, impl, mode), points in series.items():
            drawn = [(x, row[field] * unit) for x, row in points if row[field]]
            if not drawn:
                continue
            told = f"{impl} {MODES.get(mode, mode)}: " + ", ".join(f"{y:.3g} at {x:g}" for x, y in drawn)
            axes.plot(
                *zip(*drawn, strict=True), linestyle="--" if mode == "bwd" else "-", marker=MARKERS.get(mode, "D"),
                markersize=4, linewidth=1.4, color=colour(impl), label=f"{impl}, {MODES.get(mode, mode)}",
                gid=plot.mark(attributes, told),
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel=what, ylabel=label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    plot.axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return plot.svg(name, f"Time and memory of {name} over {what}")


@_inked
def overview(name: str, ratios: Iterable[tuple[str, str, str, float, str]]) -> str:
    """A point for each case and rival: their time over ours; (attributes, op, rival, ratio, told)."""
    by_op: dict[str, list[tuple[str, str, float, str]]] = defaultdict(list)
    for attributes, op, rival, ratio, told in ratios:
        by_op[op].append((attributes, rival, ratio, told))
    plot = Plot(9.0, 0.8 + 0.26 * len(by_op), left=2.2)
    (axes,) = plot.axes
    every = [ratio for points in by_op.values() for *_, ratio, _ in points]
    left, right = min(0.5, *every) / 1.2, max(2, *every) * 1.2
    axes.axvspan(left, 1, color="#d33", alpha=0.13, linewidth=0)
    axes.axvline(1, color=INK, linewidth=0.8)
    named = set()
    for at, points in enumerate(by_op.values()):
        for attributes, rival, ratio, told in points:
            up = {"eager": -0.22, "compile": 0.0}.get(rival, 0.22)
            label = rival if rival in ("eager", "compile") else "best peer"
            axes.plot([ratio], [at + up], "o", color=colour(rival) if label == rival else "#7a5cc0", markersize=4.5,
                      alpha=0.8, markeredgewidth=0, gid=plot.mark(attributes, told),
                      label=None if label in named else label)  # fmt: skip
            named.add(label)
    axes.set(xscale="log", xlim=(left, right), ylim=(len(by_op) - 0.4, -0.6))
    ticks = [t for t in (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if left <= t <= right]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(by_op)), list(by_op))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", linewidth=0.3, color=INK, alpha=0.25)
    axes.set_xlabel("their time over ours: in the red, ours is slower")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), handletextpad=0.1)
    return plot.svg(name, f"Their time over ours, {name}")
