"""Reads what others may have written or damaged (JSON, YAML, weights); errors name the file and say what is wrong."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, ConfigurationError, StructPruneError


def can_only_be_a_path(name: str) -> bool:
    """Whether a name is no id of the Hub: those have at most one slash, within, and begin with a letter or digit."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def read_json_object(
    path: str | os.PathLike, error: type[StructPruneError] = CheckpointError, *, repeats: bool = False
) -> dict[str, Any]:
    """The object that a JSON file holds; with `repeats` it may have a key twice, of which the last counts.

    Raises:
        error: There is no such file, or it holds something else; names it and says what is wrong.
    """
    content = read_json(path, error, repeats=repeats)
    if not isinstance(content, dict):
        raise error(f"{path} holds {_JSON_NAMES[type(content)]}; it must hold one object, {{...}}.")
    return content


def read_json(
    path: str | os.PathLike, error: type[StructPruneError] = CheckpointError, *, repeats: bool = False
) -> Any:
    """What a JSON file holds, of whatever kind; arguments and errors as in `read_json_object`."""
    return parse_json(read_text(path, error=error, form="JSON"), str(path), error, repeats=repeats)


def parse_json(text: str, where: str, error: type[StructPruneError], *, repeats: bool = False) -> Any:
    """What a JSON text says; messages name the file or line `where` it stands; the rest as in `read_json_object`."""
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


_JSON_NAMES = {
    list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value", type(None): "null",
}  # fmt: skip


def read_text(
    path: str | os.PathLike, what: str = "file", *, error: type[StructPruneError] = ConfigurationError,
    form: str = "YAML",
) -> str:  # fmt: skip
    """The text of a file; an `error` that says `what` it is and its `form` if it cannot be read, or is no text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error(f"There is no {what} {path}.") from None
    except UnicodeDecodeError as wrong:
        raise error(f"{path} is not {form}: it is not UTF-8 text ({wrong}).") from wrong
    except OSError as wrong:
        raise error(f"{path} cannot be read: {wrong.strerror}.") from wrong


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one section, of which YAML would take the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line, earlier = key.start_mark.line + 1, lines.get((key.tag, key.value))
            if earlier is not None:
                raise ConfigurationError(
                    f"`{key.value}` stands twice in one section, in lines {earlier} and {line}, and only one can be "
                    "meant: join them, or remove one."
                )
            lines[key.tag, key.value] = line
        return node


def parse_yaml(text: str, where: str | os.PathLike) -> Any:
    """What a YAML text says; a `ConfigurationError` names `where` it stands if it is none, or has a key twice."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigurationError(f"{where} is not YAML that can be read: it is nested too deep.") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        raise ConfigurationError(f"{where} is not YAML: {error}") from error


def damage(path: Path) -> str | None:
    """What is wrong with a file of a checkpoint, or a folder of such files; `None` if it can be read to its end.

    Files of torch have check sums and are read whole; of safetensors the header says how long the file is.
    """
    if path.is_dir():
        inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
        return first_damage(inside) if inside else f"{path.name} is empty"
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:
                    return f"{path.name} is damaged"
    except (OSError, ValueError, RecursionError, SafetensorError, zipfile.BadZipFile):
        return f"{path.name} is cut off or damaged"
    return None


def damaged_weights(folder: Path) -> str | None:
    """What is wrong with the weights of a checkpoint; `None` if they are there and can be read."""
    index = folder / "model.safetensors.index.json"
    files = [path for path in (folder / "model.safetensors", index) if path.exists()]
    if index in files and damage(index) is None:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not names:
            return f"{index.name} names no files"
        files += sorted({folder / str(name) for name in names.values()})
    return first_damage(files) if files else "there are no weights"


def first_damage(paths: Sequence[Path]) -> str | None:
    """What is wrong with the first of some files that is not whole; `None` if all are."""
    return next(filter(None, map(damage, paths)), None)
