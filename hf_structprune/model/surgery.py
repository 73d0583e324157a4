"""Slices tensors. Decides nothing: what stays is handed in."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..units import DepthKind, kinds_of
from ..units.depth import LAYERS
from .groups import Group, Sublayer
from .structure import ModelStructure
from .sublayers import expert_outputs


Kept = dict[tuple[int, str], torch.Tensor]


def mask_units(model: nn.Module, structure: ModelStructure, kept: Kept) -> None:
    """Zeroes what `cut_units` would take out, in place: the reference that a cut model has to equal.

    Zeroing what computes the units silences them, zeroing the columns that read them removes what they feed (a
    silenced neuron may still have an activation other than 0).
    """
    with torch.no_grad():
        for (name, dim), gone in entries_gone(structure.groups, kept).items():
            model.get_parameter(name).index_fill_(dim, gone.to(model.get_parameter(name).device), 0)


def cut_units(model: nn.Module, structure: ModelStructure, kept: Kept) -> None:
    """Takes the units that are not kept out of every tensor of their groups, in place, one tensor at a time.

    Afterwards only the tensors are right; head counts and widths in modules and configuration are the business of
    `rebuild.rebuild`.

    Args:
        model: The model.
        structure: Its coupled groups.
        kept: Numbers of the units that stay, by `(layer, kind)`; groups that are not named stay whole.
    """
    cut_groups(model, structure.groups, kept)


def cut_groups(model: nn.Module, groups: Iterable[Group], kept: Kept) -> None:
    """`cut_units` for some groups."""
    for (name, dim), gone in entries_gone(groups, kept).items():
        old = model.get_parameter(name)
        stay = torch.ones(old.shape[dim], dtype=torch.bool)
        stay[gone] = False
        new = old.detach().index_select(dim, stay.nonzero().squeeze(1).to(old.device)).contiguous()
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(new, requires_grad=old.requires_grad))


def entries_gone(groups: Iterable[Group], kept: Kept) -> dict[tuple[str, int], torch.Tensor]:
    """The entries that go, by tensor and dimension."""
    result: dict[tuple[str, int], list[torch.Tensor]] = {}
    for group in groups:
        if group.key in kept:
            gone = dropped(group, kept[group.key])
            for part in group.slices:
                result.setdefault((part.tensor, part.dim), []).append(part.index[gone].flatten())
    return {place: torch.cat(entries) for place, entries in result.items()}


def dropped(group: Group, kept: torch.Tensor) -> torch.Tensor:
    """Numbers of the units that go."""
    mask = torch.ones(group.size, dtype=torch.bool)
    mask[kept.cpu()] = False
    return mask.nonzero().squeeze(1)


def mask_sublayers(model: nn.Module, structure: ModelStructure, dropped: dict[str, list[int]]) -> None:
    """Zeroes the output of what `drop` would take out, in place: the reference that a cut model has to equal.

    A sublayer whose last projection (`o_proj`, `down_proj`: weight and bias) is zero adds nothing to the residual
    stream; a layer of which both sublayers are silent passes it on unchanged.

    Args:
        model: The model.
        structure: Its structure.
        dropped: Numbers of the layers by kind: `"layers"`, `"attention"`, `"mlp"`.

    Raises:
        UnsupportedModelError: A layer is named whose sublayers are not understood.
    """
    with torch.no_grad():
        for sublayer in _sublayers(structure, dropped):
            module = model.get_submodule(sublayer.consumer or sublayer.module)
            for parameter in module.parameters() if sublayer.consumer else expert_outputs(module):
                parameter.zero_()


def drop(model: nn.Module, structure: ModelStructure, dropped: dict[str, list[int]]) -> None:
    """Takes layers out of the list of layers, and the modules and norms of sublayers out of their layers, in place.

    Afterwards only the modules are right: the numbers in the layers that are left and the configuration are the
    business of `checkpoint.rebuild`, and a model with skipped sublayers runs only after it.

    Args:
        model: The model.
        structure: Its structure.
        dropped: Numbers of the layers by kind: `"layers"`, `"attention"`, `"mlp"`.
    """
    numbers = set(dropped.get(LAYERS, ()))
    for kind in kinds_of(DepthKind, sublayer=True):
        for number in dropped.get(kind, ()):
            for name in _sublayer(structure, number, kind).modules if number not in numbers else ():
                model.set_submodule(name, nn.Identity())
    path = structure.layers[0].name.rpartition(".")[0]
    layers = model.get_submodule(path)
    for number in sorted(numbers, reverse=True):
        del layers[number]
    if numbers and getattr(model, "hf_device_map", None):
        model.hf_device_map = _renumbered(model.hf_device_map, path, len(structure.layers), numbers)


def _renumbered(device_map: dict[str, object], path: str, num_layers: int, gone: set[int]) -> dict[str, object]:
    """A device map by the numbers of the layers that are left."""
    new = {old: index for index, old in enumerate(index for index in range(num_layers) if index not in gone)}
    result = {}
    for name, device in device_map.items():
        match = re.fullmatch(rf"{re.escape(path)}\.(\d+)(.*)", name)
        if match is None:
            result[name] = device
        elif int(match[1]) in new:
            result[f"{path}.{new[int(match[1])]}{match[2]}"] = device
    return result


def _sublayers(structure: ModelStructure, dropped: dict[str, list[int]]) -> list[Sublayer]:
    pairs = [(number, kind) for kind in kinds_of(DepthKind, sublayer=True) for number in dropped.get(kind, ())]
    result = [_sublayer(structure, number, kind) for number, kind in pairs]
    for number in dropped.get(LAYERS, ()):
        layer = structure.layers[number]
        if layer.matrix_parameters != sum(sublayer.matrix_parameters for sublayer in layer.sublayers):
            raise UnsupportedModelError(f"`{layer.name}` has parts that are not understood: {structure.notes}.")
        result += layer.sublayers
    return result


def _sublayer(structure: ModelStructure, number: int, kind: str) -> Sublayer:
    sublayer = structure.layers[number].sublayer(kind)
    if sublayer is None:
        raise UnsupportedModelError(f"`{structure.layers[number].name}` has no {kind} that could be skipped alone.")
    return sublayer
