"""What a config and its fields must be. Each ValueError names the field, what was expected and what came."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}; got {reprlib.repr(value)}")


def number(name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= most:
        raise ValueError(f"{name} must be a number from {least:g} to {most:g}; got {reprlib.repr(value)}")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false; got {reprlib.repr(value)}")


def several(name: str, value: Any) -> tuple:
    """`value` as a tuple, of a list or a tuple."""
    if not isinstance(value, tuple | list):
        raise ValueError(f"{name} must be a list; got {reprlib.repr(value)}")
    return tuple(value)


def of_kind(config: Mapping[str, Any], kind: str) -> None:
    """That of diffusers' class `kind`, or of none that it names."""
    if (found := config.get("_class_name", kind)) != kind:
        raise ValueError(f"not the config of a {kind}, but of a {found}, which computes something else")


def only(config: Mapping[str, Any], kind: str, fields: Iterable[str]) -> None:
    """A config of diffusers' class `kind` with none but these fields: one that is read nowhere would have no effect.

    Fields that begin with an underscore are notes.
    """
    of_kind(config, kind)
    if unknown := sorted(name for name in config.keys() - set(fields) if not name.startswith("_")):
        raise ValueError(
            f"{unknown[0]}={reprlib.repr(config[unknown[0]])} is no field of a {kind} that is known here, so what it "
            "asks for would be missing; if the model is one without it, delete it from the config"
        )


def config_of(model: nn.Module, kind: str, *methods: str) -> dict[str, Any]:
    """The config of a diffusers model, which must be of class `kind`, or of a subclass that leaves these methods be."""
    for cls in type(model).__mro__:
        if cls.__name__ == kind and cls.__module__.split(".")[0] == "diffusers":
            break
    else:
        raise ValueError(f"is a {type(model).__name__}, not a {kind} of diffusers")
    for name in methods:
        if getattr(type(model), name) is not getattr(cls, name):
            raise ValueError(f"is a {type(model).__name__}, which has a {name} of its own, not that of {kind}")
    return {**model.config, "_class_name": kind}
