"""What is found out about the whole model before the first layer is cut: scores, sensitivities, gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..config import PruningConfig
from ..criteria import Criterion, Scoring, make_criterion
from ..criteria.base import best_units
from ..model.experts import without_experts
from ..model.measuring import measures
from ..model.structure import Group, ModelStructure, matrix
from ..refit.reader import kept_columns, refitted, write_columns
from .gradients import Salience, gate_salience, taylor_salience
from .moments import InputStatistics, is_held_out
from .routing import routing_statistics
from .stream import LayerStream


Scores = dict[tuple[int, str], torch.Tensor]
Sensitivity = dict[tuple[int, str], float]

PROBES = (0.2, 0.45)  # shares of a group that are cut to probe it
_EVERY = 4  # predictions are compared at each so many-th token


@measures
def measure_sensitivity(
    model: PreTrainedModel,
    structure: ModelStructure,
    criterion: Criterion,
    config: PruningConfig,
    tokens: torch.Tensor,
    groups: list[Group],
    salience: Salience | None = None,
) -> Sensitivity:
    """For every group the coefficient `a` of `KL(dense || cut) = a * share^2`, where `share` of its units go.

    Each group alone is cut at two shares, its consumer re-fitted, and the rest of the model run on held-out sequences;
    `a` is the geometric mean of the two values of `KL / share^2`. The model is left as it was.

    Args:
        tokens: Calibration tokens; one sequence in eight is held out, the others are fitted on.
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
            if group.reader is None:
                sensitivity[group.key] = _probe_experts(model, group, criterion, salience, fit, test, dense)
                continue
            statistics = _statistics(fit, group, gram=True)
            score = criterion.score(Scoring(group, model, statistics, salience))
            costs = [_probe(model, group, score, share, statistics, config, test, dense) for share in PROBES]
            sensitivity[group.key] = (costs[0] * costs[1]) ** 0.5
        fit.advance(layer.index)
        test.advance(layer.index)
    return sensitivity


def _statistics(stream: LayerStream, group: Group, gram: bool) -> InputStatistics:
    """Moments of what the reader of a group gets."""
    inputs = stream.capture(group.layer, group.reader.module)
    statistics = InputStatistics(inputs[0].shape[-1], gram, device=inputs[0].device)
    for batch in inputs:
        statistics.update(batch)
    return statistics


def _probe(
    model: nn.Module,
    group: Group,
    score: torch.Tensor,
    share: float,
    statistics: InputStatistics,
    config: PruningConfig,
    test: LayerStream,
    dense: list[torch.Tensor],
) -> float:
    """`KL / share^2` with this share of a group cut; the weights are put back."""
    drop = min(max(1, round(share * group.size)), group.size - 1)
    if drop == 0:
        return 1e-12
    module = model.get_submodule(group.reader.module)
    original = module.weight  # stays as it is: what is tried is written to a copy
    columns = kept_columns([group], {group.key: best_units(score, group, group.size - drop)}, matrix(module).shape[1])
    try:
        module.weight = nn.Parameter(original.detach().clone(), requires_grad=False)
        write_columns(module, refitted(module, statistics, columns, config), columns)
        divergence = sum(_kl(d, test.finish(group.layer, number, _EVERY)) for number, d in enumerate(dense))
    finally:
        module.weight = original
    tokens = sum(d.shape[0] * d.shape[1] for d in dense)
    return max(divergence / tokens, 1e-12) / (drop / group.size) ** 2


def _probe_experts(
    model: nn.Module,
    group: Group,
    criterion: Criterion,
    salience: Salience | None,
    fit: LayerStream,
    test: LayerStream,
    dense: list[torch.Tensor],
) -> float:
    """The coefficient of a group of experts: the router is kept from choosing two shares of them."""
    statistics = routing_statistics(model, group, criterion, fit.capture(group.layer, group.parent))
    score, costs = criterion.score(Scoring(group, model, statistics, salience)), []
    tokens = sum(d.shape[0] * d.shape[1] for d in dense)
    for share in PROBES:
        keep = group.size - max(1, round(share * group.size))
        keep = max(keep // group.blocks * group.blocks, group.least)
        with without_experts(model, [group], {group.key: best_units(score, group, keep)}):
            divergence = sum(_kl(d, test.finish(group.layer, number, _EVERY)) for number, d in enumerate(dense))
        costs.append(max(divergence / tokens, 1e-12) / max(1 - keep / group.size, 1 / group.size) ** 2)
    return (costs[0] * costs[1]) ** 0.5


def _kl(dense: torch.Tensor, cut: torch.Tensor) -> float:
    """`KL(dense || cut)` summed over tokens, one sequence at a time to keep float32 logits few."""
    pairs = ((q.float().log_softmax(-1), p.float().log_softmax(-1)) for p, q in zip(dense, cut, strict=True))
    return sum(float(nn.functional.kl_div(q, p, log_target=True, reduction="sum")) for q, p in pairs)


@torch.no_grad()
def _score_inputs(
    model: PreTrainedModel,
    structure: ModelStructure,
    criterion: Criterion,
    config: PruningConfig,
    tokens: torch.Tensor,
    groups: list[Group],
    salience: Salience | None,
) -> Scores:
    """Scores units by what the consumers receive in the model as it is; one forward pass, one layer at a time."""
    stream = LayerStream(model, structure, tokens, config.calibration.batch_size)
    scores: Scores = {}
    for layer in tqdm(structure.layers, desc="Scoring"):
        known: dict[str, InputStatistics] = {}
        for group in (g for g in groups if g.layer == layer.index):
            if group.reader is None:
                statistics = routing_statistics(model, group, criterion, stream.capture(group.layer, group.parent))
                scores[group.key] = criterion.score(Scoring(group, model, statistics, salience)).cpu()
                continue
            if group.reader.module not in known:
                known = {group.reader.module: _statistics(stream, group, criterion.needs_gram)}
            scoring = Scoring(group, model, known[group.reader.module], salience)
            scores[group.key] = criterion.score(scoring).cpu()
        stream.advance(layer.index)
    return scores


@dataclass
class Survey:
    """What was found out about the model before it is cut.

    Attributes:
        scores: Scores of all units, to compare layers by.
        sensitivity: Cost of cutting each group.
        salience: Reduced gradients.
    """

    scores: Scores | None = None
    sensitivity: Sensitivity | None = None
    salience: Salience | None = None


@measures
def survey(
    model: PreTrainedModel, structure: ModelStructure, config: PruningConfig, tokens: Callable[[], torch.Tensor]
) -> Survey:
    """Finds out what the configuration's criterion and allocation need; changes nothing.

    `tokens` loads the calibration tokens, and is called only where they are needed.
    """
    criterion = make_criterion(config)
    groups = [group for group in structure.groups if group.kind in config.units]
    known = Survey()
    if criterion.needs_gradients:
        how = {"batch_size": config.calibration.batch_size, "gradient_checkpointing": config.gradient_checkpointing}
        asked = [group for group in groups if config.criterion_of(group.kind) == "taylor"]
        read, routed = ([g for g in asked if (g.reader is None) == without] for without in (False, True))
        known.salience = taylor_salience(model, read, tokens(), config.taylor, **how) if read else {}
        known.salience |= gate_salience(model, routed, tokens(), **how) if routed else {}
    if config.allocation == "search":
        known.sensitivity = measure_sensitivity(model, structure, criterion, config, tokens(), groups, known.salience)
    elif config.allocation == "global" and criterion.needs_inputs:
        known.scores = _score_inputs(model, structure, criterion, config, tokens(), groups, known.salience)
    elif config.allocation == "global":
        scorings = {group.key: Scoring(group, model, salience=known.salience) for group in groups}
        known.scores = {key: criterion.score(scoring).cpu() for key, scoring in scorings.items()}
    return known


def sensitivities(
    model: PreTrainedModel, structure: ModelStructure, config: PruningConfig, tokens: Callable[[], torch.Tensor]
) -> Sensitivity:
    """The cost of cutting each group of heads or neurons, whatever the allocation; arguments as for `survey`."""
    config = dataclasses.replace(config, allocation="search", layout="per_layer")
    return survey(model, structure, config, tokens).sensitivity
