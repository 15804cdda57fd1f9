"""The checks that every configuration is made of: what a value must be, and the error that says so."""

from __future__ import annotations

import sys
from typing import Any

from .errors import ConfigError


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    """Refuse a field's value unless ``holds``.

    Raises:
        ConfigError: names the field, the value, and what was expected.
    """
    if not holds:
        raise ConfigError(f"{name}: {value!r}, expected {expected}")


def is_integer(value: Any) -> bool:
    """Whether a value is an integer; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def require_integer(name: str, value: Any, least: int) -> None:
    """Refuse a field's value unless it is an integer of at least ``least``.

    Raises:
        ConfigError: names the field.
    """
    require(is_integer(value) and value >= least, name, value, f"an integer >= {least}")
