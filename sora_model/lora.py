"""LoRA files: changes of low rank to a transformer's weights, W' = W + weight * alpha/rank * B A (arXiv 2106.09685).

Of any of the layouts that are about: diffusers and PEFT (lora_A, lora_B), Wan's own names (lora_down, lora_up, alpha,
and whole differences of weights and biases), and those flattened with underscores. Merged into the weights; the weights
themselves are kept, and come back to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CheckpointError, read_metadata, read_tensors
from .dit import SoraDiT, own_name

_KEY = re.compile(r"(?P<path>.+?)\.(?P<kind>lora_\w+(?:\.default)?\.(?:weight|bias)|alpha|diff|diff_b)")
_KINDS = {
    "lora_A.weight": "down", "lora_down.weight": "down", "lora_B.weight": "up", "lora_up.weight": "up",
    "lora_B.bias": "up_bias", "lora_up.bias": "up_bias", "alpha": "alpha", "diff": "whole", "diff_b": "whole_bias",
}  # fmt: skip
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_FLAT, _SECOND = "lora_unet_", "transformer_2."
_MOST = 10  # names that an error lists


@dataclasses.dataclass
class Change:
    """Of one weight: `scale` * up @ down, which is no more than these until it is asked for, and `whole`."""

    up: Tensor | None = None
    down: Tensor | None = None
    scale: float = 1.0
    whole: Tensor | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        rows, size = shape[0], math.prod(shape)
        low = self.up is None or (self.up.shape[0] == rows and self.down[0].numel() * rows == size)
        return low and (self.whole is None or (self.whole.shape[0] == rows and self.whole.numel() == size))

    def of(self, own: Tensor) -> Tensor:
        """In fp32, in the shape and on the device of the weight."""
        total = torch.zeros(own.shape, dtype=torch.float32, device=own.device)
        if self.up is not None:
            up, down = (t.to(own.device, torch.float32).flatten(1) for t in (self.up, self.down))
            total += self.scale * (up @ down).view(own.shape)
        return total if self.whole is None else total + self.whole.to(total).view(own.shape)


class LoRAs:
    """What is merged into one transformer. Weights are summed in fp32 from those that it had, whatever came before.

    Those are kept in the CPU's memory.
    """

    def __init__(self, dit: SoraDiT) -> None:
        self.dit = dit
        self._kept: dict[str, Tensor] = {}
        self._added: list[tuple[Mapping[str, Change], float]] = []

    def add(self, changes: Mapping[str, Change], weight: float) -> None:
        """Changes as `read` gives them, times `weight`."""
        self._added.append((changes, weight))
        for name in changes:
            parameter = self.dit.get_parameter(name)
            own = self._kept.setdefault(name, parameter.data.cpu()).to(parameter.device)
            total = own.float() + sum(w * c[name].of(own) for c, w in self._added if name in c)
            parameter.data = total.to(own.dtype)

    def clear(self) -> None:
        """The weights are what they were, to the bit."""
        for name, own in self._kept.items():
            parameter = self.dit.get_parameter(name)
            parameter.data = own.to(parameter.device)
        self._kept, self._added = {}, []


def parse(text: str) -> tuple[str, float, str | None]:
    """(file, weight, expert) of "FILE", "FILE:0.8" or "FILE:0.8:low"."""
    expert = next((name for name in ("high", "low", "both") if text.endswith(f":{name}")), None)
    file = text.removesuffix(f":{expert}")
    head, _, tail = file.rpartition(":")
    try:
        return (head, float(tail), expert) if head else (file, 1.0, expert)
    except ValueError:
        return file, 1.0, expert


def read(path: str | os.PathLike[str], dit: SoraDiT) -> tuple[dict[str, Change], dict[str, Change]]:
    """The changes in a file, by the names of the weights: of `dit`, and those that are of a second one of its size.

    Raises `CheckpointError` for a file that holds something else, or changes of weights that are not there or of
    another shape.
    """
    state, where = read_tensors(path, also=(torch.int64, torch.int32)), os.fspath(path)
    settings, modules = _settings(path), _modules(dit)
    found: tuple[dict[str, dict[str, Tensor]], ...] = ({}, {})
    unknown = []
    for key, value in state.items():
        match = _KEY.fullmatch(key)
        second = key.startswith(_SECOND)
        module = match and _own_path(match["path"].removeprefix(_SECOND), modules)
        kind = match and _KINDS.get(match["kind"].replace(".default", ""))
        if not module or not kind:
            unknown.append(key)
            continue
        parts = found[second].setdefault(module, {})
        parts[kind] = value
        if kind == "down" and (alpha := _alpha(settings, match["path"], len(value))) is not None:
            parts.setdefault("alpha", torch.tensor(alpha))
    if len(unknown) == len(state):
        raise CheckpointError(f"{where} holds no LoRA of this model: its first tensor is {next(iter(state), '')!r}")
    if unknown:
        more = ", ..." if len(unknown) > _MOST else ""
        raise CheckpointError(
            f"{where} changes {len(unknown)} weights that are unknown here: {', '.join(sorted(unknown)[:_MOST])}{more}"
        )
    shapes = {name: tuple(p.shape) for name, p in dit.named_parameters()}
    return tuple(_checked(modules, shapes, where) for modules in found)


def _modules(dit: SoraDiT) -> dict[str, str]:
    """Our name of each module with weights by that name, and by Wan's own with underscores for points."""
    names = {name.removesuffix(".weight").removesuffix(".bias") for name, _ in dit.named_parameters()}
    flat = {name: name.replace("k_image", "k_img").replace("v_image", "v_img").replace(".", "_") for name in names}
    flat |= {"head": "head_head"} | {n: f.replace("cross_norm", "norm3") for n, f in flat.items() if "cross_norm" in n}
    return {name: name for name in names} | {other: name for name, other in flat.items()}


def _own_path(path: str, modules: Mapping[str, str]) -> str | None:
    for prefix in _PREFIXES:
        path = path.removeprefix(prefix)
    if path.startswith(_FLAT):
        return modules.get(path.removeprefix(_FLAT))
    return modules.get(own_name(f"{path}.weight").removesuffix(".weight"))


def _settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What PEFT keeps beside the tensors."""
    try:
        found = json.loads(read_metadata(path).get("lora_adapter_metadata", "{}"))
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _alpha(settings: Mapping[str, Any], path: str, rank: int) -> float | None:
    """PEFT's, for a module that it may name."""
    prefix, _, module = path.partition(".")
    alpha = settings.get(f"{prefix}.lora_alpha")
    for name, own in (settings.get(f"{prefix}.alpha_pattern") or {}).items():
        alpha = own if module == name or module.endswith(f".{name}") else alpha
    return alpha * math.sqrt(rank) if alpha is not None and settings.get(f"{prefix}.use_rslora") else alpha


def _checked(
    modules: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Change]:
    changes = {}
    for module, parts in modules.items():
        up, down = parts.get("up"), parts.get("down")
        if (up is None) != (down is None) or (up is not None and up.shape[1] != len(down)):
            raise CheckpointError(f"{where} holds halves of the LoRA of {module!r} that do not go together")
        scale = parts["alpha"].item() / len(down) if "alpha" in parts and down is not None else 1.0
        weight, bias = module if module in shapes else f"{module}.weight", f"{module}.bias"
        if up is not None or "whole" in parts:
            changes[weight] = Change(up, down, scale, parts.get("whole"))
        whole = [scale * parts["up_bias"].float()] if "up_bias" in parts else []
        whole += [parts["whole_bias"].float()] if "whole_bias" in parts else []
        if whole:
            changes[bias] = Change(whole=sum(whole))
    for name, change in changes.items():
        if name not in shapes or not change.fits(shapes[name]):
            raise CheckpointError(
                f"{where} changes {name!r}, which is {shapes.get(name)} here, in another shape: the LoRA is of a model "
                "of another size"
            )
    return changes
