"""Training rows from files, folders, the Hub or memory, of one source or mixed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..errors import ConfigurationError, TextError
from ..recovery import formats
from ..text.reading import as_table, read_table
from .formats import Example, read_example, recognise


logger = logging.get_logger(__name__)

# Columns of the common form: where a row is from, its format, and the example in it as JSON.
COMMON = ("source", "format", "example")
UNNAMED = "data"


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
    if isinstance(source, (list, tuple)) and not _is_rows(source) and not _is_pair(source):
        if not source:
            raise TextError("There is nothing to train on: the list of sources is empty.")
        if len(source) > 1:
            return _mix([_with_share(one) for one in source], split, max_samples, seed)
        source = source[0]
    source, share = _with_share(source)
    if share is not None:
        raise ConfigurationError(f"{_name(source)} has the share {share:g} of a mix, but there is no other source.")
    rows = _open(source, split, max_samples)
    if max_samples is not None and max_samples < len(rows):
        rows = rows.shuffle(seed=seed).select(range(max_samples))
    return rows


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

    def convert(batch: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[str]]:
        columns = list(batch)
        examples = [
            read_example(dict(zip(columns, values, strict=True)), known, f"Row {number} of {name}")
            for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True)
        ]
        count = len(examples)
        return {"source": [name] * count, "format": [known.name] * count, "example": list(map(dump, examples))}

    features = datasets.Features({column: datasets.Value("string") for column in COMMON})
    return rows.map(
        convert, batched=True, with_indices=True, remove_columns=rows.column_names, features=features,
        load_from_cache_file=False, desc=f"Reading {name}",
    )  # fmt: skip


def dump(example: Example | None) -> str:
    """An example as JSON, an empty string for none."""
    return "" if example is None else json.dumps({type(example).__name__: dataclasses.asdict(example)})


def restore(text: str) -> Example | None:
    """What `dump` was given."""
    if not text:
        return None
    [(name, values)] = json.loads(text).items()
    return getattr(formats, name)(**values)


def _is_rows(source: Sequence[Any]) -> bool:
    return bool(source) and all(isinstance(row, Mapping) for row in source)


def _is_pair(source: Sequence[Any]) -> bool:
    """Whether it is a source and its share."""
    return len(source) == 2 and isinstance(source[1], (int, float)) and not isinstance(source[0], Mapping)


def _with_share(source: Any) -> tuple[Any, float | None]:
    share = None
    if isinstance(source, (list, tuple)) and _is_pair(source):
        source, share = source
    elif isinstance(source, (str, os.PathLike)) and not Path(source).expanduser().exists():
        before, at, after = str(source).rpartition("@")
        with suppress(ValueError):  # not a number: a part of the name
            source, share = (before, float(after)) if at else (source, None)
    if share is not None and not 0 < share <= 1:
        raise ConfigurationError(f"The share of {_name(source)} is {share:g}; it must be above 0 and at most 1.")
    return source, share


def public_sources(source: Any) -> list[str]:
    """Sources as they are given on the command line, with the names of local files in place of their paths."""
    many = isinstance(source, (list, tuple)) and not _is_rows(source) and not _is_pair(source)
    pairs = [_with_share(one) for one in (source if many else [source])]
    return [_name(one) if share is None else f"{_name(one)}@{share:g}" for one, share in pairs]


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
    names = _distinct([rows.info.dataset_name for rows in opened])
    shares = [share for _, share in sources]
    counts = mix_counts([len(rows) for rows in opened], shares, max_samples)
    reason = "no row is taken twice, and the shares ask for so many" if any(shares) else "`max_samples` asks for fewer"
    for name, rows, count in zip(names, opened, counts, strict=True):
        if count < len(rows):
            logger.warning(f"Of {name} {count:,} of {len(rows):,} rows are taken: {reason}.")
    # Which rows of a source are drawn does not depend on the other sources.
    drawn = [
        rows if count == len(rows) else rows.select(sorted(random.Random(seed).sample(range(len(rows)), count)))
        for rows, count in zip(opened, counts, strict=True)
    ]
    common = [to_common(rows, name) for rows, name in zip(drawn, names, strict=True) if len(rows)]
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


def _distinct(names: list[str]) -> list[str]:
    """Names of which none is there twice: the second `train.jsonl` is `train.jsonl (2)`."""
    return [f"{n} ({names[: i + 1].count(n)})" if names[:i].count(n) else n for i, n in enumerate(names)]
