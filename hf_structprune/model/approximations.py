"""Where a cut unit is not quite a zeroed one, whatever is done: said with the plan."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..plan import PruningPlan
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
