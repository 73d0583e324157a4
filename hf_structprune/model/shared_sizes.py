"""What all layers share, by kind of unit: where it is in a model, and what a model with less of it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from transformers import PreTrainedModel

from ..units import HEAD_SIZE, HIDDEN, KV_RANKS, Q_RANKS, VOCABULARY
from .groups import Group
from .head_size import head_group, smaller_heads
from .hidden_size import hidden_group, shrunk_target
from .latent_ranks import rank_group, smaller_ranks
from .structure import ModelStructure
from .target import Target
from .vocabulary_size import token_group, trimmed_target


class Sized(NamedTuple):
    """A kind of unit that all layers share; both functions work on the meta device.

    Attributes:
        group: Its units in a model; an `UnsupportedModelError` if they cannot be cut.
        target: Class and configuration of the model with so many of them; a `CheckpointError` if there is none.
    """

    group: Callable[[PreTrainedModel, ModelStructure], Group]
    target: Callable[[PreTrainedModel, ModelStructure, int], Target]


SIZED: dict[str, Sized] = {
    HIDDEN: Sized(hidden_group, shrunk_target),
    HEAD_SIZE: Sized(head_group, smaller_heads),
    VOCABULARY: Sized(token_group, trimmed_target),
    **{kind: Sized(partial(rank_group, kind), partial(smaller_ranks, kind)) for kind in (Q_RANKS, KV_RANKS)},
}
