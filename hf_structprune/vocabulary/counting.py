"""How often a tokenizer uses its tokens in text, and how well a part of them covers it. No model is needed."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..config import PruningConfig
from ..data import calibration_sample
from ..errors import TextError
from ..progress import tqdm
from ..text.reading import PIECE, read_rows


_STRIDE = 16  # rows are visited 0, 16, 32, ... 1, 17, ...: of a text that is counted in part, a part of all of it
_HELD_OUT = 20  # one of so many pieces of text is not counted, and measured by
_MEASURED = 2_000_000  # characters of held-out text of each source that are kept
_BATCH = 64  # pieces that are tokenised at once


@dataclass
class Counted:
    """One source of text.

    Attributes:
        name: What it is called.
        counts: How often each id is in it, shape (ids,).
        held_out: Pieces of it that are not in the counts.
        held_counts: How often each id is in these.
    """

    name: str
    counts: np.ndarray
    held_out: list[str] = field(default_factory=list)
    held_counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.held_counts = np.zeros_like(self.counts)

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    def some(self, characters: int) -> list[str]:
        """Pieces of the text held out, from everywhere in it, of about so many characters."""
        found, size = [], 0
        for start in range(_STRIDE):
            for piece in self.held_out[start::_STRIDE]:
                if size >= characters:
                    return found
                found.append(piece)
                size += len(piece)
        return found


def count_tokens(config: PruningConfig, tokenizer: Any, size: int) -> list[Counted]:
    """Counts the tokens of `config.vocabulary_text`, or else of all calibration data, in a stream.

    Args:
        size: Number of ids.

    Raises:
        TextError: A source cannot be read, or there is no text in any.
    """
    calibration = config.calibration
    if config.vocabulary_text is None and calibration.tokens is not None:
        return [Counted("`tokens`", np.bincount(calibration.tokens.flatten().numpy(), minlength=size)[:size])]
    found = []
    sources = list(_sources(config))
    for name, rows in sources:
        one = Counted(name, np.zeros(size, dtype=np.int64))
        _count(one, rows, tokenizer, config.vocabulary_tokens // len(sources))
        found.append(one)
    if not sum(one.tokens for one in found):
        raise TextError(f"There is no text in {', '.join(one.name for one in found)} that tokens could be counted in.")
    return found


def _sources(config: PruningConfig) -> Iterator[tuple[str, Sequence[Any]]]:
    calibration, given = config.calibration, config.vocabulary_text
    if given is None and calibration.texts is not None:
        yield "`texts`", calibration.texts
        return
    given = calibration.dataset if given is None else given
    if given is None:
        yield "the packaged sample", read_rows(calibration_sample())
        return
    options = {"name": calibration.name, "split": calibration.split, "column": calibration.column}
    for source in [given] if isinstance(given, str) else given:
        yield Path(source).name if Path(source).exists() else source, read_rows(source, **options)


def _count(one: Counted, rows: Sequence[Any], tokenizer: Any, most: int) -> None:
    measured, batch = 0, []
    with tqdm(total=len(rows), desc=f"Counting tokens of {one.name}") as bar:
        for number, piece in enumerate(_pieces(rows, bar)):
            if number % _HELD_OUT == _HELD_OUT - 1:
                if measured < _MEASURED:
                    one.held_out.append(piece)
                    measured += len(piece)
                continue
            batch.append(piece)
            if len(batch) == _BATCH:
                _add(one.counts, batch, tokenizer)
                batch = []
                if one.tokens >= most:
                    break
        _add(one.counts, batch, tokenizer)
        _add(one.held_counts, one.held_out, tokenizer)


def _add(counts: np.ndarray, batch: list[str], tokenizer: Any) -> None:
    for ids in ids_of(tokenizer, batch):
        counts += np.bincount(np.asarray(ids, dtype=np.int64), minlength=len(counts))


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of several texts, without tokens around them."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _pieces(rows: Sequence[Any], bar: Any) -> Iterator[str]:
    """The text of rows in pieces that are not long; short rows are joined, as lines of one text are."""
    held, size = [], 0
    for start in range(_STRIDE):
        for number in range(start, len(rows), _STRIDE):
            text = _text(rows[number])
            bar.update(1)
            while len(text) > PIECE:
                cut = text.rfind(" ", PIECE // 2, PIECE)
                cut = PIECE if cut < 0 else cut
                yield text[:cut]
                text = text[cut:]
            if text.strip():
                held.append(text)
                size += len(text)
            if size > _STRIDE * 64:
                yield "\n".join(held)
                held, size = [], 0
    if held:
        yield "\n".join(held)


def _text(row: Any) -> str:
    """A row that is text, or what the messages of a chat say."""
    if isinstance(row, str):
        return row
    if isinstance(row, list) and all(isinstance(message, dict) and "content" in message for message in row):
        return "\n".join(str(message["content"]) for message in row)
    raise TextError(f"Tokens are counted in texts and in chats; a row is a {type(row).__name__}: {str(row)[:80]!r}.")


def coverage(counted: Iterable[Counted], kept: Collection[int], small: Any) -> list[dict[str, Any]]:
    """How well the tokens that stay cover each source of text.

    Args:
        kept: Ids that stay.
        small: The tokenizer without the others.

    Returns:
        For each source its name, the tokens counted, the share of them that stay (`covered`), tokens of its held-out
        text before, and by what share they are more (`longer`; `None` without such text).
    """
    numbers, found = np.fromiter(kept, np.int64, len(kept)), []
    for one in counted:
        before = int(one.held_counts.sum())
        after = sum(map(len, ids_of(small, one.held_out)))
        covered = float(one.counts[numbers].sum() / max(1, one.tokens))
        longer = after / before - 1 if before else None
        found.append(
            {"source": one.name, "tokens": one.tokens, "covered": covered, "held_out": before, "longer": longer}
        )
    return found


def scripts(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """The script of each token's first letter, as Unicode names it: `LATIN`, `CYRILLIC`, `CJK`; not of others."""
    texts = tokenizer.batch_decode([[number] for number in ids])
    found = zip(ids, map(_script, texts), strict=True)
    return {number: script for number, script in found if script is not None}


def _script(text: str) -> str | None:
    return next((_script_of(char) for char in text if char.isalpha()), None)


@cache
def _script_of(char: str) -> str:
    return unicodedata.name(char, "UNKNOWN").split(" ")[0].split("-")[0]
