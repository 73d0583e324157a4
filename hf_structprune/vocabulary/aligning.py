"""A text of a trimmed tokenizer as the dense tokenizer splits it, token by token: what a dense teacher reads.

The small tokenizer writes what the dense one does with every dropped token spelled out, nearly everywhere: in a word
with a dropped token, pieces of neighbours may also become one, and a text that was cut inside of a word, or that is
not written back as it was, is split otherwise. So the two are compared, and such stretches are known as what they are.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, NamedTuple

from .relating import Relation, prefixes_of


_BYTES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}  # tokens of a character that has none
_REMEMBERED = 256  # texts: a trainer asks for those of an optimiser step, and for each of them again


class Reading(NamedTuple):
    """A text of `n` small tokens in the `m` tokens of the dense vocabulary. The text is always the same.

    Attributes:
        ids: The dense rows, m.
        rows: Of each small token, the dense token after which the dense model says what the next small one is, n.
        prefixes: What has been read of that next dense token, as `TokenMap` numbers it, n; 0 where it begins.
        known: Whether the dense model says it, n: not in stretches that the two split in unlike ways, nor inside of a
            dense token that the text begins with.
        ends: Whether a dense token ends with the small one, n. It is the one at `rows` then.
    """

    ids: list[int]
    rows: list[int]
    prefixes: list[int]
    known: list[bool]
    ends: list[bool]


class Reader:
    """Reads texts of a trimmed tokenizer as the dense one.

    Args:
        relation: See `related`.
        small, dense: The tokenizers.
    """

    def __init__(self, relation: Relation, small: Any, dense: Any) -> None:
        self.tokens, self._spelled = relation.tokens, relation.spelled
        self._small, self._dense = small.backend_tokenizer, dense
        self._numbers, self._to_dense = prefixes_of(relation.spelled), relation.tokens.dense.tolist()
        self._inner = getattr(dense.backend_tokenizer.model, "continuing_subword_prefix", None) or ""
        self.read = lru_cache(_REMEMBERED)(self._read)

    def _read(self, ids: tuple[int, ...]) -> Reading:
        """The text of small rows, without padding."""
        own = self._split(ids)
        result = Reading([], [0] * len(ids), [0] * len(ids), [False] * len(ids), [False] * len(ids))
        for start, stop, number in self._stretches(ids, own):
            row = len(result.ids) - 1  # the dense token before the stretch
            for place in range(max(start, 1), stop):
                result.rows[place - 1] = max(row, 0)
                if isinstance(number, int) and row >= 0:
                    result.known[place - 1] = True
                    result.prefixes[place - 1] = self._numbers[ids[start:place]] if place > start else 0
            result.ids.extend([number] if isinstance(number, int) else number)
            result.ends[stop - 1] = True
        result.rows[-1:], result.known[-1:] = [len(result.ids) - 1], [True]
        return result

    def _split(self, ids: Sequence[int]) -> list[int]:
        """What the dense tokenizer makes of the text of small rows."""
        text = self._small.decode(list(ids), skip_special_tokens=False)
        return self._dense(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _stretches(self, ids: tuple[int, ...], own: list[int]) -> Iterator[tuple[int, int, int | list[int]]]:
        """Stretches of small rows, first and end: each with the dense token that it spells, or with several tokens.

        These are what the dense tokenizer makes of the stretch where that is the same text, else the small ones.
        """
        spelled = [self._spelled.get(number, []) for number in own]
        stops = [0]
        for pieces in spelled:
            stops.append(stops[-1] + len(pieces))
        found, blocks = [], _equal(ids, tuple(chain.from_iterable(spelled)))
        for place, (start, stop) in enumerate(pairwise(stops)):
            while blocks and blocks[0].b + blocks[0].size < stop:
                blocks.pop(0)
            if start < stop and blocks and blocks[0].b <= start:
                shift = blocks[0].a - blocks[0].b
                found.append((start + shift, stop + shift, place))
        before, last = 0, -1
        for start, stop, place in [*found, (len(ids), len(ids), len(own))]:
            if before < start:
                yield before, start, self._unlike(ids[before:start], own[last + 1 : place])
            if place < len(own):
                yield start, stop, own[place]
            before, last = stop, place

    def _unlike(self, ids: Sequence[int], own: list[int]) -> list[int]:
        """What a dense model reads of a stretch that the two tokenizers split in unlike ways."""
        pieces = [self._to_dense[number] for number in ids]
        return own if self._text(own) == self._text(pieces) else pieces

    def _text(self, ids: list[int]) -> bytes:
        """The text of dense rows, without the marks of their place in a word."""
        tokens = self._dense.convert_ids_to_tokens(ids)
        return b"".join(_BYTES.get(token, token.removeprefix(self._inner).encode()) for token in tokens)


def _equal(first: tuple[int, ...], second: tuple[int, ...]) -> list[difflib.Match]:
    """Where two sequences are the same, in their order."""
    if first == second:
        return [difflib.Match(0, 0, len(first))]
    return difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
