"""The one checker of options: what a field of a dataclass may hold is read from its type.

`int`, `float`, `bool`, `str`, `None`, unions, lists, tuples, dictionaries and dataclasses are understood. `Annotated`
adds what a type cannot say: `Limits`, `OneOf`, `Described`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import types
from collections.abc import Collection, Mapping, Sequence, Set
from decimal import Decimal
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from .errors import ConfigurationError


_LONGEST = 120  # characters of a value in a message


@dataclasses.dataclass(frozen=True)
class Limits:
    """The ends between which a number has to lie; which of them are `open`, is not allowed itself."""

    least: float = -math.inf
    most: float = math.inf
    open: str = ""  # or "least", "most" or "both"

    def allow(self, value: float) -> bool:
        """Whether a number lies between them; NaN and infinity never do."""
        ends = {"": (), "least": (self.least,), "most": (self.most,), "both": (self.least, self.most)}[self.open]
        return _is_finite(value) and self.least <= value <= self.most and value not in ends

    def __str__(self) -> str:
        if self.most == math.inf:
            return "" if self.least == -math.inf else f" {'above' if self.open else 'of at least'} {self.least:g}"
        return f" from {self.least:g} to {self.most:g}"


@dataclasses.dataclass(frozen=True, eq=False)  # what is allowed need not be hashable
class OneOf:
    """The only values that are allowed."""

    allowed: Collection[Any]


@dataclasses.dataclass(frozen=True)
class Described:
    """What is allowed in words of its own, which stand behind "it must be"."""

    words: str


Count = Annotated[int, Limits(1)]  # of at least one
Number = Annotated[int, Limits(0)]  # counted from 0, such as a layer's or a seed
# A number of things, or a share of all there are. What is of one, is one thing.
Limit = Annotated[
    Annotated[int, Limits(1)] | Annotated[float, Limits(0, 1, open="both")],
    Described("a number of documents, or a share below 1"),
]
# The part of a model that goes.
Ratio = Annotated[float, Limits(0, 1, open="most"), Described("a number in [0, 1): 0.3 removes 30 %")]


class _Refused(Exception):
    """A value that a type does not allow: with the value, what is allowed, and what may have been meant."""

    def __init__(self, value: Any, rule: str, hint: str = "") -> None:
        self.value, self.rule, self.hint = value, rule, hint


def check_fields(config: Any) -> None:
    """Checks every field of a dataclass by its type, see `checked`, and brings it into the form that the type names.

    `"30%"`, `"0.3"`, `"1e-3"`, decimals, fractions, NumPy's numbers and tensors of one number become plain numbers,
    arrays and tuples lists, one text a list of one where a list of texts is wanted, paths texts, dictionaries
    dataclasses.
    """
    for field in dataclasses.fields(config):
        value = checked(field.name, getattr(config, field.name), field_types(type(config))[field.name])
        object.__setattr__(config, field.name, value)


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The types of the fields of a dataclass, with what `Annotated` adds."""
    return get_type_hints(cls, include_extras=True)


def checked(name: str, value: Any, annotation: Any, error: type[ConfigurationError] = ConfigurationError) -> Any:
    """A value in the form that a type names; the `error` calls it `name`, shows it, and says what is allowed."""
    try:
        return _read(value, annotation)
    except _Refused as refused:
        raise error(f"`{name}` is {_shown(refused.value)}; {refused.rule}.{refused.hint}") from None


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuses a value that is none of the allowed ones."""
    checked(name, value, Annotated[Any, OneOf(tuple(allowed))])


def check_keys(cls: type, values: dict[str, Any]) -> None:
    """Refuses what is no dictionary, or one with a key that is no field of a dataclass."""
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{_shown(values)} is given as {cls.__name__}; it must hold `option: value` pairs.")
    check_options(cls.__name__, values, [field.name for field in dataclasses.fields(cls)])


def check_options(name: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuses an option that is not known."""
    for key in values:
        if key not in known:
            raise ConfigurationError(f"`{key}` is not an option of {name}; the options are {', '.join(known)}.")


def _read(value: Any, annotation: Any) -> Any:
    rules = annotation.__metadata__ if get_origin(annotation) is Annotated else ()
    annotation = annotation.__origin__ if rules else annotation
    try:
        result = _read_type(value, annotation, rules)
    except _Refused as refused:
        for rule in rules:
            if isinstance(rule, Described):
                raise _Refused(value, f"it must be {rule.words}", refused.hint) from None
        raise
    for rule in rules:
        alike = [one for one in getattr(rule, "allowed", ()) if isinstance(one, bool) == isinstance(result, bool)]
        if isinstance(rule, OneOf) and result not in alike:
            raise _Refused(value, f"allowed values are {', '.join(map(str, rule.allowed))}")
    return result


def _read_type(value: Any, annotation: Any, rules: tuple[Any, ...]) -> Any:
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(value, parts)
    if origin in (list, Sequence):
        return [_read(item, parts[0]) for item in _items(value, annotation)]
    if origin is tuple:
        items = _items(value, annotation)
        each = parts[:1] * len(items) if parts[1:] == (Ellipsis,) else parts
        if len(items) != len(each):
            raise _refused(value, annotation)
        return tuple(map(_read, items, each))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _refused(value, annotation)
        return {_read(key, parts[0]): _read(item, parts[1]) for key, item in value.items()}
    if dataclasses.is_dataclass(annotation):
        if isinstance(value, Mapping):
            check_keys(annotation, value)
            return annotation(**value)
        if not isinstance(value, annotation):
            raise _refused(value, annotation)
        return value
    result = _READERS[annotation](value)
    limits = next((rule for rule in rules if isinstance(rule, Limits)), Limits())
    if result is None or (annotation in (int, float) and not limits.allow(result)):
        raise _refused(value, Annotated[(annotation, *rules)] if rules else annotation, _hint(value, limits))
    return result


def _read_union(value: Any, members: tuple[Any, ...]) -> Any:
    if value is None and types.NoneType in members:
        return None
    members = tuple(member for member in members if member is not types.NoneType)
    refusals = []
    for member in members:
        try:
            return _read(value, member)
        except _Refused as refused:
            refusals.append(refused)
    if len(members) == 1:
        raise refusals[0]
    inner = [refused for refused in refusals if refused.value is not value]  # the form is right, an item of it is not
    raise inner[0] if inner else _Refused(value, f"it must be {' or '.join(map(_in_words, members))}")


def _items(value: Any, annotation: Any) -> list[Any]:
    """What a list is made of: of arrays and sets too, or of one text where texts are wanted."""
    item = get_args(annotation)[0]
    if isinstance(value, (str, os.PathLike)) and str in (item, getattr(item, "__origin__", None)):
        return [value]
    items = value
    if hasattr(value, "ndim") and hasattr(value, "tolist"):
        items = value.tolist() if value.ndim else None  # an array of one number has a length all the same
    if isinstance(items, Set):
        items = sorted(items, key=None if all(isinstance(one, (int, float)) for one in items) else str)
    if not isinstance(items, Collection) or isinstance(items, (str, bytes, Mapping)):
        raise _refused(value, annotation)
    return list(items)


def _plain(value: Any) -> Any:
    """A number of NumPy or a tensor of no dimension as Python's own; anything else as it is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            return value.item()
        except (RuntimeError, ValueError):  # a tensor that holds no value, on the meta device
            return value
    return value


def _whole(value: Any) -> int | None:
    value = _plain(value)
    if isinstance(value, numbers.Integral):
        return None if isinstance(value, bool) else int(value)
    number = _real(value)
    return int(number) if number is not None and number == int(number) and "%" not in str(value) else None


def _real(value: Any) -> float | int | None:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Decimal, str)):
        return None
    if type(value) in (int, float):
        return value if _is_finite(value) else None
    text = value.strip() if isinstance(value, str) else ""
    try:
        if text.lstrip("+-").isdecimal():
            return int(text) if _is_finite(int(text)) else None
        number = float(Decimal(text[:-1].strip()) / 100) if text.endswith("%") else float(value)
    except (ValueError, ArithmeticError):
        return None
    return number if math.isfinite(number) else None


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        return False


def _text(value: Any) -> str | None:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    return text if isinstance(text, str) else None


def _truth(value: Any) -> bool | None:
    return _plain(value) if isinstance(_plain(value), bool) else None


_READERS = {int: _whole, float: _real, bool: _truth, str: _text}
_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "a text"}


def _refused(value: Any, annotation: Any, hint: str = "") -> _Refused:
    return _Refused(value, f"it must be {_in_words(annotation)}", hint)


def _in_words(annotation: Any) -> str:
    """What a type allows: `"an integer of at least 1"`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        for rule in annotation.__metadata__:
            if isinstance(rule, Described):
                return rule.words
            if isinstance(rule, OneOf):
                return f"one of {', '.join(map(str, rule.allowed))}"
        return _in_words(parts[0]) + "".join(map(str, annotation.__metadata__))
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(part) for part in parts if part is not types.NoneType)
    if origin in (list, Sequence) or (origin is tuple and parts[-1] is Ellipsis):
        return f"a list, each of its items {_in_words(parts[0])}"
    if origin is tuple:
        return f"a list of {len(parts)}: {', '.join(map(_in_words, parts))}"
    if origin in (dict, Mapping):
        return f"pairs of {_in_words(parts[0])} and {_in_words(parts[1])}"
    return _NAMES.get(annotation, f"a {annotation.__name__}")


def _hint(value: Any, limits: Limits) -> str:
    """What may have been meant by a number that is not allowed."""
    if isinstance(value, str) and "," in value and _real(value.replace(",", ".")) is not None:
        return f" Decimals are written with a point: {value.replace(',', '.').strip()}."
    number = _real(value)
    if number is not None and limits.least >= 0 and limits.most <= 1 < number <= 100:
        return f' If {number:g} % is meant, write {number / 100:g} or "{number:g}%".'
    return ""


def _shown(value: Any) -> str:
    """A value on one line that is not too long."""
    is_number = isinstance(value, str) and _real(value) is not None
    text = value.strip() if is_number else " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
