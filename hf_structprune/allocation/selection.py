"""Chooses the units that stay: the best of every group, as many as the plan says."""

from __future__ import annotations

import torch

from ..model.structure import Group


def best_units(
    scores: torch.Tensor, group: Group, keep: int, alive_blocks: torch.Tensor | None = None
) -> torch.Tensor:
    """Numbers of the units with the highest scores, ascending; equal scores keep the lower number.

    Args:
        scores: Importance of every unit of the group, shape (num_units,).
        group: The group. Of each of its blocks (query heads: of each KV group) equally many units stay.
        keep: Units to keep in all.
        alive_blocks: Blocks of which units may stay; default all.
    """
    scores = scores.detach().cpu().double().view(group.blocks, -1)
    blocks = torch.arange(group.blocks) if alive_blocks is None else alive_blocks.cpu()
    order = scores[blocks].argsort(dim=1, descending=True, stable=True)[:, : keep // len(blocks)]
    return (order + blocks[:, None] * scores.shape[1]).flatten().sort().values
