"""What has to be known of all layers before the first is cut: scores, sensitivities, gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..criteria import Scoring, make_criterion
from ..model.measuring import measures
from ..model.structure import ModelStructure
from ..refit.layer_by_layer import Scores, score_inputs
from .gradients import Salience, taylor_salience
from .sensitivity import Sensitivity, measure_sensitivity


@dataclass
class Knowledge:
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
def look(
    model: PreTrainedModel, structure: ModelStructure, config: PruningConfig, tokens: Callable[[], torch.Tensor]
) -> Knowledge:
    """Finds out what the configuration's criterion and allocation need; changes nothing.

    Args:
        model: The model as it is.
        structure: Its coupled groups.
        config: Criterion, allocation and units.
        tokens: Loads the calibration tokens; called only where they are needed.
    """
    criterion = make_criterion(config)
    groups = [group for group in structure.groups if group.kind in config.units]
    known = Knowledge()
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
    """The cost of cutting each group of heads or neurons, whatever the allocation; arguments as for `look`."""
    config = dataclasses.replace(config, allocation="search", layout="per_layer")
    return look(model, structure, config, tokens).sensitivity
