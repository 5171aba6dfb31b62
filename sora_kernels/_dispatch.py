"""Which implementation runs: `impl="auto"` may choose and can explain, an explicit one runs or raises."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from . import _fallback, _library

IMPLS = ("auto", "reference", "cpu", "triton", "cudnn", "sdpa", "cuda")
WITH_TRITON = ("triton", "cudnn")  # on CPU tensors these run in Triton's interpreter only
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORCED = os.environ.get("SORA_KERNELS_IMPL") or "auto"  # replaces "auto" everywhere
# executed, not yet run on a GPU: "auto" does not take them
NAMED_ONLY = {
    (op, "cuda")
    for op in (
        "causal_conv3d", "final_layer", "gate_residual", "gate_residual_norm_modulate", "norm_modulate", "norm_silu",
        "patch_embed3d", "qk_norm_rope", "spacetime_attention", "upsample_conv3d",
    )  # fmt: skip
}
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton kernels then also run on CPU tensors


class Unavailable(RuntimeError):
    """The implementation asked for cannot run this call. The message gives one reason per implementation."""


def choose(
    op: str,
    impl: str,
    x: Tensor,
    *,
    grad: bool = False,
    limits: Callable[[str], str | None] | None = None,
    fastest: str | None = None,
) -> str:
    """What `_library.call` runs `op` with on tensors like `x`: the name of an implementation, for "auto" on a GPU with
    its fallback (_fallback.py).

    op       the public function's name; its ops are `{op}_fwd` and `{op}_bwd`.
    grad     gradients will be asked for: an implementation without a backward does not qualify.
    limits   op-specific: implementation -> None, or why it cannot run these arguments.
    fastest  the implementation that was measured fastest for these arguments: "auto" takes it first where it can run.
    Raises ValueError for an unknown name and Unavailable where an explicit choice cannot run.
    """
    device = "cpu" if x.is_cpu else x.device.type  # which makes a string at each call
    if isinstance(impl, str) and impl == "auto":
        impl = FORCED
    if not isinstance(impl, str) or impl != "auto":
        if not isinstance(impl, str) or impl not in IMPLS:
            source = " from SORA_KERNELS_IMPL" if impl is FORCED else ""
            raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)}; got {impl!r}{source}")
        reason = why_not(op, impl, device, x.dtype, grad) or (limits and limits(impl))
        if reason:
            raise Unavailable(_explain(op, impl, reason, x, grad, limits))
        return impl
    candidates = _candidates(op, device, x.dtype, grad)
    for candidate in (fastest, *candidates) if fastest in candidates else candidates:
        if limits is None or not limits(candidate):
            return candidate if device == "cpu" or candidate == "reference" else candidate + _fallback.SUFFIX
    return "reference"


def within(most: int, count: int, what: str) -> Callable[[str], str | None] | None:
    """`limits` of an op whose Triton programs hold `count` values of what is normalised at once: none up to `most`."""
    if count <= most:
        return None
    reason = f"holds {what} of up to {most} values in a program's registers; got {count}"
    return lambda impl: f"{impl} {reason}" if impl in WITH_TRITON else None


def why_not(op: str, impl: str, device: str, dtype: torch.dtype = torch.float32, grad: bool = False) -> str | None:
    """None where `impl` runs `op` on this device type and dtype, else the reason why not."""
    return _why_not(op, impl, device, dtype, grad)


def _candidates(op: str, device: str, dtype: torch.dtype, grad: bool) -> tuple[str, ...]:
    """What "auto" chooses from, best first."""
    return _able(op, device, dtype, grad)


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, and triton with it.
why_not._dynamo_marked_constant = _candidates._dynamo_marked_constant = True


@functools.cache
def _able(op: str, device: str, dtype: torch.dtype, grad: bool) -> tuple[str, ...]:
    if device == "cpu" and (error := _library.setting_error()):  # a wish that cannot be granted is not passed over
        raise Unavailable(f"{op}: {error}")
    known = [impl for impl in _library.impls(f"{op}_fwd") if (op, impl) not in NAMED_ONLY]
    able = [impl for impl in known if _why_not(op, impl, device, dtype, grad) is None]
    # the interpreter is a test tool: right, and thousands of times too slow to be chosen
    return tuple(impl for impl in able if not (impl in WITH_TRITON and device == "cpu"))


@functools.cache
def _why_not(op: str, impl: str, device: str, dtype: torch.dtype, grad: bool) -> str | None:
    if impl not in _library.impls(f"{op}_fwd"):
        return f"{op} has no {impl} implementation"
    if grad and impl not in _library.impls(f"{op}_bwd"):
        return f"{op} is forward-only in {impl}, and gradients were asked for"
    if impl == "reference":
        return None
    if dtype not in KERNEL_DTYPES:
        return f"{impl} takes float32, bfloat16 or float16; got {dtype}"
    if impl == "cpu" and device != "cpu":
        return f"cpu needs tensors on the CPU; got {device}"
    if impl == "cuda" and device != "cuda":
        return f"cuda needs tensors on a CUDA device; got {device}"
    if impl == "sdpa":
        if device not in ("cpu", "cuda"):
            return f"sdpa needs tensors on the CPU or a CUDA device; got {device}"
        if device == "cuda" and not torch.backends.cuda.is_flash_attention_available():
            return "sdpa needs a torch that is built with flash attention"
        return None
    if impl in WITH_TRITON:
        if device != "cuda" and not (INTERPRET and device == "cpu"):
            where = "a CUDA device (or TRITON_INTERPRET=1 before the first import)"
            return f"{impl} needs tensors on {where}; got {device}"
        if impl == "cudnn" and device == "cuda" and not torch.backends.cudnn.is_available():
            return "cudnn needs a torch that is built with cuDNN"
        return _library.triton_error()
    if _library.is_compiled(f"{op}_fwd", impl):
        if error := _library.load_error(impl):
            return error
        if not all(_library.has_kernel(o, impl) for o in (f"{op}_fwd", f"{op}_bwd") if impl in _library.impls(o)):
            return f"the compiled library _{impl}.so is older than this code and lacks {op}: build it again"
    return None


def _explain(op, impl, reason, x, grad, limits) -> str:
    lines = [f"{op}: impl={impl!r} cannot run: {reason}. Implementations for these arguments:"]
    for name in _library.impls(f"{op}_fwd"):
        other = why_not(op, name, x.device.type, x.dtype, grad) or (limits and limits(name))
        lines.append(f"  {name}: {other or 'usable'}")
    return "\n".join(lines)
