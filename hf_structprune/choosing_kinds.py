"""`units="auto"`: which kinds of units go, and how much of each, by what it costs on the model at hand.

Where little of the MLPs goes, nothing is measured: see `default_kind`. Else every kind is priced at one amount
(`refit.price`): the plan is carried out on a part of the calibration text, re-fit included, and what it does to the
predictions is measured. A power law through that says what other amounts would cost. With these added up as if they
did not depend on each other, the mixtures that look best are found; as long as one looks better than all that was
measured, it is priced in turn. The cheapest of all that was measured takes the place of the default if it is cheaper
by more than the prices are unsure; what looks so is measured once more, on more text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

from .allocation.depth import DepthChoice
from .config import PruningConfig
from .default_kind import ENOUGH, NO_WEIGHTS, DefaultKind, near, share_of
from .errors import RatioError, StructPruneError
from .plan import PruningPlan
from .planner import Planner
from .progress import hidden, tqdm
from .refit.price import FIT, Prices
from .units import GROUPS, KINDS, LAYERS, QUERIES


MIXTURES = 2  # that are priced
_TRIED = 12  # of those that look best, to find one that can be
_SMALL = 1 / 3  # of the amount that is asked for: what is priced of layers
_GAIN = 0.03  # by which a mixture must look cheaper than what was measured to be priced, and be so to be taken
_CLEARLY = 0.3  # of the price of the default: a gain that needs no second look
CONFIRM = 3  # times the text of the first look is that of the second
LEAST = 12  # sequences of calibration text
_POWER, _COARSE_POWER = 1.2, 1.4  # of the amount: what a kind costs (neurons, layers of SmolLM2-135M at 10 and 20 %)
_QUICK = "block_influence"  # ranks layers in one pass
_DEAR = 2  # times what others cost for as many parameters
_PLACES = 400  # of a curve, of which one is the knee
_REACH = 4  # times the largest amount that was priced
_MOST = 0.5  # of a kind; what more than that costs says little about what less does
_APART = 0.9  # of an amount: what is measured beside it


@dataclass
class Curve:
    """What it costs to take more and more of one kind.

    Attributes:
        points: Parameters gone, and nats a token, at each amount that was priced.
        power: Of the amount, where only one was.
    """

    points: list[tuple[float, float]] = field(default_factory=list)
    power: float = _POWER

    def at(self, removed: float, reach: float = _REACH) -> float:
        """Nats a token for so many parameters: on the power law through the two neighbouring points.

        Infinite beyond `reach` times the last point, which says little there.
        """
        if removed <= 0:
            return 0.0
        points = sorted(dict(self.points).items())
        if not points or removed > reach * points[-1][0]:
            return math.inf
        if len(points) == 1:
            return points[0][1] * (removed / points[0][0]) ** self.power
        (x, y), (x2, y2) = next((pair for pair in pairwise(points) if removed <= pair[1][0]), points[-2:])
        power = max(1.0, math.log(max(y2, 1e-9) / max(y, 1e-9)) / math.log(x2 / x))
        return max(y, 1e-9) * (removed / x) ** power

    def knee(self) -> float | None:
        """Where a little more begins to cost more than it does on average up to the last point.

        That is where the curve is farthest below the straight line to the last point (Satopaa et al. 2011, Kneedle);
        `None` where it never is below, or where it is known at fewer than three points.
        """
        last, nats = max(self.points, default=(0, 0))
        places = [last * place / _PLACES for place in range(_PLACES + 1)]
        below = [nats * place / last - self.at(place) for place in places] if len(self.points) > 2 else [0.0]
        return places[below.index(max(below))] if max(below) > 0 else None


@dataclass
class Candidate:
    """A way to reach the ratio.

    Attributes:
        config: The configuration that says it.
        plan: What it makes of the model.
        depth: How its layers were chosen, if any go.
        nats: What it costs, once that is measured.
    """

    config: PruningConfig
    plan: PruningPlan
    depth: DepthChoice | None = None
    nats: float = math.nan

    def __str__(self) -> str:
        return f"{in_words(self.plan)}: +{self.nats:.3f} nats"


def in_words(plan: PruningPlan) -> str:
    """What goes by a plan: `mlp_neurons 14.2 %, layers 5.3 %`."""
    shares = {kind: count / plan.parameters_before for kind, count in plan.removed.items() if count}
    return ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()) or "nothing"


NOT_YET = "units='auto': a plan measures nothing"  # where pruning will
Mixture = tuple[tuple[str, ...], dict[str, int] | None]  # kinds, and what is left of those that go in large steps


class KindChooser:
    """Decides for one model what `units="auto"` stands for.

    Args:
        kinds: What can be cut of the model alone, and what goes without a measurement.
        prices: Makes what measures plans.
        instead: Why nothing can be measured the way this model is worked on, if so.

    Attributes:
        measured: Whether the last choice was.
    """

    def __init__(self, kinds: DefaultKind, prices: Callable[[], Prices], instead: str = "") -> None:
        self.model, self.structure, self.config = kinds.model, kinds.structure, kinds.config
        self.kinds, self._prices, self._instead = kinds, prices, instead
        self.measured = False
        self.fine: list[str] = []
        self.coarse: list[str] = []

    def choose(self, ratio: float, measure: bool = True) -> tuple[Candidate | PruningConfig, list[str]]:
        """What takes the place of the configuration with `units="auto"`, and why, in words for the plan.

        Where something was measured it is a candidate with its plan, else a configuration. With `measure` something is
        if it can be, and can matter.

        Raises:
            RatioError: No kind, nor all of them together, can reach the ratio.
        """
        kinds, self.measured = self.kinds, False
        why = kinds.unmeasurable() or self._instead
        if kinds.enough(ratio) or why or not measure:
            return kinds.fixed(ratio), [self._unmeasured(ratio, why), *kinds.outside()]
        prices = self._prices()
        if prices.sequences < LEAST:
            why = f"the calibration text has {prices.sequences} sequences, and it takes {LEAST}"
            return kinds.fixed(ratio), [self._unmeasured(ratio, why), *kinds.outside()]
        self.measured = True
        self.fine, self.coarse = kinds.kinds()
        found = self._candidates(ratio)
        best, why = self._best(found)
        others = [one for one in found if one is not best]
        words = [f"units='auto' took {why}, {best}"]
        words += [f"instead of {one}" for one in sorted(others, key=lambda one: one.nats)[:3]]
        left_out = kinds.left_out
        words += [f"not tried: {', '.join(left_out)}"] if left_out else []
        config = dataclasses.replace(best.config, allocation=self.config.allocation)
        return dataclasses.replace(best, config=config), ["; ".join(words), *kinds.outside()]

    def _unmeasured(self, ratio: float, why: str) -> str:
        """Why nothing was measured, and what goes."""
        fixed = self.kinds.fixed(ratio)
        label = " and ".join(KINDS[kind].label for kind in fixed.units)
        share = f", {min(1, self.kinds.share(ratio, fixed.units[0])):.0%} of them" if len(fixed.units) == 1 else ""
        if self.kinds.enough(ratio):
            return f"units='auto': {label} alone{share}; other kinds are measured where that is above {ENOUGH:.0%}"
        if why:
            more = "; pruning, which reads them, measures" if why == NO_WEIGHTS and not self._instead else ""
            return f"units='auto' measured nothing, since {why}: {label} go{share}{more}"
        return (
            f"{NOT_YET}, and this one is of {label}{share}; pruning, and a plan with `estimate`, measure what other "
            "kinds of units cost, and take them where that is clearly cheaper"
        )

    def _best(self, found: list[Candidate]) -> tuple[Candidate, str]:
        """The default kind alone, if it is there and nothing is clearly cheaper, or else the cheapest; in words.

        Raises:
            RatioError: As `choose`.
        """
        cheapest = min(found, key=lambda one: one.nats)
        default = next((one for one in found if one.config.units == (self.kinds.kind,)), None)
        if default is None or default is cheapest:
            return cheapest, "the cheapest that was measured"
        for sequences in (FIT, CONFIRM * FIT):
            price, other = (self._prices().price(one.plan, one.config, sequences) for one in (default, cheapest))
            default.nats, cheapest.nats = price.nats, other.nats
            gain, unsure = price.over(other)
            if gain < max(unsure, _GAIN * price.nats):
                return default, "the default: nothing is cheaper by more than measurements are unsure"
            if gain > max(_CLEARLY * price.nats, unsure):
                break
        return cheapest, f"the cheapest that was measured (by {gain:.3f} nats, unsure by {unsure:.3f})"

    def _with(self, units: tuple[str, ...], keep: dict[str, int] | None, **options: Any) -> PruningConfig:
        return dataclasses.replace(self.config, units=units, keep=keep, **options)

    def _candidates(self, ratio: float) -> list[Candidate]:
        """Ways to reach the ratio, all of them priced: fine kinds alone, and what looks better than those."""
        kinds, curves, priced = [*self.fine, *self.coarse], {}, []
        with tqdm(total=len(kinds) + MIXTURES, desc="Pricing kinds of units") as bar:
            for kind in kinds:
                curves[kind] = Curve(power=_COARSE_POWER if kind in self.coarse else _POWER)
                if kind == QUERIES and self._dear(curves):
                    self.kinds.left_out[kind] = "KV groups cost far more than others"
                    bar.update()
                    continue
                for level in self._levels(kind, ratio):
                    level.nats = self._prices().of(level.plan, level.config)
                    gone = level.plan.parameters_before - level.plan.parameters_after
                    curves[kind].points.append((gone, level.nats))
                    priced.append(level)
                bar.update()

            def far(one: Candidate) -> float:
                return abs(one.plan.ratio - ratio)

            others: list[Candidate] = []
            rest = [one for one in priced if one.plan.ratio_requested == ratio]
            found = [one for one in rest if far(one) <= near(ratio)]
            for guess, candidate in self._guesses(curves, ratio):
                best = min((one.nats for one in found), default=math.inf)
                if len(others) == MIXTURES or guess > best * (1 - _GAIN):
                    break
                if any(_alike(candidate.plan, one.plan) for one in found):
                    continue
                if far(candidate) > near(ratio):
                    rest.append(candidate)
                    continue
                candidate.nats = self._prices().of(candidate.plan, candidate.config)
                others.append(candidate)
                found.append(candidate)
                bar.update()
            bar.update(bar.total - bar.n)  # no more is needed
            if not found and rest:  # as near as whole units allow
                nearest = min(map(far, rest))
                found = [one for one in rest if far(one) <= nearest][:MIXTURES]
                for one in found:
                    one.nats = self._prices().of(one.plan, one.config)
        if not found:
            config = self._with((kinds[0],), None, allocation="uniform")
            Planner(self.model, self.structure, config, self._fit).plan(ratio)  # says how far
            raise RatioError(f"The ratio {ratio:.2%} cannot be reached by {', '.join(kinds)}. Ask for less.")
        return found

    def _dear(self, curves: dict[str, Curve]) -> bool:
        """Whether KV groups cost so much more than a fine kind that query heads, which do the same, need no trial."""
        points = curves.get(GROUPS, Curve()).points
        others = [curves[kind] for kind in self.fine]
        return any(nats > _DEAR * min((one.at(gone) for one in others), default=math.inf) for gone, nats in points)

    def _guesses(self, curves: dict[str, Curve], ratio: float) -> Iterator[tuple[float, Candidate]]:
        """Ways to reach the ratio that can be, and what the curves say they cost, the cheapest first."""
        for reach in (_REACH, math.inf):
            looked = self._mixtures(curves, ratio * self.structure.total_parameters, reach)
            made = ((nats, self._candidate(*mixture, ratio)) for nats, mixture in looked[:_TRIED])
            some = False
            for nats, candidate in made:
                if candidate is not None:
                    some = True
                    yield nats, candidate
            if some:
                return

    def _candidate(self, units: tuple[str, ...], keep: dict[str, int] | None, ratio: float | None) -> Candidate | None:
        """A way to reach a ratio, or an exact shape; `None` if it cannot be."""
        config = self._with(units, keep, allocation="uniform")
        if LAYERS in units and config.depth_criterion == PruningConfig.depth_criterion:
            config = dataclasses.replace(config, depth_criterion=_QUICK)
        try:
            with hidden():
                planner = Planner(self.model, self.structure, config, self._fit, chosen=True)
                planner.similarities = self._similarities
                return Candidate(config, planner.plan(ratio), planner.depth)
        except StructPruneError:
            return None

    def _fit(self) -> Any:
        return self._prices().fit

    def _similarities(self) -> Any:
        return self._prices().similarities

    def _levels(self, kind: str, ratio: float) -> list[Candidate]:
        """A kind alone: of a fine one what is asked for, and less where that is most of it; some heads or layers."""
        number = len(self.structure.layers)
        if kind == LAYERS:
            found = [self._candidate((kind,), {kind: number - max(1, round(ratio * _SMALL * number))}, None)]
        elif KINDS[kind].of_heads:
            heads = min(group.size for group in self.structure.groups if group.kind == kind)
            quarter = range(min(round(0.75 * heads), heads - 1), 0, -1)
            made = (self._candidate((kind,), {kind: left}, None) for left in quarter)
            found = [next((one for one in made if one is not None), None)]
        else:
            share = share_of(kind, self.structure)
            most = _MOST * share
            amounts = [ratio, most] if most < _APART * ratio else [ratio]
            found = [self._candidate((kind,), None, amount) for amount in amounts]
        return [one for one in found if one is not None and one.plan.parameters_after < one.plan.parameters_before]

    def _mixtures(self, curves: dict[str, Curve], wanted: float, reach: float) -> list[tuple[float, Mixture]]:
        """What the curves say ways to reach a number of parameters cost, the cheapest first.

        These are a fine kind with some layers and some heads, and layers or heads alone.
        """
        number = len(self.structure.layers)
        layer = max(layer.parameters for layer in self.structure.layers)
        sizes = {kind: sum(g.size * g.cost for g in self.structure.groups if g.kind == kind) for kind in self.fine}
        heads = [("", 0, 0)]  # kind, how many are left, parameters gone
        for kind in (kind for kind in (GROUPS, QUERIES) if kind in self.coarse):
            of_kind = [group for group in self.structure.groups if group.kind == kind]
            size, step = min(group.size for group in of_kind), max(group.blocks for group in of_kind)
            each = sum(group.cost for group in of_kind)
            heads += [(kind, left, (size - left) * each) for left in range(size - step, 0, -step)]
        found = [(curves[kind].at(wanted, reach), ((kind,), None)) for kind in self.coarse]
        gone_layers = range(min(number, math.ceil(wanted / layer) + 1)) if LAYERS in self.coarse else [0]
        for fine, layers, (kind, some, gone) in product(self.fine, gone_layers, heads):
            left = (number - layers) / number
            rest = wanted - layers * layer - gone * left
            if not (layers or kind) or not 0 <= rest / left < sizes[fine]:
                continue
            nats = curves[LAYERS].at(layers * layer, reach) if layers else 0.0
            nats += left * (curves[kind].at(gone, reach) if kind else 0.0)
            nats += left * curves[fine].at(rest / left, reach)
            keep = ({LAYERS: number - layers} if layers else {}) | ({kind: some} if kind else {})
            found.append((nats, ((fine, *keep), keep)))
        return sorted((one for one in found if one[0] < math.inf), key=lambda one: one[0])


def _alike(plan: PruningPlan, other: PruningPlan) -> bool:
    """Whether two plans take nearly the same of each kind: a tenth of what goes apart."""
    kinds = plan.removed.keys() | other.removed.keys()
    apart = sum(abs(plan.removed.get(kind, 0) - other.removed.get(kind, 0)) for kind in kinds) / 2
    return apart < 0.1 * max(1, plan.parameters_before - plan.parameters_after)
