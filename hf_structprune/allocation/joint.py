"""How much of a budget goes to depth and how much to widths, by measured cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..decisions import Dropped, normalised
from ..errors import RatioError
from ..structure import ModelStructure
from .budget import Counts


if TYPE_CHECKING:
    from ..depth import DepthChoice
    from ..sensitivity import Sensitivity


def best_part(
    depth: DepthChoice,
    structure: ModelStructure,
    sensitivity: Sensitivity,
    widths: Callable[[Dropped], Counts],
) -> Dropped:
    """How many of the removals in a depth choice are worth it, when widths take the rest of the budget.

    The cost of the first `k` removals is the rise of the loss that was measured with all of them gone; that of widths
    is the sum of `a * share^2` over the groups (see `sensitivity.measure_sensitivity`). Both are nats per token: the
    divergence from the dense model is the rise of the loss on text as the dense model would write it. They are added,
    as if they did not depend on each other.

    Args:
        depth: Removals in order, with the loss after each.
        structure: Coupled groups of the model.
        sensitivity: `a` of each group.
        widths: The counts that close the gap to the budget after these removals.

    Returns:
        The layers and sublayers to drop.
    """
    best: tuple[float, Dropped] | None = None
    for number in range(len(depth.order) + 1):
        dropped: Dropped = {}
        for layer, kind in depth.order[:number]:
            dropped.setdefault(kind, []).append(layer)
        dropped = normalised(dropped, structure)
        rise = depth.losses[number - 1] - depth.baseline if number else 0.0
        cost = rise + _cost(widths, dropped, structure, sensitivity)
        if best is None or cost < best[0]:
            best = cost, dropped
    return best[1]


def _cost(widths, dropped: Dropped, structure: ModelStructure, sensitivity: Sensitivity) -> float:
    try:
        counts = widths(dropped)
    except RatioError:
        return float("inf")  # the widths that are left cannot take the rest
    sizes = {(group.layer, group.kind): group.num_units for group in structure.groups}
    return sum(sensitivity[key] * (1 - keep / sizes[key]) ** 2 for key, keep in counts.items())
