"""Carries plans out: cuts the hidden size, drops layers, cuts heads and neurons, and says what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from .config import PruningConfig
from .criteria import make_criterion
from .model.describe import target_of
from .model.hidden_size import shrunk_config_model
from .model.rebuild import rebuild
from .model.structure import ModelStructure
from .model.surgery import Kept, drop
from .model.target import Target
from .plan import PruningPlan
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
    _dense: ModelStructure = field(init=False)
    _model_type: str = field(init=False)  # of the dense model: that of the pruned one may be another
    _size: int = field(init=False)  # bytes of the dense model
    _notes: list[str] = field(init=False, default_factory=list)
    _inner: ModelStructure = field(init=False)  # after the hidden size was cut, before anything else
    _plan: PruningPlan | None = field(init=False, default=None)
    _stay: Kept = field(init=False)
    _target: Target | None = field(init=False, default=None)  # of the plan, where the model is still the dense one

    def __post_init__(self) -> None:
        self._dense = self._inner = self.structure
        self._model_type, self._size = self.model.config.model_type, size_of(self.model)
        self._stay = {(group.layer, group.kind): torch.arange(group.size) for group in self.structure.groups}

    def carry_out(self, plan: PruningPlan, known: Survey | None = None) -> None:
        """Cuts the model as planned.

        Args:
            plan: What goes; units that it does not name are chosen.
            known: What was found out about the model already.
        """
        self._prove(plan)
        self._plan = plan
        if plan.hidden is not None:
            data_free = plan.hidden.kept is not None or self.config.hidden_criterion == "magnitude"
            tokens = None if data_free and not self.config.compensation else self.tokens()
            kept = None if plan.hidden.kept is None else torch.tensor(plan.hidden.kept)
            self.model, kept = cut_hidden(self.model, self.structure, plan.hidden.keep, self.config, tokens, kept)
            plan.hidden.kept = None if kept is None else kept.tolist()
            self.structure = self._inner = ModelStructure.of(self.model)
        if plan.hidden is None or plan.groups or plan.dropped:
            self._cut(plan, known)

    def _prove(self, plan: PruningPlan) -> None:
        """Builds everything that will come out, without weights; raises what would be raised in the middle."""
        shell, structure = self.model, self.structure
        if plan.hidden is not None:
            shell = shrunk_config_model(self.model, plan.hidden.keep, self.structure)
            structure = ModelStructure.of(shell)
        target = target_of(shell, structure, plan)
        ModelStructure.of(target.skeleton(), whole=False)
        self._target = target if plan.hidden is None else None

    def _cut(self, plan: PruningPlan, known: Survey | None) -> None:
        """Cuts layers, heads and neurons as planned."""
        target = self._target or target_of(self.model, self.structure, plan)
        criterion = make_criterion(self.config)
        if known is None and criterion.needs_gradients and not plan.chosen:
            known = survey(self.model, self.structure, self.config, self.tokens)
        known = known or Survey()
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
        plan, dense = self._plan, self._dense if self._plan.hidden else None
        result = describe(
            self.model, self._inner, counts, ratio, plan.layout, plan.dropped, plan.hidden, dense,
            self.config.align_to, self.config.round_to,
        )  # fmt: skip
        result.model_type = self._model_type
        result.notes += dict.fromkeys(self._notes)
        result.bytes_per_parameter = self._size / self._dense.total_parameters
        for group in result.groups:
            group.kept = self._stay[group.layer, group.kind].tolist()
        result.count(self.structure, size_of(self.model))
        return result
