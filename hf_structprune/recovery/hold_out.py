"""Rows of a data set that are not trained on, and general text: what a training on that data is watched by.

General text alone would judge a training on code, or in another language, by what it is not for: stop it when that
gains nothing more, and put weights back that know less of the data. Rows alone would not show what it costs elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from ..errors import TextError
from ..evaluation.perplexity import SAMPLE, EvaluationText, load_text
from ..text.calibration import rendered
from ..text.formats import Documents, recognise


logger = logging.get_logger(__name__)

NAME = "held-out rows and sample"
PART = 20  # one row of so many is held out at most
FEWEST = 2  # windows of rows that a training can be watched by
_BEGUN = "text that is trained on"  # name of a column for a moment
_LOOKED_AT = 64  # rows of a source whose length is looked at
_MORE = 1.25  # tokens for each one that is wanted: rows are of different lengths


def hold_out(
    rows: Any, tokenizer: Any, *, window: int, windows: int | None, seed: int
) -> tuple[Any, EvaluationText | None]:
    """Takes as many rows out of every source as have text for half of the windows, one of `PART` at most, by `seed`.

    Of a source with fewer rows than that, whole books perhaps, each loses its end. As much text is of the packaged
    sample.

    Args:
        rows: A `datasets.DatasetDict` of `load_rows`.
        tokenizer: Writes chats, and counts.
        window, windows: Tokens of a window and how many are wanted; `None` is as many as `PART` allows.
        seed: Of the draw.

    Returns:
        The other rows, and the text; all rows and `None` where those have text for fewer than `FEWEST` windows, or are
        such that no document can be made of them, which the training says itself.
    """
    import datasets

    try:
        sources = {
            name: Documents(table, name, bool(getattr(tokenizer, "chat_template", None)))
            for name, table in rows.items()
        }
        tokens = sum(map(lambda one: _tokens(one, tokenizer), sources.values()))
        wanted = tokens if windows is None else _MORE * window * windows / 2
        share = min(1 / PART, wanted / max(1, tokens))
        left, found, rng = datasets.DatasetDict(), [], random.Random(seed)
        for name, documents in sources.items():
            table, few = rows[name], len(documents) < PART
            chosen = [] if few else sorted(rng.sample(range(len(table)), round(share * len(table))))
            found += [_written(documents, number, tokenizer) for number in chosen]
            if few and recognise(table.column_names, name)[0] == "text":
                table, ends = _without_ends(table, share)
                found += ends
            others = sorted({*range(len(table))} - {*chosen})
            left[name] = table.select(others) if chosen else table
    except TextError:
        return rows, None
    rng.shuffle(found)
    half = None if windows is None else window * max(1, windows // 2)
    text, tokens = _beginning("\n\n".join(found), tokenizer, half)
    if tokens < window * FEWEST:
        return rows, None
    # A little more than is needed: how many tokens a part of a text has is an estimate.
    general, _ = _beginning(load_text(SAMPLE).text.strip(), tokenizer, tokens if half is None else round(1.2 * half))
    names = ", ".join(rows)
    about = f"{len(found):,} {'row' if len(found) == 1 else 'rows'}, or ends of them, of {names}, not trained on"
    logger.info(f"The training is watched by {about}, and as much of WikiText-2.")
    return left, EvaluationText(NAME, f"{text}\n\n{general}", f"{about}, and as much of the packaged WikiText-2 test")


def _beginning(text: str, tokenizer: Any, most: int | None) -> tuple[str, int]:
    """About so many tokens of a text, cut before a space, and how many they are; without `most` all of it."""
    tokens = len(tokenizer(text, verbose=False)["input_ids"])
    if most is None or tokens <= most:
        return text, tokens
    return text[: text.rfind(" ", 0, len(text) * most // tokens)], most


def _tokens(documents: Documents, tokenizer: Any) -> float:
    """About how many tokens all documents have."""
    numbers = range(0, len(documents), len(documents) // _LOOKED_AT + 1)
    some = [_written(documents, number, tokenizer) for number in numbers]
    start = [text[:4000] for text in some]
    ids = tokenizer(start, verbose=False)["input_ids"]
    a_character = sum(map(len, ids)) / max(1, sum(map(len, start)))
    return a_character * sum(map(len, some)) / max(1, len(some)) * len(documents)


def _written(documents: Sequence[Any], number: int, tokenizer: Any) -> str:
    """A document as text."""
    document = documents[number]
    if isinstance(document, str):
        return document.strip()
    return rendered(f"Row {number}", document, tokenizer, "").strip()


def _without_ends(table: Any, share: float) -> tuple[Any, list[str]]:
    """Texts without their last part, cut before a space where there is one soon, and those parts."""
    begun, ends = [], []
    for text in table["text"]:
        text = text or ""
        cut = len(text) - int(share * len(text))
        space = text.find(" ", cut, cut + 1000)
        cut = cut if space < 0 else space
        begun.append(text[:cut])
        ends += [text[cut:].strip()] if text[cut:].strip() else []
    table = table.add_column(_BEGUN, begun).remove_columns("text")
    return table.rename_column(_BEGUN, "text"), ends
