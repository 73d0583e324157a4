"""What a teacher says about tokens, in the form it has: hidden states and a head, logits, or the top of a cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .blocks import LogitTransform


@dataclass(frozen=True)
class HiddenPredictions:
    """Last hidden states `(n, hidden)` and the head that turns them into logits, a few tokens at a time.

    Attributes:
        hidden: Of the tokens.
        weight: Of the head, `(vocab, hidden)`.
        bias: Of the head, `(vocab,)`.
        transform: What the model does to the products.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    transform: LogitTransform = field(default_factory=LogitTransform)

    def products(self, rows: slice, buffer: Tensor | None) -> Tensor:
        """Logits before `transform`, `(n, vocab)`, in the buffer if it fits."""
        return project(self.hidden[rows].to(self.weight.dtype), self.weight, self.bias, buffer)


@dataclass(frozen=True)
class LogitPredictions:
    """Logits `(n, vocab)`, of models whose head does more than this package knows."""

    logits: Tensor
    transform: ClassVar[LogitTransform] = LogitTransform()

    def products(self, rows: slice, buffer: Tensor | None) -> Tensor:
        """The logits of some tokens."""
        return self.logits[rows]


@dataclass(frozen=True)
class TopPredictions:
    """The most likely tokens.

    Attributes:
        log_probs: Of the `k` tokens and, in the last column, of all others together, `(n, k + 1)`; at the temperature
            of the loss.
        ids: The tokens, `(n, k)`.
    """

    log_probs: Tensor
    ids: Tensor


Predictions = HiddenPredictions | LogitPredictions | TopPredictions


def top_predictions(logits: Tensor, top_k: int, temperature: float) -> TopPredictions:
    """The `top_k` most likely tokens of logits `(n, vocab)`, with the rest as one more class."""
    log_probs = torch.log_softmax(logits.to(wide(logits.dtype)) / temperature, -1)
    top, ids = log_probs.topk(min(top_k, log_probs.shape[1]), -1)
    rest = log_probs.scatter(1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return TopPredictions(torch.cat([top, rest], -1), ids)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None) -> Tensor:
    """`hidden weight^T + bias`, written into the first rows of a buffer of the same dtype if there is one."""
    fits = buffer is not None and buffer.dtype == hidden.dtype and buffer.shape[1] == weight.shape[0]
    out = buffer[: hidden.shape[0]] if fits else hidden.new_empty(hidden.shape[0], weight.shape[0])
    weight = weight.to(hidden.dtype).t()
    if bias is None:
        return torch.mm(hidden, weight, out=out)
    return torch.addmm(bias.to(hidden.dtype), hidden, weight, out=out)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
