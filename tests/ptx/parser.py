"""PTX text -> kernels: parameters, registers, shared variables and instructions with their source lines."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

VERSIONS = range(60, 95)  # PTX ISA 6.0 to 9.4
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


class Unsupported(ValueError):
    """PTX that this executor does not know."""


class Register(NamedTuple):
    name: str


class Immediate(NamedTuple):
    bits: int


class Symbol(NamedTuple):
    name: str


class Special(NamedTuple):
    name: str


class Memory(NamedTuple):
    base: object
    offset: int
    coordinates: tuple = ()


class Vector(NamedTuple):
    items: tuple


class Not(NamedTuple):
    item: Register


class Pair(NamedTuple):
    first: object
    second: object


SINK = Symbol("_")


@dataclasses.dataclass(slots=True)
class Instruction:
    opcode: str
    operands: list
    guard: str | None
    negated: bool
    line: tuple[str, ...]  # "file:line", where inlined followed by the places of the calls
    text: str


class Parameter(NamedTuple):
    name: str
    offset: int
    size: int


@dataclasses.dataclass
class Kernel:
    name: str
    sm: int
    parameters: list[Parameter]
    parameter_bytes: int
    threads: tuple[int, int, int] | None  # .reqntid, or .maxntid where a launch may choose fewer
    held: int  # registers that a thread begins with, where the kernel's head settles it; else 0
    registers: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> type
    shared: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # name -> size (0: dynamic), alignment
    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)


STATEMENT = re.compile(
    r"""\s*(?:
    (?P<scope>[{}]) |
    \.loc\s+(?P<loc>[^\n]*) |
    (?P<skipped>\.(?:file|section)[^\n]*) |
    \.(?P<directive>\w+)\s*(?P<declared>[^;]*); |
    (?P<label>[\w$]+)\s*:(?!:) |
    (?:@(?P<negated>!?)(?P<guard>[%\w$]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>[^;]*);
    )""",
    re.X,
)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
PIECE = re.compile(r"[^,{}\[\]]+|[,{}\[\]]")
SPECIAL = re.compile(r"%(?:n?tid|n?ctaid|laneid|warpid|cluster_n?ctarank|clock|clock64|smid|globaltimer)\b")
INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
OFFSET = re.compile(r"(.*?)\s*\+\s*(-?(?:0x)?[0-9a-fA-F]+)$")


def kernels(text: str) -> list[str]:
    """The names of the entries in a PTX module."""
    return re.findall(r"\.entry\s+([\w$]+)\s*\(", text)


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel `name` of a PTX module, which may be left out where there is but one."""
    version = re.search(r"^\s*\.version\s+(\d+)\.(\d+)", text, re.M)
    if version is None:
        raise Unsupported(f"this is no PTX: it has no .version; it begins with {text[:60]!r}")
    if int(version[1]) * 10 + int(version[2]) not in VERSIONS:
        raise Unsupported(f"PTX of version {version[1]}.{version[2]}; versions 6.0 to 9.4 are known")
    target = re.search(r"^\s*\.target\s+sm_(\d+)", text, re.M)
    names = kernels(text)
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        raise Unsupported(f"there is no kernel {name!r} in this PTX; it has {', '.join(names) or 'none'}")
    files = {int(n): path.rsplit("/", 1)[-1] for n, path in re.findall(r'\.file\s+(\d+)\s+"[^"]*?([^"/]*)"', text)}
    entry = re.search(rf"\.entry\s+{re.escape(name)}\s*\(([^)]*)\)([^{{]*)\{{", text)
    kernel = Kernel(name, int(target[1]), *_parameters(entry[1]), _threads(entry[2]), _held(entry[2]))
    for align, variable, size in re.findall(r"\.extern\s+\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text):
        kernel.shared[variable] = (int(size or 0), int(align))
    _Body(kernel, files).read(COMMENT.sub("", text[entry.end() : _closing(text, entry.end())]))
    return kernel


def _closing(text: str, start: int) -> int:
    """Where the brace that opened before `start` closes."""
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise Unsupported("this PTX is cut off: a kernel has no end")


def _parameters(text: str) -> tuple[list[Parameter], int]:
    found, offset = [], 0
    for declaration in filter(None, (p.strip() for p in COMMENT.sub("", text).split(","))):
        array = re.match(r"\.param\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", declaration)
        if array:
            align, name, size = int(array[1]), array[2], int(array[3])
        else:
            align = size = SIZES[re.match(r"\.param\s+\.[a-z]+(\d+)", declaration)[1]]
            name = declaration.split()[-1]
        offset = -(-offset // align) * align
        found.append(Parameter(name, offset, size))
        offset += size
    return found, offset


def _threads(header: str) -> tuple[int, int, int] | None:
    given = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", header)
    return given and tuple(int(n or 1) for n in given.groups())


def _held(header: str) -> int:
    """.maxnreg, or a share of the register file for every thread of the blocks that are to fit."""
    if given := re.search(r"\.maxnreg\s+(\d+)", header):
        return int(given[1])
    threads, blocks = _threads(header), re.search(r"\.minnctapersm\s+(\d+)", header)
    return min(256, 65536 // (math.prod(threads) * int(blocks[1])) // 8 * 8) if threads and blocks else 0


class _Body:
    """The statements of a kernel, in nested scopes whose registers and labels have names of their own."""

    def __init__(self, kernel: Kernel, files: dict[int, str]) -> None:
        self.kernel, self.files = kernel, files
        self.scopes: list[dict[str, str]] = [{}]
        self.count = 0
        self.line: tuple[str, ...] = ("?",)
        self.targets: list[tuple[Instruction, dict[str, str]]] = []
        self.operands: dict[str, object] = {}

    def read(self, body: str) -> None:
        position, end = 0, len(body.rstrip())
        while position < end:
            found = STATEMENT.match(body, position)
            if found is None:
                raise Unsupported(f"{self.line[0]}: cannot read {body[position : position + 80].strip()!r}")
            position = found.end()
            kind = found.lastgroup
            if kind == "scope":
                self.scope(found["scope"])
            elif kind == "loc":
                self.locate(found["loc"])
            elif kind == "declared":
                self.declare(found["directive"], found["declared"])
            elif kind == "label":
                self.kernel.labels[self.own(found["label"])] = len(self.kernel.instructions)
            elif kind == "operands":
                self.instruction(found)
        for instruction, names in self.targets:
            label = instruction.operands[-1].name
            label = names.get(label, label)
            if label not in self.kernel.labels:
                raise Unsupported(f"{instruction.line[0]}: no label {label} for {instruction.text}")
            instruction.operands = [Symbol(label)]

    def scope(self, bracket: str) -> None:
        if bracket == "{":
            self.count += 1
            self.scopes.append(dict(self.scopes[-1]))
        else:
            self.scopes.pop()
        self.operands.clear()

    def own(self, name: str) -> str:
        """The name of what is declared in this scope."""
        if len(self.scopes) == 1:
            return name
        self.operands.clear()
        return self.scopes[-1].setdefault(name, f"{name}#{self.count}")

    def locate(self, text: str) -> None:
        places = re.findall(r"(?:^|inlined_at\s+)(\d+)\s+(\d+)", text)
        self.line = tuple(f"{self.files.get(int(file), '?')}:{line}" for file, line in places)

    def declare(self, directive: str, text: str) -> None:
        if directive == "reg":
            kind, names = text.split(None, 1)
            for name in names.split(","):
                many = re.match(r"\s*(%\w+)<(\d+)>", name)
                for k in range(int(many[2])) if many else ():
                    self.kernel.registers[f"{many[1]}{k}"] = kind[1:]
                if not many:
                    self.kernel.registers[self.own(name.strip())] = kind[1:]
        elif directive == "shared":
            variable = re.match(r"(?:\.align\s+(\d+)\s+)?\.\w+\s+([\w$]+)(?:\[(\d+)\])?", text)
            size = re.search(r"\.[a-z]+(\d+)\s", text)
            count = int(variable[3] or 1) * SIZES[size[1]]
            self.kernel.shared[variable[2]] = (count, int(variable[1] or SIZES[size[1]]))
        elif directive not in ("pragma", "branchtargets"):
            raise Unsupported(f"{self.line[0]}: the directive .{directive} {text.strip()} is not modelled")

    def instruction(self, found: re.Match) -> None:
        guard = found["guard"] and self.scopes[-1].get(found["guard"], found["guard"])
        text = " ".join(found[0].split())
        operands = self.parse_operands(found["operands"])
        instruction = Instruction(found["opcode"], operands, guard, found["negated"] == "!", self.line, text)
        if found["opcode"].split(".")[0] == "bra":
            self.targets.append((instruction, self.scopes[-1]))
        self.kernel.instructions.append(instruction)

    def parse_operands(self, text: str) -> list:
        stack: list[list] = [[]]
        for piece in PIECE.findall(text):
            if piece in "[{":
                stack.append([piece])
            elif piece in "]}":
                opened, *items = stack.pop()
                stack[-1].append(Vector(tuple(items)) if opened == "{" else self.memory(items))
            elif piece != "," and (piece := piece.strip()):
                stack[-1].append(self.operand(piece) if stack[-1][:1] != ["["] or len(stack[-1]) > 1 else piece)
        return stack[0]

    def memory(self, items: list) -> Memory:
        base, *rest = items
        offset = OFFSET.match(base)
        coordinates = rest[0].items if rest else ()
        return Memory(self.operand(offset[1] if offset else base), int(offset[2], 0) if offset else 0, coordinates)

    def operand(self, text: str) -> object:
        found = self.operands.get(text)
        if found is None:
            found = self.operands[text] = self.make_operand(text)
        return found

    def make_operand(self, text: str) -> object:
        if "|" in text:
            return Pair(*(self.operand(t.strip()) for t in text.split("|")))
        if text[0] == "!":
            return Not(self.operand(text[1:].strip()))
        if text in self.scopes[-1]:
            return Register(self.scopes[-1][text])
        if text in self.kernel.registers:
            return Register(text)
        if INTEGER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        if re.match(r"0[fFdD][0-9a-fA-F]+$", text):
            return Immediate(int(text[2:], 16))
        if SPECIAL.match(text):
            return Special(text)
        if text == "WARP_SZ":
            return Immediate(32)
        if text[0] == "%":
            raise Unsupported(f"{self.line[0]}: the register {text} is not modelled")
        return Symbol(text)
