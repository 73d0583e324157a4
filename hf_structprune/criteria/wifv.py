"""WIFV: fluctuation of the inputs, weighted."""

from __future__ import annotations

import torch

from ..stats.moments import InputStatistics
from .base import ConsumerCriterion


class WIFV(ConsumerCriterion):
    """`Var(x_j) * ||W_:j||^2` on the consumer (FLAP: An et al., 2023, https://huggingface.co/papers/2312.11983)."""

    def column_score(self, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        return statistics.variance * weight.square().sum(0)
