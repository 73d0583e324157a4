"""Criteria that look at the columns of the consumer and at what comes into them."""

from __future__ import annotations

import torch

from ..refit.closed_form import SELECTION_DAMPING, obs_scores
from ..stats.moments import InputStatistics
from .base import ConsumerCriterion, Criterion, Paper, Scoring


class Wanda(ConsumerCriterion):
    """`sum_i |W_ij| * ||x_j||_2` on the consumer (Sun et al., 2023, https://huggingface.co/papers/2306.11695)."""

    papers = (Paper("sun2024wanda"),)

    def column_score(self, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        return weight.abs().sum(0) * statistics.squares.sqrt()


class WIFV(ConsumerCriterion):
    """`Var(x_j) * ||W_:j||^2` on the consumer (FLAP: An et al., 2023, https://huggingface.co/papers/2312.11983)."""

    papers = (Paper("an2024flap"),)

    def column_score(self, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        return statistics.variance * weight.square().sum(0)


class Activation(ConsumerCriterion):
    """Mean over tokens of `|x_j|`, then the L2 norm over sequences (Minitron: Muralidharan et al., 2024,
    https://huggingface.co/papers/2407.14679)."""

    papers = (Paper("muralidharan2024minitron"),)

    def column_score(self, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        return statistics.activity.sqrt()


SURGEON = Paper("hassibi1992second")


class OBS(Criterion):
    """`tr(W_g (H^-1_gg)^-1 W_g^T)`, greedily: what the output loses when a unit goes and the rest is re-fitted.

    Optimal Brain Surgeon: Hassibi & Stork, 1993; for whole units ZipLM (Kurtic et al., 2023,
    https://huggingface.co/papers/2302.04089).
    """

    papers = (SURGEON, Paper("kurtic2023ziplm"))
    needs_inputs = True
    needs_gram = True

    def score(self, scoring: Scoring) -> torch.Tensor:
        group = scoring.group
        damping = SELECTION_DAMPING if self.config.damping is None else self.config.damping
        weight = scoring.weight(group.reader)
        return obs_scores(weight, scoring.statistics.gram, group.reader.index, damping, scoring.drop, group.blocks)
