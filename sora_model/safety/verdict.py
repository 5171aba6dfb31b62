"""What c2pa finds of a record and of those of the inputs in it, as one of four answers each.

A record is stored once, however often the history leads to it: of twenty clips, each made from the one before and that
again, the last is a file of 200 kB with a history of a million parts. It is told up to `MOST` of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

TRUSTED, UNKNOWN, ALTERED, NONE = ANSWERS = ("trusted", "signed by an unknown party", "altered", "no credentials")


@dataclass(frozen=True)
class Verdict:
    """`answer` is one of `ANSWERS`; `reasons`, the codes of what failed; `signer`, who says so; `actions`, what the
    record tells; `inputs`, the same of each file that it was made from, as it was when it was used."""

    name: str
    answer: str
    reasons: tuple[str, ...] = ()
    signer: str | None = None
    actions: tuple[Mapping[str, Any], ...] = ()
    inputs: tuple[Verdict, ...] = ()
    binding: str | None = None

    def altered_inputs(self) -> Iterator[Verdict]:
        """Those that were altered before they were used: the file itself may be trusted all the same."""
        for one in self.inputs:
            if one.answer == ALTERED:
                yield one
            yield from one.altered_inputs()


MOST = 2000  # records of one history, each counted as often as it comes


class TooLongError(ValueError):
    """A history of more than `MOST` records, or without end."""


_Codes = Mapping[str, list[str]]


def judged(
    name: str,
    record: Mapping[str, Any],
    label: str,
    results: Mapping[str, Any],
    later: _Codes = MappingProxyType({}),
    also: Iterable[str] = (),
    left: Iterator[int] | None = None,
) -> Verdict:
    """Of the manifest `label`: by the `results` of when it was looked at as a file, and what was found of it since.

    The record of an ingredient holds the first, as whoever used it saw them; the second, `also`, is in the results of
    the file it is part of now. `later` are those of ingredients, by the place of each; `left` counts the records.
    Raises `TooLongError`.
    """
    left = iter(range(MOST)) if left is None else left
    if next(left, None) is None:
        raise TooLongError(f"its history has more than {MOST} parts")
    manifest, deltas = record["manifests"][label], _deltas(results)
    # a history that was changed breaks the signature over it, which c2pa tells of the ingredient alone
    broken = [code for codes in deltas.values() for code in codes if not _of_trust(code)]
    failures = tuple(dict.fromkeys([*_failures(results.get("activeManifest")), *also, *broken]))
    if any(not _of_trust(code) for code in failures):
        answer = ALTERED
    else:
        answer = UNKNOWN if failures else TRUSTED
    data = {entry["label"]: entry.get("data") for entry in manifest.get("assertions") or ()}
    actions = _held(data.get("c2pa.actions.v2") or data.get("c2pa.actions"), "actions")
    later = {place: [*later.get(place, ()), *deltas.get(place, ())] for place in later.keys() | deltas.keys()}
    inputs = tuple(_input(one, record, label, later, left) for one in manifest.get("ingredients") or ())
    blocks = _held(data.get("c2pa.soft-binding"), "blocks")
    signer = (manifest.get("signature_info") or {}).get("issuer")
    return Verdict(name, answer, failures, signer, actions, inputs, blocks[0].get("value") if blocks else None)


def _input(
    one: Mapping[str, Any], record: Mapping[str, Any], label: str, later: _Codes, left: Iterator[int]
) -> Verdict:
    """Of an ingredient of the manifest `label`."""
    name, own = str(one.get("title") or "untitled"), one.get("active_manifest")
    if own is None:
        return Verdict(name, NONE)
    found = later.get(f"self#jumbf=/c2pa/{label}/c2pa.assertions/{one.get('label')}", ())
    if own not in record["manifests"]:
        return Verdict(name, ALTERED, tuple(found) or ("ingredient.manifest.missing",))
    return judged(name, record, own, one.get("validation_results") or {}, later, found, left)


def _deltas(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """The failures of ingredients that were not there when they were used, by the place of each."""
    entries = results.get("ingredientDeltas") or ()
    return {entry["ingredientAssertionURI"]: _failures(entry["validationDeltas"]) for entry in entries}


def _failures(codes: Mapping[str, Any] | None) -> list[str]:
    return [entry["code"] for entry in (codes or {}).get("failure") or ()]


def _of_trust(code: str) -> bool:
    """Whether a failure is of who signed, not of what."""
    return code.startswith("signingCredential.")


def _held(data: Any, name: str) -> tuple[Mapping[str, Any], ...]:
    """The mappings in a list of an assertion; of one that is of another form, none."""
    rows = data.get(name) if isinstance(data, Mapping) else None
    return tuple(row for row in rows if isinstance(row, Mapping)) if isinstance(rows, list) else ()
