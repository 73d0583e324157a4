"""`choose_depth`: which layers and sublayers go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from transformers import PreTrainedModel

from ..checks import check_choice
from ..config import PruningConfig
from ..criteria.depth import LayerSimilarities, layer_similarities, magnitude_scores, taylor_scores
from ..errors import RatioError
from ..model.measuring import measures
from ..model.structure import ModelStructure
from ..plan import Dropped
from ..stats.losses import TextLoss
from ..units import DepthKind, level_criteria
from ..units.depth import LAYERS
from .depth_search import LossSearch, Stop, per_parameter
from .removal import Amount, Removal, Unit, depth_candidates


@dataclass
class DepthChoice:
    """Which layers and sublayers go.

    Attributes:
        dropped: Numbers of the layers by kind, ascending, for the plan.
        order: What goes, in the order it was chosen; a layer as its sublayers where those may go alone and parameters
            count.
        scores: Importance of every candidate, lower goes first. With candidates of one kind the criterion's own
            value (for `"perplexity"`, `"greedy"` and `"exchange"` the loss without the candidate); with several kinds
            that value, or the rise of the loss, per million parameters. `"greedy"` and `"exchange"`: of the last round
            in which the candidate was measured. A block chosen by `"angular"` goes as a whole, the scores are those of
            its single layers.
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
    model: PreTrainedModel,
    structure: ModelStructure,
    config: PruningConfig,
    kinds: tuple[str, ...],
    *,
    count: int | None = None,
    parameters: int | None = None,
    tokens: Callable[[], torch.Tensor],
    without: Dropped | None = None,
    most: bool = False,
    until: Stop | None = None,
) -> DepthChoice:
    """Chooses layers and sublayers by `config.depth_criterion`; changes nothing.

    `"angular"` with layers alone takes the contiguous block that turns the residual stream least. `"greedy"` removes
    one unit at a time and measures what is left again; `"exchange"` then takes others in their place as long as that
    is better, unless `most` or `until` ask for removals in order. All others take the units in the order of their
    scores, of equal ones the lower layer first. Where several kinds compete, scores are per parameter, and what is too
    large for the rest of the budget is passed over for what is smaller.

    Args:
        model, structure: In eval mode, and its layers and sublayers.
        config: `depth_criterion`, the layers that may be cut, and the calibration settings.
        kinds: Kinds of depth.
        count: Number of removals.
        parameters: Instead of `count`: remove so many parameters, as nearly as another unit more or less can bring it.
        tokens: Loads the calibration tokens; called only where they are needed.
        without: Layers and sublayers that are gone already, in addition to which others are chosen.
        most: Never remove more than `parameters`, and be content with fewer where there are no more.
        until: For `"greedy"` and `"exchange"`: asked after each removal whether it is enough.

    Raises:
        RatioError: More is asked for than can go; says how much can.
        UnsupportedModelError: No layer has a sublayer of a kind that is asked for.
    """
    check_choice("depth_criterion", config.depth_criterion, level_criteria(DepthKind))
    removal = Removal(structure, before=without or {})
    candidates = [unit for unit in depth_candidates(structure, config, kinds) if removal.can(unit)]
    text = cache(lambda: TextLoss(model, structure, tokens(), config.calibration.batch_size))
    search = LossSearch(text, candidates, Amount(count, parameters, most), removal)
    chooser = _Chooser(model, config, tuple(kinds), tokens, search)
    if config.depth_criterion == "angular" and chooser.kinds == (LAYERS,):
        chooser.take_block()
    elif config.depth_criterion in ("greedy", "exchange"):
        chooser.take_by_search(until)
    else:
        chooser.take_by_score()
    return DepthChoice(removal.dropped(), removal.units, search.scores, search.losses, search.baseline)


@dataclass
class _Chooser:
    """One run of `choose_depth`."""

    model: PreTrainedModel
    config: PruningConfig
    kinds: tuple[str, ...]
    tokens: Callable[[], torch.Tensor]
    search: LossSearch

    def __post_init__(self) -> None:
        self.structure = self.search.removal.structure
        self.candidates, self.amount, self.removal = self.search.candidates, self.search.amount, self.search.removal

    def take_block(self) -> None:
        """The contiguous block with the least angular distance between its ends."""
        allowed = [layer for layer, _ in self.candidates]
        self._check_block(allowed)
        if not (self.amount.count or self.amount.parameters):
            return
        found, best = self._similarities(), []
        for size in [self.amount.count] if self.amount.count else range(1, len(self.structure.layers)):
            if self.amount.parameters and not found.blocks(size, allowed):
                break
            start, end, _ = found.best_block(size, allowed)
            block = [(layer, LAYERS) for layer in range(start, end)]
            if self.amount.count or self.amount.nearer(self.removal.parameters(block), self.removal.parameters(best)):
                best = block
        self.removal.units += best
        self.search.scores = {unit: found.distances[unit] for unit in self.candidates}

    def take_by_search(self, until: Stop | None) -> None:
        """The units whose removal costs the text least, measured again after each."""
        self._check()
        search = self.search
        search.remove(until)
        self._in_parts()
        self._check_reached()
        if not search.losses or until is not None or self.amount.most:
            return
        self._improve()
        while self._could_be_nearer():  # exchanges have put units of other sizes into their place
            search.remove()
            self._in_parts()
            self._improve()

    def _improve(self) -> None:
        self.search.put_back_excess()
        if self.config.depth_criterion == "exchange":
            self.search.exchange()

    def take_by_score(self) -> None:
        """The units with the least scores, which are computed once."""
        self._check()
        if not self._could_be_nearer():
            return
        self.search.scores = scores = self._scores()
        while self._could_be_nearer():
            for unit in sorted(scores, key=scores.get):
                if self.removal.can(unit) and self.amount.wants(self.removal, unit):
                    self.removal.units.append(unit)
            self._in_parts()
            while back := self.amount.returns(self.removal):
                self.removal.units.remove(max(back, key=scores.__getitem__))
        self._check_reached()
        if self.search.baseline is not None and self.amount.most:
            units = self.removal.units
            prefixes = [Removal(self.structure, units[:n], self.removal.before) for n in range(1, len(units) + 1)]
            self.search.losses = [self.search.text().of(prefix.gone()) for prefix in prefixes]

    def _scores(self) -> dict[Unit, float]:
        """Scores of the candidates by a one-shot criterion."""
        criterion, calibration = self.config.depth_criterion, self.config.calibration
        if criterion == "perplexity":
            losses, base = self.search.text().scan(self.removal, self.candidates, "Perplexity without each")
            self.search.baseline = base
            return self.search.scored(losses, base)
        if criterion == "magnitude":
            scores = magnitude_scores(self.model, self.structure, self.candidates)
        elif criterion == "taylor":
            scores = taylor_scores(
                self.model, self.structure, self.candidates, self.tokens(), batch_size=calibration.batch_size,
                gradient_checkpointing=self.config.gradient_checkpointing,
            )  # fmt: skip
        else:
            found = self._similarities()
            values = found.distances if criterion == "angular" else found.influences
            scores = {unit: values[unit] for unit in self.candidates}
        if per_parameter(self.candidates):
            scores = {unit: 1e6 * score / self.removal.parameters([unit]) for unit, score in scores.items()}
        return scores

    def _could_be_nearer(self) -> bool:
        """Whether one unit more, or one less, leads nearer to the amount."""
        wanted = (unit for unit in self.candidates if self.removal.can(unit))
        return any(self.amount.wants(self.removal, unit) for unit in wanted) or bool(self.amount.returns(self.removal))

    def _in_parts(self) -> None:
        """Layers as their sublayers from now on, one of which can come back where the parameters are what counts."""
        if self.amount.count is None and not self.amount.most:
            self.removal.units[:] = self.removal.in_parts(self.candidates)

    def _similarities(self) -> LayerSimilarities:
        size, sublayers = self.config.calibration.batch_size, self.kinds != (LAYERS,)
        return layer_similarities(self.model, self.structure, self.tokens(), batch_size=size, sublayers=sublayers)

    def _check(self) -> None:
        """Refuses what cannot be reached, before anything is measured."""

        def largest_first(unit: Unit) -> tuple:
            """Sublayers before their layer, so that as many as possible can go; the smallest layer stays."""
            layer, kind = self.structure.layers[unit[0]], unit[1]
            size = layer.parameters if kind == LAYERS else layer.sublayer(kind).parameters
            return -layer.parameters, unit[0], kind == LAYERS, -size

        largest = Removal(self.structure, before=self.removal.before)
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
        kinds, total = ", ".join(self.kinds), self.structure.total_parameters
        if self.amount.count is not None and self.amount.count > count:
            raise RatioError(f"{self.amount.count} of {kinds} are to go, but at most {count} can{why}.")
        if self.amount.parameters is not None and not self.amount.most and self.amount.parameters > parameters:
            raise RatioError(
                f"{self.amount.parameters:,} parameters ({self.amount.parameters / total:.2%} of the model) are to go "
                f"as {kinds}, but at most {parameters:,} ({parameters / total:.2%}) can{why}."
            )
