"""Uniform allocation: the same share of every group of a kind."""

from __future__ import annotations

from .budget import Budget, Counts, spread


def allocate_uniform(budget: Budget, target: int) -> Counts:
    """Cuts every kind by the same share; heads are rounded to whole ones and MLP neurons close what is missing.

    In the uniform layout all layers get the same counts. In the per-layer layout neighbouring layers may differ by
    one rounding step, so that the target is met to within one unit.

    Args:
        budget: The groups that may be cut.
        target: Parameters to remove.
    """
    cuttable = sum(g.num_units * g.unit_parameters for g in budget.mlps)
    cuttable += sum(_attention_parameters(layer) for layer in budget.attentions)
    share = target / cuttable
    counts: Counts = {}
    # Without MLP neurons to close the gap, or where they cannot go so far, heads have to reach the target.
    mlp_limit = sum((g.num_units - budget.smallest_width(g)) * g.unit_parameters for g in budget.mlps)
    counts, removed = _attention(budget, target, share, mlp_limit)
    counts.update(_mlp(budget, target - removed))
    return counts


def _attention_parameters(layer) -> int:
    return layer.attention.kv_heads * layer.group("kv_groups").unit_parameters


def _attention(budget: Budget, target: int, share: float, mlp_limit: int) -> tuple[Counts, int]:
    counts: Counts = {}
    removed = 0
    for number, layer in enumerate(budget.attentions):
        whole = _attention_parameters(layer)
        # Rounding errors of earlier layers are made up for by later ones, unless all layers must be alike.
        wanted = share * whole
        if budget.mlps:
            others = mlp_limit / len(budget.attentions)
            wanted = max(wanted, target / len(budget.attentions) - others)
        if budget.config.layout == "per_layer":
            wanted = wanted * (number + 1) - removed
        option = min(
            budget.attention_options(layer),
            key=lambda o: (abs(budget.attention_removed(layer, *o) - wanted), -o[0]),
        )
        counts.update(budget.keep_heads(layer, *option))
        removed += budget.attention_removed(layer, *option)
    return counts, removed


def _mlp(budget: Budget, target: int) -> Counts:
    aligned = all(budget.largest_width(group) == group.num_units for group in budget.mlps)
    if not budget.mlps or (target <= 0 and aligned):
        return {}
    target = max(0, target)
    per_layer = budget.config.layout == "per_layer"
    share = target / sum(g.num_units * g.unit_parameters for g in budget.mlps)
    counts: Counts = {}
    if not per_layer:
        for group in budget.mlps:
            step = budget.step(group)
            width = max(round(group.num_units * (1 - share) / step) * step, budget.smallest_width(group))
            counts[group.layer, group.kind] = min(width, budget.largest_width(group))
    else:
        counts = _spread_widths(budget, target, share)
    whole = {(g.layer, g.kind): g.num_units for g in budget.mlps}
    return {key: width for key, width in counts.items() if width < whole[key]}


def _spread_widths(budget: Budget, target: int, share: float) -> Counts:
    """Widths that differ by at most one step, of which just enough are the smaller one."""
    counts, removed, steps = {}, 0, []
    for group in budget.mlps:
        step = budget.step(group)
        width = -int(-group.num_units * (1 - share) // step) * step  # up: less is removed than asked
        width = min(width, budget.largest_width(group))
        counts[group.layer, group.kind] = width
        removed += (group.num_units - width) * group.unit_parameters
        lower = max((width - 1) // step * step, budget.smallest_width(group))
        steps.append((group, lower, (width - lower) * group.unit_parameters))
    mean = sum(cost for *_, cost in steps) / len(steps)
    extra = min(max(0, round((target - removed) / mean)), len(steps)) if mean else 0
    for (group, lower, _), one_more in zip(steps, spread(extra, len(steps)), strict=True):
        if one_more:
            counts[group.layer, group.kind] = lower
    return counts
