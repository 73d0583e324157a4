"""Tokens of a long text, made in pieces: the same as of the whole, in the memory of a piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np


# Characters that are tokenised at once, and by how many neighbouring pieces overlap. A tokenizer takes some hundred
# bytes for a character.
PIECE = 1 << 16
OVERLAP = 1 << 11


class Tokens(NamedTuple):
    """Ids of a part of a text, and the character at which each ends (excluded), if the tokenizer tells."""

    ids: np.ndarray
    ends: np.ndarray | None


def tokenise(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> Iterator[Tokens]:
    """The tokens that a tokenizer makes of a text at once, one part after the other.

    Neighbouring pieces overlap. Both say which tokens there are in the overlap, and where these end; only if they say
    the same of its inner half, the text is cut there, in the middle of what is agreed on. Otherwise the first of them
    is made longer, up to the whole text. The edge of a piece changes the tokens near it: those of the word or the run
    of spaces it cuts, and of what a tokenizer puts before a text. To be wrong, this must reach further than a quarter
    of the overlap (512 characters), from both sides, to the same wrong tokens.

    Tokenizers that do not tell where tokens end (those not of the library `tokenizers`) take the text whole.
    """
    if not getattr(tokenizer, "is_fast", False):
        options = {"add_special_tokens": add_special_tokens, "return_offsets_mapping": False, "verbose": False}
        yield Tokens(np.asarray(tokenizer(text, **options)["input_ids"], dtype=np.int64), None)
        return
    # `tokens` are those of the text from `start` to `stop`; those from `begin` on are still to be given.
    start, stop, begin, size = 0, PIECE, 0, PIECE
    tokens = _encode(tokenizer, text, start, stop, add_special_tokens)
    while stop < len(text):
        first, last = stop - OVERLAP, stop + size
        further = _encode(tokenizer, text, first, last, add_special_tokens)
        cut = _agreed(tokens, further, first, stop)
        if cut is None:
            stop, size = last, last - start
            tokens = _encode(tokenizer, text, start, stop, add_special_tokens)
            continue
        yield Tokens(tokens.ids[begin : cut[0]], tokens.ends[begin : cut[0]])
        start, stop, begin, size, tokens = first, last, cut[1], PIECE, further
    yield Tokens(tokens.ids[begin:], tokens.ends[begin:])


def token_ids(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> np.ndarray:
    """All ids of `tokenise`, shape `(tokens,)`, int32."""
    found = tokenise(tokenizer, text, add_special_tokens=add_special_tokens)
    return np.concatenate([tokens.ids.astype(np.int32) for tokens in found])


def _encode(tokenizer: Any, text: str, start: int, stop: int, add_special_tokens: bool) -> Tokens:
    found = tokenizer(
        text[start:stop], add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
    )
    ends = np.fromiter((end for _, end in found["offset_mapping"]), np.int64, len(found["input_ids"]))
    ends = np.maximum.accumulate(ends) if len(ends) else ends  # special tokens are nowhere: they end at 0
    return Tokens(np.asarray(found["input_ids"], dtype=np.int64), ends + start)


def _agreed(one: Tokens, other: Tokens, first: int, last: int) -> tuple[int, int] | None:
    """The numbers of one token in both lists, from the middle of the characters that both have tokenised alike."""
    margin = (last - first) // 4
    ranges = [np.searchsorted(t.ends, (first + margin, last - margin), side="right") for t in (one, other)]
    (a, b), (c, d) = ranges
    if b - a != d - c or a == b:
        return None
    same = np.array_equal(one.ids[a:b], other.ids[c:d]) and np.array_equal(one.ends[a:b], other.ends[c:d])
    middle = (b - a) // 2
    return (int(a + middle), int(c + middle)) if same else None
