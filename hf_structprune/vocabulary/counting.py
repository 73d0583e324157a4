"""How often a tokenizer uses its tokens in text, and how well a part of them covers it. No model is needed."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ..config import PruningConfig
from ..data import calibration_sample, code_sample
from ..errors import TextError
from ..progress import tqdm
from ..text.calibration import PACKAGED, open_documents, packaged_chats, rendered
from ..text.reading import beginning_of, read_rows


_PIECE = (1024, 4096)  # characters of a piece of text, where there is little and where there is more
_PIECES = 100  # that a text has before they are longer
_STRIDE = 16  # parts are visited 0, 16, 32, ... 1, 17, ...: of a text that is counted in part, a part of all of it
_HELD_OUT = 20  # one of so many stretches of text is not counted, and measured by
_STRETCH = 16  # pieces of a stretch, at most: what is held out is of other documents, not of those that are counted
_MEASURED = 2_000_000  # characters of held-out text of each source that are kept
_BATCH = 64  # pieces that are tokenised at once
_READ = 400_000  # characters of what is counted of each source that are kept


@dataclass
class Counted:
    """One source of text.

    Attributes:
        name: What it is called.
        counts: How often each id is in it, shape (ids,).
        held_out: Pieces of it that are not in the counts.
        read: Some of those that are, from everywhere in it.
        pieces: In how many pieces of it each id is.
        held_counts, held_pieces: The same of what is held out.
    """

    name: str
    counts: np.ndarray
    held_out: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    pieces: np.ndarray = field(init=False)
    held_counts: np.ndarray = field(init=False)
    held_pieces: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.pieces, self.held_counts, self.held_pieces = (np.zeros_like(self.counts) for _ in range(3))

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


def sequences_of(counted: Sequence[Counted], tokenizer: Any, count: int, length: int) -> np.ndarray:
    """Sequences of the text that was counted, of all sources in turns, shape (at most `count`, at most `length`).

    What the tokenizer puts before every text begins each of them. Where there is little text, they are fewer or
    shorter.
    """
    begins, found = beginning_of(tokenizer), []
    for number, one in enumerate(counted):
        [ids] = ids_of(tokenizer, ["\n".join(one.read)])
        size = min(length - len(begins), len(ids))
        whole = len(ids) // size if size else 0
        wanted = min(whole, len(range(number, count, len(counted))))
        starts = [i * whole // wanted * size for i in range(wanted)]
        found.append([begins + ids[start : start + size] for start in starts])
    turns = [row for rows in zip_longest(*found) for row in rows if row is not None]
    longest = max(map(len, turns))
    return np.array([row for row in turns if len(row) == longest])


def count_tokens(config: PruningConfig, tokenizer: Any, size: int) -> list[Counted]:
    """Counts the tokens of `config.vocabulary_text`, or else of all calibration data, in a stream.

    Args:
        size: Number of ids.

    Raises:
        TextError: A source cannot be read, or there is no text in any.
    """
    calibration = config.calibration
    if config.vocabulary_text is None and calibration.tokens is not None:
        one = Counted("`tokens`", np.zeros(size, dtype=np.int64))
        _add(one.counts, one.pieces, calibration.tokens.tolist())
        return [one]
    found = []
    sources = list(_sources(config, tokenizer))
    for name, rows in sources:
        one = Counted(name, np.zeros(size, dtype=np.int64))
        _count(one, rows, tokenizer, config.vocabulary_tokens // len(sources))
        found.append(one)
    if not sum(one.tokens for one in found):
        raise TextError(f"There is no text in {', '.join(one.name for one in found)} that tokens could be counted in.")
    return found


def _sources(config: PruningConfig, tokenizer: Any) -> Iterator[tuple[str, Sequence[Any]]]:
    calibration, given = config.calibration, config.vocabulary_text
    if given is None and calibration.texts is not None:
        yield "`texts`", calibration.texts
        return
    given = calibration.dataset if given is None else given
    if given is None:
        yield from _packaged(tokenizer)
        return
    for source in [given] if isinstance(given, str) else given:
        if source == PACKAGED:
            yield from _packaged(tokenizer)
            continue
        has_chats = bool(getattr(tokenizer, "chat_template", None))
        yield Path(source).name if Path(source).exists() else source, open_documents(source, calibration, has_chats)


def _packaged(tokenizer: Any) -> Iterator[tuple[str, Sequence[Any]]]:
    chats = [rendered("A packaged chat", chat, tokenizer, "") for chat in packaged_chats(tokenizer)]
    yield "the packaged sample", [*read_rows(calibration_sample()), *chats, *read_rows(code_sample())]


def _count(one: Counted, rows: Sequence[Any], tokenizer: Any, most: int) -> None:
    measured, read, batch = 0, 0, []
    with tqdm(total=len(rows), desc=f"Counting tokens of {one.name}") as bar:
        for held_out, piece in _pieces(rows, bar):
            if held_out:
                if measured < _MEASURED:
                    one.held_out.append(piece)
                    measured += len(piece)
                continue
            if read < _READ:
                one.read.append(piece)
                read += len(piece)
            batch.append(piece)
            if len(batch) == _BATCH:
                _add(one.counts, one.pieces, ids_of(tokenizer, batch))
                batch = []
                if one.tokens >= most:
                    break
        _add(one.counts, one.pieces, ids_of(tokenizer, batch))
        _add(one.held_counts, one.held_pieces, ids_of(tokenizer, one.held_out))


def _add(counts: np.ndarray, pieces: np.ndarray, batch: list[list[int]]) -> None:
    for ids in batch:
        found, often = np.unique(np.asarray(ids, dtype=np.int64), return_counts=True)
        counts[found] += often
        pieces[found] += 1


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of several texts, without tokens around them."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _pieces(rows: Sequence[Any], bar: Any) -> Iterator[tuple[bool, str]]:
    """Pieces of text, and whether each is held out; short rows are joined with their neighbours, long ones are cut.

    Whole stretches are held out, so that most of what is measured by is of documents that were not counted, also where
    a row is a line of a document: a document goes on with the words that it has had.
    """
    lengths = [len(_text(rows[number])) for number in range(0, len(rows), len(rows) // 64 + 1)]
    mean = 1 + sum(lengths) / max(1, len(lengths))  # with a line break
    size = min(_PIECE[1], max(_PIECE[0], int(mean * len(rows)) // _PIECES))
    together = max(1, int(size / mean))  # rows
    parts = range(0, len(rows), together)

    def part(start: int) -> Iterator[str]:
        some = [_text(rows[number]) for number in range(start, min(start + together, len(rows)))]
        bar.update(len(some))
        return _cut("\n".join(text for text in some if text.strip()), size)

    if len(parts) < _HELD_OUT:  # few rows, whole books perhaps
        pieces = [piece for start in parts for piece in part(start)]
        yield from zip(_held_out(len(pieces)), pieces, strict=True)
        return
    held_out = _held_out(len(parts))
    for start in range(_STRIDE):
        for number in range(start, len(parts), _STRIDE):
            yield from ((held_out[number], piece) for piece in part(parts[number]))


def _held_out(parts: int) -> list[bool]:
    """Which of the parts of a text are held out, in their order in it."""
    stretch = max(1, min(_STRETCH, parts // _HELD_OUT))
    return [number // stretch % _HELD_OUT == _HELD_OUT - 1 for number in range(parts)]


def _cut(text: str, size: int) -> Iterator[str]:
    """A text in equal pieces of about so many characters, cut before spaces where there are some."""
    count, begin = max(1, round(len(text) / size)), 0
    for number in range(1, count):
        end = len(text) * number // count
        space = text.rfind(" ", begin + size // 4, end)
        end = end if space < 0 else space
        yield text[begin:end]
        begin = end
    if begin < len(text):
        yield text[begin:]


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
