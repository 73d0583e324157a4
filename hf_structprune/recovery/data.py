"""Training data: rows of any known format to token ids and labels, and an account of what became of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import uuid4

from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import ConfigurationError, TextError
from ..files.reading import parse_json
from ..installed import need
from .rows import COMMON, Example, load_rows, public_sources, to_common


__all__ = ["DataReport", "SourceReport", "load_rows", "prepare", "public_sources", "stopping_tokens"]

logger = logging.get_logger(__name__)

IGNORED = -100  # label of a token that is not learned
# How the answers in chats of several turns are found.
ALL_BY_MASK = "all answers of a chat are learned; the chat template marks them"
ALL_BY_PREFIX = "all answers of a chat are learned; each is what the chat template adds after its prompt"
LAST = (
    "only the last answer of a chat is learned: the chat template writes earlier turns in another way once others "
    "follow"
)
# The prompt of Stanford Alpaca, with the line break at its end that Alpaca-LoRA added.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass
class SourceReport:
    """What became of the rows of one source.

    Args:
        name: Name of the source.
        format: Format of its rows, see `rows.FORMATS`.
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

    def __str__(self) -> str:
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
        lines = [str(one) for one in self.sources]
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
    report = DataReport([], max_length)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        note = f"no pad token in the tokenizer: {tokenizer.eos_token!r} takes its place, and is not learned there"
        logger.warning(f"There is {note}.")
        report.notes.append(note)
    work = _Preparation(Encoder(tokenizer, prompt_loss=prompt_loss), max_length, {tokenizer.eos_token_id, *stops})
    result = work.run(to_common(dataset))
    report.sources = [work.sources[key] for key in sorted(work.sources)]
    for note, count in work.answers.items():
        logger.info(f"{note} ({count:,} chats)")
        report.notes.append(f"{note} ({count:,} chats)")
    for note in work.warnings():
        logger.warning(f"{note[0].upper()}{note[1:]}.")
        report.notes.append(note)
    if not len(result):
        raise TextError(f"There is nothing to learn in the data. {'. '.join(report.lines())}.")
    if packing:
        need("trl", extra="recover")
        from trl import pack_dataset

        result = pack_dataset(result.shuffle(seed=seed), max_length, "bfd", {"load_from_cache_file": False})
        report.packed = len(result)
    return result, report


def stopping_tokens(model: PreTrainedModel) -> list[int]:
    """Tokens at which a model stops when it generates."""
    given = getattr(model.generation_config, "eos_token_id", None)
    return [] if given is None else [given] if isinstance(given, int) else list(given)


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


class _Preparation:
    """Encodes and cuts rows, and counts what becomes of them.

    Args:
        encoder: Of the rows.
        max_length: Tokens in a sequence at most.
        stops: Tokens at which the model stops.
    """

    def __init__(self, encoder: Encoder, max_length: int, stops: Collection[int]) -> None:
        self.encoder, self.max_length, self.stops = encoder, max_length, frozenset(stops)
        self.sources: dict[tuple[str, str], SourceReport] = {}
        self.answers: Counter[str] = Counter()  # chats by how their answers were found
        self.chats, self.ended = 0, 0  # whether the model would learn to stop

    def run(self, rows: Any) -> Any:
        """The sequences of rows in the common form."""
        import datasets

        columns = ("input_ids", "labels")
        features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in columns})

        def encode(batch: dict[str, list[str]], numbers: list[int]) -> dict[str, list[list[int]]]:
            rows = zip(numbers, *(batch[column] for column in COMMON), strict=True)
            pieces = [piece for row in rows for piece in self._sequences(*row)]
            return {name: [getattr(piece, name) for piece in pieces] for name in columns}

        # In memory and under a name of its own: neither the counts here nor what TRL makes of it may be of a cache.
        return rows.map(
            encode, batched=True, with_indices=True, remove_columns=rows.column_names, features=features,
            keep_in_memory=True, new_fingerprint=uuid4().hex, desc="Tokenizing",
        )  # fmt: skip

    def _sequences(self, number: int, source: str, kind: str, text: str) -> list[Encoded]:
        """Sequences of one row, and its part of the account."""
        count = self.sources.setdefault((source, kind), SourceReport(source, kind))
        count.rows += 1
        if not text:
            count.empty += 1
            return []
        try:
            encoded = self.encoder(json.loads(text))
        except TextError as error:
            raise TextError(f"Row {number} of the data (from {source}): {error}") from error
        pieces = [piece for piece in encoded.cut(self.max_length) if piece.learned]
        long = len(encoded.input_ids) > self.max_length and bool(pieces)
        count.dropped += not pieces
        count.long_prompts += not pieces and bool(encoded.learned)
        count.split += long and encoded.plain
        count.truncated += long and not encoded.plain
        count.sequences += len(pieces)
        count.tokens += sum(len(piece.input_ids) for piece in pieces)
        count.labelled += sum(piece.learned for piece in pieces)
        if encoded.is_chat:
            self.chats += 1
            self.ended += not self.stops.isdisjoint(_last_learned(encoded.labels))
        if pieces and encoded.answers is not None:
            self.answers[encoded.answers] += 1
        return pieces

    def warnings(self) -> list[str]:
        """Rows whose prompts leave no room for an answer, and chats after which a model would not stop."""
        notes = [
            f"of {one.name} {one.long_prompts:,} rows are dropped because their prompts alone fill `max_length` "
            f"{self.max_length}: set it higher to learn their answers"
            for _, one in sorted(self.sources.items())
            if one.long_prompts
        ]
        if self.chats and not self.ended:
            tokenizer = self.encoder.tokenizer
            names = ", ".join(repr(tokenizer.convert_ids_to_tokens(stop)) for stop in sorted(self.stops))
            notes.append(
                f"the chat template never writes {names} after an answer, so that the model will not learn to stop: "
                "add the token to `tokenizer.chat_template`, or name the one that it writes as `tokenizer.eos_token` "
                f"({self.chats:,} chats)"
            )
        return notes


def _last_learned(labels: list[int]) -> list[int]:
    """The last run of tokens that are learned."""
    end = next((i for i in range(len(labels), 0, -1) if labels[i - 1] != IGNORED), 0)
    start = next((i for i in range(end, 0, -1) if labels[i - 1] == IGNORED), 0)
    return labels[start:end]


@dataclass
class Encoded:
    """Token ids of an example and their labels, of equal length. `plain` text may be cut into pieces.

    `answers` says how the answers of a chat of several turns were found, else it is `None`; `is_chat` that the chat
    template wrote it.
    """

    input_ids: list[int]
    labels: list[int]
    plain: bool = False
    answers: str | None = None
    is_chat: bool = False

    @property
    def learned(self) -> int:
        """Tokens that the loss counts; the first one of a sequence is predicted from nothing."""
        return sum(label != IGNORED for label in self.labels[1:])

    def cut(self, max_length: int) -> list[Encoded]:
        """Plain text in pieces of at most `max_length` tokens; of anything else the first `max_length`."""
        starts = range(0, len(self.input_ids) if self.plain else 1, max_length)
        return [Encoded(self.input_ids[i : i + max_length], self.labels[i : i + max_length]) for i in starts]


class Encoder:
    """Encodes examples with one tokenizer, to the ids and labels that TRL's `SFTTrainer` makes of the same rows.

    Args:
        tokenizer: A `transformers` tokenizer with an end-of-sequence token.
        prompt_loss: Learn prompts too.
    """

    def __init__(self, tokenizer: Any, *, prompt_loss: bool = False):
        self.tokenizer = tokenizer
        self.prompt_loss = prompt_loss
        self.chats = bool(getattr(tokenizer, "chat_template", None))
        self._marked: tuple[bool, str | None] | None = None

    def __call__(self, example: Example) -> Encoded:
        """Encodes an example (see `rows`) in full length.

        Raises:
            TextError: It is a chat, and the tokenizer has no chat template or its template refuses the chat.
        """
        if "instruction" in example:
            example = self._task(**example)
        if "text" in example:
            ids = self._plain(self._ended(example["text"]))
            return Encoded(ids, list(ids), plain=True)
        if "prompt" in example:
            ids = self._plain(example["prompt"] + self._ended(example["completion"]))
            return Encoded(ids, self._labels(ids, [(_shared(self._plain(example["prompt"]), ids), len(ids))]))
        if not self.chats:
            raise TextError(
                "it is a chat, but the tokenizer has no chat template: set `tokenizer.chat_template`, use the "
                "tokenizer of an instruction-tuned model, or give the rows as `prompt` and `completion` or as `text`."
            )
        return self._chat(**example)

    def _task(self, instruction: str, input: str, output: str) -> Example:
        """An instruction as a chat, or in the prompt of Alpaca where there are no chats."""
        if not self.chats:
            prompt = ALPACA_WITH_INPUT if input.strip() else ALPACA
            return {"prompt": prompt.format(instruction=instruction, input=input), "completion": output}
        question = f"{instruction}\n\n{input}" if input.strip() else instruction
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
        return {"messages": messages, "prompt_turns": 1, "template": {}}

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text=text, verbose=False)["input_ids"])

    def _ended(self, text: str) -> str:
        return text if text.endswith(self.tokenizer.eos_token) else text + self.tokenizer.eos_token

    def _chat(self, messages: list[dict[str, Any]], prompt_turns: int | None, template: dict[str, Any]) -> Encoded:
        if isinstance(template.get("tools"), str):
            tools = parse_json(template["tools"], "The value of `tools`", TextError, repeats=True)
            template = {**template, "tools": tools}

        def render(turns: int | None = None, prompt: bool = False) -> list[int]:
            return list(self._apply(messages[:turns], add_generation_prompt=prompt, **template)["input_ids"])

        def rest(turns: int) -> list[tuple[int, int]]:
            return [(_shared(render(turns, prompt=True), ids), len(ids))]

        said, ids = [i for i, message in enumerate(messages) if message["role"] == "assistant"], render()
        if prompt_turns is None and len(said) == 1:
            prompt_turns = said[0]
        if prompt_turns is not None:
            return Encoded(ids, self._labels(ids, rest(prompt_turns)), is_chat=True)
        if self.prompt_loss:
            return Encoded(ids, list(ids), is_chat=True)
        marked, marking = self._generation_marks()
        if marked:
            options = {"chat_template": marking, "return_assistant_tokens_mask": True, **template}
            rendered = self._apply(messages, **options)
            pairs = zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
            labels = [token if learned else IGNORED for token, learned in pairs]
            return Encoded(list(rendered["input_ids"]), labels, answers=ALL_BY_MASK, is_chat=True)
        spans, answers = [], ALL_BY_PREFIX
        for turn in said:
            before, after = render(turn, prompt=True), render(turn + 1)
            if ids[: len(before)] != before or ids[: len(after)] != after:  # not how the whole begins
                spans, answers = rest(said[-1]), LAST
                break
            spans.append((len(before), len(after)))
        return Encoded(ids, self._labels(ids, spans), answers=answers, is_chat=True)

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        except Exception as error:  # a template is a program of the model's author and fails as it likes
            raise TextError(f"the chat template cannot write it: {error}") from error

    def _labels(self, ids: list[int], learned: list[tuple[int, int]]) -> list[int]:
        if self.prompt_loss:
            return list(ids)
        labels = [IGNORED] * len(ids)
        for start, end in learned:
            labels[start:end] = ids[start:end]
        return labels

    def _generation_marks(self) -> tuple[bool, str | None]:
        """Whether the answers are marked in the chat template, or in TRL's version of it, which is then given too."""
        if self._marked is None:
            need("trl", extra="recover")
            from trl.chat_template_utils import get_training_chat_template, has_generation_markers

            try:
                marked = has_generation_markers(self.tokenizer.chat_template)
                self._marked = (True, None) if marked else (True, get_training_chat_template(self.tokenizer))
            except ValueError:  # TRL has no version of this template with marks
                self._marked = (False, None)
        return self._marked


def _shared(ids: list[int], other: list[int]) -> int:
    """Number of leading ids that two sequences share. A prompt may merge with what follows, and ends there."""
    return next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
