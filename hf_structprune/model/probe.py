"""Which dimensions follow a key of the configuration: the class is built with another value on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, UnsupportedModelError
from .groups import Group, LayerStructure, Slice, costs
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
    sizes = [_size_in(model.config, structure.index, key) for structure, _ in layers]
    if any(size is None for size in sizes) or not sizes:
        return []
    try:
        step, shapes = other_shapes(lambda step: _with(model, key, step), (1, -1, 2, 8, max(sizes)), key)
    except UnsupportedModelError as error:
        return [f"{key}: {error}"]
    notes = []
    for size, (structure, layer) in zip(sizes, layers, strict=True):
        try:
            _add_group(kind, structure, layer, size, size + step, shapes)
        except UnsupportedModelError as error:
            notes.append(f"{key}: {error}")
    return notes


def _size_in(config: PreTrainedConfig, layer: int, key: str) -> int | None:
    """The value of a key in a layer, `None` where it is no number of units."""
    size = overrides_of(config, layer).get(key)
    size = plain_values(config).get(key) if size is None else size
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def _with(model: PreTrainedModel, key: str, step: int) -> Target:
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
        for dim in changed_dims(parameter.shape, shapes.get(name, parameter.shape)):
            before, after = parameter.shape[dim], shapes[name][dim]
            blocks = before // size
            if (blocks * size, blocks * other) != (before, after):
                raise UnsupportedModelError(f"`{name}` grows from {before} to {after} with it, left alone")
            owner = layer.get_submodule(name[len(structure.name) + 1 :].rpartition(".")[0])
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
