"""Wanda, structured: weight magnitude times input norm."""

from __future__ import annotations

import torch

from ..stats.moments import InputStatistics
from .base import ConsumerCriterion


class Wanda(ConsumerCriterion):
    """`sum_i |W_ij| * ||x_j||_2` on the consumer (Sun et al., 2023, https://huggingface.co/papers/2306.11695)."""

    def column_score(self, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        return weight.abs().sum(0) * statistics.squares.sqrt()
