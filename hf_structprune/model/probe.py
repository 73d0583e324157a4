"""Which dimensions follow a key of the configuration: the class is built with another value on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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
            model = build(size).skeleton()
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
    with several, they are left alone.

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
    values = plain_values(model.config)
    size = getattr(submodule(layers[0][1], parent), "head_dim", None)
    if not values.get("head_dim") and size is not None:  # else some classes derive it from the number of heads
        values["head_dim"] = size
    heads, kv_heads = (values.get(key) if key else None for key in keys)
    kv_heads = kv_heads or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        return []
    twice = {keys[0]: 2 * heads, **({keys[1]: 2 * kv_heads} if keys[1] else {})}
    ways = (twice, {keys[0]: 2 * heads} if heads > kv_heads else twice)
    try:
        both, queries = (_shapes(make_target(model, {**values, **new})) for new in ways)
    except CheckpointError as error:
        return [f"{keys[0]}: {' '.join(f'{error}'.split())}, left alone"]
    notes = []
    for structure, layer in layers:
        try:
            _add_heads(kinds, structure, layer, (heads, kv_heads), both, queries)
        except UnsupportedModelError as error:
            notes.append(f"{keys[0]}: {error}")
    return notes


def _shapes(target: Target) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in target.skeleton().named_parameters()}


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
    if all(len(part.index) == heads for part in parts):
        kv_heads = heads
    reader, rep = readers[0], heads // kv_heads
    parent = reader.module.rpartition(".")[0]
    stranger = next((part.tensor for part in parts if not part.tensor.startswith(f"{parent}.")), None)
    if stranger is not None or heads % kv_heads:
        raise UnsupportedModelError(f"`{stranger or reader.tensor}` grows outside of `{parent}`, left alone")
    structure.attention = AttentionShape(heads, kv_heads, reader.index.shape[1])
    wanted = [(kinds[0], kv_heads, 1, [_joined(part, kv_heads) for part in parts])]
    if rep > 1:
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


def size_in(config: PreTrainedConfig, layer: int, key: str) -> int | None:
    """The value of a key in a layer, `None` where it is no number of units."""
    size = overrides_of(config, layer).get(key)
    size = plain_values(config).get(key) if size is None else size
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def with_more(model: PreTrainedModel, key: str, step: int) -> Target:
    """The model with so many more units in every layer."""
    values = plain_values(model.config)
    for own in (values, *(values.get("per_layer_config") or {}).values()):
        own.update({key: own[key] + step} if isinstance(own.get(key), int) else {})
    return make_target(model, values)


def _add_group(
    kind: str, structure: LayerStructure, layer: nn.Module, size: int, other: int, shapes: dict[str, torch.Size]
) -> None:
    rows, readers = [], []
    for name, parameter in layer.named_parameters(prefix=structure.name):
        if name not in shapes:
            raise UnsupportedModelError(f"parameter `{name}` is not understood, left alone")
        for dim in changed_dims(parameter.shape, shapes[name]):
            before, after = parameter.shape[dim], shapes[name][dim]
            blocks, short = before // size, name[len(structure.name) + 1 :]
            if (blocks * size, blocks * other) != (before, after):
                raise UnsupportedModelError(f"`{short}` grows from {before} to {after} with it, left alone")
            owner = layer.get_submodule(name[len(structure.name) + 1 :].rpartition(".")[0])
            if _is_norm(owner):
                raise UnsupportedModelError(f"`{short}` normalises over all of its units, left alone")
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
    structure.groups.append(Group(kind, structure.index, size, slices, readers[0], readers[0].module, (), 1, *cost))
