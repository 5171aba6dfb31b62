"""Tiny random models of other libraries, one file a family, and what to compare of them.

`CASES` of a file, by name; tests/test_hosts.py does the same things to all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Mapping

import torch
from torch.utils._pytree import keystr, tree_leaves_with_path, tree_map_only

from sora_kernels.integrations import patch, verify
from sora_kernels.testing import assert_matches_oracle


@dataclasses.dataclass(frozen=True)
class Case:
    """make() gives the model, all weights random; inputs(model) what it is called with, by position or as a dict.

    steps     of the report: the operations of a step, joined by ", " -> how many such steps are replaced
    left      of the report: where -> the reason, of each step that is left; or the reason -> how many are
    lora      names of the linear layers that get adapters
    compiled  names of the children that are lists of repeated blocks
    draws     inputs to take together: the gradient of six parameters says little of one
    """

    make: Callable[[], torch.nn.Module]
    inputs: Callable[[torch.nn.Module], tuple | dict]
    steps: Mapping[str, int]
    left: Mapping[str, str | int] = dataclasses.field(default_factory=dict)
    lora: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()
    draws: int = 1


def cases() -> dict[str, Case]:
    found = {}
    for file in sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py")):
        found |= importlib.import_module(f"{__package__}.{file.stem}").CASES
    return found


def random_weights(model: torch.nn.Module, *more: str) -> torch.nn.Module:
    """Every vector, and parameters with one of these words in their name, moved away from its initial value."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or any(word in name for word in more):
                p.add_(torch.randn_like(p), alpha=0.2)
    return model


def call(model, inputs):
    """The first output of the model, called with a tuple by position or with a dict by name."""
    if isinstance(inputs, dict):
        return model(**inputs, return_dict=False)[0]
    return model(*inputs, return_dict=False)[0]


def output(model, *args, **kwargs):
    with torch.no_grad():
        return call(model, kwargs or args)


def run(model, *args, **kwargs):
    """Output and gradients of a fixed loss: {"output", "input['<name>']", "<parameter>": its gradient}, or zeros
    (Mochi's last block computes queries of the text, to no effect).

    Floating-point inputs take the dtype of the model's parameters.
    """
    dtype = next(model.parameters()).dtype
    inputs = kwargs or dict(enumerate(args))
    constants = getattr(patch.host_of(model), "CONSTANTS", ())
    inputs = tree_map_only(is_float, lambda value: value.detach().to(dtype), inputs)
    wanted = {k: v for k, v in tree_leaves_with_path(inputs) if is_float(v) and k[0].key not in constants}
    wanted = {f"input{keystr(key)}": value.requires_grad_() for key, value in wanted.items()}
    out = call(model, inputs if kwargs else tuple(inputs.values()))
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
    wanted |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((out * weights).sum(), list(wanted.values()), allow_unused=True)
    pairs = zip(wanted.items(), grads, strict=True)
    return {"output": out.detach()} | {n: torch.zeros_like(v) if g is None else g for (n, v), g in pairs}


def exactly(model, *args, **kwargs):
    """`run` of an unpatched model in fp64."""
    with verify._FloatMeansDouble():
        exact = run(copy.deepcopy(model).double(), *args, **kwargs)
    assert all(value.dtype == torch.float64 for value in exact.values())
    return exact


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def assert_rounds_like(baseline, actual, oracle):
    """The project's error rule; for the gradients of a whole model per module, in the Euclidean norm. Lists of runs are
    taken together.

    After some twenty operations chance decides which program errs more in its worst element, and a bias's
    gradient, a sum that may cancel, carries the errors of the weight's: they are taken together. What the oracle has as
    zero must be zero: the last queries of a text, say, that nothing asks for.
    """
    runs = [[r] if isinstance(r, dict) else r for r in (baseline, actual, oracle)]
    assert all(ours.keys() == exact.keys() for ours, exact in zip(*runs[1:], strict=True))
    plain, ours, exact = (torch.cat([r["output"].flatten() for r in rs]) for rs in runs)
    assert_matches_oracle(ours, exact, plain)
    modules = {}
    for name in oracle[0] if isinstance(oracle, list) else oracle:
        modules.setdefault(name if name.startswith("input") else name.rpartition(".")[0] or name, []).append(name)
    for module, names in modules.items():
        plain, ours, exact = (torch.cat([r[n].double().flatten() for r in rs for n in names]) for rs in runs)
        error, values = (ours - exact).norm().item(), exact.norm().item()
        bound = 2 * (plain - exact).norm().item() + torch.finfo(runs[1][0][names[0]].dtype).eps * values
        assert error <= bound, f"{module}: {error:.3e} exceeds {bound:.3e}, of {values:.3e}"


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, state):
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
