"""A kernel's instructions -> records of the core: operation, guard, operands as offsets into a warp's register file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from . import build
from .parser import (
    SINK,
    Immediate,
    Instruction,
    Kernel,
    Memory,
    Not,
    Pair,
    Register,
    Special,
    Symbol,
    Unsupported,
    Vector,
)

RECORD = np.dtype([
    ("operation", "i4"), ("guard", "i4"), ("negate", "i4"), ("first", "i4"), ("count", "i4"), ("destinations", "i4"),
    ("wgmma", "i4"), ("padding", "i4"), ("immediate", "i8", 4),
])  # fmt: skip
SHARED, PARAMETERS = 0x400, 1 << 31  # kShared and kParameters
SPECIAL = [
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    "%laneid", "%warpid", "%cluster_nctarank", "%cluster_ctarank",
]  # fmt: skip
NEAREST = {"add", "sub", "mul", "fma", "div", "sqrt", "rcp"}  # where .rn is what the core does
COUNTS = {"popc", "clz", "bfind"}  # their results have 32 bits


@dataclasses.dataclass
class Program:
    """A decoded kernel."""

    records: np.ndarray
    operands: np.ndarray
    registers: np.ndarray  # the image that each warp begins with: ones, and the constants
    origin: list[Instruction]  # of each record
    shared_bytes: int


def bits(kind: str) -> int:
    """The width of a register or an instruction type; predicates have 1."""
    if kind == "pred":
        return 1
    found = re.match(r"[a-z]+(\d+)(x2)?$", kind)
    if found is None:
        raise Unsupported(f"the type .{kind} is not modelled")
    return max(16, int(found[1])) * (2 if found[2] else 1)


class Decoder:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.operations = build.operations()
        self.slots: dict[tuple, int] = {}
        self.constants: dict[int, tuple[int, int]] = {}  # offset -> value, bits
        self.top = 64  # offset 0 stands for no guard
        self.records: list[tuple] = []
        self.pool: list[int] = []
        self.origin: list[Instruction] = []
        self.current: Instruction = kernel.instructions[0]
        self.symbols, self.shared_bytes = layout(kernel)
        for parameter in kernel.parameters:
            self.symbols[parameter.name] = PARAMETERS + parameter.offset

    def fail(self, why: str) -> Unsupported:
        return Unsupported(f"{' in '.join(self.current.line)}: {why}: {self.current.text}")

    def slot(self, key: tuple, width: int) -> int:
        found = self.slots.get(key)
        if found is None:
            size = 4 if width == 1 else 4 * width
            self.top = -(-self.top // min(size, 64)) * min(size, 64)
            found = self.slots[key] = self.top
            self.top += size
        return found

    def constant(self, value: int, width: int) -> int:
        value = (-1 if value else 0) & 0xFFFFFFFF if width == 1 else value & ((1 << width) - 1)
        offset = self.slot(("constant", value, width), width)
        self.constants[offset] = (value, width)
        return offset

    def width(self, operand: Register) -> int:
        return bits(self.kernel.registers[operand.name])

    def source(self, operand: object, width: int | None) -> int:
        """The offset of an operand of this many bits; None: as wide as the register is."""
        if isinstance(operand, Register):
            own = self.width(operand)
            if width is not None and own != width:
                raise self.fail(f"{operand.name} has {own} bits where {width} are wanted")
            return self.slot((operand.name,), own)
        if isinstance(operand, Immediate):
            return self.constant(operand.bits, width or 32)
        if isinstance(operand, Symbol) and operand.name in self.symbols:
            return self.constant(self.symbols[operand.name], width or 32)
        if isinstance(operand, Not):
            inverse = self.slot(("not", operand.item.name), 1)
            self.emit("not.pred", [inverse], [self.source(operand.item, 1)], guarded=False)
            return inverse
        if isinstance(operand, Special):
            copy = self.slot(("special", operand.name), 32)
            self.special(copy, operand, guarded=False)
            return copy
        raise self.fail(f"the operand {operand} is not modelled")

    def destination(self, operand: object, width: int | None) -> int:
        if operand == SINK:
            return self.slot(("sink",), width or 32)
        if not isinstance(operand, Register):
            raise self.fail(f"{operand} is no register")
        return self.source(operand, width)

    def emit(
        self, operation: str, to: list[int], of: list[int], *immediates: int, guarded: bool = True, wgmma: int = 0
    ) -> None:
        if operation not in self.operations:
            raise self.fail(f"the instruction {self.current.opcode} is not modelled (operation {operation})")
        guard, negate = 0, 0
        if guarded and self.current.guard:
            guard, negate = self.source(Register(self.current.guard), 1), int(self.current.negated)
        padded = (*immediates, 0, 0, 0, 0)[:4]
        operands = [*to, *of]
        self.records.append(
            (self.operations[operation], guard, negate, len(self.pool), len(operands), len(to), wgmma, 0, padded)
        )
        self.pool += operands
        self.origin.append(self.current)

    def decode(self) -> Program:
        start = []
        for instruction in self.kernel.instructions:
            self.current = instruction
            start.append(len(self.records))
            parts = instruction.opcode.split(".")
            try:
                DECODERS.get(parts[0], Decoder.arithmetic)(self, parts, instruction.operands)
            except (IndexError, AttributeError, StopIteration) as error:
                raise self.fail("this form is not modelled") from error
            except Unsupported as error:
                raise error if self.current.text in str(error) else self.fail(str(error)) from error
        start.append(len(self.records))
        self.emit("ret", [], [], guarded=False)
        records = np.array(self.records, RECORD)
        for record, origin in zip(records, self.origin, strict=True):
            if origin.opcode.split(".")[0] == "bra" and record["operation"] == self.operations["bra"]:
                record["immediate"][0] = start[self.kernel.labels[origin.operands[0].name]]
        self.watch(records)
        registers = np.full(self.top + 64, 0xFF, np.uint8)
        for offset, (value, width) in self.constants.items():
            if width == 1:
                registers[offset : offset + 4].view(np.uint32)[0] = value
            else:
                registers[offset : offset + 4 * width].view(f"u{width // 8}")[:] = value
        return Program(records, np.array(self.pool or [0], np.int32), registers, self.origin, self.shared_bytes)

    def watch(self, records: np.ndarray) -> None:
        """Mark what writes the registers of a wgmma: wgmma.fence must come between. Copies of registers, which ptxas
        makes into names, only pass on what they copy."""
        used: set[int] = set()
        for record in records[records["wgmma"] == 2]:
            used.update(self.pool[record["first"] : record["first"] + record["count"] - 2])
        moves = {self.operations[f"mov.{kind}32"] for kind in "busf"}
        copies = [record for record in records if record["operation"] in moves] if used else []
        pairs = [self.pool[c["first"] : c["first"] + 2] for c in copies]
        while more := {of for to, of in pairs if to in used and of not in self.constants} - used:
            used |= more
        for record in records if used else ():
            to = self.pool[record["first"] : record["first"] + record["destinations"]]
            if not record["wgmma"] and used.intersection(to):
                of = self.pool[record["first"] + 1]
                record["wgmma"] = 3 if record["operation"] in moves and of not in self.constants else 1

    # ---- by opcode ---------------------------------------------------------------------------------------------------

    def arithmetic(self, parts: list[str], operands: list) -> None:
        """An operation of the core under its own name, its operands as wide as its type."""
        if not re.match(r"[busf]\d+|bf16|pred$", parts[-1]):
            raise self.fail(f"the instruction {self.current.opcode} is not modelled")
        base, width = parts[0], bits(parts[-1])
        name = ".".join(p for p in parts if not (p == "rn" and base in NEAREST))
        result = 2 * width if "wide" in parts else 32 if base in COUNTS else width
        widths = [width] * (len(operands) - 1)
        if base in ("shl", "shr"):
            widths[1] = 32
        elif base in ("bfe", "bfi"):
            widths[-2:] = [32, 32]
        elif base == "mad" and "wide" in parts:
            widths[2] = result
        elif base == "selp":
            widths[2] = 1
        of = [self.source(o, w) for o, w in zip(operands[1:], widths, strict=True)]
        self.emit(name, [self.destination(operands[0], result)], of)

    def control(self, parts: list[str], operands: list) -> None:
        self.emit(parts[0], [], [])

    def barrier(self, parts: list[str], operands: list) -> None:
        if "warp" in parts:
            return self.emit("bar.warp", [], [self.source(operands[0], 32)])
        if "red" in parts:
            raise self.fail("reducing barriers are not modelled")
        self.emit("bar", [], [self.source(o, 32) for o in operands], int("arrive" in parts))

    def registers_of_a_thread(self, parts: list[str], operands: list) -> None:
        """setmaxnreg."""
        (count,) = operands
        if not 24 <= count.bits <= 256 or count.bits % 8:
            raise self.fail("a thread can have 24 to 256 registers, in multiples of 8")
        if not self.kernel.held:
            raise self.fail("ptxas ignores this without .maxnreg, or .minnctapersm and a size of the block")
        self.emit("setmaxnreg", [], [], count.bits, int(parts[1] == "inc"))

    def fence(self, parts: list[str], operands: list) -> None:
        self.emit("fence.proxy.async" if parts[1:3] == ["proxy", "async"] else "fence", [], [])

    def special(self, to: int, operand: Special, guarded: bool = True) -> None:
        if operand.name not in SPECIAL:
            raise self.fail(f"the special register {operand.name} is not modelled")
        self.emit("mov.special", [to], [], SPECIAL.index(operand.name), guarded=guarded)

    def move(self, parts: list[str], operands: list) -> None:
        to, of = operands
        width = bits(parts[-1])
        if isinstance(to, Vector):
            narrow = width // len(to.items)
            source = self.source(of, width)
            self.emit(f"unpack.{width}.{narrow}", [self.destination(o, narrow) for o in to.items], [source])
        elif isinstance(of, Vector):
            narrow = width // len(of.items)
            sources = [self.source(o, narrow) for o in of.items]
            self.emit(f"pack.{narrow}.{width}", [self.destination(to, width)], sources)
        elif isinstance(of, Special):
            self.special(self.destination(to, 32), of)
        else:
            self.emit(f"mov.{parts[-1]}", [self.destination(to, width)], [self.source(of, width)])

    def convert_address(self, parts: list[str], operands: list) -> None:
        if not {"global", "param"} & set(parts) or bits(parts[-1]) != 64:
            raise self.fail("generic addresses are modelled of global and parameter memory only")
        self.emit("mov.b64", [self.destination(operands[0], 64)], [self.source(operands[1], 64)])

    def access(self, parts: list[str], operands: list) -> None:
        """ld, st, atom and red."""
        space = next((p.split("::")[0] for p in parts[1:] if p.split("::")[0] in ("global", "shared", "param")), None)
        if space is None:
            raise self.fail("accesses of generic or local memory are not modelled")
        memory = next(o for o in operands if isinstance(o, Memory))
        if space == "param" and isinstance(memory.base, Register) and self.width(memory.base) == 32:
            address = self.slot(("wide", memory.base.name), 64)
            self.emit("cvt.u64.u32", [address], [self.source(memory.base, 32)], 8, 4)
        else:
            address = self.source(memory.base, 32 if space == "shared" else 64)
        kind, size = parts[-1], bits(parts[-1])
        if parts[0] in ("atom", "red"):
            if "noftz" in parts or "v2" in parts or "v4" in parts:
                raise self.fail("this atomic is not modelled")
            verb = next(p for p in parts if p in ("add", "min", "max", "and", "or", "xor", "exch", "cas"))
            to = [self.destination(operands[0], size)] if parts[0] == "atom" else []
            of = [self.source(o, size) for o in operands[operands.index(memory) + 1 :]]
            return self.emit(f"{parts[0]}.{space}.{verb}.{kind}", to, [address, *of], memory.offset)
        values = next(o for o in operands if not isinstance(o, Memory))
        items = values.items if isinstance(values, Vector) else (values,)
        size = int(re.sub(r"\D", "", kind))
        widths = {self.width(o) for o in items if isinstance(o, Register)} or {max(16, size)}
        (width,) = widths
        name = f"{parts[0]}.{space}.{'s' if kind[0] == 's' else 'u'}{size}.r{width}"
        if parts[0] == "ld":
            self.emit(name, [self.destination(o, width) for o in items], [address], memory.offset)
        else:
            self.emit(name, [], [address, *(self.source(o, width) for o in items)], memory.offset)

    def compare(self, parts: list[str], operands: list) -> None:
        combine = {"and": 1, "or": 2, "xor": 3}.get(parts[2], 0)
        names = [p for p in parts if p not in ("and", "or", "xor", "ftz")]
        to = operands[0]
        to = [to.first, to.second] if isinstance(to, Pair) else [to]
        of = [self.source(o, bits(parts[-1])) for o in operands[1:3]] + [self.source(o, 1) for o in operands[3:]]
        self.emit(".".join(names), [self.destination(o, 1) for o in to], of, combine)

    def convert(self, parts: list[str], operands: list) -> None:
        name, (to, *of) = ".".join(parts), operands
        if parts[-2].endswith("x2"):  # a pair of two sources
            return self.emit(name, [self.destination(to, 32)], [self.source(o, 32) for o in of])
        wide = self.width(to)
        narrow = self.width(of[0]) if isinstance(of[0], Register) else bits(parts[-1])
        self.emit(name, [self.destination(to, wide)], [self.source(of[0], narrow)], wide // 8, narrow // 8)

    def lanes(self, parts: list[str], operands: list) -> None:
        """shfl, vote, match, elect, redux and activemask."""
        base, to = parts[0], operands[0]
        to = [to.first, to.second] if isinstance(to, Pair) else [to]
        of = operands[1:]
        first = 1 if base == "vote" and "ballot" not in parts else 32
        widths = [first] + [1] * (len(to) - 1)
        if base == "shfl":
            name, mode = base, ["up", "down", "bfly", "idx"].index(parts[2])
        elif base == "vote":
            name, mode = base, ["ballot", "any", "all", "uni"].index(parts[2])
        elif base == "match":
            name, mode = f"match.{parts[-1]}", ["any", "all"].index(parts[1])
        elif base == "redux":
            name, mode = f"redux.{parts[2]}.{parts[-1]}", 0
        else:
            name, mode = base, 0
        source = 1 if base == "vote" else bits(parts[-1]) if base == "match" else 32
        of = [self.source(o, source if n == 0 and base != "elect" else 32) for n, o in enumerate(of)]
        self.emit(name, [self.destination(o, w) for o, w in zip(to, widths, strict=True)], of, mode)

    def copy(self, parts: list[str], operands: list) -> None:
        """cp.async in all its forms."""
        if "bulk" in parts:
            return self.bulk_copy(parts, operands)
        if "commit_group" in parts:
            return self.emit("cp.async.commit_group", [], [])
        if "wait_group" in parts or "wait_all" in parts:
            return self.emit("cp.async.wait_group", [], [], operands[0].bits if operands else -1)
        if parts[2] not in ("ca", "cg"):
            raise self.fail("this copy is not modelled")
        to, of, size, *read = operands
        sources = [self.source(to.base, 32), self.source(of.base, 64), *(self.source(o, 32) for o in read)]
        self.emit("cp.async", [], sources, to.offset, of.offset, size.bits)

    def bulk_copy(self, parts: list[str], operands: list) -> None:
        if "commit_group" in parts:
            return self.emit("bulk.commit_group", [], [])
        if "wait_group" in parts:
            return self.emit("bulk.wait_group", [], [], operands[0].bits)
        if {"im2col", "reduce", "prefetch", "multicast::cluster"} & set(parts) or parts[0] != "cp":
            raise self.fail("this bulk copy is not modelled")
        spaces = [p.split("::")[0] for p in parts if p.split("::")[0] in ("global", "shared")]
        load, box = spaces == ["shared", "global"], "tensor" in parts
        shared = operands[0] if load else operands[1]
        other = operands[1] if load else operands[0]
        at = [self.source(shared.base, 32), self.source(other.base, 64)]
        coordinates = [self.source(c, 32) for c in other.coordinates]
        if load and box:
            mbarrier = operands[2]
            at.append(self.source(mbarrier.base, 32))
            self.emit("bulk.load.box", [], [*at, *coordinates], shared.offset, mbarrier.offset)
        elif load:
            size, mbarrier = operands[2:]
            at += [self.source(size, 32), self.source(mbarrier.base, 32)]
            self.emit("bulk.load.line", [], at, shared.offset, other.offset, mbarrier.offset)
        elif box:
            self.emit("bulk.store.box", [], [*at[::-1], *coordinates], shared.offset)
        else:
            self.emit("bulk.store.line", [], [*at[::-1], self.source(operands[2], 32)], other.offset, shared.offset)

    def mbarrier(self, parts: list[str], operands: list) -> None:
        memory = next(o for o in operands if isinstance(o, Memory))
        address = self.source(memory.base, 32)
        rest = operands[operands.index(memory) + 1 :]
        if "shared::cluster" in parts or "noComplete" in parts:
            raise self.fail("this mbarrier operation is not modelled")
        if parts[1] in ("try_wait", "test_wait"):
            parity = "parity" in parts
            of = [address, self.source(rest[0], 32 if parity else 64)]
            to = [self.destination(operands[0], 1)]
            return self.emit("mbarrier.wait", to, of, memory.offset, int(parity), int(parts[1] == "try_wait"))
        verbs = {"init": 0, "inval": 1, "arrive": 2, "expect_tx": 3}
        verb = 4 if parts[1:3] == ["arrive", "expect_tx"] else verbs[parts[1]]
        to = [self.destination(operands[0], 64)] if operands[0] is not memory else []
        self.emit("mbarrier", to, [address, *(self.source(o, 32) for o in rest)], memory.offset, verb)

    def matrix(self, parts: list[str], operands: list) -> None:
        """ldmatrix and stmatrix."""
        if "b16" not in parts or "m8n8" not in parts:
            raise self.fail("matrices of 8 x 8 halves only are modelled")
        memory = next(o for o in operands if isinstance(o, Memory))
        values = next(o for o in operands if isinstance(o, Vector)).items
        address = self.source(memory.base, 32)
        trans = int("trans" in parts)
        if parts[0] == "ldmatrix":
            self.emit("ldmatrix", [self.destination(o, 32) for o in values], [address], memory.offset, trans)
        else:
            self.emit("stmatrix", [], [address, *(self.source(o, 32) for o in values)], memory.offset, trans)

    def product(self, parts: list[str], operands: list) -> None:
        """mma.sync with fp32 accumulators."""
        shape, types = parts[3], parts[-4:]
        if types[0] != "f32" or types[3] != "f32" or types[1] != types[2] or parts[4:6] != ["row", "col"]:
            raise self.fail("products of equal types with fp32 accumulators only are modelled")
        to, *of = (o.items if isinstance(o, Vector) else (o,) for o in operands)
        sources = [self.source(o, 32) for group in of for o in group]
        self.emit(f"mma.{shape}.{types[1]}", [self.destination(o, 32) for o in to], sources)

    def group_product(self, parts: list[str], operands: list) -> None:
        """wgmma."""
        if parts[1] == "fence":
            return self.emit("wgmma.fence", [], [])
        if parts[1] == "commit_group":
            return self.emit("wgmma.commit_group", [], [])
        if parts[1] == "wait_group":
            return self.emit("wgmma.wait_group", [], [], operands[0].bits)
        shape, types = re.match(r"m64n(\d+)k(\d+)$", parts[4]), parts[5:]
        if shape is None or types[0] != "f32" or types[1] != types[2] or len(types) != 3:
            raise self.fail("products of equal types with fp32 accumulators only are modelled")
        accumulators, a, b, scale, *flags = operands
        flags = [f.bits for f in flags]
        registers = isinstance(a, Vector)
        negate_a, negate_b = (flag == -1 for flag in flags[:2])
        transpose_a, transpose_b = (0, *flags[2:], 0)[:2] if registers else (*flags[2:], 0, 0)[:2]
        form = transpose_a | transpose_b << 1 | negate_a << 2 | negate_b << 3 | registers << 4
        left = [self.source(o, 32) for o in a.items] if registers else [self.source(a, 64)]
        sources = [*left, self.source(b, 64), self.source(scale, 1)]
        to = [self.destination(o, 32) for o in accumulators.items]
        self.emit(f"wgmma.k{shape[2]}.{types[1]}", to, sources, int(shape[1]), form, wgmma=2)


DECODERS: dict[str, Callable[[Decoder, list[str], list], None]] = {
    **dict.fromkeys(("bra", "ret", "exit", "trap", "membar", "prefetch", "griddepcontrol", "nanosleep"),
                    Decoder.control),
    **dict.fromkeys(("ld", "st", "atom", "red"), Decoder.access),
    **dict.fromkeys(("shfl", "vote", "match", "elect", "redux", "activemask"), Decoder.lanes),
    "setmaxnreg": Decoder.registers_of_a_thread,
    "bar": Decoder.barrier, "barrier": Decoder.barrier, "fence": Decoder.fence, "mov": Decoder.move,
    "cvta": Decoder.convert_address, "setp": Decoder.compare, "cvt": Decoder.convert, "cp": Decoder.copy,
    "mbarrier": Decoder.mbarrier, "ldmatrix": Decoder.matrix, "stmatrix": Decoder.matrix, "mma": Decoder.product,
    "wgmma": Decoder.group_product,
}  # fmt: skip


def layout(kernel: Kernel) -> tuple[dict[str, int], int]:
    """Addresses of the shared variables, the dynamic ones last, and the bytes of the static ones."""
    addresses, top = {}, SHARED
    for name, (size, align) in kernel.shared.items():
        if size:
            top = -(-top // align) * align
            addresses[name] = top
            top += size
    for name, (size, align) in kernel.shared.items():
        if not size:
            top = -(-top // align) * align
            addresses[name] = top
    return addresses, top - SHARED


def decode(kernel: Kernel) -> Program:
    return Decoder(kernel).decode()
