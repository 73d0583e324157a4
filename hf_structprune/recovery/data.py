"""Training data: rows of known formats, of one source or a mix, to token ids and labels as TRL makes them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from transformers.utils import logging

from ..errors import ConfigurationError, TextError
from ..files.reading import parse_json
from ..installed import need
from ..progress import only_ours, tqdm
from ..text.formats import NO_TEMPLATE, example_of, parts_of, recognise, says
from ..text.reading import as_table, read_table


logger = logging.get_logger(__name__)

IGNORED = -100  # label of a token that is not learned


def load_rows(source: Any, *, split: str = "train", max_samples: int | None = None, seed: int = 0) -> Any:
    """Rows to train on, as a `datasets.DatasetDict` with a data set for every source, under its name.

    All rows of all sources are taken, unless a source says its share of the mix as `"SOURCE@0.3"`: then the mix is as
    large as it can be without a row twice, and sources without a share divide what is left in proportion to their
    rows.

    Args:
        source: A `datasets.Dataset` (a streaming one needs `max_samples`), a list of row dicts, a `.jsonl`, `.json` or
            `.txt` file (one text), a folder (made by `save_to_disk`, or with data files), the id of a data set of the
            Hub, or a list of such sources, each with `@SHARE` at its end or as a pair `(source, share)` if wanted.
        split: Split of data sets that have several.
        max_samples: At most so many rows, drawn at random by `seed`; of a streaming data set the first ones.

    Raises:
        TextError: A source cannot be read, has no rows, or its columns are of no known format.
        ConfigurationError: The shares are impossible.
    """
    import datasets

    sources = _with_shares(source)
    if not sources:
        raise TextError("There is nothing to train on: the list of sources is empty.")
    opened = [_open(source, split, max_samples) for source, _ in sources]
    counts = mix_counts(list(map(len, opened)), [share for _, share in sources], max_samples)
    result, seen = datasets.DatasetDict(), Counter()
    for (source, _), rows, count in zip(sources, opened, counts, strict=True):
        name = _name(source)
        seen[name] += 1
        if count < len(rows):
            logger.info(f"Of {name} {count:,} of {len(rows):,} rows are taken, drawn at random.")
            rows = rows.shuffle(seed=seed).select(range(count))
        if count:
            result[name if seen[name] == 1 else f"{name} ({seen[name]})"] = rows
    return result


def public_sources(source: Any) -> list[str]:
    """Sources as they are given on the command line, with the names of local files in place of their paths."""
    return [_name(one) if share is None else f"{_name(one)}@{share:g}" for one, share in _with_shares(source)]


def without_shares(source: Any) -> list[Any]:
    """Sources alone."""
    return [one for one, _ in _with_shares(source)]


def _with_shares(source: Any) -> list[tuple[Any, float | None]]:
    """One source or several, each with its share."""
    many = isinstance(source, (list, tuple)) and not _is_pair(source)
    rows = many and bool(source) and all(isinstance(row, Mapping) for row in source)
    return [_with_share(one) for one in (source if many and not rows else [source])]


def _is_pair(source: Any) -> bool:
    pair = isinstance(source, (list, tuple)) and len(source) == 2 and isinstance(source[1], (int, float))
    return pair and not isinstance(source[0], Mapping)


def _with_share(source: Any) -> tuple[Any, float | None]:
    share = None
    if _is_pair(source):
        source, share = source
    elif isinstance(source, (str, os.PathLike)) and not Path(source).expanduser().exists():
        before, _, after = str(source).rpartition("@")
        with suppress(ValueError):  # not a number: a part of the name
            source, share = (before, float(after)) if before else (source, None)
    if share is not None and not 0 < share <= 1:
        raise ConfigurationError(f"The share of {_name(source)} is {share:g}; it must be above 0 and at most 1.")
    return source, share


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        local = Path(source).expanduser()
        return local.resolve().name if local.exists() else str(source)  # the whole path is nobody's business
    return getattr(getattr(source, "info", None), "dataset_name", None) or "data"


def _open(source: Any, split: str, max_samples: int | None) -> Any:
    """All rows of a source, with their columns; of a stream the first `max_samples`."""
    import datasets

    name = _name(source)
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in source:
            raise TextError(f"The data set has no split {split!r}; it has {', '.join(map(repr, source))}.")
        return _open(source[split], split, max_samples)
    if isinstance(source, (str, os.PathLike)):
        rows = read_table(source, split=split)
    elif isinstance(source, (list, tuple)):
        rows = as_table(source, name)
    elif isinstance(source, datasets.Dataset):
        rows = source
    elif isinstance(source, datasets.IterableDataset):
        if max_samples is None:
            raise ConfigurationError(
                f"{name} is a streaming data set, which may have no end: say by `max_samples` how many rows to take."
            )
        rows = as_table(list(source.take(max_samples)), name)
        logger.warning(f"{name} is a streaming data set: its first {len(rows):,} rows are taken, in their order.")
    else:
        raise ConfigurationError(
            f"The training data is a {type(source).__name__}; give a `datasets.Dataset`, a list of rows, a file, a "
            "folder, the id of a data set of the Hub, or a list of such."
        )
    if not len(rows):
        raise TextError(f"There are no rows in {name}.")
    recognise(rows.column_names, name)
    return rows


def mix_counts(rows: Sequence[int], shares: Sequence[float | None], most: int | None = None) -> list[int]:
    """How many rows of every source go into a mix: `s[i]` of `min_i rows[i] / s[i]` rows, or of `most` if fewer.

    So no row is taken twice. Sources without a share `s` divide the rest in proportion to their rows.
    """
    given = sum(share for share in shares if share is not None)
    free = sum(n for n, share in zip(rows, shares, strict=True) if share is None)
    if None in shares and given >= 1:
        raise ConfigurationError(f"The shares add up to {given:g} and leave nothing for the sources without one.")
    if None not in shares and abs(given - 1) > 1e-6:
        words = ", ".join(f"{share:g}" for share in shares)
        raise ConfigurationError(f"The shares {words} add up to {given:g}, not to 1.")
    parts = [(1 - given) * n / free if share is None else share for n, share in zip(rows, shares, strict=True)]
    size = min(n / part for n, part in zip(rows, parts, strict=True))
    size = size if most is None else min(size, most)
    return [min(n, round(size * part)) for n, part in zip(rows, parts, strict=True)]


@dataclass
class SourceReport:
    """What became of the rows of one source, which are in one of the `FORMATS`.

    `empty` rows have no text or no answer, `truncated` ones were cut off at the end, `dropped` ones left out because
    their prompts alone fill `max_length`, and `split` ones are plain texts that became several sequences. They give
    `sequences` with so many `tokens`, of which those `labelled` are learned (the first one of a sequence never is).
    """

    name: str
    format: str
    rows: int = 0
    empty: int = 0
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    sequences: int = 0
    tokens: int = 0
    labelled: int = 0

    def __str__(self) -> str:
        lost = [f"{getattr(self, n):,} {n}" for n in ("empty", "dropped", "truncated", "split") if getattr(self, n)]
        text = f"{self.name} ({self.format}): {self.rows:,} rows, {self.sequences:,} sequences"
        text += f", {self.tokens:,} tokens, {self.labelled:,} of them learned"
        return text + (f"; rows {', '.join(lost)}" if lost else "")


@dataclass
class DataReport:
    """What became of the training data: by source, and what was decided on the way, one sentence a note.

    `packed` is the number of sequences of at most `max_length` tokens after packing, `None` without it.
    """

    sources: list[SourceReport]
    max_length: int
    notes: list[str] = field(default_factory=list)
    packed: int | None = None

    def lines(self) -> list[str]:
        """The report in words."""
        lines = [str(one) for one in self.sources]
        if self.packed is not None:
            share = sum(one.tokens for one in self.sources) / (self.packed * self.max_length)
            lines.append(f"packed into {self.packed:,} sequences of {self.max_length} tokens, {share:.0%} full")
        return lines + self.notes


def prepare(
    dataset: Any, tokenizer: Any, *, max_length: int, context: int | None = None, prompt_loss: bool = False,
    packing: bool = False, seed: int = 0, stops: Collection[int] = (),
) -> tuple[Any, DataReport]:  # fmt: skip
    """Rows to what a Trainer takes: a `datasets.Dataset` with `input_ids` and `labels`, -100 on what is not learned.

    The ids and labels are those of TRL's `SFTTrainer`, which takes such a dataset as it is: of prompt and completion
    with `completion_only_loss`, of chats with `assistant_only_loss`. Where neither the chat template nor TRL's version
    of it marks what assistants say, every answer of a chat becomes an example of its own, of prompt and completion.
    Plain texts longer than `max_length` are cut into pieces, anything else is cut off.

    Args:
        dataset: What `load_rows` gives, or a `datasets.Dataset` of a known format.
        tokenizer: The model's tokenizer. It gets a pad token if it has none: its end-of-sequence token.
        max_length: Tokens in a sequence at most.
        context: Tokens that the model can take at most, if that is known.
        prompt_loss: Learn prompts too, not only answers.
        packing: Put short sequences together, shuffled by `seed`, up to `max_length`, and add the column
            `seq_lengths`. Train on it with `SFTConfig(padding_free=True, max_length=None)`: then positions begin anew
            in every example, from which Transformers sees that a token may look at its own example only.
        stops: Tokens at which the model stops, besides the tokenizer's end-of-sequence token.

    Returns:
        The sequences, and what became of the rows.

    Raises:
        ConfigurationError: There is no tokenizer, or one without end token, or the model is shorter than `max_length`.
        TextError: The rows are of no known format, or there is nothing to learn in them.
    """
    import datasets

    need("trl", extra="recover")
    _check(tokenizer, max_length, context)
    sources = dataset if isinstance(dataset, datasets.DatasetDict) else {_name(dataset): dataset}
    if not any(map(len, sources.values())):
        raise TextError("There are no rows to train on.")
    encoder = Encoder(tokenizer, max_length, prompt_loss, {tokenizer.eos_token_id, *stops})
    report = encoder.report
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        report.notes.append(
            f"no pad token in the tokenizer: {tokenizer.eos_token!r} takes its place, and is not learned there"
        )
    result = datasets.concatenate_datasets([encoder.encode_all(rows, name) for name, rows in sources.items()])
    report.notes += encoder.notes()
    if not len(result):
        raise TextError(f"There is nothing to learn in the data. {'. '.join(report.lines())}.")
    if packing:
        from trl import pack_dataset

        result = pack_dataset(result.shuffle(seed=seed), max_length, "bfd", {"load_from_cache_file": False})
        report.packed = len(result)
    for line in report.lines():
        (logger.warning if line in report.notes else logger.info)(line)
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


class Encoder:
    """Encodes rows with one tokenizer as TRL does, and counts what becomes of them; arguments as of `prepare`."""

    def __init__(self, tokenizer: Any, max_length: int, prompt_loss: bool, stops: set[int]) -> None:
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        self.tokenizer, self.max_length, self.prompt_loss, self.stops = tokenizer, max_length, prompt_loss, stops
        self.has_chats = bool(getattr(tokenizer, "chat_template", None))
        self.marks = self.has_chats and has_generation_markers(tokenizer.chat_template)
        self.template: str | None = None  # with marks, in place of the tokenizer's
        if self.has_chats and not self.marks:
            with suppress(ValueError):  # TRL has no version of this template with marks
                self.template, self.marks = get_training_chat_template(tokenizer), True
        self.counts: Counter[str] = Counter()
        self.report = DataReport([], max_length)

    def encode_all(self, rows: Any, name: str) -> Any:
        """The sequences of all rows of a source, as a `datasets.Dataset`; adds to the reports."""
        import datasets

        kind, parts = recognise(rows.column_names, name)
        count = SourceReport(name, kind)
        self.report.sources.append(count)
        ids = datasets.List(datasets.Value("int32"))

        def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[list[int]]]:
            pairs = []
            for i, number in enumerate(numbers):
                try:
                    pairs += self.sequences({column: values[i] for column, values in batch.items()}, parts, count)
                except TextError as error:
                    raise TextError(f"Row {number} of {name}, format {kind}: {error}") from error
            bar.update(len(numbers))
            return {"input_ids": [pair[0] for pair in pairs], "labels": [pair[1] for pair in pairs]}

        # In memory and under a name of its own: the counts must not be those of a cache, nor what TRL makes of it.
        # The bar of `datasets` is not shown on the command line, and there alone ours is.
        with tqdm(total=len(rows), desc="Tokenizing", disable=not only_ours()) as bar:
            return rows.map(
                encode, batched=True, with_indices=True, remove_columns=rows.column_names, keep_in_memory=True,
                features=datasets.Features(input_ids=ids, labels=ids), new_fingerprint=uuid4().hex, desc="Tokenizing",
            )  # fmt: skip

    def sequences(
        self, row: Mapping[str, Any], parts: dict[str, str | None], count: SourceReport
    ) -> list[tuple[list[int], list[int]]]:
        """Ids and labels of the sequences of one row, and its part of the account."""
        examples, found = self.examples(parts_of(row, parts), row), []
        count.rows += 1
        count.empty += not examples
        for example in examples:
            ids, labels = self.encode(example)
            plain, long = "text" in example, len(ids) > self.max_length
            starts = range(0, len(ids) if plain else 1, self.max_length)
            pieces = [(ids[i : i + self.max_length], labels[i : i + self.max_length]) for i in starts]
            pieces = [pair for pair in pieces if _learned(pair[1])]
            count.dropped += not pieces
            count.split += long and plain and bool(pieces)
            count.truncated += long and not plain and bool(pieces)
            found += pieces
        count.sequences += len(found)
        count.tokens += sum(len(ids) for ids, _ in found)
        count.labelled += sum(_learned(labels) for _, labels in found)
        return found

    def examples(self, parts: dict[str, Any], row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A row as TRL's trainer takes it: `text`, `prompt` and `completion`, or `messages`; none if it is empty."""
        more = {name: row[name] for name in ("tools", "chat_template_kwargs") if row.get(name)}
        example = example_of(parts, self.has_chats)
        if example is None:
            return []
        if "messages" not in example:
            return [{**example, **(more if isinstance(example.get("prompt"), list) else {})}]
        messages = example["messages"]
        said = [i for i, one in enumerate(messages) if i and one["role"] == "assistant" and says(one)]
        if said and (self.prompt_loss or (self.marks and len(said) > 1)):
            return [{"messages": messages[: said[-1] + 1], **more}]  # nobody answers what comes after the last answer
        self.counts["apart"] += len(said) > 1
        return [{"prompt": messages[:i], "completion": [messages[i]], **more} for i in said]

    def encode(self, example: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Ids and labels of an example in full length, as in TRL's `SFTTrainer`."""
        from trl.data_utils import common_prefix_length

        last, options = "text" if "text" in example else "completion", {}
        is_chat = not isinstance(example.get(last), str)
        if is_chat and not self.has_chats:
            raise TextError(f"it {NO_TEMPLATE}")
        if is_chat:
            tools = example.get("tools")
            if isinstance(tools, str):
                tools = parse_json(tools, "The value of `tools`", TextError, repeats=True)
            options = {"tools": tools, **example.get("chat_template_kwargs", {})}
        elif not example[last].endswith(self.tokenizer.eos_token):
            example = {**example, last: example[last] + self.tokenizer.eos_token}
        if "prompt" in example:
            ids = self._tokens(example["prompt"] + example["completion"], **options)["input_ids"]
            prompt = self._tokens(example["prompt"], add_generation_prompt=True, **options)["input_ids"]
            labels = [IGNORED] * (start := common_prefix_length(prompt, ids)) + ids[start:]
        elif not is_chat or self.prompt_loss:
            ids = labels = self._tokens(example[last if last in example else "messages"], **options)["input_ids"]
        else:
            options = {"chat_template": self.template, "return_assistant_tokens_mask": True, **options}
            found = self._tokens(example["messages"], **options)
            ids, mask = found["input_ids"], found["assistant_masks"]
            labels = [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)]
        self.counts["chats"] += is_chat
        self.counts["ended"] += is_chat and not self.stops.isdisjoint(labels)
        return ids, list(ids) if self.prompt_loss else labels

    def prompt_ids(self, prompt: str | list[dict[str, Any]], example: Mapping[str, Any]) -> list[int]:
        """Ids of what the model reads before it answers; `example` may have options of the chat template."""
        if isinstance(prompt, str):
            return self._tokens(prompt)["input_ids"]
        options = example.get("chat_template_kwargs", {})
        return self._tokens(prompt, add_generation_prompt=True, **options)["input_ids"]

    def _tokens(self, text: str | list[dict[str, Any]], **options: Any) -> Any:
        if isinstance(text, str):
            return self.tokenizer(text=text, verbose=False)
        try:
            return self.tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, **options)
        except Exception as error:  # a template is a program of the model's author and fails as it likes
            raise TextError(f"the chat template cannot write it: {error}") from error

    def notes(self) -> list[str]:
        """What is lost, how the answers of chats were found, and whether the model would learn to stop after them."""
        notes = [
            f"of {one.name} {one.dropped:,} rows are dropped because their prompts alone fill `max_length` "
            f"{self.max_length}: set it higher to learn their answers"
            for one in self.report.sources
            if one.dropped
        ]
        if self.counts["apart"]:
            notes.append(
                f"every answer of {self.counts['apart']:,} chats is an example of its own: the chat template does not "
                "mark what assistants say"
            )
        if self.counts["chats"] and not self.counts["ended"]:
            names = ", ".join(repr(self.tokenizer.convert_ids_to_tokens(stop)) for stop in sorted(self.stops))
            notes.append(
                f"the chat template never writes {names} after an answer, so that the model will not learn to stop: "
                "add the token to `tokenizer.chat_template`, or name the one that it writes as `tokenizer.eos_token`"
            )
        return notes


def _learned(labels: list[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])
