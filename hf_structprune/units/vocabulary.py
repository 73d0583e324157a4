"""The vocabulary: its tokens are rows of the embedding and of the LM head."""

from __future__ import annotations

import math

from ..alignment import step_of
from ..vocabulary.report import in_words
from .base import VocabularyKind


class Tokens(VocabularyKind):
    """A token: its row of the embedding and of the LM head, and its place in the tokenizer."""

    name, label = "vocabulary", "vocabulary"

    def told(self, plan):
        return (words := super().told(plan)) and "; ".join([words, *in_words(plan.vocabulary_report)])

    def sizes(self, size, round_to, align_to):
        """Multiples as configured, else of 64, in small vocabularies of 2^n, at most 1/16; no map reads tokens."""
        step = step_of(round_to, None, min(64, 2 ** int(math.log2(max(1, size // 16)))))
        return [*range(step, size, step), size]


VOCABULARY = Tokens.name
