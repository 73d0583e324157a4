"""Whether files are whole: that they are there says nothing about what is in them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open


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


def damaged_weights(folder: Path, patterns: Sequence[str]) -> str | None:
    """What is wrong with the weights in a folder; `None` if they are there and can be read.

    Args:
        folder: Where they are.
        patterns: Names that files of weights may have, and of indices (`.index.json`) that name more.
    """
    there = those_there(folder, patterns)
    if not there:
        return "there are no weights"
    shards: set[str] = set()
    for index in (path for path in there if path.name.endswith(".index.json")):
        if damage(index) is not None:
            return damage(index)
        content = json.loads(index.read_text(encoding="utf-8"))
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not names:
            return f"{index.name} names no files"
        shards |= {str(name) for name in names.values()}
    return first_damage([*there, *(folder / name for name in sorted(shards))])


def those_there(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a folder with such names."""
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def first_damage(paths: Sequence[Path]) -> str | None:
    """What is wrong with the first of some files that is not whole; `None` if all are."""
    return next(filter(None, map(damage, paths)), None)
