"""Greedy removal (SLEB, Song et al. 2024, arXiv 2402.09025): drop what costs least, measure what is left again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .perplexity import TextLoss
from .removal import Amount, Removal, Unit


# Asked after each removal: what went in order, the loss after each, the loss before any.
Stop = Callable[[list[Unit], list[float], float], bool]


@dataclass
class Losses:
    """What was measured on the way.

    Attributes:
        baseline: Loss before anything went.
        after: Loss after each removal.
        scores: For each candidate the score of the round it went in; of those that stay, of the last round.
    """

    baseline: float | None = None
    after: list[float] = field(default_factory=list)
    scores: dict[Unit, float] = field(default_factory=dict)


def loss_scores(losses: dict[Unit, float], base: float, removal: Removal, per_parameter: bool) -> dict[Unit, float]:
    """The losses themselves; or, where candidates of several kinds compete, their rise per million parameters.

    An MLP is larger than an attention, a layer than either: by the rise alone the smallest would always go first and
    a given number of parameters would cost more than it has to.

    Args:
        losses: Loss with each candidate gone.
        base: Loss with all of them there.
        removal: What has gone before.
        per_parameter: Whether to divide by the parameters that each takes with it now.
    """
    if not per_parameter:
        return dict(losses)
    before = removal.parameters()
    return {unit: 1e6 * (loss - base) / (removal.parameters([unit]) - before) for unit, loss in losses.items()}


def remove_greedily(
    text: Callable[[], TextLoss],
    removal: Removal,
    candidates: list[Unit],
    amount: Amount,
    per_parameter: bool,
    until: Stop | None = None,
) -> Losses:
    """Removes candidates one at a time, each time the one with the least score on top of those that went.

    Args:
        text: Makes what measures the losses; called only if something is to go.
        removal: What has gone; is extended.
        candidates: What may go.
        amount: When to stop.
        per_parameter: See `loss_scores`.
        until: Stops before the amount is reached.
    """
    found, measure = Losses(), None
    while True:
        left = [unit for unit in candidates if removal.can(unit)]
        if not any(amount.wants(removal, unit) for unit in left):
            return found
        measure = measure or text()
        losses, base = measure.scan(removal, left, f"Greedy removal {len(removal.units) + 1}")
        found.baseline = base if found.baseline is None else found.baseline
        scores = loss_scores(losses, base, removal, per_parameter)
        found.scores.update(scores)
        best = min(left, key=scores.get)
        if not amount.wants(removal, best):
            return found
        removal.units.append(best)
        found.after.append(losses[best])
        if until is not None and until(removal.units, found.after, found.baseline):
            return found
