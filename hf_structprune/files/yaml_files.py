"""Reads YAML that people write: the one place, whose errors name the file and the line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigurationError


def read_text(path: str | os.PathLike, what: str = "file") -> str:
    """The text of a YAML file; `what` it is, messages say.

    Raises:
        ConfigurationError: It cannot be read, or is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError(f"There is no {what} {path}.") from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not YAML: {error}") from error


def parse_yaml(text: str, where: str | os.PathLike) -> Any:
    """What a YAML text says.

    Args:
        text: The text.
        where: The file it is from, for messages.

    Raises:
        ConfigurationError: It is not YAML, or a key stands twice in one section, of which YAML would take the last.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _refuse_repeats(node, where)
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ConfigurationError(f"{where} is not YAML that can be read: it is nested too deep.") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{where} is not YAML: {error}") from error
    finally:
        loader.dispose()


def _refuse_repeats(root: yaml.Node | None, where: str | os.PathLike) -> None:
    """Raises where a key stands twice in one section, however deep."""
    left, seen = [root], set()
    while left:
        node = left.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            left.append(value)
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in lines:
                first = lines[key.tag, key.value]
                raise ConfigurationError(
                    f"{where}: `{key.value}` stands twice in one section, in lines {first} and {line}, and only one "
                    "can be meant: join them, or remove one."
                )
            lines[key.tag, key.value] = line
