"""Greedy removal (SLEB, Song et al. 2024, arXiv 2402.09025): drop what costs least, measure what is left again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..stats.losses import TextLoss
from .removal import Amount, Removal, Unit


# Candidates that are measured together in later rounds: the states in front of them are computed once for all of them.
AT_ONCE = 6

# Asked after each removal: what went in order, the loss after each, the loss before any.
Stop = Callable[[list[Unit], list[float], float], bool]


@dataclass
class Losses:
    """What was measured on the way.

    Attributes:
        baseline: Loss before anything went.
        after: Loss after each removal, and after each return and exchange.
        scores: For each candidate the score of the last round in which it was measured.
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

    Where little is lacking, only candidates that are small enough to lead nearer to the amount are measured.

    Args:
        text: Makes what measures the losses; called only if something is to go.
        removal: What has gone; is extended.
        candidates: What may go.
        amount: When to stop.
        per_parameter: See `loss_scores`.
        until: Stops before the amount is reached.
    """
    found, measure = Losses(), None
    rises: dict[Unit, float] = {}
    while True:
        left = [unit for unit in candidates if removal.can(unit) and amount.wants(removal, unit)]
        if not left:
            return found
        measure = measure or text()
        losses, base = _cheapest(measure, removal, left, rises, per_parameter)
        found.baseline = base if found.baseline is None else found.baseline
        scores = loss_scores(losses, base, removal, per_parameter)
        found.scores.update(scores)
        best = min((unit for unit in left if unit in losses), key=scores.__getitem__)
        removal.units.append(best)
        found.after.append(losses[best])
        if until is not None and until(removal.units, found.after, found.baseline):
            return found


def _cheapest(
    measure: TextLoss, removal: Removal, left: list[Unit], rises: dict[Unit, float], per_parameter: bool
) -> tuple[dict[Unit, float], float]:
    """The losses of as many candidates as it takes to be sure of the cheapest, and the loss without any of them.

    Removing more makes the next removal dearer, as a rule. So a candidate whose rise was larger, when it was last
    measured, than the least rise found now is not measured again (lazy greedy: Minoux, 1978, "Accelerated greedy
    algorithms for maximizing submodular set functions").

    Args:
        measure: Measures the losses.
        removal: What has gone.
        left: Candidates.
        rises: Their rises when they were last measured; is brought up to date.
        per_parameter: Whether rises are per parameter.
    """
    losses: dict[Unit, float] = {}
    waiting = sorted(left, key=lambda unit: rises.get(unit, float("-inf")))
    while True:
        unknown = sum(unit not in rises for unit in waiting)
        batch, waiting = waiting[: max(unknown, AT_ONCE)], waiting[max(unknown, AT_ONCE) :]
        more, base = measure.scan(removal, batch, f"Greedy removal {len(removal.units) + 1}")
        losses |= more
        scores = loss_scores(more, base, removal, per_parameter)
        rises |= {unit: score if per_parameter else score - base for unit, score in scores.items()}
        if not waiting or min(rises[unit] for unit in losses) <= rises[waiting[0]]:
            return losses, base
