"""Texts to evaluate on: named ones that papers use, local files and data sets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data import wikitext2_sample
from ..errors import ConfigurationError, TextError
from ..text.reading import FILES, is_local, read_lines, read_rows


SAMPLE = "sample"


@dataclass(frozen=True)
class EvaluationText:
    """A text to measure on.

    Args:
        name: Short, without slashes: what figures are called by, `perplexity/<name>`.
        text: The text itself.
        source: Where it comes from, in words, for tables and cards.
    """

    name: str
    text: str
    source: str


@dataclass(frozen=True)
class NamedText:
    """A data set of the Hub that papers measure perplexity on, and how they make one text of it.

    Args:
        dataset: Id on the Hub.
        splits: Splits that may be asked for; the first is the usual one.
        config_name: Configuration of the data set.
        column: The column with the text.
        documents: How many rows are taken, from the first one. `None` takes all.
        separator: What rows are joined with.
        loading: More arguments of `datasets.load_dataset`.
    """

    dataset: str
    splits: tuple[str, ...]
    config_name: str | None = None
    column: str = "text"
    documents: int | None = None
    separator: str = "\n\n"
    loading: dict[str, Any] = field(default_factory=dict)


TEXTS = {
    # LLM-Pruner, SparseGPT, Wanda, ...: the whole split.
    "wikitext2": NamedText("Salesforce/wikitext", ("test", "validation", "train"), "wikitext-2-raw-v1"),
    # The repository holds a script, which `datasets` 4 no longer runs; the Hub's own conversion to Parquet is on this
    # branch. Most papers measure the test split, LLM-Pruner the validation split.
    "ptb": NamedText(
        "ptb-text-only/ptb_text_only",
        ("test", "validation", "train"),
        column="sentence",
        loading={"revision": "refs/convert/parquet"},
    ),
    # As SparseGPT, Wanda and GPTQ's `c4-new`: the first 1,100 documents of the first of eight validation files (40 MB;
    # the whole of C4 is 300 GB), joined with a space.
    "c4": NamedText(
        "allenai/c4",
        ("validation",),
        documents=1100,
        separator=" ",
        loading={"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}},
    ),
}


def load_text(
    spec: str, *, config_name: str | None = None, split: str | None = None, column: str | None = None
) -> EvaluationText:
    """Loads a text to evaluate on.

    | `spec` | what it is |
    | --- | --- |
    | `"sample"` | the leading articles of WikiText-2's test split, packaged: compares models with each other |
    | `"wikitext2"` | WikiText-2 raw, test split (`Salesforce/wikitext`) |
    | `"ptb"` | Penn Treebank, test split (`ptb-text-only/ptb_text_only`); LLM-Pruner uses `split="validation"` |
    | `"c4"` | the first 1,100 documents of C4's English validation split (`allenai/c4`), joined with a space |
    | a `.txt` file | rows as in WikiText-2, see `read_text` |
    | a `.jsonl` or `.json` file | the texts under the key `column` |
    | a folder | a data set made by `datasets.save_to_disk`, or a folder of data files |
    | an id | a data set of the Hub |

    Rows are joined with two line breaks, none left out, unless the table says something else. A folder that has the
    name of a named text is read as `"./ptb"`.

    Args:
        spec: What to load.
        config_name: Configuration of a data set, for example `"wikitext-103-raw-v1"`.
        split: Split of a data set; `"validation[:1000]"` takes the first 1,000 rows. Default: `"test"`, or the usual
            one of a named text.
        column: Column of a data set or key in a JSON file. Default: `"text"`.

    Raises:
        ConfigurationError: An option does not go with this kind of text.
        TextError: There is no such text, split or column, the Hub cannot be reached, or there is nothing in it.
    """
    path, options = Path(spec).expanduser(), {"config_name": config_name, "split": split, "column": column}
    if spec == SAMPLE or spec in TEXTS or path.suffix in FILES:
        allowed = "split" if spec in TEXTS else "column" if path.suffix in (".json", ".jsonl") else None
        for name, value in options.items():
            if value is not None and name != allowed:
                raise ConfigurationError(f"`{name}` is {value!r}, but the text {spec!r} has none to choose.")
    if spec == SAMPLE:
        return EvaluationText(SAMPLE, read_text(wikitext2_sample()), "leading articles of WikiText-2 raw, test split")
    if spec in TEXTS:
        return _load_named(spec, split)
    if path.suffix in FILES:
        return EvaluationText(path.stem, _join(read_rows(spec, column=column or "text"), spec), path.name)
    return _load_dataset(spec, options)


def read_text(path: str | os.PathLike, column: str = "text") -> str:
    """Reads a text to evaluate on.

    A `.jsonl` or `.json` file gives its texts (key `column`) joined with two line breaks. Any other file is read by
    the row protocol of WikiText-2: a blank line is an empty row, any other line a row with its line break, and rows
    are joined with two line breaks: the text that `"\\n\\n".join(dataset["text"])` gives for the dataset of the Hub.

    Raises:
        TextError: There is no such file or no such column, or the file is not UTF-8 text.
    """
    rows = read_rows(path, column=column) if Path(path).suffix in FILES else read_lines(path)
    return "\n\n".join(rows)


def _load_named(spec: str, split: str | None) -> EvaluationText:
    named = TEXTS[spec]
    split = split or named.splits[0]
    if split not in named.splits:
        raise ConfigurationError(
            f"`split` is {split!r}, but the text {spec!r} is made of {', '.join(map(repr, named.splits))}; for other "
            f"parts give the data set's id, {named.dataset!r}."
        )
    try:
        rows = read_rows(named.dataset, name=named.config_name, split=split, column=named.column, **named.loading)
    except TextError as error:
        raise TextError(f"The text {spec!r} needs a data set of the Hub. {error}") from error
    text = _join(rows[: named.documents], spec, named.separator)
    taken = "" if named.documents is None else f", first {named.documents:,} rows"
    name = spec if split == named.splits[0] else f"{spec}-{split}"
    return EvaluationText(name, text, _describe(named.dataset, named.config_name, split) + taken)


def _load_dataset(spec: str, options: dict[str, str | None]) -> EvaluationText:
    config_name, split, column = options["config_name"], options["split"] or "test", options["column"] or "text"
    dataset, hint = spec, ""
    if is_local(spec):
        dataset = Path(spec).expanduser().resolve().name  # the whole path is nobody's business
    elif "/" not in spec:
        hint = f" Texts that have a name here are {', '.join((SAMPLE, *TEXTS))}."
    try:
        rows = read_rows(spec, name=config_name, split=split, column=column)
    except TextError as error:
        raise TextError(f"{error}{hint}") from error
    # With what was chosen of it, so that two parts of one data set are two texts.
    parts = [dataset.rpartition("/")[2], *(value for value in options.values() if value is not None)]
    return EvaluationText("-".join(parts).replace("/", "-"), _join(rows, spec), _describe(dataset, config_name, split))


def _join(rows: Any, spec: str, separator: str = "\n\n") -> str:
    rows = list(rows)
    for number, row in enumerate(rows):
        if not isinstance(row, str):
            raise TextError(f"Row {number} of {spec} is a {type(row).__name__}, not a text: choose another column.")
    if not any(row.strip() for row in rows):
        raise TextError(f"There is no text in {spec}: it has no rows, or all of them are empty.")
    return separator.join(rows)


def _describe(dataset: str, config_name: str | None, split: str) -> str:
    return ", ".join(part for part in (dataset, config_name, f"{split} split") if part)
