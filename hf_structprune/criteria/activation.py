"""Activation magnitude: how strongly a unit fires."""

from __future__ import annotations

import torch

from ..stats.moments import InputStatistics
from .base import ConsumerCriterion


class Activation(ConsumerCriterion):
    """Mean over tokens of `|x_j|`, then the L2 norm over sequences (Minitron: Muralidharan et al., 2024,
    https://huggingface.co/papers/2407.14679)."""

    def column_score(self, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        return statistics.activity.sqrt()
