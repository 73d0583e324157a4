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
    budget.refuse_parts("search")
    if sensitivity is None:
        raise ConfigurationError("allocation='search' needs the sensitivities of all groups.")
    groups = budget.ranked
    counts: Counts = {(g.layer, g.kind): budget.next_count(g, g.size + 1) for g in groups}
    for cap in (_CAP, 1.0):
        removed = sum((g.size - counts[g.layer, g.kind]) * g.cost for g in groups)
        _greedy(budget, groups, counts, target - removed, sensitivity, cap)
    whole = {(g.layer, g.kind): g.size for g in groups}
    return {key: count for key, count in counts.items() if count < whole[key]}


def _greedy(budget: Budget, groups, counts: Counts, left: float, sensitivity, cap: float) -> None:
    """Takes steps from the groups until nothing fits the rest of the budget better than leaving it."""
    heap: list[tuple[float, int, int]] = []

    def offer(number: int) -> None:
        group = groups[number]
        now = counts[group.layer, group.kind]
        smaller = budget.next_count(group, now)
        if smaller is None or group.size - smaller > cap * group.size:
            return
        a, before, after = sensitivity[group.layer, group.kind], group.size - now, group.size - smaller
        rise = a * (after**2 - before**2) / group.size**2
        heapq.heappush(heap, (rise / ((now - smaller) * group.cost), number, smaller))

    for number in range(len(groups)):
        offer(number)
    while heap:
        _, number, smaller = heapq.heappop(heap)
        group = groups[number]
        saved = (counts[group.layer, group.kind] - smaller) * group.cost
        if saved / 2 > left:
            continue  # too large a step for what is left; a finer unit may still fit
        counts[group.layer, group.kind] = smaller
        left -= saved
        offer(number)
