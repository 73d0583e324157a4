"""Carries plans out: checks that a plan fits, cuts what layers share, layers, heads, neurons, says what came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from .config import LAYOUTS, PruningConfig
from .criteria import make_criterion
from .errors import ConfigurationError, UnsupportedModelError
from .model.describe import target_of
from .model.groups import Group, LayerStructure
from .model.rebuild import rebuild
from .model.shared_sizes import SIZED
from .model.store import Store
from .model.structure import ModelStructure
from .model.surgery import Kept, drop
from .model.target import Target
from .plan import Decision, PruningPlan, normalised
from .planner import describe, size_of
from .refit import last_norm, reconstruction
from .refit.layer_by_layer import compress
from .refit.shared import CUTS
from .stats.gradients import try_gradients
from .stats.processes import Processes
from .stats.seen import Calibration
from .stats.survey import Survey, reduced_gradients
from .units import GROUPS, KINDS, QUERIES
from .vocabulary.choosing import TokenChoice


ENOUGH_TOKENS = 256  # of calibration text for each expert


@dataclass
class Execution:
    """A model on its way from dense to pruned, with its coupled groups.

    `tokens` loads the calibration tokens; `store` is where the weights are; `choices` choose the units of kinds that
    are chosen before anything is cut, and are told when that is done; `processes` divide the text among them.
    """

    model: PreTrainedModel
    structure: ModelStructure
    config: PruningConfig
    tokens: Callable[[], Calibration]
    store: Store = field(default_factory=Store)
    choices: Mapping[str, TokenChoice] = field(default_factory=dict)
    processes: Processes = field(default_factory=Processes)
    _notes: list[str] = field(init=False, default_factory=list)
    _plan: PruningPlan | None = field(init=False, default=None)
    _softened: dict[str, float] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # narrow: after what all layers share was cut, before anything else
        self._dense = self._narrow = self.structure
        self._shared: list[tuple[Decision, ModelStructure]] = []  # what was, with the structure before
        # Of the dense model: the pruned one may be of another type.
        self._model_type, self._bytes = self.model.config.model_type, size_of(self.model)
        self._stay: Kept = {group.key: torch.arange(group.size) for group in self.structure.groups}

    def carry_out(self, plan: PruningPlan, known: Survey | None = None) -> None:
        """Cuts the model as planned; units that the plan does not name are chosen, by what is `known` already."""
        self._plan, target = plan, self._prove(plan)
        by_gradients = make_criterion(self.config).needs_gradients and not plan.chosen
        if by_gradients and plan.shared:  # taken of what is left, and before anything goes it is seen that they can be
            try_gradients(self.model, self.tokens())
        for decision in plan.shared:
            self._cut_shared(decision)
        known = known or Survey()
        if by_gradients and (plan.shared or known.salience is None):
            known.salience = reduced_gradients(self.model, self.structure, self.config, self.tokens())
        if target is None and (plan.groups or plan.dropped):
            target = target_of(self.model, self.structure, plan)
        if target is not None:
            self._cut(plan, target, known)

    def _prove(self, plan: PruningPlan) -> Target | None:
        """Builds what will come out, without weights, and raises early; `None` if something else is cut first."""
        shell, structure = self.model, self.structure
        if self.config.merge_experts:
            _check_merging(structure, plan)
        for decision in plan.shared:
            if (choice := self.choices.get(decision.kind)) is not None:
                if decision.kept is None:
                    decision.kept = choice.choose(decision.before, decision.keep)
                choice.trimmed(decision.kept)  # raises if it cannot be
            shell = SIZED[decision.kind].target(shell, structure, decision.keep).skeleton()
            structure = ModelStructure.of(shell)
        target = target_of(shell, structure, plan)
        ModelStructure.of(target.skeleton(), whole=False)
        return None if plan.shared else target

    def _cut_shared(self, decision: Decision) -> None:
        """Cuts what all layers share, and writes into the decision which units stay."""
        self._shared.append((decision, self.structure))
        kept = None if decision.kept is None else torch.tensor(decision.kept)
        data_free = kept is not None or self.config.criterion_of(decision.kind) == "magnitude"
        data_free = data_free and not self.config.compensation
        tokens = None if data_free or not KINDS[decision.kind].reads_text else self.tokens()
        cut = CUTS[decision.kind]
        self.model, kept = cut(self.model, self.structure, decision.keep, self.config, tokens, kept)
        decision.kept = None if kept is None else kept.tolist()
        if decision.kind in self.choices:
            self.choices[decision.kind].carry_out(decision.kept)
        self.structure = self._narrow = ModelStructure.of(self.model)

    def _cut(self, plan: PruningPlan, target: Target, known: Survey) -> None:
        """Cuts layers, heads and neurons."""
        self.store.begin(self.model, self.structure, plan.dropped, target)
        try:
            kept = compress(
                self.model, self.structure, plan, self.config, self.tokens, known, self._notes, self.store,
                processes=self.processes,
            )  # fmt: skip
            self.store.finish()
        finally:
            self.store.close()
        if plan.softened is not None and self._softened is not None:  # by an earlier step
            plan.softened["factor"] *= self._softened["factor"]
        self._softened = plan.softened or self._softened
        drop(self.model, self.structure, plan.dropped)
        self.model = rebuild(self.model, target)
        self.structure = ModelStructure.of(self.model, whole=False, towers=self.structure.towers)
        for layer, kind in self._stay.keys() - kept.keys():
            holder = (layer, KINDS[kind].within)
            if holder in kept:
                # Groups of one query head each, which an earlier step has left: it goes with its group.
                parts = self._stay[layer, kind].view(len(self._stay[holder]), -1)
                self._stay[layer, kind] = parts[kept[holder]].flatten()
        for key, units in kept.items():
            self._stay[key] = self._stay[key][units]

    def describe(self, ratio: float | None) -> PruningPlan:
        """The plan from the dense model to the one there is now, with the units that stay; `ratio` was asked for."""
        counts = {key: len(units) for key, units in self._stay.items()}
        for layer, kind in counts:
            if KINDS[kind].within is not None:
                counts[layer, kind] //= counts[layer, KINDS[kind].within]
        plan = self._plan
        result = describe(
            self.model, self._narrow, counts, self.config, layout=plan.layout, ratio_requested=ratio,
            dropped=plan.dropped, shared=self._shared,
        )  # fmt: skip
        result.model_type, result.vocabulary_report = self._model_type, plan.vocabulary_report
        result.notes += dict.fromkeys(self._notes)
        result.bytes_per_parameter = self._bytes / self._dense.own_parameters
        result.reconstructed, result.softened = plan.reconstructed, self._softened
        result.reasons = reconstruction.in_words(plan.reconstructed) + last_norm.in_words(self._softened)
        seen = {(group.layer, group.kind): group.seen for group in plan.groups}
        for group in result.groups:
            group.seen = seen.get((group.layer, group.kind))
            group.kept = self._stay[group.layer, group.kind].tolist()
        result.warnings += self._too_few_tokens(result)
        result.count(self.structure, size_of(self.model))
        return result

    def _too_few_tokens(self, plan: PruningPlan) -> list[str]:
        """What is to be said of units to which a router sent too little of the calibration text."""
        few = [min(group.seen) for group in plan.groups if group.seen and min(group.seen) < ENOUGH_TOKENS]
        if not few:
            return []
        size = self.config.calibration.num_samples * self.config.calibration.length
        wanted = f"{size * -(-ENOUGH_TOKENS // min(few)):,}" if min(few) else f"many more than {size:,}"
        if self.config.calibration.image_column is not None:  # rows of any length
            wanted = "many more"
        return [
            f"experts of {len(few)} layers got fewer than {ENOUGH_TOKENS} calibration tokens, the one with fewest "
            f"{min(few)}, which is little to rank and to re-fit them by: {wanted} tokens of calibration text would do"
        ]


def _check_merging(structure: ModelStructure, plan: PruningPlan) -> None:
    """Refuses to merge experts whose neurons are not known."""
    for layer in structure.layers:
        routed = any(group.reader is None and group.kind in plan.of_layer(layer.index) for group in layer.groups)
        if routed and not any(group.in_experts for group in layer.groups):
            raise UnsupportedModelError(
                f"The experts of layer {layer.index} cannot be merged, since it is not known what their neurons are: "
                f"{'; '.join(structure.notes)}. Set merge_experts=False."
            )


def check_plan(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> None:
    """Refuses a plan that was made for another model, or whose decisions contradict each other.

    The type of the model, its layers and its parameters have to be those that the plan records, whatever it decides:
    a plan that only names layers would fit any model with as many. Of a plan written by hand the number of layers
    alone, which the first plans lack, may be left at 0.

    Raises:
        ConfigurationError: Says which model the plan is for and which one this is, or what in it cannot be.
    """
    for decision in plan.shared:
        if decision.before != (size := SIZED[decision.kind].group(model, structure).size):
            label = KINDS[decision.kind].label
            raise ConfigurationError(f"The plan is for a {label} of {decision.before}; this model has {size}.")
    this = PruningPlan.from_counts(structure, {}, model_type=model.config.model_type, layout=plan.layout)
    names = ["model_type", "parameters_before", "matrix_parameters_before", "neurons_before"]
    names += ["num_layers"] if plan.num_layers else []
    if any(getattr(plan, name) != getattr(this, name) for name in names):
        raise ConfigurationError(f"The plan is for {_in_words(plan)}; this is {_in_words(this)}.")
    if plan.layout not in LAYOUTS:
        raise ConfigurationError(f"The plan has the layout {plan.layout!r}; there are {', '.join(LAYOUTS)}.")
    normalised(plan.dropped, structure)
    groups = {group.key: group for group in structure.groups}
    times = Counter((decision.layer, decision.kind) for decision in plan.groups)
    for decision in plan.groups:
        layer, kind, group = decision.layer, decision.kind, groups.get((decision.layer, decision.kind))
        if group is None or group.size != decision.before:
            raise ConfigurationError(
                f"The plan is for a {plan.model_type} with {decision.before} {kind} in layer "
                f"{layer}; this model has {group.size if group else 'none'}."
            )
        if times[group.key] > 1:
            raise ConfigurationError(f"The plan decides about {kind} of layer {layer} {times[group.key]} times.")
        if plan.is_dropped(layer, kind):
            raise ConfigurationError(f"The plan drops the {kind} of layer {layer} and keeps some of them.")
        if KINDS[kind].within is None:  # others are compared with what holds them
            _check_blocks(group, decision)
    for layer in structure.layers:
        _check_heads(layer, plan.of_layer(layer.index))


def _in_words(plan: PruningPlan) -> str:
    layers = f"{plan.num_layers}-layer " if plan.num_layers else ""
    return (
        f"a {layers}{plan.model_type} of {plan.parameters_before:,} parameters, {plan.matrix_parameters_before:,} of "
        f"them in matrices that multiply each token, with {plan.neurons_before:,} MLP neurons"
    )


def _check_blocks(group: Group, decision: Decision) -> None:
    """Refuses a decision that leaves too few units, or not the same number in each block of a group."""
    each = Counter(number // group.whole for number in decision.kept or ())
    uneven = decision.keep % group.blocks or (decision.kept and len({each[b] for b in range(group.blocks)}) > 1)
    if uneven or decision.keep < group.least:
        raise ConfigurationError(
            f"The plan keeps {decision.kept or decision.keep} of {group.size} {group.kind} of layer {group.layer}; at "
            f"least {group.least} must stay, the same number in each of {group.blocks} blocks."
        )


def _check_heads(layer: LayerStructure, decisions: dict[str, Decision]) -> None:
    """Refuses query heads that are not evenly in the KV groups that stay."""
    heads, groups = decisions.get(QUERIES), decisions.get(GROUPS)
    if heads is None:
        return
    number = groups.keep if groups else layer.attention.kv_heads
    if heads.keep % number or heads.keep // number > layer.attention.rep:
        raise ConfigurationError(
            f"The plan keeps {heads.keep} query heads in {number} KV groups of layer {layer.index}; every group "
            f"must keep the same number, at most {layer.attention.rep}."
        )
    if heads.kept is None:
        return
    alive = Counter(head // layer.attention.rep for head in heads.kept)
    named = sorted(alive) if groups is None or groups.kept is None else groups.kept
    if set(alive.values()) != {heads.keep // number} or sorted(alive) != named or len(alive) != number:
        raise ConfigurationError(
            f"The plan keeps the query heads {heads.kept} of layer {layer.index}; every KV group that stays must "
            f"keep {heads.keep // number}, the others none."
        )
