"""Exchanges after greedy removal: take one more, put one back, as long as the text is predicted better for it."""

from __future__ import annotations

from .greedy import Losses, loss_scores
from .perplexity import TextLoss
from .removal import Removal, Unit


def exchange(measure: TextLoss, removal: Removal, candidates: list[Unit], losses: Losses, per_parameter: bool) -> None:
    """Improves a choice without changing its size.

    What is cheap to remove depends on what else has gone: greedy takes single layers from all over the model, although
    a run of neighbours may be cheaper together. So the unit that is cheapest to remove on top goes, the one whose
    return helps most comes back, and that is kept if the loss is lower; until it is not (a floating search, Pudil,
    Novovicova and Kittler, 1994, "Floating search methods in feature selection"). Only units with as many parameters
    change places. All candidates are measured: that they get dearer, which greedy relies on, is what fails here.

    Args:
        measure: Measures the losses.
        removal: What greedy has removed; is changed.
        candidates: What may go.
        losses: What greedy has measured; the loss after each exchange is appended.
        per_parameter: See `greedy.loss_scores`.
    """
    number = 1
    while True:
        left = [unit for unit in candidates if removal.can(unit) and _alike(removal, unit)]
        if not left:
            return
        measured, base = measure.scan(removal, left, f"Exchange {number}, taking one")
        scores = loss_scores(measured, base, removal, per_parameter)
        losses.scores.update(scores)
        taken = min(left, key=scores.__getitem__)
        back = measure.put_back(removal, taken, _alike(removal, taken), f"Exchange {number}, putting one back")
        returned = min(back, key=back.__getitem__)
        if not back[returned] < base:
            return
        removal.units[:] = [unit for unit in removal.units if unit != returned] + [taken]
        losses.after.append(back[returned])
        number += 1


def _alike(removal: Removal, unit: Unit) -> list[Unit]:
    """What has gone and could come back for this unit, with as many parameters gone as before."""
    before, more = removal.parameters(), Removal(removal.structure, [*removal.units, unit], removal.before)
    return [one for one in removal.units if more.without(one).parameters() == before]
