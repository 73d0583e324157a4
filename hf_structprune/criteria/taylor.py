"""Taylor expansion of the loss: how much it would rise without a weight."""

from __future__ import annotations

import torch

from ..model.groups import Slice
from .base import Scoring, TensorCriterion


class Taylor(TensorCriterion):
    """Gradient times weight, summed over rows and columns (Ma et al., 2023, eq. 3-5,
    https://huggingface.co/papers/2305.11627).

    `first` is `|w g|`, `second` `w^2 F`, `mix` `|w g - w^2 F / 2|`, `vectorize` `|sum(w g)|` over the row or column;
    `g` is the gradient of the mean next-token loss, `F` the mean over sequences of the squared gradient of each. The
    rows and columns are reduced in the backward pass, see `gradients.py`.
    """

    needs_gradients = True

    def part_score(self, scoring: Scoring, part: Slice) -> torch.Tensor:
        return scoring.salience[part.tensor, part.dim]
