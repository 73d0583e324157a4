"""Which configuration describes the model after a plan, whether its class builds just that, and what to say of it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..alignment import HIDDEN, Input, findings, unreached
from ..errors import CheckpointError
from ..plan import PruningPlan
from ..units import KINDS, DepthKind, WidthKind, kinds_of
from ..units.depth import LAYERS
from ..units.heads import GROUPS, counts_of, pairs, shape_after
from ..units.neurons import NEURONS
from .groups import AttentionShape, LayerStructure, is_linear
from .hidden_size import stream_norms
from .layer_values import check_layers, without_layers
from .per_layer import native_keys
from .structure import ModelStructure, decoder_layers
from .surgery import Kept, entries_gone, name_after, skipped
from .target import Target, make_target, plain_values, skeleton


_EXPERT_WIDTH = "moe_intermediate_size"  # of experts, where it has a key of its own


def target_of(
    model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan, works: dict[Any, bool] | None = None
) -> Target:
    """The class and configuration that describe the model after a plan.

    Layers that are all alike give a vanilla configuration, others Transformers' `per_layer_config`. `works` keeps for
    other plans which ways to write one build the right tensors, so that the first plan alone is compared with them.

    Raises:
        CheckpointError: No configuration of this model type describes the result.
    """
    _check_depth(model, structure, plan)
    works, refused = {} if works is None else works, None
    for write in (_plain, _with_overrides):
        try:
            target = write(model, structure, plan) if works.get(write, True) else None
            if target is not None and write not in works:
                works[write] = False
                _check_shapes(model, structure, plan, target)
                works[write] = True
            if target is not None:
                return target
        except CheckpointError as error:
            refused = refused or error
    raise CheckpointError(f"No {type(model.config).__name__} describes the pruned model: {refused}") from refused


def _values(
    model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan, heads: bool = True
) -> dict[str, Any]:
    """Configuration values after a plan: the dense ones with what all layers, or each of them, change.

    Numbers of heads only with `heads`, where they change or differ. Where layers lack a sublayer, the width of the MLP
    is named for every layer and not for the model: the configuration then refuses stock classes, which read the
    model's values alone and would build whole layers with random weights.
    """
    config, family = model.config, structure.family
    values = _without_dropped(model, structure, plan)
    before = {int(index): own for index, own in (values.pop("per_layer_config", None) or {}).items()}
    for key in ("module_overrides", "skip_modules"):
        values.pop(key, None)
    usual = {key: values[key] for own in before.values() for key in own if key in values}
    keyless, layers, skips = _keyless(structure, config), [], []
    for index, layer in enumerate(_layers_left(structure, plan)):
        own = before.get(index, {})
        gone = {kind for kind in kinds_of(DepthKind, sublayer=True) if layer.index in plan.dropped.get(kind, ())}
        skips.append(sorted({*own.get("skip", ()), *gone}))
        decided, widths = {"skip", "module_overrides"}, {}
        for kind in map(KINDS.get, kinds_of(WidthKind)):
            if kind.is_in(layer) or kind.sublayer in skips[-1]:
                decided |= set(kind.config_keys(layer, family, config))
            if kind.name in keyless and heads and kind.name in plan.of_layer(layer.index):
                raise CheckpointError(
                    f"it has no key for the number of {kind.label}, which the class derives. Use layout='per_layer'."
                )
            named = kind.name not in keyless and (heads or not kind.of_heads)
            if kind.is_in(layer) and named and kind.is_written(structure.layers, plan):
                widths |= kind.config_values(layer, plan, family, config)
        layers.append({key: value for key, value in (usual | own).items() if key not in decided} | widths)
    keys = {key for own in layers for key in own}
    for key in (key for key in keys if isinstance(values.get(key), list)):  # it has a value for each layer
        values[key] = [own.pop(key, old) for own, old in zip(layers, values[key], strict=True)]
    keys = {key for own in layers for key in own}
    same = {key for key in keys if len({own[key] for own in layers if key in own}) == 1}
    native = native_keys(config)
    if heads and keys - same <= native:
        for own in layers:
            values |= {key: own.pop(key) for key in same & own.keys()}
    elif plan.layout == "uniform":
        raise CheckpointError(
            "The uniform layout needs the same widths in all layers, but the layers of this model differ already. "
            "Use layout='per_layer'."
        )
    for own in layers if "head_dim" not in native else ():  # one size of heads for the whole model
        values |= {"head_dim": own.pop("head_dim")} if "head_dim" in own else {}
    if any(skips):
        if plan.layout == "uniform":
            raise CheckpointError("Layers that lack a sublayer are not alike. Use layout='per_layer'.")
        for key in (key for key in {family.width_key, _EXPERT_WIDTH} if key in values):
            for own, skip in zip(layers, skips, strict=True):
                own.setdefault(key, values[key])
                own |= {key: 1} if KINDS[NEURONS].sublayer in skip else {}  # of a module that is not kept
            values[key] = 0
        for own, skip in zip(layers, skips, strict=True):
            own |= {"skip": skip} if skip else {}
        values["skip_modules"] = _skip_modules(config, structure, plan)
    if any(layers):
        values["per_layer_config"] = {str(index): own for index, own in enumerate(layers) if own}
    return values


def _without_dropped(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> dict[str, Any]:
    """Configuration values without the layers that a plan drops; widths and skipped sublayers are those of before."""
    values, dropped = plain_values(model.config), plan.dropped.get(LAYERS, [])
    key = structure.family.key("layers_key", model.config)
    key = key if values.get(key) == len(structure.layers) else None  # else another one counts layers
    return without_layers(values, dropped, len(structure.layers), key) if dropped else values


def _layers_left(structure: ModelStructure, plan: PruningPlan) -> list[LayerStructure]:
    return [layer for layer in structure.layers if not plan.is_dropped(layer.index, LAYERS)]


def _skip_modules(config: PreTrainedConfig, structure: ModelStructure, plan: PruningPlan) -> dict[str, list[str]]:
    """Names below the layer of the modules that are gone with a sublayer, the one that gives its output last."""
    result = {kind: list(names) for kind, names in (getattr(config, "skip_modules", None) or {}).items()}
    path = structure.layers[0].name.rpartition(".")[0]
    for sublayer in skipped(structure, plan.dropped):
        names = [name[len(path) + 1 :].partition(".")[2] for name in sublayer.modules]
        if result.setdefault(sublayer.kind, names) != names:
            raise CheckpointError(
                f"`{sublayer.module}`: the modules of this {sublayer.kind} are {names}, those of other layers "
                f"{result[sublayer.kind]}; one configuration cannot name both."
            )
    return result


def _with_overrides(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> Target | None:
    """Sizes written as attributes of the modules, for classes that derive them: of heads from their number, of MLPs.

    Only in the per-layer layout, whose modelling file travels with the checkpoint.
    """
    names = structure.family.attention
    # Of queries, keys and values, or of all in one; projections of latents have widths of other kinds.
    known = names is not None and names.attributes is not None and len(names.inputs) in (1, 3)
    derived = _derived(model, structure, plan)
    if plan.layout != "per_layer" or not (known or derived):
        return None
    values = _values(model, structure, plan, heads=False)
    per_layer = values.setdefault("per_layer_config", {})
    for index, layer in enumerate(_layers_left(structure, plan)):
        if layer.index in derived:
            per_layer.setdefault(str(index), {})["module_overrides"] = derived[layer.index]
        before, shape = layer.attention, shape_after(layer, plan)
        if not known or before is None or plan.is_dropped(layer.index, GROUPS):
            continue
        heads = model.config.hidden_size // before.head_dim  # as the class builds them
        if shape != AttentionShape(heads, before.kv_heads * heads // before.heads, before.head_dim):
            query, kv = shape.query_width, shape.kv_width
            rows = [query, kv, kv] if len(names.inputs) == 3 else [query + 2 * kv]
            modules = {name: {"out_features": size} for name, size in zip(names.inputs, rows, strict=True)}
            attributes = {attribute: getattr(shape, name) for attribute, name in names.attributes.items()}
            modules |= _norms_of(layer, kv, query)
            modules |= {names.output: {"in_features": query}} | ({names.parent: attributes} if attributes else {})
            per_layer.setdefault(str(index), {}).setdefault("module_overrides", {}).update(modules)
    return make_target(model, {**values, "module_overrides": {}})


def _norms_of(layer: LayerStructure, kv_width: int, query_width: int) -> dict[str, dict[str, int]]:
    """The sizes of norms over all heads, by module: those of queries are units of the query heads, too."""
    names = {norm for group in layer.groups if KINDS[group.kind].of_heads for norm in group.norms}
    widths = {name: kv_width if name.rpartition(".")[2].startswith("k_") else query_width for name in names}
    return {name[len(layer.name) + 1 :]: {"out_features": width} for name, width in sorted(widths.items())}


def _derived(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> dict[int, dict[str, Any]]:
    """The sizes of linear maps, by layer and module, of units whose number no key of the configuration holds."""
    kinds = _keyless(structure, model.config)
    groups = [group for group in structure.groups if group.kind in kinds]
    shapes = _shapes_after(model, structure, plan) if groups else {}
    result: dict[int, dict[str, Any]] = {}
    for group in groups:
        for part in group.slices:
            shape, name = shapes.get(name_after(part.tensor, structure, plan.dropped)), part.module
            if shape is not None and is_linear(model.get_submodule(name)):
                short = name[len(structure.layers[group.layer].name) + 1 :]
                side = "in_features" if part is group.reader else "out_features"
                result.setdefault(group.layer, {})[short] = {side: shape[part.dim]}
    return result


def _keyless(structure: ModelStructure, config: PreTrainedConfig) -> list[str]:
    return [kind for kind in kinds_of(WidthKind) if not KINDS[kind].has_key(structure.family, config)]


def _plain(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> Target:
    return make_target(model, _values(model, structure, plan))


def _check_depth(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> None:
    """Checks that the layers that are left stay as they were when others are dropped."""
    if not plan.dropped.get(LAYERS):
        return
    if structure.towers is not None and structure.towers.deep:
        raise CheckpointError("What is seen enters several layers by their numbers; dropping one is not supported.")
    if getattr(model.config, "num_kv_shared_layers", 0):
        raise CheckpointError("Layers share their keys and values with others; dropping one is not supported.")
    try:
        shallow = make_target(model, _without_dropped(model, structure, plan)).skeleton()
    except CheckpointError as error:
        raise CheckpointError(f"No {type(model.config).__name__} is without these layers: {error}") from error
    dense, cut = ([layer for _, layer in decoder_layers(m, structure.family)] for m in (skeleton(model), shallow))
    check_layers(dense, cut, [layer.index for layer in _layers_left(structure, plan)])


def _check_shapes(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan, target: Target) -> None:
    """Checks that the target builds exactly the tensors the plan will leave."""
    wanted, small = _shapes_after(model, structure, plan), target.skeleton()
    built = {name: tuple(parameter.shape) for name, parameter in small.named_parameters()}
    for name in (*wanted, *built):
        if built.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{type(target.config).__name__} cannot describe `{name}` of shape {wanted.get(name, 'none')}: it "
                f"gives {built.get(name, 'none')}."
            )
    size = sum(p.numel() for p in small.parameters()) + structure.total_parameters - structure.own_parameters
    if size != plan.parameters_after:
        raise CheckpointError(
            f"The plan leaves {plan.parameters_after:,} parameters, a {type(target.config).__name__} like this has "
            f"{size:,}: what the model shares is not what its configuration says it shares (tie_word_embeddings)."
        )
    if structure.towers is not None:
        structure.towers.check(target)


def _shapes_after(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters that a plan leaves, by the names that they will have."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for (name, dim, stacked), gone in entries_gone(structure.groups, _first_units(structure, plan)).items():
        if name in shapes:  # and no buffer
            shapes[name][dim] -= len(gone.unique()) // (shapes[name][0] if stacked else 1)
    without = tuple(f"{module}." for sublayer in skipped(structure, plan.dropped) for module in sublayer.modules)
    names = {name: name_after(name, structure, plan.dropped) for name in shapes if not name.startswith(without)}
    return {new: tuple(shapes[old]) for old, new in names.items() if new is not None}


def _first_units(structure: ModelStructure, plan: PruningPlan) -> Kept:
    """Units that a plan without a choice could keep: the first ones, heads evenly from the first KV groups."""
    kept: Kept = {}
    for group in structure.groups:
        decisions = plan.of_layer(group.layer)
        if group.kind in decisions:
            keep, numbers = decisions[group.kind].keep, torch.arange(group.size)
            if KINDS[group.kind].within is not None:
                blocks = shape_after(structure.layers[group.layer], plan).kv_heads
                numbers = numbers.view(group.blocks, -1)[:blocks, : keep // blocks].flatten()
            elif group.in_experts:
                numbers = numbers.view(group.blocks, -1)[:, : keep // group.blocks].flatten()
            kept[group.key] = numbers[:keep]
    return kept


def expressible_heads(model: PreTrainedModel, structure: ModelStructure, layout: str) -> set[tuple[int, int]]:
    """Pairs of (KV groups, query heads in each) that a checkpoint of this model can have."""
    attentions, result, works = [layer for layer in structure.layers if layer.attention], set(), {}
    for pair in pairs(attentions[0], kinds_of(WidthKind))[1:] if attentions else ():
        own = [_pair_in(layer.attention, pair, attentions[0].attention) for layer in attentions]
        keep = {k: n for layer, one in zip(attentions, own, strict=True) for k, n in counts_of(layer, *one).items()}
        plan = PruningPlan.from_counts(structure, keep, model_type=model.config.model_type, layout=layout)
        try:
            target_of(model, structure, plan, works)
            result |= set(own)
        except CheckpointError:
            continue
    return result


def _pair_in(shape: AttentionShape, pair: tuple[int, int], first: AttentionShape) -> tuple[int, int]:
    """A pair of the first attention in another one: what is whole there is whole."""
    kv_heads, rep = pair
    return shape.kv_heads if kv_heads == first.kv_heads else kv_heads, shape.rep if rep == first.rep else rep


def approximations(model: PreTrainedModel, structure: ModelStructure, plan: PruningPlan) -> list[str]:
    """One line for each norm that sees less after a plan than it would see with zeros in the place of what goes."""
    lines = []
    kept = {(group.layer, group.kind): group.keep < group.before for group in plan.groups}
    cut = [group for group in structure.groups if kept.get(group.key)]
    if any(group.coupled for group in cut):
        lines.append(
            "a norm or a threshold depends on all units of a layer, in the cut model on those that are left; its "
            "re-fit looks at what comes of it"
        )
    if any(group.norms and not group.coupled for group in cut):
        lines.append(
            "queries and keys are normalised over all heads; the cut model normalises over the heads that are left, "
            "which a zeroed head would still count in"
        )
    size = model.config.hidden_size
    names = {name for name, parameter in model.named_parameters() if parameter.shape == (size,)}
    if plan.hidden is not None and any(kind.centred for kind in stream_norms(model, names).values()):
        lines.append(
            "LayerNorms take mean and variance over the channels that are left, in which zeroed channels would still "
            "count: a cut channel is near to a zeroed one, not equal; the re-fit makes up for most of it"
        )
    return lines


def warnings_of(
    structure: ModelStructure, plan: PruningPlan, hidden_size: int, align_to: str | int | None
) -> list[str]:
    """What is to be said about the widths that a plan leaves, one line for each kind of input.

    `structure` is that after the hidden size was cut, `hidden_size` the one before.
    """
    inputs = [
        Input(group.reader.module.rpartition(".")[2], after, layer.index, before)
        for layer in structure.layers
        for kind in kinds_of(WidthKind)
        for group, before, after in filter(None, [KINDS[kind].input_width(layer, plan)])
    ]
    inputs.append(Input(HIDDEN, plan.hidden.keep if plan.hidden else hidden_size, None, hidden_size))
    found = findings(inputs)
    if align_to is not None:
        return found + unreached(inputs, align_to)
    return [f"{line} (`align_to` chooses widths that are)" for line in found]
