"""Makes a plan: how the budget goes to the hidden size, to layers and sublayers, and to heads and neurons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .alignment import far_off
from .allocation import Budget, Counts, allocate, allocate_stated, next_counts
from .allocation.amounts import check_ratio, hidden_sizes_for
from .allocation.depth import DepthChoice, choose_depth
from .allocation.joint import best_part, levelled_off, prefix_costs
from .allocation.removal import Unit
from .config import PruningConfig
from .errors import CheckpointError, ConfigurationError, RatioError, UnsupportedModelError
from .model.describe import expressible_heads, target_of
from .model.hidden_size import hidden_group, shrunk_config_model
from .model.plan_warnings import approximations, warnings_of
from .model.rebuild import has_weights
from .model.structure import ModelStructure
from .plan import Decision, Dropped, PruningPlan, normalised, removed_by
from .stats.survey import Survey, sensitivities
from .units import KINDS, DepthKind, WidthKind, kinds_of
from .units.depth import LAYERS
from .units.hidden import HIDDEN


@dataclass
class Planner:
    """Plans for one model.

    Attributes:
        model: The model as it is; on the meta device too where nothing has to be measured.
        structure: Its coupled groups.
        config: What may be cut and how.
        tokens: Loads the calibration tokens; called only where they are needed.
        head_counts: Pairs of (KV groups, query heads in each) that a checkpoint can express; `None` allows all.
        dense: The model before earlier steps, which ratios and rounding refer to; default `structure`.
        steps_left: Plan only so far that as many equal steps, this one included, reach what is asked.
        depth: How layers and sublayers were chosen by the last plan; `None` where nothing was measured.
    """

    model: PreTrainedModel
    structure: ModelStructure
    config: PruningConfig
    tokens: Callable[[], torch.Tensor]
    head_counts: set[tuple[int, int]] | None = None
    dense: ModelStructure | None = None
    steps_left: int = 1
    depth: DepthChoice | None = None

    def plan(self, ratio: float | None, known: Survey) -> PruningPlan:
        """A plan for the model as it is.

        Args:
            ratio: Share of all parameters to remove; `None` where the configuration says how much goes.
            known: What was found out about the model already.

        Raises:
            ConfigurationError: The ratio is missing, or given where the configuration has said all.
            RatioError: More than can be cut; says how much can.
            CheckpointError: No checkpoint could hold the result.
        """
        check_ratio(ratio, self.config)
        hidden, shell, inner = self._hidden(ratio)
        budget = None if ratio is None else round(ratio * self.structure.total_parameters)
        left = self._left(budget, self.structure.total_parameters - inner.total_parameters, "hidden_size", "keep")
        dropped = self._dropped(left, inner, known)
        left = self._left(left, removed_by(dropped, inner), "num_layers", "keep_first", "keep")
        counts: Counts = {}
        if self.config.kinds(kinds_of(WidthKind)):
            target = left if hidden or dropped else None
            if hidden and self.head_counts is not None:
                self.head_counts = expressible_heads(shell, inner, self.config.layout)
            goal = self._widths(inner, ratio, known, dropped, target)
            now = Budget(inner, self.config, self.head_counts, dropped, self.dense)
            counts = next_counts(now, goal, self.steps_left)
        plan = describe(
            self.model, inner, counts, ratio, self.config.layout, dropped, hidden, self.structure if hidden else None,
            self.config.align_to, self.config.round_to,
        )  # fmt: skip
        target_of(shell, inner, plan)  # raises if no checkpoint could hold the result
        return plan

    def _left(self, budget: int | None, gone: int, *options: str) -> int | None:
        """What is left of a budget.

        Raises:
            RatioError: One of these options, which say how much goes, takes more than there is.
        """
        if budget is None:
            return None
        for option in options:
            value, total = getattr(self.config, option), self.structure.total_parameters
            if value is not None and gone > budget:
                raise RatioError(
                    f"`{option}` is {value}, which alone removes {gone / total:.2%} of all parameters: more than the "
                    f"{budget / total:.2%} that are to go. Ask for more, or change `{option}`."
                )
        return max(0, budget - gone)

    def _hidden(self, ratio: float | None) -> tuple[Decision | None, PreTrainedModel, ModelStructure]:
        """The new hidden size, the model that has it (without weights), and the structure of that model."""
        if HIDDEN not in self.config.units:
            return None, self.model, self.structure
        group = hidden_group(self.model, self.structure)
        stated = self.config.stated_hidden_size
        sizes = [stated]
        if stated is not None and stated >= group.size:
            raise ConfigurationError(f"`hidden_size` is {stated}; it must be less than the model's own, {group.size}.")
        if stated is None:
            share = (self.config.split or {HIDDEN: 1.0})[HIDDEN]
            sizes = hidden_sizes_for(group, share * ratio * self.structure.total_parameters, self.config)
        refused: CheckpointError | None = None
        for size in sizes:
            if size == group.size:
                return None, self.model, self.structure
            try:
                shell = shrunk_config_model(self.model, size, self.structure)
                return Decision(HIDDEN, None, group.size, size), shell, ModelStructure.of(shell)
            except CheckpointError as error:  # some classes want a multiple of the number of heads
                refused = refused or error
        raise refused

    def _dropped(self, left: int | None, inner: ModelStructure, known: Survey) -> Dropped:
        """Layers and sublayers that go; `left` is what the hidden size leaves of the budget."""
        kinds, config = self.config.kinds(kinds_of(DepthKind)), self.config
        self.depth = None
        if not kinds:
            return {}
        if config.keep_first is not None:
            if config.keep_first > len(inner.layers):
                raise ConfigurationError(
                    f"`keep_first` is {config.keep_first}, the model has {len(inner.layers)} layers."
                )
            return normalised({LAYERS: list(range(config.keep_first, len(inner.layers)))}, inner)
        if not config.chooses_depth(None if left is None else 0.0):
            return normalised({kind: config.layers for kind in kinds}, inner)
        if not has_weights(self.model):
            raise UnsupportedModelError(
                "Which layers go is measured on the model, but some weights are not in memory (meta device or "
                "offloaded). Load it with a `device_map` that fits, or name the layers."
            )
        dropped: Dropped = {}
        for kind in filter(config.is_stated, kinds):
            count = config.num_layers if kind not in (config.keep or {}) else self._to_go(inner, kind, dropped)
            dropped |= self._choose(inner, (kind,), count=count, without=dropped) if count else {}
        kinds = tuple(kind for kind in kinds if not config.is_stated(kind))
        if not kinds:
            return normalised(dropped, inner)
        if dropped:
            left = max(0, left - removed_by(dropped, inner))
        if config.split is not None:
            return self._choose_split(inner, kinds, left)
        if not config.kinds(kinds_of(WidthKind)) or dropped:
            return normalised(dropped | self._choose(inner, kinds, parameters=left, without=dropped), inner)
        return self._measured(inner, kinds, left, known)

    def _to_go(self, inner: ModelStructure, kind: str, dropped: Dropped) -> int:
        """How many layers, or sublayers of a kind, go so that as many stay as `keep` says."""
        there = [layer.index for layer in inner.layers if kind == LAYERS or layer.sublayer(kind) is not None]
        there = [index for index in there if index not in dropped.get(LAYERS, ())]
        wanted = self.config.keep[kind]
        if wanted > len(there):
            raise ConfigurationError(
                f"`keep` is {self.config.keep}, but there are only {len(there)} {KINDS[kind].label}."
            )
        return len(there) - wanted

    def _choose(self, inner: ModelStructure, kinds: tuple[str, ...], **amount: Any) -> Dropped:
        self.depth = choose_depth(self.model, inner, self.config, kinds, tokens=self.tokens, **amount)
        return normalised(self.depth.dropped, inner)

    def _choose_split(self, inner: ModelStructure, kinds: tuple[str, ...], left: int) -> Dropped:
        """Every kind of depth gets its own part of the budget, layers first: sublayers go from those that stay."""
        dropped: Dropped = {}
        total = left / (1 - self.config.split.get(HIDDEN, 0))
        for kind in sorted(kinds, key=kinds_of(DepthKind).index):
            amount = {"parameters": round(self.config.split[kind] * total), "without": dropped}
            chosen = dropped | self._choose(inner, (kind,), **amount)
            if self.config.kinds(kinds_of(WidthKind)) and removed_by(normalised(chosen, inner), inner) > left:
                # The nearest number of whole units is more than everything that is to go; finer ones take the rest.
                chosen = dropped | self._choose(inner, (kind,), most=True, **amount)
            dropped = chosen
        return normalised(dropped, inner)

    def _widths(
        self, inner: ModelStructure, ratio: float | None, known: Survey, dropped: Dropped, target: int | None
    ) -> Counts:
        """Heads and neurons to keep. A split between them holds for heads first; neurons, finer, close the gap."""

        def give(config: PruningConfig, target: int | None) -> Counts:
            scores, sensitivity = known.scores, known.sensitivity
            return allocate(inner, config, ratio, scores, self.head_counts, sensitivity, dropped, target, self.dense)

        counts: Counts = {}
        kinds, split, keep = self.config.kinds(kinds_of(WidthKind)), self.config.split, self.config.keep or {}
        stated = tuple(kind for kind in kinds if kind in keep)
        if stated:
            exact = dataclasses.replace(self.config, units=stated, keep={kind: keep[kind] for kind in stated})
            counts = allocate_stated(Budget(inner, exact, self.head_counts, dropped, self.dense))
            kinds = tuple(kind for kind in kinds if kind not in stated)
            target = None if target is None else max(0, target - self._removed(inner, counts, dropped))
        if not kinds:
            return counts
        if stated:
            return counts | give(dataclasses.replace(self.config, units=kinds, keep=None), target)
        if split is None or len(kinds) == 1:
            return give(self.config, target)
        *coarse, finest = sorted(kinds, key=lambda kind: not KINDS[kind].of_heads)
        whole = self.dense or inner
        target = round(ratio * whole.total_parameters) if target is None else target
        left, total = target, sum(split[kind] for kind in kinds)
        alone = {kind: dataclasses.replace(self.config, units=(kind,), split=None) for kind in kinds}
        for kind in coarse:
            of_kind = give(alone[kind], round(target * split[kind] / total))
            counts |= of_kind
            left -= self._removed(whole, of_kind, dropped)
        return counts | give(alone[finest], left)

    def _removed(self, structure: ModelStructure, counts: Counts, dropped: Dropped) -> int:
        """Parameters that these counts take from the layers."""
        plan = describe(self.model, structure, counts, None, self.config.layout, dropped)
        return sum(count for kind, count in plan.removed.items() if kind in kinds_of(WidthKind))

    def _measured(self, inner: ModelStructure, kinds: tuple[str, ...], left: int, known: Survey) -> Dropped:
        """As much depth as makes the measured cost of the whole cut least, heads and neurons taking the rest."""
        if self.config.depth_criterion not in ("exchange", "greedy", "perplexity"):
            raise ConfigurationError(
                f"depth_criterion={self.config.depth_criterion!r} gives no cost that could be compared with that of "
                "heads and neurons: say how the budget is to be split (`split`), or use "
                "'exchange', 'greedy' or 'perplexity'."
            )
        if any(KINDS[kind].within for kind in self.config.units):
            raise ConfigurationError("The cost of query heads is not measured: use `split`, or units 'kv_groups'.")
        if known.sensitivity is None:
            known.sensitivity = sensitivities(self.model, self.structure, self.config, self.tokens)

        def widths(dropped: Dropped) -> Counts:
            target = max(0, left - removed_by(dropped, inner))
            return allocate(
                inner, self.config, None, known.scores, self.head_counts, known.sensitivity, dropped, target
            )

        def enough(order: list[Unit], losses: list[float], baseline: float) -> bool:
            return levelled_off(prefix_costs(order, losses, baseline, inner, known.sensitivity, widths))

        self._choose(inner, kinds, parameters=left, most=True, until=enough)
        return best_part(self.depth, inner, known.sensitivity, widths)


def describe(
    model: PreTrainedModel,
    inner: ModelStructure,
    counts: Counts,
    ratio: float | None,
    layout: str,
    dropped: Dropped | None = None,
    hidden: Decision | None = None,
    dense: ModelStructure | None = None,
    align_to: str | int | None = None,
    round_to: int | None = None,
) -> PruningPlan:
    """The plan of decisions that have been made.

    Args:
        model: The model, for its type and the size of its parameters.
        inner: Structure that the decisions refer to: after the hidden size was cut, before anything else.
        counts: Units to keep.
        ratio: The ratio that was asked for.
        layout: `"uniform"` or `"per_layer"`.
        dropped: Layers and sublayers that go.
        hidden: The decision for the hidden size.
        dense: Structure before the hidden size was cut, if it was.
        align_to, round_to: What widths were to be multiples of.
    """
    plan = PruningPlan.from_counts(
        inner, counts, model_type=model.config.model_type, layout=layout, ratio_requested=ratio,
        bytes_per_parameter=size_of(model) / sum(p.numel() for p in model.parameters()), dropped=dropped,
        hidden=hidden, dense=dense,
    )  # fmt: skip
    plan.warnings = warnings_of(inner, plan, hidden.before if hidden else model.config.hidden_size, align_to)
    plan.warnings += approximations(model, inner, plan)
    if ratio is not None and (plan.groups or plan.hidden):
        plan.warnings += far_off(ratio, plan.ratio, align_to, round_to)
    return plan


def size_of(model: PreTrainedModel) -> int:
    """Bytes of all distinct parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
