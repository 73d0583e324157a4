"""What is found out about the whole model before the first layer is cut: scores, sensitivities, gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import PruningConfig
from ..criteria import Criterion, Scoring, make_criterion
from ..criteria.base import best_units
from ..model.measuring import measures
from ..model.structure import Group, ModelStructure, matrix
from ..refit.layer_by_layer import Scores, new_stream, score_inputs
from ..refit.reader import kept_columns, refitted, write_columns
from .gradients import Salience, taylor_salience
from .moments import HELD_OUT, InputStatistics
from .stream import LayerStream


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
        model: The dense model.
        structure: Its coupled groups.
        criterion: Chooses the units to cut.
        config: Compensation and calibration settings.
        tokens: Calibration tokens; one sequence in eight is held out, the others are fitted on.
        groups: Groups to probe; query heads are not among them.
        salience: Reduced gradients, for gradient criteria.
    """
    numbers = torch.arange(len(tokens))
    held_out = (numbers + numbers // HELD_OUT) % HELD_OUT == HELD_OUT - 1
    if not held_out.any():
        held_out[-1] = True
    fit = new_stream(model, structure, tokens[~held_out] if not held_out.all() else tokens, config)
    test = new_stream(model, structure, tokens[held_out], config)
    dense = [test.finish(0, number, _EVERY) for number in range(len(test.batches))]
    sensitivity: Sensitivity = {}
    for layer in tqdm(structure.layers, desc="Sensitivity", disable=not logging.is_progress_bar_enabled()):
        for group in (g for g in groups if g.layer == layer.index):
            inputs = fit.capture(layer.index, group.reader.module)
            statistics = InputStatistics(inputs[0].shape[-1], True, device=inputs[0].device)
            for batch in inputs:
                statistics.update(batch)
            score = criterion.score(Scoring(group, model, statistics, salience))
            costs = [_probe(model, group, score, share, statistics, config, test, dense) for share in PROBES]
            sensitivity[group.layer, group.kind] = (costs[0] * costs[1]) ** 0.5
        fit.advance(layer.index)
        test.advance(layer.index)
    return sensitivity


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
    kept = {(group.layer, group.kind): best_units(score, group, group.size - drop)}
    columns = kept_columns([group], kept, matrix(module).shape[1])
    try:
        module.weight = nn.Parameter(original.detach().clone(), requires_grad=False)
        write_columns(module, refitted(module, statistics, columns, config), columns)
        divergence = sum(_kl(d, test.finish(group.layer, number, _EVERY)) for number, d in enumerate(dense))
    finally:
        module.weight = original
    tokens = sum(d.shape[0] * d.shape[1] for d in dense)
    return max(divergence / tokens, 1e-12) / (drop / group.size) ** 2


def _kl(dense: torch.Tensor, cut: torch.Tensor) -> float:
    """`KL(dense || cut)` summed over tokens, one sequence at a time to keep float32 logits few."""
    total = 0.0
    for p, q in zip(dense, cut, strict=True):
        total += float(
            nn.functional.kl_div(
                q.float().log_softmax(-1), p.float().log_softmax(-1), log_target=True, reduction="sum"
            )
        )
    return total


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

    Args:
        model: The model as it is.
        structure: Its coupled groups.
        config: Criterion, allocation and units.
        tokens: Loads the calibration tokens; called only where they are needed.
    """
    criterion = make_criterion(config)
    groups = [group for group in structure.groups if group.kind in config.units]
    known = Survey()
    if criterion.needs_gradients:
        known.salience = taylor_salience(
            model, groups, tokens(), config.taylor, batch_size=config.calibration.batch_size,
            gradient_checkpointing=config.gradient_checkpointing,
        )  # fmt: skip
    if config.allocation == "search":
        known.sensitivity = measure_sensitivity(model, structure, criterion, config, tokens(), groups, known.salience)
    elif config.allocation == "global" and criterion.needs_inputs:
        known.scores = score_inputs(model, structure, criterion, config, tokens(), groups)
    elif config.allocation == "global":
        scorings = {(g.layer, g.kind): Scoring(g, model, salience=known.salience) for g in groups}
        known.scores = {key: criterion.score(scoring).cpu() for key, scoring in scorings.items()}
    return known


def sensitivities(
    model: PreTrainedModel, structure: ModelStructure, config: PruningConfig, tokens: Callable[[], torch.Tensor]
) -> Sensitivity:
    """The cost of cutting each group of heads or neurons, whatever the allocation; arguments as for `survey`."""
    config = dataclasses.replace(config, allocation="search", layout="per_layer")
    return survey(model, structure, config, tokens).sensitivity
