"""What the fields of a config must be. Each ValueError names the field, what was expected and what came."""

from __future__ import annotations

import reprlib
from numbers import Real
from typing import Any


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
