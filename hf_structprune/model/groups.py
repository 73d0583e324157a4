"""The parts of a structure: coupled groups, and the matrices whose rows and columns they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, eq=False)
class Part:
    """The entries of one dimension of one module that hold the units of a group.

    Attributes:
        module: Full name of the module.
        axis: `"rows"` (output features, bias, norm weight) or `"columns"` (input features).
        index: Shape `(num_units, width)`: the entries that belong to each unit.
    """

    module: str
    axis: str
    index: torch.Tensor


@dataclass(frozen=True, eq=False)
class CoupledGroup:
    """Units that can be cut from one layer, and everything that goes with them.

    Attributes:
        layer: Number of the decoder layer.
        kind: `"kv_groups"`, `"query_heads"` or `"mlp_neurons"`.
        num_units: Number of units.
        blocks: Kept units are spread evenly over so many equal blocks (query heads over their KV groups).
        producers: Rows of the matrices that compute the units.
        consumer: Columns of the matrix that reads them.
        norms: Weights of norms that span all units.
        parent: Full name of the module whose output is the consumer's output.
        unit_parameters: Parameters that go with one unit.
        unit_matrix_parameters: Those of them that multiply tokens: matrices, without biases and norms.
    """

    layer: int
    kind: str
    num_units: int
    blocks: int
    producers: tuple[Part, ...]
    consumer: Part
    norms: tuple[Part, ...]
    parent: str
    unit_parameters: int
    unit_matrix_parameters: int

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.producers, *self.norms, self.consumer)


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
    """

    index: int
    name: str
    groups: list[CoupledGroup] = field(default_factory=list)
    attention: AttentionShape | None = None
    parameters: int = 0
    matrix_parameters: int = 0
    sublayers: list[Sublayer] = field(default_factory=list)

    def group(self, kind: str) -> CoupledGroup | None:
        return next((group for group in self.groups if group.kind == kind), None)

    def sublayer(self, kind: str) -> Sublayer | None:
        return next((sublayer for sublayer in self.sublayers if sublayer.kind == kind), None)


def matrix(module: nn.Module) -> torch.Tensor:
    """The weight of a linear map as (output features, input features), a view."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def matrix_parameters(module: nn.Module, active_experts: int | None) -> int:
    """Weights that multiply each token: linear maps, and of stacked experts the ones a token is sent to.

    Args:
        module: Any module.
        active_experts: `config.num_experts_per_tok`.
    """
    total = sum(matrix(part).numel() for part in module.modules() if is_linear(part))
    for name, parameter in module.named_parameters():
        if active_experts and parameter.ndim == 3 and "experts" in name.split("."):
            total += parameter.numel() // parameter.shape[0] * active_experts
    return total
