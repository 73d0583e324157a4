"""Criteria that look at the columns of the consumer and at what comes into them."""

from __future__ import annotations

import torch

from ..refit.closed_form import SELECTION_DAMPING, obs_scores
from ..stats.moments import InputStatistics
from .base import ICLR, NEURIPS, ConsumerCriterion, Criterion, Paper, Scoring


class Wanda(ConsumerCriterion):
    """`sum_i |W_ij| * ||x_j||_2` on the consumer (Sun et al., 2023, https://huggingface.co/papers/2306.11695)."""

    papers = (
        Paper("sun2024wanda", "A Simple and Effective Pruning Approach for Large Language Models",
              "Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico", ICLR, 2024, "2306.11695"),
    )  # fmt: skip

    def column_score(self, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        return weight.abs().sum(0) * statistics.squares.sqrt()


class WIFV(ConsumerCriterion):
    """`Var(x_j) * ||W_:j||^2` on the consumer (FLAP: An et al., 2023, https://huggingface.co/papers/2312.11983)."""

    papers = (
        Paper("an2024flap", "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
              "An, Yongqi and Zhao, Xu and Yu, Tao and Tang, Ming and Wang, Jinqiao",
              "Proceedings of the AAAI Conference on Artificial Intelligence", 2024, "2312.11983"),
    )  # fmt: skip

    def column_score(self, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        return statistics.variance * weight.square().sum(0)


class Activation(ConsumerCriterion):
    """Mean over tokens of `|x_j|`, then the L2 norm over sequences (Minitron: Muralidharan et al., 2024,
    https://huggingface.co/papers/2407.14679)."""

    papers = (
        Paper("muralidharan2024minitron", "Compact Language Models via Pruning and Knowledge Distillation",
              "Muralidharan, Saurav and Sreenivas, Sharath Turuvekere and Joshi, Raviraj and others", NEURIPS,
              2024, "2407.14679"),
    )  # fmt: skip

    def column_score(self, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        return statistics.activity.sqrt()


SURGEON = Paper(
    "hassibi1992second", "Second order derivatives for network pruning: Optimal Brain Surgeon",
    "Hassibi, Babak and Stork, David G.", NEURIPS, 1992,
)  # fmt: skip


class OBS(Criterion):
    """`tr(W_g (H^-1_gg)^-1 W_g^T)`, greedily: what the output loses when a unit goes and the rest is re-fitted.

    Optimal Brain Surgeon: Hassibi & Stork, 1993; for whole units ZipLM (Kurtic et al., 2023,
    https://huggingface.co/papers/2302.04089).
    """

    papers = (
        SURGEON,
        Paper("kurtic2023ziplm", "{ZipLM}: Inference-Aware Structured Pruning of Language Models",
              "Kurtic, Eldar and Frantar, Elias and Alistarh, Dan", NEURIPS, 2023, "2302.04089"),
    )  # fmt: skip
    needs_inputs = True
    needs_gram = True

    def score(self, scoring: Scoring) -> torch.Tensor:
        group = scoring.group
        damping = SELECTION_DAMPING if self.config.damping is None else self.config.damping
        weight = scoring.weight(group.reader)
        return obs_scores(weight, scoring.statistics.gram, group.reader.index, damping, scoring.drop, group.blocks)
