"""Attacks on what `safety` promises, run and counted: `sora redteam`, on inspect-ai, offline.

    cases = redteam.cases()
    found = [(case, case.run()) for case in cases]
    redteam.over_budget(found)

plain, writings     prompts of each class, said plainly and in every way of `writings`; to be blocked or reviewed
wording, temporal, languages    the same wishes without the words, over time, in other languages
benign              harmless prompts with such words, to be let pass
bias                one prompt about several groups, to be answered alike
provenance          what is done to signed and marked files
files               what is given to be read, and where something is to be written

A case is an attack and whether it was held. What gets through and is known to is told as the rest is; `budget` of
prompts.yaml says how much may, at most, before it is a failure.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import policy
from . import files, provenance
from .writings import WRITINGS

_PROMPTS = yaml.safe_load(Path(__file__).with_name("prompts.yaml").read_text("utf-8"))
BUDGET: dict[str, float] = _PROMPTS["budget"]


@dataclass(frozen=True)
class Case:
    """One attack: of a `family`, on a `group` (a class of the policy, or what is attacked); `run` gives what came of
    it, beginning with "held" or "through"."""

    family: str
    group: str
    name: str
    run: Callable[[], str]


def cases(families: Iterable[str] = tuple(BUDGET)) -> list[Case]:
    """Those of some families, by default of all. Raises ValueError for one that there is not."""
    if unknown := [family for family in families if family not in BUDGET]:
        raise ValueError(f"family must be one of {', '.join(BUDGET)}; got {unknown[0]!r}")
    return [case for case in _all() if case.family in families]


def over_budget(found: Iterable[tuple[Case, str]]) -> list[str]:
    """The families of which more got through than their budget, in words."""
    return [
        f"{family}: {through} of {count} got through, {through / count:.1%}; the budget is {BUDGET[family]:.1%}"
        for family, groups in table(found).items()
        for through, count in [tuple(map(sum, zip(*groups.values(), strict=True)))]
        if through > BUDGET[family] * count
    ]


def table(found: Iterable[tuple[Case, str]]) -> dict[str, dict[str, tuple[int, int]]]:
    """Of each family and group, how many got through, of how many."""
    counted: dict[str, dict[str, tuple[int, int]]] = collections.defaultdict(dict)
    for case, outcome in found:
        through, count = counted[case.family].get(case.group, (0, 0))
        counted[case.family][case.group] = through + (not outcome.startswith("held")), count + 1
    return dict(counted)


def interval(through: int, count: int) -> tuple[float, float]:
    """95 % for a share (Wilson, 1927)."""
    share, z = through / count, 1.96
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - half) / (1 + z * z / count)), min(1.0, (middle + half) / (1 + z * z / count))


def _all() -> Iterator[Case]:
    for family in ("plain", "wording", "temporal", "languages"):
        for group, prompts in _PROMPTS[family].items():
            for prompt in prompts:
                yield Case(family, group, prompt, lambda prompt=prompt: _stopped(prompt))
    for writing, write in WRITINGS.items():
        for prompts in _PROMPTS["plain"].values():
            for prompt in prompts:
                yield Case("writings", writing, prompt, lambda prompt=prompt, write=write: _stopped(write(prompt)))
    for group, prompts in _PROMPTS["benign"].items():
        for prompt in prompts:
            yield Case("benign", group, prompt, lambda prompt=prompt: _passed(prompt))
    for kind, groups in _PROMPTS["bias"]["groups"].items():
        for prompt in _PROMPTS["bias"]["prompts"]:
            yield Case("bias", kind, prompt, lambda prompt=prompt, groups=groups: _alike(prompt, groups))
    for family, attacks in (("provenance", provenance.ATTACKS), ("files", files.ATTACKS)):
        for (group, name), attack in attacks.items():
            yield Case(family, group, name, attack)


def _stopped(prompt: str) -> str:
    decision = policy.decide(prompt)
    return "through: allowed" if decision.action == "allow" else f"held: {decision.action}, {decision.category}"


def _passed(prompt: str) -> str:
    decision = policy.decide(prompt)
    return "held: allowed" if decision.action == "allow" else f"through: {decision.action}, {decision.rule}"


def _alike(prompt: str, groups: Iterable[str]) -> str:
    actions: dict[str, Any] = {group: policy.decide(prompt.format(group)).action for group in groups}
    same = len(set(actions.values())) == 1
    return f"held: {next(iter(actions.values()))} for all" if same else f"through: {actions}"
