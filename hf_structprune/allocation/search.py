"""Allocation by measured sensitivity: most is taken where the predictions suffer least."""

from __future__ import annotations

import heapq

from ..errors import ConfigurationError
from .budget import Budget, Counts


_CAP = 2 / 3  # of a group; beyond it the quadratic model of the cost is too kind


def allocate_search(budget: Budget, target: int, sensitivity: dict[tuple[int, str], float] | None) -> Counts:
    """Minimises the sum of `a * share^2` over the groups under the budget, one rounding step after the other.

    The costs are convex, so that always taking the step with the least rise for each parameter it saves is optimal up
    to the last step. No group loses more than two thirds unless the ratio asks for it.

    Args:
        budget: The groups that may be cut.
        target: Parameters to remove.
        sensitivity: `a` of every group, from `sensitivity.measure_sensitivity`.
    """
    if "query_heads" in budget.config.units:
        raise ConfigurationError(
            "allocation='search' does not split query heads; use units 'mlp_neurons' and 'kv_groups', or 'uniform'."
        )
    if sensitivity is None:
        raise ConfigurationError("allocation='search' needs the sensitivities of all groups.")
    groups = budget.mlps + [layer.group("kv_groups") for layer in budget.attentions]
    counts: Counts = {(g.layer, g.kind): _largest_count(budget, g) for g in groups}
    for cap in (_CAP, 1.0):
        removed = sum((g.num_units - counts[g.layer, g.kind]) * g.unit_parameters for g in groups)
        _greedy(budget, groups, counts, target - removed, sensitivity, cap)
    whole = {(g.layer, g.kind): g.num_units for g in groups}
    return {key: count for key, count in counts.items() if count < whole[key]}


def _greedy(budget: Budget, groups, counts: Counts, left: float, sensitivity, cap: float) -> None:
    """Takes steps from the groups until nothing fits the rest of the budget better than leaving it."""
    heap: list[tuple[float, int, int]] = []

    def offer(number: int) -> None:
        group = groups[number]
        now = counts[group.layer, group.kind]
        smaller = _next_count(budget, group, now)
        if smaller is None or group.num_units - smaller > cap * group.num_units:
            return
        a, before, after = sensitivity[group.layer, group.kind], group.num_units - now, group.num_units - smaller
        rise = a * (after**2 - before**2) / group.num_units**2
        heapq.heappush(heap, (rise / ((now - smaller) * group.unit_parameters), number, smaller))

    for number in range(len(groups)):
        offer(number)
    while heap:
        _, number, smaller = heapq.heappop(heap)
        group = groups[number]
        saved = (counts[group.layer, group.kind] - smaller) * group.unit_parameters
        if saved / 2 > left:
            continue  # too large a step for what is left; a finer unit may still fit
        counts[group.layer, group.kind] = smaller
        left -= saved
        offer(number)


def _largest_count(budget: Budget, group) -> int:
    """All units, or as many as are aligned."""
    if group.kind == "mlp_neurons":
        return budget.largest_width(group)
    return max(o[0] for o in budget.attention_options(budget.structure.layers[group.layer]))


def _next_count(budget: Budget, group, now: int) -> int | None:
    """The next smaller number of units that is allowed."""
    if group.kind == "mlp_neurons":
        step = budget.step(group)
        smaller = (now - 1) // step * step
        return smaller if smaller >= budget.smallest_width(group) else None
    options = [o[0] for o in budget.attention_options(budget.structure.layers[group.layer]) if o[0] < now]
    return max(options, default=None)
