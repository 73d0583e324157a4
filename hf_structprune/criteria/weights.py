"""Criteria that look at the weights of all matrices of a group, and at what the loss would do without them."""

from __future__ import annotations

import zlib

import torch

from ..model.groups import Slice
from .base import Criterion, Paper, Scoring, TensorCriterion


class Random(Criterion):
    """Uniform in [0, 1), drawn from the seed for each group: the baseline every criterion has to beat."""

    def score(self, scoring: Scoring) -> torch.Tensor:
        group = scoring.group
        seed = zlib.crc32(f"{self.config.seed}/{group.layer}/{group.kind}".encode())
        scores = torch.rand(group.size, generator=torch.Generator().manual_seed(seed))
        return scores.to(scoring.weight(group.slices[0]).device)


class L1(TensorCriterion):
    """`sum |w|` over a row of a producer or a column of the consumer (Li et al., 2017,
    https://huggingface.co/papers/1608.08710)."""

    power = 1
    papers = (Paper("li2017pruning"),)

    def part_score(self, scoring: Scoring, part: Slice) -> torch.Tensor:
        weight = scoring.weight(part).float()
        return weight.abs().pow(self.power).flatten(0, -2).sum(0)


class L2(L1):
    """`sum w^2` over a row or column, without a root (as in LLM-Pruner, https://huggingface.co/papers/2305.11627)."""

    power = 2


class Taylor(TensorCriterion):
    """Gradient times weight, summed over rows and columns (Ma et al., 2023, eq. 3-5,
    https://huggingface.co/papers/2305.11627).

    `first` is `|w g|`, `second` `w^2 F`, `mix` `|w g - w^2 F / 2|`, `vectorize` `|sum(w g)|` over the row or column;
    `g` is the gradient of the mean next-token loss, `F` the mean over sequences of the squared gradient of each. The
    rows and columns are reduced in the backward pass, see `gradients.py`.
    """

    papers = (Paper("ma2023llmpruner"),)
    needs_gradients = True

    def part_score(self, scoring: Scoring, part: Slice) -> torch.Tensor:
        return scoring.salience[part.tensor, part.dim]
