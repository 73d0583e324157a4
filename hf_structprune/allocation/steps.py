"""One of several equal steps towards the counts that are to be reached in the end."""

from __future__ import annotations

import math

from ..model.groups import Group, LayerStructure
from ..units.heads import counts_of, pair_of, removed_by_pair
from .budget import Budget, Counts


def next_counts(budget: Budget, goal: Counts, steps_left: int) -> Counts:
    """Counts after the next of the steps that are left: every group goes an equal part of its way to the goal.

    No group gets more units than it has or fewer than its goal, so that steps only tighten and the last one can
    reach the goal whatever the rounding of those before. Neurons are rounded up to whole steps, heads to the nearest
    number that a checkpoint can have.

    Args:
        budget: The groups as they are now.
        goal: Units to keep in the end; groups that are not named stay as they are.
        steps_left: The next step included.

    Returns:
        `{(layer, kind): units to keep}`; for query heads the number in each KV group.
    """
    if steps_left == 1:
        return goal
    counts: Counts = {}
    for layer in budget.attentions:
        counts.update(counts_of(layer, *_heads(budget, layer, goal, steps_left)))
    widths = {
        (group.layer, group.kind): (group.size, _width(budget, group, goal, steps_left)) for group in budget.groups
    }
    return counts | {key: width for key, (whole, width) in widths.items() if width < whole}


def _width(budget: Budget, group: Group, goal: Counts, steps_left: int) -> int:
    whole, step = group.size, budget.step(group)
    last = goal.get((group.layer, group.kind), whole)
    wanted = whole - (whole - last) / steps_left
    return min(max(math.ceil(wanted / step) * step, last), whole)


def _heads(budget: Budget, layer: LayerStructure, goal: Counts, steps_left: int) -> tuple[int, int]:
    shape = layer.attention
    kv_heads, rep = pair_of(layer, goal)
    between = [o for o in budget.attention_options(layer) if o[0] >= kv_heads and o[1] >= rep]
    wanted = removed_by_pair(layer, kv_heads, rep) / steps_left
    return min(
        [(shape.kv_heads, shape.rep), *between],
        key=lambda o: (abs(removed_by_pair(layer, *o) - wanted), -o[0]),
    )
