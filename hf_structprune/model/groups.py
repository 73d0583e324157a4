"""The parts of a structure: coupled groups, and the matrices whose rows and columns they are."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


if TYPE_CHECKING:
    from .families import Projections


# Numbers of the units that stay, by `(layer, kind)`.
Kept = dict[tuple[int, str], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Slice:
    """The entries of one dimension of one tensor that hold the units of a group.

    Attributes:
        tensor: Full name of the parameter.
        dim: Its dimension.
        index: Shape `(units, width)`: the entries that belong to each unit; -1 for none.
        stacked: Whether entries are counted over the first dimension too, as those of neurons of stacked experts:
            entry `j` of expert `e` is `e * tensor.shape[dim] + j`.
    """

    tensor: str
    dim: int
    index: torch.Tensor
    stacked: bool = False

    @property
    def module(self) -> str:
        """Full name of the module that holds the parameter."""
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can be cut, and everything that goes with them.

    Attributes:
        kind: Name of the kind of unit.
        layer: Number of the decoder layer; -1 for the residual stream, which is of all of them.
        size: Number of units.
        slices: Where the units are: what computes them first, what reads them last.
        reader: The slice of the linear map whose input columns the units are, which is re-fitted; `None` for units
            that no one map reads, as experts.
        parent: Full name of the module whose output is the reader's output.
        norms: Full names of norms that span all units.
        blocks: Kept units are spread evenly over so many equal blocks (query heads over their KV groups).
        cost: Parameters that go with one unit.
        matrix_cost: Those of them that multiply each token: matrices, without biases and norms; of neurons of experts,
            of which a token sees some, the mean.
        least: The fewest units that can be left.
        step: Kept units are a multiple of it, besides being spread evenly over the blocks.
        key_in_config: Key of the configuration that holds their number, where the kind has not one for all models.
        keys_along: Further keys that follow their number, and by how much for each unit.
        counters: Full names of attributes of modules that follow their number, and by how much for each unit.
        router: Full name of the weight of the router's linear map, shape (experts, hidden), for what is in experts.
        in_experts: Whether the units are parts of experts, each of which keeps its own, and not whole experts.
        coupled: Whether what the reader gets of a unit depends on the others, as through a norm over all of them.
    """

    kind: str
    layer: int
    size: int
    slices: tuple[Slice, ...]
    reader: Slice | None
    parent: str
    norms: tuple[str, ...] = ()
    blocks: int = 1
    cost: int = 0
    matrix_cost: float = 0
    least: int = 1
    step: int = 1
    key_in_config: str = ""
    keys_along: tuple[tuple[str, Fraction], ...] = ()
    counters: tuple[tuple[str, Fraction], ...] = ()
    router: str = ""
    in_experts: bool = False
    coupled: bool = False

    @property
    def key(self) -> tuple[int, str]:
        """Names the group in a model."""
        return self.layer, self.kind

    def dims(self) -> dict[str, int]:
        """The dimension that holds the units, by tensor."""
        return {part.tensor: part.dim for part in self.slices}

    @property
    def whole(self) -> int:
        """Units in each block."""
        return self.size // self.blocks

    @property
    def multiple(self) -> int:
        """Kept units are a multiple of this."""
        return math.lcm(self.blocks, self.step)

    @property
    def half(self) -> int:
        """Units of which a half goes, or as many as can."""
        return max(self.least, self.multiple, self.size // 2 // self.multiple * self.multiple)

    @property
    def producers(self) -> list[str]:
        """Full names of the modules that compute the units."""
        modules = [part.module for part in self.slices if part is not self.reader]
        return [name for name in dict.fromkeys(modules) if name not in self.norms]


@dataclass(frozen=True)
class AttentionShape:
    """Numbers of heads of one attention module."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def rep(self) -> int:
        """Query heads in a KV group."""
        return self.heads // self.kv_heads

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Sublayer:
    """What goes when the attention or the MLP of a layer is skipped; the layer stays.

    Attributes:
        kind: `"attention"` or `"mlp"`.
        module: Full name of the module whose output is the sublayer's.
        inner: Full names of modules in front of it that go too, where the projections stand in the layer itself.
        norms: Full names of the norms that belong to it alone; one that the other sublayer reads as well stays.
        consumer: Full name of the linear map that is the sublayer's last; `""` for experts, which have several.
        parameters: All parameters that go, norms included.
        matrix_parameters: Those of them that multiply each token.
    """

    kind: str
    module: str
    norms: tuple[str, ...]
    consumer: str
    parameters: int
    matrix_parameters: int
    inner: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Everything that goes, norms included."""
        return (*self.norms, *self.inner, self.module)


@dataclass
class LayerStructure:
    """What can be cut from one decoder layer.

    Attributes:
        index: Number of the layer.
        name: Full name of its module.
        groups: Its coupled groups.
        attention: Numbers of heads.
        parameters: All parameters of the layer.
        matrix_parameters: Those of them that multiply each token.
        sublayers: Those that can be skipped.
        latent: Numbers that its latent attention caches of a token, 0 without one.
    """

    index: int
    name: str
    groups: list[Group] = field(default_factory=list)
    attention: AttentionShape | None = None
    parameters: int = 0
    matrix_parameters: int = 0
    sublayers: list[Sublayer] = field(default_factory=list)
    latent: int = 0

    def group(self, kind: str) -> Group | None:
        return next((group for group in self.groups if group.kind == kind), None)

    def sublayer(self, kind: str) -> Sublayer | None:
        return next((sublayer for sublayer in self.sublayers if sublayer.kind == kind), None)


def matrix(module: nn.Module) -> torch.Tensor:
    """The weight of a linear map as (output features, input features), a view."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def _rows(layer: nn.Module, prefix: str, name: str, index: torch.Tensor) -> list[Slice]:
    """Output features of a linear map (with the bias), or entries of a norm's weight."""
    module, full = layer.get_submodule(name), f"{prefix}.{name}"
    slices = [Slice(f"{full}.weight", int(isinstance(module, Conv1D)), index)]
    bias = getattr(module, "bias", None)
    return [*slices, Slice(f"{full}.bias", 0, index)] if is_linear(module) and bias is not None else slices


def make_group(
    kind: str,
    structure: LayerStructure,
    layer: nn.Module,
    names: Projections,
    size: int,
    producers: list[tuple[str, torch.Tensor]],
    columns: torch.Tensor,
    norms: Iterable[tuple[str, torch.Tensor]] = (),
    blocks: int = 1,
) -> Group:
    """A group whose units are rows of some linear maps, entries of norms, and columns of the map that reads them.

    Args:
        kind, size, blocks: See `Group`.
        structure, layer, names: What was found in the layer so far, it, and where it keeps its projections.
        producers: Names of the maps that compute the units, and the rows of each unit.
        columns: Columns of each unit in `names.output`.
        norms: Names of norms that span all units, and the entries of each unit.
    """
    slices = [part for name, index in (*producers, *norms) for part in _rows(layer, structure.name, name, index)]
    module = layer.get_submodule(names.output)
    reader = Slice(f"{structure.name}.{names.output}.weight", int(not isinstance(module, Conv1D)), columns)
    parent = f"{structure.name}.{names.output if names.holder else names.parent or names.output}"
    spans = tuple(f"{structure.name}.{name}" for name, _ in norms)
    everything = (*slices, reader)
    cost = costs(layer, structure.name, everything)
    return Group(kind, structure.index, size, everything, reader, parent, spans, blocks, *cost)


def not_understood(layer: nn.Module, names: Projections, norms: Collection[str] = ()) -> list[str] | None:
    """Why projections of a layer are left alone; empty where it has none of these, `None` if nothing is in the way.

    `norms` are names of norms beside the projections that are understood.
    """
    if not is_linear(submodule(layer, names.output)):
        return []
    reason = next(
        (f"`{name}` is not a linear map" for name in names.inputs if not is_linear(submodule(layer, name))), None
    )
    if reason is None and names.parent and any(name.startswith(f"{names.parent}.") for name in names.inputs):
        reason = _stranger(layer.get_submodule(names.parent), names, norms)
    return None if reason is None else [f"{names.parent or names.output}: {reason}, left alone"]


def _stranger(module: nn.Module, names: Projections, norms: Collection[str]) -> str | None:
    """Parameters in a module that the description does not account for."""
    for name, parameter in module.named_parameters(prefix=names.parent):
        owner = name.rpartition(".")[0]
        if parameter.numel() == 1:  # of an activation
            continue
        if owner not in {*names.inputs, names.output} and owner.rpartition(".")[2] not in norms:
            return f"parameter `{name}` is not understood"
    return None


def submodule(layer: nn.Module, name: str) -> nn.Module | None:
    """A module below a layer, `None` if it is not there."""
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def costs(layer: nn.Module, prefix: str, slices: Iterable[Slice]) -> tuple[int, int]:
    """Parameters that go with one unit, and those of them that are in matrices."""
    total = weights = 0
    for part in slices:
        parameter = layer.get_parameter(part.tensor[len(prefix) + 1 :])
        size = part.index.shape[1] * (parameter.numel() // parameter.shape[part.dim])
        total += size
        weights += size if parameter.ndim > 1 else 0
    return total, weights


def is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def matrix_parameters(module: nn.Module, active_experts: int | None, among: Collection[int] | None = None) -> int:
    """Weights that multiply each token: linear maps, and of stacked experts the ones a token is sent to.

    `active_experts` is `config.num_experts_per_tok`; with `among` only parameters with these `id`s count.
    """
    total = sum(
        part.weight.numel()
        for part in module.modules()
        if is_linear(part) and (among is None or id(part.weight) in among)
    )
    for name, parameter in module.named_parameters():
        stacked = parameter.ndim == 3 and "experts" in name.split(".")
        if active_experts and stacked and (among is None or id(parameter) in among):
            total += parameter.numel() // parameter.shape[0] * active_experts
    return total


def tensor_of(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or the buffer of this full name."""
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf)


def dropped(group: Group, kept: torch.Tensor) -> torch.Tensor:
    """Numbers of the units that go."""
    mask = torch.ones(group.size, dtype=torch.bool)
    mask[kept.cpu()] = False
    return mask.nonzero().squeeze(1)
