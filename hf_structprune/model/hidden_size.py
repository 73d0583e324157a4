"""The residual stream: where its channels are, models with fewer of them, and the cut.

The channels are not traced. The model's class is built on the meta device with another hidden size: what grows and
shrinks one to one with it holds the channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CheckpointError, ConfigurationError, UnsupportedModelError
from .groups import matrix_parameters
from .norms import WAY_OUT, eps_changes, row_scales, scale_, stream_norms
from .probe import changed_dims, other_shapes
from .rebuild import assemble
from .structure import ModelStructure
from .target import Target, as_mistral, make_target, plain_values


_GROUPED = 8  # values in 16 bytes, in 16-bit formats
# Keys that name the hidden size under another name, where they have its value.
_FOLLOWERS = ("word_embed_proj_dim", "embedding_size", "embed_dim")


@dataclass(frozen=True)
class HiddenGroup:
    """The channels of the residual stream.

    Attributes:
        size: Number of channels, the hidden size `H`.
        entries: Full name of each parameter, tied ones once, and the dimension of it that holds the channels.
        cost: Parameters that go with one channel.
        matrix_cost: Those of them that multiply a token, see `matrix_parameters`.
    """

    size: int
    entries: tuple[tuple[str, int], ...]
    cost: int
    matrix_cost: int

    def dims(self) -> dict[str, int]:
        """The dimension that holds the channels, by parameter."""
        return dict(self.entries)


def hidden_group(model: PreTrainedModel, structure: ModelStructure) -> HiddenGroup:
    """Finds the channels of the residual stream in all parameters; works on the meta device.

    Raises:
        UnsupportedModelError: Other widths of the model depend on the hidden size, so that channels cannot be cut
            alone; names the parameter that shows it.
    """
    if structure.towers is not None:
        raise UnsupportedModelError(
            f"The hidden size of this decoder is also that of what stands beside it, which writes into its residual "
            f"stream, so that its channels cannot be cut. {WAY_OUT}"
        )
    size = model.config.hidden_size
    # Next smaller ones by multiples that configurations ask for.
    heads = math.lcm(*{layer.attention.heads for layer in structure.layers if layer.attention})
    sizes = [size - step for step in (heads, 2 * heads, 1, 2, 8, 64) if step < size]
    try:
        other, shapes = other_shapes(partial(sized_target, model, structure), [*sizes, 2 * size], "hidden size")
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(model).__name__}: {error} {WAY_OUT}") from error
    entries = []
    for name, parameter in model.named_parameters():
        if name not in shapes:
            raise UnsupportedModelError(f"`{name}` is not there in a model with hidden size {other}. {WAY_OUT}")
        before, after = parameter.shape, shapes[name]
        changed = changed_dims(before, after)
        if changed and [(before[dim], after[dim]) for dim in changed] != [(size, other)]:
            raise UnsupportedModelError(
                f"`{name}` of shape {tuple(before)} would be {tuple(after)} with hidden size {other}: "
                f"{type(model.config).__name__} derives other widths from the hidden size (the size of a head from "
                f"hidden size / heads, for example), so that its channels cannot be cut alone. {WAY_OUT}"
            )
        entries += [(name, dim) for dim in changed]
    weights = [model.get_parameter(name) for name, _ in entries]
    active = getattr(model.config, "num_experts_per_tok", None)
    matrices = matrix_parameters(model, active, {id(weight) for weight in weights}) // size
    cost = sum(weight.numel() // size for weight in weights)
    return HiddenGroup(size, tuple(entries), cost, matrices)


def shrunk_target(model: PreTrainedModel, structure: ModelStructure, keep: int) -> Target:
    """Class and configuration of the model with `keep` channels.

    The epsilon of RMS norms over the hidden size grows by `H / keep`, see `norms.scale_`.

    Raises:
        ConfigurationError: `keep` is not from 1 to the hidden size.
        UnsupportedModelError: What else follows the hidden size or its epsilon cannot be made up for, see
            `norms.row_scales`.
        CheckpointError: No configuration class takes this hidden size.
    """
    size = model.config.hidden_size
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 < keep <= size:
        raise ConfigurationError(f"The hidden size after pruning is {keep!r}; it must be an integer from 1 to {size}.")
    stacked = any(parameter.ndim == 3 and ".experts." in name for name, parameter in model.named_parameters())
    if stacked and keep % _GROUPED:  # the result could not run
        raise CheckpointError(
            f"Hidden size {keep}: experts are multiplied in groups, whose rows have to be multiples of 16 bytes; "
            f"choose a multiple of {_GROUPED}, such as {max(_GROUPED, keep // _GROUPED * _GROUPED)}."
        )
    try:
        target = sized_target(model, structure, keep)
        small = target.skeleton()
        changes = eps_changes(model, small)
        if changes:
            target = sized_target(model, structure, keep, changes)
            small = target.skeleton()
    except CheckpointError as error:
        raise CheckpointError(f"No {type(model.config).__name__} has hidden size {keep}: {error}") from error
    row_scales(model, small)
    return target


def sized_target(
    model: PreTrainedModel, structure: ModelStructure, size: int, changes: dict[str, Any] | None = None
) -> Target:
    """Class and configuration with another hidden size and the same heads.

    A `LlamaConfig` takes no hidden size that the number of heads does not divide; it is then written as a Mistral.
    `changes` are other values of the configuration.
    """
    config, values = model.config, plain_values(model.config)
    head_dim = next((layer.attention.head_dim for layer in structure.layers if layer.attention), None)
    head_dim = getattr(config, "head_dim", None) or head_dim
    if head_dim and not isinstance(getattr(type(config), "head_dim", None), property):
        values["head_dim"] = head_dim
    own = getattr(config, "attribute_map", {}).get("hidden_size", "hidden_size")
    keys = [own, *(key for key in _FOLLOWERS if getattr(config, key, None) == config.hidden_size)]
    values.update({key: size for key in keys}, **(changes or {}))
    try:
        return make_target(model, values)
    except CheckpointError:
        target = as_mistral(model, values)
        if target is None:
            raise
        return target


@torch.no_grad()
def cut_channels(model: PreTrainedModel, group: HiddenGroup, kept: torch.Tensor, target: Target) -> PreTrainedModel:
    """A model with the channels `kept`; the dense one stays as it is.

    For RMS norms it equals the dense model with zeros in the other channels of everything that writes to the stream
    (exactly, with the epsilon of `target`): norm weights grow by `sqrt(H / H')`, see `norms.scale_`, and maps in front
    of other norms that share the epsilon by what it costs them, see `norms.row_scales`. A LayerNorm takes mean and
    variance over the channels that are left; zeroed channels would enter both, and no weights make up for that.

    Args:
        kept: Numbers of the channels that stay, ascending, shape (H',).
        target: Class and configuration of the result, see `shrunk_target`.

    Returns:
        The smaller model in eval mode, with tensors of its own.
    """
    dims = group.dims()
    by_id = {id(parameter): dims.get(name) for name, parameter in model.named_parameters()}
    done: dict[int, torch.Tensor] = {}  # tied weights are cut once
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in done:
            dim, old = by_id.get(id(tensor)), tensor.detach()
            done[id(tensor)] = old.clone() if dim is None else old.index_select(dim, kept.to(old.device)).contiguous()
        state[name] = done[id(tensor)]
    for name, kind in stream_norms(model, set(dims)).items():
        if not kind.centred:
            scale_(state[f"{name}.weight"], kind, math.sqrt(group.size / len(kept)))
    for name, factors in row_scales(model, target.skeleton()).items():
        _scale_rows(state, name, model.get_submodule(name), factors)
    buffers = dict(model.named_buffers())
    _correct_embedding(model, group, state, buffers, len(kept))
    result = assemble(target, state, buffers, model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    return result


def _scale_rows(state: dict[str, torch.Tensor], name: str, module: nn.Module, factors: torch.Tensor) -> None:
    """Multiplies the rows of a linear map, and its bias."""
    weight = state[f"{name}.weight"]
    factors = factors.to(weight.device)
    rows = factors[:, None] if isinstance(module, nn.Linear) else factors
    state[f"{name}.weight"] = (weight * rows).to(weight.dtype)
    if module.bias is not None:
        state[f"{name}.bias"] = (state[f"{name}.bias"] * factors).to(weight.dtype)


def _correct_embedding(
    model: PreTrainedModel,
    group: HiddenGroup,
    state: dict[str, torch.Tensor],
    buffers: dict[str, torch.Tensor],
    keep: int,
) -> None:
    """Makes up for `embed_scale = sqrt(hidden size)` (Gemma), which a smaller model multiplies its embeddings by.

    The embeddings grow by what their scale shrinks by; with a tied head the final norm shrinks by the same.
    """
    embedding = model.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", None)
    if not isinstance(scale, torch.Tensor) or not math.isclose(float(scale), math.sqrt(group.size), rel_tol=1e-2):
        return
    prefix = next(name for name, module in model.named_modules() if module is embedding)
    factor = math.sqrt(group.size / keep)
    buffers[f"{prefix}.embed_scale"] = torch.full_like(scale, math.sqrt(keep))
    state[f"{prefix}.weight"].mul_(factor)
    head = model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        name = final_norm(model, group)
        scale_(state[f"{name}.weight"], stream_norms(model, {f"{name}.weight"})[name], 1 / factor)


def final_norm(model: PreTrainedModel, group: HiddenGroup) -> str:
    """Full name of the norm in front of the LM head: the last norm of the stream outside the decoder layers."""
    parts = [name.split(".") for name in stream_norms(model, set(group.dims()))]
    return ".".join([part for part in parts if not any(word.isdigit() for word in part)][-1])
