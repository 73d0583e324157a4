"""Rows of text from files, folders of data sets and the Hub: the one reader for calibration and evaluation.

Files of any size are read in pieces: `Lines` holds a small part of one at a time.
"""

from __future__ import annotations

import codecs
import os
import re
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TextError
from ..files.reading import parse_json
from ..files.writing import can_only_be_a_path


FILES = (".txt", ".jsonl", ".json")
# Bytes read at once; the place of a line is kept about every so many bytes.
_BLOCK = 1 << 16
_BREAK = re.compile(rb"\r\n|\r|\n")


def read_rows(
    source: str | os.PathLike,
    *,
    name: str | None = None,
    split: str = "train",
    column: str = "text",
    longest: int | None = None,
    **loading: Any,
) -> Sequence[Any]:
    """Rows of one source of text, read only when they are asked for (a `.json` file that is one list is read whole).

    Args:
        source: A `.txt`, `.jsonl` or `.json` file, a folder (made by `datasets.save_to_disk`, or with data files) or
            the id of a data set of the Hub.
        name: Configuration of a data set.
        split: Split of a data set.
        column: Column of a data set, key in the objects of a JSON file.
        longest: Lines of a `.txt` file with more bytes are given as a `LongLine`. Default: none.
        loading: More arguments of `datasets.load_dataset` for a data set of the Hub, for example `revision`.

    Raises:
        TextError: There is no such source, split or column, or it cannot be read.
    """
    path = _file(source)
    if path is None:
        loaded = _load(str(source), name, split, loading)
        _check_column(str(source), column, loaded.column_names)
        return loaded[column]
    if path.suffix == ".txt":
        return _TextRows(path, longest)
    if _is_one_list(path):
        return [_value(row, where, column) for where, row in _json_rows(path)]
    return _JsonRows(path, column)


def read_table(source: str | os.PathLike, *, name: str | None = None, split: str = "train", **loading: Any) -> Any:
    """All columns of a source as a `datasets.Dataset`; a `.txt` file is one row, the whole text under `text`.

    Args:
        source, name, split, loading: As in `read_rows`.

    Raises:
        TextError: There is no such source or split, or it cannot be read.
    """
    path = _file(source)
    if path is None:
        return _load(str(source), name, split, loading)
    if path.suffix == ".txt":
        return as_table([{"text": _read(path)}], path.name)
    return as_table([_object(row, where) for where, row in _json_rows(path)], path.name)


def as_table(rows: Sequence[Any], name: str) -> Any:
    """Objects as a `datasets.Dataset` with every key that one of them has; where it is missing, there is `None`.

    Raises:
        TextError: A row is not an object, or the values of one key are of different kinds.
    """
    import datasets
    import pyarrow

    columns = dict.fromkeys(key for number, row in enumerate(rows) for key in _object(row, f"Row {number} of {name}"))
    try:
        return datasets.Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns})
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise TextError(f"The rows of {name} are no table, a key has values of different kinds: {error}") from error


def is_local(source: str) -> bool:
    """Whether a source is a file or folder rather than the id of a data set of the Hub.

    Raises:
        TextError: It can only be a path, and there is nothing there.
    """
    path = Path(source).expanduser()
    if path.exists() or path.suffix in FILES:
        return True
    if can_only_be_a_path(source):
        raise TextError(f"There is no file or folder {path}.")
    return False


def read_lines(path: str | os.PathLike) -> list[str]:
    """Rows of a text file as WikiText-2 has them: `""` for a blank line, else the line with its line break.

    Language-model papers join these rows with two line breaks and tokenise the result once.
    """
    return list(_TextRows(path))


class _Rows(Sequence[Any]):
    """Rows that are read as they are asked for."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._row(range(len(self))[index])

    @abstractmethod
    def _row(self, number: int) -> Any: ...


class _TextRows(_Rows):
    """Rows of a `.txt` file; lines of more bytes than `longest` are a `LongLine`."""

    def __init__(self, path: str | os.PathLike, longest: int | None = None) -> None:
        self._lines = Lines(Path(path).expanduser(), longest)

    def __len__(self) -> int:
        return len(self._lines)

    def _row(self, number: int) -> str | LongLine:
        line = self._lines[number]
        return line if isinstance(line, LongLine) else line + "\n" if line.strip() else ""


class _JsonRows(_Rows):
    """Values of one key in the rows of a `.jsonl` file; blank lines are no rows."""

    def __init__(self, path: Path, column: str) -> None:
        self._path, self._column, self._lines = path, column, Lines(path)
        blank = [number for number, line in enumerate(self._lines) if not line.strip()]
        # Before row `i` are as many blank lines as entries here that are at most `i`.
        self._blank = [number - before for before, number in enumerate(blank)]

    def __len__(self) -> int:
        return len(self._lines) - len(self._blank)

    def _row(self, number: int) -> Any:
        number += bisect_right(self._blank, number)
        where = f"Line {number + 1} of {self._path}"
        return _value(parse_json(self._lines[number], where, TextError, repeats=True), where, self._column)


def _is_one_list(path: Path) -> bool:
    line = next((line for line in Lines(path) if line.strip()), "") if path.suffix == ".json" else ""
    return line.lstrip().startswith("[")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON file, each with the words for where it is."""
    if _is_one_list(path):
        for number, row in enumerate(parse_json(_read(path), str(path), TextError, repeats=True)):
            yield f"Item {number} of {path}", row
        return
    for number, line in enumerate(Lines(path), start=1):
        if line.strip():
            where = f"Line {number} of {path}"
            yield where, parse_json(line, where, TextError, repeats=True)


def _file(source: str | os.PathLike) -> Path | None:
    """The path of a source that is a file of text; `None` for a folder or an id.

    Raises:
        TextError: It is a file of another kind.
    """
    path = Path(source).expanduser()
    if path.suffix in FILES:
        return path
    if path.is_file():
        raise TextError(f"{path} is neither a .txt nor a .jsonl or .json file; convert it, or give its folder.")
    return None


def _read(path: Path) -> str:
    if not path.is_file():
        raise TextError(f"There is no file {path}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: {error}.") from error


def _value(row: Any, where: str, column: str) -> Any:
    _check_column(where, column, list(_object(row, where, column)))
    return row[column]


def _object(row: Any, where: str, column: str = "text") -> dict[str, Any]:
    if not isinstance(row, dict):
        raise TextError(f'{where} is not an object such as {{"{column}": "..."}}.')
    return row


def _check_column(where: str, column: str, columns: list[str]) -> None:
    if column not in columns:
        raise TextError(f"{where} has no column {column!r}; it has {', '.join(map(repr, columns))}.")


def _load(source: str, name: str | None, split: str, loading: dict[str, Any]) -> Any:
    """A data set from a folder or the Hub; `datasets` raises errors of another type for every builder."""
    import datasets

    if not is_local(source):
        try:
            return datasets.load_dataset(source, name, split=split, **loading)
        except Exception as error:
            raise TextError(
                f"The dataset {source!r} (name {name!r}, split {split!r}) cannot be loaded from the Hub: {error}. "
                "Check its id, name and split and the network, or give local text: a .txt, .jsonl or .json file, or "
                "a dataset folder."
            ) from error
    path = Path(source).expanduser()
    try:
        if not any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(str(path), name, split=split)
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise TextError(f"The folder {path} cannot be read as a dataset: {error}") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise TextError(f"{path} has no split {split!r}; it has {', '.join(map(repr, loaded))}.")
    return loaded[split]


@dataclass(frozen=True)
class LongLine:
    """A line of `size` bytes from byte `offset` of a file on, that is not read whole."""

    path: Path
    offset: int
    size: int

    def read(self, start: int, size: int) -> str:
        """About `size` bytes of the line from byte `start` on: the characters that are whole."""
        with self.path.open("rb") as file:
            file.seek(self.offset + start)
            content = file.read(min(size, self.size - start))
        while content and content[0] & 0xC0 == 0x80:  # within a character
            content = content[1:]
        return codecs.getincrementaldecoder("utf-8")().decode(content)


class Lines(_Rows):
    """Lines of a UTF-8 text file without their line breaks, which are those of Python's text files.

    The file is read once to count them and to see that it is text, and then in blocks as they are asked for.

    Args:
        path: The file.
        longest: Lines of more bytes are given as `LongLine`. Default: none.

    Raises:
        TextError: There is no such file, or it is not UTF-8 text.
    """

    def __init__(self, path: Path, longest: int | None = None) -> None:
        if not path.is_file():
            raise TextError(f"There is no file {path}.")
        self.path, self.longest = path, longest
        # Numbers and places of lines that begin a block; a line longer than a block is one of its own.
        self._numbers, self._places = [0], [0]
        self._held: tuple[int, list[str]] = (-1, [])
        try:
            self._count()
        except UnicodeDecodeError as error:
            raise TextError(f"{path} is not UTF-8 text: {error}.") from error
        except OSError as error:
            raise TextError(f"{path} cannot be read: {error.strerror}.") from error

    def __len__(self) -> int:
        return self._length

    def _row(self, index: int) -> str | LongLine:
        block = bisect_right(self._numbers, index, hi=len(self._numbers) - 1) - 1
        if self._is_long(block):
            return LongLine(self.path, self._places[block], self._size(block))
        if block != self._held[0]:
            self._held = (block, self._read(block))
        return self._held[1][index - self._numbers[block]]

    def _count(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        place = number = start = 0  # of the block of bytes; of the line that goes on in it, and where that begins
        held = b""
        with self.path.open("rb") as file:
            while content := held + (found := file.read(_BLOCK)):
                held = b"\r" if found and content.endswith(b"\r") else b""  # it may be half of a break
                content = content[: len(content) - len(held)]
                decoder.decode(content)
                breaks = [found.end() for found in _BREAK.finditer(content)]
                if breaks:
                    first = place + breaks[0]
                    if first - start > _BLOCK:
                        self._mark(number, start)
                        self._mark(number + 1, first)
                    elif first - self._places[-1] >= _BLOCK:
                        self._mark(number + 1, first)
                    number, start = number + len(breaks), place + breaks[-1]
                place += len(content)
        decoder.decode(b"", final=True)
        if place - start > _BLOCK:
            self._mark(number, start)
        self._length = number + (place > start)
        self._numbers.append(self._length)
        self._places.append(place)

    def _mark(self, number: int, place: int) -> None:
        if number != self._numbers[-1]:
            self._numbers.append(number)
            self._places.append(place)

    def _size(self, block: int) -> int:
        return self._places[block + 1] - self._places[block]

    def _is_long(self, block: int) -> bool:
        alone = self._numbers[block + 1] - self._numbers[block] == 1
        return self.longest is not None and alone and self._size(block) > self.longest

    def _read(self, block: int) -> list[str]:
        with self.path.open("rb") as file:
            file.seek(self._places[block])
            text = file.read(self._size(block)).decode("utf-8")
        return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
