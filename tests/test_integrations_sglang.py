"""The plugin of SGLang-diffusion, by a stand-in of its hook registry and of the layers that it goes around."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import pkgutil
import sys
import types
from enum import Enum

import pytest
import torch
from torch import nn

from sora_kernels.integrations import _host, sglang
from sora_kernels.testing import assert_matches_oracle


class HookType(Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


def stand_in_registry():
    class HookRegistry:
        """As the host's: hooks are kept by the dotted path of their target, and put in place all at once."""

        hooks = {}

        @classmethod
        def register(cls, target, hook, hook_type=HookType.AFTER, *, source=None):
            cls.hooks.setdefault(target, []).append((hook_type, hook))

        @classmethod
        def apply_hooks(cls):
            for target, hooks in cls.hooks.items():
                path, name = target.rsplit(".", 1)
                owner = pkgutil.resolve_name(path)
                original = getattr(owner, name)
                for hook_type, hook in hooks:
                    assert hook_type is HookType.AROUND
                    original = functools.wraps(original)(functools.partial(_call, hook, original))
                setattr(owner, name, _method(original))

    return HookRegistry


def _call(hook, original, *args, **kwargs):
    return hook(original, *args, **kwargs)


def _method(function):
    def method(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    return method


def stand_in_layers():
    """The two base classes, with the arithmetic of the host's native forward; `native` counts its calls."""
    layers = types.ModuleType(sglang.LAYERS)

    class Base(nn.Module):
        def __init__(self, hidden_size, eps=1e-6, elementwise_affine=False):
            super().__init__()
            rms = self.norm_type == "rms"
            affine = {"elementwise_affine": elementwise_affine or rms}
            self.eps, self.native = eps, 0
            self.norm = (nn.RMSNorm if rms else nn.LayerNorm)(hidden_size, eps=eps, **affine)

    def modulate(normed, scale, shift):
        if scale.ndim == 4:
            frames = normed.unflatten(1, (scale.shape[1], -1))
            return (frames * (1 + scale) + shift).flatten(1, 2)
        return normed * (1 + scale) + shift

    class _ScaleResidualNormScaleShift(Base):
        def forward_cpu(self, residual, x, gate, shift, scale):
            self.native += 1
            if isinstance(gate, torch.Tensor) and gate.ndim == 4:
                x = (x.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)
            else:
                x = x * gate
            return modulate(self.norm(residual + x), scale, shift), residual + x

        forward_cuda = forward_cpu

    class _NormScaleShift(Base):
        def forward_cpu(self, x, shift, scale):
            self.native += 1
            return modulate(self.norm(x), scale, shift)

        forward_cuda = forward_cpu

    for base in (_ScaleResidualNormScaleShift, _NormScaleShift):
        setattr(layers, base.__name__, base)
    layers.gated = {n: type(n, (_ScaleResidualNormScaleShift,), {"norm_type": n}) for n in ("layer", "rms")}
    layers.plain = {n: type(n, (_NormScaleShift,), {"norm_type": n}) for n in ("layer", "rms")}
    return layers


@pytest.fixture
def host(monkeypatch):
    """The layers, hooked."""
    layers = stand_in_layers()
    plugins = types.ModuleType("sglang.multimodal_gen.runtime.platforms.plugins")
    plugins.HookRegistry, plugins.HookType = stand_in_registry(), HookType
    for module in (layers, plugins):
        parent = module.__name__
        while parent := parent.rpartition(".")[0]:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    for module in (layers, plugins):
        package, _, name = module.__name__.rpartition(".")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(sys.modules[package], name, module)
    sglang.register()
    plugins.HookRegistry.apply_hooks()
    return layers


def compare(layer, unhooked, *arguments):
    """The hooked layer against the host's own forward in fp64, by the error rule; with gradients of the tensors."""
    runs = {}
    for name, forward, double in (("ours", type(layer).forward_cpu, False), ("plain", unhooked, False),
                                  ("exact", unhooked, True)):  # fmt: skip
        module = layer.double() if double else layer.float()
        cast = [a.double() if double and isinstance(a, torch.Tensor) else a for a in arguments]
        leaves = [a.detach().requires_grad_() for a in cast if isinstance(a, torch.Tensor)]
        rest = iter(leaves)
        outputs = forward(module, *[next(rest) if isinstance(a, torch.Tensor) else a for a in cast])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        ones = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o) for o in outputs]
        runs[name] = [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, ones)]
    for i, (ours, plain, exact) in enumerate(zip(*runs.values(), strict=True)):
        summed = max(arguments[0].numel() // ours.numel(), 1)
        assert_matches_oracle(ours, exact, plain, f"result {i}", terms=summed)


ROWS = {
    "[B, 1, D]": (2, 1, 24), "[1, 1, D]": (1, 1, 24), "[B, S, D]": (2, 12, 24), "[B, F, 1, D]": (2, 3, 1, 24),
    "[D]": (24,),
}  # fmt: skip


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("gate", ["a tensor", "1", "0.5"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gated_residual_and_norm(host, norm, affine, gate, rows):
    unhooked = stand_in_layers().gated[norm].forward_cpu
    layer = host.gated[norm](24, elementwise_affine=affine)
    shape = ROWS[rows]
    gate = torch.randn(shape) if gate == "a tensor" else float(gate) if "." in gate else int(gate)
    residual, x, (shift, scale) = *torch.randn(2, 2, 12, 24), torch.randn(2, *shape)
    compare(layer, unhooked, residual, x, gate, shift, scale)
    assert layer.native == 2  # the two of `unhooked`


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_and_modulation(host, norm, rows):
    layer = host.plain[norm](24, elementwise_affine=True)
    shift, scale = torch.randn(2, *ROWS[rows])
    compare(layer, stand_in_layers().plain[norm].forward_cpu, torch.randn(2, 12, 24), shift, scale)
    assert layer.native == 2


def test_other_forms_are_the_hosts(host):
    layer = host.plain["layer"](24)
    x, row = torch.randn(2, 12, 24), torch.randn(2, 1, 24)
    for arguments in ((x[0], row[0, 0], row[0, 0]), (x[:1], torch.randn(3, 12, 24), row), (x, row[:, :, :1], "scale")):
        before = layer.native
        with contextlib.suppress(TypeError, RuntimeError, AttributeError):  # which the host's own arithmetic raises
            layer.forward_cpu(*arguments)
        assert layer.native == before + 1


def test_the_entry_point_names_the_function():
    project = (pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text()
    group = project.partition('[project.entry-points."sglang.multimodal_gen.plugins"]\n')[2]
    name, _, target = group.partition("\n")[0].partition(" = ")
    assert name == "sora" and pkgutil.resolve_name(target.strip('"')) is sglang.register


def test_a_missing_or_old_host_is_named(monkeypatch):
    monkeypatch.setattr(_host, "release", lambda distribution: (0, 5, 9))
    with pytest.raises(ImportError, match="needs sglang >= 0.5.23 for a plugin of its.*; found 0.5.9: pip install -U"):
        sglang.register()
