"""Training rows from files, folders, the Hub or memory, of one source or mixed, and what kinds of rows are known.

A row of any known kind becomes an example, a dictionary that JSON can hold:

* `text`: plain text; every token is learned.
* `prompt` and `completion`: a text and how it goes on; the second part is learned.
* `instruction`, `input` and `output`: a task and its answer; written as a chat or in the Alpaca prompt.
* `messages`, with whatever the chat template reads in them; so many as `prompt_turns` says are the prompt and the
  others are learned (`None`: what assistants say is); `template` has more arguments of the chat template.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..errors import ConfigurationError, TextError
from ..text.reading import as_table, read_table


logger = logging.get_logger(__name__)

Example = dict[str, Any]
# Columns of the common form: where a row is from, its format, and the example in it as JSON, "" if there is none.
COMMON = ("source", "format", "example")
UNNAMED = "data"
# Names of the speakers in conversations with `from` and `value`, and the roles that chat templates know.
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "function": "tool",
    "developer": "developer",
}  # fmt: skip


def load_rows(source: Any, *, split: str = "train", max_samples: int | None = None, seed: int = 0) -> Any:
    """Rows to train on, as a `datasets.Dataset`.

    A single source keeps its columns. Several are mixed: their rows are brought into the common form that `prepare`
    also reads (columns `source`, `format`, `example`) and shuffled. All rows of all sources are taken, unless a source
    says its share of the mix as `"SOURCE@0.3"`: then the mix is as large as it can be without a row twice, and sources
    without a share divide what is left in proportion to their rows.

    Args:
        source: A `datasets.Dataset` (a streaming one needs `max_samples`), a list of row dicts, a `.jsonl`, `.json` or
            `.txt` file, a folder (made by `save_to_disk`, or with data files), the id of a data set of the Hub, or a
            list of such sources, each with `@SHARE` at its end or as a pair `(source, share)` if wanted. A `.txt` file
            is one text.
        split: Split of data sets that have several.
        max_samples: At most so many rows, drawn at random; of a streaming data set the first ones.
        seed: Of the drawing and the mixing.

    Raises:
        TextError: A source cannot be read, has no rows, or its columns are of no known format.
        ConfigurationError: The shares are impossible.
    """
    sources = _with_shares(source)
    if not sources:
        raise TextError("There is nothing to train on: the list of sources is empty.")
    if len(sources) > 1:
        return _mix(sources, split, max_samples, seed)
    [(source, share)] = sources
    if share is not None:
        raise ConfigurationError(f"{_name(source)} has the share {share:g} of a mix, but there is no other source.")
    rows = _open(source, split, max_samples)
    if max_samples is not None and max_samples < len(rows):
        rows = rows.shuffle(seed=seed).select(range(max_samples))
    return rows


def public_sources(source: Any) -> list[str]:
    """Sources as they are given on the command line, with the names of local files in place of their paths."""
    return [_name(one) if share is None else f"{_name(one)}@{share:g}" for one, share in _with_shares(source)]


def _with_shares(source: Any) -> list[tuple[Any, float | None]]:
    """One source or several, each with its share."""
    many = isinstance(source, (list, tuple)) and not _is_pair(source)
    rows = many and bool(source) and all(isinstance(row, Mapping) for row in source)
    return [_with_share(one) for one in (source if many and not rows else [source])]


def _is_pair(source: Any) -> bool:
    """Whether it is a source and its share."""
    pair = isinstance(source, (list, tuple)) and len(source) == 2 and isinstance(source[1], (int, float))
    return pair and not isinstance(source[0], Mapping)


def _with_share(source: Any) -> tuple[Any, float | None]:
    share = None
    if _is_pair(source):
        source, share = source
    elif isinstance(source, (str, os.PathLike)) and not Path(source).expanduser().exists():
        before, at, after = str(source).rpartition("@")
        with suppress(ValueError):  # not a number: a part of the name
            source, share = (before, float(after)) if at else (source, None)
    if share is not None and not 0 < share <= 1:
        raise ConfigurationError(f"The share of {_name(source)} is {share:g}; it must be above 0 and at most 1.")
    return source, share


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        local = Path(source).expanduser()
        return local.resolve().name if local.exists() else str(source)  # the whole path is nobody's business
    return getattr(getattr(source, "info", None), "dataset_name", None) or UNNAMED


def _open(source: Any, split: str, max_samples: int | None) -> Any:
    """All rows of a source, with their columns, under its name; of a stream the first `max_samples`.

    Raises:
        ConfigurationError: It is nothing that rows can be read from, or a stream without an end.
        TextError: It cannot be read, has no rows, or its columns are of no known format.
    """
    import datasets

    name = _name(source)
    if isinstance(source, (str, os.PathLike)):
        rows = read_table(source, split=split)
    elif isinstance(source, (list, tuple)):
        rows = as_table(source, name)
    elif isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in source:
            raise TextError(f"The data set has no split {split!r}; it has {', '.join(map(repr, source))}.")
        return _open(source[split], split, max_samples)
    elif isinstance(source, datasets.IterableDataset):
        rows = _first_rows(source, name, max_samples)
    elif isinstance(source, datasets.Dataset):
        rows = source
    else:
        raise ConfigurationError(
            f"The training data is a {type(source).__name__}; give a `datasets.Dataset`, a list of rows, a file, a "
            "folder, the id of a data set of the Hub, or a list of such."
        )
    if not len(rows):
        raise TextError(f"There are no rows in {name}.")
    rows = rows.select(range(len(rows)))  # a copy of the description, which gets a name
    rows.info.dataset_name = name
    if set(rows.column_names) != set(COMMON):
        recognise(rows.column_names, name)
    return rows


def _first_rows(stream: Any, name: str, count: int | None) -> Any:
    """The first rows of a streaming data set, in memory: where it ends is not known before it is read."""
    import datasets

    if count is None:
        raise ConfigurationError(
            f"{name} is a streaming data set, which may have no end: say by `max_samples` how many rows to take."
        )
    found = list(stream.take(count))
    rows = datasets.Dataset.from_list(found, features=stream.features if found else None)
    logger.warning(f"{name} is a streaming data set: its first {len(rows):,} rows are taken, in their order.")
    return rows


def _mix(sources: list[tuple[Any, float | None]], split: str, max_samples: int | None, seed: int) -> Any:
    import datasets

    opened = [_open(source, split, max_samples) for source, _ in sources]
    names = [rows.info.dataset_name for rows in opened]  # the second `train.jsonl` is `train.jsonl (2)`
    names = [f"{n} ({names[: i + 1].count(n)})" if names[:i].count(n) else n for i, n in enumerate(names)]
    shares = [share for _, share in sources]
    counts = mix_counts([len(rows) for rows in opened], shares, max_samples)
    reason = "no row is taken twice, and the shares ask for so many" if any(shares) else "`max_samples` asks for fewer"
    common = []
    for name, rows, count in zip(names, opened, counts, strict=True):
        if count < len(rows):
            logger.warning(f"Of {name} {count:,} of {len(rows):,} rows are taken: {reason}.")
            # Which rows of a source are drawn does not depend on the other sources.
            rows = rows.select(sorted(random.Random(seed).sample(range(len(rows)), count)))
        if count:
            common.append(to_common(rows, name))
    return datasets.concatenate_datasets(common).shuffle(seed=seed)


def mix_counts(rows: Sequence[int], shares: Sequence[float | None], most: int | None = None) -> list[int]:
    """How many rows of every source go into a mix.

    With `s` the shares, the mix has `min_i rows[i] / s[i]` rows, so that no row is taken twice, or `most` if that is
    fewer, and source `i` gives `s[i]` of them. Without a share, all rows are taken.

    Args:
        rows: Rows that every source has.
        shares: Their shares; sources without one divide the rest in proportion to their rows.
        most: Rows of the mix at most.

    Raises:
        ConfigurationError: The shares do not add up to 1, or leave nothing for the sources without one.
    """
    given = sum(share for share in shares if share is not None)
    free = sum(n for n, share in zip(rows, shares, strict=True) if share is None)
    if None not in shares and abs(given - 1) > 1e-6:
        raise ConfigurationError(
            f"The shares {', '.join(f'{share:g}' for share in shares)} add up to {given:g}, not to 1."
        )
    if None in shares and given >= 1:
        raise ConfigurationError(f"The shares add up to {given:g} and leave nothing for the sources without one.")
    parts = [(1 - given) * n / free if share is None else share for n, share in zip(rows, shares, strict=True)]
    size = min(n / part for n, part in zip(rows, parts, strict=True))
    size = size if most is None else min(size, most)
    # Rounding down what each one gets, and the rest to those that lost most: the sum is that of the mix.
    total = round(size)
    exact = [size * part for part in parts]
    counts = [min(int(value + 1e-9), n) for value, n in zip(exact, rows, strict=True)]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i]):
        if sum(counts) < total and counts[i] < rows[i]:
            counts[i] += 1
    return counts


def to_common(rows: Any, name: str | None = None) -> Any:
    """Rows in the common form; those that are in it already are returned as they are.

    A row without text is kept with an empty example, so that it can be counted.

    Raises:
        TextError: The columns are of no known format, or a value is of the wrong kind.
    """
    if set(rows.column_names) == set(COMMON):
        return rows
    import datasets

    name = name or rows.info.dataset_name or UNNAMED
    known = recognise(rows.column_names, name)

    def convert(row: Mapping[str, Any], number: int) -> dict[str, str]:
        example = read_example(row, known, f"Row {number} of {name}")
        return {"source": name, "format": known.name, "example": "" if example is None else json.dumps(example)}

    features = datasets.Features({column: datasets.Value("string") for column in COMMON})
    return rows.map(
        convert, with_indices=True, remove_columns=rows.column_names, features=features, load_from_cache_file=False,
        desc=f"Reading {name}",
    )  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A kind of rows.

    Args:
        name: What it is called.
        columns: For every part, the names that its column may have; a last name `None` says that it may be missing.
        read: Makes an example of a row's parts and the row; `None` if there is nothing to learn in it.
    """

    name: str
    columns: Mapping[str, tuple[str | None, ...]]
    read: Callable[[dict[str, Any], Mapping[str, Any]], Example | None]

    def parts(self, columns: Sequence[str]) -> dict[str, str | None] | None:
        """The column of every part, or `None` if rows with these columns are of another format."""
        there = {*columns, None}
        if not all(any(name in there for name in names) for names in self.columns.values()):
            return None
        return {part: next(name for name in names if name in there) for part, names in self.columns.items()}

    def __str__(self) -> str:
        words = ["|".join(filter(None, names)) + " (optional)" * (None in names) for names in self.columns.values()]
        return f"{self.name}: {', '.join(words)}"


def recognise(columns: Sequence[str], where: str) -> Format:
    """The format of rows with these columns: the first of `FORMATS` whose columns are all there.

    Raises:
        TextError: None of them is.
    """
    found = next((known for known in FORMATS if known.parts(columns) is not None), None)
    if found is None:
        raise TextError(
            f"{where} has the columns {', '.join(map(repr, columns)) or 'none'}; training needs those of one of these "
            f"formats: {'; '.join(map(str, FORMATS))}. Rename the columns, or make one `text` of them."
        )
    return found


def read_example(row: Mapping[str, Any], known: Format, where: str) -> Example | None:
    """The example in a row, or `None` if its text or its answer is empty.

    Raises:
        TextError: A value is of the wrong kind.
    """
    try:
        return known.read({part: row.get(column) for part, column in known.parts(list(row)).items()}, row)
    except _WrongValueError as error:
        raise TextError(f"{where}, format {known.name}: {error}") from error


class _WrongValueError(Exception):
    """What is wrong with a row, without where it is."""


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _WrongValueError(f"{name} is a {type(value).__name__}, not a text.")
    return value


def _read_text(parts: dict[str, Any], row: Mapping[str, Any]) -> Example | None:
    text = _text(parts["text"], "the text")
    return {"text": text} if text.strip() else None


def _read_pair(parts: dict[str, Any], row: Mapping[str, Any]) -> Example | None:
    prompt, completion = parts["prompt"], parts["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise _WrongValueError("`prompt` and `completion` must both be texts or both be lists of messages.")
    if isinstance(prompt, list):
        prompt, completion = _messages(prompt), _messages(completion)
        return _chat(prompt + completion, len(prompt), row) if prompt and any(map(_says, completion)) else None
    prompt, completion = _text(prompt, "the prompt"), _text(completion, "the completion")
    return {"prompt": prompt, "completion": completion} if completion.strip() else None


def _read_instruction(parts: dict[str, Any], row: Mapping[str, Any]) -> Example | None:
    values = {part: _text(parts.get(part), f"the {part}") for part in ("instruction", "input", "output")}
    return values if values["output"].strip() and (values["instruction"] + values["input"]).strip() else None


def _read_chat(parts: dict[str, Any], row: Mapping[str, Any]) -> Example | None:
    messages = _messages(parts["messages"])
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant" and _says(message)]
    # What comes after the last answer is answered by nobody.
    return _chat(messages[: said[-1] + 1], None, row) if said else None


def _chat(messages: list[dict[str, Any]], prompt_turns: int | None, row: Mapping[str, Any]) -> Example:
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    template = {**tools, **(row.get("chat_template_kwargs") or {})}
    return {"messages": messages, "prompt_turns": prompt_turns, "template": template}


def _says(message: Mapping[str, Any]) -> bool:
    return bool(message["content"] or message.get("tool_calls"))


def _messages(value: Any) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _WrongValueError(f"the messages are a {type(value).__name__}, not a list.")
    return [_message(message) for message in value]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _WrongValueError(f"a message is a {type(message).__name__}, not an object with `role` and `content`.")
    values = {key: value for key, value in message.items() if value is not None}  # tables fill up with None
    if "from" in values and "role" not in values:
        values["role"] = values.pop("from")
    if "value" in values and "content" not in values:
        values["content"] = values.pop("value")
    if values.get("role") not in ROLES:
        raise _WrongValueError(f"a message is by {values.get('role')!r}; known are {', '.join(ROLES)}.")
    return {**values, "role": ROLES[values["role"]], "content": _content(values.get("content"))}


def _content(value: Any) -> str:
    """The text of a message, whole or in parts: `[{"type": "text", "text": "..."}]`."""
    if not isinstance(value, list):
        return _text(value, "a message")
    texts = []
    for part in value:
        kind = part.get("type") or "text" if isinstance(part, Mapping) else "text"
        if kind != "text":
            raise _WrongValueError(f"a message has a part of type {kind!r}; only text can be learned.")
        texts.append(_text(part.get("text") if isinstance(part, Mapping) else part, "a part of a message"))
    return "".join(texts)


_TASK = {"instruction": ("instruction",), "input": ("input", "context", None), "output": ("output", "response")}
_QUESTION = {"instruction": ("question",), "output": ("answer",)}

# In the order in which they are looked for: rows of chats and instructions often have their text once more.
FORMATS = (
    Format("messages", {"messages": ("messages",)}, _read_chat),
    Format("conversations", {"messages": ("conversations",)}, _read_chat),
    Format("prompt-completion", {"prompt": ("prompt",), "completion": ("completion",)}, _read_pair),
    Format("instruction", _TASK, _read_instruction),
    Format("question-answer", _QUESTION, _read_instruction),
    Format("text", {"text": ("text",)}, _read_text),
)
