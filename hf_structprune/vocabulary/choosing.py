"""Which tokens stay: how they are ranked, how many must, and what is lost with the others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..config import PruningConfig
from ..errors import ConfigurationError, UnsupportedModelError
from ..units import VOCABULARY
from .counting import Counted, count_tokens, coverage, ids_of, scripts
from .estimating import frequencies, joined
from .ranking import least_longer
from .tokenizers import must_stay, trimmed_tokenizer, vocabulary_of


_COUNTING = ("frequency", "frequency_taylor")  # criteria that look at how often tokens are in text
_SCRIPTS = 8  # that are named
_CHARACTERS = 200_000  # of held-out text of each source that many vocabularies are tried on


@dataclass
class TokenChoice:
    """Chooses the tokens of one model.

    Attributes:
        tokenizer: Of the dense model.
        config: Says how tokens are ranked, and which text they are counted in.
        configurations: Configurations whose ids must stay.
        importance: Gives that of each row by what looks at weights, shape (rows,); `None` where there are none.
        done: Called with the trimmed tokenizer once the model is cut.
    """

    tokenizer: Any
    config: PruningConfig
    configurations: Sequence[Any] = ()
    importance: Callable[[], np.ndarray] | None = None
    done: Callable[[Any], None] | None = None
    _trimmed: dict[tuple[int, ...], Any] = field(init=False, default_factory=dict)

    @cached_property
    def vocabulary(self):
        return vocabulary_of(self.tokenizer)

    @cached_property
    def stay(self) -> set[int]:
        """Ids that no choice can drop."""
        stay = must_stay(self.tokenizer, *self.configurations) & self.vocabulary.tokens.keys()
        return self.vocabulary.closure(self.vocabulary.fixed | stay)

    @property
    def least(self) -> int:
        """How many tokens can be left at least."""
        return len(self.stay)

    @property
    def ready(self) -> bool:
        """Whether what ranks tokens is there."""
        return self.importance is not None or self.config.criterion_of(VOCABULARY) == "frequency"

    def carry_out(self, kept: Sequence[int]) -> None:
        """Says that the model has these tokens now."""
        if self.done is not None:
            self.done(self.trimmed(kept))

    def check(self, rows: int, keep: int | None = None) -> None:
        """Refuses a tokenizer that does not fit an embedding of so many rows, and too few tokens to keep.

        Raises:
            UnsupportedModelError: There are ids without a row.
            ConfigurationError: More must stay than `keep`; says how many.
        """
        last = max(self.vocabulary.tokens)
        if last >= rows:
            raise UnsupportedModelError(
                f"The tokenizer has ids up to {last}, and the embedding has {rows} rows: they do not belong together."
            )
        if keep is not None and keep < self.least:
            raise ConfigurationError(
                f"{keep} tokens are to be kept, and {self.least} must: special and added ones, those of the chat "
                "template and the configuration, and what all text is spelled by."
            )
        if keep is not None and keep > len(self.vocabulary.tokens) + rows - last - 1:
            raise ConfigurationError(f"{keep} tokens are to be kept; there are {len(self.vocabulary.tokens)}.")

    @cached_property
    def counted(self) -> list[Counted]:
        """The text, counted once."""
        return count_tokens(self.config, self.tokenizer, max(self.vocabulary.tokens) + 1)

    def ranked(self) -> list[int]:
        """All ids, the ones to keep first."""
        ids = np.fromiter(self.vocabulary.tokens, np.int64)
        order = np.array([self.vocabulary.order(number) for number in ids.tolist()])
        criterion = self.config.criterion_of(VOCABULARY)
        useful = None if criterion == "frequency" else self.importance()[ids]
        if criterion in _COUNTING:
            shares = frequencies(self.counted, ids, order)
            shares = shares if useful is None else joined(shares, useful)
            return least_longer(self.vocabulary, dict(zip(ids.tolist(), shares.tolist(), strict=True)), self.stay)
        return ids[np.lexsort((order, -useful))].tolist()

    def choose(self, rows: int, keep: int) -> list[int]:
        """Ids of the tokens that stay, ascending; rows that belong to no token are the first to go.

        Args:
            rows: Rows of the embedding.
            keep: How many stay.
        """
        self.check(rows, keep)
        there = len(self.vocabulary.tokens)
        kept = self.vocabulary.choose(self._ranking, min(keep, there), self.stay)
        last = max(self.vocabulary.tokens)
        return kept + list(range(last + 1, last + 1 + keep - len(kept)))

    def trimmed(self, kept: Sequence[int]) -> Any:
        """The tokenizer with these tokens alone (and rows behind them that belong to none).

        Raises:
            ConfigurationError: Some that must stay are not among them.
            UnsupportedModelError: The class of the tokenizer does not make it.
        """
        key = tuple(kept)
        if key not in self._trimmed:
            tokens = [number for number in kept if number in self.vocabulary.tokens]
            lacking = (self.stay | self.vocabulary.closure(tokens)) - set(tokens)
            if lacking or list(kept[: len(tokens)]) != tokens:
                raise ConfigurationError(
                    f"The tokens that are to be kept lack {len(lacking)} that must stay or that others are made from: "
                    f"{sorted(lacking)[:5]}."
                )
            small, order = trimmed_tokenizer(self.tokenizer, tokens, self.vocabulary)
            if order != sorted(order):
                raise UnsupportedModelError("Added tokens have ids among the others, so that none can be left out.")
            self._trimmed = {key: small}
        return self._trimmed[key]

    def covered(self, kept: Sequence[int]) -> dict[str, float | None]:
        """The share of the counted text, and of the text held out, whose tokens stay; the mean over the sources."""
        numbers = np.array([number for number in kept if number in self.vocabulary.tokens])
        shares: dict[str, float | None] = {}
        for name, counts in (
            ("covered", [one.counts for one in self.counted]),
            ("covered_held_out", [one.held_counts for one in self.counted]),
        ):
            found = [float(one[numbers].sum() / one.sum()) for one in counts if one.any()]
            shares[name] = sum(found) / len(found) if found else None
        return shares

    def longer(self, kept: Sequence[int]) -> float | None:
        """By what share the text held out has more tokens with these alone; the mean over the sources, of a part."""
        tokens = [number for number in kept if number in self.vocabulary.tokens]
        small = Tokenizer.from_str(json.dumps(self.vocabulary.trimmed(tokens)[0], ensure_ascii=False))
        found = [
            sum(map(len, small.encode_batch_fast(texts, add_special_tokens=False))) / before - 1
            for texts, before in self._sample
        ]
        return sum(found) / len(found) if found else None

    @cached_property
    def _sample(self) -> list[tuple[list[str], int]]:
        """A part of the text that each source holds out, and its tokens."""
        texts = [one.some(_CHARACTERS) for one in self.counted]
        sizes = [sum(map(len, ids_of(self.tokenizer, some))) for some in texts]
        return [(some, size) for some, size in zip(texts, sizes, strict=True) if size]

    @cached_property
    def _ranking(self) -> list[int]:
        return self.ranked()

    @cached_property
    def _scripts(self) -> dict[int, str]:
        return scripts(self.tokenizer, list(self.vocabulary.tokens))

    def report(self, kept: Sequence[int]) -> dict[str, Any]:
        """What these tokens cover of the text, and which scripts lose tokens, for the plan."""
        small, tokens, there = self.trimmed(kept), set(kept) & self.vocabulary.tokens.keys(), self._scripts
        before = Counter(there.values())
        after = Counter(script for number, script in there.items() if number in tokens)
        lost = sorted(before, key=lambda script: after[script] - before[script])[:_SCRIPTS]
        counted = self.counted if self.config.criterion_of(VOCABULARY) in _COUNTING else []
        return {
            "sources": coverage(counted, tokens, small),
            "scripts": {name: [before[name], after[name]] for name in lost if after[name] < before[name]},
        }
