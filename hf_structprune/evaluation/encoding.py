"""Text to tokens, with the words and bytes that every token stands for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigurationError
from ..text.tokenising import tokenise


# Characters whose bytes are counted at once.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class EncodedText:
    """Tokens of a text.

    Args:
        ids: Token ids.
        words: Words up to and with each token, of shape `(len(ids) + 1,)`: `words[j] - words[i]` words belong to the
            tokens `i` to `j` (excluded). `None` if the tokenizer does not say which part of the text a token is.
        bytes: The same for UTF-8 bytes.
        bos: Id of the BOS token the text begins with, or that is to stand before every window; `None` without.
    """

    ids: list[int]
    words: np.ndarray | None
    bytes: np.ndarray | None
    bos: int | None


def encode(tokenizer: Any, text: str, bos: bool | None, everywhere: bool) -> EncodedText:
    """Tokenises a text once.

    Words and bytes are those of the text itself, and their total is that of lm-eval's `wikitext` task:
    `len(re.split(r"\\s+", text))` and `len(text.encode())`. Each belongs to one token: a character to the first token
    that reaches its end, one that no token covers to the token behind it (at the end of the text: before it), a word
    to the token with its last character.

    Args:
        tokenizer: A `transformers` tokenizer, or the folder or Hub id of one.
        text: The text.
        bos: `None`: special tokens as the tokenizer adds them; `True`: a BOS token and no others; `False`: none.
        everywhere: With `bos=True`: leave the BOS token to the caller, who puts it before every window.

    Raises:
        ConfigurationError: A BOS token is asked for and the tokenizer has none.
    """
    from ..model.loading import as_tokenizer

    tokenizer = as_tokenizer(tokenizer)
    known = tokenizer.bos_token_id
    if bos and known is None:
        raise ConfigurationError("`bos` is True, but the tokenizer has no beginning-of-sequence token: leave it out.")
    parts = list(tokenise(tokenizer, text, add_special_tokens=bos is None))
    ids, ends = np.concatenate([part.ids for part in parts]).tolist(), None
    if parts[0].ends is not None:
        ends = np.concatenate([part.ends for part in parts])
    if bos and not everywhere:
        ids, ends = [known, *ids], None if ends is None else np.insert(ends, 0, 0)
    starts_with_bos = bool(ids) and known is not None and ids[0] == known
    words, sizes = (None, None) if ends is None else _count(text, ends)
    return EncodedText(ids, words, sizes, known if bos or starts_with_bos else None)


def _count(text: str, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Words and bytes up to each token, from the characters at which the tokens end."""
    ends = np.maximum.accumulate(ends) if len(ends) else ends  # special tokens are nowhere: they end at 0
    if len(ends):
        ends[ends == ends[-1]] = len(text)
    where = np.insert(ends, 0, 0)
    breaks = np.fromiter((match.start() for match in re.finditer(r"\s+", text)), np.int64)
    # The character before a break is the last of a word.
    words = np.searchsorted(np.append(breaks, len(text)).clip(min(1, len(text))), where, side="right")
    return words, _bytes_before(text, where)


def _bytes_before(text: str, where: np.ndarray) -> np.ndarray:
    """UTF-8 bytes of the text before each of its characters `where`, which ascend."""
    sizes, before = np.zeros(len(where), dtype=np.int64), 0
    for first in range(0, len(text), _BLOCK):
        block = text[first : first + _BLOCK]
        codes = np.frombuffer(block.encode("utf-32-le"), dtype=np.uint32)
        upto = np.insert((1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)).astype(np.int64), 0, before)
        upto = upto.cumsum()
        low, high = np.searchsorted(where, (first, first + len(block)), side="right")
        sizes[low:high] = upto[where[low:high] - first]
        before = upto[-1]
    return sizes
