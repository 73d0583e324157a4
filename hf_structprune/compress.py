"""Carries a plan out on the weights, layer by layer: choose the units, re-fit the consumers, go on to the next layer.

Consumers are re-fitted in place with zeros in the columns that will go; `surgery.cut_units` takes them out afterwards.
"""

from __future__ import annotations

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .compensation import DEFAULT_DAMPING, choose_damping, refit
from .configuration import PruningConfig
from .criteria import Criterion, Scoring
from .gradients import Salience
from .plan import PruningPlan
from .selection import best_units
from .statistics import InputStatistics
from .stream import LayerStream
from .structure import CoupledGroup, LayerStructure, ModelStructure, decoder_layers, matrix
from .surgery import Kept, dropped


Scores = dict[tuple[int, str], torch.Tensor]


def new_stream(
    model: PreTrainedModel, structure: ModelStructure, tokens: torch.Tensor, config: PruningConfig, dense: bool = False
) -> LayerStream:
    """A stream of the calibration tokens that can replay the modules of all groups."""
    parents = dict.fromkeys((group.consumer.module, group.parent) for group in structure.groups)
    layers = decoder_layers(model, structure.family)
    return LayerStream(model, layers, tokens, config.calibration.batch_size, parents, dense)


@torch.no_grad()
def score_inputs(
    model: PreTrainedModel,
    structure: ModelStructure,
    criterion: Criterion,
    config: PruningConfig,
    tokens: torch.Tensor,
    groups: list[CoupledGroup],
) -> Scores:
    """Scores units by what the consumers receive in the model as it is; changes nothing.

    For allocations that compare layers. One forward pass, one layer at a time.
    """
    stream = new_stream(model, structure, tokens, config)
    scores: Scores = {}
    for layer in tqdm(structure.layers, desc="Scoring", disable=not logging.is_progress_bar_enabled()):
        for consumer, members in by_consumer([g for g in groups if g.layer == layer.index]).items():
            inputs = stream.capture(layer.index, consumer)
            statistics = InputStatistics(inputs[0].shape[-1], criterion.needs_gram, device=inputs[0].device)
            for batch in inputs:
                statistics.update(batch)
            for group in members:
                scores[group.layer, group.kind] = criterion.score(Scoring(group, model, statistics)).cpu()
        stream.advance(layer.index)
    return scores


@torch.no_grad()
def compress(
    model: PreTrainedModel,
    structure: ModelStructure,
    plan: PruningPlan,
    criterion: Criterion,
    config: PruningConfig,
    tokens: torch.Tensor | None = None,
    scores: Scores | None = None,
    salience: Salience | None = None,
) -> Kept:
    """Chooses the units that stay and re-fits the consumers, in place.

    Args:
        model: The model; its consumers change.
        structure: Its coupled groups.
        plan: How many units stay; units that it names are taken as they are.
        criterion: Ranks the units that the plan does not name.
        config: Compensation and calibration settings.
        tokens: Calibration tokens, where inputs are looked at.
        scores: Scores that are known already, by `(layer, kind)`.
        salience: Reduced gradients, for gradient criteria.

    Returns:
        The units that stay, by `(layer, kind)`.
    """
    return _Compression(model, structure, plan, criterion, config, scores or {}, salience).run(tokens)


class _Compression:
    """The state of one run of `compress`."""

    def __init__(self, model, structure, plan, criterion, config, scores, salience) -> None:
        self.model, self.structure, self.plan = model, structure, plan
        self.criterion, self.config, self.scores, self.salience = criterion, config, scores, salience
        self.by_inputs = criterion.needs_inputs and not plan.chosen and not scores
        self.needs_gram = config.compensation or (self.by_inputs and criterion.needs_gram)
        self.last = max((group.layer for group in plan.groups), default=-1)
        self.stream: LayerStream | None = None
        self.correcting = False
        self.error: list[torch.Tensor] = []  # what the hidden states lack of the dense model's, float32
        self.outputs: list[list[torch.Tensor]] = []  # of the layer's consumers so far
        self.weight_unit: float | None = None
        self.kept: Kept = {}

    def run(self, tokens: torch.Tensor | None) -> Kept:
        if self.plan.groups and (self.needs_gram or self.by_inputs):
            correcting = self.config.compensation and self.config.error_correction > 0
            self.stream = new_stream(self.model, self.structure, tokens, self.config, dense=correcting)
            self.correcting = correcting and self.stream.additive
        layers = self.structure.layers if self.correcting else self.structure.layers[: self.last + 1]
        for layer in tqdm(layers, desc="Pruning", disable=not logging.is_progress_bar_enabled()):
            self._layer(layer)
            if self.stream and layer is not layers[-1]:
                self.stream.advance(layer.index)
        return self.kept

    def _layer(self, layer: LayerStructure) -> None:
        planned = self.plan.of_layer(layer.index)
        started = self.correcting and layer.index >= min(group.layer for group in self.plan.groups)
        consumers = by_consumer([g for g in layer.groups if g.kind in planned or started])
        dense = {}
        if self.stream is not None:
            self.stream.enter(layer.index)
            self.outputs, self.weight_unit = [], None
        if self.correcting:
            self.error = self.stream.blank(self.stream.hidden[0], torch.float32)
            for error, before, now in zip(self.error, self.stream.dense_hidden, self.stream.hidden, strict=True):
                error.copy_(before).sub_(now)
            dense = self.stream.step_dense(layer.index, list(consumers))
        for consumer, groups in consumers.items():
            cut = [group for group in groups if group.kind in planned]
            if self.stream is None:
                self._choose(layer, cut, None)
                continue
            self._consumer(layer, consumer, groups[0].parent, cut, dense.pop(consumer, None))

    def _consumer(
        self,
        layer: LayerStructure,
        consumer: str,
        parent: str,
        cut: list[CoupledGroup],
        dense: list[torch.Tensor] | None,
    ) -> None:
        """Captures the inputs of a consumer, chooses what stays of them and re-fits it."""
        module = self.model.get_submodule(consumer)
        width = matrix(module).shape[1]
        inputs = self.stream.capture(layer.index, consumer)
        size = dense[0].shape[-1] if dense is not None else 0
        statistics = InputStatistics(width, self.needs_gram, size, inputs[0].device)
        for number, x in enumerate(inputs):
            target = weights = None
            if self.needs_gram and (dense is not None or self.config.token_weighting):
                output = _consume(module, x, torch.arange(width)).float()
                if dense is not None:
                    lacking = self.error[number] + dense[number].float() - output
                    target = self.config.error_correction * lacking
                if self.config.token_weighting:
                    weights = self._weights(self._hidden(number), output)
            statistics.update(x, target, weights)
        self._choose(layer, cut, statistics)
        columns = kept_columns(cut, self.kept, width)
        write_columns(module, refitted(module, statistics, columns, self.config), columns)
        outputs = self.stream.blank(self.stream.hidden[0])
        for number, output in enumerate(outputs):
            output.copy_(_consume(module, inputs[number], columns))
            if dense is not None:
                self.error[number].add_(dense[number]).sub_(output)
        if self.stream.additive:
            self.outputs.append(outputs)
        self.stream.replace(parent, outputs)

    def _hidden(self, number: int) -> torch.Tensor:
        """The hidden states of a batch within the layer, what its consumers have added so far included."""
        return sum((outputs[number] for outputs in self.outputs), self.stream.hidden[number])

    def _weights(self, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """`1 / ||h||^2` of the hidden states `h` that an output is added to, relative to the first batch's mean."""
        state = hidden.float() + output if self.stream.additive else hidden.float()
        weights = 1 / state.square().sum(-1).clamp_min(1e-12)
        self.weight_unit = self.weight_unit or float(weights.mean())
        return weights / self.weight_unit

    def _choose(self, layer: LayerStructure, groups: list[CoupledGroup], statistics: InputStatistics | None) -> None:
        planned = self.plan.of_layer(layer.index)
        for group in groups:
            key, decision = (group.layer, group.kind), planned[group.kind]
            if decision.kept is not None:
                self.kept[key] = torch.tensor(decision.kept)
                continue
            score = self.scores.get(key)
            if score is None:
                drop = group.num_units - decision.keep
                score = self.criterion.score(Scoring(group, self.model, statistics, self.salience, drop))
            # Query heads stay only in KV groups that do.
            blocks = self.kept.get((layer.index, "kv_groups")) if group.kind == "query_heads" else None
            self.kept[key] = best_units(score, group, decision.keep, blocks)


def refitted(
    module: nn.Module, statistics: InputStatistics, columns: torch.Tensor, config: PruningConfig
) -> torch.Tensor:
    """A consumer's weight on the columns that stay, shape (out, columns), re-fitted if compensation is on."""
    weight = matrix(module)
    columns = columns.to(weight.device)
    if not config.compensation:
        return weight[:, columns]
    damping = config.damping
    if damping is None and not statistics.held_out.tokens:
        damping = DEFAULT_DAMPING
    elif damping is None:
        damping = choose_damping(weight.float(), statistics.fit, statistics.held_out, columns)
    moments = statistics.moments
    return refit(weight, moments.gram, columns, damping, moments.target).to(weight.dtype)


def by_consumer(groups: list[CoupledGroup]) -> dict[str, list[CoupledGroup]]:
    """Groups of one layer by the module that consumes them, KV groups before the query heads in them."""
    consumers: dict[str, list[CoupledGroup]] = {}
    for group in groups:
        consumers.setdefault(group.consumer.module, []).append(group)
    return consumers


def kept_columns(groups: list[CoupledGroup], kept: Kept, width: int) -> torch.Tensor:
    """Columns of a consumer that stay when units of these groups go, ascending."""
    stay = torch.ones(width, dtype=torch.bool)
    for group in groups:
        stay[group.consumer.index[dropped(group, kept[group.layer, group.kind])].flatten()] = False
    return stay.nonzero().squeeze(1)


def write_columns(module: nn.Module, weight: torch.Tensor, columns: torch.Tensor) -> None:
    """Sets these columns of a linear map and zeroes the others."""
    full = matrix(module)
    weight = weight.clone()  # may be a view of what is zeroed next
    full.zero_()
    full[:, columns.to(full.device)] = weight


def _consume(module: nn.Module, inputs: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Outputs of the consumer from the inputs that stay."""
    columns = columns.to(inputs.device)
    return nn.functional.linear(inputs[..., columns], matrix(module)[:, columns], module.bias)
