"""Launch a kernel: arguments laid out in windows of the address space, faults reported by source line, counters."""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import functools
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from . import build, decoder, parser

CHECKS = {"alignment": 1, "initialised": 2, "races": 4, "async": 8}
KINDS = (
    "none", "out of bounds", "misaligned", "uninitialised", "race", "asynchrony", "deadlock", "barrier", "endless",
    "unsupported", "registers", "order",
)  # fmt: skip
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
WINDOW, MIDDLE = 40, 1 << 39  # a buffer lies in the middle of its own window of 1 TiB

TRAFFIC = ("requests", "bytes", "sectors", "ideal_sectors", "wavefronts", "ideal_wavefronts")
MEMORY = np.dtype([(name, "u8") for name in TRAFFIC])


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("low", ctypes.c_uint64), ("high", ctypes.c_uint64), ("host", ctypes.c_void_p), ("holes", ctypes.c_void_p),
        ("itemsize", ctypes.c_int32), ("poisoned", ctypes.c_int32),
    ]  # fmt: skip


class _TensorMap(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64), ("base", ctypes.c_uint64), ("rank", ctypes.c_int64),
        ("itemsize", ctypes.c_int64), ("swizzle", ctypes.c_int64), ("size", ctypes.c_int64 * 5),
        ("stride", ctypes.c_int64 * 5), ("box", ctypes.c_int64 * 5),
    ]  # fmt: skip


class _Failure(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int32), ("warp", ctypes.c_int32), ("lane", ctypes.c_int32), ("warps", ctypes.c_int32),
        ("pc", ctypes.c_int64), ("cta", ctypes.c_int64 * 3), ("where", ctypes.c_int64 * 32),
        ("message", ctypes.c_char * 400),
    ]  # fmt: skip


class _Launch(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_void_p), ("code_size", ctypes.c_int64), ("operands", ctypes.c_void_p),
        ("registers", ctypes.c_void_p), ("register_bytes", ctypes.c_int64), ("parameters", ctypes.c_void_p),
        ("parameter_bytes", ctypes.c_int64), ("buffers", ctypes.c_void_p), ("buffer_count", ctypes.c_int64),
        ("maps", ctypes.c_void_p), ("map_count", ctypes.c_int64), ("block", ctypes.c_int64 * 3),
        ("grid", ctypes.c_int64 * 3), ("shared_bytes", ctypes.c_int64), ("ctas", ctypes.c_void_p),
        ("cta_count", ctypes.c_int64), ("seed", ctypes.c_uint64), ("checks", ctypes.c_uint64),
        ("budget", ctypes.c_int64), ("held", ctypes.c_int64), ("executed", ctypes.c_void_p),
        ("memory", ctypes.c_void_p), ("unique_sectors", ctypes.c_uint64 * 2), ("failure", _Failure),
    ]  # fmt: skip


class Fault(RuntimeError):
    """What a launch did wrong. `kind` is one of KINDS, `line` the source line, `thread` and `program` where."""

    def __init__(self, kind: str, line: str, message: str, program: tuple[int, ...] = (), thread: int | None = None):
        super().__init__(message)
        self.kind, self.line, self.program, self.thread = kind, line, program, thread


@dataclasses.dataclass
class Counters:
    """What a launch did, by instruction of the program: how often warps executed it, what it moved.

    `read` and `written`: the distinct 32-byte sectors of global memory that the launch touched. Of traffic: `sectors`
    of each request, `wavefronts` of shared memory, and how many they would be were the lanes' bytes side by side.
    `tensors`: those it was given, by the names of the parameters.
    """

    program: decoder.Program
    executed: np.ndarray
    memory: np.ndarray
    read: int
    written: int
    tensors: dict[str, torch.Tensor]

    def instructions(self) -> collections.Counter:
        """Warp instructions by class: the opcode, with the space for accesses."""
        found: collections.Counter = collections.Counter()
        for origin, count in zip(self.program.origin, self.executed.tolist(), strict=True):
            found[_class(origin.opcode)] += count
        return found

    def traffic(
        self, by: Callable[[parser.Instruction], str] = lambda i: _class(i.opcode)
    ) -> dict[str, dict[str, int]]:
        """What TRAFFIC names, by class of instruction; by=lambda i: i.line[0] for source lines."""
        found: dict[str, dict[str, int]] = {}
        for n in np.flatnonzero(self.memory["requests"]):
            row = found.setdefault(by(self.program.origin[n]), dict.fromkeys(TRAFFIC, 0))
            for name in TRAFFIC:
                row[name] += int(self.memory[name][n])
        return found


def _class(opcode: str) -> str:
    parts = opcode.split(".")
    space = next((p.split("::")[0] for p in parts[1:] if p.split("::")[0] in ("global", "shared", "param")), None)
    if parts[0] in ("ld", "st", "atom", "red") and space:
        return f"{parts[0]}.{space}"
    if parts[0] == "cp":
        return ".".join(parts[: 3 if "bulk" in parts else 2])
    return parts[0]


@dataclasses.dataclass(frozen=True)
class Struct:
    """A parameter passed by value: a struct.pack format and its fields, where a tensor stands for its address."""

    format: str
    fields: tuple


@dataclasses.dataclass(frozen=True)
class Box:
    """A TMA descriptor: a tensor, the box of a copy and the swizzle (0 to 3 for none, 32, 64, 128 bytes)."""

    tensor: torch.Tensor
    box: tuple[int, ...]
    swizzle: int = 0


def unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that counts as never written: every bit is one, which no arithmetic gives."""
    return unwrite(torch.empty(shape, dtype=dtype))


def unwrite(tensor: torch.Tensor) -> torch.Tensor:
    """Every bit of its storage set, where its elements are floats."""
    if tensor.is_floating_point() and tensor.device.type == "cpu" and tensor.numel():
        storage = tensor.untyped_storage()
        ctypes.memset(storage.data_ptr(), 0xFF, storage.nbytes())
    return tensor


class Memory:
    """The windows of a launch's arguments."""

    def __init__(self) -> None:
        self.buffers: list[_Buffer] = []
        self.names: list[str] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.alive: list[object] = []

    def address(self, tensor: torch.Tensor, name: str) -> int:
        """Of a tensor's first element. Of a tensor on the meta device: zeros, mapped when touched."""
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        extent = last + 1 if tensor.numel() else 0
        size, offset = tensor.element_size(), tensor.storage_offset() * tensor.element_size()
        low = (len(self.buffers) + 1 << WINDOW) + MIDDLE + offset
        holes = None
        if tensor.device.type == "meta":
            host = _reserve(extent * size, self.alive)
        elif tensor.device.type == "cpu":
            host = tensor.data_ptr()
            if extent > tensor.numel() > 0:
                holes = torch.zeros(extent, dtype=torch.uint8)
                holes.as_strided(tensor.shape, tensor.stride()).fill_(1)
        else:
            raise ValueError(f"{name} is on {tensor.device}; the executor takes tensors of the CPU and the meta device")
        self.alive.append(holes)
        self.tensors[name] = tensor
        poisoned = tensor.is_floating_point() and size in (2, 4, 8) and tensor.device.type == "cpu"
        mask = None if holes is None else holes.data_ptr()
        self.buffers.append(_Buffer(low, low + extent * size, host, mask, size, poisoned))
        shape = "x".join(map(str, tensor.shape))
        self.names.append(f"{name} ({str(tensor.dtype).removeprefix('torch.')} [{shape}])")
        return low


def _reserve(size: int, alive: list) -> int:
    """Zeros of which only what is touched takes memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    region = mmap.mmap(-1, max(size, 1), flags=flags)
    alive.append(region)
    return ctypes.addressof(ctypes.c_char.from_buffer(region))


@functools.lru_cache(maxsize=512)
def load(text: str, name: str | None = None) -> tuple[parser.Kernel, decoder.Program]:
    """A kernel of a PTX module, parsed and decoded."""
    kernel = parser.parse(text, name)
    return kernel, decoder.decode(kernel)


def run(
    text: str,
    grid: Sequence[int],
    arguments: Sequence,
    *,
    name: str | None = None,
    names: Sequence[str] = (),
    block: Sequence[int] | None = None,
    shared: int = 0,
    programs: Iterable[int] | None = None,
    checks: Iterable[str] = tuple(CHECKS),
    schedule: int = 0,
    budget: int = 20_000_000,
) -> Counters:
    """Execute PTX; arguments follow the kernel's parameters: tensors, numbers, None, Struct, Box or a
    tuple of boxes; what is left is zero.

    shared: bytes of dynamic shared memory. programs: which of the grid, by their number (x fastest); all if None.
    schedule: the seed of the order of warps and of when asynchronous copies land; with 0 programs run in the order
    given, with 1 in the opposite one, else in one drawn from it. budget: warp instructions that a program may execute.
    Bounds are always checked; `checks` names the rest.
    """
    kernel, program = load(text, name)
    grid = tuple(grid) + (1,) * (3 - len(grid))
    block = tuple(block or kernel.threads or ())
    block += (1,) * (3 - len(block))
    _fits(kernel, grid, block, program.shared_bytes + shared)
    if unknown := set(checks) - set(CHECKS):
        raise ValueError(f"checks names {sorted(unknown)}; there are {', '.join(CHECKS)}")
    memory = Memory()
    parameters, maps = _lay_out(kernel, arguments, names, memory)
    total = math.prod(grid)
    chosen = np.arange(total) if programs is None else np.array([p % total for p in programs], np.int64)
    if schedule:
        chosen = chosen[::-1].copy() if schedule == 1 else np.random.default_rng(schedule).permutation(chosen)
    executed = np.zeros(len(program.records), np.uint64)
    traffic = np.zeros(len(program.records), MEMORY)
    buffers = (_Buffer * max(1, len(memory.buffers)))(*memory.buffers)
    tensor_maps = (_TensorMap * max(1, len(maps)))(*maps)
    launch = _Launch(
        code=program.records.ctypes.data, code_size=len(program.records), operands=program.operands.ctypes.data,
        registers=program.registers.ctypes.data, register_bytes=len(program.registers),
        parameters=parameters.ctypes.data, parameter_bytes=len(parameters), buffers=ctypes.addressof(buffers),
        buffer_count=len(memory.buffers), maps=ctypes.addressof(tensor_maps), map_count=len(maps),
        block=(ctypes.c_int64 * 3)(*block), grid=(ctypes.c_int64 * 3)(*grid),
        shared_bytes=program.shared_bytes + shared, ctas=chosen.ctypes.data, cta_count=len(chosen), seed=schedule,
        checks=sum(CHECKS[c] for c in checks), budget=budget, held=kernel.held,
        executed=executed.ctypes.data, memory=traffic.ctypes.data,
    )  # fmt: skip
    if build.core().ptx_launch(ctypes.byref(launch)):
        raise _fault(kernel, program, launch.failure, memory)
    return Counters(program, executed, traffic, *launch.unique_sectors, memory.tensors)


def run_again(text: str, grid: Sequence[int], arguments: Sequence, again: int, **options) -> Counters:
    """`run`, and once more from the same memory under the schedule `again`: a Fault where a bit comes out otherwise.

    Not compared: what lies on the meta device, which begins as zeros in every run.
    """
    tensors = {t.untyped_storage().data_ptr(): t for t in _tensors(arguments) if t.device.type == "cpu" and t.numel()}
    memory = {at: torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for at, t in tensors.items()}
    before = {at: m.clone() for at, m in memory.items()}
    counters = run(text, grid, arguments, **options)
    first = {at: m.clone() for at, m in memory.items()}
    for at, m in memory.items():
        m.copy_(before[at])
    run(text, grid, arguments, **options | {"schedule": again})
    for at, m in memory.items():
        if differ := (m != first[at]).nonzero().flatten().tolist():
            name = next(n for n, t in counters.tensors.items() if t.untyped_storage().data_ptr() == at)
            kernel, element = load(text, options.get("name"))[0].name, differ[0] // tensors[at].element_size()
            schedules = f"schedules {options.get('schedule', 0)} and {again}"
            left = f"leave {len(differ)} bytes of {name} different, the first in element {element} of its storage"
            raise Fault("order", "", f"{kernel}: order: {schedules} {left}")
    return counters


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Box):
            yield value.tensor
        elif isinstance(value, tuple):
            yield from _tensors(value)
        elif isinstance(value, Struct):
            yield from _tensors(value.fields)


def _fits(kernel: parser.Kernel, grid: tuple, block: tuple, shared: int) -> None:
    limit = SHARED_LIMIT.get(kernel.sm)
    if limit is None:
        known = ", ".join(f"sm_{sm}" for sm in SHARED_LIMIT)
        raise parser.Unsupported(f"{kernel.name} is for sm_{kernel.sm}; {known} are modelled")
    if len(grid) != 3 or not all(1 <= n <= m for n, m in zip(grid, (2**31 - 1, 65535, 65535), strict=True)):
        raise ValueError(f"the grid of {kernel.name} is {grid}; a GPU takes 1 to 2147483647, 65535 and 65535")
    if not 1 <= math.prod(block) <= 1024:
        raise ValueError(f"a block of {kernel.name} has {block} threads; a GPU takes 1 to 1024 altogether")
    if kernel.threads and math.prod(block) > math.prod(kernel.threads):
        raise ValueError(f"{kernel.name} was compiled for blocks of {kernel.threads} threads; the launch has {block}")
    if shared > limit:
        raise ValueError(f"{kernel.name} takes {shared} bytes of shared memory; a block on sm_{kernel.sm} has {limit}")


def _lay_out(kernel: parser.Kernel, arguments: Sequence, names: Sequence[str], memory: Memory):
    """The parameters' bytes, and the tensor maps among them."""
    if len(arguments) > len(kernel.parameters):
        count = len(kernel.parameters)
        raise ValueError(f"{kernel.name} has {count} parameters; {len(arguments)} arguments were given")
    data, maps = np.zeros(kernel.parameter_bytes + 16, np.uint8), []
    for n, (parameter, value) in enumerate(zip(kernel.parameters, arguments, strict=False)):
        label = names[n] if n < len(names) else f"argument {n}"
        packed = _pack(parameter, value, label, memory, maps)
        if len(packed) != parameter.size:
            raise ValueError(f"{label} of {kernel.name} has {parameter.size} bytes; {value!r} has {len(packed)}")
        data[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(packed, np.uint8)
    return data, maps


def _pack(parameter: parser.Parameter, value: object, label: str, memory: Memory, maps: list) -> bytes:
    if value is None:
        return bytes(parameter.size)
    if isinstance(value, torch.Tensor):
        return struct.pack("<Q", memory.address(value, label))
    if isinstance(value, Struct):
        fields = list(value.fields)
        for n, field in enumerate(fields):
            if isinstance(field, torch.Tensor):
                fields[n] = memory.address(field, f"{label}, field {n}")
        return struct.pack(value.format, *fields)
    if isinstance(value, Box):
        maps.append(_tensor_map(decoder.PARAMETERS + parameter.offset, value, label, memory))
        return bytes(128)
    if isinstance(value, tuple):  # of boxes, in an array that may have room for more
        for n, box in enumerate(value):
            address = decoder.PARAMETERS + parameter.offset + 128 * n
            maps.append(_tensor_map(address, box, f"{label}[{n}]", memory))
        return bytes(parameter.size)
    if isinstance(value, float):
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[parameter.size], value)
    if isinstance(value, int):
        if not -(1 << 8 * parameter.size - 1) <= value < 1 << 8 * parameter.size:
            raise ValueError(f"{label} is {value}, which {parameter.size} bytes do not hold")
        return int(value).to_bytes(parameter.size, "little", signed=value < 0)
    raise TypeError(f"{label} is {value!r}; tensors, numbers, None, Struct and Box are taken")


def _tensor_map(address: int, value: Box, label: str, memory: Memory) -> _TensorMap:
    tensor, size = value.tensor, value.tensor.element_size()
    base = memory.address(tensor, label)
    strides = [s * size for s in tensor.stride()][::-1]
    wrong = [s for s in strides[1:] if s % 16 or s >= 1 << 40]
    if base % 16 or wrong or strides[0] != size or not 1 <= tensor.dim() <= 5 or max(value.box) > 256:
        raise ValueError(
            f"{label} fits no TMA descriptor: address and strides must be multiples of 16 bytes, the last dimension "
            f"dense, 1 to 5 dimensions, a box of at most 256; got shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}, box {value.box}"
        )
    row = value.box[-1] * size
    if row % 16 or value.swizzle and row != 16 << value.swizzle:
        raise ValueError(
            f"{label}: a row of the box has {row} bytes; swizzle {value.swizzle} takes {16 << value.swizzle}"
        )
    sizes = [(ctypes.c_int64 * 5)(*xs, *[1] * (5 - len(xs))) for xs in (tensor.shape[::-1], strides, value.box[::-1])]
    return _TensorMap(address, base, tensor.dim(), size, value.swizzle, *sizes)


def _fault(kernel: parser.Kernel, program: decoder.Program, failure: _Failure, memory: Memory) -> Fault:
    kind, message = KINDS[failure.kind], failure.message.decode()
    for n, name in enumerate(memory.names):
        message = message.replace(f"buffer {n},", f"{name},")
    cta = tuple(failure.cta)
    if failure.warp < 0:
        line, text, thread = "", f"{message}:\n{_standing(program, failure)}", None
    else:
        origin = program.origin[failure.pc]
        thread, line = failure.warp * 32 + failure.lane, origin.line[0]
        place = " called from ".join(origin.line)
        text = f"{place}: {message} (thread {thread}, warp {failure.warp}, program {cta}): {origin.text}"
        if kind == "endless":
            text += f"\n{_standing(program, failure)}"
    return Fault(kind, line, f"{kernel.name}: {kind}: {text}", cta, thread)


def _standing(program: decoder.Program, failure: _Failure) -> str:
    """Where each warp stands."""
    places: dict[str, list[int]] = {}
    for warp, pc in enumerate(failure.where[: failure.warps]):
        origin = program.origin[pc] if pc >= 0 else None
        # A warp that waits has gone past its barrier, but not past its setmaxnreg.
        waits = origin and pc and not origin.opcode.startswith("setmaxnreg")
        if waits and program.origin[pc - 1].opcode.startswith(("bar", "mbarrier")):
            origin = program.origin[pc - 1]
        places.setdefault(f"{' called from '.join(origin.line)}: {origin.text}" if origin else "left", []).append(warp)
    return "\n".join(f"  warps {', '.join(map(str, warps))}: {place}" for place, warps in places.items())
