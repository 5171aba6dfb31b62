"""Weights that a file keeps in fp8, plain or with a scale beside each: W = scale * stored.

Widened when they are read; or kept so, and widened by each layer as it runs, to the same bits. Plain casts have no
scale. ComfyUI's files have X.scale_weight and a tensor named scaled_fp8, or X.weight_scale and a note X.comfy_quant;
scales of activations, which stay in the model's dtype here, have no effect.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import FP8, CheckpointError

T = TypeVar("T")
_SCALES = (".scale_weight", ".weight_scale")
_NOTES = (".scale_input", ".input_scale", ".comfy_quant")
_FORMATS = ("float8_e4m3fn", "float8_e5m2")


def weights(named: Mapping[str, T]) -> dict[str, T]:
    """Of what a file holds, by name: without scales and notes."""
    return {name: value for name, value in named.items() if not name.endswith((*_SCALES, *_NOTES, "scaled_fp8"))}


def scales(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The scale of each weight that has one, by the weight's name: a number, or one for each row.

    Raises `CheckpointError` for another quantisation, by its name, and for a scale without a weight or of another size.
    """
    found = {}
    for name, value in state.items():
        if name.endswith(".comfy_quant") and (kind := _format(value)) not in _FORMATS:
            raise CheckpointError(
                f"{where}: {name.removesuffix('.comfy_quant')!r} is quantised as {kind!r}; read are "
                f"{' and '.join(_FORMATS)}: take the model in one of these, or unquantised"
            )
        if name.endswith(_SCALES):
            weight = f"{name.rpartition('.')[0]}.weight"
            rows = state[weight].shape[:1] if weight in state else ()
            if weight not in state or value.numel() not in (1, *rows):
                raise CheckpointError(
                    f"{where}: {name!r} must be the scale of {weight!r}, one number or {list(rows)}; got "
                    f"{list(value.shape)}"
                )
            found[weight] = value
    return found


def widened(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale * stored, multiplied in fp32."""
    if scale is None:
        return stored.to(dtype)
    return (stored.float() * scale.float().view(-1, *[1] * (stored.ndim - 1))).to(dtype)


def stays(name: str, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a transformer's weight, by our name, can be kept in fp8: those of the blocks' linear layers."""
    return dtype in FP8 and len(shape) == 2 and name.startswith("blocks.")


def room(shapes: Sequence[Sequence[int]]) -> int:
    """Bytes that the largest of such weights takes while it is widened: stored in fp32, and times its scale."""
    return max((8 * math.prod(shape) for shape in shapes), default=0)


class Linear(nn.Linear):
    """W x + b, where W stays in fp8 and is widened to x's dtype each time that it is used.

    W takes no gradient; x and b do. In W's place may come one of x's dtype, which is used as it is. By a conversion to
    another dtype, `module.half()` say, W is widened for good.
    """

    def __init__(self, linear: nn.Linear, scale: Tensor | None) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = nn.Parameter(linear.weight.detach(), requires_grad=False), linear.bias
        self.register_buffer("scale_weight", scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype in FP8 and self.weight.requires_grad and torch.is_grad_enabled():
            raise TypeError(
                "a weight that is kept in fp8 takes no gradient: load the model by SoraDiT.from_wan(...), which widens "
                "its weights, or train what is beside them"
            )
        return F.linear(x, self.wide(self.weight, x.dtype), self.bias)

    def wide(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """This layer's weight, as it is stored or as it was, in `dtype`; one that is not in fp8 as it is."""
        return widened(weight.detach(), self.scale_weight, dtype) if weight.dtype in FP8 else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if self.weight.dtype in FP8 and fn(self.weight.detach()[:0]).dtype not in FP8:  # the scale would be lost
            self.weight.data, self.scale_weight = self.wide(self.weight, torch.float32), None
        return super()._apply(fn, recurse)


def keep(model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Makes a `Linear` of each linear layer of which the weight is in fp8; scales by the weights' names."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear.weight.dtype in FP8:
            model.set_submodule(name, Linear(linear, scales.get(f"{name}.weight")))


def kept(model: nn.Module) -> list[Tensor]:
    """The weights that a model keeps in fp8."""
    return [m.weight for m in model.modules() if isinstance(m, Linear) and m.weight.dtype in FP8]


def _format(note: Tensor) -> object:
    try:
        return json.loads(bytes(note.tolist()))["format"]
    except (ValueError, TypeError, KeyError):
        return note.tolist()[:20]
