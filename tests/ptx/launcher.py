"""Triton launches on the executor: what the JIT would compile for a GPU is compiled, and its PTX executed.

Needs a process whose triton was imported without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import functools
import unittest.mock
from collections.abc import Callable, Iterator

import torch
import triton
from compile_kernels import specialise
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from sora_kernels import _dispatch, _gpu
from sora_kernels.attention import config as attention_config
from sora_kernels.causal_conv import config as causal_conv_config

from . import device
from .device import Box, Counters

_compiled: dict[str, CompiledKernel] = {}


def compiled(kernel: JITFunction, sm: int, args: tuple, kwargs: dict) -> CompiledKernel:
    """What the JIT would compile for this launch on sm_N; once in a process, and on disk in Triton's own cache."""
    source, options = specialise(kernel, args, dict(kwargs))
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    for (index,) in list(source.attrs):
        value = values[kernel.params[index].name]
        if isinstance(value, torch.Tensor) and value.storage_offset() * value.element_size() % 16:
            del source.attrs[(index,)]
    key = repr((kernel.cache_key, source.signature, source.constants, source.attrs, options, sm))
    if key not in _compiled:
        with knobs.runtime.scope():
            knobs.runtime.add_stages_inspection_hook = _without_ptxas
            _compiled[key] = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    return _compiled[key]


def _without_ptxas(*stages) -> tuple[str, str] | None:
    """Triton's hook: without arguments it names this way of compiling for the cache, else it may change the stages."""
    if not stages:
        return "ptx", "ptx"
    stages[1]["cubin"] = lambda ptx, metadata: b""


def arguments(found: CompiledKernel, values: dict) -> tuple[list, list[str]]:
    """The values in the order of the kernel's PTX parameters, and their names."""
    listed, names = [], []
    descriptors = iter(found.metadata.tensordesc_meta or ())
    for name, kind in found.src.signature.items():
        if kind == "constexpr":
            continue
        value = values[name]
        if isinstance(value, TensorDescriptor):
            view = value.base.as_strided(value.shape, value.strides)
            sizes = [int(n) for n in (*value.shape, *value.strides)]
            if meta := next(descriptors, None):
                value = [Box(view, tuple(meta["block_size"]), meta["swizzle"]), *sizes]
            else:  # without TMA: addresses, and flags for NaN as padding and for rounding to TF32
                value = [view, *sizes, False, False, *sizes]
        else:
            value = [float(value) if kind.startswith("fp") else value]
        listed += value
        names += [name] * len(value)
    return listed, names


Rewrite = Callable[[str, str], str]


def launch(
    kernel: JITFunction,
    sm: int,
    grid: tuple | Callable,
    args: tuple,
    kwargs: dict,
    rewrite: Rewrite | None = None,
    again: int | None = None,
    **options,
) -> Counters:
    """`kernel[grid](*args, **kwargs)` as sm_N would run it. options: of device.run.

    rewrite(name, ptx) gives the PTX to execute in place of what was compiled. again: the schedule of a second run,
    which must leave the same bits.
    """
    values = {p.name: p.default for p in kernel.params if p.has_default}
    values |= dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    grid = grid(values) if callable(grid) else grid
    found = compiled(kernel, sm, args, kwargs)
    listed, names = arguments(found, values)
    text = found.asm["ptx"]
    if rewrite:
        text = rewrite(found.metadata.name, text)
    options |= dict(name=found.metadata.name, names=names, shared=found.metadata.shared)
    if again is None:
        return device.run(text, grid, listed, **options)
    return device.run_again(text, grid, listed, again, **options)


Observer = Callable[[JITFunction, Counters], None]


@contextlib.contextmanager
def triton_on(sm: int, observe: Observer | None = None, **options) -> Iterator[None]:
    """Within it `impl="triton"` and "cudnn" take CPU tensors, and every launch is executed as sm_N would.

    observe is called after each launch with the kernel and its counters. options: of launch and of device.run.
    """

    def run(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
        kwargs.pop("debug", None)
        counters = launch(self, sm, grid, args, kwargs, **options)
        if observe:
            observe(self, counters)

    def why_not(op: str, impl: str, device: str, dtype: torch.dtype, grad: bool) -> str | None:
        with unittest.mock.patch.object(_dispatch, "INTERPRET", True):  # which takes tensors of the CPU
            return original_why_not.__wrapped__(op, impl, device, dtype, grad)

    places = [
        (JITFunction, "run", run), (_dispatch, "_why_not", functools.cache(why_not)),
        *((module, "capability", lambda device: sm) for module in (_gpu, attention_config, causal_conv_config)),
    ]  # fmt: skip
    originals = [getattr(place, name) for place, name, _ in places]
    original_why_not = _dispatch._why_not
    for place, name, value in places:
        setattr(place, name, value)
    _dispatch._able.cache_clear()
    try:
        yield
    finally:
        for (place, name, _), value in zip(places, originals, strict=True):
            setattr(place, name, value)
        _dispatch._able.cache_clear()
