"""Which layers and sublayers to remove, by measured losses: greedily, then by exchanges."""

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
class LossSearch:
    """Removals that are chosen by the loss of a text.

    Attributes:
        text: Makes what measures the losses; called only if something is to be measured.
        candidates: What may go.
        amount: How much is to go.
        removal: What has gone; is changed.
        baseline: Loss before anything went; `None` as long as nothing was measured.
        losses: Loss after each removal, and after each return and exchange.
        scores: For each candidate the score of the last round in which it was measured.
    """

    text: Callable[[], TextLoss]
    candidates: list[Unit]
    amount: Amount
    removal: Removal
    baseline: float | None = None
    losses: list[float] = field(default_factory=list)
    scores: dict[Unit, float] = field(default_factory=dict)

    def scored(self, losses: dict[Unit, float], base: float) -> dict[Unit, float]:
        """The losses themselves; or, where candidates of several kinds compete, their rise per million parameters.

        An MLP is larger than an attention, a layer than either: by the rise alone the smallest would always go first
        and a given number of parameters would cost more than it has to.

        Args:
            losses: Loss with each candidate gone.
            base: Loss with all of them there.
        """
        if not per_parameter(self.candidates):
            return dict(losses)
        gone, now = self.removal, self.removal.parameters()
        return {unit: 1e6 * (loss - base) / (gone.parameters([unit]) - now) for unit, loss in losses.items()}

    def remove(self, until: Stop | None = None) -> None:
        """Removes candidates one at a time, each time the one with the least score on top of those that went.

        Where little is lacking, only candidates that are small enough to lead nearer to the amount are measured.

        Args:
            until: Stops before the amount is reached.
        """
        rises: dict[Unit, float] = {}
        removal, amount = self.removal, self.amount
        while left := [unit for unit in self.candidates if removal.can(unit) and amount.wants(removal, unit)]:
            losses, base = self._cheapest(left, rises)
            self.baseline = base if self.baseline is None else self.baseline
            scores = self.scored(losses, base)
            self.scores |= scores
            best = min((unit for unit in left if unit in losses), key=scores.__getitem__)
            self.removal.units.append(best)
            self.losses.append(losses[best])
            if until is not None and until(self.removal.units, self.losses, self.baseline):
                return

    def _cheapest(self, left: list[Unit], rises: dict[Unit, float]) -> tuple[dict[Unit, float], float]:
        """The losses of as many candidates as it takes to be sure of the cheapest, and the loss without any of them.

        Removing more makes the next removal dearer, as a rule. So a candidate whose rise was larger, when it was last
        measured, than the least rise found now is not measured again (lazy greedy: Minoux, 1978, "Accelerated greedy
        algorithms for maximizing submodular set functions").

        Args:
            left: Candidates.
            rises: Their rises when they were last measured; is brought up to date.
        """
        losses: dict[Unit, float] = {}
        waiting = sorted(left, key=lambda unit: rises.get(unit, float("-inf")))
        while True:
            size = max(sum(unit not in rises for unit in waiting), AT_ONCE)
            batch, waiting = waiting[:size], waiting[size:]
            more, base = self.text().scan(self.removal, batch, f"Greedy removal {len(self.removal.units) + 1}")
            losses |= more
            level = 0 if per_parameter(self.candidates) else base
            rises |= {unit: score - level for unit, score in self.scored(more, base).items()}
            if not waiting or min(rises[unit] for unit in losses) <= rises[waiting[0]]:
                return losses, base

    def put_back_excess(self) -> None:
        """Puts units back as long as that leads nearer to the amount: an attention where greedy ended with a layer."""
        while back := self.amount.returns(self.removal):
            self.losses.append(self._return_best(self.removal, back, self.losses[-1], "Putting back what is too much"))

    def exchange(self) -> None:
        """Improves the choice without leading it farther away from the amount.

        What is cheap to remove depends on what else has gone: greedy takes single layers from all over the model,
        although a run of neighbours may be cheaper together. So the unit that is cheapest to remove on top goes, those
        whose return helps most come back until the amount is what it was, and that is kept if the loss is lower; until
        it is not (a floating search, Pudil, Novovicova and Kittler, 1994, "Floating search methods in feature
        selection"). For a layer an attention and an MLP of other layers can come back. All candidates are measured:
        that they get dearer, which greedy relies on, is what fails here.
        """
        removal, number = self.removal, 1
        while removal.units and (left := [unit for unit in self.candidates if removal.can(unit)]):
            description = f"Exchange {number}"
            measured, base = self.text().scan(removal, left, f"{description}, taking one")
            scores = self.scored(measured, base)
            self.scores |= scores
            for taken in sorted(left, key=scores.__getitem__):
                more = Removal(removal.structure, [*removal.units, taken], removal.before)
                loss = self._balance(more, measured[taken], f"{description}, putting back")
                if loss is not None:
                    break
            if loss is None or not loss < base:
                return
            removal.units[:] = more.units if self.amount.count is not None else more.in_parts(self.candidates)
            self.losses.append(loss)
            number += 1

    def _balance(self, more: Removal, loss: float, description: str) -> float | None:
        """Puts back all but the last unit that went until the amount is as near as it is now.

        Args:
            more: What has gone with the last one; is changed.
            loss: Loss without all of it.
            description: Of the progress bar.

        Returns:
            The loss then; `None` if that cannot be.
        """
        farthest, excess = self.amount.distance(self.removal), self.amount.excess

        def fits(unit: Unit) -> bool:
            rest = more.without(unit)
            return -farthest[0] <= excess(rest) < excess(more) and rest.parameters() < more.parameters()

        while self.amount.distance(more) > farthest:
            back = [unit for unit in more.units[:-1] if fits(unit)]
            if not back:
                return None
            loss = self._return_best(more, back, loss, description)
        return loss

    def _return_best(self, removal: Removal, back: list[Unit], loss: float, description: str) -> float:
        """Puts back the unit whose return lowers the loss most (per parameter); returns the loss then."""
        found, gone = self.text().put_back(removal, back, description), removal.parameters()

        def score(unit: Unit) -> float:
            size = gone - removal.without(unit).parameters() if per_parameter(self.candidates) else 1
            return (found[unit] - loss) / size

        best = min(back, key=score)
        removal.units.remove(best)
        return found[best]


def per_parameter(candidates: list[Unit]) -> bool:
    """Whether candidates of several kinds compete, so that scores are compared per parameter."""
    return len({kind for _, kind in candidates}) > 1
