"""Formulas for torch.utils.flop_counter, which sees a private op as one call of unknown cost.

Importing the counter imports triton, so the formulas wait until somebody else does.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable

import torch

from . import _library

COUNTER = "torch.utils.flop_counter"
_formulas: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {}


def register(op: str, formula: Callable[..., int]) -> None:
    """`formula(*args, out_val=None)` of `op`'s arguments counts its useful operations, whatever implements it."""
    packets = [overload._overloadpacket for overload in _library.overloads(op)]
    _formulas.update(dict.fromkeys(packets, formula))
    if COUNTER in sys.modules:
        _hand_over(packets)


def _hand_over(packets) -> None:
    for packet in packets:
        sys.modules[COUNTER].register_flop_formula(packet, get_raw=True)(_formulas[packet])


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds the counter as anybody would, and adds the formulas once it has run."""

    def find_spec(self, name, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module) -> None:
            run(module)
            _hand_over(_formulas)

        spec.loader.exec_module = exec_module
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
