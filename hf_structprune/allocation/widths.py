"""How many heads and neurons stay in each layer: one function for each way to give a budget out."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

import torch

from ..errors import ConfigurationError
from ..model.groups import Group, LayerStructure
from ..units import KINDS, WidthKind, kinds_of
from ..units.heads import GROUPS, QUERIES, counts_of, pair_of, removed_by_pair
from ..units.neurons import NEURONS
from .budget import Budget, Counts, spread


_CAP = 2 / 3  # of a group; beyond it the quadratic model of the cost is too kind


def allocate(
    budget: Budget,
    ratio: float | None,
    target: int | None = None,
    scores: dict[tuple[int, str], torch.Tensor] | None = None,
    sensitivity: dict[tuple[int, str], float] | None = None,
) -> Counts:
    """Units to keep for every group that is cut, by the allocation that the configuration names.

    Args:
        budget: The groups that may be cut.
        ratio: Share of all parameters to remove; `None` with ratios by kind.
        target: Parameters to remove from heads and neurons, instead of a ratio.
        scores: Importance of every unit by `(layer, kind)`; for the global allocation.
        sensitivity: Cost of cutting each group by `(layer, kind)`, see `survey.measure_sensitivity`; for the search.

    Returns:
        `{(layer, kind): units to keep}`; for query heads the number in each KV group.

    Raises:
        RatioError: More was asked than can go; names the largest possible ratio.
    """
    config = budget.config
    if config.by_kind or config.allocation == "uniform":
        budget = budget.from_dense()  # what is measured on the way changes nothing here
    if config.by_kind:
        return _by_kind(budget)
    target = budget.target(ratio) if target is None else budget.check(target)
    if target == 0 and not budget.gone:
        return {}
    if config.allocation == "uniform":
        return _uniform(budget, target)
    for kind in config.kinds(kinds_of(WidthKind)):
        if KINDS[kind].within is not None:
            raise ConfigurationError(
                f"allocation={config.allocation!r} does not split {KINDS[kind].label}; use units 'mlp_neurons' and "
                "'kv_groups', or 'uniform'."
            )
    return _global(budget, target, scores) if config.allocation == "global" else _search(budget, target, sensitivity)


def _smaller(groups: Iterable[Group], counts: Counts) -> Counts:
    """The counts of groups that do not stay whole."""
    return {group.key: counts[group.key] for group in groups if counts[group.key] < group.size}


def allocate_stated(budget: Budget) -> Counts:
    """The widths that `keep` names, in every layer that may be cut.

    Raises:
        ConfigurationError: A layer has fewer units already, or no checkpoint can have so many.
    """
    counts: Counts = {}
    keep = budget.config.keep
    for layer in budget.attentions:
        shape = layer.attention
        kv_heads = keep.get(GROUPS, shape.kv_heads)
        heads = keep.get(QUERIES, kv_heads * shape.rep)
        options = budget.attention_options(layer)
        if (kv_heads, heads / kv_heads) not in options:
            can = ", ".join(f"{kv} x {rep}" for kv, rep in options)
            raise ConfigurationError(
                f"`keep` is {keep}, which leaves {heads} query heads in {kv_heads} KV groups of layer {layer.index}; "
                f"it has {shape.heads} in {shape.kv_heads}, and what can be kept is (groups x heads in each): {can}."
            )
        counts |= counts_of(layer, kv_heads, heads // kv_heads)
    wanted = {group.key: keep[group.kind] * (group.blocks if group.in_experts else 1) for group in budget.groups}
    for group in budget.groups:
        if wanted[group.key] > group.size:
            most = f"{group.whole} in each expert" if group.in_experts else group.size
            raise ConfigurationError(
                f"`keep` is {keep}, but layer {group.layer} has only {most} {KINDS[group.kind].label}."
            )
        if (step := KINDS[group.kind].step) > 1 and keep[group.kind] % step:
            raise ConfigurationError(
                f"`keep` is {keep}, but {KINDS[group.kind].label} can only be a multiple of {step} in each."
            )
        if wanted[group.key] % group.blocks or wanted[group.key] < group.least:
            each = f", the same number in each of {group.blocks} parts" if group.blocks > 1 else ""
            raise ConfigurationError(
                f"`keep` is {keep}, but layer {group.layer} must keep at least {group.least} "
                f"{KINDS[group.kind].label}{each}."
            )
    return counts | _smaller(budget.groups, wanted)


def _by_kind(budget: Budget) -> Counts:
    """Cuts `attention_ratio` of the heads and `mlp_ratio` of the neurons of every layer that may be cut.

    The rounding is LLM-Pruner's: `dims - int(dims * (1 - ratio))` channels of the KV heads are to go, and as many
    whole KV groups as fit in them do; `int(width * (1 - ratio))` neurons stay (then rounded to `round_to`).
    """
    counts: Counts = {}
    ratio = budget.config.attention_ratio

    def left(heads: int, head_dim: int) -> int:
        dims = heads * head_dim
        return max(1, heads - (dims - int(dims * (1 - ratio))) // head_dim)

    for layer in budget.attentions if ratio else ():
        shape = layer.attention
        kv_heads, rep = shape.kv_heads, shape.rep
        if GROUPS in budget.config.units:
            kv_heads = left(kv_heads, shape.head_dim)
        else:
            rep = left(rep, shape.head_dim)
        # Where a checkpoint cannot express the count, the next larger one that it can; or the largest that is aligned.
        options = budget.attention_options(layer)
        larger = [o for o in options if o[0] >= kv_heads and o[1] >= rep]
        pair = min(larger, key=math.prod) if larger else max(options, key=math.prod)
        counts |= counts_of(layer, *pair)
    ratio = budget.config.mlp_ratio
    groups = [group for group in budget.groups if ratio and group.kind == NEURONS]
    return counts | _smaller(groups, {g.key: budget.nearest_width(g, int(g.size * (1 - ratio))) for g in groups})


def _uniform(budget: Budget, target: int) -> Counts:
    """Cuts every kind by the same share; heads are rounded to whole ones and finer units close what is missing.

    In the uniform layout all layers get the same counts. In the per-layer layout neighbouring layers may differ by
    one rounding step, so that the target is met to within one unit.
    """
    heads = {layer.index: layer.attention.kv_heads * layer.group(GROUPS).cost for layer in budget.attentions}
    share = target / (_size(budget.groups) + sum(heads.values()))
    # Without finer units to close the gap, or where they cannot go so far, heads have to reach the target.
    kinds = _by_coarseness(budget.groups)
    limits = [sum((g.size - budget.least(g)) * g.cost for g in groups) for groups in kinds]
    counts, removed = {}, 0
    for number, layer in enumerate(budget.attentions):
        # Rounding errors of earlier layers are made up for by later ones, unless all layers must be alike.
        wanted = share * heads[layer.index]
        if budget.groups:
            wanted = max(wanted, (target - sum(limits)) / len(budget.attentions))
        if budget.config.layout == "per_layer":
            wanted = wanted * (number + 1) - removed
        pair = _nearest_pair(layer, budget.attention_options(layer), wanted)
        counts |= counts_of(layer, *pair)
        removed += removed_by_pair(layer, *pair)
    for number, groups in enumerate(kinds):
        left = max(0, target - removed)
        if number < len(kinds) - 1:
            left = min(left, max(share * _size(groups), left - sum(limits[number + 1 :])))
        widths = _widths(budget, groups, left)
        removed += sum((g.size - widths[g.key]) * g.cost for g in groups if g.key in widths)
        counts |= widths
    return counts


def _size(groups: list[Group]) -> int:
    return sum(group.size * group.cost for group in groups)


def _by_coarseness(groups: list[Group]) -> list[list[Group]]:
    """Groups by kind, those of the largest units first."""
    kinds: dict[str, list[Group]] = {}
    for group in groups:
        kinds.setdefault(group.kind, []).append(group)
    return sorted(kinds.values(), key=lambda members: -members[0].cost)


def _nearest_pair(layer: LayerStructure, options: Iterable[tuple[int, int]], wanted: float) -> tuple[int, int]:
    """The (KV groups, query heads in each) that remove as near as possible to so many parameters."""
    return min(options, key=lambda o: (abs(removed_by_pair(layer, *o) - wanted), -o[0]))


def _widths(budget: Budget, groups: list[Group], target: float) -> Counts:
    """Units to keep in groups of one kind; those that stay whole are left out."""
    if target <= 0 and all(budget.largest_width(group) == group.size for group in groups):
        return {}
    share = target / _size(groups)
    if budget.config.layout == "per_layer":
        counts = _spread_widths(budget, groups, target, share)
    else:
        counts = {group.key: budget.nearest_width(group, group.size * (1 - share)) for group in groups}
    return _smaller(groups, counts)


def _spread_widths(budget: Budget, groups: list[Group], target: float, share: float) -> Counts:
    """Widths that differ by at most one step, of which just enough are the smaller one."""
    counts, removed, lower, saved = {}, 0, {}, 0
    for group in groups:
        step = budget.step(group)
        width = -int(-group.size * (1 - share) // step) * step  # up: less is removed than asked
        counts[group.key] = width = min(width, budget.largest_width(group))
        removed += (group.size - width) * group.cost
        lower[group.key] = max((width - 1) // step * step, budget.least(group))
        saved += (width - lower[group.key]) * group.cost
    mean = saved / len(groups)
    extra = min(max(0, round((target - removed) / mean)), len(groups)) if mean else 0
    for key, one_more in zip(lower, spread(extra, len(groups)), strict=True):
        if one_more:
            counts[key] = lower[key]
    return counts


def _global(budget: Budget, target: int, scores: dict[tuple[int, str], torch.Tensor]) -> Counts:
    """Removes the units with the lowest standardised scores of the whole model until the target is met.

    Scores are standardised within each group, `(s - mean) / std`, as FLAP's AL-AM does (An et al., 2023,
    https://huggingface.co/papers/2312.11983); a unit costs the parameters that go with it. Widths are then rounded,
    carrying the rounding error from layer to layer so that the total stays.
    """
    removed = _lowest(budget, target, scores)
    counts: Counts = {}
    left = float(target)
    for layer in budget.attentions:
        group = layer.group(GROUPS)
        wanted = group.size - removed[group.key]
        counts[group.key] = min((kv for kv, _ in budget.attention_options(layer)), key=lambda n: abs(n - wanted))
        left -= (group.size - counts[group.key]) * group.cost
    # What heads took too much or too little is made up for here, evenly.
    error = left - sum(removed[g.key] * g.cost for g in budget.groups)
    for number, group in enumerate(budget.groups):
        ideal = group.size - removed[group.key] - error / (len(budget.groups) - number) / group.cost
        counts[group.key] = budget.nearest_width(group, ideal)
        error -= (group.size - removed[group.key] - counts[group.key]) * group.cost
    return _smaller(budget.ranked, counts)


def _lowest(budget: Budget, target: int, scores: dict[tuple[int, str], torch.Tensor]) -> Counts:
    """How many units of each group are among the lowest of the model that hold the target together."""
    entries, groups = [], budget.ranked
    for number, group in enumerate(groups):
        score = scores[group.key].double()
        z = (score - score.mean()) / score.std().clamp_min(1e-30)
        limit = group.size - (1 if KINDS[group.kind].of_heads else budget.least(group))
        # Only the lowest may go; the rest of the group is not offered.
        entries.append(torch.stack([z.sort().values[:limit], torch.full((limit,), number)], dim=1))
    ranked = torch.cat(entries)
    ranked = ranked[ranked[:, 0].argsort(stable=True)]
    costs = torch.tensor([float(group.cost) for group in groups])[ranked[:, 1].long()]
    count = int((costs.cumsum(0) - costs / 2 <= target).sum())
    going = ranked[:count, 1].long().bincount(minlength=len(groups))
    return {group.key: int(n) for group, n in zip(groups, going, strict=True)}


def _search(budget: Budget, target: int, sensitivity: dict[tuple[int, str], float]) -> Counts:
    """Minimises the sum of `a * share^2` over the groups under the budget, one rounding step after the other.

    The costs are convex, so that always taking the step with the least rise for each parameter it saves is optimal up
    to the last step. No group loses more than two thirds unless the ratio asks for it.
    """
    groups = budget.ranked
    counts: Counts = {g.key: budget.next_count(g, g.size + 1) for g in groups}
    for cap in (_CAP, 1.0):
        removed = sum((g.size - counts[g.key]) * g.cost for g in groups)
        _take_cheapest(budget, groups, counts, target - removed, sensitivity, cap)
    return _smaller(groups, counts)


def _take_cheapest(budget: Budget, groups: list[Group], counts: Counts, left: float, sensitivity, cap: float) -> None:
    """Takes steps from the groups until nothing fits the rest of the budget better than leaving it."""
    heap: list[tuple[float, int, int]] = []

    def offer(number: int) -> None:
        group = groups[number]
        now = counts[group.key]
        smaller = budget.next_count(group, now)
        if smaller is None or group.size - smaller > cap * group.size:
            return
        before, after = group.size - now, group.size - smaller
        rise = sensitivity[group.key] * (after**2 - before**2) / group.size**2
        heapq.heappush(heap, (rise / ((now - smaller) * group.cost), number, smaller))

    for number in range(len(groups)):
        offer(number)
    while heap:
        _, number, smaller = heapq.heappop(heap)
        group = groups[number]
        saved = (counts[group.key] - smaller) * group.cost
        if saved / 2 > left:
            continue  # too large a step for what is left; a finer unit may still fit
        counts[group.key] = smaller
        left -= saved
        offer(number)


def next_counts(budget: Budget, goal: Counts, steps_left: int) -> Counts:
    """Counts after the next of the steps that are left: every group goes an equal part of its way to the goal.

    No group gets more units than it has or fewer than its goal, so that steps only tighten and the last one can
    reach the goal whatever the rounding of those before. Neurons are rounded up to whole steps, heads to the nearest
    number that a checkpoint can have.

    Args:
        budget: The groups as they are now.
        goal: Units to keep in the end; groups that are not named stay as they are.
        steps_left: The next step included.
    """
    if steps_left == 1:
        return goal
    counts: Counts = {}
    for layer in budget.attentions:
        now, (kv_heads, rep) = layer.attention, pair_of(layer, goal)
        between = [o for o in budget.attention_options(layer) if o[0] >= kv_heads and o[1] >= rep]
        wanted = removed_by_pair(layer, kv_heads, rep) / steps_left
        counts |= counts_of(layer, *_nearest_pair(layer, [(now.kv_heads, now.rep), *between], wanted))
    widths: Counts = {}
    for group in budget.groups:
        step, last = budget.step(group), goal.get(group.key, group.size)
        wanted = group.size - (group.size - last) / steps_left
        widths[group.key] = min(max(math.ceil(wanted / step) * step, last), group.size)
    return counts | _smaller(budget.groups, widths)
