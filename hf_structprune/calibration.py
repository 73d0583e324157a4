"""Calibration text: from files, datasets, the Hub or memory to full token sequences of one length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from .configuration import CalibrationConfig
from .data import calibration_sample
from .errors import CalibrationError, TextError
from .reading import read_jsonl, read_rows


# Of a source with far more text than needed, only this many characters per needed token are tokenised.
CHARACTERS_PER_TOKEN = 64
# Rows looked at to tell lines of one text from documents.
PEEK_ROWS = 1000


@dataclass(frozen=True)
class Source:
    """Rows of text under a name for messages; rows of a dataset are read only when asked for."""

    name: str
    rows: Sequence[Any]


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
    sources = _open_sources(config)
    if config.num_samples < len(sources):
        raise CalibrationError(
            f"`num_samples` is {config.num_samples}, but there are {len(sources)} datasets to take a sequence of."
        )
    tokens = torch.empty(config.num_samples, config.length, dtype=torch.long)
    for i, source in enumerate(sources):
        share = tokens[i :: len(sources)]
        share.copy_(_source_tokens(source, len(share), config, tokenizer))
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


# ---------------------------------------------------------------------------------------------- sources


def _open_sources(config: CalibrationConfig) -> list[Source]:
    if config.texts is not None:
        return [Source("`texts`", config.texts)]
    if config.dataset is None:
        return [Source("the packaged sample", read_jsonl(calibration_sample()))]
    datasets = [config.dataset] if isinstance(config.dataset, str) else config.dataset
    if not datasets:
        raise CalibrationError("`dataset` is an empty list: name at least one, or None for the packaged sample.")
    return [Source(str(dataset), _open_rows(str(dataset), config)) for dataset in datasets]


def _open_rows(dataset: str, config: CalibrationConfig) -> Sequence[Any]:
    try:
        return read_rows(dataset, name=config.name, split=config.split, column=config.column)
    except TextError as error:
        raise CalibrationError(str(error)) from error


# ------------------------------------------------------------------------------------- rows to sequences


def _source_tokens(source: Source, count: int, config: CalibrationConfig, tokenizer: Any) -> torch.LongTensor:
    """`count` sequences of one source, shape `(count, config.length)`."""
    rng = random.Random(config.seed)
    running = not config.chat_template and _is_running_text(source.rows[:PEEK_ROWS])
    rows = _spread_rows(source.rows, count, count * config.length * CHARACTERS_PER_TOKEN, rng)
    texts = [_as_text(source, index, row, config, tokenizer) for index, row in rows]
    if not any(text.strip() for text in texts):
        raise CalibrationError(f"There is no text in {source.name}: it has no rows, or all of them are empty.")
    ids = _tokenize(texts, running, config.chat_template, tokenizer)
    return _draw_sequences(ids, source.name, count, config.length, rng)


def _is_running_text(rows: Sequence[Any]) -> bool:
    """Whether rows are lines of one text, as those of WikiText: some are blank, all others end in a line break."""
    if not all(isinstance(row, str) for row in rows):
        return False
    filled = [row for row in rows if row.strip()]
    return 0 < len(filled) < len(rows) and all(row.endswith("\n") for row in filled)


def _spread_rows(rows: Sequence[Any], parts: int, characters: int, rng: random.Random) -> list[tuple[int, Any]]:
    """Numbered rows in order: all of them if short, else a run from each of `parts` equal parts, `characters` in all.

    A run begins at a random row of its part and goes round; what a part has too little of, the next ones may take.
    """
    parts, total, taken = min(parts, len(rows)), 0, []
    for part in range(parts):
        low, high = part * len(rows) // parts, (part + 1) * len(rows) // parts
        start, run = rng.randrange(low, high), []
        for index in chain(range(start, high), range(low, start)):
            if total * parts >= characters * (part + 1):
                break
            run.append((index, rows[index]))
            total += len(str(rows[index]))
        taken += sorted(run, key=lambda item: item[0])
    return taken


def _as_text(source: Source, index: int, row: Any, config: CalibrationConfig, tokenizer: Any) -> str:
    if isinstance(row, str) and (not config.chat_template or not row.strip()):
        return row
    if config.chat_template:
        messages = [{"role": "user", "content": row}] if isinstance(row, str) else row
        if _is_chat(messages):
            return _render(messages, f"Row {index} of {source.name}", tokenizer)
    kinds = "a text or a list of {role, content} messages" if config.chat_template else "a text"
    hint = " Set `chat_template=True` to render chat messages." if _is_chat(row) else ""
    raise CalibrationError(f"Row {index} of {source.name} is a {type(row).__name__}, not {kinds}.{hint}")


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


def _tokenize(texts: list[str], running: bool, rendered: bool, tokenizer: Any) -> list[int]:
    # The end token of a chat model ends a turn; between documents of plain text it would be a surprise.
    chat = bool(getattr(tokenizer, "chat_template", None)) and not rendered
    eos = None if chat else tokenizer.eos_token_id
    if not running:
        texts = [text for text in texts if text.strip()]
    if running or eos is None:
        # A line break that comes with the row is part of it, as in WikiText; a blank row is an empty one.
        texts = ["\n\n".join(text if text.strip() else "" for text in texts)]
    # A chat template writes the special tokens itself.
    ids = tokenizer(texts, add_special_tokens=not rendered, verbose=False)["input_ids"]
    if running or eos is None:
        return ids[0]
    ended = [rendered and text.rstrip().endswith(tokenizer.eos_token) for text in texts]
    return [
        token
        for document, has_end in zip(ids, ended, strict=True)
        for token in (document if has_end or document[-1:] == [eos] else [*document, eos])
    ]


def _draw_sequences(ids: list[int], name: str, count: int, length: int, rng: random.Random) -> torch.LongTensor:
    """One random sequence out of each of `count` equal stretches of `ids` cut into sequences of `length`."""
    found = len(ids) // length
    if found < count:
        raise CalibrationError(
            f"There are {len(ids)} tokens in {name}, but {count} sequences of {length} need {count * length}: "
            f"give more text, lower `num_samples` (there are {found} full sequences here) or lower `length`."
        )
    chosen = [rng.randrange(i * found // count, (i + 1) * found // count) for i in range(count)]
    return torch.tensor(ids[: found * length]).view(found, length)[chosen]
