"""What is to be said with a plan: widths that later tools dislike, units that are not quite as if they were zeroed."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..alignment import HIDDEN, Input, findings, unreached
from ..plan import PruningPlan
from ..units import KINDS, WidthKind, kinds_of
from .norms import stream_norms
from .structure import ModelStructure


def approximations(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> list[str]:
    """One line for each norm that sees less after a plan than it would see with zeros in the place of what goes.

    Args:
        model: The model; the meta device will do.
        structure: What the plan refers to.
        plan: What goes.
    """
    lines = []
    kept = {(group.layer, group.kind): group.keep < group.before for group in plan.groups}
    if any(group.norms and kept.get((group.layer, group.kind)) for group in structure.groups):
        lines.append(
            "queries and keys are normalised over all heads; the cut model normalises over the heads that are left, "
            "which a zeroed head would still count in"
        )
    if plan.hidden is not None and _layer_norms(model):
        lines.append(
            "LayerNorms take mean and variance over the channels that are left, in which zeroed channels would still "
            "count: a cut channel is near to a zeroed one, not equal; the re-fit makes up for most of it"
        )
    return lines


def _layer_norms(model: PreTrainedModel) -> bool:
    """Whether norms over the hidden size subtract the mean."""
    size = model.config.hidden_size
    names = {name for name, parameter in model.named_parameters() if parameter.shape == (size,)}
    return any(kind.centred for kind in stream_norms(model, names).values())


def input_widths(structure: ModelStructure, plan: PruningPlan, hidden_size: int) -> list[Input]:
    """The inputs that a plan leaves: of every consumer in the layers, and the hidden size.

    Args:
        structure: Of the model that the plan is for, after the hidden size was cut.
        plan: What goes.
        hidden_size: The hidden size before the plan.
    """
    inputs = []
    for layer in structure.layers:
        for kind in kinds_of(WidthKind):
            found = KINDS[kind].input_width(layer, plan)
            if found is not None:
                group, before, after = found
                inputs.append(Input(group.reader.module.rpartition(".")[2], after, layer.index, before))
    return [*inputs, Input(HIDDEN, plan.hidden.keep if plan.hidden else hidden_size, None, hidden_size)]


def warnings_of(
    structure: ModelStructure, plan: PruningPlan, hidden_size: int, align_to: str | int | None
) -> list[str]:
    """What is to be said about the widths that a plan leaves, one line for each kind of input.

    Args:
        structure: See `input_widths`.
        plan: See `input_widths`.
        hidden_size: See `input_widths`.
        align_to: As in the configuration.
    """
    inputs = input_widths(structure, plan, hidden_size)
    found = findings(inputs)
    if align_to is not None:
        return found + unreached(inputs, align_to)
    return [f"{line} (`align_to` chooses widths that are)" for line in found]
