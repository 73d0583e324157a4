"""Which configuration a pruned model gets, and whether its class can build it: checked on the meta device."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, UnsupportedModelError
from ..plan import PruningPlan
from .depth_check import check_layers
from .expected import check_shapes, shape_after, skeleton
from .layer_lists import without_layers
from .modeling_structprune import per_layer_class
from .skipping import layers_left, overrides_of, skip_modules, skips_after, write_skips
from .structure import AttentionShape, LayerStructure, ModelStructure, decoder_layers


@dataclass
class Target:
    """The class and configuration of the pruned model."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: shapes without weights."""
        with torch.device("meta"):
            return self.model_class(copy.deepcopy(self.config))


def target_of(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> Target:
    """The class and configuration that describe the model after a plan.

    Layers that are all alike give a vanilla configuration, others Transformers' `per_layer_config`. A Llama head count
    that does not divide the hidden size, which `LlamaConfig` refuses, is written as a Mistral without sliding window:
    the same weights, the same logits.

    Raises:
        CheckpointError: No configuration of this model type describes the result.
    """
    _check_depth(model, structure, plan)
    errors = []
    for write in _WRITERS:
        try:
            target = write(model, structure, plan)
            if target is not None:
                check_shapes(model, structure, plan, target)
                return target
        except _REFUSED as error:
            errors.append(f"{error}")
    raise CheckpointError(f"No {type(model.config).__name__} describes the pruned model: {errors[0]}")


def _changes(
    model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan, heads: bool = True
) -> dict[str, Any]:
    """Configuration values after a plan: the dense ones with what all layers, or each of them, change."""
    layers = layers_left(structure, plan)
    values = _without_dropped(model, structure, plan)
    for key in ("per_layer_config", "module_overrides", "skip_modules"):
        values.pop(key, None)
    skips = skips_after(model.config, layers, plan)
    widths = [
        {**inherited, **_widths(layer, structure, plan, model.config, heads)}
        for layer, inherited in zip(layers, _inherited(model.config, structure, layers, skips), strict=True)
    ]
    keys = {key for width in widths for key in width}
    if all(len({width[key] for width in widths if key in width}) == 1 for key in keys) and heads:
        values.update({key: next(w[key] for w in widths if key in w) for key in keys})
        widths = [{} for _ in widths]
    elif plan.layout == "uniform":
        raise CheckpointError(
            "The uniform layout needs the same widths in all layers, but the layers of this model differ already. "
            "Use layout='per_layer'."
        )
    for width in widths:  # one size of heads for the whole model
        values.update({"head_dim": width.pop("head_dim")} if "head_dim" in width else {})
    if any(skips):
        if plan.layout == "uniform":
            raise CheckpointError("Layers that lack a sublayer are not alike. Use layout='per_layer'.")
        write_skips(values, widths, skips, skip_modules(model.config, structure, plan), structure.family.width_key)
    if any(widths):
        values["per_layer_config"] = {str(i): width for i, width in enumerate(widths) if width}
    return values


def _without_dropped(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> dict[str, Any]:
    """Configuration values without the layers that a plan drops; widths and skipped sublayers are those of before."""
    values = model.config.to_dict()
    for key in ("auto_map", "architectures"):
        values.pop(key, None)
    dropped = plan.dropped.get("layers", [])
    if not dropped:
        return values
    key = getattr(model.config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    return without_layers(values, dropped, len(structure.layers), key)


def _inherited(
    config: PreTrainedConfig, structure: ModelStructure, layers: list[LayerStructure], skips: list[list[str]]
) -> list[dict[str, Any]]:
    """Values that each layer has of its own already, besides those a plan decides."""
    decided = {"skip", "module_overrides", "head_dim"}
    result = []
    for layer, skip in zip(layers, skips, strict=True):
        own = set(decided)
        if layer.group("mlp_neurons") is not None or "mlp" in skip:
            own |= {structure.family.width_key}
        if layer.attention is not None or "attention" in skip:
            own |= set(_head_keys(config, structure))
        result.append({k: v for k, v in overrides_of(config, layer.index).items() if k not in own})
    keys = {key for values in result for key in values}
    for values in result:
        values.update({k: config._getattr_without_heterogeneous_validation(k) for k in keys if k not in values})
    return result


def _stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The Transformers class of a model that may be a per-layer one.

    Raises:
        UnsupportedModelError: There is none: the class comes with the checkpoint, or is the user's own.
    """
    for base in type(model).__mro__:
        if base.__module__.startswith("transformers.models"):
            return base
    raise UnsupportedModelError(
        f"{type(model).__name__} is not a class of Transformers: a checkpoint of it needs code that is not saved with "
        "it. If Transformers has a class for this model type, load the model without `trust_remote_code`."
    )


def _target(stock: type, config_class: type, values: dict[str, Any], model: PreTrainedModel) -> Target:
    config = config_class.from_dict(values)
    config_class.from_dict(json.loads(config.to_json_string(use_diff=False)))  # what is written can be read
    config._attn_implementation = model.config._attn_implementation
    config._experts_implementation = model.config._experts_implementation
    config.dtype = model.config.dtype
    return Target(per_layer_class(stock) if config.is_heterogeneous else stock, config)


def _same_class(model, structure, plan) -> Target:
    return _target(_stock_class(model), type(model.config), _changes(model, structure, plan), model)


def _as_mistral(model, structure, plan) -> Target | None:
    config = model.config
    if type(config) is not LlamaConfig or config.attention_bias or config.mlp_bias:
        return None
    values = _changes(model, structure, plan)
    for key in ("model_type", "attention_bias", "mlp_bias", "pretraining_tp"):
        values.pop(key, None)
    return _target(MistralForCausalLM, MistralConfig, {**values, "sliding_window": None}, model)


def _with_overrides(model, structure, plan) -> Target | None:
    """Head counts written as attributes of the modules, for classes that derive the size of a head from their number.

    Only in the per-layer layout, whose modelling file travels with the checkpoint.
    """
    names = structure.family.attention
    if plan.layout != "per_layer" or names is None or names.attributes is None:
        return None
    values = _changes(model, structure, plan, heads=False)
    per_layer = values.setdefault("per_layer_config", {})
    for index, layer in enumerate(layers_left(structure, plan)):
        dense, shape = _dense_shape(model, layer), shape_after(layer, plan)
        if shape != dense and not plan.is_dropped(layer.index, "attention"):
            per_layer.setdefault(str(index), {})["module_overrides"] = _module_overrides(names, shape)
    return _target(_stock_class(model), type(model.config), {**values, "module_overrides": {}}, model)


def _dense_shape(model, layer: LayerStructure) -> AttentionShape | None:
    """Head counts that the class builds from the global configuration."""
    config, shape = model.config, layer.attention
    heads = config.hidden_size // shape.head_dim if shape else 0
    return shape and AttentionShape(heads, shape.kv_heads * heads // shape.heads, shape.head_dim)


_WRITERS = (_same_class, _as_mistral, _with_overrides)
# What configuration and model classes raise when they are given numbers they do not take.
_REFUSED = (StrictDataclassError, ValueError, RuntimeError, TypeError, AttributeError, CheckpointError)


def _module_overrides(names, shape: AttentionShape) -> dict[str, dict[str, int]]:
    attributes = {attribute: getattr(shape, name) for attribute, name in names.attributes.items()}
    query, kv = shape.query_width, shape.kv_width
    rows = [query, kv, kv] if len(names.inputs) == 3 else [query + 2 * kv]
    overrides = {name: {"out_features": size} for name, size in zip(names.inputs, rows, strict=True)}
    overrides[names.output] = {"in_features": query}
    return {**({names.parent: attributes} if attributes else {}), **overrides}


def _head_keys(config: PreTrainedConfig, structure: ModelStructure) -> list[str]:
    """Configuration keys of the numbers of query heads and of KV heads, where there is one."""
    heads = getattr(config, "attribute_map", {}).get("num_attention_heads", "num_attention_heads")
    return [heads, *filter(None, [structure.family.kv_heads_key])]


def _head_values(config: PreTrainedConfig, structure: ModelStructure, shape: AttentionShape) -> dict[str, int]:
    values = dict(zip(_head_keys(config, structure), (shape.heads, shape.kv_heads), strict=False))
    if not isinstance(getattr(type(config), "head_dim", None), property):
        values["head_dim"] = shape.head_dim
    return values


def _widths(
    layer: LayerStructure, structure: ModelStructure, plan: PruningPlan, config: PreTrainedConfig, heads: bool
) -> dict[str, int]:
    """Configuration values of one layer after a plan; head counts only where they change or differ between layers."""
    widths: dict[str, int] = {}
    mlp = layer.group("mlp_neurons")
    if mlp is not None and not plan.is_dropped(layer.index, "mlp"):
        widths[structure.family.width_key] = plan.keep(layer.index, "mlp_neurons", mlp.num_units)
    shapes = {one.attention for one in structure.layers if one.attention}
    changed = len(shapes) > 1 or any(g.kind in ("kv_groups", "query_heads") for g in plan.groups)
    if heads and changed and layer.attention is not None and not plan.is_dropped(layer.index, "attention"):
        widths.update(_head_values(config, structure, shape_after(layer, plan)))
    return widths


def _check_depth(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> None:
    """Checks that the layers that are left stay as they were when others are dropped."""
    if not plan.dropped.get("layers"):
        return
    if getattr(model.config, "num_kv_shared_layers", 0):
        raise CheckpointError("Layers share their keys and values with others; dropping one is not supported.")
    values = _without_dropped(model, structure, plan)
    try:
        shallow = _target(_stock_class(model), type(model.config), values, model).skeleton()
    except _REFUSED as error:
        raise CheckpointError(f"No {type(model.config).__name__} is without these layers: {error}") from error
    dense, cut = ([layer for _, layer in decoder_layers(m, structure.family)] for m in (skeleton(model), shallow))
    check_layers(dense, cut, [layer.index for layer in layers_left(structure, plan)])


def expressible_heads(model: PreTrainedModel, structure: ModelStructure, layout: str) -> set[tuple[int, int]]:
    """Pairs of (KV groups, query heads in each) that a checkpoint of this model can have.

    Each way to write a configuration is checked once against the tensors it builds, then only for what its
    configuration class accepts.
    """
    shape = next((layer.attention for layer in structure.layers if layer.attention), None)
    if shape is None:
        return set()
    result: set[tuple[int, int]] = set()
    works: dict[Any, bool] = {}
    for kv_heads in range(shape.kv_heads, 0, -1):
        for rep in range(shape.rep, 0, -1):
            if (kv_heads, rep) == (shape.kv_heads, shape.rep):
                continue
            keep = {(layer.index, "kv_groups"): kv_heads for layer in structure.layers if layer.attention}
            keep |= {(layer.index, "query_heads"): rep for layer in structure.layers if layer.attention}
            plan = PruningPlan.from_counts(structure, keep, model_type=model.config.model_type, layout=layout)
            for write in _WRITERS:
                try:
                    target = works.get(write, True) and write(model, structure, plan)
                    if target and write not in works:
                        works[write] = _builds(model, structure, plan, target)
                    if target and works[write]:
                        result.add((kv_heads, rep))
                        break
                except _REFUSED:
                    continue
    return result


def _builds(model, structure, plan, target) -> bool:
    try:
        check_shapes(model, structure, plan, target)
    except CheckpointError:
        return False
    return True
