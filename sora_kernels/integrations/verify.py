"""Is a patched model still the same? `verify_patch`: outputs and gradients against fp64, and where a sampling run ends.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..testing import error_bound, max_error
from .patch import RECORD, Swap, check_in_place, host_of, parts_of, record_of, unpatch_model, why_without_weights

STEPS = 8  # of the sampling run
ROOM, DRAWS = 4, 3  # of gradients: the error beside the host's own, and how many sums must exceed that, one by one


@dataclasses.dataclass(frozen=True)
class Check:
    """One output tensor, or the gradients of one module's parameters: the errors against an fp64 run of the host,
    patched and not, and the bound."""

    name: str
    error: float
    host_error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        found = f"error {self.error:.3e}, the host's own {self.host_error:.3e}, bound {self.bound:.3e}"
        return f"{self.name}: {found}: {'within' if self.ok else 'EXCEEDED'}"


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify_patch` found; `ok` where every output and gradient is within its bound, `str()` for reading.

    outputs    the largest error of each output tensor
    gradients  the Euclidean norm of the error, of each module with parameters and of each input
    left       why gradients were not compared; None: they were
    psnr       in dB, of the sample at the end of a short run, patched against unpatched: how far roundings carry. The
               peak is the range of the unpatched one's values; inf where they agree to the bit. None for a model that
               does not sample, or whose input is not of its output's kind. It has no part in `ok`
    """

    outputs: tuple[Check, ...]
    gradients: tuple[Check, ...] = ()
    left: str | None = None
    psnr: float | None = None

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.outputs + self.gradients)

    def __str__(self) -> str:
        lines = [str(check) for check in self.outputs]
        lines += [str(check) for check in self.gradients if not check.ok]
        if self.left:
            lines.append(f"gradients: not compared, {self.left}")
        elif all(check.ok for check in self.gradients):
            nearest = max(self.gradients, key=lambda check: check.error / check.bound if check.bound else 0.0)
            lines.append(f"{len(self.gradients)} gradients within their bounds, nearest to it: {nearest}")
        if self.psnr is not None:
            lines.append(f"PSNR {self.psnr:.1f} dB after {STEPS} sampling steps, patched against unpatched")
        return "\n".join(lines if self.ok else [*lines, "the model is unpatched again"])


def verify_patch(model: Any, *inputs: Any, gradients: bool = True, **kwargs: Any) -> Verification:
    """Run a patched model, itself unpatched, and an fp64 copy of that on the same inputs, and compare outputs and
    gradients. A model that fails is unpatched.

    model            a patched model, or a pipeline with patched parts, each of which is verified on inputs of its own
    inputs, kwargs   what the model is called with; none: small random ones, made from its config
    gradients        compare the gradients of all parameters and floating-point inputs as well; where parameters are
                     not at hand (offloaded, sharded) the result says that they were not compared

    An output fails where its largest error against fp64 is more than twice the unpatched model's plus one rounding to
    the output's dtype (`sora_kernels.testing.error_bound`), of these inputs and of them made smaller by 1/64 and 2/64.
    The gradients of a module's parameters, together, fail where their error in the Euclidean norm exceeds four times
    the host's, and what the host errs relatively on the whole, in three random sums of the outputs. All carry the
    roundings of what came before, so that of one run chance decides, and a fault shows in all three. A transformer also
    samples, patched and not: 8 steps, Euler's of a flow or DDIM's, from the noise of one seed, with the same text; the
    PSNR between the two ends is reported. Runs in eval mode; then everything, the mode of each module included, is as
    before. Needs memory for the copy, 8 bytes a parameter, for three sets of gradients, and the time of 20 calls and
    one in fp64, where an output errs of 6 more.

    Raises ValueError, and the model stays patched, for one that is not, that has no weights or of which an fp64 copy
    does not run, as with quantized weights, and where its outputs are not finite without the patch; TypeError where
    the output holds no tensor.
    """
    parts = {name: part for name, part in parts_of("verify_patch", model).items() if RECORD in vars(part)}
    if not parts:
        raise ValueError(f"verify_patch: this {type(model).__name__} is not patched; call patch_model first")
    if "" in parts:
        return _verify(model, inputs, kwargs, gradients)
    if inputs or kwargs:
        raise ValueError("verify_patch: inputs go to one model; pass pipe.transformer or pipe.vae, not a pipeline")
    found = {name: _verify(part, (), {}, gradients) for name, part in parts.items()}
    return Verification(
        _named(found, "outputs"),
        _named(found, "gradients"),
        "; ".join(f"{name}: {v.left}" for name, v in found.items() if v.left) or None,
        min((v.psnr for v in found.values() if v.psnr is not None), default=None),
    )


def _named(found: dict[str, Verification], kind: str) -> tuple[Check, ...]:
    checks = ((name, check) for name, v in found.items() for check in getattr(v, kind))
    return tuple(dataclasses.replace(check, name=f"{name} {check.name}") for name, check in checks)


@torch.inference_mode(False)
def _verify(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], gradients: bool) -> Verification:
    record = record_of("verify_patch", model)
    check_in_place("verify_patch", record.swaps)
    if reason := why_without_weights(model):
        raise ValueError(f"verify_patch: {reason}")
    host = host_of(model)
    if not inputs and not kwargs:
        inputs = host.example(model)
    inputs, kwargs = tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, (inputs, kwargs))
    left = None if gradients else "as asked"
    if any(p.is_meta or p.is_inference() or type(p) is not nn.Parameter for p in model.parameters()):
        left = "parameters are offloaded, sharded, quantized or made in inference mode"
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        end = _end(model, host, inputs, kwargs)
        with _undone(record.swaps):
            their_end, oracle = _end(model, host, inputs, kwargs), _widened(model)
        outputs: dict[str, Check] = {}
        for draw in range(DRAWS):
            runs = _outputs_of_three(model, record.swaps, oracle, _smaller(inputs, draw), _smaller(kwargs, draw))
            outputs |= {check.name: check for check in _output_checks(*runs) if draw == 0 or not outputs[check.name].ok}
            if all(check.ok for check in outputs.values()):
                break
        checks: dict[str, Check] = {}
        for draw in range(DRAWS if left is None else 0):
            runs = [_gradients(model, inputs, kwargs, draw)]
            with _undone(record.swaps):
                runs.append(_gradients(model, inputs, kwargs, draw))
            if not _finite(t for grads in runs[1].values() for t in grads):
                left, checks = "the unpatched model's are not finite", {}
                break
            with _FloatMeansDouble():
                runs.append(_gradients(oracle, _double(inputs), _double(kwargs), draw))
            checks |= {check.name: check for check in _gradient_checks(*runs) if draw == 0 or not checks[check.name].ok}
            if all(check.ok for check in checks.values()):
                break
    finally:
        for module, mode in modes:
            module.training = mode
    if not outputs:
        raise TypeError("verify_patch: the output of the model must hold floating-point tensors; none was found")
    psnr = None if end is None else _psnr(end, their_end)
    found = Verification(tuple(outputs.values()), tuple(checks.values()), left, psnr)
    if not found.ok:
        unpatch_model(model)
    return found


def _widened(model: nn.Module) -> nn.Module:
    """An fp64 copy of an unpatched model."""
    try:
        return copy.deepcopy(model).double()
    except RuntimeError as error:
        raise _no_copy(model, error) from error


def _no_copy(model: nn.Module, error: RuntimeError) -> ValueError:
    return ValueError(
        f"verify_patch: an fp64 copy of this {type(model).__name__} does not run: {error}. Quantized weights do not "
        "become fp64: verify the model before they are"
    )


def _outputs_of_three(
    model: nn.Module, swaps: list[Swap], oracle: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Of the patched model, the unpatched one, and its fp64 copy."""
    ours = _outputs(model, inputs, kwargs)
    with _undone(swaps):
        theirs = _outputs(model, inputs, kwargs)
    if lost := [name for name, output in theirs.items() if not _finite([output])]:
        raise ValueError(
            f"verify_patch: the unpatched {type(model).__name__} gives no finite {', '.join(lost)}, with which nothing "
            "can be compared; pass inputs, or load it in a dtype, for which it does"
        )
    try:
        with _FloatMeansDouble():
            return ours, theirs, _outputs(oracle, _double(inputs), _double(kwargs))
    except RuntimeError as error:
        raise _no_copy(oracle, error) from error


def _output_checks(ours: dict, theirs: dict, exact: dict) -> Iterator[Check]:
    for name, x in exact.items():
        yield Check(name, max_error(ours[name], x), max_error(theirs[name], x), error_bound(x, theirs[name]))


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(t.isfinite().all() for t in tensors)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    return dict(_tensors(model(*inputs, **kwargs)))


@torch.no_grad()
def _end(model: nn.Module, host: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return host.sample(model, STEPS, inputs, kwargs)


def _gradients(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], draw: int) -> dict[str, list[Tensor]]:
    """Of a random sum of the outputs, with respect to each input and to the parameters of each module."""
    generator, found = torch.Generator().manual_seed(draw), {}
    constants = getattr(host_of(model), "CONSTANTS", ())
    with torch.enable_grad():
        call = inspect.signature(model.forward).bind(*inputs, **kwargs)
        given = _leaves({name: value for name, value in call.arguments.items() if name not in constants})
        call.arguments |= given
        wanted = list(_tensors(given, "input"))
        wanted += [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        outputs = [output for _, output in _tensors(model(*call.args, **call.kwargs))]
        weights = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
        grads = torch.autograd.grad(outputs, [t for _, t in wanted], weights, allow_unused=True)
    for (name, _), grad in zip(wanted, grads, strict=True):
        if grad is not None:
            owner = name if name.startswith("input") else name.rpartition(".")[0] or name
            found.setdefault(f"gradient of {owner}", []).append(grad)
    return found


def _gradient_checks(ours: dict, theirs: dict, exact: dict) -> Iterator[Check]:
    """In the Euclidean norm, a module at a time: after some twenty operations chance decides which program errs more in
    its worst element, and a bias's gradient, a sum that may cancel, errs as the weight's does. The host counts as
    erring no less, relatively, than it does on the whole."""
    found = {}
    for name, grads in exact.items():
        if len(ours.get(name, ())) == len(theirs[name]) == len(grads):
            found[name] = [torch.cat([g.double().flatten() for g in run[name]]) for run in (ours, theirs, exact)]
        else:
            yield Check(name, math.inf, 0.0, 0.0)
    norm = torch.linalg.vector_norm
    whole = math.hypot(*(norm(b - x) for _, b, x in found.values()))
    whole /= math.hypot(*(norm(x) for _, _, x in found.values())) or 1.0
    for name, (a, b, x) in found.items():
        host_error, values = norm(b - x).item(), norm(x).item()
        bound = ROOM * max(host_error, whole * values) + torch.finfo(theirs[name][0].dtype).eps * values
        yield Check(name, norm(a - x).item(), host_error, bound)


def _psnr(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    peak = expected.max() - expected.min()
    return (10 * torch.log10(peak**2 / (actual - expected).square().mean())).item()


@contextlib.contextmanager
def _undone(swaps: list[Swap]) -> Iterator[None]:
    swaps = [swap for swap in swaps if swap.in_place()]
    for swap in swaps:
        swap.undo()
    try:
        yield
    finally:
        for swap in swaps:
            swap.apply()


class _FloatMeansDouble(TorchFunctionMode):
    """Hosts upcast by `.float()`, `.to(torch.float32)` and `dtype=`, which would bring an fp64 run down to fp32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.float:
            func = Tensor.double
        elif args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            args = [torch.float64 if a is torch.float32 else a for a in args]
            kwargs = {key: torch.float64 if a is torch.float32 else a for key, a in kwargs.items()}
        return func(*args, **kwargs)


def _leaves(value: Any) -> Any:
    """The same with each floating-point tensor a leaf that asks for its gradient."""
    return _each(value, lambda t: t.detach().requires_grad_())


def _smaller(value: Any, draw: int) -> Any:
    """The same with other roundings, by what is no mask and no time made smaller by draw / 64; at first as it is."""
    return _each(value, lambda t: t * (1 - draw / 64) if draw and t.ndim > 2 else t)


def _double(value: Any) -> Any:
    return _each(value, Tensor.double)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with each floating-point tensor changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _each(item, change) for key, item in value.items()}
    return type(value)(_each(item, change) for item in value) if type(value) in (list, tuple) else value


def _tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}[{i}]")
