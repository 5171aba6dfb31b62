"""Derivatives: when a call is recorded, and where those come from that the kernels do not compute.

Kernels compute an op and its first gradient. What else is asked for comes from the op's formula, the reference in plain
torch: tangents (dual numbers, `torch.func.jvp`), the transforms of `torch.func`, and derivatives of gradients under
them. Values and first gradients are the kernels' there too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

Outputs = Tensor | tuple[Tensor, ...]


def transformed() -> bool:
    """Whether a transform of torch.func or a dual level is around this call: a kernel alone would lose derivatives."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def needs_grad(tensors: Iterable[Tensor | None]) -> bool:
    """Whether derivatives of any kind may be asked for: the call then goes through `apply`.

    Not while `torch.export` traces: a program would hold the forward alone (_library.call).
    """
    recorded = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
    return (recorded and not torch.compiler.is_exporting()) or transformed()


def apply(function: type[torch.autograd.Function], *args) -> Outputs:
    """`function.apply(*args)`, under transforms and dual levels with every derivative of `function.formula(*args)`.

    `formula` takes what `forward` takes after ctx, and is plain torch, differentiable any number of times.
    """
    if transformed():
        return derive(function.apply, function.formula, *args, recorded=True)
    return function.apply(*_apart(args)) if torch.compiler.is_compiling() else function.apply(*args)


def _apart(args: tuple) -> list:
    """A tensor that is given again becomes a view of itself: Dynamo does not trace a Function given one twice."""
    first = [not isinstance(t, Tensor) or not any(t is other for other in args[:i]) for i, t in enumerate(args)]
    return [t if new else t.view_as(t) for t, new in zip(args, first, strict=True)]


def derive(kernel: Callable[..., Outputs], formula: Callable[..., Outputs], *args, recorded: bool = False) -> Outputs:
    """`kernel(*args)` under transforms and dual levels, with every derivative of `formula(*args)`.

    recorded  kernel is known to autograd: outside of every transform it records its own, faster gradient
    """
    if torch.compiler.is_compiling():  # Dynamo traces transforms of plain torch only; a compiler then fuses it
        return _plain(formula)(*args)
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    others = [None if isinstance(a, Tensor) else a for a in args]

    def of_tensors(run: Callable[..., Outputs]) -> Callable[..., Outputs]:
        def bound(*tensors):
            full = list(others)
            for i, t in zip(places, tensors, strict=True):
                full[i] = t
            return run(*full)

        return bound

    return _Derived.apply(recorded, of_tensors(kernel), of_tensors(_plain(formula)), *(args[i] for i in places))


def _plain(formula: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Without autocast, as kernels run: the dtypes are the op's own business."""

    def run(*args):
        device = next(a for a in args if isinstance(a, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return formula(*args)

    return run


class _Derived(torch.autograd.Function):
    """kernel(*tensors) for values, formula(*tensors) for derivatives, at each level of the transforms around it."""

    @classmethod
    def apply(cls, recorded, kernel, formula, *tensors):
        if recorded and not torch._C._are_functorch_transforms_active() and not any(map(_is_dual, tensors)):
            return kernel(*tensors)
        return super().apply(recorded, kernel, formula, *tensors)

    @staticmethod
    def forward(recorded, kernel, formula, *tensors):
        return kernel(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.recorded, ctx.kernel, ctx.formula, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx, *_):
        with forward_ad._set_fwd_grad_enabled(True):  # the saved tensors are the duals; forward mode is off in here
            duals = ctx.formula(*ctx.saved_tensors)
            pairs = [forward_ad.unpack_dual(dual) for dual in _as_tuple(duals)]
        tangents = tuple([torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in pairs])
        return tangents if isinstance(duals, tuple) else tangents[0]

    @staticmethod
    def backward(ctx, *grads):
        tensors, given = ctx.saved_tensors, len(ctx.saved_tensors)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]

        def formula(*args):
            def of_leaves(*leaves):
                full = list(args[:given])
                for i, leaf in zip(wanted, leaves, strict=True):
                    full[i] = leaf
                return _as_tuple(ctx.formula(*full))

            return torch.func.vjp(of_leaves, *[args[i] for i in wanted])[1](tuple(args[given:]))

        def kernel(*args):  # forward once more, for what it keeps for its backward
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(args[:given])]
                outputs = _as_tuple(ctx.kernel(*leaves))
                grads = torch.autograd.grad(outputs, [leaves[i] for i in wanted], args[given:])
            return tuple([g.clone() if any(g is a for a in args) else g for g in grads])  # of a sum it is an input

        if ctx.recorded:
            results = _Derived.apply(False, kernel, formula, *tensors, *grads)
        else:
            results = formula(*tensors, *grads)
        results = dict(zip(wanted, results, strict=True))
        return None, None, None, *[results.get(i) for i in range(given)]

    @staticmethod
    def vmap(info, in_dims, recorded, kernel, formula, *tensors):
        """One call for each sample, with the bits that it has alone."""
        dims = in_dims[3:]
        if info.batch_size == 0:
            return torch.func.vmap(formula, dims)(*tensors), 0
        samples = [
            _Derived.apply(
                recorded, kernel, formula,
                *[t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims, strict=True)],
            )
            for i in range(info.batch_size)
        ]  # fmt: skip
        if isinstance(samples[0], tuple):
            return tuple([torch.stack(sample) for sample in zip(*samples, strict=True)]), 0
        return torch.stack(samples), 0


def _as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _tangent(t: Tensor) -> Tensor | None:
    return forward_ad.unpack_dual(t).tangent


def _is_dual(t: Tensor) -> bool:
    return forward_ad._current_level >= 0 and _tangent(t) is not None


def once_differentiable(backward: Callable[..., object]) -> Callable[..., object]:
    """A backward made of kernels: what would differentiate it, or transform it, is refused instead of losing terms."""
    family = backward.__module__.rpartition(".")[0]

    def guarded(ctx, *grads):
        if any([g is not None and (_is_dual(g) or torch._C._functorch.is_functorch_wrapped_tensor(g)) for g in grads]):
            raise RuntimeError(
                f"{family}: the gradient of a result that was computed outside of a transform is not transformed; "
                "compute both inside of it, as torch.func.jvp, vmap and jacrev of torch.func.grad or vjp do"
            )
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        message = (
            f"{family}: a gradient has no gradient outside of torch.func; take second derivatives by torch.func.grad, "
            f"jvp or hessian, or differentiate {family}.reference"
        )
        return _Refusal.apply(message, len(results), *results, *grads, *ctx.saved_tensors)

    @functools.wraps(backward)
    def run(ctx, *grads):
        if torch.is_grad_enabled() or transformed():
            return guarded(ctx, *grads)
        return backward(ctx, *grads)

    return run


class _Unpacked:
    """A ctx whose saved tensors are asked for once: activation checkpointing unpacks a tensor a single time."""

    def __init__(self, ctx):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name):
        return getattr(self._ctx, name)


class _Refusal(torch.autograd.Function):
    """The first `count` tensors, for autograd results of all the others, and an error where one is differentiated."""

    @staticmethod
    def forward(ctx, message, count, *tensors):
        ctx.message = message
        return tuple([t if t is None else t.detach() for t in tensors[:count]])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)
