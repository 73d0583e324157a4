"""The size of a head: where its dimensions are, models with fewer of them, and the cut.

What the key `head_dim` sizes is compared with the rows of q, k and v and the columns of o, as for the residual stream:
the class is built on the meta device with another value.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CheckpointError, ConfigurationError, UnsupportedModelError
from ..units.head_size import HEAD_SIZE
from ..units.heads import rows_of_heads
from .groups import Group, LayerStructure, make_group, matrix, submodule
from .hidden_size import norm_kind, scale_
from .probe import other_shapes
from .rebuild import assemble
from .rotation import Rotation, on_cpu, rotated, rotation_of, with_pairs
from .structure import ModelStructure
from .target import Target, make_target, plain_values


NORMS = {"q": ("q_norm", "q_layernorm"), "k": ("k_norm", "k_layernorm")}
_SCALES = ("scaling", "scale", "softmax_scale")  # attributes that hold what scores are multiplied by
_WAY_OUT = f"Cut 'kv_groups', 'mlp_neurons' or 'layers' of this model instead of '{HEAD_SIZE}'."


def head_group(model: PreTrainedModel, structure: ModelStructure) -> Group:
    """The dimensions of the heads of all layers; works on the meta device.

    Raises:
        UnsupportedModelError: They cannot be cut; names what shows it.
    """
    groups = layer_groups(model, structure)
    cost, matrices = sum(group.cost for group in groups), sum(group.matrix_cost for group in groups)
    slices = tuple(part for group in groups for part in group.slices)
    norms = tuple(name for group in groups for name in group.norms)
    size = groups[0].size
    return Group(HEAD_SIZE, -1, size, slices, None, "", norms, cost=cost, matrix_cost=matrices, least=2)


def layer_groups(model: PreTrainedModel, structure: ModelStructure) -> list[Group]:
    """One group for each layer with attention: a unit is the same dimension of all of its heads.

    Raises:
        UnsupportedModelError: See `head_group`.
    """
    if structure.towers is not None:
        raise UnsupportedModelError(
            f"The size of the heads of a decoder that is a part of a larger model is left as it is. {_WAY_OUT}"
        )
    layers = [layer for layer in structure.layers if layer.attention]
    sizes = {layer.attention.head_dim for layer in layers}
    if len(sizes) != 1:
        why = "none of its layers has attention that is understood" if not sizes else "its heads differ in size"
        notes = f" ({'; '.join(structure.notes)})" if structure.notes and not sizes else ""
        raise UnsupportedModelError(f"{type(model).__name__}: {why}{notes}. {_WAY_OUT}")
    size = sizes.pop()
    if size < 4:
        raise UnsupportedModelError(f"{type(model).__name__} has heads of {size} dimensions, of which none can go.")
    _check_own_key(model, size)
    groups = [_layer_group(model, structure, layer) for layer in layers]
    _check_probe(model, structure, groups, size)
    return groups


def _check_own_key(model: PreTrainedModel, size: int) -> None:
    """Refuses models whose configuration has no size of heads of its own."""
    config = model.config
    derived = isinstance(getattr(type(config), "head_dim", None), property)
    if not derived:
        values = _sized_values(model, size + 2)
        values["rope_parameters"] = getattr(config, "rope_parameters", None) and _default(config.rope_parameters)
        try:
            small = make_target(model, values).skeleton()
        except CheckpointError:
            return  # which is said later
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        derived = all(shapes.get(name) == parameter.shape for name, parameter in small.named_parameters())
    if derived:
        raise UnsupportedModelError(
            f"{type(config).__name__} has no size of heads of its own: {type(model).__name__} computes it from hidden "
            f"size / heads, so that a plain checkpoint cannot have a smaller one. {_WAY_OUT}"
        )


def _default(parameters: dict) -> dict:
    nested = {key: _default(value) for key, value in parameters.items() if isinstance(value, dict)}
    kept = ("rope_theta", "partial_rotary_factor")
    return nested or {"rope_type": "default", **{key: parameters[key] for key in kept if key in parameters}}


def _layer_group(model: PreTrainedModel, structure: ModelStructure, layer: LayerStructure) -> Group:
    names, shape, module = structure.family.attention, layer.attention, model.get_submodule(layer.name)
    inputs = names.inputs if len(names.inputs) == 3 else names.inputs * 3
    there = [submodule(module, name) for name in (*inputs, names.output)]
    rows = rows_of_heads(shape, names.fused)
    sizes = [index.numel() for index in (*rows[:3], rows[3])]
    fused = len(names.inputs) == 1
    wanted = [sum(sizes[:3])] * 3 if fused else sizes[:3]
    if any(part is None for part in there) or [matrix(part).shape[0] for part in there[:3]] != wanted:
        raise UnsupportedModelError(
            f"`{layer.name}.{names.parent}`: its projections are not the q, k, v and o of heads that read one input, "
            f"so that dimensions of heads cannot go. {_WAY_OUT}"
        )
    spans = []
    for which, index in (("q", rows[0]), ("k", rows[1])):
        for norm in NORMS[which]:
            found = submodule(module, f"{names.parent}.{norm}")
            weight = getattr(found, "weight", None)
            if weight is None:
                continue
            kind = norm_kind(found)
            if kind is None or kind.centred or weight.numel() not in (shape.head_dim, index.numel()):
                raise UnsupportedModelError(
                    f"`{layer.name}.{names.parent}.{norm}` is no RMS norm over a head or over all heads: no weights "
                    f"make up for the dimensions that would be missing in it. {_WAY_OUT}"
                )
            one = torch.arange(shape.head_dim)[None] if weight.numel() == shape.head_dim else index
            spans.append((f"{names.parent}.{norm}", one.T))
    producers = [(name, index.T) for name, index in zip(inputs, rows, strict=False)]
    return make_group(HEAD_SIZE, layer, module, names, shape.head_dim, producers, rows[3].T, spans)


def _check_probe(model: PreTrainedModel, structure: ModelStructure, groups: list[Group], size: int) -> None:
    """Compares the groups with what the key of the configuration really sizes."""
    sizes = [smaller for smaller in (size - 2, size - 4, size // 2, size - 8, size - 16) if smaller > 1]
    try:
        other, shapes = other_shapes(partial(smaller_heads, model, structure), sizes, "size of heads")
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(model).__name__}: {error} {_WAY_OUT}") from error
    small = smaller_heads(model, structure, other).skeleton()
    for layer in (layer for layer in structure.layers if layer.attention):
        name = f"{layer.name}.{structure.family.attention.parent}"
        _score_scale(model.get_submodule(name), small.get_submodule(name), name)
    _scaling(rotation_of(model))
    entries: dict[tuple[str, int], int] = {}
    for part in (part for group in groups for part in group.slices):
        place = (part.tensor, part.dim)
        entries[place] = entries.get(place, 0) + part.index.shape[1] * (size - other)
    for name, parameter in model.named_parameters():
        if name not in shapes:
            raise UnsupportedModelError(f"`{name}` is not there with heads of {other} dimensions. {_WAY_OUT}")
        for dim in range(parameter.ndim):
            wanted = parameter.shape[dim] - entries.get((name, dim), 0)
            if wanted != shapes[name][dim]:
                raise UnsupportedModelError(
                    f"`{name}` of shape {tuple(parameter.shape)} would be {tuple(shapes[name])} with heads of {other} "
                    f"instead of {size} dimensions, which is not understood. {_WAY_OUT}"
                )


def _sized_values(model: PreTrainedModel, size: int) -> dict:
    values = plain_values(model.config)
    values[getattr(model.config, "attribute_map", {}).get("head_dim", "head_dim")] = size
    return values


def smaller_heads(
    model: PreTrainedModel, structure: ModelStructure, keep: int, kept: torch.Tensor | None = None
) -> Target:
    """Class and configuration of the model with heads of `keep` dimensions.

    Args:
        kept: Numbers of the dimensions that stay, ascending; `None` where only shapes matter.

    Raises:
        ConfigurationError: `keep` is no even number below the size there is, or `kept` no whole pairs.
        UnsupportedModelError: The positions of this model are not rotated as understood.
        CheckpointError: No configuration class takes this.
    """
    size = next(layer.attention.head_dim for layer in structure.layers if layer.attention)
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 < keep <= size or keep % 2:
        raise ConfigurationError(
            f"The size of a head after pruning is {keep!r}; it must be an even number from 2 to {size}."
        )
    rotation = rotation_of(model)
    pairs = None if kept is None else pairs_in(rotation, size, keep, kept, model)
    values = _sized_values(model, keep)
    values["rope_parameters"] = with_pairs(model, rotation, keep, pairs)
    own = "original_max_position_embeddings"
    if own in values and rotation.lists[0].key is None:  # which some classes prefer
        values[own] = values["rope_parameters"][own]
    return make_target(model, values)


def counts(model: PreTrainedModel, rotation: Rotation, keep: int) -> tuple[int, int]:
    """How many pairs, and how many dimensions that are not rotated, heads of `keep` dimensions have."""
    parameters = model.config.rope_parameters
    pairs = rotated(parameters[rotation.lists[0].key] if rotation.lists[0].key else parameters, keep) // 2
    return pairs, keep - 2 * pairs


def pairs_in(rotation: Rotation, size: int, keep: int, kept: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """Numbers of the pairs among dimensions that stay.

    Raises:
        ConfigurationError: They are not whole pairs, or not as many as a head of this size has.
    """
    there = set(kept.tolist())
    whole = [number for number, unit in enumerate(rotation.units(size)) if there >= set(unit.tolist())]
    pairs = [number for number in whole if number < rotation.size // 2]
    wanted = counts(model, rotation, keep)
    free = len(whole) - len(pairs)
    if len(there) != keep or len(kept) != keep or (len(pairs), free) != wanted:
        form = "(2 i, 2 i + 1)" if rotation.interleaved else f"(i, i + {rotation.size // 2})"
        raise ConfigurationError(
            f"`kept` names {len(kept)} dimensions of heads; of {keep} there must be {wanted[0]} whole pairs {form} "
            f"and {wanted[1]} others of 0 to {size - 1}."
        )
    return torch.tensor(pairs)


@torch.no_grad()
def turn_values(model: PreTrainedModel, structure: ModelStructure, index: int, bases: torch.Tensor) -> None:
    """Writes the values of a layer in other bases, in place: `W_v <- B^T W_v`, `W_o <- W_o B`, which changes nothing.

    Args:
        bases: Orthogonal `B` of each KV head, shape (KV heads, size, size).
    """
    layer = structure.layers[index]
    names, shape, module = structure.family.attention, layer.attention, model.get_submodule(layer.name)
    _, _, rows, columns = rows_of_heads(shape, names.fused)
    value, output = module.get_submodule(names.inputs[-1]), matrix(module.get_submodule(names.output))
    for tensor in _tensors(value):
        for basis, own in zip(bases, rows, strict=True):
            own = own.to(tensor.device)
            tensor[own] = (basis.to(tensor.device).T @ tensor[own].double()).to(tensor.dtype)
    for head, own in enumerate(columns):
        own, basis = own.to(output.device), bases[head // shape.rep].to(output.device)
        output[:, own] = (output[:, own].double() @ basis).to(output.dtype)


@torch.no_grad()
def rebuild_heads(
    model: PreTrainedModel, structure: ModelStructure, target: Target, kept: torch.Tensor
) -> PreTrainedModel:
    """A model of `smaller_heads` out of one whose tensors have lost the other dimensions, which is of no use any more.

    It equals the dense model with zeros in the rows of those dimensions (exactly, but for the rounding of frequencies
    to float32): `q` grows by what the class divides scores by less, and by the square of what cosines and sines are
    multiplied by no more. A norm over `n` dimensions, of which `n'` are not zero, gives `w x / sqrt(S / n + eps)`;
    over those alone it gives the same with `w' = w sqrt(n / n')` and inputs times `sqrt(n' / n)`.
    """
    small, rotation = target.skeleton(), rotation_of(model)
    size = next(layer.attention.head_dim for layer in structure.layers if layer.attention)
    turning = torch.ones(size, dtype=torch.float64)
    turning[: rotation.size] = _scaling(rotation) ** 2
    shrink = math.sqrt(len(kept) / size)
    for layer in (layer for layer in structure.layers if layer.attention):
        names = structure.family.attention
        parent = f"{layer.name}.{names.parent}"
        factors = turning[kept] * _score_scale(model.get_submodule(parent), small.get_submodule(parent), parent)
        inputs = names.inputs if len(names.inputs) == 3 else names.inputs * 3
        rows = rows_of_heads(dataclasses.replace(layer.attention, head_dim=len(kept)), names.fused)
        for which, name, index in zip("qk", inputs, rows, strict=False):
            own, norm = factors if which == "q" else torch.ones(len(kept), dtype=torch.float64), None
            for leaf in NORMS[which]:
                found = submodule(small, f"{parent}.{leaf}")
                norm = f"{parent}.{leaf}" if getattr(found, "weight", None) is not None else norm
            if norm is not None:
                weight, kind = model.get_submodule(norm).weight, norm_kind(small.get_submodule(norm))
                scale_(weight, kind, (own / shrink).repeat(len(weight) // len(kept)).to(weight))
                own = torch.full_like(own, shrink)
            projection = model.get_submodule(f"{layer.name}.{name}")
            for tensor in _tensors(projection):
                by = own.repeat(len(index)).to(tensor)
                tensor[index.flatten()] *= by[:, None] if tensor.ndim == 2 else by
    buffers = dict(model.named_buffers())
    for leaf, buffer in on_cpu(model.get_submodule(rotation.module), target.config).named_buffers():
        name = f"{rotation.module}.{leaf}"
        like = buffers.get(name, next(iter(model.parameters())))
        buffers[name] = buffer.to(like.device, like.dtype if name in buffers else buffer.dtype)
    return assemble(target, model.state_dict(), buffers, model)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """Weight of a linear map, rows first, and its bias if it has one."""
    bias = getattr(module, "bias", None)
    return [matrix(module), *([] if bias is None else [bias])]


def _scaling(rotation: Rotation) -> float:
    scalings = {one.scaling for one in rotation.lists}
    if len(scalings) > 1:
        raise UnsupportedModelError(f"Layers scale their cosines by {sorted(scalings)}, and not all alike. {_WAY_OUT}")
    return scalings.pop()


def _score_scale(dense: nn.Module, small: nn.Module, name: str) -> float:
    """By what scores of the dense attention are multiplied more than those of the small one."""
    ratio = 1.0
    for key, value in vars(dense).items():
        other = getattr(small, key, None)
        if isinstance(value, float) and value != other:
            if key not in _SCALES or not isinstance(other, float):
                raise UnsupportedModelError(f"`{name}.{key}` follows the size of a head. {_WAY_OUT}")
            ratio *= value / other
    return ratio
