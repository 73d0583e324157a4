"""Global allocation: one ranking over all groups of the model."""

from __future__ import annotations

import torch

from ..errors import ConfigurationError
from .budget import Budget, Counts


def allocate_global(budget: Budget, target: int, scores: dict[tuple[int, str], torch.Tensor] | None) -> Counts:
    """Removes the units with the lowest standardised scores of the whole model until the target is met.

    Scores are standardised within each group, `(s - mean) / std`, as FLAP's AL-AM does (An et al., 2023,
    https://huggingface.co/papers/2312.11983); a unit costs the parameters that go with it. Widths are then rounded,
    carrying the rounding error from layer to layer so that the total stays.

    Args:
        budget: The groups that may be cut.
        target: Parameters to remove.
        scores: Importance of every unit by `(layer, kind)`.
    """
    groups = budget.ranked
    budget.refuse_parts("global")
    if scores is None:
        raise ConfigurationError("allocation='global' needs the scores of all units.")
    removed = _lowest(budget, groups, target, scores)
    return _rounded(budget, groups, target, removed)


def _lowest(budget: Budget, groups, target: int, scores) -> dict[tuple[int, str], int]:
    """Units of each group among the lowest of the model."""
    limits = {}
    entries = []
    for number, group in enumerate(groups):
        score = scores[group.layer, group.kind].double()
        z = (score - score.mean()) / score.std().clamp_min(1e-30)
        limits[number] = group.size - (budget.smallest_width(group) if group in budget.groups else 1)
        # Only the lowest may go; the rest of the group is not offered.
        entries.append(torch.stack([z.sort().values[: limits[number]], torch.full((limits[number],), number)], dim=1))
    ranked = torch.cat(entries)
    ranked = ranked[ranked[:, 0].argsort(stable=True)]
    costs = torch.tensor([float(group.cost) for group in groups])[ranked[:, 1].long()]
    total = costs.cumsum(0)
    count = int((total - costs / 2 <= target).sum())
    going = ranked[:count, 1].long().bincount(minlength=len(groups))
    return {(g.layer, g.kind): int(n) for g, n in zip(groups, going, strict=True)}


def _rounded(budget: Budget, groups, target: int, removed: dict[tuple[int, str], int]) -> Counts:
    counts: Counts = {}
    carried = float(target)
    for group in groups:
        if group not in budget.groups:
            wanted = group.size - removed[group.key]
            options = budget.attention_options(budget.structure.layers[group.layer])
            counts[group.key] = min((kv for kv, _ in options), key=lambda n: abs(n - wanted))
            carried -= (group.size - counts[group.key]) * group.cost
    exact = sum(removed[g.key] * g.cost for g in budget.groups)
    error = carried - exact  # what heads took too much or too little is made up for here, evenly
    for number, group in enumerate(budget.groups):
        step = budget.step(group)
        share = error / (len(budget.groups) - number)
        ideal = group.size - removed[group.layer, group.kind] - share / group.cost
        width = min(max(round(ideal / step) * step, budget.smallest_width(group)), budget.largest_width(group))
        counts[group.layer, group.kind] = width
        error -= (group.size - removed[group.layer, group.kind] - width) * group.cost
    whole = {(g.layer, g.kind): g.size for g in groups}
    return {key: count for key, count in counts.items() if count < whole[key]}
