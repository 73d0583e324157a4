"""How what all layers share is cut, by kind of unit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..model.structure import ModelStructure
from ..model.vocabulary_size import cut_tokens
from ..units import HEAD_SIZE, HIDDEN, KV_RANKS, Q_RANKS, VOCABULARY
from .channels import cut_hidden
from .head_size import cut_head_size
from .latent_ranks import cut_ranks


def _cut_vocabulary(model, structure, keep, config, tokens, kept):
    return cut_tokens(model, structure, kept), kept


Cut = Callable[
    [PreTrainedModel, ModelStructure, int, PruningConfig, torch.Tensor | None, torch.Tensor | None],
    tuple[PreTrainedModel, torch.Tensor | None],
]
# Each gets the model, its structure, how many units stay, the configuration, calibration tokens (`None` where nothing
# looks at text) and the numbers of the units that stay (`None` to rank them); returns the smaller model and those.
CUTS: dict[str, Cut] = {
    HIDDEN: cut_hidden, HEAD_SIZE: cut_head_size, VOCABULARY: _cut_vocabulary,
    **{kind: partial(cut_ranks, kind) for kind in (Q_RANKS, KV_RANKS)},
}  # fmt: skip
