"""Makes a plan: how the budget goes to the hidden size, to layers and sublayers, and to heads and neurons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .alignment import far_off
from .allocation import Budget, Counts, allocate, next_counts
from .allocation.amounts import check_ratio, hidden_sizes_for
from .allocation.depth import DepthChoice, choose_depth
from .allocation.input_widths import warnings_of
from .allocation.joint import best_part, levelled_off, prefix_costs
from .allocation.removal import Unit
from .config import PruningConfig
from .decisions import Dropped, HiddenPlan, normalised
from .errors import CheckpointError, ConfigurationError, RatioError, UnsupportedModelError
from .model.approximations import approximations
from .model.rebuild import has_weights
from .model.structure import ModelStructure
from .model.target import expressible_heads, target_of
from .plan import PruningPlan
from .stats.knowledge import Knowledge, sensitivities
from .units.hidden_group import hidden_group
from .units.hidden_target import shrunk_config_model
from .units.kinds import DEPTH_UNITS, WIDTH_UNITS


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

    def plan(self, ratio: float | None, known: Knowledge) -> PruningPlan:
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
        left = self._left(budget, self.structure.total_parameters - inner.total_parameters, "hidden_size")
        dropped = self._dropped(left, inner, known)
        left = self._left(left, removed_by(dropped, inner), "num_layers", "keep_first")
        counts: Counts = {}
        if self.config.kinds(WIDTH_UNITS):
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

    def _hidden(self, ratio: float | None) -> tuple[HiddenPlan | None, PreTrainedModel, ModelStructure]:
        """The new hidden size, the model that has it (without weights), and the structure of that model."""
        if "hidden" not in self.config.units:
            return None, self.model, self.structure
        group = hidden_group(self.model, self.structure)
        sizes = [self.config.hidden_size]
        if self.config.hidden_size is not None and self.config.hidden_size >= group.size:
            raise ConfigurationError(
                f"`hidden_size` is {self.config.hidden_size}; it must be less than the model's own, {group.size}."
            )
        if self.config.hidden_size is None:
            share = (self.config.split or {"hidden": 1.0})["hidden"]
            sizes = hidden_sizes_for(group, share * ratio * self.structure.total_parameters, self.config)
        refused: CheckpointError | None = None
        for size in sizes:
            if size == group.size:
                return None, self.model, self.structure
            try:
                shell = shrunk_config_model(self.model, size, self.structure)
                return HiddenPlan(group.size, size), shell, ModelStructure.of(shell)
            except CheckpointError as error:  # some classes want a multiple of the number of heads
                refused = refused or error
        raise refused

    def _dropped(self, left: int | None, inner: ModelStructure, known: Knowledge) -> Dropped:
        """Layers and sublayers that go; `left` is what the hidden size leaves of the budget."""
        kinds, config = self.config.kinds(DEPTH_UNITS), self.config
        self.depth = None
        if not kinds:
            return {}
        if config.keep_first is not None:
            if config.keep_first > len(inner.layers):
                raise ConfigurationError(
                    f"`keep_first` is {config.keep_first}, the model has {len(inner.layers)} layers."
                )
            return normalised({"layers": list(range(config.keep_first, len(inner.layers)))}, inner)
        if not config.chooses_depth(None if left is None else 0.0):
            return normalised({kind: config.layers for kind in kinds}, inner)
        if not has_weights(self.model):
            raise UnsupportedModelError(
                "Which layers go is measured on the model, but some weights are not in memory (meta device or "
                "offloaded). Load it with a `device_map` that fits, or name the layers."
            )
        if config.num_layers is not None:
            return self._choose(inner, ("layers",), count=config.num_layers)
        if config.split is not None:
            return self._choose_split(inner, kinds, left)
        if not config.kinds(WIDTH_UNITS):
            return self._choose(inner, kinds, parameters=left)
        return self._measured(inner, kinds, left, known)

    def _choose(self, inner: ModelStructure, kinds: tuple[str, ...], **amount: Any) -> Dropped:
        self.depth = choose_depth(self.model, inner, self.config, kinds, tokens=self.tokens, **amount)
        return normalised(self.depth.dropped, inner)

    def _choose_split(self, inner: ModelStructure, kinds: tuple[str, ...], left: int) -> Dropped:
        """Every kind of depth gets its own part of the budget, layers first: sublayers go from those that stay."""
        dropped: Dropped = {}
        total = left / (1 - self.config.split.get("hidden", 0))
        for kind in sorted(kinds, key=DEPTH_UNITS.index):
            amount = {"parameters": round(self.config.split[kind] * total), "without": dropped}
            chosen = dropped | self._choose(inner, (kind,), **amount)
            if self.config.kinds(WIDTH_UNITS) and removed_by(normalised(chosen, inner), inner) > left:
                # The nearest number of whole units is more than everything that is to go; finer ones take the rest.
                chosen = dropped | self._choose(inner, (kind,), most=True, **amount)
            dropped = chosen
        return normalised(dropped, inner)

    def _widths(
        self, inner: ModelStructure, ratio: float | None, known: Knowledge, dropped: Dropped, target: int | None
    ) -> Counts:
        """Heads and neurons to keep. A split between them holds for heads first; neurons, finer, close the gap."""

        def give(config: PruningConfig, target: int | None) -> Counts:
            scores, sensitivity = known.scores, known.sensitivity
            return allocate(inner, config, ratio, scores, self.head_counts, sensitivity, dropped, target, self.dense)

        kinds, split = self.config.kinds(WIDTH_UNITS), self.config.split
        if split is None or len(kinds) == 1:
            return give(self.config, target)
        heads = next(kind for kind in kinds if kind != "mlp_neurons")
        whole = self.dense or inner
        target = round(ratio * whole.total_parameters) if target is None else target
        part = target * split[heads] / (split[heads] + split["mlp_neurons"])
        alone = {kind: dataclasses.replace(self.config, units=(kind,), split=None) for kind in kinds}
        counts = give(alone[heads], round(part))
        left = {(group.layer, group.kind): group.num_units // group.blocks for group in inner.groups} | counts
        gone = describe(self.model, whole, left, None, self.config.layout, dropped).removed.get(heads, 0)
        return counts | give(alone["mlp_neurons"], target - gone)

    def _measured(self, inner: ModelStructure, kinds: tuple[str, ...], left: int, known: Knowledge) -> Dropped:
        """As much depth as makes the measured cost of the whole cut least, heads and neurons taking the rest."""
        if self.config.depth_criterion not in ("exchange", "greedy", "perplexity"):
            raise ConfigurationError(
                f"depth_criterion={self.config.depth_criterion!r} gives no cost that could be compared with that of "
                "heads and neurons: say how the budget is to be split (`split`), or use "
                "'exchange', 'greedy' or 'perplexity'."
            )
        if "query_heads" in self.config.units:
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
    hidden: HiddenPlan | None = None,
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


def removed_by(dropped: Dropped, structure: ModelStructure) -> int:
    """Parameters of dropped layers and sublayers."""
    layers = sum(structure.layers[number].parameters for number in dropped.get("layers", ()))
    parts = [(number, kind) for kind in ("attention", "mlp") for number in dropped.get(kind, ())]
    return layers + sum(structure.layers[number].sublayer(kind).parameters for number, kind in parts)
