"""Training data: rows of any known format to token ids and labels, and an account of what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import uuid4

from transformers.utils import logging

from ..errors import ConfigurationError, TextError
from ..extras import need
from .encoding import IGNORED, Encoded, Encoder
from .endings import Endings
from .sources import COMMON, load_rows, public_sources, restore, to_common


__all__ = ["DataReport", "SourceReport", "load_rows", "prepare", "public_sources"]

logger = logging.get_logger(__name__)


@dataclass
class SourceReport:
    """What became of the rows of one source.

    Args:
        name: Name of the source.
        format: Format of its rows, see `formats.FORMATS`.
        rows: Rows read.
        empty: Of these, without text or without an answer.
        truncated: Cut off at the end, because they are too long.
        dropped: Left out, because nothing to learn is left after the cut.
        long_prompts: Of these, whose prompt alone fills `max_length`.
        split: Plain texts that became several sequences.
        sequences: Sequences that it gives.
        tokens: Tokens in these.
        labelled: Tokens that are learned.
    """

    name: str
    format: str
    rows: int = 0
    empty: int = 0
    truncated: int = 0
    dropped: int = 0
    long_prompts: int = 0
    split: int = 0
    sequences: int = 0
    tokens: int = 0
    labelled: int = 0

    def line(self) -> str:
        lost = [f"{getattr(self, n):,} {n}" for n in ("empty", "dropped", "truncated", "split") if getattr(self, n)]
        text = f"{self.name} ({self.format}): {self.rows:,} rows, {self.sequences:,} sequences"
        text += f", {self.tokens:,} tokens, {self.labelled:,} of them learned"
        return text + (f"; rows {', '.join(lost)}" if lost else "")


@dataclass
class DataReport:
    """What became of the training data.

    Args:
        sources: One report a source.
        max_length: Tokens in a sequence at most.
        notes: What was decided on the way, one sentence each.
        packed: Sequences after packing, `None` without it.
    """

    sources: list[SourceReport]
    max_length: int
    notes: list[str] = field(default_factory=list)
    packed: int | None = None

    @property
    def sequences(self) -> int:
        """Sequences that are trained on."""
        return sum(one.sequences for one in self.sources) if self.packed is None else self.packed

    @property
    def tokens(self) -> int:
        """Tokens in one pass over the data."""
        return sum(one.tokens for one in self.sources)

    @property
    def labelled(self) -> int:
        """Tokens that are learned in one pass."""
        return sum(one.labelled for one in self.sources)

    def lines(self) -> list[str]:
        """The report in words."""
        return self.counts() + self.notes

    def counts(self) -> list[str]:
        """The same without the notes, which `prepare` has said."""
        lines = [one.line() for one in self.sources]
        if self.packed is not None:
            share = self.tokens / (self.packed * self.max_length)
            lines.append(f"packed into {self.packed:,} sequences of {self.max_length} tokens, {share:.0%} full")
        return lines

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def prepare(
    dataset: Any,
    tokenizer: Any,
    *,
    max_length: int,
    context: int | None = None,
    prompt_loss: bool = False,
    packing: bool = False,
    seed: int = 0,
    stops: Collection[int] = (),
) -> tuple[Any, DataReport]:
    """Rows to what a Trainer takes: a `datasets.Dataset` with `input_ids` and `labels`, -100 on what is not learned.

    The ids and labels are those of TRL's `SFTTrainer` for the same rows, which takes such a dataset as it is. Two
    things are done in another way: plain texts longer than `max_length` are cut into pieces, not off, and of a chat
    the answers are learned, not the whole. `tokenizer` gets a pad token if it has none: its end-of-sequence token.

    Args:
        dataset: A `datasets.Dataset`: rows of a known format, or what `load_rows` mixed.
        tokenizer: The model's tokenizer.
        max_length: Tokens in a sequence at most.
        context: Tokens that the model can take at most, if that is known.
        prompt_loss: Learn prompts too, not only answers.
        packing: Put short sequences together, up to `max_length`, and add the column `seq_lengths`. Train on it with
            `SFTConfig(padding_free=True, max_length=None)`: then positions begin anew in every example, from which
            Transformers sees, in every implementation of attention, that a token may look at its own example only.
        seed: Of the shuffling before packing.
        stops: Tokens at which the model stops, besides the tokenizer's end-of-sequence token.

    Returns:
        The sequences, and what became of the rows.

    Raises:
        ConfigurationError: There is no tokenizer, or one without end token, or the model is shorter than `max_length`.
        TextError: The rows are of no known format, or there is nothing to learn in them.
    """
    _check(tokenizer, max_length, context)
    if not len(dataset):
        raise TextError("There are no rows to train on.")
    notes = _pad_with_end(tokenizer)
    rows = to_common(dataset)
    report = DataReport([], max_length, notes)
    endings = Endings({tokenizer.eos_token_id, *stops})
    result = _encode(rows, Encoder(tokenizer, prompt_loss=prompt_loss), report, endings)
    for note in (*_long_prompts(report), *endings.notes(tokenizer)):
        logger.warning(f"{note[0].upper()}{note[1:]}.")
        report.notes.append(note)
    if not len(result):
        raise TextError(f"There is nothing to learn in the data. {'. '.join(report.lines())}.")
    if packing:
        result = _pack(result, max_length, seed)
        report.packed = len(result)
    return result, report


def _check(tokenizer: Any, max_length: int, context: int | None) -> None:
    if tokenizer is None:
        raise ConfigurationError("There is no tokenizer to encode the data with: give the one of the dense model.")
    if max_length < 2:
        raise ConfigurationError(f"`max_length` is {max_length}; a sequence needs at least 2 tokens to predict one.")
    if context is not None and max_length > context:
        raise ConfigurationError(
            f"`max_length` is {max_length}, but the model takes at most {context} tokens: set `max_length` to "
            f"{context} or less."
        )
    if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
        raise ConfigurationError(
            "The tokenizer has no end-of-sequence token, so that the model would never learn to stop: set "
            "`tokenizer.eos_token` to the token that ends a text in this vocabulary."
        )


def _pad_with_end(tokenizer: Any) -> list[str]:
    """Gives a tokenizer without pad token its end token as one, and says so."""
    if tokenizer.pad_token is not None:
        return []
    tokenizer.pad_token = tokenizer.eos_token
    note = f"no pad token in the tokenizer: {tokenizer.eos_token!r} takes its place, and is not learned there"
    logger.warning(f"There is {note}.")
    return [note]


def _long_prompts(report: DataReport) -> list[str]:
    """What is said of rows that are dropped because their prompts leave no room for an answer."""
    return [
        f"of {one.name} {one.long_prompts:,} rows are dropped because their prompts alone fill `max_length` "
        f"{report.max_length}: set it higher to learn their answers"
        for one in report.sources
        if one.long_prompts
    ]


def _encode(rows: Any, encoder: Encoder, report: DataReport, endings: Endings) -> Any:
    import datasets

    counts: dict[tuple[str, str], SourceReport] = {}
    answers: Counter[str] = Counter()

    def encode(batch: dict[str, list[str]], numbers: list[int]) -> dict[str, list[list[int]]]:
        result: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for number, *row in zip(numbers, *(batch[column] for column in COMMON), strict=True):
            source, kind, text = row
            count = counts.setdefault((source, kind), SourceReport(source, kind))
            where = f"Row {number} of the data (from {source})"
            for piece in _sequences(text, encoder, report.max_length, count, answers, endings, where):
                result["input_ids"].append(piece.input_ids)
                result["labels"].append(piece.labels)
        return result

    features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "labels")})
    # In memory and under a name of its own: neither the counts here nor what TRL makes of it may come from a cache.
    result = rows.map(
        encode, batched=True, with_indices=True, remove_columns=rows.column_names, features=features,
        keep_in_memory=True, new_fingerprint=uuid4().hex, desc="Tokenizing",
    )  # fmt: skip
    report.sources = [counts[key] for key in sorted(counts)]
    for note, count in answers.items():
        logger.info(f"{note} ({count:,} chats)")
        report.notes.append(f"{note} ({count:,} chats)")
    return result


def _sequences(
    text: str,
    encoder: Encoder,
    max_length: int,
    count: SourceReport,
    answers: Counter[str],
    endings: Endings,
    where: str,
) -> list[Encoded]:
    """Sequences of one row, and its part of the account."""
    count.rows += 1
    example = restore(text)
    if example is None:
        count.empty += 1
        return []
    try:
        encoded = encoder(example)
    except TextError as error:
        raise TextError(f"{where}: {error}") from error
    pieces = [piece for piece in cut(encoded, max_length) if learned(piece)]
    long = len(encoded.input_ids) > max_length
    count.dropped += not pieces
    count.long_prompts += not pieces and bool(learned(encoded))
    endings.look_at(encoded)
    count.split += long and encoded.plain and bool(pieces)
    count.truncated += long and not encoded.plain and bool(pieces)
    count.sequences += len(pieces)
    count.tokens += sum(len(piece.input_ids) for piece in pieces)
    count.labelled += sum(map(learned, pieces))
    if pieces and encoded.answers is not None:
        answers[encoded.answers] += 1
    return pieces


def cut(encoded: Encoded, max_length: int) -> list[Encoded]:
    """Plain text in pieces of at most `max_length` tokens; of anything else the first `max_length`."""
    end = len(encoded.input_ids) if encoded.plain else 1
    return [
        Encoded(encoded.input_ids[i : i + max_length], encoded.labels[i : i + max_length], encoded.plain)
        for i in range(0, end, max_length)
    ]


def learned(encoded: Encoded) -> int:
    """Tokens that the loss counts; the first one of a sequence is predicted from nothing."""
    return sum(label != IGNORED for label in encoded.labels[1:])


def _pack(dataset: Any, max_length: int, seed: int) -> Any:
    need("trl", extra="recover")
    from trl import pack_dataset

    return pack_dataset(dataset.shuffle(seed=seed), max_length, "bfd", {"load_from_cache_file": False})
