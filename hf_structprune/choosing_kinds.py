"""`units="auto"`: which kinds of units go, and how much of each, by what it costs on the model at hand.

Every kind is priced at two amounts (`refit.price`): the plan is carried out on a part of the calibration text, re-fit
included, and what it does to the predictions for other text is measured. A power law through the two says what other
amounts would cost. With these added up as if they did not depend on each other, the mixtures that look best are found;
they are priced in turn, and the cheapest of all that was measured is taken: a mixture, or one kind alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import islice, pairwise, product
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from .config import PruningConfig
from .errors import RatioError, StructPruneError, UnsupportedModelError
from .model.rebuild import has_weights
from .model.stored import without_bars
from .model.structure import ModelStructure
from .plan import PruningPlan
from .planner import Planner
from .refit.price import Prices
from .units import GROUPS, KINDS, LAYERS, WidthKind, kinds_of


MIXTURES = 2  # that are priced
_TRIED = 12  # of those that look best, to find some that can be
_SMALL = 1 / 3  # of the amount that is asked for, the other one at which a kind is priced
_QUICK = "block_influence"  # ranks layers in one pass; what is taken in the end is ranked as configured, too
_REACH = 2  # times the largest amount that was priced


@dataclass
class Curve:
    """What it costs to take more and more of one kind.

    Attributes:
        points: Parameters gone, and nats a token, at each amount that was priced.
    """

    points: list[tuple[int, float]] = field(default_factory=list)

    def at(self, removed: float, reach: float = _REACH) -> float:
        """Nats a token for so many parameters: on the power law through the two neighbouring points.

        With one point alone the power is 1.5. Infinite beyond `reach` times the last point, which says little there.
        """
        if removed <= 0:
            return 0.0
        points = sorted(self.points)
        if not points or removed > reach * points[-1][0]:
            return math.inf
        if len(points) == 1:
            return points[0][1] * (removed / points[0][0]) ** 1.5
        (x, y), (x2, y2) = next((pair for pair in pairwise(points) if removed <= pair[1][0]), points[-2:])
        power = max(1.0, math.log(max(y2, 1e-9) / max(y, 1e-9)) / math.log(x2 / x))
        return max(y, 1e-9) * (removed / x) ** power


@dataclass
class Candidate:
    """A way to reach the ratio.

    Attributes:
        config: The configuration that says it.
        plan: What it makes of the model.
        nats: What it costs, once that is measured.
    """

    config: PruningConfig
    plan: PruningPlan
    nats: float = math.nan

    def __str__(self) -> str:
        return f"{in_words(self.plan)}: +{self.nats:.3f} nats"


def in_words(plan: PruningPlan) -> str:
    """What goes by a plan: `mlp_neurons 14.2 %, layers 5.3 %`."""
    shares = {kind: count / plan.parameters_before for kind, count in plan.removed.items() if count}
    return ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()) or "nothing"


class KindChooser:
    """Decides for one model what `units="auto"` stands for.

    Args:
        model, structure: What is cut; it is left as it is.
        config: The configuration, with everything else that the user wants.
        prices: Makes what measures plans.
        proven: Raises `UnsupportedModelError` for kinds that are not shown to be cut right on this model type.
    """

    def __init__(
        self, model: PreTrainedModel, structure: ModelStructure, config: PruningConfig,
        prices: Callable[[], Prices], proven: Callable[[Collection[str]], Any],
    ) -> None:  # fmt: skip
        self.model, self.structure, self.config, self._prices = model, structure, config, prices
        self.left_out: dict[str, str] = {}
        self.fine, self.coarse = self._kinds(proven)

    def _kinds(self, proven: Callable[[Collection[str]], Any]) -> tuple[list[str], list[str]]:
        """Kinds that can reach a ratio alone in small steps, those with most parameters first, and coarser ones."""
        sizes = {kind: 0 for kind in kinds_of(WidthKind) if KINDS[kind].within is None}
        for group in self.structure.groups:
            if group.kind in sizes and group.size > group.blocks:
                sizes[group.kind] += group.size * group.cost
        if len(self.structure.layers) > 1:
            sizes[LAYERS] = sum(layer.parameters for layer in self.structure.layers)
        there = []
        for kind in sorted((kind for kind, size in sizes.items() if size), key=sizes.__getitem__, reverse=True):
            try:
                proven([kind])
                Planner(self.model, self.structure, self._with((kind,), None), self._none)
                there.append(kind)
            except StructPruneError as error:
                self.left_out[kind] = f"{error}"
        coarse = [kind for kind in there if kind == LAYERS or KINDS[kind].of_heads]
        fine = [kind for kind in there if kind not in coarse]
        if not there:
            raise UnsupportedModelError(f"Nothing of this model can be cut: {'; '.join(self.left_out.values())}")
        return fine, coarse

    @staticmethod
    def _none() -> Any:
        raise AssertionError("no text is looked at to see what there is")

    def _with(self, units: tuple[str, ...], keep: dict[str, int] | None, **options: Any) -> PruningConfig:
        return dataclasses.replace(self.config, units=units, keep=keep, **options)

    def choose(self, ratio: float) -> tuple[PruningConfig, str]:
        """The configuration that takes the place of the one with `units="auto"`, and why, in words for the plan.

        Raises:
            RatioError: No kind, nor all of them together, can reach the ratio.
        """
        if not has_weights(self.model):
            kind = (self.fine or self.coarse)[0]
            return self._with((kind,), None), (
                f"units='auto' measures what each kind of unit costs, and the weights are not in memory: this plan "
                f"cuts {KINDS[kind].label} alone, of which the model has most"
            )
        found = self._candidates(ratio)
        best = min(found, key=lambda one: one.nats)
        if LAYERS in best.config.units and self.config.depth_criterion != _QUICK:
            slow = self._candidate(best.config.units, best.config.keep, ratio, self.config.depth_criterion)
            if slow is not None:  # it may choose layers without which no checkpoint can be
                slow.nats = self._prices().of(slow.plan, slow.config)
                found.append(slow)
                best = min(best, slow, key=lambda one: one.nats)
        others = [one for one in found if one is not best]
        words = [f"units='auto' took the cheapest that was measured, {best}"]
        words += [f"instead of {one}" for one in sorted(others, key=lambda one: one.nats)[:3]]
        words += [f"not tried: {', '.join(self.left_out)}"] if self.left_out else []
        return best.config, "; ".join(words)

    def _candidates(self, ratio: float) -> list[Candidate]:
        """Every kind that can reach the ratio alone, and the mixtures that look best; all of them priced."""
        total, number = self.structure.total_parameters, len(self.structure.layers)
        singles, curves = [], {}
        kinds = [*self.fine, *self.coarse]
        with tqdm(total=len(self.fine) + 2 * len(kinds) + MIXTURES, desc="Pricing kinds of units") as bar:
            for kind in kinds:
                curves[kind] = Curve()
                for one in self._levels(kind, ratio):
                    one.nats = self._prices().of(one.plan, one.config)
                    curves[kind].points.append((one.plan.parameters_before - one.plan.parameters_after, one.nats))
                    bar.update()
            singles = [one for one in (self._candidate((kind,), None, ratio) for kind in kinds) if one is not None]
            looked = self._mixtures(curves, ratio * total, number) or (
                [] if singles else self._mixtures(curves, ratio * total, number, math.inf)
            )
            able = (
                one for one in (self._candidate(*mixture, ratio) for mixture in looked[:_TRIED]) if one is not None
            )
            mixtures = list(islice(able, MIXTURES))
            far = [abs(one.plan.ratio - ratio) for one in (*singles, *mixtures)]
            near = max(0.02, 0.1 * ratio, min(far, default=0))  # as near as whole units allow
            found = [one for one, away in zip((*singles, *mixtures), far, strict=True) if away <= near]
            for one in found:
                one.nats = self._prices().of(one.plan, one.config)
                bar.update()
        if not found:
            Planner(self.model, self.structure, self._with((kinds[0],), None), self._none).plan(ratio)  # says how far
            raise RatioError(f"The ratio {ratio:.2%} cannot be reached by {', '.join(kinds)}. Ask for less.")
        return found

    def _candidate(
        self, units: tuple[str, ...], keep: dict[str, int] | None, ratio: float | None, depth_criterion: str = _QUICK
    ) -> Candidate | None:
        """A way to reach a ratio, or an exact shape; `None` if it cannot be."""
        config = self._with(units, keep, **({"depth_criterion": depth_criterion} if LAYERS in units else {}))
        try:
            with without_bars():
                return Candidate(config, Planner(self.model, self.structure, config, self._fit).plan(ratio))
        except StructPruneError:
            return None

    def _fit(self) -> Any:
        return self._prices().fit

    def _levels(self, kind: str, ratio: float) -> list[Candidate]:
        """A kind alone: a fine one at a smaller and a larger amount, heads and layers at about a third or quarter."""
        number = len(self.structure.layers)
        if kind == LAYERS:
            gone = max(1, round(ratio * _SMALL * number))
            found = [self._candidate((kind,), {kind: number - gone}, None)]
        elif KINDS[kind].of_heads:
            heads = min(group.size for group in self.structure.groups if group.kind == kind)
            quarter = range(round(0.75 * heads), 0, -1)
            found = (self._candidate((kind,), {kind: left}, None) for left in quarter if left < heads)
            found = [next((one for one in found if one is not None), None)]
        else:
            of_kind = sum(g.size * g.cost for g in self.structure.groups if g.kind == kind)
            most = min(ratio, 0.7 * of_kind / self.structure.total_parameters)
            found = [self._candidate((kind,), None, amount) for amount in (most * _SMALL, most)]
        return [one for one in found if one is not None and one.plan.parameters_after < one.plan.parameters_before]

    def _mixtures(
        self, curves: dict[str, Curve], wanted: float, number: int, reach: float = _REACH
    ) -> list[tuple[tuple[str, ...], dict[str, int]]]:
        """The mixtures of one fine kind with coarse ones that the curves say cost least, the cheapest first."""
        layer = max(layer.parameters for layer in self.structure.layers)
        heads = [group for group in self.structure.groups if group.kind == GROUPS] if GROUPS in self.coarse else []
        size = min((group.size for group in heads), default=1)
        each = sum(group.cost for group in heads)
        sizes = {kind: sum(g.size * g.cost for g in self.structure.groups if g.kind == kind) for kind in self.fine}
        found = []
        gone_layers = range(min(number, math.ceil(wanted / layer) + 1)) if LAYERS in self.coarse else [0]
        for fine, layers, groups in product(self.fine, gone_layers, range(size)):
            left = (number - layers) / number
            rest = wanted - layers * layer - groups * each * left
            if not (layers or groups) or not 0 <= rest / left < sizes[fine]:
                continue
            nats = curves[LAYERS].at(layers * layer, reach) if layers else 0.0
            nats += left * (curves[GROUPS].at(groups * each, reach) if groups else 0.0)
            nats += left * curves[fine].at(rest / left, reach)
            keep = ({LAYERS: number - layers} if layers else {}) | ({GROUPS: size - groups} if groups else {})
            found.append((nats, ((fine, *keep), keep)))
        found = sorted((one for one in found if one[0] < math.inf), key=lambda one: one[0])
        return [mixture for _, mixture in found]
