"""What a plan leaves of a model: shapes on the meta device, before any weight is touched."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..plan import GroupPlan, PruningPlan
from .structure import AttentionShape, LayerStructure, ModelStructure
from .surgery import Kept, cut_units, drop


if TYPE_CHECKING:
    from .target import Target


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is, on the meta device."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def shape_after(layer: LayerStructure, plan: PruningPlan) -> AttentionShape | None:
    """Head counts of a layer after a plan."""
    if layer.attention is None:
        return None
    groups, before = plan.of_layer(layer.index), layer.attention
    kv_heads = groups["kv_groups"].keep if "kv_groups" in groups else before.kv_heads
    heads = groups["query_heads"].keep if "query_heads" in groups else kv_heads * before.rep
    return AttentionShape(heads, kv_heads, before.head_dim)


def check_shapes(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan, target: Target) -> None:
    """Checks that the target builds exactly the tensors the plan will leave.

    Raises:
        CheckpointError: Names the first tensor that would not fit.
    """
    expected = skeleton(model)
    cut_units(expected, structure, first_units(structure, plan))
    drop(expected, structure, plan.dropped)
    wanted = {name: tuple(p.shape) for name, p in expected.named_parameters()}
    target_model = target.skeleton()
    built = {name: tuple(p.shape) for name, p in target_model.named_parameters()}
    for name in (*wanted, *built):
        if built.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{type(target.config).__name__} cannot describe `{name}` of shape {wanted.get(name, 'none')}: it "
                f"gives {built.get(name, 'none')}."
            )
    size = sum(p.numel() for p in target_model.parameters())
    if size != plan.parameters_after:
        raise CheckpointError(
            f"The plan leaves {plan.parameters_after:,} parameters, a {type(target.config).__name__} like this has "
            f"{size:,}: what the model shares is not what its configuration says it shares (tie_word_embeddings)."
        )


def first_units(structure: ModelStructure, plan: PruningPlan) -> Kept:
    """Units that a plan without a choice could keep: the first ones, heads evenly from the first KV groups."""
    kept: Kept = {}
    for group in structure.groups:
        decision: GroupPlan | None = plan.of_layer(group.layer).get(group.kind)
        if decision is None:
            continue
        numbers = torch.arange(group.num_units)
        if group.kind == "query_heads":
            blocks = shape_after(structure.layers[group.layer], plan).kv_heads
            numbers = numbers.view(group.blocks, -1)[:blocks, : decision.keep // blocks].flatten()
        kept[group.layer, group.kind] = numbers[: decision.keep]
    return kept
