"""LoRA files: changes of low rank to a transformer's weights, W' = W + weight * alpha/rank * B A (arXiv 2106.09685).

Of any of the layouts that are about: diffusers and PEFT (lora_A, lora_B), Wan's own names (lora_down, lora_up, alpha,
and whole differences of weights and biases), and those flattened with underscores. Merged into the weights, or kept
apart, y = W x + weight * alpha/rank * B A x, as beside weights that stay in fp8; the weights come back to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .alike import checksum, sum_of_bits
from .checkpoint import FP8, CheckpointError, read_metadata, read_tensors
from .dit import SoraDiT, own_name
from .planning import number
from .safety.credentials import hash_file

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


class Branch(nn.Module):
    """weight * scale * up @ down @ x, beside a linear layer in whose dtype it is; `like` is that layer's bias."""

    def __init__(self, change: Change, weight: float, like: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.scale = weight, change.scale
        for name, half in (("down", change.down), ("up", change.up)):
            half = half.flatten(1).to(like.device, like.dtype)
            setattr(self, name, nn.Parameter(half, requires_grad=like.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.scale * F.linear(F.linear(x, self.down), self.up)


def _beside(linear: nn.Linear, inputs: tuple[Tensor], y: Tensor) -> Tensor:
    """A forward hook: what the branches give is added to the layer's own result."""
    return sum((branch(*inputs) for branch in linear.branches), y)


@dataclasses.dataclass
class _Added:
    """A file's changes: some merged into the weights, some in branches."""

    merged: Mapping[str, Change]
    apart: list[tuple[nn.Linear, Branch]]
    weight: float
    file: str


class LoRAs:
    """The changes of one transformer. Weights that are merged are summed in fp32 from those that it had, whatever came
    before; these are kept in the CPU's memory.
    """

    def __init__(self, dit: SoraDiT) -> None:
        self.dit = dit
        self._kept: dict[str, Tensor] = {}
        self._added: list[_Added] = []
        self._hooks: dict[nn.Linear, Any] = {}

    def __len__(self) -> int:
        """How many files were added."""
        return len(self._added)

    def add(
        self, changes: Mapping[str, Change], weight: float, *, merge: bool | None = None, file: str = ""
    ) -> None:
        """Changes as `read` gives them, times `weight`. Not merged, those of low rank of the blocks' and embeddings'
        linear layers are kept apart; others, of which a branch would be no smaller, are merged all the same. None:
        merged, save into weights that are kept in fp8."""
        called = {f"{name}.weight": m for name, m in self.dit.named_modules() if isinstance(m, nn.Linear)}
        del called["head.weight"]  # is read by final_layer
        may = {n for n, m in called.items() if merge is False or (merge is None and m.weight.dtype in FP8)}
        low = {n: c for n, c in changes.items() if n in may and c.whole is None}
        apart = [(called[n], Branch(c, weight, called[n].bias)) for n, c in low.items()]
        for linear, branch in apart:
            if linear not in self._hooks:
                linear.branches, self._hooks[linear] = nn.ModuleList(), linear.register_forward_hook(_beside)
            linear.branches.append(branch)
        self._added.append(_Added({n: c for n, c in changes.items() if n not in low}, apart, weight, file))
        self._merge(self._added[-1].merged)

    def told(self) -> list[str]:
        """The files and their weights, for a record."""
        return [f"{added.file} {added.weight:g}" for added in self._added]

    def checksum(self) -> str:
        """Of the files' weights and changes, for comparing within a run."""
        told: list[Any] = []
        for added in self._added:
            told.append((added.weight, [(branch.scale, checksum(branch)) for _, branch in added.apart]))
            for name, change in sorted(added.merged.items()):
                parts = change.up, change.down, change.whole
                told.append((name, change.scale, [None if part is None else sum_of_bits(part) for part in parts]))
        return f"{zlib.crc32(repr(told).encode()):08x}"

    def weigh(self, weights: Sequence[float]) -> None:
        """Other weights of the files, in the order in which they were added."""
        for added, weight in zip(self._added, weights, strict=True):
            added.weight = weight
            for _, branch in added.apart:
                branch.weight = weight
        self._merge(self._kept)

    def clear(self) -> None:
        """The weights are what they were, to the bit, and nothing is beside them."""
        self._added.clear()
        self._merge(self._kept)
        self._kept.clear()
        for linear, hook in self._hooks.items():
            hook.remove()
            del linear.branches
        self._hooks.clear()

    def _merge(self, names: Iterable[str]) -> None:
        for name in names:
            parameter = self.dit.get_parameter(name)
            if parameter.is_meta:  # of an expert whose weights are on other processes
                continue
            own = self._kept.setdefault(name, parameter.data.cpu()).to(parameter.device)
            changes = [a.weight * a.merged[name].of(own) for a in self._added if name in a.merged]
            if changes and own.dtype in FP8:
                linear = self.dit.get_submodule(name.removesuffix(".weight"))
                own = linear.wide(own, linear.bias.dtype)
            parameter.data = (own.float() + sum(changes)).to(own.dtype) if changes else own


class Loading:
    """The methods of `Sora` that take LoRA files."""

    def load_lora(
        self, path: str | os.PathLike[str], weight: float = 1.0, *, expert: str | None = None, merge: bool | None = None
    ) -> None:
        """Changes the transformer by a LoRA file, `weight` times; further files add to it.

        expert  of a checkpoint of two: "high", for much noise, "low" or "both"; None where the file names both itself
        merge   True: into the weights, which are kept beside; those in fp8 then take the memory of the model's dtype.
                False: as a branch beside each linear layer, which takes a little time in every step, and no copy of the
                weights. None: merged, save where weights are kept in fp8, which get a branch

        Nothing is changed where it raises: `CheckpointError` for a file of something else or of another size,
        ValueError for another expert.
        """
        weight = number("weight", weight, -100, 100)
        if merge is not None:
            checks.flag("merge", merge)
        first, second = read(path, self.dit)
        if self.second is None and (expert or second):
            raise ValueError(f"this checkpoint has one transformer; got expert={expert!r}, or a file for two of them")
        if self.second is not None and not second and expert not in ("high", "low", "both"):
            raise ValueError(
                f"expert must be 'high', 'low' or 'both': this checkpoint has two transformers, and the file does not "
                f"say which it is for; got {expert!r}"
            )
        if second and expert is not None:
            raise ValueError(f"expert must be None: the file names both transformers itself; got {expert!r}")
        self.turns.leave()
        file = " ".join(filter(None, (Path(path).name, hash_file(path), expert)))
        changes = {"high": (first, {}), "low": ({}, first), "both": (first, first)}.get(expert, (first, second))
        for loras, own in zip(self._loras, changes, strict=False):
            loras.add(own, weight, merge=merge, file=file)

    def weigh_loras(self, *weights: float) -> None:
        """Other weights of the LoRA files, one for each, in the order in which they were loaded.

        Of those that were not merged this is at once; others are summed anew.
        """
        weights = [number("weights", weight, -100, 100) for weight in weights]
        if len(weights) != (count := len(self._loras[0])):
            raise ValueError(f"weights must be {count}, one for each LoRA that is loaded; got {len(weights)}")
        self.turns.leave()
        for loras in self._loras:
            loras.weigh(weights)

    def unload_loras(self) -> None:
        """The transformer's weights as they were loaded, to the bit."""
        self.turns.leave()
        for loras in self._loras:
            loras.clear()


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
    where = os.fspath(path)
    if not os.path.exists(path):
        raise CheckpointError(f"there is no LoRA file {where!r}")
    state = read_tensors(path, also=(torch.int64, torch.int32))
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
        if kind == "down" and (alpha := _alpha(settings, match["path"], len(value), where)) is not None:
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


def _alpha(settings: Mapping[str, Any], path: str, rank: int, where: str) -> float | None:
    """PEFT's, for a module that it may name."""
    prefix, _, module = path.partition(".")
    alpha, patterns = settings.get(f"{prefix}.lora_alpha"), settings.get(f"{prefix}.alpha_pattern") or {}
    for name, own in patterns.items() if isinstance(patterns, dict) else ():
        alpha = own if module == name or module.endswith(f".{name}") else alpha
    if alpha is None:
        return None
    try:
        checks.number(f"{where}: lora_alpha", alpha, -1e6, 1e6)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return alpha * math.sqrt(rank) if settings.get(f"{prefix}.use_rslora") else alpha


def _halves(up: Tensor, down: Tensor) -> bool:
    """Do they go together? Of a rank of at least 1; of convolutions, one of the two sees the neighbours."""
    return up.ndim == down.ndim >= 2 and up.shape[1] == len(down) > 0 and up[0, 0].numel() == 1


def _checked(
    modules: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Change]:
    changes = {}
    for module, parts in modules.items():
        up, down = parts.get("up"), parts.get("down")
        if (up is None) != (down is None) or (up is not None and not _halves(up, down)):
            raise CheckpointError(f"{where} holds halves of the LoRA of {module!r} that do not go together")
        if "alpha" in parts and parts["alpha"].numel() != 1:
            raise CheckpointError(f"{where}: the alpha of {module!r} must be a number; got {parts['alpha'].tolist()!r}")
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
