"""How the tokens of a trimmed tokenizer and of the dense one go together: what learning from the dense one needs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UnsupportedModelError
from .tokenizers import vocabulary_of


_SAME = ("normalizer", "pre_tokenizer", "decoder")  # whatever the tokens are


@dataclass(frozen=True)
class TokenMap:
    """Rows of the embeddings of a small and a dense vocabulary.

    Every token of the small one is in the dense one too, so that the dense model can read what the small one does.
    What it predicts next is a token of the dense vocabulary; in the small one, text that goes on with it goes on with
    the first of the tokens that spell it, itself if it is there.

    Attributes:
        dense: The row of the dense vocabulary of each one of the small, shape (small rows,); -1 for rows of no token.
        small: The row of the small vocabulary that text with each token of the dense begins with, (dense rows,); -1.
    """

    dense: torch.Tensor
    small: torch.Tensor

    def to(self, device: torch.device) -> TokenMap:
        """The same on a device."""
        return TokenMap(self.dense.to(device), self.small.to(device))

    @property
    def fingerprint(self) -> str:
        """A name that two maps share only if they are the same."""
        return hashlib.blake2b(torch.cat([self.dense, self.small]).cpu().numpy().tobytes(), digest_size=8).hexdigest()

    def merged(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits over the small vocabulary: `log sum_t exp(z_t)` over the tokens `t` that begin with each of its own.

        Args:
            logits: `z`, shape (n, dense rows).

        Returns:
            Shape (n, small rows); what no token of the dense vocabulary begins with is as good as impossible.
        """
        there = self.small >= 0
        largest = logits[:, there].amax(-1, keepdim=True)
        sums = logits.new_zeros(len(logits), len(self.dense))
        sums.index_add_(1, self.small[there], (logits[:, there] - largest).exp())
        return sums.clamp(min=torch.finfo(sums.dtype).tiny).log() + largest


def related(small: Any, dense: Any, small_rows: int, dense_rows: int) -> TokenMap | None:
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
    to_dense, to_small = torch.full((small_rows,), -1), torch.full((dense_rows,), -1)
    for number, token in few.tokens.items():
        to_dense[number] = ids[token]
    for number, token in all_of_them.tokens.items():
        to_small[number] = next(iter(few.spelled(token)), -1)
    return TokenMap(to_dense, to_small)
