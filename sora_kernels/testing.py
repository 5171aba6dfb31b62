"""Helpers for testing kernels against an oracle; shipped, so that other projects can hold our ops to the same rule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def error_bound(oracle: Tensor, baseline: Tensor, terms: int = 1) -> float:
    """2 × the largest error of plain PyTorch in the same dtype + the rounding that nobody can avoid.

    That is one rounding at the store, eps(dtype) · max|oracle|, and, where an element is a sum of n = `terms` fp32
    values in an order of one's own, their independent roundings, √n · eps(fp32) · max|oracle|. Below the normal
    numbers of the dtype a rounding is one step of its subnormals.
    """
    baseline_error = (baseline.double() - oracle).abs().max().item()
    info = torch.finfo(baseline.dtype)
    rounding = info.eps + (terms**0.5 * torch.finfo(torch.float32).eps if terms > 1 else 0.0)
    return 2 * baseline_error + rounding * max(oracle.abs().max().item(), info.smallest_normal)


def max_error(actual: Tensor, oracle: Tensor) -> float:
    """The largest absolute error; infinite where `actual` has a NaN or an infinity that the oracle has not."""
    if actual.numel() == 0:
        return 0.0
    error = (actual.double() - oracle).abs()
    return float("inf") if not torch.isfinite(error).all() else error.max().item()


def assert_matches_oracle(
    actual: Tensor, oracle: Tensor, baseline: Tensor, name: str = "output", terms: int = 1
) -> None:
    """The project's error rule.

    actual    the kernel's result
    oracle    the fp64 result on the same (exactly representable) inputs
    baseline  plain PyTorch in actual's dtype: the same formula without any upcast
    terms     how many values were summed into each element, where that is a reduction or a convolution
    """
    if actual.shape != oracle.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, the oracle has {list(oracle.shape)}")
    if actual.dtype != baseline.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, expected {baseline.dtype}")
    if actual.numel() == 0:
        return
    error, bound = max_error(actual, oracle), error_bound(oracle, baseline, terms)
    if not error <= bound:
        raise AssertionError(
            f"{name}: max error {error:.3e} exceeds {bound:.3e} = 2 x plain PyTorch's error + rounding"
        )


def outputs_and_grads(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: dict[str, Tensor | None], grad_outputs: list[Tensor]
) -> dict[str, Tensor]:
    """Run `function(**inputs)` and its backward: {"output0": ..., "grad x": ..., ...}, for tensors that are given."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = {name: t for name, t in leaves.items() if t is not None}
    grads = torch.autograd.grad(outputs, list(given.values()), grad_outputs[: len(outputs)])
    results = {f"output{i}": o.detach() for i, o in enumerate(outputs)}
    return results | {f"grad {name}": g for name, g in zip(given, grads, strict=True)}


LAYOUTS = ("contiguous", "sliced", "strided", "offset", "transposed", "expanded", "constant")


def arrange(t: Tensor, layout: str) -> Tensor:
    """The values of t (for "expanded" of its first row, for "constant" its first) in an awkward memory layout.

    What lies between and around them is NaN, or the largest integer.
    """
    if layout == "contiguous" or (layout == "transposed" and t.ndim < 2):
        return t
    nothing = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
    if layout == "sliced":  # inside a larger tensor
        big = t.new_full([n + 2 for n in t.shape], nothing)
        return big[tuple(slice(1, n + 1) for n in t.shape)].copy_(t)
    if layout == "strided":  # every second element of each axis
        big = t.new_full([2 * n for n in t.shape], nothing)
        return big[(slice(None, None, 2),) * t.ndim].copy_(t)
    if layout == "offset":  # dense, from the second element of its memory on: no vector of it is aligned
        return t.new_full((t.numel() + 1,), nothing)[1:].view(t.shape).copy_(t)
    if layout == "transposed":  # the last two axes swapped in memory
        return t.mT.contiguous().mT
    if layout == "expanded":  # stride 0 in every axis but the last, or in the only one
        return t[(slice(1),) * max(t.ndim - 1, 1)].expand(t.shape)
    if layout == "constant":  # stride 0 in every axis, as the gradient of a sum has
        return t[(slice(1),) * t.ndim].expand(t.shape)
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")


@contextlib.contextmanager
def poison_empty() -> Iterator[None]:
    """Fill everything that torch.empty and torch.empty_like give with NaN: an element nobody wrote shows.

    Every bit of it is set, as in no NaN that arithmetic gives (but PyTorch's conversion to bf16 on a CPU): who executes
    kernels can tell it from a result.
    """
    originals = torch.empty, torch.empty_like

    def poisoned(original):
        def allocate(*args, **kwargs):
            t = original(*args, **kwargs)
            if t.is_floating_point():
                t.view(getattr(torch, f"int{8 * t.element_size()}")).fill_(-1)
            return t

        return allocate

    torch.empty, torch.empty_like = map(poisoned, originals)
    try:
        yield
    finally:
        torch.empty, torch.empty_like = originals
