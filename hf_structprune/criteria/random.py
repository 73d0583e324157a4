"""Random importance: the baseline every criterion has to beat."""

from __future__ import annotations

import zlib

import torch

from .base import Criterion, Scoring


class Random(Criterion):
    """Uniform in [0, 1), drawn from the seed for each group."""

    def score(self, scoring: Scoring) -> torch.Tensor:
        group = scoring.group
        seed = zlib.crc32(f"{self.config.seed}/{group.layer}/{group.kind}".encode())
        scores = torch.rand(group.size, generator=torch.Generator().manual_seed(seed))
        return scores.to(scoring.weight(group.reader).device)
