"""Exchanges after greedy removal: take one more, put others back, as long as the text is predicted better for it."""

from __future__ import annotations

from ..stats.losses import TextLoss
from .greedy import Losses, loss_scores
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
