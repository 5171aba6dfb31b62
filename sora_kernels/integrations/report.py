"""What was replaced in a model, what not, and why."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the model: the module it is in ("" is the model), the operations for it, and why they do not run it
    (None: they do)."""

    where: str
    ops: tuple[str, ...]
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What `patch_model` did. `str(report)` is a table, repeated layers in one row.

    replaced  steps that our operations run now
    left      steps that they could run but do not here, each with its reason
    kept      what of this host is never replaced, and why
    """

    model: str
    impl: str
    rounding: str
    steps: tuple[Step, ...]
    kept: tuple[str, ...]

    @property
    def replaced(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.reason is None)

    @property
    def left(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.reason is not None)

    def __str__(self) -> str:
        title = f"{self.model}, impl={self.impl!r}: {len(self.replaced)} of {len(self.steps)} steps replaced"
        rounded = "where the host rounds, while no gradient is recorded" if self.rounding == "host" else "once"
        groups: dict[tuple[str, ...], int] = {}
        for step in self.steps:
            where = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", step.where) or "the model"
            outcome = f"left: {step.reason}" if step.reason else f"now {', '.join(step.ops)}"
            groups[where, outcome] = groups.get((where, outcome), 0) + 1
        rows = [(f"{where} ×{count}" if count > 1 else where, outcome) for (where, outcome), count in groups.items()]
        width = max((len(where) for where, _ in rows), default=0)
        lines = [title, *(f"  {w:<{width}}  {o}" for w, o in rows), f"  rounding={self.rounding!r}: {rounded}"]
        return "\n".join([*lines, *(f"  kept: {k}" for k in self.kept)])
