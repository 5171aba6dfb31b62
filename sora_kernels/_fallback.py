"""What "auto" does on a GPU that does not take the kernel it chose: the next implementation, and one warning.

A kernel may want more registers or shared memory than the GPU has, or a GPU that the compiler does not know. That shows
at the launch, below autograd and inside a compiled graph, so what `_dispatch.choose` gives there is an op of its own,
`{op}_{impl}_or_next`. Its destinations are the next implementation's as well: nothing is lost by the attempt. An
explicit impl never comes here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

SUFFIX = "_or_next"
# What a compiler, a driver or cuDNN says of a kernel that this GPU cannot run. An illegal address or want of memory is
# none of them: those are raised.
REFUSALS = (
    "PassManager::run failed", "no kernel image", "invalid device function", "too many resources", "out of resource",
    "invalid configuration argument", "operation not supported", "ptxas", "CUDNN_STATUS_NOT_SUPPORTED",
    "unable to find an engine", "FlashAttention only supports", "not compiled with flash attention",
)  # fmt: skip
_refused: set[tuple] = set()  # calls that need no second attempt
_warned: set[tuple[str, str]] = set()


def refusal(error: Exception) -> str | None:
    """Why this GPU does not take a kernel, in a line; None where the error says something else."""
    if isinstance(error, torch.OutOfMemoryError):
        return None
    kind, text = type(error), str(error)
    of_triton = kind.__module__.startswith("triton.") and kind.__name__ != "InterpreterError"
    if not (of_triton or isinstance(error, ImportError) or any(r.lower() in text.lower() for r in REFUSALS)):
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{kind.__name__}: {lines[-1] if lines else 'no message'}"


def or_next(op: str, impl: str, following: str, run: Callable[[str, str], Callable[..., None]]) -> Callable[..., None]:
    """The kernel of `{op}_{impl}_or_next`, where `following` is one that takes the same calls; `run(op, impl)` runs."""

    def kernel(*args) -> None:
        call = (op, impl, *map(_kind, args)) if _refused else None
        if call not in _refused:
            try:
                return run(op, impl)(*args)
            except Exception as error:
                reason = refusal(error)
                if reason is None:
                    raise
            _refused.add((op, impl, *map(_kind, args)))
            _warn(op, impl, following.removesuffix(SUFFIX), reason)
        run(op, following)(*args)

    return kernel


def _kind(argument: object) -> object:
    """An argument as far as the choice of a kernel's code can depend on it."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.device, *argument.shape
    return tuple(argument) if isinstance(argument, list) else argument


def _warn(op: str, impl: str, following: str, reason: str) -> None:
    if (op, impl) in _warned:
        return
    _warned.add((op, impl))
    name, _, direction = op.rpartition("_")
    half = {"fwd": "forward", "bwd": "backward"}[direction]
    warnings.warn(
        f"{name}: the {half} of impl={impl!r} does not run on this GPU ({reason}); impl='auto' takes {following!r} "
        f"instead, which may be slow. `python -m sora_kernels.verify` says what runs here.",
        RuntimeWarning,
        stacklevel=2,
    )
