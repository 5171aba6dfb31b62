"""Compiled kernels executed instruction by instruction on a CPU: the bytes they move, exactly; no time.

python -m benchmarks.compiled                        every case on sm_80 and sm_90 whose PTX is not that of its rows
python -m benchmarks.compiled --anew                 all of them: where what is counted has changed
python -m benchmarks.compiled --only WORDS --sm 90   the cases with these words in their names; other rows are kept
python -m benchmarks.compiled --summary              only results/compiled/README.md, from the rows there are

A row of traffic.jsonl is one kernel in one direction of one call. Every count is of the PTX that Triton or nvcc gives
to ptxas, executed as `tests/ptx` describes: deterministic, and the same on every machine.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import compiled_report, machine
from .verified import write_beside

if TYPE_CHECKING:
    from .compiled_cases import Case

RESULTS = machine.RESULTS / compiled_report.FOLDER
SMS = (80, 90)
Row = dict

SPECIAL = ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh", "div")
KINDS = {
    "exchange": ("shfl", "redux", "vote", "match", "activemask", "elect"),
    "waits": ("bar", "barrier", "mbarrier", "fence", "membar", "griddepcontrol"),
    "predicates": ("setp", "set", "selp", "slct", "bra", "ret", "exit"),
    "moves": ("mov", "prmt", "cvta", "ld"),  # what is left of ld reads parameters
    "converts": ("cvt",),
}


def kind_of(opcode: str) -> str:
    """The class under which an instruction is counted."""
    parts = opcode.split(".")
    base, space = parts[0], next((p.split("::")[0] for p in parts[1:] if p.startswith(("global", "shared"))), None)
    if base in ("cp", "wgmma") and any(p.startswith(("commit", "wait", "fence")) for p in parts):
        return "waits"
    if base in ("mma", "wgmma"):
        return "products"
    if base in ("ldmatrix", "stmatrix") or (base in ("ld", "st") and space == "shared"):
        return "shared"
    if base in ("st", "cp", "atom", "red") or (base == "ld" and space == "global"):
        return "global"
    if base in SPECIAL and parts[-1] not in ("s32", "u32", "s64", "u64"):
        return "special"
    for kind, bases in KINDS.items():
        if base in bases:
            return kind
    floats = any(p.startswith(("f16", "f32", "f64", "bf16")) for p in parts[1:])
    return "floats" if floats else "integers"


def width_of(opcode: str, text: str) -> int:
    """Bytes of a lane's access to global memory; a copy by a box or in bulk counts as one of 16."""
    parts = opcode.split(".")
    if parts[0] == "cp":
        sizes = [int(size, 0) for size in text.rstrip("; ").replace("]", "").split(", ") if size[:1].isdigit()]
        return 16 if "bulk" in parts else sizes[0]
    vector = next((int(p[1:]) for p in parts if p in ("v2", "v4", "v8")), 1)
    return vector * int("".join(c for c in parts[-1] if c.isdigit())) // 8


class Bytes:
    """Which elements of which storages have been counted. A storage holds one dtype."""

    def __init__(self) -> None:
        self._seen: dict[int, torch.Tensor] = {}

    def new(self, tensor: torch.Tensor) -> int:
        """How many bytes of `tensor` were not counted before; they are from now on."""
        storage = tensor.untyped_storage()
        size = tensor.element_size()
        seen = self._seen.setdefault(storage.data_ptr(), torch.zeros(storage.nbytes() // size, dtype=torch.bool))
        before = int(seen.sum())
        seen.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        return (int(seen.sum()) - before) * size


def compiler(case: Case) -> str:
    if case.impl == "triton":
        return f"triton {machine.installed('triton')}"
    from ptx import nvcc

    return f"nvcc {nvcc.version()}"


def launches(case: Case, sm: int, **options) -> Iterator[tuple[str, list, list[torch.Tensor]]]:
    """For both directions of a call: which, the (kernel, counters) of its launches, and the tensors that were there
    before or are left behind. options: of ptx.run."""
    from ptx.launcher import triton_on
    from ptx.nvcc import nvcc_on

    torch.manual_seed(0)
    inputs = case.inputs()
    wanted = [name for name in inputs if name not in case.constant]
    for name in wanted:
        inputs[name].requires_grad_()
    launched: list = []
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    def observe(kernel, counters) -> None:
        launched.append((kernel if isinstance(kernel, str) else kernel.__name__, counters))

    executed_on = triton_on if case.impl == "triton" else nvcc_on
    options |= {} if case.blocks is None else dict(blocks=case.blocks)
    with executed_on(sm, observe, checks=(), **options), case.bounded():  # faults are the tests' to find
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            results = case.call(**inputs)
        results = results if isinstance(results, tuple) else (results,)
        outside = [*inputs.values(), *results, *saved]
        yield "fwd", launched, outside
        if wanted:
            launched.clear()
            incoming = [torch.randn_like(result) for result in results]
            grads = torch.autograd.grad(results, [inputs[name] for name in wanted], incoming)
            yield "bwd", launched, [*outside, *incoming, *grads]


def fingerprint(case: Case, sm: int) -> str:
    """Of what a case would execute: its instructions, on which tensors. Nothing is executed.

    Mangled names are left out: those in nvcc's anonymous namespaces are new in every compilation.
    """
    found = hashlib.sha256(compiler(case).encode())
    for mode, launched, _ in launches(case, sm, programs=()):
        for kernel, counters in launched:
            tensors = [(t.dtype, t.shape, t.stride()) for t in counters.tensors.values()]
            code = [re.sub(r"\b_Z\w+", "", origin.text) for origin in counters.program.origin]
            found.update(repr((mode, kernel, tensors, code)).encode())
    return found.hexdigest()[:16]


def measure(case: Case, sm: int) -> list[Row]:
    """The rows of both directions of a call."""
    commit, dirty = machine.commit()
    where = dict(compiler=compiler(case), fingerprint=fingerprint(case, sm), commit=commit, dirty=dirty)
    return [row | where for mode, *found in launches(case, sm) for row in _rows(case, mode, sm, *found)]


def _rows(case: Case, mode: str, sm: int, launched: list, outside: list[torch.Tensor]) -> list[Row]:
    """One row for each kernel of a direction, in the order of its launches.

    The fewest bytes: of the tensors that were there before or are left behind, those the kernels are given, once.
    Above them: what is written only to be read again (named as the kernel does), and what a later launch reads again.
    """
    kept = {t.untyped_storage().data_ptr() for t in outside}
    elements = max(t.numel() for t in outside)
    counted = Bytes()
    rows: dict[str, Row] = {}
    for kernel, counters in launched:
        if kernel not in rows:
            rows[kernel] = dict(
                case=case.name, mode=mode, kernel=kernel, sm=sm, bound="products" if case.products else "memory",
                elements=elements, launches=0, fewest=0, read=0, written=0, above={}, requests=0, sectors=0,
                ideal_sectors=0, asked=0, asked_by_16=0, wavefronts=0, ideal_wavefronts=0, instructions=Counter(),
            )  # fmt: skip
        row, above, launch = rows[kernel], Counter(), Bytes()
        for name, tensor in counters.tensors.items():
            own = launch.new(tensor)  # none where it is another argument too
            if tensor.untyped_storage().data_ptr() in kept:
                new = counted.new(tensor)
                row["fewest"] += new
                above[f"{name} again"] += own - new
            else:
                above[name] += own
        row["launches"] += 1
        row["read"] += 32 * counters.read
        row["written"] += 32 * counters.written
        row["above"] = dict(Counter(row["above"]) + above)
        _count(row, counters)
    for row in rows.values():  # of a warp's 32 lanes, those switched off included
        instructions = sorted(row["instructions"].items())
        row["instructions"] = {kind: round(32 * count / elements, 4) for kind, count in instructions if count}
    return list(rows.values())


def _count(row: Row, counters) -> None:
    """Add what a launch executed and asked for."""
    program, memory = counters.program, counters.memory
    for n, (origin, count) in enumerate(zip(program.origin, counters.executed.tolist(), strict=True)):
        kind = kind_of(origin.opcode)
        row["instructions"][kind] += count
        for name in ("wavefronts", "ideal_wavefronts"):
            row[name] += int(memory[name][n])
        if kind == "global" and memory["requests"][n]:
            for name in ("requests", "sectors", "ideal_sectors"):
                row[name] += int(memory[name][n])
            asked = int(memory["bytes"][n])
            row["asked"] += asked
            row["asked_by_16"] += asked * (width_of(origin.opcode, origin.text) >= 16)


def _key(row: Row) -> tuple[str, int]:
    return row["case"], row["sm"]


def record(fresh: Iterable[Row], target: Path, names: list[str]) -> None:
    """Put rows in the place of those of the same cases and GPU; in the order of the cases."""
    fresh = list(fresh)
    anew = {_key(row) for row in fresh}
    kept = [row for row in compiled_report.read(target) if _key(row) not in anew and row["case"] in names]
    rows = sorted([*kept, *fresh], key=lambda row: (names.index(row["case"]), row["mode"] == "bwd", row["sm"]))
    write_beside(target, "".join(json.dumps(row) + "\n" for row in rows))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="WORDS", help="cases with these words in their names")
    parser.add_argument("--sm", type=int, action="append", choices=SMS, help="compute capability; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--anew", action="store_true", help="also what is compiled as recorded")
    parser.add_argument("--summary", action="store_true", help="execute nothing")
    args = parser.parse_args(arguments)
    if not args.summary:
        os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported
        sys.path.insert(0, str(machine.ROOT / "tests"))  # where the executor lives
        from ptx import nvcc

        from .compiled_cases import cases

        names = [case.name for case in cases()]
        chosen = [case for case in cases() if any(words in case.name for words in args.only or [""])]
        if not chosen:
            parser.error(f"--only {' '.join(args.only)} is in no name; there are: {'; '.join(names)}")
        target = args.out / "traffic.jsonl"
        for case, sm in itertools.product(chosen, args.sm or SMS):
            if sm not in case.sms:
                continue
            if case.impl == "cuda" and not nvcc.find():
                print(f"{case.name}, sm_{sm}: nvcc is not installed; what is recorded of it is kept", flush=True)
                continue
            known = {row["fingerprint"] for row in compiled_report.read(target) if _key(row) == (case.name, sm)}
            if not args.anew and known == {fingerprint(case, sm)}:
                print(f"{case.name}, sm_{sm}: compiled as recorded", flush=True)
                continue
            print(f"{case.name}, sm_{sm}", flush=True)
            record(measure(case, sm), target, names)
    compiled_report.update(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
