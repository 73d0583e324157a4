"""How many features the linear maps of a model read before and after a plan."""

from __future__ import annotations

from ..alignment import HIDDEN, Input, findings, unreached
from ..model.structure import ModelStructure
from ..plan import PruningPlan
from ..units import KINDS, WidthKind, kinds_of


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
    found = [str(finding) for finding in findings(inputs)]
    if align_to is not None:
        return found + unreached(inputs, align_to)
    return [f"{line} (`align_to` chooses widths that are)" for line in found]
