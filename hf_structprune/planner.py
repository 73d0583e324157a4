"""Makes a plan: how the budget goes to what all layers share, to layers and sublayers, and to heads and neurons."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from .alignment import far_off
from .allocation.depth import DepthChoice, choose_depth
from .allocation.evolution import evolve
from .allocation.removal import Unit, as_dropped
from .allocation.widths import Budget, Counts, allocate, allocate_stated, next_counts
from .config import EVOLUTION, PruningConfig
from .criteria.depth import LayerSimilarities
from .errors import CheckpointError, ConfigurationError, RatioError, UnsupportedModelError
from .model.describe import approximations, expressible_heads, target_of, warnings_of
from .model.groups import Group
from .model.placement import has_weights, why_no_weights
from .model.served import misread
from .model.shared_sizes import SIZED
from .model.store import Store
from .model.structure import ModelStructure
from .model.target import Target
from .plan import Decision, Dropped, PruningPlan, normalised, removed_by
from .stats.seen import Calibration
from .stats.survey import Survey, survey
from .units import KINDS, LAYERS, DepthKind, SharedKind, WidthKind, kinds_of
from .units.heads import pairs
from .vocabulary.choosing import TokenChoice


_MUCH = 0.45  # of a kind of units
_PATIENCE = 2  # removals that may cost more than they save before no more are tried


@dataclass
class Planner:
    """Plans for one model, which may be cut in several steps; on the meta device too if nothing has to be measured.

    Attributes:
        tokens: Loads the calibration tokens; called only where they are needed.
        choices: Of kinds whose units are chosen here already, what chooses them.
        store: Where the weights are that are read a layer at a time; `None` if all are in memory, or none are needed.
        similarities: What layers change in the hidden states, where that is known already.
        chosen: Whether `units="auto"` came to these kinds of units, so that it is not recommended.
        known: What was found out about the model for the last plan; `None` where nothing had to be.
        depth: How layers and sublayers were chosen by the last plan; `None` where nothing was measured.
        how: How a search found the widths of the last plan, in words.
        after: Class and configuration of the model after the last plan.
    """

    model: PreTrainedModel
    structure: ModelStructure
    config: PruningConfig
    tokens: Callable[[], Calibration]
    choices: Mapping[str, TokenChoice] = field(default_factory=dict)
    store: Store | None = None
    similarities: Callable[[], LayerSimilarities] | None = None
    chosen: bool = False
    known: Survey | None = field(init=False, default=None)
    how: str = field(init=False, default="")
    depth: DepthChoice | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # What ratios and rounding of several steps refer to.
        self._dense = self.structure if self.config.iterative_steps > 1 else None
        self._narrow = self.structure  # after what all layers share was cut, before anything else
        self._head_counts = self._expressible_heads()
        self.after: Target | None = None

    def shapes(self) -> PreTrainedModel:
        """The model after the last plan, without weights."""
        return self.after.skeleton()

    @property
    def looks_first(self) -> bool:
        """Whether heads and neurons are given out by what is measured on the whole model."""
        return self.config.allocation != "uniform" and bool(self.config.kinds(kinds_of(WidthKind)))

    def plan(self, ratio: float | None, steps_left: int = 1) -> PruningPlan:
        """A plan for the model as it is; `steps_left` equal steps, this one included, are to reach what is asked.

        Raises:
            RatioError: More than can be cut; says how much can.
            CheckpointError: No checkpoint could hold the result.
        """
        config, total = self.config, self.structure.total_parameters
        if self.looks_first and self.store is None and not has_weights(self.model):
            raise UnsupportedModelError(
                f"`allocation` is {config.allocation!r}, which measures the model. {why_no_weights(self.model)}"
            )
        self.known = survey(self.model, self.structure, config, self.tokens) if self.looks_first else None
        shared, shell = self._shared(ratio)
        budget = None if ratio is None else round(ratio * total)
        stating = [option for kind in kinds_of(SharedKind) for option in KINDS[kind].options]
        sizes = [*(before.total_parameters for _, before in shared), self._narrow.total_parameters]
        steps = zip((decision.kind for decision, _ in shared), itertools.pairwise(sizes), strict=True)
        kept = config.keep or {}
        stated = sum(before - after for kind, (before, after) in steps if kind in kept)
        left = self._left(budget, total - sizes[-1], stated, *stating)
        evolves = config.allocation == EVOLUTION and bool(config.kinds(kinds_of(WidthKind)))
        dropped = {} if evolves else self._dropped(left)
        stated = removed_by({kind: gone for kind, gone in dropped.items() if kind in kept}, self._narrow)
        left = self._left(left, removed_by(dropped, self._narrow), stated, "num_layers", "keep_first")
        counts: Counts = {}
        if evolves:
            counts, dropped = self._evolved(ratio)
        elif config.kinds(kinds_of(WidthKind)):
            if shared and self._head_counts is not None:
                self._head_counts = expressible_heads(shell, self._narrow, config.layout)
            goal = self._widths(ratio, dropped, left if shared or dropped else None)
            counts = next_counts(self._budget(config, dropped), goal, steps_left)
        plan = describe(
            self.model, self._narrow, counts, config, layout=config.layout, ratio_requested=ratio, dropped=dropped,
            shared=shared,
        )  # fmt: skip
        for decision, _ in shared:
            if decision.kind in self.choices and decision.kept is not None:
                plan.vocabulary_report = self.choices[decision.kind].report(decision.kept)
        target = target_of(shell, self._narrow, plan)  # raises if no checkpoint could hold the result
        self.after = target
        plan.warnings += misread(self.model.config, target.config)
        plan.reasons += [self.how] if self.how else []
        if ratio is not None and not self.chosen:
            plan.warnings += _one_sided(self._narrow, plan)
        if ratio and self._dense is None and plan.parameters_after == plan.parameters_before:
            plan.warnings.append(self._nothing_goes(ratio))
        return plan

    def _nothing_goes(self, ratio: float) -> str:
        """What is to be said of a ratio to which no cut at all is nearest."""
        units, total, steps = self.config.units, self.structure.total_parameters, []
        for layer in self.structure.layers if self.config.kinds(kinds_of(DepthKind)) else ():
            steps += [layer.parameters] if LAYERS in units else []
            steps += [sublayer.parameters for sublayer in layer.sublayers if sublayer.kind in units]
        least = f" (the least that can go is {min(steps) / total:.2%})" if steps else ""
        return (
            f"nothing goes: the ratio is {ratio:.2%}, and {', '.join(units)} go in larger steps{least}: ask for more, "
            "or cut finer units"
        )

    def _left(self, budget: int | None, gone: int, stated: int, *options: str) -> int | None:
        """What is left of a budget of which so much is gone, `stated` of it by kinds that `keep` names.

        Refuses that `keep`, or one of these options, which say how much goes, takes more. What was rounded to whole
        units may.
        """
        if budget is None:
            return None
        total = self.structure.total_parameters
        for option, taken in (*((option, gone) for option in options), ("keep", stated)):
            value = getattr(self.config, option)
            if value is not None and taken > budget:
                raise RatioError(
                    f"`{option}` is {value}, which alone removes {taken / total:.2%} of all parameters: more than the "
                    f"{budget / total:.2%} that are to go. Ask for more, or change `{option}`."
                )
        return max(0, budget - gone)

    # What all layers share.

    def _shared(self, ratio: float | None) -> tuple[list[tuple[Decision, ModelStructure]], PreTrainedModel]:
        """Decisions about it, each with the structure before it, and the model after them (without weights)."""
        self._narrow, shell, found = self.structure, self.model, []
        for kind in (kind for kind in kinds_of(SharedKind) if kind in self.config.units):
            before = self._narrow
            decision, shell = self._of_model(kind, shell, ratio)
            found += [(decision, before)] if decision else []
        return found, shell

    def _of_model(
        self, kind: str, shell: PreTrainedModel, ratio: float | None
    ) -> tuple[Decision | None, PreTrainedModel]:
        """How many units of a kind that all layers share stay, and the model that has as many (without weights)."""
        group, stated = SIZED[kind].group(shell, self._narrow), self.config.stated_size(kind)
        option, label = next(iter(KINDS[kind].options), "keep"), KINDS[kind].label
        choice = self.choices.get(kind)
        if choice is not None:
            choice.check(group.size, stated)
            group = dataclasses.replace(group, least=choice.least)
        if stated is not None and stated >= group.size:
            raise ConfigurationError(f"`{option}` is {stated}; it must be less than the model's own, {group.size}.")
        refused: CheckpointError | None = None
        for size in [stated] if stated is not None else self._nearest(group, label, ratio):
            if size == group.size:
                return None, shell
            try:
                small = SIZED[kind].target(shell, self._narrow, size).skeleton()
                self._narrow = ModelStructure.of(small)
                kept = None if choice is None or not choice.ready else choice.choose(group.size, size)
                return Decision(kind, None, group.size, size, kept), small
            except CheckpointError as error:  # some classes want a multiple of the number of heads
                refused = refused or error
        raise refused

    def _nearest(self, group: Group, label: str, ratio: float) -> list[int]:
        """Numbers of units that all layers share, nearest to the ratio first; all of them only beside other kinds."""
        config = self.config
        parameters = (config.parts or {group.kind: 1.0})[group.kind] * ratio * self.structure.total_parameters
        sizes = KINDS[group.kind].sizes(group.size, config.round_to, config.align_to)
        sizes = [size for size in sizes if size >= group.least]
        most = (group.size - min(sizes)) * group.cost
        if parameters > most:
            least = f", since {group.least} must stay" if group.least > 1 else ""
            raise RatioError(
                f"{parameters:,.0f} parameters are to go by the {label}, which can take at most {most:,}{least}. "
                "Ask for less."
            )
        wanted = group.size - parameters / group.cost
        sizes.sort(key=lambda size: (abs(size - wanted), -size))
        if config.split is not None or not parameters:
            return sizes  # other kinds take what this one does not
        smaller = [size for size in sizes if size < group.size]
        if sizes[0] == group.size:
            share = (group.size - max(smaller)) * group.cost / self.structure.total_parameters
            raise RatioError(
                f"The ratio is {ratio:.2%} and nothing but the {label} is to go, of which the least that can go "
                f"removes {share:.2%}: {max(smaller)} of {group.size} stay. Ask for {share:.4f}, set "
                f"keep={{'{group.kind}': ...}}, or cut other units."
            )
        return smaller

    # Layers and sublayers.

    def _dropped(self, left: int | None) -> Dropped:
        """Layers and sublayers that go; `left` is what is left of the budget for them."""
        kinds, config, layers = self.config.kinds(kinds_of(DepthKind)), self.config, self._narrow.layers
        self.depth = None
        if not kinds:
            return {}
        if config.keep_first is not None:
            if config.keep_first > len(layers):
                raise ConfigurationError(f"`keep_first` is {config.keep_first}, the model has {len(layers)} layers.")
            return normalised({LAYERS: list(range(config.keep_first, len(layers)))}, self._narrow)
        if not config.chooses_depth(left):
            return normalised({kind: config.layers for kind in kinds}, self._narrow)
        if self.store is None and not has_weights(self.model):
            raise UnsupportedModelError(
                f"Which layers go is measured on the model, unless they are named. {why_no_weights(self.model)}"
            )
        dropped: Dropped = {}
        for kind in filter(config.is_stated, kinds):
            count = config.num_layers if kind not in (config.keep or {}) else self._to_go(kind, dropped)
            dropped = self._choose((kind,), dropped, count=count) if count else dropped
        kinds = tuple(kind for kind in kinds if not config.is_stated(kind))
        if not kinds:
            return dropped
        if dropped:
            left = max(0, left - removed_by(dropped, self._narrow))
        if config.split is not None:
            return self._choose_split(kinds, left)
        if not config.kinds(kinds_of(WidthKind)) or dropped:
            return self._choose(kinds, dropped, parameters=left)
        return self._choose_measured(kinds, left)

    def _to_go(self, kind: str, dropped: Dropped) -> int:
        """How many layers, or sublayers of a kind, go so that as many stay as `keep` says."""
        layers = [layer for layer in self._narrow.layers if layer.index not in dropped.get(LAYERS, ())]
        there, keep = sum(kind == LAYERS or layer.sublayer(kind) is not None for layer in layers), self.config.keep
        if keep[kind] > there:
            raise ConfigurationError(f"`keep` is {keep}, but there are only {there} {KINDS[kind].label}.")
        return there - keep[kind]

    def _choose(self, kinds: tuple[str, ...], dropped: Dropped, **amount: Any) -> Dropped:
        """What is dropped already, and so much more of some kinds."""
        self.depth = choose_depth(
            self.model, self._narrow, self.config, kinds, tokens=self.tokens, without=dropped, store=self.store,
            similarities=self.similarities, **amount,
        )  # fmt: skip
        found = [(layer, kind) for one in (dropped, self.depth.dropped) for kind in one for layer in one[kind]]
        return as_dropped(found, self._narrow)

    def _choose_split(self, kinds: tuple[str, ...], left: int) -> Dropped:
        """Every kind of depth gets its own part of the budget, layers first: sublayers go from those that stay."""
        dropped: Dropped = {}
        total = left / (1 - sum(self.config.split.get(kind, 0) for kind in kinds_of(SharedKind)))
        for kind in sorted(kinds, key=kinds_of(DepthKind).index):
            amount = {"parameters": round(self.config.split[kind] * total)}
            chosen = self._choose((kind,), dropped, **amount)
            if self.config.kinds(kinds_of(WidthKind)) and removed_by(chosen, self._narrow) > left:
                # The nearest number of whole units is more than everything that is to go; finer ones take the rest.
                chosen = self._choose((kind,), dropped, most=True, **amount)
            dropped = chosen
        return dropped

    def _choose_measured(self, kinds: tuple[str, ...], left: int) -> Dropped:
        """As much depth as makes the measured cost of the whole cut least, heads and neurons taking the rest.

        The cost of the first `k` removals is the rise of the loss that was measured with all of them gone; that of
        widths is the sum of `a * share^2` over the groups (see `survey.measure_sensitivity`). Both are nats per token
        (the divergence is the rise of the loss on text as the dense model would write it), and are added, as if they
        did not depend on each other.
        """
        if self.config.depth_criterion not in ("exchange", "greedy", "perplexity"):
            raise ConfigurationError(
                f"depth_criterion={self.config.depth_criterion!r} gives no cost that could be compared with that of "
                "heads and neurons: say how the budget is to be split (`split`), or use "
                "'exchange', 'greedy' or 'perplexity'."
            )
        if any(KINDS[kind].within for kind in self.config.units):
            raise ConfigurationError("The cost of query heads is not measured: use `split`, or units 'kv_groups'.")
        sensitivity = self.known and self.known.sensitivity
        if sensitivity is None:
            config = dataclasses.replace(self.config, allocation="search", layout="per_layer")
            sensitivity = survey(self.model, self.structure, config, self.tokens).sensitivity
        sizes = {group.key: group.size for group in self._narrow.groups}

        def costs(order: list[Unit], losses: list[float], baseline: float) -> list[float]:
            """The cost of the whole cut with none, one ... of the removals; infinite if widths cannot do the rest."""
            found = []
            for number, rise in enumerate([0.0, *(loss - baseline for loss in losses)]):
                dropped = as_dropped(order[:number], self._narrow)
                target = max(0, left - removed_by(dropped, self._narrow))
                try:
                    counts = self._allocate(self.config, None, dropped, target, sensitivity)
                except RatioError:
                    found.append(math.inf)
                    continue
                widths = sum(sensitivity[key] * (1 - keep / sizes[key]) ** 2 for key, keep in counts.items())
                found.append(rise + widths)
            return found

        def levelled_off(*measured: Any) -> bool:
            """Whether the last removals did not make the whole cut cheaper, so that more will hardly do."""
            found = costs(*measured)
            return min(found) < math.inf and len(found) - 1 - found.index(min(found)) >= _PATIENCE

        self._choose(kinds, {}, parameters=left, most=True, until=levelled_off)
        order = self.depth.order
        found = costs(order, self.depth.losses, self.depth.baseline)
        if min(found) == math.inf:
            raise RatioError(
                f"So much cannot be removed: heads and neurons cannot take what is left of it after any of 0 to "
                f"{len(order)} removals of layers or sublayers. Ask for less, or allow more `units` or layers."
            )
        return as_dropped(order[: found.index(min(found))], self._narrow)

    # Heads and neurons.

    def _widths(self, ratio: float | None, dropped: Dropped, target: int | None) -> Counts:
        """Heads and neurons to keep: what `keep` states, then the parts of a split, of which neurons close the gap."""
        config, counts = self.config, {}
        kinds, split = config.kinds(kinds_of(WidthKind)), config.split
        stated = {kind: config.keep[kind] for kind in kinds if kind in (config.keep or {})}
        if stated:
            exact = config.cutting(*stated, keep=stated)
            counts = allocate_stated(self._budget(exact, dropped))
            kinds = tuple(kind for kind in kinds if kind not in stated)
            if not kinds:
                return counts
            target = round(ratio * (self._dense or self._narrow).total_parameters) if target is None else target
            target = max(0, target - self._removed(counts, dropped))
            config = config.cutting(*kinds)
        if split is None or len(kinds) == 1:
            return counts | self._allocate(config, ratio, dropped, target)
        *coarse, finest = sorted(kinds, key=lambda kind: not KINDS[kind].of_heads)
        if target is None:
            target = round(ratio * (self._dense or self._narrow).total_parameters)
        left, total = target, sum(split[kind] for kind in kinds)
        alone = {kind: config.cutting(kind) for kind in kinds}
        for kind in coarse:
            of_kind = self._allocate(alone[kind], ratio, dropped, round(target * split[kind] / total))
            counts |= of_kind
            left -= self._removed(of_kind, dropped)
        return counts | self._allocate(alone[finest], ratio, dropped, left)

    def _evolved(self, ratio: float) -> tuple[Counts, Dropped]:
        """Heads, neurons, experts to keep, and layers and sublayers that go, by a search over all of them."""
        self.depth = None
        counts, dropped, self.how = evolve(
            self.model, self.structure, self.config, lambda gone: self._budget(self.config, gone), ratio,
            self.tokens, self.known.salience,
        )  # fmt: skip
        return counts, dropped

    def _allocate(
        self, config: PruningConfig, ratio: float | None, dropped: Dropped, target: int | None,
        sensitivity: dict[tuple[int, str], float] | None = None,
    ) -> Counts:  # fmt: skip
        known, budget = self.known or Survey(), self._budget(config, dropped)
        return allocate(budget, ratio, target, known.scores, sensitivity or known.sensitivity, known.rises)

    def _budget(self, config: PruningConfig, dropped: Dropped) -> Budget:
        return Budget(self._narrow, config, self._head_counts, dropped, self._dense)

    def _removed(self, counts: Counts, dropped: Dropped) -> int:
        """Parameters that these counts take from the layers of the model before any step."""
        plan = PruningPlan.from_counts(
            self._dense or self._narrow, counts, model_type="", layout=self.config.layout, dropped=dropped
        )
        return sum(count for kind, count in plan.removed.items() if kind in kinds_of(WidthKind))

    def _expressible_heads(self) -> set[tuple[int, int]] | None:
        """Head counts that a checkpoint can have; `None` where no heads are cut."""
        config, structure = self.config, self.structure
        widths = config.kinds(kinds_of(WidthKind))
        if not any(KINDS[kind].of_heads for kind in widths):
            return None
        every = expressible_heads(self.model, structure, config.layout)
        found = every & {pair for layer in structure.layers for pair in pairs(layer, widths)[1:]}
        if found or not any(layer.attention for layer in structure.layers):
            return found
        why = (
            f"the configuration of {type(self.model).__name__} derives the size of a head from the number of heads, "
            "so that a vanilla checkpoint cannot have fewer"
        ) + ("" if structure.towers else " (layout='per_layer' can cut them)")
        try:
            target_of(
                self.model, structure, PruningPlan.from_counts(structure, {}, model_type="", layout=config.layout)
            )
        except CheckpointError as error:  # nor can it have what the model has now
            why = f"{error}".rstrip(".")
        if every:  # with other units
            why = f"its layers can only have {sorted(every)} (KV groups, query heads in each)"
        if widths == ("kv_groups",) and {g.size for g in structure.groups if g.kind == "kv_groups"} == {1}:
            why = "each layer has one, which goes with its whole attention only (take 'query_heads' or 'layers')"
        if all(KINDS[kind].of_heads for kind in widths) or config.split is not None:
            raise UnsupportedModelError(f"`units` is {config.units}, but heads are left alone: {why}.")
        structure.notes = list(dict.fromkeys([*structure.notes, f"heads are left alone: {why}"]))
        return found


def describe(
    model: PreTrainedModel, structure: ModelStructure, counts: Counts, config: PruningConfig, **decided: Any
) -> PruningPlan:
    """The plan of decisions that have been made, with what is to be said about it.

    Args:
        model: For its type and the size of its parameters.
        structure: What the decisions refer to: after what all layers share was cut, before anything else.
        decided: The rest, for `PruningPlan.from_counts`.
    """
    plan = PruningPlan.from_counts(
        structure, counts, model_type=model.config.model_type, **decided,
        bytes_per_parameter=size_of(model) / sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    hidden_size = plan.hidden.before if plan.hidden else model.config.hidden_size
    plan.warnings = warnings_of(structure, plan, hidden_size, config.align_to)
    plan.warnings += approximations(model, structure, plan)
    plan.warnings += [line for decision in plan.shared for line in KINDS[decision.kind].remarks(decision)]
    if plan.ratio_requested is not None and (plan.groups or plan.shared):
        plan.warnings += far_off(plan.ratio_requested, plan.ratio, config.align_to, config.round_to)
    return plan


def _one_sided(structure: ModelStructure, plan: PruningPlan) -> list[str]:
    """A warning where most of what there is of a kind goes for a small share of the model."""
    found = []
    for kind in {group.kind for group in plan.groups}:
        there = sum(group.size * group.cost for group in structure.groups if group.kind == kind)
        gone = plan.removed.get(kind, 0) / there
        if gone < _MUCH or len(plan.removed) > 1:
            continue
        outside = 1 - sum(layer.parameters for layer in structure.layers) / structure.total_parameters
        rows = f" ({outside:.0%} are outside of the layers: units='vocabulary' cuts there)" if outside > 0.3 else ""
        found.append(
            f"{gone:.0%} of all {KINDS[kind].label} go, since they are only {there / structure.total_parameters:.0%} "
            f"of the model's parameters{rows}: units='auto' measures whether a mixture costs less"
        )
    return found


def size_of(model: PreTrainedModel) -> int:
    """Bytes of all distinct parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
