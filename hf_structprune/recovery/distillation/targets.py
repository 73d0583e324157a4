"""Which tokens of a batch follow the teacher, and which have a label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import IGNORED


@dataclass(frozen=True)
class BatchTargets:
    """Positions of a batch whose prediction of the next token counts, all `(batch, sequence)`.

    Attributes:
        followed: Where the student follows the teacher.
        labels: The next token, -100 where it has no label.
    """

    followed: Tensor
    labels: Tensor

    @property
    def used(self) -> Tensor:
        """Positions that count at all."""
        return self.followed | (self.labels != IGNORED)

    def row(self, index: int) -> BatchTargets:
        """One sequence, as a batch."""
        return BatchTargets(self.followed[index : index + 1], self.labels[index : index + 1])


def batch_targets(inputs: Mapping[str, Tensor], on_prompts: bool) -> BatchTargets:
    """Targets of a batch as TRL's collator makes it.

    A position counts if the token after it does: it has a label, or, with `on_prompts`, it is no padding and not the
    first token of a packed example. So the first token of a sequence is never predicted and no prediction crosses from
    one example into the next one.

    Args:
        inputs: `input_ids` and `labels`, with `attention_mask` or (padding-free) `position_ids`.
        on_prompts: Follow the teacher wherever there is text, not only where there are labels.
    """
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, IGNORED)
    if "labels" in inputs:
        labels[:, :-1] = inputs["labels"][:, 1:]
    if not on_prompts:
        return BatchTargets(labels != IGNORED, labels)
    text = torch.ones_like(ids, dtype=torch.bool)
    if inputs.get("attention_mask") is not None:
        text &= inputs["attention_mask"].bool()
    first = torch.zeros_like(text)
    if inputs.get("position_ids") is not None:
        first |= inputs["position_ids"] == 0
    followed = torch.zeros_like(text)
    followed[:, :-1] = text[:, :-1] & text[:, 1:] & ~first[:, 1:]
    return BatchTargets(followed, labels.masked_fill(~text, IGNORED))


def count_targets(batches: Iterable[Mapping[str, Tensor]], on_prompts: bool) -> Tensor:
    """Tokens that follow the teacher and tokens with a label, over some batches: `(2,)`."""
    total = torch.zeros(2, dtype=torch.long)
    for batch in batches:
        targets = batch_targets(batch, on_prompts)
        total += torch.stack([targets.followed.sum(), (targets.labels != IGNORED).sum()]).cpu()
    return total
