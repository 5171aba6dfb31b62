"""Which implementation of which family passed its tests on which device, from pytest's own report.

`results/<device>/verified.json` holds `{family: {impl: {passed, failed, device, date, commit, dirty, ...}}}`.
The family is that of `tests/test_<family>.py` or `tests/test_<family>_<part>.py`. The implementation stands in a test's
parameters, as in `test_backward[triton-...]`, begins its name, as in `test_triton_backward[...]`, or is the part.
"""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from . import machine
from .suite import IMPLS

NOT_RUN = "not yet run on a GPU"


def from_junit(path: str | os.PathLike[str]) -> dict[str, dict[str, dict[str, int]]]:
    """{family: {impl: {"passed": n, "failed": n}}} of a junit file. Skipped tests are not counted."""
    families = sorted(p.parent.name for p in (machine.ROOT / "sora_kernels").glob("*/reference.py"))
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        module = re.search(r"(?:^|\.)test_(\w+)$", case.get("classname", "").split(".Test")[0])
        family = next((f for f in families if module and f"{module[1]}_".startswith(f"{f}_")), None)
        name, _, parameters = case.get("name", "").partition("[")
        words = [*re.split(r"[^a-z]+", parameters), *name.split("_")[1:2], *(module[1].split("_") if module else ())]
        impl = next((word for word in words if word in IMPLS), None)
        if family is None or impl is None:
            continue
        broken = case.find("failure") is not None or case.find("error") is not None
        count = counts.setdefault(family, {}).setdefault(impl, {"passed": 0, "failed": 0})
        count["failed" if broken else "passed"] += 1
    return counts


def record(junit: str | os.PathLike[str], target: str | os.PathLike[str], facts: dict[str, object]) -> dict:
    """Write what `junit` says into `target`, keeping the families and implementations it says nothing of."""
    target = Path(target)
    records = json.loads(target.read_text()) if target.exists() else {}
    for family, impls in from_junit(junit).items():
        for impl, count in impls.items():
            records.setdefault(family, {})[impl] = {**count, **facts}
    write_beside(target, json.dumps(records, indent=1, sort_keys=True) + "\n")
    return records


def load(results: str | os.PathLike[str] = machine.RESULTS) -> dict[str, dict[str, list[dict[str, object]]]]:
    """{family: {impl: [record, ...]}} over all devices; the newest first."""
    merged: dict[str, dict[str, list[dict[str, object]]]] = {}
    for path in sorted(Path(results).glob("*/verified.json")):
        for family, impls in json.loads(path.read_text()).items():
            for impl, entry in impls.items():
                merged.setdefault(family, {}).setdefault(impl, []).append(entry)
    for impls in merged.values():
        for entries in impls.values():
            entries.sort(key=lambda e: str(e["date"]), reverse=True)
    return merged


def verified_on(family: str, impl: str, results: str | os.PathLike[str] = machine.RESULTS) -> str:
    """What a capability matrix says: "verified on <GPU> (date, commit)", or that it has not run on a GPU.

    Failed tests are said as plainly.
    """
    said = []
    for entry in load(results).get(family, {}).get(impl, []):
        when = f"{str(entry['date'])[:10]}, {entry['commit']}{'-dirty' if entry.get('dirty') else ''}"
        if entry.get("stopped_early"):
            when += f", {entry['passed'] + entry['failed']} tests before its time ran out"
        if entry["failed"]:
            said.append(
                f"{entry['failed']} of {entry['failed'] + entry['passed']} tests fail on {entry['device']} ({when})"
            )
        else:
            said.append(f"verified on {entry['device']} ({when})")
    return "; ".join(said) or NOT_RUN


def write_beside(target: Path, text: str) -> None:
    """Write a file whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)
