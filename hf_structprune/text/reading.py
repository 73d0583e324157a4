"""Rows of text from files, folders of data sets and the Hub, and their tokens, for calibration and evaluation.

Files are read as their rows are asked for: only where the lines begin is held. A long text is tokenised in pieces: to
the same tokens as the whole, in the memory of a piece.
"""

from __future__ import annotations

import codecs
import mmap
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import TextError
from ..files.reading import can_only_be_a_path, parse_json, read_json


FILES = (".txt", ".jsonl", ".json")
_BLOCK = 1 << 16  # bytes read at once
_BREAK = re.compile(rb"\r\n|\r|\n")
# Characters that are tokenised at once, and by how many neighbouring pieces overlap. A tokenizer takes some hundred
# bytes for a character.
PIECE = 1 << 16
OVERLAP = 1 << 11


def read_rows(
    source: str | os.PathLike, *, name: str | None = None, split: str = "train", column: str = "text", **loading: Any
) -> Sequence[Any]:
    """Rows of one source of text, read only when they are asked for (a `.json` file that is one list is read whole).

    Args:
        source: A `.txt`, `.jsonl` or `.json` file, a folder (made by `datasets.save_to_disk`, or with data files) or
            the id of a data set of the Hub.
        name, split: Of a data set: its configuration and its part.
        column: Column of a data set, key in the objects of a JSON file.
        loading: More arguments of `datasets.load_dataset` for a data set of the Hub, for example `revision`.

    Raises:
        TextError: There is no such source, split or column, or it cannot be read.
    """
    path = _file(source)
    if path is None:
        return column_of(_load(str(source), name, split, loading), column, source)
    if path.suffix == ".txt":
        return read_lines(path)
    return column_of(_objects(path), column, path)


def read_table(source: str | os.PathLike, *, name: str | None = None, split: str = "train", **loading: Any) -> Any:
    """All columns of a source as a `datasets.Dataset`; a `.txt` file is one row, the whole text under `text`.

    Arguments and errors are those of `read_rows`.
    """
    path = _file(source)
    if path is None:
        return _load(str(source), name, split, loading)
    if path.suffix == ".txt":
        lines_of(path)  # says what is wrong with it
        return as_table([{"text": path.read_text(encoding="utf-8")}], path.name)
    return as_table(list(_objects(path)), path.name)


def read_objects(source: str | os.PathLike, *, name: str | None = None, split: str = "train") -> Sequence[Any]:
    """The rows of a source with all their columns, each read only when it is asked for; as `read_rows`.

    Raises:
        TextError: Also for a `.txt` file, whose rows have no columns.
    """
    path = _file(source)
    if path is None:
        return _load(str(source), name, split, {})
    if path.suffix == ".txt":
        raise TextError(f"{path} is plain text; rows with several columns are those of a .jsonl or .json file.")
    return _objects(path)


def column_of(rows: Any, column: str, source: str | os.PathLike) -> Sequence[Any]:
    """One column of what `read_objects` gives of a source.

    Raises:
        TextError: There is no such column, of a file as soon as a row lacks it.
    """
    if isinstance(rows, _Objects):
        return rows.column(column)
    _check_column(str(source), column, rows.column_names)
    return rows[column]


def as_table(rows: Sequence[Any], name: str) -> Any:
    """Objects as a `datasets.Dataset` with every key that one of them has; where it is missing, there is `None`."""
    import datasets
    import pyarrow

    columns = dict.fromkeys(key for number, row in enumerate(rows) for key in _object(row, f"Row {number} of {name}"))
    try:
        return datasets.Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns})
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise TextError(f"The rows of {name} are no table, a key has values of different kinds: {error}") from error


def is_local(source: str) -> bool:
    """Whether a source is a file or folder rather than the id of a data set of the Hub; raises if it is neither."""
    path = Path(source).expanduser()
    if path.exists() or path.suffix in FILES:
        return True
    if can_only_be_a_path(source):
        raise TextError(f"There is no file or folder {path}.")
    return False


def read_lines(path: str | os.PathLike) -> Sequence[str]:
    """Rows of a text file as WikiText-2 has them: `""` for a blank line, else the line with its line break.

    Language-model papers join these rows with two line breaks and tokenise the result once.
    """
    lines = lines_of(Path(path).expanduser())

    def row(number: int) -> str:
        line = lines[number]
        return line + "\n" if line.strip() else ""

    return _Rows(row, range(len(lines)))


class _Rows(Sequence[Any]):
    """Rows that are read as they are asked for, each by its number."""

    def __init__(self, read: Callable[[int], Any], numbers: Sequence[int]) -> None:
        self._read, self._numbers = read, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        found = self._numbers[index]
        return [self._read(number) for number in found] if isinstance(index, slice) else self._read(found)


class _Objects(_Rows):
    """Objects of a file of JSON."""

    def __init__(
        self, read: Callable[[int, str], dict[str, Any]], numbers: Sequence[int], where: Callable[[int], str]
    ) -> None:
        super().__init__(lambda number: read(number, "text"), numbers)
        self._objects, self._where = read, where

    def column(self, column: str) -> Sequence[Any]:
        def read(number: int) -> Any:
            row = self._objects(number, column)
            _check_column(self._where(number), column, list(row))
            return row[column]

        return _Rows(read, self._numbers)


def lines_of(path: Path) -> Sequence[str]:
    """Lines of a UTF-8 text file without their line breaks, which are those of Python's text files."""
    if not path.is_file():
        raise TextError(f"There is no file {path}.")
    try:
        with path.open("rb") as file:
            for _ in codecs.iterdecode(iter(partial(file.read, _BLOCK), b""), "utf-8"):
                pass
            # What is empty cannot be mapped.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b""
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}.") from error
    starts = array("q", [0])
    starts.extend(found.end() for found in _BREAK.finditer(content))
    if starts[-1] < len(content):
        starts.append(len(content))

    def line(number: int) -> str:
        return content[starts[number] : starts[number + 1]].decode("utf-8").rstrip("\r\n")

    return _Rows(line, range(len(starts) - 1))


def _objects(path: Path) -> _Objects:
    """The objects of a JSON file, one a line or all in one list."""
    lines = lines_of(path)
    filled = array("q", (number for number, line in enumerate(lines) if line.strip()))
    is_list = path.suffix == ".json" and filled and lines[filled[0]].lstrip().startswith("[")
    items = read_json(path, TextError, repeats=True) if is_list else ()

    def where(number: int) -> str:
        return f"Item {number} of {path}" if is_list else f"Line {number + 1} of {path}"

    def read(number: int, column: str) -> dict[str, Any]:
        row = items[number] if is_list else parse_json(lines[number], where(number), TextError, repeats=True)
        return _object(row, where(number), column)

    return _Objects(read, range(len(items)) if is_list else filled, where)


def _file(source: str | os.PathLike) -> Path | None:
    """The path of a source that is a file of text; `None` for a folder or an id."""
    path = Path(source).expanduser()
    if path.suffix in FILES:
        return path
    if path.is_file():
        raise TextError(f"{path} is neither a .txt nor a .jsonl or .json file; convert it, or give its folder.")
    return None


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

    from ..library_errors import unreachable  # which needs huggingface_hub

    path, local = Path(source).expanduser(), is_local(source)
    try:
        if not local:
            return datasets.load_dataset(source, name, split=split, **loading)
        if not any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(str(path), name, split=split)
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        if local:
            raise TextError(f"The folder {path} cannot be read as a dataset: {error}") from error
        if (why := unreachable(error)) is not None:
            raise TextError(
                f"cannot load {source!r}: it is no file or folder, not a data set in the cache, and {why}. Local text "
                "is a .txt, .jsonl or .json file, or a dataset folder."
            ) from error
        raise TextError(
            f"The dataset {source!r} (name {name!r}, split {split!r}) cannot be loaded from the Hub: {error}. Check "
            "its id, name and split and the network, or give local text: a .txt, .jsonl or .json file, or a dataset "
            "folder."
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        raise TextError(f"{path} has no split {split!r}; it has {', '.join(map(repr, loaded))}.")
    return loaded[split]


class Tokens(NamedTuple):
    """Ids of a part of a text, and the character at which each ends (excluded), if the tokenizer tells."""

    ids: np.ndarray
    ends: np.ndarray | None


def tokenise(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> Iterator[Tokens]:
    """The tokens that a tokenizer makes of a text at once, one part after the other.

    Neighbouring pieces overlap. Both say which tokens there are in the overlap, and where these end; only if they say
    the same of its inner half, the text is cut there, in the middle of what is agreed on. Otherwise the first of them
    is made longer, up to the whole text. The edge of a piece changes the tokens near it: those of the word or the run
    of spaces it cuts, and of what a tokenizer puts before a text. To be wrong, this must reach further than a quarter
    of the overlap (512 characters), from both sides, to the same wrong tokens.

    Tokenizers that do not tell where tokens end (those not of the library `tokenizers`) take the text whole.
    """
    if not getattr(tokenizer, "is_fast", False):
        options = {"add_special_tokens": add_special_tokens, "return_offsets_mapping": False, "verbose": False}
        yield Tokens(np.asarray(tokenizer(text, **options)["input_ids"], dtype=np.int64), None)
        return
    # `tokens` are those of the text from `start` to `stop`; those from `begin` on are still to be given.
    start, stop, begin, size = 0, PIECE, 0, PIECE
    tokens = _piece(tokenizer, text, start, stop, add_special_tokens)
    while stop < len(text):
        first, last = stop - OVERLAP, stop + size
        further = _piece(tokenizer, text, first, last, add_special_tokens)
        cut = _agreed(tokens, further, first, stop)
        if cut is None:
            stop, size = last, last - start
            tokens = _piece(tokenizer, text, start, stop, add_special_tokens)
            continue
        yield Tokens(tokens.ids[begin : cut[0]], tokens.ends[begin : cut[0]])
        start, stop, begin, size, tokens = first, last, cut[1], PIECE, further
    yield Tokens(tokens.ids[begin:], tokens.ends[begin:])


def token_ids(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
    """All ids of `tokenise`, shape `(tokens,)`, int32."""
    found = tokenise(tokenizer, text, add_special_tokens=add_special_tokens)
    return np.concatenate([tokens.ids.astype(np.int32) for tokens in found])


def beginning_of(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before every text: a beginning-of-sequence token, several, or none."""
    plain, begun = (
        tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True)
    )
    places = range(len(begun) - len(plain) + 1)
    return list(begun[: next((place for place in places if begun[place : place + len(plain)] == plain), 0)])


def _piece(tokenizer: Any, text: str, start: int, stop: int, add_special_tokens: bool) -> Tokens:
    found = tokenizer(
        text[start:stop], add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
    )
    ends = np.fromiter((end for _, end in found["offset_mapping"]), np.int64, len(found["input_ids"]))
    ends = np.maximum.accumulate(ends) if len(ends) else ends  # special tokens are nowhere: they end at 0
    return Tokens(np.asarray(found["input_ids"], dtype=np.int64), ends + start)


def _agreed(one: Tokens, other: Tokens, first: int, last: int) -> tuple[int, int] | None:
    """The numbers of one token in both lists, from the middle of the characters that both have tokenised alike."""
    margin = (last - first) // 4
    ranges = [np.searchsorted(t.ends, (first + margin, last - margin), side="right") for t in (one, other)]
    (a, b), (c, d) = ranges
    if b - a != d - c or a == b:
        return None
    same = np.array_equal(one.ids[a:b], other.ids[c:d]) and np.array_equal(one.ends[a:b], other.ends[c:d])
    middle = (b - a) // 2
    return (int(a + middle), int(c + middle)) if same else None
