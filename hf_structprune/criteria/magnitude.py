"""Magnitude of the weights, without any data."""

from __future__ import annotations

import torch

from ..model.groups import Slice
from .base import Scoring, TensorCriterion


class L1(TensorCriterion):
    """`sum |w|` over a row of a producer or a column of the consumer (Li et al., 2017,
    https://huggingface.co/papers/1608.08710)."""

    power = 1

    def part_score(self, scoring: Scoring, part: Slice) -> torch.Tensor:
        weight = scoring.weight(part).float()
        return weight.abs().pow(self.power).flatten(0, -2).sum(0)


class L2(L1):
    """`sum w^2` over a row or column, without a root (as in LLM-Pruner, https://huggingface.co/papers/2305.11627)."""

    power = 2
