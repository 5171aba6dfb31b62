"""Replace the hot steps of a host library's model by our operations, in place and reversibly.

Only instances change: a `forward` bound to one module, an attention processor set the way the host offers. Classes,
parameters and state_dict stay as they are, and importing this changes nothing. What is known of a host library is in
the file that bears its name; it is imported, and the library with it, when a model of it is patched.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from .. import _check, _dispatch, _library

HOSTS = {"diffusers": ("AutoencoderKLWan", "WanTransformer3DModel")}  # library and file -> the classes it plans for
_RECORD = "_sora_kernels_patch"  # where a patched model remembers how to become itself again


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the model: the module it is in ("" is the model), the operations for it, and why they do not run it
    (None: they do)."""

    where: str
    ops: tuple[str, ...]
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What `patch_model` did. `str(report)` is a table, repeated layers in one row.

    replaced  steps that our operations run now
    left      steps that they could run but do not here, each with its reason
    kept      what of this host is never replaced, and why
    """

    model: str
    impl: str
    rounding: str
    steps: tuple[Step, ...]
    kept: tuple[str, ...]

    @property
    def replaced(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.reason is None)

    @property
    def left(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.reason is not None)

    def __str__(self) -> str:
        title = f"{self.model}, impl={self.impl!r}: {len(self.replaced)} of {len(self.steps)} steps replaced"
        rounded = "where the host rounds, while no gradient is recorded" if self.rounding == "host" else "once"
        groups: dict[tuple[str, ...], int] = {}
        for step in self.steps:
            where = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", step.where) or "the model"
            outcome = f"left: {step.reason}" if step.reason else f"now {', '.join(step.ops)}"
            groups[where, outcome] = groups.get((where, outcome), 0) + 1
        rows = [(f"{where} ×{count}" if count > 1 else where, outcome) for (where, outcome), count in groups.items()]
        width = max((len(where) for where, _ in rows), default=0)
        lines = [title, *(f"  {w:<{width}}  {o}" for w, o in rows), f"  rounding={self.rounding!r}: {rounded}"]
        return "\n".join([*lines, *(f"  kept: {k}" for k in self.kept)])


# What a host library's file makes, and a patched model remembers


class Bound(functools.partial):
    """`forward(module, impl, ...)` as one instance's `forward`. Unlike a bound method it can be pickled."""


@dataclasses.dataclass
class Swap:
    """A `forward` for one module, or (processor=True) an attention processor; not a frozen one: copies rebind it."""

    module: nn.Module
    new: Callable[..., Any]
    processor: bool = False
    old: Any = None

    def apply(self) -> None:
        if self.processor:
            self.old = self.module.processor
            self.module.set_processor(self.new)
        else:
            self.module.forward = self.new
            self.module._replicate_for_data_parallel = functools.partial(_replicate, self.module)

    def in_place(self) -> bool:
        return (self.module.processor if self.processor else vars(self.module).get("forward")) is self.new

    def undo(self) -> None:
        if self.processor:
            self.module.set_processor(self.old)
        else:
            del self.module.forward, self.module._replicate_for_data_parallel


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step and the swaps that bring it about (none where it is left)."""

    step: Step
    swaps: tuple[Swap, ...] = ()


def bind(module: nn.Module, forward: Callable[..., Any], *arguments: Any) -> Swap:
    """`forward(module, *arguments, ...)`, a function of some file's top level, for the `forward` of `module`."""
    return Swap(module, Bound(forward, module, *arguments))


def _replicate(module: nn.Module) -> nn.Module:
    """A replica as nn.DataParallel makes them, whose `forward` runs on the replica's own parameters."""
    replica = type(module)._replicate_for_data_parallel(module)
    if isinstance(forward := vars(replica).get("forward"), Bound):
        replica.forward = Bound(forward.func, replica, *forward.args[1:])
    return replica


def why_not_rebind(module: nn.Module, cls: type[nn.Module]) -> str | None:
    """None where `module` still runs the forward of `cls`, which is the one a replacement was written for."""
    if _is_replaced(module):
        return f"the forward of this {cls.__name__} is already replaced (by a hook, or another library)"
    if type(module).forward is not cls.forward:
        return f"{type(module).__name__} has a forward of its own, not that of {cls.__name__}"
    return None


def is_hooked(module: nn.Module) -> bool:
    """Something happens when `module` is called that reading its parameters would miss: offloading, say, or FSDP."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _is_replaced(module)
    )


def _is_replaced(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    if forward is None or isinstance(forward, Bound):
        return False
    return getattr(forward, "__func__", None) is not type(module).forward  # its own: accelerate's hooks came and went


# The public functions


def patch_model(model: nn.Module, impl: str = "auto", *, rounding: str = "host", strict: bool = False) -> Report:
    """Let sora_kernels run the hot steps of `model`, in place; say what was replaced, what not, and why.

    model   a diffusers WanTransformer3DModel (adaLN norms, gated residuals, QK-norm + rotary embedding + attention,
            patch embedding, final layer) or AutoencoderKLWan (norm + SiLU)
    impl    handed to every operation. A step whose operations lack an explicitly named one is left to the host
    rounding  "host": in 16 bits, values after the norm of q and k are rounded as the host rounds them, as long as no
            gradient is recorded. Over the steps of a sampler the host's own roundings are part of what it shows.
            "once": nearer to fp64, and always so in training
    strict  raise `Unavailable`, and change nothing, where a step would be left

    The same arithmetic as the host's, upcasts included, with fewer roundings: outputs and gradients agree within the
    rule of `sora_kernels.testing`; `verify_patch` checks that on inputs of yours. Weights, state_dict, LoRA layers and
    their scale, gradient checkpointing and an attention backend chosen in diffusers keep working. Copies, pickles and
    replicas of a patched model are patched. Where the weights of a module are read instead of its being called, and a
    call would do more (hooks, offloading, FSDP, a wrapper, whenever it came), the host's own step runs. Wrap and
    compile afterwards. Patching again with the same impl and rounding changes nothing.

    Raises TypeError for a model no class of which is known (the message lists those that are), ValueError for an
    unknown impl or rounding, a model patched with others or already compiled.
    """
    host = host_of(model)
    _check.choice("patch_model", "impl", impl, _dispatch.IMPLS)
    _check.choice("patch_model", "rounding", rounding, ("host", "once"))
    if (record := vars(model).get(_RECORD)) is not None:
        report: Report = record[0]
        if (report.impl, report.rounding) != (impl, rounding):
            was = f"impl={report.impl!r}, rounding={report.rounding!r}"
            raise ValueError(f"patch_model: already patched with {was}; call unpatch_model first")
        return report
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError("patch_model: the model is compiled already; patch it first, then compile")
    plans, kept = host.plan(model, impl, rounding)
    plans = [_without_missing(plan, _dispatch.FORCED if impl == "auto" else impl) for plan in plans]
    report = Report(type(model).__name__, impl, rounding, tuple(plan.step for plan in plans), kept)
    if strict and report.left:
        raise _dispatch.Unavailable(f"patch_model: strict=True, and some steps would be left to the host.\n{report}")
    swaps = [swap for plan in plans for swap in plan.swaps]
    for swap in swaps:
        swap.apply()
    vars(model)[_RECORD] = (report, swaps)
    return report


def unpatch_model(model: nn.Module) -> None:
    """Undo `patch_model`: afterwards the model gives, bit for bit, what it gave before.

    Raises ValueError for a model that is not patched, or where something was hooked over a replacement since; nothing
    has changed then. A graph compiled in between belongs to the patched model: compile again.
    """
    _, swaps = record_of("unpatch_model", model)
    check_in_place("unpatch_model", swaps)
    for swap in swaps:
        swap.undo()
    del vars(model)[_RECORD]


def host_of(model: nn.Module) -> types.ModuleType:
    classes = type(model).__mro__
    for library, names in HOSTS.items():
        if any(c.__name__ in names and c.__module__.split(".")[0] == library for c in classes):
            return importlib.import_module(f".{library}", __package__)
    known = "; ".join(f"{library}: {', '.join(names)}" for library, names in HOSTS.items())
    raise TypeError(
        f"patch_model: model must be one of the classes of {known}; got {type(model).__name__}. "
        "Of a pipeline pass pipe.transformer or pipe.vae; patch before compiling or wrapping"
    )


def _without_missing(plan: Plan, impl: str) -> Plan:
    """The plan, or, where one of its operations has no such implementation at all, the step left to the host."""
    missing = [op for op in plan.step.ops if impl != "auto" and impl not in _library.impls(f"{op}_fwd")]
    if plan.step.reason or not missing:
        return plan
    return Plan(dataclasses.replace(plan.step, reason=f"{', '.join(missing)}: no {impl} implementation"))


def record_of(function: str, model: nn.Module) -> tuple[Report, list[Swap]]:
    record = vars(model).get(_RECORD) if isinstance(model, nn.Module) else None
    if record is None:
        raise ValueError(f"{function}: this {type(model).__name__} is not patched; call patch_model first")
    return record


def check_in_place(function: str, swaps: list[Swap]) -> None:
    for swap in swaps:
        if not swap.in_place():
            raise ValueError(
                f"{function}: a {type(swap.module).__name__} was hooked or changed after patching; undo that first"
            )
