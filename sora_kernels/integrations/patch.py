"""Replace the hot steps of a host library's model by our operations, in place and reversibly.

Only instances change: a `forward` bound to one module, an attention processor. Classes, parameters and state_dict stay
as they are, and importing this changes nothing. What is known of a host library is in the folder that bears its name, a
file for each family of models; it is imported, and the library with it, when a model of it is patched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import _check, _dispatch, _library
from . import diffusers
from ._bound import Bound, bound_of, replicate
from .report import Report, Step

HOSTS = {"diffusers": diffusers.CLASSES}  # library and folder -> file -> the classes that it plans for
OPS = (
    "causal_conv3d", "downsample_conv3d", "final_layer", "gate_heads", "gate_residual", "gate_residual_norm_modulate",
    "norm_modulate", "norm_silu", "patch_embed3d", "qk_norm_rope", "spacetime_attention", "upsample_conv3d",
)  # fmt: skip
RECORD = "_sora_kernels_patch"  # where a patched model remembers how to become itself again


# What a file for a family of models is told and makes, and a patched model remembers


@dataclasses.dataclass(frozen=True)
class How:
    """What was asked of `patch_model`; `left` says of each operation that stays out why it does."""

    impl: str
    rounding: str
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def why_not(self, *ops: str) -> str | None:
        return next((self.left[op] for op in ops if op in self.left), None)

    def step(self, where: str, ops: tuple[str, ...], reason: str | None, *swaps: Swap) -> Plan:
        """The step and what brings it about, or the step left to the host. Its operations come all or none."""
        reason = reason or self.why_not(*ops)
        return Plan(Step(where, ops, reason), () if reason else swaps)

    def rounding_now(self) -> str:
        """What `qk_norm_rope` is told: the host's own rounding only where no gradient is recorded."""
        return "once" if torch.is_grad_enabled() else self.rounding


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
            self.module.processor = self.new
        else:
            self.module.forward = self.new
            self.module._replicate_for_data_parallel = functools.partial(replicate, self.module)

    def in_place(self) -> bool:
        return (self.module.processor if self.processor else vars(self.module).get("forward")) is self.new

    def undo(self) -> None:
        if self.processor:
            if self.in_place():  # another, set since, stays
                self.module.processor = self.old
        else:
            del self.module.forward, self.module._replicate_for_data_parallel


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step and the swaps that bring it about (none where it is left)."""

    step: Step
    swaps: tuple[Swap, ...] = ()


@dataclasses.dataclass
class Record:
    """What a patched model remembers."""

    model: nn.Module
    report: Report
    how: How
    plans: tuple[Plan, ...]

    @property
    def swaps(self) -> list[Swap]:
        return [*{id(swap): swap for plan in self.plans for swap in plan.swaps}.values()]

    def report_now(self) -> Report:
        """The report, in which the steps of attention processors set since are left."""
        return dataclasses.replace(self.report, steps=tuple(map(_step_now, self.plans)))


def _step_now(plan: Plan) -> Step:
    lost = [swap.module for swap in plan.swaps if swap.processor and not swap.in_place()]
    reason = f"its processor is a {type(lost[0].processor).__name__}, set after the patch" if lost else None
    return dataclasses.replace(plan.step, reason=reason or plan.step.reason)


def bind(module: nn.Module, forward: Callable[..., Any], *arguments: Any) -> Swap:
    """`forward(module, *arguments, ...)`, a function of some file's top level, for the `forward` of `module`."""
    return Swap(module, Bound(forward, module, *arguments).forward)


def why_not_rebind(module: nn.Module, cls: type[nn.Module]) -> str | None:
    """None where `module` still runs the forward of `cls`, which is the one a replacement was written for."""
    if bound_of(module):
        return f"this {cls.__name__} is patched already, as a part of another model"
    if _is_replaced(module):
        return f"the forward of this {cls.__name__} is already replaced (by a hook, or another library)"
    if type(module).forward is not cls.forward:
        own, host = named(type(module), cls), named(cls, type(module))
        return f"{own} has a forward of its own, not that of {host}"
    return None


def named(cls: type, *others: type) -> str:
    """The name of a class, with its module where another has the same, as PEFT's Linear and PyTorch's."""
    alike = any(cls is not other and cls.__name__ == other.__name__ for other in others)
    return f"{cls.__module__}.{cls.__name__}" if alike else cls.__name__


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
    if forward is None or bound_of(module):
        return False
    return getattr(forward, "__func__", None) is not type(module).forward  # its own: accelerate's hooks came and went


# The public functions


def patch_model(
    model: Any,
    ops: str | tuple[str, ...] = "all",
    impl: str = "auto",
    *,
    rounding: str = "host",
    strict: bool = False,
) -> Report:
    """Let sora_kernels run the hot steps of `model`, in place; say what was replaced, what not, and why.

    model   a model of one of the classes in `HOSTS`, or a diffusers pipeline, whose transformers and VAE are patched
    ops     "all", or the names of the operations to bring in. What the host does in a chain of them is replaced whole
            or not at all: where `ops` lacks one of a step's, the step is left
    impl    handed to every operation. A step whose operations lack an explicitly named one is left to the host
    rounding  "host": in 16 bits, values after the norm of q and k are rounded as the host rounds them, as long as no
            gradient is recorded. Over the steps of a sampler the host's own roundings are part of what it shows.
            "once": nearer to fp64, and always so in training
    strict  raise `Unavailable`, and change nothing, where a step would be left

    The same arithmetic as the host's, upcasts included, with fewer roundings: outputs and gradients agree within the
    rule of `sora_kernels.testing`; `verify_patch` checks that. Weights, state_dict, LoRA layers and their scale,
    gradient checkpointing and an attention backend chosen in diffusers keep working. Copies, pickles and replicas of a
    patched model are patched. Where the weights of a module are read instead of its being called, and a call would do
    more (hooks, offloading, FSDP, a wrapper, whenever it came), the host's own step runs. Wrap and compile afterwards.
    Patching again in the same way changes nothing.

    Raises TypeError for a model or a pipeline no part of which is known (the message lists the classes that are),
    ValueError for an unknown op, impl or rounding, a model patched otherwise, compiled or (in a pipeline) wrapped
    already, without weights (on the meta device) or with weights in 8 bits that nothing upcasts, or a shallow copy of
    a patched one. The model, and every part of a pipeline, is untouched then.
    """
    _check.choice("patch_model", "impl", impl, _dispatch.IMPLS)
    _check.choice("patch_model", "rounding", rounding, ("host", "once"))
    _check.flag("patch_model", "strict", strict)
    how = How(impl, rounding, _left(ops, impl))
    parts = [(name, part, _plan(part, how)) for name, part in parts_of("patch_model", model).items()]
    report = _joined(model, how, [(name, report) for name, _, (report, _) in parts])
    if strict and report.left:
        raise _dispatch.Unavailable(f"patch_model: strict=True, and some steps would be left to the host.\n{report}")
    for _, part, (part_report, plans) in parts:
        if RECORD not in vars(part):
            record = vars(part)[RECORD] = Record(part, part_report, how, plans)
            for swap in record.swaps:
                swap.apply()
    return report


def unpatch_model(model: Any) -> None:
    """Undo `patch_model`: afterwards the model, or every patched part of the pipeline, gives, bit for bit, what it gave
    before. Attention processors that were set since stay.

    Raises ValueError for one that is not patched, for a shallow copy, or where something was hooked over a replacement
    since; nothing has changed then. A graph compiled in between belongs to the patched model: compile again.
    """
    parts = [part for part in parts_of("unpatch_model", model).values() if RECORD in vars(part)]
    if not parts:
        raise ValueError(f"unpatch_model: this {type(model).__name__} is not patched; call patch_model first")
    _undo(parts)


def _undo(parts: Sequence[nn.Module]) -> None:
    for part in parts:
        check_in_place("unpatch_model", record_of("unpatch_model", part).swaps)
    for part in parts:
        for swap in vars(part).pop(RECORD).swaps:
            swap.undo()


@contextlib.contextmanager
def patched(model: Any, *args: Any, **kwargs: Any) -> Iterator[Report]:
    """`with patched(model, ...) as report:` is `patch_model(model, ...)` for the length of a block.

    Parts that were patched before stay so. In a pipeline the parts it had at the beginning are undone, whatever took
    their place. What cannot be undone raises as `unpatch_model` does, or warns where the block has an error of its own.
    """
    parts = [part for part in parts_of("patched", model).values() if RECORD not in vars(part)]
    report = patch_model(model, *args, **kwargs)

    def undo() -> None:
        _undo([part for part in parts if RECORD in vars(part)])

    try:
        yield report
    except BaseException:
        try:
            undo()
        except ValueError as left:
            warnings.warn(f"{left}; the model stays patched", stacklevel=3)
        raise
    undo()


def parts_of(function: str, model: Any) -> dict[str, nn.Module]:
    """{"": model}, or the parts of a pipeline that are of a known class, each once, by name."""
    if isinstance(model, nn.Module):
        host_of(model, function)
        return {"": model}
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"{function}: {_expected()}; got {_named(model)}")
    names: dict[nn.Module, str] = {}
    for name, part in components.items():
        if not isinstance(part, nn.Module):
            continue
        if _file_of(part):
            names.setdefault(part, name)
        elif inner := next((_named(module) for module in part.modules() if _file_of(module)), None):
            raise ValueError(
                f"{function}: {name} of this {type(model).__name__} is a {_named(part)} around a {inner}; "
                "put the model itself there, and compile or wrap it after patching"
            )
    if not names:
        held = ", ".join(f"{name}: {type(part).__name__}" for name, part in components.items())
        raise TypeError(f"{function}: {_expected()}; got a {type(model).__name__} of {held or 'no parts'}")
    return {name: part for part, name in names.items()}


def host_of(model: nn.Module, function: str = "patch_model") -> types.ModuleType:
    if (file := _file_of(model)) is None:
        raise TypeError(
            f"{function}: {_expected()}; got {_named(model)}. Patch the model itself, before compiling or wrapping it"
        )
    return importlib.import_module(file, __package__)


def _file_of(model: nn.Module) -> str | None:
    for cls in type(model).__mro__:
        library = cls.__module__.split(".")[0]
        for file, names in HOSTS.get(library, {}).items():
            if cls.__name__ in names:
                return f".{library}.{file}"
    return None


def class_of(library: str, name: str) -> type[nn.Module] | None:
    """The class of that name, if it is a known one of this library."""
    if any(name in names for names in HOSTS.get(library, {}).values()):
        return getattr(importlib.import_module(library), name, None)
    return None


def _named(model: Any) -> str:
    return getattr(type(model), "__name__", str(type(model)))


def _expected() -> str:
    return f"model must be one of the {known()}, or a pipeline that has one"


def known() -> str:
    names = (f"{library}: {', '.join(sorted(sum(files.values(), ())))}" for library, files in HOSTS.items())
    return f"classes of {'; '.join(names)}"


def _left(ops: str | tuple[str, ...], impl: str) -> dict[str, str]:
    names = OPS if isinstance(ops, str) and ops == "all" else ops
    if not isinstance(names, tuple | list | set) or any(name not in OPS for name in names):
        raise ValueError(f"patch_model: ops must be 'all' or a tuple of names out of {', '.join(OPS)}; got {ops!r}")
    left = {op: f"{op} is not among the chosen ops" for op in OPS if op not in names}
    impl = _dispatch.FORCED if impl == "auto" else impl
    missing = [op for op in OPS if impl != "auto" and impl not in _library.impls(f"{op}_fwd")]
    return {op: f"{op}: no {impl} implementation" for op in missing} | left


def _plan(model: nn.Module, how: How) -> tuple[Report, tuple[Plan, ...]]:
    if RECORD in vars(model):
        record = record_of("patch_model", model)
        if record.how != how:
            was = f"impl={record.how.impl!r}, rounding={record.how.rounding!r}"
            raise ValueError(f"patch_model: already patched with {was} or other ops; call unpatch_model first")
        return record.report_now(), record.plans
    if reason := _why_not(model):
        raise ValueError(f"patch_model: {reason}")
    plans, kept = host_of(model).plan(model, how)
    steps = tuple(plan.step for plan in plans)
    return Report(type(model).__name__, how.impl, how.rounding, steps, kept), tuple(plans)


def why_without_weights(model: nn.Module) -> str | None:
    """None where every parameter has memory, or a hook will bring it (offloading)."""
    for key, p in _parameters(model):
        if p.is_meta:
            return f"the model must have its weights; {key} is on the meta device. Load or offload it first"
    return None


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Of the modules without hooks."""
    for name, module in model.named_modules():
        if not is_hooked(module):
            yield from module.named_parameters(name, recurse=False)


def _why_not(model: nn.Module) -> str | None:
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return "the model is compiled already; patch it first, then compile"
    if reason := why_without_weights(model):
        return reason
    for key, p in _parameters(model):
        if p.dtype.is_floating_point and p.dtype.itemsize == 1:
            upcast = "upcast them, or let the host do so at each call (enable_layerwise_casting)"
            return f"the weights must be of 16 bits or more; {key} is {p.dtype}: {upcast}"
    return None


def _joined(model: Any, how: How, reports: list[tuple[str, Report]]) -> Report:
    if len(reports) == 1 and not reports[0][0]:
        return reports[0][1]
    steps = tuple(
        dataclasses.replace(step, where=f"{name}.{step.where}".rstrip("."))
        for name, report in reports
        for step in report.steps
    )
    kept = tuple(f"{name}: {line}" for name, report in reports for line in report.kept)
    return Report(type(model).__name__, how.impl, how.rounding, steps, kept)


def record_of(function: str, model: nn.Module) -> Record:
    record = vars(model).get(RECORD) if isinstance(model, nn.Module) else None
    if record is None:
        raise ValueError(f"{function}: this {type(model).__name__} is not patched; call patch_model first")
    if record.model is not model:
        raise ValueError(
            f"{function}: this {type(model).__name__} is a shallow copy of a patched one, whose modules it shares; "
            "unpatch that and copy it again, or use copy.deepcopy"
        )
    return record


def check_in_place(function: str, swaps: list[Swap]) -> None:
    for swap in swaps:
        if not (swap.processor or swap.in_place()):
            raise ValueError(
                f"{function}: a {type(swap.module).__name__} was hooked or changed after patching; undo that first"
            )
