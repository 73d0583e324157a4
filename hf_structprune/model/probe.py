"""Which dimensions follow a key of the configuration: the class is built with another value on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, UnsupportedModelError
from .groups import AttentionShape, Group, LayerStructure, Slice, costs, submodule
from .target import Target, make_target, overrides_of, plain_values


def other_shapes(build: Callable[[int], Target], sizes: Iterable[int], what: str) -> tuple[int, dict[str, torch.Size]]:
    """Another size that the class accepts, and the shapes of all parameters with it.

    Args:
        build: The target with a size.
        what: What has these sizes, for the message.

    Raises:
        UnsupportedModelError: None of them could be built.
    """
    error: Exception | None = None
    for size in sizes:
        try:
            model = build(size).glance()
        except CheckpointError as refused:
            error = error or refused
            continue
        return size, {name: parameter.shape for name, parameter in model.named_parameters()}
    raise UnsupportedModelError(f"It could not be built with another {what}: {error}.")


def changed_dims(before: torch.Size, after: torch.Size) -> list[int]:
    """Dimensions in which two shapes differ."""
    return [dim for dim, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]


def grouped(
    kind: str, key: str, model: PreTrainedModel, layers: Sequence[tuple[LayerStructure, nn.Module]]
) -> list[str]:
    """Adds the groups of a kind that one key of the configuration sizes, as the key itself shows them.

    A dimension that grows by the step of the key holds each unit once; one that grows by a multiple of it holds that
    many blocks of units, one after the other. The one linear map whose input grows reads the units; without it, or
    with several, they are left alone. A norm over all units, which weighs each, makes the group a coupled one.

    Args:
        layers: What was found in every layer so far, and the layer; get their groups.

    Returns:
        What is left alone, and why.
    """
    sizes = [size_in(model.config, structure.index, key) for structure, _ in layers]
    if any(size is None for size in sizes) or not sizes:
        return []
    try:
        step, shapes = other_shapes(lambda step: with_more(model, key, step), (1, -1, 2, 8, max(sizes)), key)
    except UnsupportedModelError as error:
        return [f"{key}: {error}"]
    notes = []
    for size, (structure, layer) in zip(sizes, layers, strict=True):
        try:
            _add_group(kind, structure, layer, size, size + step, shapes)
        except UnsupportedModelError as error:
            notes.append(f"{key}: {error}")
    return notes


def head_groups(
    kinds: tuple[str, str],
    keys: tuple[str, str | None],
    model: PreTrainedModel,
    parent: str,
    layers: Sequence[tuple[LayerStructure, nn.Module]],
) -> list[str]:
    """Adds the groups of heads of layers whose projections are not plain `q`, `k`, `v` and `o`.

    The class is built with twice the heads, and with twice the query heads alone. What grows holds heads one after
    the other: projections of latents (MLA), gates, sinks, biases. The one linear map whose input grows reads them.

    Args:
        kinds: Names of the kinds of KV groups and of query heads.
        keys: Keys of the configuration that hold the numbers of query heads and of KV heads, if there is one.
        parent: Name of the attention in a layer.
        layers: What was found in every layer so far, and the layer; get their groups.

    Returns:
        What is left alone, and why.
    """
    config = model.config
    values = plain_values(config)
    size = getattr(submodule(layers[0][1], parent), "head_dim", None)
    if not values.get("head_dim") and size is not None:  # else some classes derive it from the number of heads
        values["head_dim"] = size
    heads, kv_heads = (values.get(key) if key else None for key in keys)
    kv_heads = kv_heads or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        return []
    twice = tuple(filter(None, keys))
    ways = (twice, keys[:1] if heads > kv_heads else twice)
    try:
        both, queries = (_shapes(_doubled(model, values, names)) for names in ways)
    except CheckpointError as error:
        return [f"{keys[0]}: {' '.join(f'{error}'.split())}, left alone"]
    notes = []
    for structure, layer in layers:
        own = (size_in(config, structure.index, list_of(config, key) or key) if key else None for key in keys)
        counts = tuple(now or usual for now, usual in zip(own, (heads, kv_heads), strict=True))
        try:
            _add_heads(kinds, structure, layer, counts, both, queries)
        except UnsupportedModelError as error:
            notes.append(f"{keys[0]}: {error}")
    return notes


def _doubled(model: PreTrainedModel, values: dict[str, Any], keys: tuple[str, ...]) -> Target:
    """The model with twice as much of these keys in every layer."""
    values = copy.deepcopy(values)
    keys = (*keys, *filter(None, (list_of(model.config, key) for key in keys)))
    for own in (values, *(values.get("per_layer_config") or {}).values()):
        own.update({key: 2 * own[key] for key in keys if isinstance(own.get(key), int)})
        own.update({key: [2 * one for one in own[key]] for key in keys if isinstance(own.get(key), list)})
    return make_target(model, values)


def _shapes(target: Target) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in target.glance().named_parameters()}


def _add_heads(
    kinds: tuple[str, str],
    structure: LayerStructure,
    layer: nn.Module,
    counts: tuple[int, int],
    both: dict[str, torch.Size],
    queries: dict[str, torch.Size],
) -> None:
    heads, kv_heads = counts
    own_names = {name for name, _ in layer.named_parameters(prefix=structure.name)}
    for name in sorted(own_names ^ {name for name in both if name.startswith(f"{structure.name}.")}):
        short = name[len(structure.name) + 1 :]
        raise UnsupportedModelError(f"`{short}` is not there with every number of heads, left alone")
    parts, norms, readers = [], [], []  # slices by query head or by KV head
    for name, parameter in layer.named_parameters(prefix=structure.name):
        for dim in changed_dims(parameter.shape, both[name]):
            size, own = parameter.shape[dim], queries[name][dim] == 2 * parameter.shape[dim]
            number, short = heads if own else kv_heads, name[len(structure.name) + 1 :]
            if both[name][dim] != 2 * size or size % number:
                raise UnsupportedModelError(f"`{short}` grows from {size} to {both[name][dim]}, left alone")
            part = Slice(name, dim, torch.arange(size).view(number, -1))
            owner = layer.get_submodule(part.module[len(structure.name) + 1 :])
            if isinstance(owner, nn.Linear) and dim == 1:
                readers.append(part)
            parts.append(part)
            if _is_norm(owner):
                norms.append(part.module)
    if not parts:
        return
    if len(readers) != 1 or len(readers[0].index) != heads:
        raise UnsupportedModelError(f"{len(readers)} linear maps of a layer read its heads and not one, left alone")
    spanning = next((name for name in own_names - {part.tensor for part in parts} if "attn_sub_norm." in name), None)
    if spanning is not None:  # BitNet: as wide as the hidden size, whatever the number of heads
        short = spanning[len(structure.name) + 1 :]
        raise UnsupportedModelError(
            f"`{short}` normalises over all heads and does not follow their number, left alone"
        )
    if all(len(part.index) == heads for part in parts):
        kv_heads = heads
    reader, rep = readers[0], heads // kv_heads
    parent = reader.module.rpartition(".")[0]
    stranger = next((part.tensor for part in parts if not part.tensor.startswith(f"{parent}.")), None)
    if stranger is not None or heads % kv_heads:
        short = (stranger or reader.tensor).removeprefix(f"{structure.name}.")
        raise UnsupportedModelError(f"`{short}` grows outside of `{parent[len(structure.name) + 1 :]}`, left alone")
    structure.attention = AttentionShape(heads, kv_heads, reader.index.shape[1])
    wanted = [(kinds[0], kv_heads, 1, [_joined(part, kv_heads) for part in parts])]
    own_rep = getattr(layer.get_submodule(parent[len(structure.name) + 1 :]), "num_key_value_groups", rep)
    if rep > 1 and own_rep == rep:  # else a layer has more KV heads than the configuration says (MiMo-V2-Flash)
        wanted.append((kinds[1], heads, kv_heads, [part for part in parts if len(part.index) == heads]))
    for kind, size, blocks, own in wanted:
        slices = (*(part for part in own if part.tensor != reader.tensor), _joined(reader, size))
        spans = tuple(norm for norm in norms if any(part.module == norm for part in own))
        cost = costs(layer, structure.name, slices)
        structure.groups.append(Group(kind, structure.index, size, slices, slices[-1], parent, spans, blocks, *cost))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _joined(part: Slice, units: int) -> Slice:
    """The same entries in so many units."""
    return Slice(part.tensor, part.dim, part.index.reshape(units, -1))


def list_of(config: PreTrainedConfig, key: str) -> str | None:
    """The key that holds what `key` says of the whole model for each layer, `None` if there is none (Laguna)."""
    name = f"{key}_per_layer"
    return name if isinstance(getattr(config, name, None), list) else None


def size_in(config: PreTrainedConfig, layer: int, key: str) -> int | None:
    """The value of a key in a layer, `None` where it is no number of units."""
    size = overrides_of(config, layer).get(key)
    size = plain_values(config).get(key) if size is None else size
    size = size[layer] if isinstance(size, list) and layer < len(size) else size
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def with_more(model: PreTrainedModel, key: str, step: int) -> Target:
    """The model with so many more units in every layer."""
    values = plain_values(model.config)
    for own in (values, *(values.get("per_layer_config") or {}).values()):
        own.update({key: own[key] + step} if isinstance(own.get(key), int) else {})
        own.update({key: [one + step for one in own[key]]} if isinstance(own.get(key), list) else {})
    return make_target(model, values)


def _add_group(
    kind: str, structure: LayerStructure, layer: nn.Module, size: int, other: int, shapes: dict[str, torch.Size]
) -> None:
    rows, readers, norms = [], [], []
    for name, parameter in layer.named_parameters(prefix=structure.name):
        if name not in shapes:
            short = name[len(structure.name) + 1 :]
            raise UnsupportedModelError(f"parameter `{short}` is not understood, left alone")
        for dim in changed_dims(parameter.shape, shapes[name]):
            before, after = parameter.shape[dim], shapes[name][dim]
            blocks, short = before // size, name[len(structure.name) + 1 :]
            if (blocks * size, blocks * other) != (before, after):
                raise UnsupportedModelError(f"`{short}` grows from {before} to {after} with it, left alone")
            owner = layer.get_submodule(name[len(structure.name) + 1 :].rpartition(".")[0])
            if _is_norm(owner):
                if [leaf for leaf, _ in owner.named_parameters()] != ["weight"] or blocks > 1:
                    raise UnsupportedModelError(f"`{short}` normalises over all of its units, left alone")
                norms.append(name.rpartition(".")[0])
            reads = isinstance(owner, nn.Linear) and parameter.ndim == 2 and dim == 1
            index = torch.arange(size)[:, None]
            parts = [Slice(name, dim, index + block * size) for block in range(blocks)]
            (readers if reads else rows).extend(parts)
    if not rows and not readers:
        return
    if len(readers) != 1:
        raise UnsupportedModelError(f"{len(readers)} linear maps of a layer read its units and not one, left alone")
    slices = (*rows, *readers)
    cost = costs(layer, structure.name, slices)
    structure.groups.append(
        Group(kind, structure.index, size, slices, readers[0], readers[0].module, tuple(norms), 1, *cost,
              coupled=bool(norms))
    )  # fmt: skip
