"""Whether a pipelined loop prefetches into shared memory that a wgmma still in flight reads: the TTGIR of sm_90, read.

Triton chooses the number of buffers, the distance of the prefetch and the pending groups of each wait in passes that
know little of each other. Here they are played against each other: the operations of the innermost loops in their
order, for several iterations, with the products in flight as a queue. Barriers between warps are not looked at.
"""

from __future__ import annotations

import re

RESULT = re.compile(r"(%[\w.#]+)(?::\d+)? = (.*)")
OPERAND = re.compile(r"%[\w.]+(?:#\d+)?")
VIEWS = tuple(f"ttg.memdesc_{view}" for view in ("index", "trans", "subslice", "reinterpret", "reshape"))
COPIES = ("ttg.async_copy_global_to_local", "ttng.async_tma_copy_global_to_local", "ttg.local_store")


def operations(ttgir: str) -> list[tuple[int, str, str]]:
    """(depth, result, operation) a line. Regions side by side may use a name twice: each definition gets its own."""
    found, current = [], {}
    for number, line in enumerate(ttgir.splitlines()):
        if not line.lstrip().startswith(("%", "ttg.", "ttng.", "scf.", "}")):
            continue
        text = re.sub(r" loc\(.*", "", line).strip()
        match = RESULT.match(text)
        name, text = match.groups() if match else ("", text)
        text = OPERAND.sub(lambda operand: current.get(operand[0], operand[0]), text)
        if name:
            current[name] = name = f"{name}.{number}"
        found.append((len(line) - len(line.lstrip()), name, text))
    return found


def innermost(ops: list) -> list[tuple[int, int]]:
    """First and last operation of the body of each loop that holds no other."""
    loops = []
    for i, (depth, _, text) in enumerate(ops):
        if text.startswith("scf.for"):
            end = next(j for j in range(i + 1, len(ops)) if ops[j][0] <= depth)
            if not any(other.startswith("scf.for") for _, _, other in ops[i + 1 : end]):
                loops.append((i + 1, end))
    return loops


def overwritten(ttgir: str, iterations: int = 8) -> list[str]:
    """The writes to a buffer that a product in flight reads, as text; empty is good."""
    ops = operations(ttgir)
    views = {name: OPERAND.findall(text)[0] for _, name, text in ops if text.startswith(VIEWS)}
    buffers = {}
    for _, name, text in ops:
        if text.startswith("ttg.local_alloc"):
            ring = re.match(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", text)
            buffers[name] = int(ring[1]) if ring else 1

    def buffer(operand: str) -> str:
        while operand in views:
            operand = views[operand]
        return operand

    def written(text: str) -> str | None:
        """The buffer that this operation fills; a TMA names its barrier, also in shared memory, after it."""
        operands = [buffer(o) for o in OPERAND.findall(text)] if text.startswith(COPIES) else []
        return next((o for o in operands if o in buffers), None)

    faults: list[str] = []
    for first, last in innermost(ops):
        ahead = {}  # how many iterations before its use a buffer is filled: once for each in the prologue
        for _, _, text in ops[:first]:
            target = written(text)
            if target:
                ahead[target] = ahead.get(target, 0) + 1
        in_flight: list[tuple[int, set[str]]] = []
        for iteration in range(iterations):
            for _, name, text in ops[first:last]:
                if text.startswith("ttng.warp_group_dot_wait"):
                    pending = int(re.search(r"pendings = (\d+)", text)[1])
                    in_flight = in_flight[len(in_flight) - pending :] if pending else []
                elif text.startswith("ttng.warp_group_dot "):
                    read = {buffer(o) for o in OPERAND.findall(text)} & set(buffers)
                    in_flight.append((iteration, read))
                    if "isAsync = true" not in text:
                        in_flight = []
                target = name if text.startswith("ttg.local_alloc %") else written(text)
                if target is None:
                    continue
                slots = buffers[target]
                slot = (iteration + ahead.get(target, 0)) % slots
                late = [i for i, read in in_flight if target in read and i % slots == slot]
                if late:
                    faults.append(f"{target}, {slots} buffers, is filled {ahead.get(target, 0)} iterations ahead")
    return sorted(set(faults))
