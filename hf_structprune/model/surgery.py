"""Slices tensors. Decides nothing: what stays is handed in."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..units import DepthKind, kinds_of
from ..units.depth import LAYERS
from .groups import Group, Kept, Sublayer, dropped, tensor_of
from .structure import ModelStructure, expert_outputs


def mask_units(model: nn.Module, structure: ModelStructure, kept: Kept) -> None:
    """Zeroes what `cut_units` would take out, in place: the reference that a cut model has to equal.

    Zeroing what computes the units silences them, zeroing the columns that read them removes what they feed (a
    silenced neuron may still have an activation other than 0). Experts and what is in them are not masked so, see
    `experts.without_experts`.
    """
    groups = [group for group in structure.groups if group.reader is not None]
    with torch.no_grad():
        for (name, dim, _), gone in entries_gone(groups, kept).items():
            tensor = tensor_of(model, name)
            tensor.index_fill_(dim, gone.to(tensor.device), 0)


def cut_units(model: nn.Module, groups: Iterable[Group], kept: Kept) -> None:
    """Takes the units that are not kept out of every tensor of their groups, in place, one tensor at a time.

    Afterwards only the tensors are right; head counts and widths in modules and configuration are the business of
    `rebuild.rebuild`. Groups that `kept` does not name, by `(layer, kind)`, stay whole.
    """
    groups = list(groups)
    for (name, dim, stacked), gone in entries_gone(groups, kept).items():
        old = tensor_of(model, name)
        if stacked:
            new = _cut_stack(old.detach(), dim, gone)
        else:
            new = old.detach().index_select(dim, _others(gone, old.shape[dim]).to(old.device)).contiguous()
        module, _, leaf = name.rpartition(".")
        parameter = isinstance(old, nn.Parameter)
        setattr(model.get_submodule(module), leaf, nn.Parameter(new, old.requires_grad) if parameter else new)
    for group in groups:
        for name, each in group.counters if group.key in kept else ():
            path, _, attribute = name.rpartition(".")
            module, fewer = model.get_submodule(path), group.size - len(kept[group.key])
            setattr(module, attribute, int(getattr(module, attribute) - each * fewer))


def _cut_stack(stack: torch.Tensor, dim: int, gone: torch.Tensor) -> torch.Tensor:
    """Takes entries out of the matrices of a stack, other ones of each but equally many."""
    rows = stack.movedim(dim, 1)
    stay = _others(gone, rows.shape[0] * rows.shape[1]).to(stack.device)
    kept = rows.flatten(0, 1)[stay].view(len(rows), -1, *rows.shape[2:])
    return kept.movedim(1, dim).contiguous()


def _others(gone: torch.Tensor, total: int) -> torch.Tensor:
    stay = torch.ones(total, dtype=torch.bool)
    stay[gone] = False
    return stay.nonzero().squeeze(1)


def entries_gone(groups: Iterable[Group], kept: Kept) -> dict[tuple[str, int, bool], torch.Tensor]:
    """The entries that go, by tensor, dimension, and whether they are counted over a stack of matrices."""
    result: dict[tuple[str, int, bool], list[torch.Tensor]] = {}
    for group in groups:
        if group.key in kept:
            gone = dropped(group, kept[group.key])
            for part in group.slices:
                entries = part.index[gone].flatten()
                result.setdefault((part.tensor, part.dim, part.stacked), []).append(entries[entries >= 0])
    return {place: torch.cat(entries) for place, entries in result.items()}


def mask_sublayers(model: nn.Module, structure: ModelStructure, dropped: dict[str, list[int]]) -> None:
    """Zeroes the output of what `drop` would take out, in place: the reference that a cut model has to equal.

    A sublayer whose last projection (`o_proj`, `down_proj`: weight and bias) is zero adds nothing to the residual
    stream; a layer of which both sublayers are silent passes it on unchanged.

    Raises:
        UnsupportedModelError: A layer is named whose sublayers are not understood.
    """
    gone = skipped(structure, dropped)
    for layer in (structure.layers[number] for number in dropped.get(LAYERS, ())):
        if layer.matrix_parameters != sum(sublayer.matrix_parameters for sublayer in layer.sublayers):
            raise UnsupportedModelError(f"`{layer.name}` has parts that are not understood: {structure.notes}.")
        gone += layer.sublayers
    with torch.no_grad():
        for sublayer in gone:
            module = model.get_submodule(sublayer.consumer or sublayer.module)
            for parameter in module.parameters() if sublayer.consumer else expert_outputs(module):
                parameter.zero_()


def drop(model: nn.Module, structure: ModelStructure, dropped: dict[str, list[int]]) -> None:
    """Takes layers out of the list of layers, and the modules and norms of sublayers out of their layers, in place.

    The numbers in the layers that are left and the configuration are right only after `rebuild.rebuild`.
    """
    for name in (name for sublayer in skipped(structure, dropped) for name in sublayer.modules):
        model.set_submodule(name, nn.Identity())
    layers = model.get_submodule(structure.layers[0].name.rpartition(".")[0])
    for number in sorted(set(dropped.get(LAYERS, ())), reverse=True):
        del layers[number]
    if dropped.get(LAYERS) and getattr(model, "hf_device_map", None):
        places = {name_after(name, structure, dropped): device for name, device in model.hf_device_map.items()}
        model.hf_device_map = {name: device for name, device in places.items() if name is not None}


def name_after(name: str, structure: ModelStructure, dropped: dict[str, list[int]]) -> str | None:
    """The name of a module or parameter when layers have gone; `None` for what goes with them."""
    path, gone = structure.layers[0].name.rpartition(".")[0], set(dropped.get(LAYERS, ()))
    if not gone or not name.startswith(f"{path}."):
        return name
    number, dot, rest = name[len(path) + 1 :].partition(".")
    new = int(number) - sum(index < int(number) for index in gone)
    return None if int(number) in gone else f"{path}.{new}{dot}{rest}"


def skipped(structure: ModelStructure, dropped: dict[str, list[int]]) -> list[Sublayer]:
    """The sublayers that go, by number of the layer and kind.

    Raises:
        UnsupportedModelError: A layer has none of this kind that could go alone.
    """
    result = []
    for kind in kinds_of(DepthKind, sublayer=True):
        for layer in map(structure.layers.__getitem__, dropped.get(kind, ())):
            if layer.sublayer(kind) is None:
                raise UnsupportedModelError(f"`{layer.name}` has no {kind} that could be skipped alone.")
            result.append(layer.sublayer(kind))
    return result
