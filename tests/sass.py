"""What ptxas made of a kernel: registers, stack, occupancy, and on sm_90 how its matrix products are grouped."""

from __future__ import annotations

import pathlib
import re
import subprocess
import tempfile

import triton

TOOLS = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED = {80: 164, 90: 228, 100: 228, 120: 100}  # KiB of an SM, of which each block takes one more than it asks for
WARPS = {80: 64, 90: 64, 100: 64, 120: 48}  # of an SM


def disassembled(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    usage = disassembled("cuobjdump", "--dump-resource-usage", cubin)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return dict(registers=found["REG"], stack=found["STACK"], local=found["LOCAL"])


def occupancy(capability: int, registers: int, shared: int, warps: int) -> int:
    """Warps that fit an SM at a time: registers are dealt out to a warp by 256, shared memory to a block by KiB."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = SHARED[capability] * 1024 // (1024 + shared)
    return min(by_registers, by_shared, WARPS[capability] // warps) * warps


def loops(lines: list[str]) -> list[tuple[int, int]]:
    """First and last line of the loops that hold no other: from a label to the branch back to it."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.startswith(".L")}
    back = []
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA\S* .*?`\((\.L\S+)\)", line)
        if target and labels.get(target[1], i) < i - 1:  # a kernel ends with a branch to itself
            back.append((labels[target[1]], i))
    return [(first, last) for first, last in back if not any(first <= start and end < last for start, end in back)]


def wgmma(cubin: bytes) -> dict:
    """HGMMA instructions, the groups they are committed in, how many waits drain all, and the same in the main loop.

    The last HGMMA of a group names the scoreboard gsb0. Where ptxas serialises, each is a group and drained at once.
    """
    code = disassembled("nvdisasm", "-c", cubin)
    lines = re.findall(r"^(\.L\w+:)|^\s*/\*[0-9a-f]+\*/\s+(.*?);", code, re.MULTILINE)
    lines = [label or instruction for label, instruction in lines]

    def count(first: int, last: int) -> dict[str, int]:
        part = lines[first : last + 1]
        products = [line for line in part if line.startswith("HGMMA")]
        drains = sum("WARPGROUP.DEPBAR.LE gsb0, 0x0" in line for line in part)
        return dict(hgmma=len(products), groups=sum("gsb0" in line for line in products), drains=drains)

    main = max((count(*loop) for loop in loops(lines)), key=lambda found: found["hgmma"], default=count(0, -1))
    return count(0, len(lines)) | {f"loop_{name}": value for name, value in main.items()}
