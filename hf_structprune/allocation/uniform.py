"""Uniform allocation: the same share of every group of a kind."""

from __future__ import annotations

from ..model.groups import Group, LayerStructure
from ..units.heads import GROUPS, counts_of, removed_by_pair
from .budget import Budget, Counts, spread


def allocate_uniform(budget: Budget, target: int) -> Counts:
    """Cuts every kind by the same share; heads are rounded to whole ones and finer units close what is missing.

    In the uniform layout all layers get the same counts. In the per-layer layout neighbouring layers may differ by
    one rounding step, so that the target is met to within one unit.

    Args:
        budget: The groups that may be cut.
        target: Parameters to remove.
    """
    share = target / (_size(budget.groups) + sum(map(_attention_parameters, budget.attentions)))
    # Without finer units to close the gap, or where they cannot go so far, heads have to reach the target.
    kinds = _by_coarseness(budget.groups)
    limits = [sum((g.size - budget.smallest_width(g)) * g.cost for g in groups) for groups in kinds]
    counts, removed = _attention(budget, target, share, sum(limits))
    for number, groups in enumerate(kinds):
        left = max(0, target - removed)
        if number < len(kinds) - 1:
            left = min(left, max(share * _size(groups), left - sum(limits[number + 1 :])))
        widths = _widths(budget, groups, left)
        removed += sum((g.size - widths[g.key]) * g.cost for g in groups if g.key in widths)
        counts.update(widths)
    return counts


def _size(groups: list[Group]) -> int:
    return sum(group.size * group.cost for group in groups)


def _by_coarseness(groups: list[Group]) -> list[list[Group]]:
    """Groups by kind, those of the largest units first."""
    kinds: dict[str, list[Group]] = {}
    for group in groups:
        kinds.setdefault(group.kind, []).append(group)
    return sorted(kinds.values(), key=lambda members: -members[0].cost)


def _attention_parameters(layer: LayerStructure) -> int:
    return layer.attention.kv_heads * layer.group(GROUPS).cost


def _attention(budget: Budget, target: int, share: float, limit: int) -> tuple[Counts, int]:
    counts: Counts = {}
    removed = 0
    for number, layer in enumerate(budget.attentions):
        # Rounding errors of earlier layers are made up for by later ones, unless all layers must be alike.
        wanted = share * _attention_parameters(layer)
        if budget.groups:
            wanted = max(wanted, (target - limit) / len(budget.attentions))
        if budget.config.layout == "per_layer":
            wanted = wanted * (number + 1) - removed
        option = min(budget.attention_options(layer), key=lambda o: (abs(removed_by_pair(layer, *o) - wanted), -o[0]))
        counts.update(counts_of(layer, *option))
        removed += removed_by_pair(layer, *option)
    return counts, removed


def _widths(budget: Budget, groups: list[Group], target: float) -> Counts:
    """Units to keep in groups of one kind; those that stay whole are left out."""
    if target <= 0 and all(budget.largest_width(group) == group.size for group in groups):
        return {}
    share = target / _size(groups)
    if budget.config.layout == "per_layer":
        counts = _spread_widths(budget, groups, target, share)
    else:
        counts = {}
        for group in groups:
            step = budget.step(group)
            width = max(round(group.size * (1 - share) / step) * step, budget.smallest_width(group))
            counts[group.key] = min(width, budget.largest_width(group))
    whole = {group.key: group.size for group in groups}
    return {key: width for key, width in counts.items() if width < whole[key]}


def _spread_widths(budget: Budget, groups: list[Group], target: float, share: float) -> Counts:
    """Widths that differ by at most one step, of which just enough are the smaller one."""
    counts, removed, steps = {}, 0, []
    for group in groups:
        step = budget.step(group)
        width = -int(-group.size * (1 - share) // step) * step  # up: less is removed than asked
        width = min(width, budget.largest_width(group))
        counts[group.key] = width
        removed += (group.size - width) * group.cost
        lower = max((width - 1) // step * step, budget.smallest_width(group))
        steps.append((group, lower, (width - lower) * group.cost))
    mean = sum(cost for *_, cost in steps) / len(steps)
    extra = min(max(0, round((target - removed) / mean)), len(steps)) if mean else 0
    for (group, lower, _), one_more in zip(steps, spread(extra, len(steps)), strict=True):
        if one_more:
            counts[group.key] = lower
    return counts
