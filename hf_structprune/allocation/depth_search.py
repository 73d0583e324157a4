"""Which layers and sublayers to remove, by measured losses: greedily, then by exchanges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..stats.losses import TextLoss
from .removal import Amount, Removal, Unit


def exchange(
    measure: TextLoss,
    removal: Removal,
    candidates: list[Unit],
    amount: Amount,
    losses: Losses,
    per_parameter: bool,
) -> None:
    """Improves a choice without leading it farther away from the amount.

    What is cheap to remove depends on what else has gone: greedy takes single layers from all over the model, although
    a run of neighbours may be cheaper together. So the unit that is cheapest to remove on top goes, those whose return
    helps most come back until the amount is what it was, and that is kept if the loss is lower; until it is not (a
    floating search, Pudil, Novovicova and Kittler, 1994, "Floating search methods in feature selection"). For a layer
    an attention and an MLP of other layers can come back. All candidates are measured: that they get dearer, which
    greedy relies on, is what fails here.

    Args:
        measure: Measures the losses.
        removal: What greedy has removed, in parts; is changed.
        candidates: What may go.
        amount: How much is to go.
        losses: What greedy has measured; the loss after each exchange is appended.
        per_parameter: See `greedy.loss_scores`.
    """
    number = 1
    while True:
        left = [unit for unit in candidates if removal.can(unit)]
        if not left or not removal.units:
            return
        farthest = amount.distance(removal)
        measured, base = measure.scan(removal, left, f"Exchange {number}, taking one")
        scores = loss_scores(measured, base, removal, per_parameter)
        losses.scores.update(scores)
        for taken in sorted(left, key=scores.__getitem__):
            more = Removal(removal.structure, [*removal.units, taken], removal.before)
            loss = _balance(measure, more, amount, farthest, measured[taken], per_parameter, f"Exchange {number}")
            if loss is not None:
                break
        if loss is None or not loss < base:
            return
        removal.units[:] = more.units if amount.count is not None else more.in_parts(candidates)
        losses.after.append(loss)
        number += 1


def put_back_excess(measure: TextLoss, removal: Removal, amount: Amount, losses: Losses, per_parameter: bool) -> None:
    """Puts units back as long as that leads nearer to the amount: an attention where greedy ended with a layer.

    Args:
        measure: Measures the losses.
        removal: What greedy has removed, in parts; is changed.
        amount: How much is to go.
        losses: What greedy has measured; the loss after each return is appended.
        per_parameter: See `greedy.loss_scores`.
    """
    while back := amount.returns(removal):
        losses.after.append(
            _return_best(measure, removal, back, losses.after[-1], per_parameter, "Putting back what is too much")
        )


def _balance(
    measure: TextLoss,
    more: Removal,
    amount: Amount,
    farthest: tuple[int, int],
    loss: float,
    per_parameter: bool,
    description: str,
) -> float | None:
    """Puts back all but the last unit that went until the amount is as near as before; None if that cannot be.

    Args:
        measure: Measures the losses.
        more: What has gone with the last one; is changed.
        amount: How much is to go.
        farthest: How far away it may be, see `Amount.distance`.
        loss: Loss without all of `more`.
        per_parameter: See `greedy.loss_scores`.
        description: Of the progress bar.
    """

    def fits(unit: Unit) -> bool:
        rest = more.without(unit)
        return -farthest[0] <= amount.excess(rest) < amount.excess(more) and rest.parameters() < more.parameters()

    while amount.distance(more) > farthest:
        back = [unit for unit in more.units[:-1] if fits(unit)]
        if not back:
            return None
        loss = _return_best(measure, more, back, loss, per_parameter, f"{description}, putting back")
    return loss


def _return_best(
    measure: TextLoss, removal: Removal, back: list[Unit], loss: float, per_parameter: bool, description: str
) -> float:
    """Puts back the unit whose return lowers the loss most (per parameter); returns the loss then."""
    found, gone = measure.put_back(removal, back, description), removal.parameters()

    def score(unit: Unit) -> float:
        size = gone - removal.without(unit).parameters() if per_parameter else 1
        return (found[unit] - loss) / size

    best = min(back, key=score)
    removal.units.remove(best)
    return found[best]


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
