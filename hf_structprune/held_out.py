"""Text that nothing was counted in or fitted to, and its loss under models with different vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .errors import TextError
from .evaluation.perplexity import window_losses
from .progress import hidden
from .text.reading import beginning_of
from .vocabulary.counting import Counted


LENGTH = 512  # tokens of a piece, at most
_TOKENS = 16_384
_LEAST = 512
_CHARACTERS = 2_000_000  # that are looked at


@dataclass
class HeldOut:
    """Pieces of text, each as tokens or as text and the character behind which it counts.

    Attributes:
        pieces: Tokens, shape (length,), or text with the end of the first token of the dense tokenizer.
        tokens: Tokens of the dense tokenizer that are predicted.
    """

    pieces: Sequence[torch.Tensor | tuple[str, int]]
    tokens: int

    @classmethod
    def of_sequences(cls, tokens: torch.LongTensor) -> HeldOut:
        """Sequences of tokens, shape (sequences, length), for models that have all of them."""
        return cls(list(tokens), tokens[:, 1:].numel())

    @classmethod
    def of_sources(cls, counted: Sequence[Counted], tokenizer: Any, length: int) -> HeldOut:
        """What is held out of the sources of a vocabulary, an equal part of each.

        Args:
            tokenizer: The dense one.
            length: Tokens of a piece, at most.

        Raises:
            TextError: There is too little.
        """
        pieces, tokens = [], 0
        for one in counted:
            share, before = _TOKENS // len(counted), tokens
            for text in one.some(_CHARACTERS):
                if tokens - before >= share:
                    break
                ends, begin = _encoded(tokenizer, text)[1], 0
                for some in (ends[start : start + length] for start in range(0, len(ends), length)):
                    if begin < some[0] < some[-1] and tokens - before < share:
                        pieces.append((text[begin : some[-1]], some[0] - begin))
                        tokens += _counting(*_encoded(tokenizer, pieces[-1][0]), pieces[-1][1])
                    begin = some[-1]
        if tokens < _LEAST:
            raise TextError(
                f"What a split costs is measured on text held out of {', '.join(one.name for one in counted)}, and "
                f"that is {tokens} tokens: give more of it, at least {20 * _LEAST:,} tokens."
            )
        return cls(pieces, tokens)

    def loss(self, model: PreTrainedModel, tokenizer: Any = None) -> float:
        """Nats for each token of the dense tokenizer, whichever tokens the model reads the text as.

        Args:
            model: The model.
            tokenizer: Its own; not needed for sequences.
        """
        total = 0.0
        with hidden():
            for piece in self.pieces:
                if isinstance(piece, torch.Tensor):
                    ids, count = piece.tolist(), len(piece) - 1
                else:
                    ids, ends = _encoded(tokenizer, piece[0])
                    count = _counting(ids, ends, piece[1])
                total += float(window_losses(model, torch.tensor([ids]), [count], 1).sum())
        return total / self.tokens


def _counting(ids: list[int], ends: list[int], after: int) -> int:
    """How many tokens, the last ones, end behind a character, and have one before them."""
    return min(sum(end > after for end in ends), len(ids) - 1)


def _encoded(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Ids of a text, behind the tokens that begin every one if there are such, and where those of the text end."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [*beginning_of(tokenizer), *found["input_ids"]], [end for _, end in found["offset_mapping"]]
