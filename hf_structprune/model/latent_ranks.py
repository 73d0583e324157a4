"""Latents of attention (MLA): where they are, models with fewer directions of them, the turn, and the cut.

Queries, or keys and values, are `B norm(A x)`: a writer `A` to a latent, an RMS norm over it, and readers `B`. What
the key of the rank sizes is found by building the class on the meta device with another value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CheckpointError, ConfigurationError, UnsupportedModelError
from ..units import KINDS
from .groups import Group, Slice, costs, matrix
from .hidden_size import norm_kind, scale_
from .probe import changed_dims, other_shapes, with_more
from .rebuild import assemble
from .structure import ModelStructure
from .surgery import cut_units
from .target import Target, make_target, plain_values


@dataclass(frozen=True, eq=False)
class Latent:
    """One latent of one attention, by full names of modules.

    Attributes:
        group: Its directions; the writer comes first, the rest of its rows (the key that is rotated) is no part of it.
        writer: The linear map that computes it.
        norm: The RMS norm over it.
        readers: Linear maps that read it: `q_b_proj` or `kv_b_proj`, and that of an indexer.
    """

    group: Group
    writer: str
    norm: str
    readers: tuple[str, ...]


def latents(kind: str, model: PreTrainedModel, structure: ModelStructure) -> list[Latent]:
    """All latents of a kind, in the order of the model; works on the meta device.

    Raises:
        UnsupportedModelError: There are none, or their directions cannot be cut; names what shows it.
    """
    key, name = KINDS[kind].key, type(model).__name__
    if structure.towers is not None:
        raise UnsupportedModelError(
            f"The latents of a decoder that is a part of a larger model are left as they are. {_way_out(kind)}"
        )
    if not KINDS[kind].is_of(model.config):
        raise UnsupportedModelError(
            f"{type(model.config).__name__} has no `{key}`: the {KINDS[kind].what} of {name} are not computed from "
            f"latents. {_way_out(kind)}"
        )
    try:
        step, shapes = other_shapes(partial(with_more, model, key), (2, 8, -2), key)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error} {_way_out(kind)}") from error
    parts: dict[str, list[Slice]] = {}  # by the attention that holds them
    for tensor, parameter in model.named_parameters():
        if tensor not in shapes:
            raise UnsupportedModelError(f"`{tensor}` is not there with another `{key}`. {_way_out(kind)}")
        for dim in changed_dims(parameter.shape, shapes[tensor]):
            size = parameter.shape[dim]
            if shapes[tensor][dim] != size + step:
                raise UnsupportedModelError(
                    f"`{tensor}` grows from {size} to {shapes[tensor][dim]} with `{key}` {step} larger: it reads or "
                    f"computes latents in a form that is not understood. {_way_out(kind)}"
                )
            attention = tensor.rpartition(".")[0].rpartition(".")[0]
            holder = next((name for name in parts if f"{attention}.".startswith(f"{name}.")), attention)
            parts.setdefault(holder, []).append(Slice(tensor, dim, torch.empty(0)))
    found = [_latent(kind, model, structure, own) for own in parts.values()]
    sizes = {latent.group.size for latent in found}
    if len(sizes) != 1:
        raise UnsupportedModelError(f"{name}: its latents have ranks of {sorted(sizes)}, not of one. {_way_out(kind)}")
    return found


def _way_out(kind: str) -> str:
    return f"Cut 'kv_groups', 'mlp_neurons' or 'layers' of this model instead of '{kind}'."


def _latent(kind: str, model: PreTrainedModel, structure: ModelStructure, parts: list[Slice]) -> Latent:
    """The latent of what grows with the rank in one attention."""
    writers, norms, readers = [], [], []
    for part in parts:
        linear = isinstance(model.get_submodule(part.module), nn.Linear)
        (norms if not linear else readers if part.dim == 1 else writers).append(part)
    weights = [part for part in writers if part.tensor.endswith(".weight")]
    names = ", ".join(f"`{part.tensor}`" for part in parts)
    if len(weights) != 1 or len({part.module for part in writers}) != 1 or len(norms) != 1 or not readers:
        raise UnsupportedModelError(
            f"What grows with `{KINDS[kind].key}` is {names}, and not a linear map, a norm, and linear maps that read "
            f"what it gives. {_way_out(kind)}"
        )
    norm, writer = model.get_submodule(norms[0].module), weights[0].module
    how = norm_kind(norm)
    if how is None or how.centred or [leaf for leaf, _ in norm.named_parameters()] != ["weight"]:
        raise UnsupportedModelError(f"`{norms[0].module}` is no RMS norm with weights alone. {_way_out(kind)}")
    size = norm.weight.numel()
    slices = tuple(Slice(part.tensor, part.dim, torch.arange(size)[:, None]) for part in (*writers, *norms, *readers))
    if any(model.get_parameter(part.tensor).shape[part.dim] != size for part in readers):
        raise UnsupportedModelError(f"What grows is {names}, of which readers have other inputs. {_way_out(kind)}")
    layer = next((one for one in structure.layers if writer.startswith(f"{one.name}.")), None)
    if layer is None:
        raise UnsupportedModelError(f"`{writer}` is in none of the decoder layers. {_way_out(kind)}")
    cost = costs(model.get_submodule(layer.name), layer.name, slices)
    group = Group(kind, layer.index, size, slices, None, writer.rpartition(".")[0], (norms[0].module,), 1, *cost)
    return Latent(group, writer, norms[0].module, tuple(part.module for part in readers))


def rank_group(kind: str, model: PreTrainedModel, structure: ModelStructure) -> Group:
    """The directions of all latents of a kind; works on the meta device.

    Raises:
        UnsupportedModelError: See `latents`; or a number that follows the rank is not understood.
    """
    groups = [latent.group for latent in latents(kind, model, structure)]
    smaller_ranks(kind, model, structure, max(1, groups[0].size - 2))
    slices = tuple(part for group in groups for part in group.slices)
    cost, matrices = sum(group.cost for group in groups), sum(group.matrix_cost for group in groups)
    return Group(
        kind, -1, groups[0].size, slices, None, "", tuple(n for g in groups for n in g.norms), 1, cost, matrices
    )


def smaller_ranks(kind: str, model: PreTrainedModel, structure: ModelStructure, keep: int) -> Target:
    """Class and configuration of the model with latents of `keep` directions.

    Raises:
        ConfigurationError: `keep` is no number from 1 to the rank there is.
        UnsupportedModelError: See `latents`.
        CheckpointError: No configuration class takes this rank.
    """
    found, key = latents(kind, model, structure), KINDS[kind].key
    size = found[0].group.size
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 < keep <= size:
        raise ConfigurationError(f"The {KINDS[kind].label} after pruning is {keep!r}; it must be from 1 to {size}.")
    try:
        target = make_target(model, {**plain_values(model.config), key: keep})
        small = target.glance()
    except CheckpointError as error:
        raise CheckpointError(f"No {type(model.config).__name__} has `{key}` {keep}: {error}") from error
    for latent in found:
        _growth(model, small, latent)
    return target


def _growth(model: PreTrainedModel, small: PreTrainedModel, latent: Latent) -> float:
    """By what the attention of the dense model multiplies what comes of a latent more than the small one.

    LongCat and dots3 scale it by `sqrt(hidden size / rank)`.
    """
    name, ratios = latent.group.parent, []
    other = vars(small.get_submodule(name))
    for attribute, value in vars(model.get_submodule(name)).items():
        if isinstance(value, float) and value != other.get(attribute):
            ratios.append(value / other[attribute])
    if len(ratios) > 1:
        raise UnsupportedModelError(f"Several numbers of `{name}` follow its rank. {_way_out(latent.group.kind)}")
    return ratios[0] if ratios else 1.0


@torch.no_grad()
def turn(model: PreTrainedModel, latent: Latent, basis: torch.Tensor) -> None:
    """Writes a latent in another basis, in place, which changes nothing: `A <- Q^T A`, `B <- B diag(w) Q`, `w <- 1`.

    An RMS norm without weights commutes with orthogonal maps; its weights go into the readers (as in SliceGPT,
    https://huggingface.co/papers/2401.15024).

    Args:
        basis: `Q`, orthogonal, shape (rank, rank), directions as columns.
    """
    norm, size = model.get_submodule(latent.norm), latent.group.size
    weight, offset = norm.weight, norm_kind(norm).offset
    for name in latent.readers:
        reader = matrix(model.get_submodule(name))
        scaled = reader.double() * (weight.double() + offset).to(reader.device)
        reader.copy_(scaled @ basis.to(scaled))
    weight.fill_(1 - offset)
    for tensor in _tensors(model, latent):
        tensor[:size] = (basis.to(tensor.device, torch.float64).T @ tensor[:size].double()).to(tensor.dtype)


def silence(model: PreTrainedModel, latent: Latent, keep: int) -> None:
    """Zeroes all directions but the first `keep` where they are computed, in place."""
    for tensor in _tensors(model, latent):
        tensor.data[keep : latent.group.size] = 0


def _tensors(model: PreTrainedModel, latent: Latent) -> list[torch.Tensor]:
    """Weight and bias of the map that computes a latent."""
    return list(model.get_submodule(latent.writer).parameters())


@torch.no_grad()
def rebuild_ranks(model: PreTrainedModel, target: Target, found: Iterable[Latent], keep: int) -> PreTrainedModel:
    """A model of `smaller_ranks` with the first `keep` directions of each latent; the other one is of no use any more.

    It equals the model with zeros in the other directions exactly: a norm over `n` directions, of which `n'` are not
    zero, gives `w x / sqrt(S / n + eps)` with `S = sum x^2`; over those alone it gives the same with
    `w' = w sqrt(n / n')` and inputs times `sqrt(n' / n)`, whatever its epsilon.
    """
    found, small = list(found), target.skeleton()
    for latent in found:
        shrink, norm = math.sqrt(keep / latent.group.size), model.get_submodule(latent.norm)
        for tensor in _tensors(model, latent):
            tensor[: latent.group.size] *= shrink
        scale_(norm.weight, norm_kind(norm), _growth(model, small, latent) / shrink)
        cut_units(model, [latent.group], {latent.group.key: torch.arange(keep)})
    return assemble(target, model.state_dict(), dict(model.named_buffers()), model)
