"""What kernels are given: operands in layouts they read, and fresh destinations for the gradients that are wanted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import _check
from ._autograd import needs_grad


def narrow(x: Tensor, tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """fp64 tensors beside an x that is not become fp32, differentiably: kernels neither read nor write fp64."""
    for t in tensors:  # rarely one: a loop costs a call less than a comprehension
        if t is not None and t.dtype is torch.float64 and x.dtype is not torch.float64:
            return tuple([t if t is None or t.dtype is not torch.float64 else t.float() for t in tensors])
    return tensors


def dense(t: Tensor | None) -> Tensor | None:
    """t with a dense last axis; its other strides are the kernel's business."""
    return t if t is None or t.stride()[-1] == 1 else t.contiguous()


def parameter(t: Tensor | None) -> Tensor | None:
    """A contiguous parameter."""
    return t if t is None else t.contiguous()


def table(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A contiguous table in the dtype that the mathematics on x is done in."""
    if t is None:
        return None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (t if t.dtype == dtype else t.to(dtype)).contiguous()


def like(t: Tensor | None, wanted: bool = True, dtype: torch.dtype | None = None) -> Tensor | None:
    """A contiguous destination of the shape, device and dtype of t, or of another dtype, where it is wanted."""
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format) if wanted else None


def written(
    op: str,
    outs: tuple[Tensor, ...],
    results: tuple[tuple[str, Tensor], ...],
    inputs: tuple[Tensor | None, ...],
    over: int = 0,
) -> None:
    """`outs`, which the caller gave for results like these inputs by name, may be written to: nothing is recorded, each
    element lies apart from the others and from `inputs`; the first may be one of the first `over` inputs itself."""
    for out, (name, result) in zip(outs, results, strict=True):
        _check.like(op, "out", out, result, name)
        if out.stride(-1) != 1 and out.shape[-1] > 1:
            raise ValueError(f"{op}: out must be dense in its last axis; got strides {out.stride()}")
    if needs_grad((*inputs, *outs)):
        raise ValueError(
            f"{op}: out= is for inference; call it under torch.no_grad() and outside of torch.func and dual levels, "
            "or drop out="
        )
    fake = isinstance(outs[0], FakeTensor)
    if not (torch.compiler.is_compiling() or fake):  # which know of no memory; a compiler counts the changes itself
        _check.destinations(op, outs, inputs, over)
        torch.autograd.graph.increment_version(outs)  # what has saved a buffer for its backward must learn of it


def zero(*destinations: Tensor | None) -> None:
    """The gradients of nothing, of those that are wanted."""
    for destination in destinations:
        if destination is not None:
            destination.zero_()


def video_format(x: Tensor) -> torch.memory_format:
    """Of a video [B, C, T, H, W]: channels last where its channels lie side by side."""
    last = not x.is_contiguous() and x.shape[1] > 1 and x.stride()[1] == 1
    return torch.channels_last_3d if last else torch.contiguous_format


def empty_video(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised, in x's dtype, device and memory format."""
    if video_format(x) is torch.contiguous_format:
        return x.new_empty(shape)
    _, C, T, H, W = shape
    return x.new_empty_strided(shape, (T * H * W * C, 1, H * W * C, W * C, C))


def dense_taps(weight: Tensor, x: Tensor) -> Tensor:
    """The weight [O, C, kt, kh, kw] in x's dtype with its channels side by side in memory: itself or a copy."""
    weight = weight.to(x.dtype)
    return weight.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)


def box(weight: Tensor, factor) -> Tensor:
    """[O, C, kt + ft - 1, ...] in fp32: the sums of as many neighbouring taps as the factor, zeros around them."""
    weight = weight.float()
    for axis, f in enumerate(factor, 2):
        if f > 1:
            shape = list(weight.shape)
            shape[axis] = f - 1
            zeros = weight.new_zeros(shape)
            weight = torch.cat([zeros, weight, zeros], axis).unfold(axis, f, 1).sum(-1)
    return weight


def unbox(dboxed: Tensor, factor) -> Tensor:
    """The adjoint of `box`."""
    for axis, f in enumerate(factor, 2):
        dboxed = dboxed.unfold(axis, f, 1).sum(-1) if f > 1 else dboxed
    return dboxed


def bias_gradient(dout: Tensor, dbias: Tensor | None) -> None:
    """dbias [C] = the sum of a video over all but its channels, in fp32, where it is wanted."""
    if dbias is not None:
        dbias.copy_(dout.sum((0, 2, 3, 4), dtype=torch.float32))


def unpack(packed: Tensor, front: tuple[int, int, int], dx: Tensor | None, dcache: Tensor | None) -> None:
    """The adjoint of laying a video after its cache, `front` frames, rows and columns in; of those that are wanted."""
    past, top, left = front
    for destination, frames in ((dx, slice(past, None)), (dcache, slice(past))):
        if destination is not None:
            H, W = destination.shape[3:]
            destination.copy_(packed[:, :, frames, top : top + H, left : left + W])
