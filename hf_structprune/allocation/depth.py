"""`choose_depth`: which layers and sublayers go, by scores or by measured losses, greedily and then by exchanges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from transformers import PreTrainedModel

from ..config import PruningConfig
from ..criteria.depth import LayerSimilarities, layer_similarities, magnitude_scores, taylor_scores
from ..errors import RatioError
from ..model.measuring import measures
from ..model.store import Store
from ..model.structure import ModelStructure
from ..plan import Dropped
from ..stats.losses import TextLoss
from ..stats.seen import Calibration
from ..units import LAYERS
from .removal import Amount, Removal, Unit, as_dropped, depth_candidates


# Candidates that are measured together in later rounds: the states in front of them are computed once for all of them.
AT_ONCE = 6

# Asked after each removal: what went in order, the loss after each, the loss before any.
Stop = Callable[[list[Unit], list[float], float], bool]


@dataclass
class DepthChoice:
    """Which layers and sublayers go.

    Attributes:
        dropped: Numbers of the layers by kind, ascending, for the plan.
        order: What goes, in the order it was chosen; a layer as its sublayers where those may go alone and parameters
            count.
        scores: Importance of every candidate, lower goes first. With candidates of one kind the criterion's own
            value (a loss: that without the candidate, when it was last measured); with several kinds that value, or
            the rise of the loss, per million parameters. For a block chosen by `"angular"`, those of single layers.
        losses: Loss of the calibration text after each removal, and then after each return of what was too much and
            each exchange; measured by `"greedy"` and `"exchange"`, and by `"perplexity"` with `most`.
        baseline: Loss before any; with the criteria that measure losses.
    """

    dropped: Dropped
    order: list[Unit]
    scores: dict[Unit, float]
    losses: list[float] = field(default_factory=list)
    baseline: float | None = None


@measures
def choose_depth(
    model: PreTrainedModel, structure: ModelStructure, config: PruningConfig, kinds: tuple[str, ...], *,
    count: int | None = None, parameters: int | None = None, tokens: Callable[[], Calibration],
    without: Dropped | None = None, most: bool = False, until: Stop | None = None, store: Store | None = None,
    similarities: Callable[[], LayerSimilarities] | None = None,
) -> DepthChoice:  # fmt: skip
    """Chooses layers and sublayers by `config.depth_criterion`; changes nothing.

    `"angular"` with layers alone takes the contiguous block that turns the residual stream least. `"greedy"` removes
    one unit at a time and measures what is left again; `"exchange"` then takes others in their place as long as that
    is better, unless `most` or `until` ask for removals in order. All others take the units in the order of their
    scores, of equal ones the lower layer first. Where several kinds compete, scores are per parameter, and what is too
    large for the rest of the budget is passed over for what is smaller.

    Args:
        count: Number of removals.
        parameters: Instead of `count`: remove so many parameters, as nearly as another unit more or less can bring it.
        tokens: Loads the calibration tokens; called only where they are needed.
        without: Layers and sublayers that are gone already, in addition to which others are chosen.
        most: Never remove more than `parameters`, and be content with fewer where there are no more.
        until: For `"greedy"` and `"exchange"`: asked after each removal whether it is enough.
        store: Where the weights are, for criteria that look at one layer after the other.
        similarities: What whole layers change in the hidden states, where that is known already.

    Raises:
        RatioError: More is asked for than can go; says how much can.
        UnsupportedModelError: No layer has a sublayer of a kind that is asked for.
    """
    removal = Removal(structure, before=without or {})
    candidates = [unit for unit in depth_candidates(structure, config, kinds) if removal.can(unit)]
    text = cache(lambda: TextLoss(model, structure, tokens(), config.calibration.batch_size))
    amount = Amount(count, parameters, most)
    chooser = _Chooser(
        text, candidates, amount, removal, model=model, config=config, kinds=tuple(kinds), tokens=tokens, store=store,
        known=similarities,
    )  # fmt: skip
    if config.depth_criterion == "angular" and chooser.kinds == (LAYERS,):
        chooser.take_block()
    elif config.depth_criterion in ("greedy", "exchange"):
        chooser.take_by_search(until)
    else:
        chooser.take_by_score()
    dropped = as_dropped(removal.units, structure)
    return DepthChoice(dropped, removal.units, chooser.scores, chooser.losses, chooser.baseline)


@dataclass
class LossSearch:
    """Removals that are chosen by the loss of a text.

    Attributes:
        text: Makes what measures the losses; called only if something is to be measured.
        candidates, amount: What may go, and how much is to go.
        removal: What has gone; is changed.
        baseline, losses, scores: As in `DepthChoice`.
    """

    text: Callable[[], TextLoss]
    candidates: list[Unit]
    amount: Amount
    removal: Removal
    baseline: float | None = None
    losses: list[float] = field(default_factory=list)
    scores: dict[Unit, float] = field(default_factory=dict)

    @property
    def per_parameter(self) -> bool:
        """Whether candidates of several kinds compete, so that scores are compared per parameter."""
        return len({kind for _, kind in self.candidates}) > 1

    def scored(self, losses: dict[Unit, float], base: float) -> dict[Unit, float]:
        """The losses without each candidate, or, where kinds compete, their rise over `base` per million parameters.

        An MLP is larger than an attention, a layer than either: by the rise alone the smallest would always go first
        and a given number of parameters would cost more than it has to.
        """
        if not self.per_parameter:
            return dict(losses)
        gone, now = self.removal, self.removal.parameters()
        return {unit: 1e6 * (loss - base) / (gone.parameters([unit]) - now) for unit, loss in losses.items()}

    def wanted(self) -> list[Unit]:
        """Candidates that can go and lead nearer to the amount."""
        return [u for u in self.candidates if self.removal.can(u) and self.amount.wants(self.removal, u)]

    def remove(self, until: Stop | None = None) -> None:
        """Removes candidates one at a time, each time the one with the least score on top of those that went.

        Where little is lacking, only candidates that are small enough to lead nearer to the amount are measured;
        `until` stops before the amount is reached.
        """
        rises: dict[Unit, float] = {}
        while left := self.wanted():
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
        algorithms for maximizing submodular set functions"). `rises` when they were last measured are brought up to
        date.
        """
        losses: dict[Unit, float] = {}
        waiting = sorted(left, key=lambda unit: rises.get(unit, float("-inf")))
        while True:
            size = max(sum(unit not in rises for unit in waiting), AT_ONCE)
            batch, waiting = waiting[:size], waiting[size:]
            more, base = self.text().scan(self.removal, batch, f"Greedy removal {len(self.removal.units) + 1}")
            losses |= more
            level = 0 if self.per_parameter else base
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
                more = removal.also(taken)
                loss = self._balance(more, measured[taken], f"{description}, putting back")
                if loss is not None:
                    break
            if loss is None or not loss < base:
                return
            removal.units[:] = more.units if self.amount.count is not None else more.in_parts(self.candidates)
            self.losses.append(loss)
            number += 1

    def _balance(self, more: Removal, loss: float, description: str) -> float | None:
        """Puts back all but the last unit until the amount is as near as now; its loss, `None` if that fails."""
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
            return (found[unit] - loss) / (gone - removal.without(unit).parameters() if self.per_parameter else 1)

        best = min(back, key=score)
        removal.units.remove(best)
        return found[best]


@dataclass(kw_only=True)
class _Chooser(LossSearch):
    """One run of `choose_depth`, whose arguments it has too."""

    model: PreTrainedModel
    config: PruningConfig
    kinds: tuple[str, ...]
    tokens: Callable[[], Calibration]
    store: Store | None = None
    known: Callable[[], LayerSimilarities] | None = None

    def take_block(self) -> None:
        """The contiguous block with the least angular distance between its ends."""
        allowed, amount, structure = [layer for layer, _ in self.candidates], self.amount, self.removal.structure
        self._check_block(allowed)
        if not (amount.count or amount.parameters):
            return
        found = self._similarities()
        for size in [amount.count] if amount.count else range(1, len(structure.layers)):
            if amount.parameters and not found.blocks(size, allowed):
                break
            start, end, _ = found.best_block(size, allowed)
            block = Removal(structure, [(layer, LAYERS) for layer in range(start, end)], self.removal.before)
            if amount.count or amount.nearer(block, self.removal):
                self.removal.units[:] = block.units
        self.scores = {unit: found.distances[unit] for unit in self.candidates}

    def take_by_search(self, until: Stop | None) -> None:
        """The units whose removal costs the text least, measured again after each."""
        self._check()
        self.remove(until)
        self._in_parts()
        self._check_reached()
        if not self.losses or until is not None or self.amount.most:
            return
        self._improve()
        while self._could_be_nearer():  # exchanges have put units of other sizes into their place
            self.remove()
            self._in_parts()
            self._improve()

    def _improve(self) -> None:
        self.put_back_excess()
        if self.config.depth_criterion == "exchange":
            self.exchange()

    def take_by_score(self) -> None:
        """The units with the least scores, which are computed once."""
        self._check()
        if not self._could_be_nearer():
            return
        removal, amount = self.removal, self.amount
        self.scores = scores = self._scores()
        while self._could_be_nearer():
            for unit in sorted(scores, key=scores.get):
                if removal.can(unit) and amount.wants(removal, unit):
                    removal.units.append(unit)
            self._in_parts()
            while back := amount.returns(removal):
                removal.units.remove(max(back, key=scores.__getitem__))
        self._check_reached()
        if self.baseline is not None and amount.most:
            prefixes = [removal.units[:n] for n in range(1, len(removal.units) + 1)]
            gone = [Removal(removal.structure, units, removal.before).gone() for units in prefixes]
            self.losses = list(map(self.text().of, gone))

    def _scores(self) -> dict[Unit, float]:
        """Scores of the candidates by a one-shot criterion."""
        criterion, structure = self.config.depth_criterion, self.removal.structure
        if criterion == "perplexity":
            losses, self.baseline = self.text().scan(self.removal, self.candidates, "Perplexity without each")
            return self.scored(losses, self.baseline)
        if criterion == "magnitude":
            scores = magnitude_scores(self.model, structure, self.candidates, self.store)
        elif criterion == "taylor":
            scores = taylor_scores(self.model, structure, self.candidates, self.tokens(), self.config)
        else:
            found = self._similarities()
            values = found.distances if criterion == "angular" else found.influences
            scores = {unit: values[unit] for unit in self.candidates}
        if self.per_parameter:
            scores = {unit: 1e6 * score / self.removal.parameters([unit]) for unit, score in scores.items()}
        return scores

    def _could_be_nearer(self) -> bool:
        """Whether one unit more, or one less, leads nearer to the amount."""
        return bool(self.wanted() or self.amount.returns(self.removal))

    def _in_parts(self) -> None:
        """Layers as their sublayers from now on, one of which can come back where the parameters are what counts."""
        if self.amount.count is None and not self.amount.most:
            self.removal.units[:] = self.removal.in_parts(self.candidates)

    def _similarities(self) -> LayerSimilarities:
        size, sublayers = self.config.calibration.batch_size, self.kinds != (LAYERS,)
        if self.known is not None and not sublayers:
            return self.known()
        options = {"batch_size": size, "sublayers": sublayers, "store": self.store}
        return layer_similarities(self.model, self.removal.structure, self.tokens(), **options)

    def _check(self) -> None:
        """Refuses what cannot be reached, before anything is measured."""

        def largest_first(unit: Unit) -> tuple:
            """Sublayers before their layer, so that as many as possible can go; the smallest layer stays."""
            layer, kind = self.removal.structure.layers[unit[0]], unit[1]
            size = layer.parameters if kind == LAYERS else layer.sublayer(kind).parameters
            return -layer.parameters, unit[0], kind == LAYERS, -size

        largest = Removal(self.removal.structure, before=self.removal.before)
        for unit in sorted(self.candidates, key=largest_first):
            if largest.can(unit):
                largest.units.append(unit)
        self._refuse_beyond(len(largest.units), largest.parameters())

    def _check_block(self, allowed: list[int]) -> None:
        """Refuses a block longer, or with more parameters, than any that is allowed."""
        runs: list[list[Unit]] = [[]]
        for layer in sorted(set(allowed) - {0}):
            if runs[-1] and runs[-1][-1][0] != layer - 1:
                runs.append([])
            runs[-1].append((layer, LAYERS))
        sizes = map(self.removal.parameters, runs)
        why = " as one block: layer 0 stays, and so do layers that are protected or not named"
        self._refuse_beyond(max(map(len, runs)), max(sizes), why)

    def _check_reached(self) -> None:
        """Refuses if more is wanted and nothing can go any more."""
        if not any(self.removal.can(unit) for unit in self.candidates):
            self._refuse_beyond(len(self.removal.units), self.removal.parameters(), " in the order of their scores")

    def _refuse_beyond(self, count: int, parameters: int, why: str = ": at least one layer must stay") -> None:
        amount, kinds, total = self.amount, ", ".join(self.kinds), self.removal.structure.total_parameters
        if amount.count is not None and amount.count > count:
            raise RatioError(f"{amount.count} of {kinds} are to go, but at most {count} can{why}.")
        if amount.parameters is not None and not amount.most and amount.parameters > parameters:
            raise RatioError(
                f"{amount.parameters:,} parameters ({amount.parameters / total:.2%} of the model) are to go "
                f"as {kinds}, but at most {parameters:,} ({parameters / total:.2%}) can{why}."
            )
