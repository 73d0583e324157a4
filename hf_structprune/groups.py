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


@dataclass
class LayerStructure:
    """The coupled groups of one decoder layer."""

    index: int
    name: str
    groups: list[CoupledGroup] = field(default_factory=list)
    attention: AttentionShape | None = None

    def group(self, kind: str) -> CoupledGroup | None:
        return next((group for group in self.groups if group.kind == kind), None)


def matrix(module: nn.Module) -> torch.Tensor:
    """The weight of a linear map as (output features, input features), a view."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))
