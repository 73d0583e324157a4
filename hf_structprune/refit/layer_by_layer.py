"""Carries a plan out on the weights, layer by layer: choose the units, re-fit what reads them, cut, go on.

What reads the units is re-fitted in place with zeros in the columns that go, so that the layer can still be run; when
the text has passed it, the units are taken out of all its tensors.
Layers and sublayers that will be dropped are passed by; with error correction the consumers around them are re-fitted
to bring the hidden states back to those of the dense model.
"""

from __future__ import annotations

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import PruningConfig
from ..criteria import Criterion, Scoring
from ..criteria.base import best_units
from ..model.structure import Group, LayerStructure, ModelStructure, decoder_layers, matrix
from ..model.surgery import Kept, cut_groups, mask_sublayers
from ..plan import PruningPlan
from ..stats.gradients import Salience
from ..stats.moments import InputStatistics
from ..stats.stream import LayerStream
from ..units import KINDS, DepthKind, kinds_of
from ..units.depth import LAYERS
from .reader import by_consumer, consume, kept_columns, refitted, write_columns


Scores = dict[tuple[int, str], torch.Tensor]


def new_stream(
    model: PreTrainedModel, structure: ModelStructure, tokens: torch.Tensor, config: PruningConfig, dense: bool = False
) -> LayerStream:
    """A stream of the calibration tokens that can replay the modules of all groups."""
    parents = dict.fromkeys((group.reader.module, group.parent) for group in structure.groups)
    layers = decoder_layers(model, structure.family)
    return LayerStream(model, layers, tokens, config.calibration.batch_size, parents, dense)


@torch.no_grad()
def score_inputs(
    model: PreTrainedModel,
    structure: ModelStructure,
    criterion: Criterion,
    config: PruningConfig,
    tokens: torch.Tensor,
    groups: list[Group],
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
    notes: list[str] | None = None,
) -> Kept:
    """Chooses the units that stay, re-fits what reads them and cuts the others out, in place.

    Afterwards the tensors are right; head counts and widths in modules and configuration are the business of
    `rebuild.rebuild`, and what is dropped is still there.

    Args:
        model: The model; its tensors change.
        structure: Its coupled groups.
        plan: How many units stay; units that it names are taken as they are.
        criterion: Ranks the units that the plan does not name.
        config: Compensation and calibration settings.
        tokens: Calibration tokens, where inputs are looked at.
        scores: Scores that are known already, by `(layer, kind)`.
        salience: Reduced gradients, for gradient criteria.
        notes: What was asked for and could not be done is added here.

    Returns:
        The units that stay, by `(layer, kind)`.
    """
    compression = _Compression(model, structure, plan, criterion, config, scores or {}, salience)
    kept = compression.run(tokens)
    if compression.uncorrected and notes is not None:
        notes.append(
            "error correction: the layers of this model do not simply add up, so that re-fits look at their own "
            "outputs only"
        )
    return kept


class _Compression:
    """The state of one run of `compress`."""

    def __init__(self, model, structure, plan, criterion, config, scores, salience) -> None:
        self.model, self.structure, self.plan = model, structure, plan
        self.criterion, self.config, self.scores, self.salience = criterion, config, scores, salience
        self.by_inputs = criterion.needs_inputs and not plan.chosen and not scores
        self.needs_gram = config.compensation or (self.by_inputs and criterion.needs_gram)
        self.first, self.last = _reach(plan)
        self.stream: LayerStream | None = None
        self.correcting = False
        self.uncorrected = False  # though it was asked for
        self.error: list[torch.Tensor] = []  # what the hidden states lack of the dense model's, float32
        self.outputs: list[list[torch.Tensor]] = []  # of the layer's consumers so far
        self.weight_unit: float | None = None
        self.kept: Kept = {}

    def run(self, tokens: torch.Tensor | None) -> Kept:
        looks = bool(self.plan.groups) and (self.needs_gram or self.by_inputs)
        correcting = bool(self.plan.groups or self.plan.dropped) and corrects(self.config)
        if looks or correcting:
            self.stream = new_stream(self.model, self.structure, tokens, self.config, dense=correcting)
            self.correcting = correcting and self.stream.additive
            self.uncorrected = correcting and not self.correcting
            self.stream = self.stream if looks or self.correcting else None
        if self.correcting:
            self._pass_dropped(-1)
        layers = self.structure.layers if self.correcting else self.structure.layers[: self.last + 1]
        layers = [layer for layer in layers if layer.index not in self.plan.dropped.get(LAYERS, ())]
        for layer in tqdm(layers, desc="Pruning", disable=not logging.is_progress_bar_enabled()):
            self._layer(layer)
            if self.stream and layer is not layers[-1]:
                self.stream.advance(layer.index)
            cut_groups(self.model, layer.groups, self.kept)
        return self.kept

    def _layer(self, layer: LayerStructure) -> None:
        planned = self.plan.of_layer(layer.index)
        started = self.correcting and layer.index >= self.first
        consumers = by_consumer(
            [g for g in layer.groups if (g.kind in planned or started) and not self.plan.is_dropped(g.layer, g.kind)]
        )
        dense, ahead = {}, None
        if self.stream is not None:
            self.stream.enter(layer.index)
            self.outputs, self.weight_unit = [], None
        if self.correcting:
            dense, ahead = self._step_dense(layer, list(consumers))
        mask_sublayers(self.model, self.structure, _sublayers_of(self.plan, layer.index))
        for consumer, groups in consumers.items():
            cut = [group for group in groups if group.kind in planned]
            if self.stream is None:
                self._choose(layer, cut, None)
                continue
            if ahead is not None and consumer == list(consumers)[-1]:
                for error, contribution in zip(self.error, ahead, strict=True):
                    error.add_(contribution)
            self._consumer(layer, consumer, groups[0].parent, cut, dense.pop(consumer, None))

    def _step_dense(
        self, layer: LayerStructure, consumers: list[str]
    ) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor] | None]:
        """Carries the dense hidden states through a layer and the dropped ones behind it.

        `self.error` becomes what the hidden states that enter the layer lack, the dropped layers before the first
        included, and what the sublayers would add that the layer loses.

        Returns:
            Outputs of the layer's consumers in the dense model, and what the dropped layers behind it add, which the
            layer's last consumer is to anticipate; `None` if none are dropped there.
        """
        stream = self.stream
        lost = [layer.sublayer(kind).consumer for kind in _sublayers_of(self.plan, layer.index)]
        self.error = _difference(stream, stream.dense_hidden, stream.hidden)
        dense = stream.step_dense(layer.index, [*consumers, *filter(None, lost)])
        for name in filter(None, lost):
            for error, output in zip(self.error, dense.pop(name), strict=True):
                error.add_(output)
        if layer.index + 1 not in self.plan.dropped.get(LAYERS, ()):
            return dense, None
        before = stream.copy(stream.dense_hidden)
        self._pass_dropped(layer.index)
        stream.enter(layer.index)
        return dense, _difference(stream, stream.dense_hidden, before)

    def _pass_dropped(self, index: int) -> None:
        """Carries the dense hidden states through the dropped layers that follow layer `index`."""
        while index + 1 in self.plan.dropped.get(LAYERS, ()):
            index += 1
            self.stream.enter(index)
            self.stream.step_dense(index, [])

    def _consumer(
        self,
        layer: LayerStructure,
        consumer: str,
        parent: str,
        cut: list[Group],
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
                output = consume(module, x, torch.arange(width)).float()
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
            output.copy_(consume(module, inputs[number], columns))
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

    def _choose(self, layer: LayerStructure, groups: list[Group], statistics: InputStatistics | None) -> None:
        planned = self.plan.of_layer(layer.index)
        for group in groups:
            key, decision = (group.layer, group.kind), planned[group.kind]
            if decision.kept is not None:
                self.kept[key] = torch.tensor(decision.kept)
                continue
            # Query heads stay only in KV groups that do; where all of these stay, there is nothing to rank.
            blocks = self.kept.get((layer.index, KINDS[group.kind].within))
            size = group.size // group.blocks
            if blocks is not None and decision.keep == len(blocks) * size:
                self.kept[key] = torch.arange(group.size).view(group.blocks, size)[blocks.cpu()].flatten()
                continue
            score = self.scores.get(key)
            if score is None:
                drop = group.size - decision.keep
                score = self.criterion.score(Scoring(group, self.model, statistics, self.salience, drop))
            self.kept[key] = best_units(score, group, decision.keep, blocks)


def corrects(config: PruningConfig) -> bool:
    """Whether re-fits also try to undo what earlier cuts have left in the hidden states."""
    return config.compensation and config.error_correction > 0


def _reach(plan: PruningPlan) -> tuple[int, int]:
    """The first layer that a plan changes, the one in front of dropped layers included, and the last."""
    cut = [group.layer for group in plan.groups]
    cut += [layer for kind, layers in plan.dropped.items() if kind != LAYERS for layer in layers]
    dropped = plan.dropped.get(LAYERS, [])
    first = min([*cut, *(max(0, layer - 1) for layer in dropped)], default=0)
    return first, max([*cut, *dropped], default=-1)


def _sublayers_of(plan: PruningPlan, layer: int) -> dict[str, list[int]]:
    """The sublayers that go from a layer, in the form of `plan.dropped`."""
    return {kind: [layer] for kind in kinds_of(DepthKind, sublayer=True) if layer in plan.dropped.get(kind, ())}


def _difference(stream: LayerStream, states: list[torch.Tensor], others: list[torch.Tensor]) -> list[torch.Tensor]:
    """`states - others` in float32."""
    result = stream.blank(states[0], torch.float32)
    for room, state, other in zip(result, states, others, strict=True):
        room.copy_(state).sub_(other)
    return result
