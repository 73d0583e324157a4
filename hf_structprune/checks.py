"""Checks of options that several configurations share; messages name the option, the value and what is allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .errors import ConfigurationError


def is_number(value: Any) -> bool:
    """Whether it is a number, which a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuses a value that is none of the allowed ones."""
    if value not in allowed:
        raise ConfigurationError(f"`{name}` is {value!r}; allowed values are {', '.join(map(str, allowed))}.")


def check_int(name: str, value: Any, minimum: int) -> None:
    """Refuses what is no integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigurationError(f"`{name}` is {value!r}; it must be an integer of at least {minimum}.")


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Refuses what is no number from `least` to `most`."""
    if not (is_number(value) and least <= value <= most):
        raise ConfigurationError(f"`{name}` is {value!r}; it must be a number from {least:g} to {most:g}.")


def check_keys(cls: type, values: dict[str, Any]) -> None:
    """Refuses a dictionary with a key that is no field of a dataclass."""
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ConfigurationError(
                f"`{key}` is not an option of {cls.__name__}; the options are {', '.join(known)}."
            )
