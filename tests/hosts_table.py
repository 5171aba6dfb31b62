"""The tiny models' reports -> the table of sora_kernels/integrations/README.md.

python tests/hosts_table.py     write it anew
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

import hosts

from sora_kernels.integrations import Report, patch, patch_model

README = pathlib.Path(patch.__file__).with_name("README.md")
BEGIN, END = "<!-- classes:begin -->", "<!-- classes:end -->"


def table() -> str:
    """Of each known class the operations of its steps, the modules these are in, all cases together, and what is kept.
    """
    reports: dict[str, list[Report]] = {}
    for case in hosts.cases().values():
        model = case.make()
        reports.setdefault(type(model).__name__, []).append(patch_model(model))
    lines = ["| class | operations | modules | |", "|---|---|---|---|"]
    for name in sorted(reports):
        first = f"`{name}`"
        for cells in _rows(reports[name]):
            lines.append(f"| {' | '.join((first, *cells))} |")
            first = ""
    return "\n".join(lines)


def _rows(reports: list[Report]) -> Iterator[tuple[str, str, str]]:
    modules: dict[tuple, dict[str, None]] = {}
    for step in (step for report in reports for step in report.steps):
        where = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", step.where) or "the model"
        modules.setdefault((step.ops, step.reason), {})[f"`{where}`"] = None
    for (ops, reason), places in modules.items():
        yield ", ".join(f"`{op}`" for op in ops), ", ".join(places), f"left: {reason}" if reason else "replaced"
    for line in dict.fromkeys(line for report in reports for line in report.kept):
        what, _, why = line.partition(": ")
        yield "", what, f"kept: {why}" if why else "kept"


def written(text: str, found: str) -> str:
    """The README with this table between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{README} must have a line {BEGIN} and, after it, a line {END}: the table goes between them")
    return f"{before}{BEGIN}\n{found}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8"), table()), encoding="utf-8")
