"""Carries a plan out on the weights, layer by layer: choose the units, re-fit the consumer, go on to the next layer.

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
from .plan import PruningPlan
from .selection import best_units
from .statistics import InputStatistics
from .stream import LayerStream
from .structure import CoupledGroup, LayerStructure, ModelStructure, decoder_layers, matrix
from .surgery import Kept, dropped


Scores = dict[tuple[int, str], torch.Tensor]


def new_stream(
    model: PreTrainedModel, structure: ModelStructure, tokens: torch.Tensor, config: PruningConfig
) -> LayerStream:
    """A stream of the calibration tokens that can replay the modules of all groups."""
    parents = dict.fromkeys((group.consumer.module, group.parent) for group in structure.groups)
    layers = decoder_layers(model, structure.family)
    return LayerStream(model, layers, tokens, config.calibration.batch_size, parents)


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
        for consumer, members in _by_consumer([g for g in groups if g.layer == layer.index]).items():
            statistics = _statistics(stream.capture(layer.index, consumer), criterion.needs_gram)
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
    salience: dict | None = None,
) -> Kept:
    """Chooses the units that stay and re-fits the consumers of those that go, in place.

    Args:
        model: The model; consumers of planned groups change.
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
    scores = scores or {}
    choose_by_inputs = criterion.needs_inputs and not plan.chosen and not scores
    needs_gram = config.compensation or (choose_by_inputs and criterion.needs_gram)
    stream = new_stream(model, structure, tokens, config) if needs_gram or choose_by_inputs else None
    last = max((group.layer for group in plan.groups), default=-1)
    kept: Kept = {}
    bar = tqdm(structure.layers[: last + 1], desc="Pruning", disable=not logging.is_progress_bar_enabled())
    for layer in bar:
        planned = plan.of_layer(layer.index)
        for consumer, members in _by_consumer([g for g in layer.groups if g.kind in planned]).items():
            inputs = stream.capture(layer.index, consumer) if stream else None
            statistics = _statistics(inputs, needs_gram) if stream else None
            for group in members:
                key = (group.layer, group.kind)
                if planned[group.kind].kept is not None:
                    kept[key] = torch.tensor(planned[group.kind].kept)
                    continue
                drop = group.num_units - planned[group.kind].keep
                score = scores.get(key)
                if score is None:
                    score = criterion.score(Scoring(group, model, statistics, salience, drop))
                kept[key] = best_units(score, group, planned[group.kind].keep, _alive_blocks(group, layer, kept))
            columns = _kept_columns(members, kept, matrix(model.get_submodule(consumer)).shape[1])
            if stream:
                weight = _new_weight(model.get_submodule(consumer), statistics, columns, config)
                _write(model.get_submodule(consumer), weight, columns)
                module = model.get_submodule(consumer)
                stream.replace(members[0].parent, [_consume(module, x, columns) for x in inputs])
        if stream and layer.index < last:
            stream.advance(layer.index)
    return kept


def _by_consumer(groups: list[CoupledGroup]) -> dict[str, list[CoupledGroup]]:
    """Groups of one layer by the module that consumes them, KV groups before the query heads in them."""
    consumers: dict[str, list[CoupledGroup]] = {}
    for group in groups:
        consumers.setdefault(group.consumer.module, []).append(group)
    return consumers


def _statistics(inputs: list[torch.Tensor], gram: bool) -> InputStatistics:
    statistics = InputStatistics(inputs[0].shape[-1], gram, inputs[0].device)
    for batch in inputs:
        statistics.update(batch)
    return statistics


def _alive_blocks(group: CoupledGroup, layer: LayerStructure, kept: Kept) -> torch.Tensor | None:
    """KV groups that stay, for the choice of query heads in them."""
    return kept.get((layer.index, "kv_groups")) if group.kind == "query_heads" else None


def _kept_columns(groups: list[CoupledGroup], kept: Kept, width: int) -> torch.Tensor:
    stay = torch.ones(width, dtype=torch.bool)
    for group in groups:
        stay[group.consumer.index[dropped(group, kept[group.layer, group.kind])].flatten()] = False
    return stay.nonzero().squeeze(1)


def _new_weight(
    module: nn.Module, statistics: InputStatistics, columns: torch.Tensor, config: PruningConfig
) -> torch.Tensor:
    """The consumer's weight on the columns that stay, re-fitted if compensation is on."""
    weight = matrix(module)
    columns = columns.to(weight.device)
    if not config.compensation:
        return weight[:, columns]
    damping = config.damping
    if damping is None and not statistics.has_held_out:
        damping = DEFAULT_DAMPING
    elif damping is None:
        damping = choose_damping(weight.float(), statistics.gram_fit, statistics.gram_held_out, columns)
    return refit(weight, statistics.gram, columns, damping).to(weight.dtype)


def _write(module: nn.Module, weight: torch.Tensor, columns: torch.Tensor) -> None:
    full = matrix(module)
    full.zero_()
    full[:, columns.to(full.device)] = weight


def _consume(module: nn.Module, inputs: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Outputs of the consumer from the inputs that stay."""
    columns = columns.to(inputs.device)
    return nn.functional.linear(inputs[..., columns], matrix(module)[:, columns], module.bias)
