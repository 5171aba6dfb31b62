"""The attacks on inspect-ai (UK AI Security Institute), with a log for its viewer, `inspect view --log-dir FOLDER`."""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from pathlib import Path

from ... import extras
from . import Case

Found = list[tuple[Case, str]]


def run(cases: Sequence[Case], folder: str | os.PathLike[str]) -> Found:
    """What came of each case; the log goes to `folder`. A sample of the log is a group, its value the share that was
    held. Raises `MissingExtra` where inspect-ai is not installed."""
    with extras.named("the red team"):
        from inspect_ai import Task, eval
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.scorer import Score, Scorer, Target, grouped, mean, scorer
    from inspect_ai.solver import Generate, Solver, TaskState, solver

    groups: dict[tuple[str, str], list[Case]] = collections.defaultdict(list)
    for case in cases:
        groups[case.family, case.group].append(case)
    outcomes: dict[tuple[str, str], Found] = {}

    @solver
    def attacks() -> Solver:
        async def solve(state: TaskState, generate: Generate) -> TaskState:
            key = state.metadata["family"], state.metadata["group"]
            outcomes[key] = [(case, case.run()) for case in groups[key]]
            state.output.completion = "\n".join(f"{outcome} <- {case.name}" for case, outcome in outcomes[key])
            return state

        return solve

    @scorer(metrics=[grouped(mean(), "family")])
    def held() -> Scorer:
        async def score(state: TaskState, target: Target) -> Score:
            found = outcomes[state.metadata["family"], state.metadata["group"]]
            return Score(value=sum(outcome.startswith("held") for _, outcome in found) / len(found))

        return score

    samples = [
        Sample(input=f"{family}: {group}", id=f"{family}: {group}", metadata={"family": family, "group": group})
        for family, group in groups
    ]
    task = Task(dataset=MemoryDataset(samples), solver=attacks(), scorer=held(), name="redteam")
    (log,) = eval(task, model="none/none", log_dir=os.fspath(folder), display="none")
    if log.status != "success":
        raise RuntimeError(f"the run of the attacks ended with {log.status!r}: {log.error}")
    return [pair for key in groups for pair in outcomes[key]]


def page(found: Found, path: Path) -> None:
    """A page of the shares that got through, with their intervals, and what did, to an empty file."""
    from html import escape

    from ...page import document, table
    from . import BUDGET, interval
    from . import table as counted

    parts = [
        "<h1>What gets through</h1><p>Attacks on what the program promises of prompts, records, marks and files: "
        "those that got through of those that were made. The shares are those of these attacks, no more: small figures "
        "are 95 % intervals, as if others were drawn like them.</p>"
    ]
    for family, groups in counted(found).items():
        whole = tuple(map(sum, zip(*groups.values(), strict=True)))
        rows = []
        for name, (through, count) in [*groups.items(), ("all", whole)]:
            low, high = interval(through, count)
            share = f"{through / count:.0%} <small>{low:.0%}–{high:.0%}</small>"
            rows.append([escape(name), f"{through} of {count}", share])
        names = [f"{case.group}: {case.name} — {outcome}" for case, outcome in found
                 if case.family == family and not outcome.startswith("held")]  # fmt: skip
        told = "".join(f"<li>{escape(name)}</li>" for name in names[:50])
        more = f"<p>and {len(names) - 50} more</p>" if len(names) > 50 else ""
        parts.append(f"<h2>{family}</h2><p>At most {BUDGET[family]:.0%} may.</p>")
        parts.append(table(["", "through", "share"], rows) + f"<ul>{told}</ul>{more}")
    path.write_text(document("sora redteam", parts), encoding="utf-8")
