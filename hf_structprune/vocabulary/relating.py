"""How the tokens of a trimmed tokenizer and of the dense one go together: what learning from the dense one needs.

A text of the small vocabulary is a text of the dense one in which every dropped token is spelled by kept ones. So what
the dense model says of its next token `u`, a distribution `p(u)` at the end of one of its own tokens, says what the
next token `v` of the small vocabulary is:

    q(v) = sum of p(u) over the u whose spelling begins with v, where a kept u is its own spelling

Inside of a dropped token, after some pieces `r` of its spelling, it goes on with

    q(v | r) = sum of p(u) over the u whose spelling begins with r, v / the same over those that begin with r and go on

with the `p` from before the token. Both are exact given that the dense model has read its own tokens up to there, and
that what follows the pieces belongs to a longer token. Whether it does is not known from the pieces alone: they may
also be tokens of their own, after which the next one begins. The text itself says which of the two it is, as a label
does, so that over a text both come as often as they do there, and the mean of the targets is right. Left out is that
pieces of neighbours may become one token; such places are not followed, see `aligning`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .tokenizers import vocabulary_of


_SAME = ("normalizer", "pre_tokenizer", "decoder")  # whatever the tokens are


@dataclass(frozen=True)
class TokenMap:
    """Rows of the embeddings of a small and a dense vocabulary.

    Every token of the small one is in the dense one too. A prefix is the beginning of the spelling of a dropped token,
    not the whole; prefixes have numbers from 1, and 0 is none: there a dense token begins.

    Attributes:
        dense: The row of the dense vocabulary of each one of the small, shape (small rows,); -1 for rows of no token.
        small: The row of the small vocabulary that text with each token of the dense begins with, (dense rows,); -1.
        starts: Where the entries of each prefix begin, from prefix 1 on, and where the last end, (prefixes + 1,).
        longer: Entries: the dense rows of tokens that begin with a prefix and go on, (entries,).
        following: Entries: the small rows that they go on with, (entries,).
    """

    dense: Tensor
    small: Tensor
    starts: Tensor
    longer: Tensor
    following: Tensor

    @classmethod
    def of(cls, dense: Tensor, spelled: Mapping[int, Sequence[int]], dense_rows: int) -> TokenMap:
        """The map of a small vocabulary.

        Args:
            dense: As the attribute.
            spelled: The small rows that spell each dense row; none where nothing does.
            dense_rows: Of the dense vocabulary.
        """
        small = torch.full((dense_rows,), -1)
        for number, pieces in spelled.items():
            small[number] = next(iter(pieces), -1)
        entries: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for prefix in prefixes_of(spelled):
            entries[prefix] = []
        for number, pieces in spelled.items():
            for length in range(1, len(pieces)):
                entries[tuple(pieces[:length])].append((number, pieces[length]))
        sizes = torch.tensor([0, *map(len, entries.values())])
        pairs = torch.tensor([pair for found in entries.values() for pair in found]).reshape(-1, 2)
        return cls(dense, small, sizes.cumsum(0), pairs[:, 0].contiguous(), pairs[:, 1].contiguous())

    def to(self, device: torch.device) -> TokenMap:
        """The same on a device."""
        return TokenMap(*(getattr(self, one.name).to(device) for one in fields(self)))

    @property
    def fingerprint(self) -> str:
        """A name that two maps share only if they are the same."""
        everything = torch.cat([getattr(self, one.name) for one in fields(self)])
        return hashlib.blake2b(everything.cpu().numpy().tobytes(), digest_size=8).hexdigest()

    def merged(self, logits: Tensor, prefixes: Tensor) -> Tensor:
        """Logits over the small vocabulary: `log` of the sums in the module's docstring, up to a constant of each row.

        Args:
            logits: Of the dense model, at the end of one of its own tokens, shape (n, dense rows).
            prefixes: The prefix that has been read since then, or 0, shape (n,).

        Returns:
            Shape (n, small rows); a number as low as the dtype has, for what the text cannot go on with.
        """
        there, shape = self.small >= 0, (len(logits), len(self.dense))
        shares = torch.where(there, logits, -torch.inf)
        shares = (shares - shares.amax(-1, keepdim=True)).exp_()
        sums = logits.new_zeros(shape).scatter_add_(1, self.small.clamp(min=0).expand(len(logits), -1), shares)
        begun = torch.zeros(len(self.dense), dtype=torch.bool, device=logits.device)
        begun[self.small[there]] = True
        logs = _logs(sums).masked_fill_(~begun, _never(logits.dtype))
        inside = prefixes.nonzero()[:, 0]
        if len(inside):
            logs[inside] = self._continued(logits[inside], prefixes[inside])
        return logs

    def _continued(self, logits: Tensor, prefixes: Tensor) -> Tensor:
        """The same where all rows are inside of a dense token."""
        sizes = (self.starts[1:] - self.starts[:-1])[prefixes - 1]
        rows = torch.arange(len(prefixes), device=logits.device).repeat_interleave(sizes)
        within = torch.arange(len(rows), device=logits.device) - (sizes.cumsum(0) - sizes)[rows]
        entries = self.starts[prefixes - 1][rows] + within
        values, places = logits[rows, self.longer[entries]], (rows, self.following[entries])
        largest = values.new_full((len(prefixes),), -torch.inf).scatter_reduce_(0, rows, values, "amax")
        sums = logits.new_zeros(len(prefixes), len(self.dense))
        sums.index_put_(places, (values - largest[rows]).exp(), accumulate=True)
        result = torch.full_like(sums, _never(logits.dtype))
        return result.index_put_(places, _logs(sums)[places])


def _logs(sums: Tensor) -> Tensor:
    return sums.clamp_(min=torch.finfo(sums.dtype).tiny).log_()


def _never(dtype: torch.dtype) -> float:
    """The logit of what cannot be: no temperature makes it infinite, and none makes it likely."""
    return torch.finfo(dtype).min / 1024


def prefixes_of(spelled: Mapping[int, Sequence[int]]) -> dict[tuple[int, ...], int]:
    """The numbers of prefixes, from 1, by the small rows that they consist of; `spelled` as for `TokenMap.of`."""
    found: dict[tuple[int, ...], int] = {}
    for pieces in spelled.values():
        for length in range(1, len(pieces)):
            found.setdefault(tuple(pieces[:length]), len(found) + 1)
    return found


@dataclass(frozen=True)
class Relation:
    """A small tokenizer and the dense one that it was made of.

    Attributes:
        tokens: How their rows go together.
        spelled: The small rows that spell each dense row.
    """

    tokens: TokenMap
    spelled: dict[int, list[int]]


def related(small: Any, dense: Any, small_rows: int, dense_rows: int) -> Relation | None:
    """How two tokenizers go together if one is the other with fewer tokens, else `None`.

    Args:
        small, dense: Tokenizers of Transformers.
        small_rows, dense_rows: Rows of the models' embeddings.
    """
    if any(getattr(one, "backend_tokenizer", None) is None for one in (small, dense)):
        return None
    try:
        few, all_of_them = vocabulary_of(small), vocabulary_of(dense)
    except UnsupportedModelError:  # of a type that is never trimmed
        return None
    ids = {token: number for number, token in all_of_them.tokens.items()}
    same = few.kind == all_of_them.kind and all(few.state[part] == all_of_them.state[part] for part in _SAME)
    there = max(few.tokens) < small_rows and max(all_of_them.tokens) < dense_rows
    if not (same and there and ids.keys() >= set(few.tokens.values())):
        return None
    to_dense = torch.full((small_rows,), -1)
    for number, token in few.tokens.items():
        to_dense[number] = ids[token]
    spelled = {number: few.spelled(token) for number, token in all_of_them.tokens.items()}
    return Relation(TokenMap.of(to_dense, spelled, dense_rows), spelled)
