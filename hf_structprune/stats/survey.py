"""What is found out about the whole model before the first layer is cut: scores, sensitivities, gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..criteria import Criterion, Scoring, make_criterion
from ..criteria.base import best_units
from ..model.experts import without_experts
from ..model.groups import Kept
from ..model.measuring import measures
from ..model.structure import Group, ModelStructure, matrix
from ..progress import tqdm
from ..refit.reader import TokenWeights, consume, kept_columns, refitted, write_columns
from .gradients import Salience, gate_salience, loss_metrics, taylor_salience
from .moments import InputStatistics, is_held_out
from .routing import RoutingStatistics, routing_statistics
from .seen import Calibration
from .stream import LayerStream


Scores = dict[tuple[int, str], torch.Tensor]
Sensitivity = dict[tuple[int, str], float]

PROBES = (0.2, 0.45)  # shares of a group that are cut to probe it
_EVERY = 4  # predictions are compared at each so many-th token


@measures
def measure_sensitivity(
    model: PreTrainedModel, structure: ModelStructure, criterion: Criterion, config: PruningConfig,
    tokens: Calibration, groups: list[Group], salience: Salience | None = None,
) -> Sensitivity:  # fmt: skip
    """For every group the coefficient `a` of `KL(dense || cut) = a * share^2`, where `share` of its units go.

    Each group alone is cut at two shares, its consumer re-fitted, and the rest of the model run on held-out sequences;
    `a` is the geometric mean of the two values of `KL / share^2`. The model is left as it was.

    Args:
        tokens: Calibration tokens, or rows with images; one sequence in eight is held out, the others are fitted on.
        groups: Groups to probe; query heads are not among them.
        salience: Reduced gradients, for gradient criteria.
    """
    held_out = is_held_out(torch.arange(len(tokens)))
    if not held_out.any():
        held_out[-1] = True
    size = config.calibration.batch_size
    fit = LayerStream(model, structure, tokens[~held_out] if not held_out.all() else tokens, size)
    test = LayerStream(model, structure, tokens[held_out], size)
    dense = [test.finish(0, number, _EVERY) for number in range(len(test.batches))]
    sensitivity: Sensitivity = {}
    for layer in tqdm(structure.layers, desc="Sensitivity"):
        for group in (g for g in groups if g.layer == layer.index):
            statistics = statistics_of(fit, group, criterion, gram=True)
            score, costs = criterion.score(Scoring(group, model, statistics, salience)), []
            for share in PROBES:
                keep = group.size - max(1, round(share * group.size))
                keep = max(keep // group.blocks * group.blocks, group.least)
                with _cut(model, group, {group.key: best_units(score, group, keep)}, statistics, config):
                    divergence = sum(
                        kl_divergence(d, test.finish(group.layer, n, _EVERY)) for n, d in enumerate(dense)
                    )
                per_token = divergence / sum(d.shape[0] * d.shape[1] for d in dense)
                costs.append(max(per_token, 1e-12) / (max(group.size - keep, 1) / group.size) ** 2)
            sensitivity[group.key] = (costs[0] * costs[1]) ** 0.5
        fit.advance(layer.index)
        test.advance(layer.index)
    return sensitivity


@torch.no_grad()
def statistics_of(
    stream: LayerStream, group: Group, criterion: Criterion, gram: bool, left: list[torch.Tensor] | None = None
) -> InputStatistics | RoutingStatistics:  # fmt: skip
    """Moments of what the reader of a group gets, or what is done with what a block of experts gets.

    With `left`, the hidden states that leave the layer, tokens weigh in second moments as in the re-fit.
    """
    if group.reader is None:
        return routing_statistics(stream.model, group, criterion, stream.capture(group.layer, group.parent))
    inputs, addend = stream.capture(group.layer, group.reader.module), stream.addend(group.reader.module)
    statistics = InputStatistics(inputs[0].shape[-1], gram, device=inputs[0].device, gain=addend.gain())
    module, unit, weigh = stream.model.get_submodule(group.reader.module), None, TokenWeights()
    for number, batch in enumerate(inputs):
        weights = scale = None
        if gram and addend.norm is not None:  # tokens count as the norm behind makes them count
            output = consume(module, batch, torch.arange(batch.shape[-1])).float()
            scale = addend.scale(output, addend(output))
        if gram and left is not None:
            state = left[number].to(batch.device).float().flatten(2)
            weights = weigh(state, scale)
            if scale is not None and number == 0:  # how much a norm enlarges is another thing in each layer
                statistics.unit = weigh.unit / float((1 / state.norm(dim=-1).clamp_min(1e-6)).mean())
        elif scale is not None:
            weights = scale.squeeze(-1).square()
            statistics.unit = unit = unit or float(weights.mean())
            weights = weights / unit
        statistics.update(batch, weights=weights)
    return statistics


@contextmanager
def _cut(model: nn.Module, group: Group, kept: Kept, statistics: InputStatistics, config: PruningConfig):
    """One group is cut as long as this is open: its reader re-fitted, or its router kept from choosing the others."""
    if group.reader is None:
        with without_experts(model, [group], kept):
            yield
        return
    module = model.get_submodule(group.reader.module)
    original = module.weight  # stays as it is: what is tried is written to a copy
    columns = kept_columns([group], kept, matrix(module).shape[1])
    try:
        module.weight = nn.Parameter(original.detach().clone(), requires_grad=False)
        write_columns(module, refitted(module, statistics, columns, config), columns)
        yield
    finally:
        module.weight = original


def kl_divergence(dense: torch.Tensor, cut: torch.Tensor) -> float:
    """`KL(dense || cut)` summed over tokens, one sequence at a time to keep float32 logits few."""
    pairs = ((q.float().log_softmax(-1), p.float().log_softmax(-1)) for p, q in zip(dense, cut, strict=True))
    return sum(float(nn.functional.kl_div(q, p, log_target=True, reduction="sum")) for q, p in pairs)


@torch.no_grad()
def _score_inputs(
    structure: ModelStructure, criterion: Criterion, stream: LayerStream, groups: list[Group],
    salience: Salience | None,
) -> Scores:  # fmt: skip
    """Scores units by what the consumers receive in the model as it is, one layer at a time."""
    scores: Scores = {}
    weighed = criterion.needs_gram and criterion.config.token_weighting
    for layer in tqdm(structure.layers, desc="Scoring"):
        left = stream.copy(stream.hidden)
        stream.carry(layer.index, left)
        known: dict[Any, InputStatistics | RoutingStatistics] = {}
        for group in (g for g in groups if g.layer == layer.index):
            place = group.key if group.reader is None else group.reader.module
            if place not in known:
                known = {
                    place: statistics_of(stream, group, criterion, criterion.needs_gram, left if weighed else None)
                }
            scores[group.key] = criterion.score(Scoring(group, stream.model, known[place], salience)).cpu()
        stream.hidden = left
    return scores


@dataclass
class Survey:
    """What was found out about the model before it is cut.

    Attributes:
        scores: Of units, by which they are chosen as well.
        rises: By what the loss rises as the units of a group go, by which widths are chosen and nothing else.
        sensitivity: Costs of groups.
        salience: Reduced gradients.
    """

    scores: Scores | None = None
    rises: Scores | None = None
    sensitivity: Sensitivity | None = None
    salience: Salience | None = None


@measures
def reduced_gradients(
    model: PreTrainedModel, structure: ModelStructure, config: PruningConfig, tokens: Calibration
) -> Salience:
    """What the criteria of a configuration need of the loss's gradients; changes nothing."""
    asked: dict[str, list[Group]] = {"taylor": [], "kfac": [], "gates": []}
    for group in (group for group in structure.groups if group.kind in config.units):
        name = config.criterion_of(group.kind)
        if name in asked:
            asked["gates" if name == "taylor" and group.reader is None else name].append(group)
    found = taylor_salience(model, asked["taylor"], tokens, config) if asked["taylor"] else {}
    found |= gate_salience(model, asked["gates"], tokens, config) if asked["gates"] else {}
    return found | (loss_metrics(model, asked["kfac"], tokens, config) if asked["kfac"] else {})


@measures
def survey(
    model: PreTrainedModel, structure: ModelStructure, config: PruningConfig, tokens: Callable[[], Calibration]
) -> Survey:
    """Finds out what the configuration's criterion and allocation need; changes nothing.

    `tokens` loads the calibration tokens, and is called only where they are needed.
    """
    criterion = make_criterion(config)
    groups = [group for group in structure.groups if group.kind in config.units]
    known = Survey()
    if criterion.needs_gradients:
        known.salience = reduced_gradients(model, structure, config, tokens())
    if config.allocation == "search":
        known.sensitivity = measure_sensitivity(model, structure, criterion, config, tokens(), groups, known.salience)
    elif config.allocation == "global" and criterion.needs_inputs:
        stream = LayerStream(model, structure, tokens(), config.calibration.batch_size)
        scores = _score_inputs(structure, criterion, stream, groups, known.salience)
        # Units are ranked once more where they are cut: by what the layers before have left.
        known.rises, known.scores = (scores, None) if criterion.of_loss else (None, scores)
    elif config.allocation == "global":
        scorings = {group.key: Scoring(group, model, salience=known.salience) for group in groups}
        known.scores = {key: criterion.score(scoring).cpu() for key, scoring in scorings.items()}
    return known
