"""Is a patched model still the same? `verify_patch`: one call against fp64, and where a short sampling run ends."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..testing import error_bound, max_error
from .patch import Swap, check_in_place, host_of, record_of

STEPS = 8  # of the sampling run


@dataclasses.dataclass(frozen=True)
class Check:
    """One output tensor: the largest errors against an fp64 run of the host, patched and not, and the bound."""

    name: str
    error: float
    host_error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify_patch` found; `ok` where every output is within its bound, `str()` for reading.

    psnr  in dB, of the sample at the end of a short run, patched against unpatched: how far roundings carry. The peak
          is the range of the unpatched one's values; inf where they agree to the bit. None for a model that does not
          sample, or whose input is not of its output's kind. It has no part in `ok`
    """

    checks: tuple[Check, ...]
    psnr: float | None = None

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        lines = [
            f"{check.name}: max error {check.error:.3e}, the host's own {check.host_error:.3e}, "
            f"bound {check.bound:.3e}: {'within' if check.ok else 'EXCEEDED'}"
            for check in self.checks
        ]
        if self.psnr is not None:
            lines.append(f"after {STEPS} Euler steps from one seed: PSNR {self.psnr:.1f} dB, patched against unpatched")
        return "\n".join(lines)


def verify_patch(model: nn.Module, *inputs: Any, **kwargs: Any) -> Verification:
    """Run a patched model, itself unpatched, and an fp64 copy of that on the same inputs, and compare the outputs.

    inputs, kwargs   what the model is called with; none: small random ones, made from its config

    An output passes where its largest error against fp64 is at most twice the unpatched model's plus one rounding to
    the output's dtype (`sora_kernels.testing.error_bound`). A transformer also samples, patched and not: 8 Euler steps
    of its flow from the noise of one seed, with the same text; the PSNR between the two ends is reported.
    Runs in eval mode without gradients; then everything, the mode of each module included, is as before. Needs memory
    for the copy, 8 bytes a parameter, and the time of 18 calls and one in fp64.

    Raises ValueError for a model that is not patched, TypeError where the model's output holds no tensor.
    """
    _, swaps = record_of("verify_patch", model)
    check_in_place("verify_patch", swaps)
    host = host_of(model)
    if not inputs and not kwargs:
        inputs = host.example(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            ours = dict(_tensors(model(*inputs, **kwargs)))
            end = host.sample(model, STEPS, inputs, kwargs)
            with _undone(swaps):
                theirs = dict(_tensors(model(*inputs, **kwargs)))
                their_end = host.sample(model, STEPS, inputs, kwargs)
                oracle = copy.deepcopy(model).double()
            with _FloatMeansDouble():
                exact = dict(_tensors(oracle(*_double(inputs), **_double(kwargs))))
    finally:
        for module, mode in modes:
            module.training = mode
    if not ours:
        raise TypeError("verify_patch: the output of the model must hold floating-point tensors; none was found")
    checks = []
    for name, output in ours.items():
        bound = error_bound(exact[name], theirs[name])
        checks.append(Check(name, max_error(output, exact[name]), max_error(theirs[name], exact[name]), bound))
    return Verification(tuple(checks), None if end is None else _psnr(end, their_end))


def _psnr(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    peak = expected.max() - expected.min()
    return (10 * torch.log10(peak**2 / (actual - expected).square().mean())).item()


@contextlib.contextmanager
def _undone(swaps: list[Swap]) -> Iterator[None]:
    for swap in swaps:
        swap.undo()
    try:
        yield
    finally:
        for swap in swaps:
            swap.apply()


class _FloatMeansDouble(TorchFunctionMode):
    """Hosts upcast by `.float()`, which would bring an fp64 run down to fp32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (Tensor.double if func is Tensor.float else func)(*args, **(kwargs or {}))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    return type(value)(map(_double, value)) if type(value) in (list, tuple) else value


def _tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}[{i}]")
