"""Weights that a file keeps in fp8, plain or with a scale beside each: W = scale * stored.

Plain casts have no scale. ComfyUI's files have X.scale_weight and a tensor named scaled_fp8, or X.weight_scale and a
note X.comfy_quant; scales of activations, which stay in the model's dtype here, have no effect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from .checkpoint import CheckpointError

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


def _format(note: Tensor) -> object:
    try:
        return json.loads(bytes(note.tolist()))["format"]
    except (ValueError, TypeError, KeyError):
        return note.tolist()[:20]
