"""Carries plans out: cuts the hidden size, drops layers, cuts heads and neurons, and says what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from .config import PruningConfig
from .criteria import Criterion, make_criterion
from .model.describe import target_of
from .model.hidden_size import shrunk_target
from .model.rebuild import rebuild
from .model.structure import ModelStructure
from .model.surgery import Kept, drop
from .model.target import Target
from .plan import Decision, PruningPlan
from .planner import describe, size_of
from .refit.channels import cut_hidden
from .refit.layer_by_layer import compress, corrects
from .stats.survey import Survey, survey
from .units import KINDS


@dataclass
class Execution:
    """A model on its way from dense to pruned.

    Attributes:
        model: The model as it is now.
        structure: Its coupled groups.
        config: How to cut.
        tokens: Loads the calibration tokens; called only where they are needed.
    """

    model: PreTrainedModel
    structure: ModelStructure
    config: PruningConfig
    tokens: Callable[[], torch.Tensor]
    _notes: list[str] = field(init=False, default_factory=list)
    _plan: PruningPlan | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._dense = self._narrow = self.structure  # narrow: after the hidden size was cut, before anything else
        # Of the dense model: the pruned one may be of another type.
        self._model_type, self._bytes = self.model.config.model_type, size_of(self.model)
        self._stay: Kept = {group.key: torch.arange(group.size) for group in self.structure.groups}

    def carry_out(self, plan: PruningPlan, known: Survey | None = None) -> None:
        """Cuts the model as planned.

        Args:
            plan: What goes; units that it does not name are chosen.
            known: What was found out about the model already.
        """
        self._plan, target = plan, self._prove(plan)
        criterion = make_criterion(self.config)
        if known is None and criterion.needs_gradients and not plan.chosen:
            known = survey(self.model, self.structure, self.config, self.tokens)
        if plan.hidden is not None:
            self._cut_hidden(plan.hidden)
        if target is None and (plan.groups or plan.dropped):
            target = target_of(self.model, self.structure, plan)
        if target is not None:
            self._cut(plan, target, criterion, known or Survey())

    def _prove(self, plan: PruningPlan) -> Target | None:
        """Builds everything that will come out, without weights; raises what would be raised in the middle.

        Returns:
            What comes out; `None` if the hidden size is cut first.
        """
        shell, structure = self.model, self.structure
        if plan.hidden is not None:
            shell = shrunk_target(self.model, self.structure, plan.hidden.keep).skeleton()
            structure = ModelStructure.of(shell)
        target = target_of(shell, structure, plan)
        ModelStructure.of(target.skeleton(), whole=False)
        return target if plan.hidden is None else None

    def _cut_hidden(self, decision: Decision) -> None:
        """Cuts the residual stream, and writes into the decision which channels stay."""
        kept = None if decision.kept is None else torch.tensor(decision.kept)
        data_free = kept is not None or self.config.hidden_criterion == "magnitude"
        tokens = None if data_free and not self.config.compensation else self.tokens()
        self.model, kept = cut_hidden(self.model, self.structure, decision.keep, self.config, tokens, kept)
        decision.kept = None if kept is None else kept.tolist()
        self.structure = self._narrow = ModelStructure.of(self.model)

    def _cut(self, plan: PruningPlan, target: Target, criterion: Criterion, known: Survey) -> None:
        """Cuts layers, heads and neurons."""
        looks = self.config.compensation or (criterion.needs_inputs and not plan.chosen and known.scores is None)
        tokens = self.tokens() if looks and (plan.groups or (plan.dropped and corrects(self.config))) else None
        kept = compress(
            self.model, self.structure, plan, criterion, self.config, tokens, known.scores, known.salience, self._notes
        )
        drop(self.model, self.structure, plan.dropped)
        self.model = rebuild(self.model, target)
        self.structure = ModelStructure.of(self.model, whole=False)
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
            dropped=plan.dropped, hidden=plan.hidden, dense=self._dense if plan.hidden else None,
        )  # fmt: skip
        result.model_type = self._model_type
        result.notes += dict.fromkeys(self._notes)
        result.bytes_per_parameter = self._bytes / self._dense.total_parameters
        for group in result.groups:
            group.kept = self._stay[group.layer, group.kind].tolist()
        result.count(self.structure, size_of(self.model))
        return result
