"""The op namespace: schemas, fakes, implementations, and the compiled libraries behind them.

Every private op is *destination-passing*: it writes into the tensors it is given and returns nothing. One schema
serves all implementations of an op, its fake is a no-op by construction, optional gradients are optional
destinations, and `out=` costs nothing extra. `op.py` of each family allocates.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import pathlib
import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import _fallback
from ._autograd import transformed
from ._check import OWN

NAMESPACE = __package__.replace(".", "_")  # a copy under another name has operators of its own, beside these

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_impls: dict[str, tuple[str, ...]] = {}  # of an op, in the order "auto" prefers
_overloads: dict[str, dict[str, torch._ops.OpOverload]] = {}  # op -> impl, or impl_or_next (_fallback.py) -> overload
_exported: dict[str, dict[str, torch._ops.OpOverload]] = {}  # the same of a forward, as exported programs hold it
_PLAIN = {*OWN, type(None), bool, int, float, tuple, list, torch.Size}  # what no subclass of tensors is among
_direct: dict[tuple[str, str], Callable[..., None]] = {}  # (op, impl) -> what runs in Python on a CPU, see `_at_once`
_loading = threading.Lock()
_compiled: set[tuple[str, str]] = set()  # the (op, impl) that a compiled library provides
_launches: dict[tuple[str, str], torch._ops.OpOverload] = {}  # of those that Python prepares


def define(
    op: str, schema: str, *, reference: Callable[..., None], impls: Mapping[str, str | None] | None = None
) -> None:
    """Register `op` once per implementation as `{NAMESPACE}::_{op}_{impl}`.

    op         e.g. "norm_modulate_fwd"; the direction is part of the name, a backward is an op of its own.
    schema     "(Tensor x, ..., Tensor(a!) out) -> ()", shared by all implementations.
    reference  the implementation in plain torch; it takes the arguments of the schema.
    impls      further implementations in the order "auto" prefers them: name -> ".module:function" (imported at the
               first call) or None where the compiled library of that name registers it.
    """
    providers = {**(impls or {}), "reference": reference}
    _compiled.update((op, impl) for impl, provider in providers.items() if provider is None)
    _impls[op] = tuple(providers)
    _overloads[op] = {impl: _register(f"_{op}_{impl}", schema, provider) for impl, provider in providers.items()}
    if providers.get("cpu") is not None:
        _direct[op, "cpu"] = _at_once(_returns_nothing(providers["cpu"]), _overloads[op]["cpu"])
    for impl in _impls[op]:
        if impl not in ("cpu", "reference"):
            following = "triton" + _fallback.SUFFIX if impl != "triton" and "triton" in providers else "reference"
            name = impl + _fallback.SUFFIX
            _overloads[op][name] = _register(f"_{op}_{name}", schema, _fallback.or_next(op, impl, following, call))
    if op.endswith("_fwd"):
        _exported[op] = {name: _register_exported(op, name, schema) for name in _overloads[op]}


def define_launch(op: str, impl: str, schema: str) -> None:
    """`_{op}_{impl}_launch`, which the compiled library `impl` registers: what the Python provider of `op` launches."""
    name = f"_{op}_{impl}_launch"
    _library.define(name + schema)
    _compiled.add((op, impl))
    _launches[op, impl] = getattr(getattr(torch.ops, NAMESPACE), name).default


def launch(op: str, impl: str) -> torch._ops.OpOverload:
    return _launches[op, impl]


def _register(name: str, schema: str, provider: Callable[..., None] | str | None) -> torch._ops.OpOverload:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args, **kwargs: None, lib=_library)
    if provider is not None:
        kernel = _returns_nothing(provider)
        _library.impl(name, kernel, "CPU")
        _library.impl(name, _on_its_device(kernel), "CUDA")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _register_exported(op: str, name: str, schema: str) -> torch._ops.OpOverload:
    """What `torch.export` records of a forward: that alone, without the backward. It must not pass for a constant."""
    overload = _overloads[op][name]

    def refuse(*args) -> None:
        recorded = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if recorded and not torch.compiler.is_exporting():
            raise RuntimeError(
                f"{op.removesuffix('_fwd')}: a program made by torch.export holds no gradients of it; run the program "
                "under torch.no_grad(), or train the module that it was made from"
            )
        with torch._C._AutoDispatchBelowAutograd():
            overload(*args)

    exported = _register(f"_{op}_{name}_exported", schema, lambda *args: overload(*args))
    _library.impl(f"_{op}_{name}_exported", refuse, "Autograd")
    return exported


def _returns_nothing(provider: Callable[..., object] | str) -> Callable[..., None]:
    @functools.cache
    def function() -> Callable[..., object]:
        if callable(provider):
            return provider
        module, name = provider.split(":")
        return getattr(importlib.import_module(module, __package__), name)

    def kernel(*args) -> None:
        with torch._C._DisableAutocast():  # the dtypes are the op's own business: fp32 products stay fp32
            function()(*args)

    return kernel


def _at_once(kernel: Callable[..., None], overload: torch._ops.OpOverload) -> Callable[..., None]:
    """`kernel`, past the dispatcher where nobody listens there: on its way back to Python a call spends as long as on a
    small convolution."""

    def run(*args) -> None:
        (kernel if _PLAIN.issuperset(map(type, args)) and not _watched() else overload)(*args)

    return run


def _watched() -> bool:
    """Whether somebody may ask what ops run: a mode, a transform, a tracer or the profiler."""
    modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    traced = torch._C._get_tracing_state() is not None or torch._C._autograd._profiler_enabled()
    return bool(modes) or traced or transformed()


def _on_its_device(kernel: Callable[..., None]) -> Callable[..., None]:
    """`kernel` while the GPU of its tensors is current: Triton launches on the current one, wherever they lie."""

    def run(*args) -> None:
        device = next(a for a in args if isinstance(a, Tensor)).device
        if device.index == torch.cuda.current_device():
            return kernel(*args)
        with torch.cuda.device(device):
            kernel(*args)

    return run


def ops() -> dict[str, tuple[str, ...]]:
    """Every op with its implementations, in the order "auto" prefers them."""
    return dict(_impls)


def impls(op: str) -> tuple[str, ...]:
    return _impls.get(op, ())


def overloads(op: str) -> tuple[torch._ops.OpOverload, ...]:
    """All that runs `op`, with fallbacks and without, and in exported programs."""
    return *_overloads[op].values(), *_exported.get(op, {}).values()


def is_compiled(op: str, impl: str) -> bool:
    return (op, impl) in _compiled


def has_kernel(op: str, impl: str) -> bool:
    """Whether the compiled library `impl`, once loaded, has registered its kernel of `op`."""
    name = f"_{op}_{impl}" + ("_launch" if (op, impl) in _launches else "")
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", impl.upper())


def call(op: str, impl: str) -> Callable[..., None]:
    """What runs `op` with what `_dispatch.choose` gave."""
    if not torch.compiler.is_compiling() and (op, impl) in _direct:
        return _direct[op, impl]
    return overload(op, impl)


def overload(op: str, impl: str) -> torch._ops.OpOverload:
    """What the dispatcher and compiled graphs know `op` by."""
    return (_exported if torch.compiler.is_exporting() and op in _exported else _overloads)[op][impl]


def load_error(name: str) -> str | None:
    """Load the compiled library `name` at the first call; afterwards None, or why it could not be loaded."""
    with _loading:  # of two threads that call first, one would register every kernel a second time
        return _load_error(name)


@functools.cache
def _load_error(name: str) -> str | None:
    path = pathlib.Path(__file__).with_name(f"_{name}.so")
    if not path.exists():
        remedy = f"in a copy of the project, SORA_KERNELS_BUILD={name} pip install -e . builds it"
        return f"the compiled library {path.name} is not built; {remedy}"
    try:
        torch.ops.load_library(str(path))
        register = ctypes.CDLL(str(path)).sora_kernels_register
    except OSError as error:
        return f"{path.name} does not load: {error}"
    except AttributeError:
        return f"{path.name} is older than this code: build it again"
    register.restype = ctypes.c_char_p
    if error := register(NAMESPACE.encode()):
        return f"{path.name} does not register its kernels: {error.decode(errors='replace')}"
    return setting_error() if name == "cpu" else None


@functools.cache
def setting_error() -> str | None:
    """Why the CPU library cannot run with SORA_KERNELS_CPU_ISA as it is; None where it can, or is not there."""
    path = pathlib.Path(__file__).with_name("_cpu.so")
    if not os.environ.get("SORA_KERNELS_CPU_ISA") or not path.exists():
        return None
    try:
        why = ctypes.CDLL(str(path)).sora_kernels_cpu_error
    except (OSError, AttributeError):  # load_error has the first; a library older than this code the second
        return None
    why.restype = ctypes.c_char_p
    return why().decode(errors="replace") or None


@functools.cache
def triton_error() -> str | None:
    """None where triton imports, else why it does not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'triton>=3.6')"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation must not take the other implementations down
        return f"triton does not import: {type(error).__name__}: {error}"
    return None


def vjp(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor | None],
    grad_outputs: tuple[Tensor | None, ...],
    destinations: Mapping[str, Tensor | None],
) -> None:
    """Backward of a reference: differentiate `function(**inputs)` by autograd, write each gradient asked for.

    Leaves are taken in fp32 (fp64 for fp64 inputs), so a gradient is rounded once, on the way into its destination.
    """
    wanted = [name for name, destination in destinations.items() if destination is not None]
    if not wanted:
        return
    leaves = dict(inputs)
    with torch.enable_grad(), _autograd_keys():
        for name in wanted:
            leaf = inputs[name].detach()
            leaves[name] = leaf.to(torch.promote_types(leaf.dtype, torch.float32)).requires_grad_()
        outputs = function(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        grads = torch.autograd.grad(
            [o for o, _ in pairs],
            [leaves[name] for name in wanted],
            [g.to(o.dtype) for o, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    for name, grad in zip(wanted, grads, strict=True):
        destinations[name].copy_(grad)


@contextlib.contextmanager
def _autograd_keys():
    """Inside a dispatched kernel the autograd keys may be excluded; recording a graph there needs them back."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    excluded = torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded - keys):
        yield
