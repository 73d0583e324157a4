"""Criteria of widths: by the weights of all matrices of a group, by gradients, and by what comes into the consumer."""

from __future__ import annotations

import zlib

import torch

from ..model.groups import Slice
from ..refit.closed_form import SELECTION_DAMPING, obs_scores
from ..stats.gradients import OUTPUTS
from ..stats.moments import InputStatistics
from .base import ConsumerCriterion, Criterion, Paper, Scoring, TensorCriterion


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
        weight = self.weight(scoring)
        gram, index = scoring.statistics.moments.matrix(torch.float64), group.reader.index
        return obs_scores(weight, gram, index, damping, scoring.drop, group.blocks, overwrite=True)

    def weight(self, scoring: Scoring) -> torch.Tensor:
        """What is multiplied with the inputs, shape (any, d): its squared norm is what counts."""
        weight, gain = scoring.weight(scoring.group.reader), scoring.statistics.gain
        return weight if gain is None else weight.float() * gain.to(weight.device)[:, None]


class KFAC(OBS):
    """`tr(G W_g (H^-1_gg)^-1 W_g^T)`, greedily: the rise of the loss when a unit goes and the rest is re-fitted.

    `OBS` in the metric of the loss: `G = E[g g^T]`, where `g` is the gradient of the loss by the consumer's output.
    `H` and `G` are the factors of the consumer's Fisher matrix (Kronecker-factored: Martens & Grosse, 2015,
    https://huggingface.co/papers/1503.05671), by which LLM Surgeon (van der Ouderaa et al., 2024,
    https://huggingface.co/papers/2312.17244) removes rows and columns. The re-fit is that of every criterion: `G` has
    no part in it.
    """

    papers = (SURGEON, Paper("martens2015kfac"), Paper("vanderouderaa2024surgeon"))
    needs_gradients = True
    of_loss = True

    def score(self, scoring: Scoring) -> torch.Tensor:
        return super().score(scoring) * scoring.statistics.unit

    def weight(self, scoring: Scoring) -> torch.Tensor:
        consumer = scoring.group.reader
        weight = scoring.weight(consumer)  # gradients have the gain in them
        return scoring.salience[consumer.module, OUTPUTS].to(weight.device, torch.float64) @ weight.double()
