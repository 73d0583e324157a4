"""The coupled group of the residual stream: every dimension of every parameter that holds its channels.

It is not traced. The model's class is built on the meta device with another hidden size: what grows and shrinks one to
one with it holds the channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..model.structure import ModelStructure, is_linear
from ..model.target import _REFUSED
from ..refit.norms import WAY_OUT
from .hidden_target import hidden_keys, sized_target


@dataclass(frozen=True)
class HiddenGroup:
    """The channels of the residual stream.

    Attributes:
        size: Number of channels, the hidden size `H`.
        entries: Pairs of the full name of a parameter and the dimension of it that holds the channels. Tied
            parameters are named once.
        keys: Keys of the configuration that hold the hidden size.
        unit_parameters: Parameters that go with one channel.
        unit_matrix_parameters: Those of them that multiply a token: matrices, the LM head included, and of stacked
            experts the ones that a token is sent to.
    """

    size: int
    entries: tuple[tuple[str, int], ...]
    keys: tuple[str, ...]
    unit_parameters: int
    unit_matrix_parameters: int

    def dims(self) -> dict[str, int]:
        """The dimension that holds the channels, by parameter."""
        return dict(self.entries)


def hidden_group(model: PreTrainedModel, structure: ModelStructure) -> HiddenGroup:
    """Finds the channels of the residual stream in all parameters; works on the meta device.

    Raises:
        UnsupportedModelError: Other widths of the model depend on the hidden size, so that channels cannot be cut
            alone; names the parameter that shows it.
    """
    size = model.config.hidden_size
    other, shapes = _other_shapes(model, structure)
    entries = []
    for name, parameter in model.named_parameters():
        if name not in shapes:
            raise UnsupportedModelError(f"`{name}` is not there in a model with hidden size {other}. {WAY_OUT}")
        dim = _channel_dim(model, name, parameter.shape, shapes[name], size, other)
        if dim is not None:
            entries.append((name, dim))
    parameters = sum(model.get_parameter(name).numel() // size for name, _ in entries)
    matrices = _matrix_parameters(model, {name for name, _ in entries}) // size
    return HiddenGroup(size, tuple(entries), hidden_keys(model.config), parameters, matrices)


def _channel_dim(
    model: PreTrainedModel, name: str, before: torch.Size, after: torch.Size, size: int, other: int
) -> int | None:
    """The dimension of a parameter that follows the hidden size, `None` if there is none."""
    changed = [dim for dim, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    if not changed:
        return None
    if len(changed) == 1 and (before[changed[0]], after[changed[0]]) == (size, other):
        return changed[0]
    raise UnsupportedModelError(
        f"`{name}` of shape {tuple(before)} would be {tuple(after)} with hidden size {other}: "
        f"{type(model.config).__name__} derives other widths from the hidden size (the size of a head from "
        f"hidden size / heads, for example), so that its channels cannot be cut alone. {WAY_OUT}"
    )


def _other_shapes(model: PreTrainedModel, structure: ModelStructure) -> tuple[int, dict[str, torch.Size]]:
    """Another hidden size that the class accepts, and the shapes of all parameters with it."""
    error: Exception | None = None
    for size in _sizes(model.config.hidden_size, structure):
        try:
            skeleton = sized_target(model, structure, size).skeleton()
        except _REFUSED as refused:
            error = error or refused
            continue
        return size, {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    raise UnsupportedModelError(
        f"{type(model).__name__} could not be built with another hidden size: {error}. {WAY_OUT}"
    )


def _sizes(size: int, structure: ModelStructure) -> Iterator[int]:
    """Hidden sizes to try: the next smaller ones by multiples that configurations ask for."""
    heads = math.lcm(*{layer.attention.heads for layer in structure.layers if layer.attention})
    for step in (heads, 2 * heads, 1, 2, 8, 64):
        if step < size:
            yield size - step
    yield 2 * size


def _matrix_parameters(model: nn.Module, names: set[str]) -> int:
    """Weights of these parameters that multiply a token; a tied head counts."""
    chosen = {id(model.get_parameter(name)) for name in names}
    total = sum(m.weight.numel() for m in model.modules() if is_linear(m) and id(m.weight) in chosen)
    active = getattr(model.config, "num_experts_per_tok", None)
    for name in names:
        parameter = model.get_parameter(name)
        if active and parameter.ndim == 3 and ".experts." in name:
            total += parameter.numel() // parameter.shape[0] * active
    return total
