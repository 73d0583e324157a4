"""Optimal Brain Surgeon on the consumer: the exact rise of its output error."""

from __future__ import annotations

import torch

from ..refit.closed_form import SELECTION_DAMPING, obs_scores
from .base import Criterion, Scoring


class OBS(Criterion):
    """`tr(W_g (H^-1_gg)^-1 W_g^T)`, greedily: what the output loses when a unit goes and the rest is re-fitted.

    Hassibi & Stork, 1993; for whole units ZipLM (Kurtic et al., 2023, https://huggingface.co/papers/2302.04089).
    """

    needs_inputs = True
    needs_gram = True

    def score(self, scoring: Scoring) -> torch.Tensor:
        group = scoring.group
        damping = SELECTION_DAMPING if self.config.damping is None else self.config.damping
        weight = scoring.weight(group.reader)
        return obs_scores(weight, scoring.statistics.gram, group.reader.index, damping, scoring.drop, group.blocks)
