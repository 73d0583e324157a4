"""How much of a budget goes to depth and how much to widths, by measured cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..errors import RatioError
from ..model.structure import ModelStructure
from ..plan import Dropped, normalised
from .budget import Counts


if TYPE_CHECKING:
    from ..stats.survey import Sensitivity
    from .depth import DepthChoice
    from .removal import Unit

_PATIENCE = 2  # removals that may cost more than they save before no more are tried


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

    Raises:
        RatioError: The budget cannot be reached, however many of them go.
    """
    costs = prefix_costs(depth.order, depth.losses, depth.baseline, structure, sensitivity, widths)
    if min(costs) == float("inf"):
        raise RatioError(
            f"So much cannot be removed: heads and neurons cannot take what is left of it after any of 0 to "
            f"{len(depth.order)} removals of layers or sublayers. Ask for less, or allow more `units` or layers."
        )
    return _dropped(depth.order[: costs.index(min(costs))], structure)


def prefix_costs(
    order: Sequence[Unit],
    losses: Sequence[float],
    baseline: float,
    structure: ModelStructure,
    sensitivity: Sensitivity,
    widths: Callable[[Dropped], Counts],
) -> list[float]:
    """The cost of the whole cut with none, one, two ... of the removals; see `best_part`.

    Args:
        order: Removals in order.
        losses: Loss after each.
        baseline: Loss before any.
        structure: Coupled groups of the model.
        sensitivity: `a` of each group.
        widths: The counts that close the gap to the budget after these removals.
    """
    rises = [0.0, *(loss - baseline for loss in losses)]
    prefixes = [_dropped(order[:number], structure) for number in range(len(order) + 1)]
    return [
        rise + _cost(widths, dropped, structure, sensitivity) for rise, dropped in zip(rises, prefixes, strict=True)
    ]


def levelled_off(costs: Sequence[float]) -> bool:
    """Whether the last removals did not make the whole cut cheaper, so that more will hardly do."""
    least = min(costs)
    return least < float("inf") and len(costs) - 1 - costs.index(least) >= _PATIENCE


def _dropped(order: Sequence[Unit], structure: ModelStructure) -> Dropped:
    dropped: Dropped = {}
    for layer, kind in order:
        dropped.setdefault(kind, []).append(layer)
    return normalised(dropped, structure)


def _cost(widths, dropped: Dropped, structure: ModelStructure, sensitivity: Sensitivity) -> float:
    try:
        counts = widths(dropped)
    except RatioError:
        return float("inf")  # the widths that are left cannot take the rest
    sizes = {(group.layer, group.kind): group.size for group in structure.groups}
    return sum(sensitivity[key] * (1 - keep / sizes[key]) ** 2 for key, keep in counts.items())
