"""What a benchmark is, and how one turns into rows: correctness first, then time.

`bench_<family>.py` lists its ops as `Benchmark`s in `BENCHMARKS`; `discover` finds them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sora_kernels
from sora_kernels import _dispatch, _library, testing

from . import peers, timing
from .shapes import Shape

Inputs = dict[str, Any]
IMPLS = ("cpu", "triton", "cudnn", "sdpa", "cuda", "reference")
MODES = ("fwd", "bwd")
COLD_BYTES = 1 << 20
PEER_SLACK = 10  # another library may round more often than our rule allows; beyond this it computes something else


@dataclass(frozen=True)
class Benchmark:
    """One public operation.

    inputs          (shape, dtype, draw) -> the keyword arguments; `draw(*size, dtype=)` is a random tensor
    reference       the specification: run in fp64 it is the oracle
    eager           the lines a model has without us, in its dtype: baseline of time and yardstick of error
    differentiable  the inputs whose gradients are checked and timed, where the shape has them; of none, forward only
    backward_reads, backward_writes
                    the inputs of which a backward must read the value, and write the gradient, at the least;
                    the incoming gradients are counted by themselves
    read_twice      (inputs, mode) -> the inputs, or "dout", of which a sum is needed before they are used: a second
                    reading counts, since nothing as large as they are can be kept meanwhile
    flops           (shape, mode) -> floating-point operations
    outputs         how many tensors its `out=` takes; with any, "cpu+out" is the forward into buffers that are reused
    variant         one of several uses of the operation, measured under the name "op:variant"
    checked         shape -> the smaller one to check at, where the oracle of the measured one would take too long
    unchecked       peers that compute something else, which the operation replaces
    terms           inputs -> how many values are summed into each element of the output, where it is such a sum
    dims            shape -> what the record says the shape was, where that is not the transformer's own
    """

    op: str
    inputs: Callable[[Shape, torch.dtype, Callable[..., Tensor]], Inputs]
    reference: Callable[..., Any]
    eager: Callable[..., Any]
    differentiable: tuple[str, ...]
    backward_reads: tuple[str, ...]
    backward_writes: tuple[str, ...]
    flops: Callable[[Shape, str], int]
    peers: Mapping[str, Callable[[Inputs, str], Callable[..., Any]]] = field(default_factory=dict)
    terms: Callable[[Inputs], int] = lambda inputs: 1
    dims: Callable[[Shape], dict[str, object]] = Shape.describe
    read_twice: Callable[[Inputs, str], tuple[str, ...]] = lambda inputs, mode: ()
    outputs: int = 0
    variant: str = ""
    checked: Callable[[Shape], Shape] = lambda shape: shape
    unchecked: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}:{self.variant}" if self.variant else self.op

    @property
    def names(self) -> tuple[str, ...]:
        into = (with_out(impl) for impl in IMPLS if self.outputs)
        return (*IMPLS, *into, *map(call_of, IMPLS), "eager", "compile", *self.peers)

    def has(self, name: str, mode: str) -> bool:
        """Whether the candidate has something to time in that mode."""
        return mode == "fwd" or (name in (impl_of(name), call_of(impl_of(name))) and bool(self.differentiable))


def with_out(impl: str) -> str:
    """The forward into buffers that are used again."""
    return f"{impl}+out"


def call_of(impl: str) -> str:
    """The call alone: all that Python, and in a backward autograd, does around an op that does nothing."""
    return f"{impl}+call"


def is_call(name: str) -> bool:
    return name == call_of(impl_of(name))


def impl_of(name: str) -> str:
    return name.partition("+")[0]


class DeviceLost(RuntimeError):
    """A candidate left the device in an error state: nothing that follows in this process can be trusted."""


@dataclass(frozen=True)
class Result:
    """One candidate in one mode. `stats` is None unless status is "ok"; `reason` says why."""

    impl: str
    mode: str
    status: str  # ok | failed (wrong or crashed) | unavailable
    reason: str | None = None
    stats: timing.Stats | None = None
    bytes: int | None = None
    flops: int | None = None
    max_error: float | None = None
    error_bound: float | None = None
    error_in: str | None = None
    peak_memory: int | None = None
    copy: float | None = None  # bytes/s of a plain copy, where it took turns with the candidates


def discover() -> dict[str, Benchmark]:
    """Every benchmark of every `bench_<family>.py`, by name."""
    package = importlib.import_module(__package__)
    found: dict[str, Benchmark] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("bench_")):
        for benchmark in importlib.import_module(f".{module}", __package__).BENCHMARKS:
            found[benchmark.name] = benchmark
    return found


def family(benchmark: Benchmark) -> str:
    """`modulation` for an op whose public function lives in `sora_kernels.modulation`."""
    return getattr(sora_kernels, benchmark.op).__module__.split(".")[1]


def our_impls(op: str, device: torch.device) -> tuple[str, ...]:
    """The implementations to measure when none is named: those that run here, else the reference.

    Triton on a CPU is the interpreter, whose time means nothing.
    """
    native = [i for i in IMPLS[:-1] if i not in _dispatch.WITH_TRITON or device.type == "cuda"]
    able = [i for i in native if _dispatch.why_not(op, i, device.type) is None]
    return tuple(able) or ("reference",)


def make_inputs(benchmark: Benchmark, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    return benchmark.inputs(shape, dtype, draw)


def measure(
    benchmark: Benchmark,
    shape: Shape,
    candidates: tuple[str, ...],
    *,
    modes: tuple[str, ...] = MODES,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    budget_s: float = 2.0,
    graph: bool = False,
    seed: int = 0,
) -> Iterator[Result]:
    """Check every candidate against the fp64 oracle, then time those that passed, in turns, mode by mode."""
    device = torch.device(device)
    prepared = Prepared(benchmark, shape, dtype, device, seed, with_grads="bwd" in modes)
    case = prepared.case
    beside, moved = {}, 0
    # A CPU is seldom idle: its copy bandwidth is taken in the same rounds. Not beside small things, which are not bound
    # by memory and would find the caches cold.
    if device.type == "cpu" and case.bytes("fwd") > COLD_BYTES:
        beside["copy"], moved = timing.copying(device)
    for mode in modes:
        results: dict[str, Result] = {}
        calls: dict[str, Callable[[], object]] = {}
        recording = partial(torch.set_grad_enabled, mode == "bwd")  # around the calls, of which it would be a part
        for name in candidates:
            if not benchmark.has(name, mode):
                continue
            try:
                calls[name], verdict = prepared.candidate(name, mode)
                with recording():
                    peak = timing.peak_memory(calls[name], device)
                    if graph and mode == "fwd":
                        calls[name] = timing.captured(calls[name])
                results[name] = Result(name, mode, "ok", peak_memory=peak, **verdict)
            except Wrong as error:
                results[name] = Result(name, mode, "failed", str(error), **error.verdict)
            except (peers.Missing, _dispatch.Unavailable) as error:
                results[name] = Result(name, mode, "unavailable", prepared.why_not(name, mode, error))
            except Exception as error:  # one candidate's crash must not take the others' figures
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                calls.pop(name, None)
                results[name] = Result(name, mode, "failed", reason)
                if not _alive(device):
                    yield results[name]
                    raise DeviceLost(f"{benchmark.op} {name} {mode} at {shape.id}: {reason}") from error
        with recording():
            times = timing.interleaved(calls | beside, budget_s, device=device)
        copy = moved / times["copy"].p50 if beside and times else None
        for name, result in results.items():
            if name in times:
                least, flops = (0, 0) if is_call(name) else (case.bytes(mode), benchmark.flops(shape, mode))
                work = dict(bytes=least, flops=flops, copy=copy)
                result = Result(**(vars(result) | dict(stats=times[name]) | work))
            yield result


class Wrong(Exception):
    """A candidate computes something else: further from fp64 than its bound. `verdict`: of `Result`, by name."""

    def __init__(self, worst: float, bound: float, where: str) -> None:
        super().__init__(f"wrong: error {worst:.3g} in {where} exceeds its bound {bound:.3g}")
        self.verdict = dict(max_error=worst, error_bound=bound, error_in=where)


class Prepared:
    """A benchmark at a shape: the inputs to time on, and those, perhaps smaller, on which candidates are judged."""

    def __init__(
        self, benchmark: Benchmark, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0, *,
        with_grads: bool = True,
    ) -> None:  # fmt: skip
        self.benchmark, self.dtype, self.device = benchmark, dtype, device
        self.case = self.judge = _Case(benchmark, make_inputs(benchmark, shape, dtype, device, seed))
        if (smaller := benchmark.checked(shape)) != shape:
            self.judge = _Case(benchmark, make_inputs(benchmark, smaller, dtype, device, seed))
        self.judge.consult_oracle(with_grads)

    def candidate(self, name: str, mode: str) -> tuple[Callable[[], object], dict[str, Any]]:
        """(the call to time, its verdict), once it was found right. Raises `Wrong`, `peers.Missing`, `Unavailable`, or
        whatever the candidate does."""
        fn, verdict = _load(self.benchmark, name, self.case.inputs, mode), {}
        if name not in self.benchmark.unchecked and not is_call(name):
            judged = fn if self.judge is self.case else _load(self.benchmark, name, self.judge.inputs, mode)
            worst, bound, where = self.judge.check(judged, mode)
            verdict = dict(max_error=worst, error_bound=bound, error_in=where)
            if not worst <= bound * (1 if impl_of(name) in IMPLS else PEER_SLACK):
                raise Wrong(worst, bound, where)
        call = self.case.call(fn, mode)
        return _around_nothing(call) if is_call(name) else call, verdict

    def why_not(self, name: str, mode: str, error: Exception) -> str:
        """In a line, why a candidate is missing or unavailable."""
        if isinstance(error, peers.Missing):
            return str(error)
        why = _dispatch.why_not(self.benchmark.op, name, self.device.type, self.dtype, mode == "bwd")
        return why or str(error).splitlines()[0]


def _load(benchmark: Benchmark, name: str, inputs: Inputs, mode: str) -> Callable[..., Any]:
    impl = impl_of(name)
    if impl in IMPLS:
        function, extra = getattr(sora_kernels, benchmark.op), {"impl": impl}
        if name == with_out(impl):
            like = inputs[benchmark.differentiable[0]]
            buffers = tuple(torch.full_like(like, float("nan")) for _ in range(benchmark.outputs))
            extra["out"] = buffers if benchmark.outputs > 1 else buffers[0]
        return lambda **kwargs: function(**kwargs, **extra)
    if name == "eager":
        return benchmark.eager
    if name == "compile":
        return peers.compiled(benchmark.eager)
    return benchmark.peers[name](inputs, mode)


def _around_nothing(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` while every op it calls does nothing."""

    def call(**kwargs):
        ops, _library.call = _library.call, lambda op, impl: lambda *args: None
        try:
            return function(**kwargs)
        finally:
            _library.call = ops

    return call


def _alive(device: torch.device) -> bool:
    """Whether the device still answers: an illegal access is reported again by every later call."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True


def tensors_of(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class _Case:
    """Inputs of one op at one shape; where it judges, their outputs and gradients in fp64 and the error allowed."""

    def __init__(self, benchmark: Benchmark, inputs: Inputs):
        self.benchmark, self.inputs = benchmark, inputs
        self.leaves = tuple(n for n in benchmark.differentiable if isinstance(inputs.get(n), Tensor))
        with torch.no_grad():
            outputs = _as_tuple(benchmark.eager(**inputs))
        self.grad_outputs = tuple(_gradient_of(out) for out in outputs)

    def consult_oracle(self, with_grads: bool) -> None:
        benchmark = self.benchmark
        exact = {n: v.double() if _is_real(v) else v for n, v in self.inputs.items()}
        self.oracle, self.bound = {}, {}
        for mode in MODES if with_grads and benchmark.differentiable else MODES[:1]:
            self.oracle[mode] = self.run(benchmark.reference, mode, exact)
            plain = self.run(benchmark.eager, mode)
            largest = max(out.numel() for out in self.grad_outputs)  # a smaller gradient is a sum over tokens
            terms = benchmark.terms(self.inputs)
            self.bound[mode] = {
                n: testing.error_bound(o, plain[n], terms=max(terms, largest // max(1, o.numel())))
                if o.is_floating_point()
                else 1.0  # of integers, which fp64 may round the other way
                for n, o in self.oracle[mode].items()
            }

    def bytes(self, mode: str) -> int:
        """The fewest bytes the op can move: each tensor it needs once, or twice where the benchmark says so."""
        tensors, spec = tensors_of(self.inputs), self.benchmark
        pairs = [t for pair in self.inputs.values() if isinstance(pair, tuple) for t in pair if isinstance(t, Tensor)]
        again = spec.read_twice(self.inputs, mode)
        twice = nbytes(
            *pairs, *(tensors[n] for n in again if n != "dout"), *(self.grad_outputs if "dout" in again else ())
        )
        if mode == "fwd":
            return twice + nbytes(*tensors.values(), *self.grad_outputs)  # an incoming gradient: as large as its output
        named = [tensors[n] for n in (*spec.backward_reads, *spec.backward_writes) if n in tensors]
        return twice + nbytes(*named, *self.grad_outputs)

    def run(self, fn: Callable[..., Any], mode: str, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Outputs by number (fwd) or gradients by input (bwd)."""
        inputs = self.inputs if inputs is None else inputs
        if mode == "fwd":
            with torch.no_grad():
                return {f"output {i}": out for i, out in enumerate(_as_tuple(fn(**inputs)))}
        leaves, outputs = self._graph(fn, inputs)
        return {f"grad of {n}": g for n, g in zip(self.leaves, self._backward(outputs, leaves), strict=True)}

    def call(self, fn: Callable[..., Any], mode: str) -> Callable[[], object]:
        """The call that is timed: the forward alone, or the backward alone over one recorded graph."""
        if mode == "fwd":
            return lambda: fn(**self.inputs)
        leaves, outputs = self._graph(fn, self.inputs)
        return lambda: self._backward(outputs, leaves)

    def _graph(self, fn: Callable[..., Any], inputs: Inputs) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        leaves = {n: inputs[n].detach().requires_grad_() for n in self.leaves}
        with torch.enable_grad():
            return list(leaves.values()), _as_tuple(fn(**(inputs | leaves)))

    def _backward(self, outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
        grads = [g.to(out.dtype) for g, out in zip(self.grad_outputs, outputs, strict=True)]
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    def check(self, fn: Callable[..., Any], mode: str) -> tuple[float, float, str]:
        """(error, bound, where) of the tensor that comes closest to its bound, or furthest beyond it."""
        with testing.poison_empty():
            actual = self.run(fn, mode)
        judged = []
        for name, value in actual.items():
            oracle, bound = self.oracle[mode][name], self.bound[mode][name]
            if value.shape != oracle.shape:
                raise ValueError(f"{name} has shape {list(value.shape)}, expected {list(oracle.shape)}")
            judged.append((testing.max_error(value, oracle), bound, name))
        return max(judged, key=lambda j: j[0] / max(j[1], 1e-300))


def _gradient_of(out: Tensor) -> Tensor:
    """Dense, whatever view eager returned: so is what later operations send back. A video keeps its format.
    Integers have no gradient: the output itself, for its size."""
    if not out.is_floating_point():
        return out
    kept = out.ndim == 5 and out.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.randn_like(out, memory_format=torch.preserve_format if kept else torch.contiguous_format)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
