"""Argument checks shared by the families: one error that names the argument, what was expected, what came."""

from __future__ import annotations

import sys
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STRIDED = torch.strided
OWN = (Tensor, torch.nn.Parameter)  # types of which no tensor is distributed
_SDPA = torch._C._nn.scaled_dot_product_attention


def shape_of(t: Tensor) -> str:
    return str(list(t.shape))


def plain(t: Tensor) -> bool:
    """Whether t is a strided tensor of this process: not sparse, nested, in a format of oneDNN's or a DTensor."""
    return t.layout is STRIDED and not t.is_nested and not distributed(t)


def distributed(t: Tensor) -> bool:
    """Whether t is a DTensor; of one there is only where torch.distributed.tensor has been imported."""
    if type(t) in OWN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def format_of(t: Tensor) -> str:
    """What t is, and what to do where it is not plain."""
    if t.is_nested:
        return "a nested tensor"
    if not distributed(t):
        return f"{t.dtype}" if t.layout is STRIDED else f"{t.layout}; convert it with .to_dense()"
    return (
        f"a DTensor placed as {tuple(t.placements)}. Call the operation through torch.distributed.tensor.experimental."
        "local_map, or on .to_local(); the gradient of what is replicated beside a tensor that is sharded, as "
        "modulation rows, weights and tables are, is a sum over the ranks: its in_grad_placements there must be "
        "Partial(). Of a weight that fully_shard() has sharded: shard the module whose forward calls the operation"
    )


def tensor(op: str, name: str, t: Tensor, dims: str, *, ndim: int | None = None) -> None:
    """`t` is a floating-point tensor of the rank that `dims`, such as "[B, S, D]", says."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {dims}; got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64; got {t.dtype}")
    if not plain(t):
        raise TypeError(f"{op}: {name} must be a plain strided tensor {dims}; got {format_of(t)}")
    if ndim is not None and t.ndim != ndim:
        raise ValueError(f"{op}: {name} must be {dims}; got shape {shape_of(t)}")


def exact(op: str, name: str, t: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """`t` has exactly this shape; `meaning` says where the numbers come from."""
    try:
        if type(t) in OWN and t.layout is STRIDED and t.shape == shape and t.dtype in FLOATS:
            return
    except (AttributeError, RuntimeError):  # not a tensor; a nested one, which has no shape
        pass
    tensor(op, name, t, meaning)
    if t.shape != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {list(shape)} ({meaning}); got {shape_of(t)}")


def like(op: str, name: str, t: Tensor, x: Tensor, x_name: str = "x") -> None:
    """`t` has the shape, dtype and device of `x`."""
    try:
        same = type(t) in OWN and t.shape == x.shape and t.dtype == x.dtype and t.device == x.device
        if same and t.layout is STRIDED:
            return
    except (AttributeError, RuntimeError):  # as in `exact`
        pass
    tensor(op, name, t, f"of the shape of {x_name}")
    if t.shape != x.shape:
        exact(op, name, t, x.shape, f"the shape of {x_name}")
    if t.dtype != x.dtype:
        raise TypeError(f"{op}: {name} must have {x_name}'s dtype {x.dtype}; got {t.dtype}; cast it with .to()")
    same_device(op, x, {name: t}, x_name)


def destinations(op: str, outs: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...], over: int = 0) -> None:
    """The elements of `outs` lie apart from each other and from those of `inputs`; the first may be one of the first
    `over` inputs itself: another argument that is the same tensor would be read after it was written."""
    for out in outs:
        if out.is_neg():
            raise ValueError(f"{op}: out must hold what is written; got a view that negates; pass its base")
        if not out.is_contiguous():
            _apart(op, out)
        memory = out.untyped_storage()
        start = memory.data_ptr()
        stop = start + memory.nbytes()
        for i, t in enumerate(inputs):
            # a storage may begin within another, as those of two windows on one array do
            if t is None or (place := t.data_ptr()) >= stop or place + t.untyped_storage().nbytes() <= start:
                continue
            if not _share(out, t):
                continue
            same = place == out.data_ptr() and t.shape == out.shape and t.stride() == out.stride()
            if not (same and i < over):
                raise ValueError(
                    f"{op}: out must not share memory with an input or another result; got an overlap of "
                    f"{shape_of(out)} with {shape_of(t)}; pass a buffer of its own{' or x itself' if over else ''}"
                )
        inputs, over = (*inputs, out), 0


def _apart(op: str, out: Tensor) -> None:
    """Each axis steps over all that the finer ones reach."""
    reach = 1
    for stride, n in sorted([(s, n) for n, s in zip(out.shape, out.stride(), strict=True) if n > 1]):
        if stride < reach:
            raise ValueError(
                f"{op}: out must hold each element in memory of its own; got shape {shape_of(out)} with strides "
                f"{out.stride()}; pass a buffer that is not expanded"
            )
        reach += (n - 1) * stride


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have a byte in common: windows on one buffer can lie between each other's rows."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    steps = {1: (1 - b.itemsize, a.itemsize - 1)}  # bytes -> how often they can be stepped back and forth
    for t, sign in ((a, 1), (b, -1)):
        for n, stride in zip(t.shape, t.stride(), strict=True):
            low, high = steps.get(stride * t.itemsize, (0, 0))
            steps[stride * t.itemsize] = (low, high + n - 1) if sign > 0 else (low - n + 1, high)
    return _reaches(b.data_ptr() - a.data_ptr(), sorted([(s, *r) for s, r in steps.items() if s], reverse=True))


def _reaches(distance: int, steps: list[tuple[int, int, int]]) -> bool:
    """Whether `distance` is a sum of c · stride with low ≤ c ≤ high; steps are (stride, low, high), coarse to fine."""
    if not steps:
        return distance == 0
    (stride, low, high), *finer = steps
    least, most = (sum([s * bounds[end] for s, *bounds in finer]) for end in (0, 1))
    first, last = max(low, -((most - distance) // stride)), min(high, (distance - least) // stride)
    return any([_reaches(distance - c * stride, finer) for c in range(first, last + 1)])


def same_device(op: str, x: Tensor, others: dict[str, Tensor | None], x_name: str = "x") -> None:
    device = x.device
    for name, t in others.items():
        if t is not None and t.device != device:
            raise ValueError(f"{op}: {name} must be on {x_name}'s device {device}; got {t.device}; move it with .to()")


def device(op: str, value: object) -> torch.device:
    try:
        return torch.device(value)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{op}: device must be a torch.device or the name of one; got {value!r}") from error


def choice(op: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not isinstance(value, (str, bool, type(None))) or value not in allowed:  # an array has no truth
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def flag(op: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False; got {value!r}")
    return value


def number(op: str, name: str, value: object) -> float:
    """A real number, NumPy's as well, as a float."""
    if type(value) is float:
        return value
    if not isinstance(value, Real | torch.SymFloat | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number; got {type(value).__name__} {value!r}")
    return float(value)


def positive(op: str, name: str, value: object) -> float:
    value = number(op, name, value)
    if not value > 0:
        raise ValueError(f"{op}: {name} must be positive; got {value}")
    return value


def is_integer(value: object) -> bool:
    """Python's, NumPy's or, while a graph is traced, a symbol; True is none."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    return isinstance(value, Integral | torch.SymInt)


def integer(op: str, name: str, value: object, least: int = 0, most: int | None = None, meaning: str = "") -> int:
    """`meaning` says of `most` what it is, as in "S="."""
    if not is_integer(value) or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"between {least} and {meaning}{most}"
        raise ValueError(f"{op}: {name} must be an integer {limits}; got {value!r}")
    return value if isinstance(value, torch.SymInt) else int(value)


def per_axis(value: object) -> object:
    """An integer stands for three of it."""
    return (value,) * 3 if is_integer(value) else value


def triple(op: str, name: str, value: object, *, least: int = 1) -> tuple[int, int, int]:
    """Three integers of at least `least`, as given."""
    if type(value) is tuple and len(value) == 3:
        t, h, w = value
        if type(t) is int and type(h) is int and type(w) is int and t >= least and h >= least and w >= least:
            return value
    if not (isinstance(value, tuple | list) and len(value) == 3 and all([is_integer(v) for v in value])):
        raise ValueError(f"{op}: {name} must be three integers (t, h, w); got {value!r}")
    if min(value) < least:
        raise ValueError(f"{op}: every entry of {name} must be at least {least}; got {tuple(value)}")
    return tuple([v if isinstance(v, torch.SymInt) else int(v) for v in value])


def in_context_parallel() -> bool:
    """Whether torch's `context_parallel()` is on. It replaces F.scaled_dot_product_attention, as others do too."""
    if F.scaled_dot_product_attention is _SDPA:
        return False
    module = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    return F.scaled_dot_product_attention in getattr(module, "_replaced_functions", ())


def alone(op: str) -> None:
    """No `context_parallel()` of torch's is on: an attention it does not know would see one rank's tokens only."""
    if in_context_parallel():
        raise RuntimeError(
            f"{op}: called inside torch's context_parallel(), which distributes F.scaled_dot_product_attention only: "
            "each rank's tokens would see that rank's alone. Call F.scaled_dot_product_attention there, or, outside of "
            "it, join the ranks' parts with attention_forward and merge_attention"
        )
