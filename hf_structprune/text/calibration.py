"""Calibration text: from files, datasets, the Hub or memory to full token sequences of one length."""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..config import CalibrationConfig
from ..data import calibration_sample
from ..errors import CalibrationError, TextError
from .reading import LongLine, read_rows
from .tokenising import token_ids


# Of a source with far more text than needed, only this many characters per needed token are tokenised.
CHARACTERS_PER_TOKEN = 64
# Rows looked at to tell lines of one text from documents.
PEEK_ROWS = 1000
# No text has more tokens: a character has four bytes at most, and few are written out by a tokenizer; a row gets some
# special tokens or a separator.
_TOKENS_PER_CHARACTER, _SEPARATORS = 8, 16
_FIRST_WORD = re.compile(r"^\S{0,1000}\s")


def load_tokens(config: CalibrationConfig, tokenizer: Any) -> torch.LongTensor:
    """Token ids to calibrate on: full sequences, no padding, the same ones for the same config and data.

    Documents are joined by the tokenizer's end-of-sequence token, or by two line breaks if the model is a chat model
    (has a chat template), where that token ends a turn; lines of one running text (a `.txt` file, or rows as WikiText
    has them) by two line breaks. The result is cut into sequences, and one is drawn in each of
    `num_samples` equal stretches of it. A beginning-of-sequence token stands only where the tokenizer puts one by
    default, at the start of a document.

    Args:
        config: What to read and how much of it.
        tokenizer: A `transformers` tokenizer; may be `None` when `config.tokens` is given.

    Returns:
        Tensor of shape `(config.num_samples, config.length)`. With several datasets, sequence `i` comes from
        dataset `i % len(datasets)`.

    Raises:
        CalibrationError: The data cannot be found or read, is not text, or is too little.
    """
    if config.tokens is not None:
        return config.tokens.long()
    if config.fingerprint is not None and config.texts is None and config.dataset is None:
        raise CalibrationError(
            "The calibration data was given in memory and is not part of a saved configuration "
            f"(fingerprint {config.fingerprint}): give `texts`, `tokens` or `dataset` again."
        )
    if tokenizer is None:
        raise CalibrationError("Calibration text needs a tokenizer and there is none: give one, or give `tokens`.")
    try:
        sources = _sources(config)
        counts = [len(range(i, config.num_samples, len(sources))) for i in range(len(sources))]
        found = [
            _source_tokens(*source, count, config, tokenizer) for source, count in zip(sources, counts, strict=True)
        ]
    except CalibrationError:
        raise
    except TextError as error:  # also from the middle of a file
        raise CalibrationError(str(error)) from error
    tokens = torch.empty(config.num_samples, config.length, dtype=torch.long)
    for i, sequences in enumerate(found):
        tokens[i :: len(found)] = sequences
    return tokens


def as_batches(tokens: torch.LongTensor, batch_size: int) -> tuple[torch.LongTensor, ...]:
    """Splits `(num_samples, length)` ids into views of at most `batch_size` sequences, in order."""
    return tokens.split(batch_size)


def check_token_ids(tokens: torch.LongTensor, vocab_size: int) -> None:
    """Raises `CalibrationError` if an id has no row in an embedding of `vocab_size` rows."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise CalibrationError(
            f"The calibration tokens have ids from {low} to {high}, but the model's vocabulary has {vocab_size} "
            f"entries (0 to {vocab_size - 1}): were they made with the tokenizer of another model?"
        )


def _sources(config: CalibrationConfig) -> list[tuple[str, Sequence[Any]]]:
    """Names for messages and rows; those of a dataset are read only when asked for."""
    if config.texts is not None:
        return [("`texts`", config.texts)]
    if config.dataset is None:
        return [("the packaged sample", read_rows(calibration_sample()))]
    datasets = [config.dataset] if isinstance(config.dataset, str) else config.dataset
    if not datasets:
        raise CalibrationError("`dataset` is an empty list: name at least one, or None for the packaged sample.")
    if config.num_samples < len(datasets):
        raise CalibrationError(
            f"`num_samples` is {config.num_samples}, but there are {len(datasets)} datasets to take a sequence of."
        )
    longest = 4 * config.num_samples * config.length * CHARACTERS_PER_TOKEN  # bytes
    options = {"name": config.name, "split": config.split, "column": config.column, "longest": longest}
    return [(str(dataset), read_rows(str(dataset), **options)) for dataset in datasets]


def _source_tokens(
    name: str, rows: Sequence[Any], count: int, config: CalibrationConfig, tokenizer: Any
) -> torch.LongTensor:
    """`count` sequences of one source, shape `(count, config.length)`."""
    rng = random.Random(config.seed)
    running = not config.chat_template and _is_running_text(rows)
    chosen = _Selection(rows, count, config.length * CHARACTERS_PER_TOKEN, rng)

    def texts() -> Iterator[str]:
        return (_as_text(f"Row {index} of {name}", row, config, tokenizer) for index, row in chosen)

    characters, is_empty = 0, True
    for text in texts():
        characters, is_empty = characters + len(text), is_empty and not text.strip()
    if is_empty:
        raise CalibrationError(f"There is no text in {name}: it has no rows, or all of them are empty.")
    most = characters * _TOKENS_PER_CHARACTER + len(chosen) * _SEPARATORS
    _check_enough(most, f"at most {most}", name, count, config.length)
    ids = _tokenize(texts(), running, config.chat_template, tokenizer)
    _check_enough(len(ids), str(len(ids)), name, count, config.length)
    # One random sequence out of each of `count` equal stretches.
    found = len(ids) // config.length
    drawn = [rng.randrange(i * found // count, (i + 1) * found // count) for i in range(count)]
    return torch.from_numpy(ids[: found * config.length].reshape(found, config.length)[drawn]).long()


def _is_running_text(rows: Sequence[Any]) -> bool:
    """Whether rows are lines of one text, as those of WikiText: some are blank, all others end in a line break."""
    kinds = set()
    for row in chain.from_iterable(rows[first : first + 10] for first in range(0, min(len(rows), PEEK_ROWS), 10)):
        if not isinstance(row, (str, LongLine)):
            return False
        if isinstance(row, str) and row.strip() and not row.endswith("\n"):
            return False
        kinds.add(isinstance(row, str) and not row.strip())
    return len(kinds) == 2


class _Selection:
    """Numbered rows in order: all of them if short, else a run from each of `parts` equal parts of them.

    A run begins at a random row of its part and goes round; what a part has too little of, the next ones may take. The
    runs have `parts * characters` characters in all. A row with more than that is not taken whole, but `characters` of
    it from a random place in each of `parts` equal stretches.

    Args:
        rows: All rows.
        parts: Into how many parts they are divided, if there are as many rows.
        characters: How many are wanted of a part.
        rng: The source of randomness.
    """

    def __init__(self, rows: Sequence[Any], parts: int, characters: int, rng: random.Random) -> None:
        self._rows, self._stretches, wanted = rows, {}, parts * characters
        self._numbers: list[array] = []
        total, runs = 0, min(parts, len(rows))
        for part in range(runs):
            low, high = part * len(rows) // runs, (part + 1) * len(rows) // runs
            start, run = rng.randrange(low, high), array("q")
            for index in chain(range(start, high), range(low, start)):
                if total * runs >= wanted * (part + 1):
                    break
                run.append(index)
                row = rows[index]
                size = row.size if isinstance(row, LongLine) else len(str(row))
                if isinstance(row, (str, LongLine)) and size > wanted:
                    self._stretches[index] = [
                        _stretch(size, number, parts, characters, rng) for number in range(parts)
                    ]
                    size = wanted
                total += size
            self._numbers.append(array("q", sorted(run)))

    def __len__(self) -> int:
        return sum(map(len, self._numbers)) + sum(map(len, self._stretches.values()))

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for index in chain.from_iterable(self._numbers):
            row = self._rows[index]
            if index not in self._stretches:
                yield index, row
                continue
            for start, size in self._stretches[index]:
                text = row.read(start, size) if isinstance(row, LongLine) else row[start : start + size]
                # It begins with a word, if there is one soon.
                yield index, text if start == 0 else _FIRST_WORD.sub("", text, count=1)


def _stretch(size: int, number: int, parts: int, wanted: int, rng: random.Random) -> tuple[int, int]:
    """Where `wanted` of `size` characters begin in one of `parts` equal parts, and how many these are."""
    low, high = number * size // parts, (number + 1) * size // parts
    return low + rng.randrange(max(1, high - low - wanted + 1)), min(wanted, high - low)


def _as_text(where: str, row: Any, config: CalibrationConfig, tokenizer: Any) -> str:
    if isinstance(row, str) and (not config.chat_template or not row.strip()):
        return row
    if config.chat_template:
        messages = [{"role": "user", "content": row}] if isinstance(row, str) else row
        if _is_chat(messages):
            return _render(messages, where, tokenizer)
    kinds = "a text or a list of {role, content} messages" if config.chat_template else "a text"
    hint = " Set `chat_template=True` to render chat messages." if _is_chat(row) else ""
    raise CalibrationError(f"{where} is a {type(row).__name__}, not {kinds}.{hint}")


def _is_chat(row: Any) -> bool:
    return (
        isinstance(row, list) and bool(row) and all(isinstance(m, dict) and {"role", "content"} <= {*m} for m in row)
    )


def _render(messages: list[dict[str, Any]], where: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            "`chat_template` is True, but the tokenizer has no chat template: use an instruction-tuned model's "
            "tokenizer, set `tokenizer.chat_template`, or set `chat_template=False`."
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program of the model's author and fails as it likes
        raise CalibrationError(f"{where} cannot be rendered by the chat template: {error}") from error


def _tokenize(texts: Iterable[str], running: bool, rendered: bool, tokenizer: Any) -> np.ndarray:
    """Token ids of all texts, shape `(tokens,)`, int32."""
    # The end token of a chat model ends a turn; between documents of plain text it would be a surprise.
    chat = bool(getattr(tokenizer, "chat_template", None)) and not rendered
    eos = None if chat else tokenizer.eos_token_id
    if not running:
        texts = (text for text in texts if text.strip())
    # A chat template writes the special tokens itself.
    special = not rendered
    if running or eos is None:
        # A line break that comes with the row is part of it, as in WikiText; a blank row is an empty one.
        return token_ids(tokenizer, _joined(texts), add_special_tokens=special)
    parts = []
    for text in texts:
        ids = token_ids(tokenizer, text, add_special_tokens=special)
        ended = (rendered and text.rstrip().endswith(tokenizer.eos_token)) or ids[-1:].tolist() == [eos]
        parts += [ids] if ended else [ids, np.array([eos], dtype=np.int32)]
    return np.concatenate(parts)


def _joined(texts: Iterable[str]) -> Iterator[str]:
    """The parts of the texts joined with two line breaks."""
    for number, text in enumerate(texts):
        if number:
            yield "\n\n"
        yield text if text.strip() else ""


def _check_enough(tokens: int, words: str, name: str, count: int, length: int) -> None:
    found = tokens // length
    if found < count:
        raise CalibrationError(
            f"There are {words} tokens in {name}, but {count} sequences of {length} need {count * length}: "
            f"give more text, lower `num_samples` (there are {found} full sequences here) or lower `length`."
        )
