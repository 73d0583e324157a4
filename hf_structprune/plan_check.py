"""Whether a plan that was given fits a model: all that it records is compared before anything is touched."""

from __future__ import annotations

from collections import Counter

from transformers import PreTrainedModel

from .config import LAYOUTS
from .errors import ConfigurationError
from .model.hidden_size import hidden_group
from .model.structure import ModelStructure
from .plan import PruningPlan, is_dropped, normalised
from .units.heads import GROUPS, QUERIES


def check_plan(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> None:
    """Refuses a plan that was made for another model, or whose decisions contradict each other.

    The type of the model, its layers and its parameters have to be those that the plan records, whatever it decides:
    a plan that only names layers would fit any model with as many. A plan written by hand has to record them as well
    (without them it cannot be read); the number of layers alone, which the first plans lack, may be left at 0.

    Args:
        model: The model that it is to be carried out on.
        structure: Its coupled groups.
        plan: What is to go.

    Raises:
        ConfigurationError: Says which model the plan is for and which one this is, or what in it cannot be.
    """
    if plan.hidden is not None and plan.hidden.before != (size := hidden_group(model, structure).size):
        raise ConfigurationError(f"The plan is for a hidden size of {plan.hidden.before}; this model has {size}.")
    _check_model(model, structure, plan)
    if plan.layout not in LAYOUTS:
        raise ConfigurationError(f"The plan has the layout {plan.layout!r}; there are {', '.join(LAYOUTS)}.")
    normalised(plan.dropped, structure)
    groups = {(group.layer, group.kind): group for group in structure.groups}
    for decision in plan.groups:
        group = groups.get((decision.layer, decision.kind))
        if group is None or group.size != decision.before:
            raise ConfigurationError(
                f"The plan is for a {plan.model_type} with {decision.before} {decision.kind} in layer "
                f"{decision.layer}; this model has {group.size if group else 'none'}."
            )
    _check_decisions(structure, plan)


def _check_model(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> None:
    """Compares what the plan records of the model it was made for."""
    this = PruningPlan.from_counts(structure, {}, model_type=model.config.model_type, layout=plan.layout)
    names = ["model_type", "num_layers", "parameters_before", "matrix_parameters_before", "neurons_before"]
    if not plan.num_layers:
        names.remove("num_layers")
    differs = [name for name in names if getattr(plan, name) != getattr(this, name)]
    if differs:
        # Finer counts have to be said only where everything else is the same.
        said = {*names[:-2], *differs[:1]}
        raise ConfigurationError(f"The plan is for {_in_words(plan, said)}; this is {_in_words(this, said)}.")


def _in_words(plan: PruningPlan, said: set[str]) -> str:
    words = "a " + (f"{plan.num_layers}-layer " if "num_layers" in said else "")
    words += f"{plan.model_type} of {plan.parameters_before:,} parameters"
    if "matrix_parameters_before" in said:
        words += f", {plan.matrix_parameters_before:,} of them in matrices that multiply each token"
    return words + (f" with {plan.neurons_before:,} MLP neurons" if "neurons_before" in said else "")


def _check_decisions(structure: ModelStructure, plan: PruningPlan) -> None:
    """Refuses decisions that contradict each other, as one edits them into a file."""
    times = Counter((decision.layer, decision.kind) for decision in plan.groups)
    for (layer, kind), number in times.items():
        if number > 1:
            raise ConfigurationError(f"The plan decides about {kind} of layer {layer} {number} times.")
        if is_dropped(plan.dropped, layer, kind):
            raise ConfigurationError(f"The plan drops the {kind} of layer {layer} and keeps some of them.")
    for layer in structure.layers:
        decisions = plan.of_layer(layer.index)
        heads, groups = decisions.get(QUERIES), decisions.get(GROUPS)
        if heads is None:
            continue
        number = groups.keep if groups else layer.attention.kv_heads
        if heads.keep % number or heads.keep // number > layer.attention.rep:
            raise ConfigurationError(
                f"The plan keeps {heads.keep} query heads in {number} KV groups of layer {layer.index}; every group "
                f"must keep the same number, at most {layer.attention.rep}."
            )
        if heads.kept is None:
            continue
        alive = Counter(head // layer.attention.rep for head in heads.kept)
        named = sorted(alive) if groups is None or groups.kept is None else groups.kept
        if set(alive.values()) != {heads.keep // number} or sorted(alive) != named or len(alive) != number:
            raise ConfigurationError(
                f"The plan keeps the query heads {heads.kept} of layer {layer.index}; every KV group that stays must "
                f"keep {heads.keep // number}, the others none."
            )
