"""Reads JSON that others may have written or damaged: the one place, whose errors name the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, StructPruneError


def read_json_object(
    path: str | os.PathLike, error: type[StructPruneError] = CheckpointError, *, repeats: bool = False
) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: The file.
        error: What is raised.
        repeats: Whether an object may have a key twice, as in files of other libraries, which take the last.

    Raises:
        StructPruneError: There is no such file, or it holds something else; names it and says what is wrong.
    """
    content = read_json(path, error, repeats=repeats)
    if not isinstance(content, dict):
        raise error(f"{path} holds {_JSON_NAMES[type(content)]}; it must hold one object, {{...}}.")
    return content


def read_json(
    path: str | os.PathLike, error: type[StructPruneError] = CheckpointError, *, repeats: bool = False
) -> Any:
    """What a JSON file holds, of whatever kind; arguments and errors as in `read_json_object`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error(f"There is no file {path}.") from None
    except UnicodeDecodeError as wrong:
        raise error(f"{path} is not JSON: it is not UTF-8 text ({wrong}).") from wrong
    except OSError as wrong:
        raise error(f"{path} cannot be read: {wrong.strerror}.") from wrong
    return parse_json(text, str(path), error, repeats=repeats)


def parse_json(text: str, where: str, error: type[StructPruneError], *, repeats: bool = False) -> Any:
    """What a JSON text says.

    Args:
        text: The text.
        where: What the message calls it: a file, or a line of it.
        error: What is raised.
        repeats: As in `read_json_object`.

    Raises:
        StructPruneError: It is not JSON, is nested too deep, or has a key twice in one object.
    """
    try:
        return json.loads(text, object_pairs_hook=None if repeats else _without_repeats)
    except RecursionError:
        raise error(f"{where} is not JSON that can be read: it is nested too deep.") from None
    except ValueError as wrong:  # a number with thousands of digits and a repeated key too
        raise error(f"{where} is not JSON: {wrong}.") from wrong


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands in it twice")
    return result


_JSON_NAMES = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value"}
_JSON_NAMES[type(None)] = "null"
