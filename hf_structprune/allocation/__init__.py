"""How the budget is split over the coupled groups. One file is one way; `allocate` picks it."""

from __future__ import annotations

import torch

from ..config import PruningConfig
from ..model.structure import ModelStructure
from ..plan import Dropped
from .amounts import allocate_by_kind, allocate_stated
from .budget import Budget, Counts, next_counts
from .global_ranking import allocate_global
from .search import allocate_search
from .uniform import allocate_uniform


__all__ = ["Budget", "Counts", "allocate", "allocate_stated", "next_counts"]


def allocate(
    structure: ModelStructure,
    config: PruningConfig,
    ratio: float | None,
    scores: dict[tuple[int, str], torch.Tensor] | None = None,
    head_counts: set[tuple[int, int]] | None = None,
    sensitivity: dict[tuple[int, str], float] | None = None,
    dropped: Dropped | None = None,
    target: int | None = None,
    dense: ModelStructure | None = None,
) -> Counts:
    """Units to keep for every group that is cut.

    Args:
        structure: Coupled groups of the model.
        config: What may be cut and how.
        ratio: Share of all parameters to remove; `None` with ratios by kind.
        scores: Importance of every unit by `(layer, kind)`; needed by the global allocation only.
        head_counts: Pairs of (KV groups, query heads in each) that a checkpoint can express; `None` allows all.
        sensitivity: Cost of cutting each group by `(layer, kind)`; needed by the search only.
        dropped: Layers and sublayers that go as a whole, so that nothing of them is left to cut.
        target: Parameters to remove from heads and neurons, instead of a ratio.
        dense: The model before earlier steps, which all of this refers to; default `structure`.

    Returns:
        `{(layer, kind): units to keep}`; for query heads the number in each KV group.

    Raises:
        RatioError: More was asked than can go; names the largest possible ratio.
    """
    if config.by_kind or config.allocation == "uniform":
        structure = dense or structure  # what is measured on the way changes nothing here
    budget = Budget(structure, config, head_counts, dropped, dense)
    if config.by_kind:
        return allocate_by_kind(budget)
    target = budget.target(ratio) if target is None else budget.check(target)
    if target == 0 and not budget.gone:
        return {}
    if config.allocation == "global":
        return allocate_global(budget, target, scores)
    if config.allocation == "search":
        return allocate_search(budget, target, sensitivity)
    return allocate_uniform(budget, target)
