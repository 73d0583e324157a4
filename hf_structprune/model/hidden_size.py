"""The residual stream: where its channels are, what kind its norms are, models with fewer channels, and the cut.

The channels are not traced. The model's class is built on the meta device with another hidden size: what grows and
shrinks one to one with it holds the channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CheckpointError, ConfigurationError, UnsupportedModelError
from ..units.hidden import HIDDEN
from .groups import Group, Slice, is_linear, matrix, matrix_parameters
from .probe import changed_dims, other_shapes
from .rebuild import assemble
from .structure import ModelStructure
from .target import Target, make_target, plain_values


_GROUPED = 8  # values in 16 bytes, in 16-bit formats
# Keys that name the hidden size under another name, where they have its value.
_FOLLOWERS = ("word_embed_proj_dim", "embedding_size", "embed_dim")
_WAY_OUT = "Cut 'mlp_neurons', 'kv_groups' or 'layers' of this model instead of 'hidden'."


def hidden_group(model: PreTrainedModel, structure: ModelStructure) -> Group:
    """Finds the channels of the residual stream in all parameters, tied ones once; works on the meta device.

    Raises:
        UnsupportedModelError: Other widths of the model depend on the hidden size, so that channels cannot be cut
            alone; names the parameter that shows it.
    """
    if structure.towers is not None:
        raise UnsupportedModelError(
            f"The hidden size of this decoder is also that of what stands beside it, which writes into its residual "
            f"stream, so that its channels cannot be cut. {_WAY_OUT}"
        )
    size = model.config.hidden_size
    # Next smaller ones by multiples that configurations ask for.
    heads = math.lcm(*{layer.attention.heads for layer in structure.layers if layer.attention})
    sizes = [size - step for step in (heads, 2 * heads, 1, 2, 8, 64) if step < size]
    try:
        other, shapes = other_shapes(partial(_sized_target, model, structure), [*sizes, 2 * size], "hidden size")
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(model).__name__}: {error} {_WAY_OUT}") from error
    slices = []
    for name, parameter in model.named_parameters():
        if name not in shapes:
            raise UnsupportedModelError(f"`{name}` is not there in a model with hidden size {other}. {_WAY_OUT}")
        before, after = parameter.shape, shapes[name]
        changed = changed_dims(before, after)
        if changed and [(before[dim], after[dim]) for dim in changed] != [(size, other)]:
            raise UnsupportedModelError(
                f"`{name}` of shape {tuple(before)} would be {tuple(after)} with hidden size {other}: "
                f"{type(model.config).__name__} derives other widths from the hidden size (the size of a head from "
                f"hidden size / heads, for example), so that its channels cannot be cut alone. {_WAY_OUT}"
            )
        slices += [Slice(name, dim, torch.arange(size)[:, None]) for dim in changed]
    weights = [model.get_parameter(part.tensor) for part in slices]
    active = getattr(model.config, "num_experts_per_tok", None)
    matrices = matrix_parameters(model, active, {id(weight) for weight in weights}) // size
    cost = sum(weight.numel() // size for weight in weights)
    return Group(HIDDEN, -1, size, tuple(slices), None, "", cost=cost, matrix_cost=matrices)


def shrunk_target(model: PreTrainedModel, structure: ModelStructure, keep: int) -> Target:
    """Class and configuration of the model with `keep` channels.

    The epsilon of RMS norms over the hidden size grows by `H / keep`, see `scale_`.

    Raises:
        ConfigurationError: `keep` is not from 1 to the hidden size.
        UnsupportedModelError: What else follows the hidden size or its epsilon cannot be made up for, see
            `row_scales`.
        CheckpointError: No configuration class takes this hidden size.
    """
    config = model.config
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 < keep <= config.hidden_size:
        raise ConfigurationError(
            f"The hidden size after pruning is {keep!r}; it must be an integer from 1 to {config.hidden_size}."
        )
    stacked = any(parameter.ndim == 3 and ".experts." in name for name, parameter in model.named_parameters())
    if stacked and keep % _GROUPED:  # the result could not run
        raise CheckpointError(
            f"Hidden size {keep}: experts are multiplied in groups, whose rows have to be multiples of 16 bytes; "
            f"choose a multiple of {_GROUPED}, such as {max(_GROUPED, keep // _GROUPED * _GROUPED)}."
        )
    try:
        target, changes = _sized_target(model, structure, keep), {}
        small, values = target.skeleton(), config.to_dict().items()
        for name, factor in _rms_norms(model, small).items():
            eps = _epsilon(model.get_submodule(name))
            changes |= {k: eps * factor for k, v in values if "eps" in k and isinstance(v, float) and v == eps}
        if changes:
            target = _sized_target(model, structure, keep, changes)
            small = target.skeleton()
    except CheckpointError as error:
        raise CheckpointError(f"No {type(config).__name__} has hidden size {keep}: {error}") from error
    row_scales(model, small)
    return target


def _sized_target(
    model: PreTrainedModel, structure: ModelStructure, size: int, changes: dict[str, Any] | None = None
) -> Target:
    """Class and configuration with another hidden size and the same heads; `changes` are other values of it."""
    config, values = model.config, plain_values(model.config)
    head_dim = next((layer.attention.head_dim for layer in structure.layers if layer.attention), None)
    head_dim = getattr(config, "head_dim", None) or head_dim
    if head_dim and not isinstance(getattr(type(config), "head_dim", None), property):
        values["head_dim"] = head_dim
    own = getattr(config, "attribute_map", {}).get("hidden_size", "hidden_size")
    keys = [own, *(key for key in _FOLLOWERS if getattr(config, key, None) == config.hidden_size)]
    values.update({key: size for key in keys}, **(changes or {}))
    return make_target(model, values)


@torch.no_grad()
def cut_channels(model: PreTrainedModel, group: Group, kept: torch.Tensor, target: Target) -> PreTrainedModel:
    """A model of a `shrunk_target` with the channels `kept`, ascending, shape (H',); the dense one stays as it is.

    For RMS norms it equals the dense model with zeros in the other channels of everything that writes to the stream
    (exactly, with the epsilon of `target`): norm weights grow by `sqrt(H / H')`, see `scale_`, and maps in front
    of other norms that share the epsilon by what it costs them, see `row_scales`. A LayerNorm takes mean and
    variance over the channels that are left; zeroed channels would enter both, and no weights make up for that.
    """
    dims, norms = group.dims(), stream_norms(model, group.dims())
    by_id = {id(parameter): dims.get(name) for name, parameter in model.named_parameters()}
    done: dict[int, torch.Tensor] = {}  # tied weights are cut once
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in done:
            dim, old = by_id.get(id(tensor)), tensor.detach()
            done[id(tensor)] = old.clone() if dim is None else old.index_select(dim, kept.to(old.device)).contiguous()
        state[name] = done[id(tensor)]
    growth = math.sqrt(group.size / len(kept))
    for name, kind in norms.items():
        if not kind.centred:
            scale_(state[f"{name}.weight"], kind, growth)
    for name, factors in row_scales(model, target.skeleton()).items():
        linear = isinstance(model.get_submodule(name), nn.Linear)
        for key in (key for key in (f"{name}.weight", f"{name}.bias") if key in state):
            rows = factors[:, None] if linear and key.endswith("weight") else factors
            state[key] = (state[key] * rows.to(state[key].device)).to(state[key].dtype)
    # A smaller Gemma multiplies its embeddings by less, `embed_scale = sqrt(hidden size)`: they grow by as much, and
    # with a tied head the final norm shrinks by the same.
    buffers, embedding = dict(model.named_buffers()), model.get_input_embeddings()
    scale, head = getattr(embedding, "embed_scale", None), model.get_output_embeddings()
    if isinstance(scale, torch.Tensor) and math.isclose(float(scale), math.sqrt(group.size), rel_tol=1e-2):
        name = next(name for name, module in model.named_modules() if module is embedding)
        buffers[f"{name}.embed_scale"] = torch.full_like(scale, math.sqrt(len(kept)))
        state[f"{name}.weight"].mul_(growth)
        if head is not None and head.weight is embedding.weight:
            name = final_norm(model, group)
            scale_(state[f"{name}.weight"], norms[name], 1 / growth)
    return assemble(target, state, buffers, model)


def final_norm(model: PreTrainedModel, group: Group) -> str:
    """Full name of the norm in front of the LM head: the last norm of the stream outside the decoder layers."""
    names = [name for name in stream_norms(model, group.dims()) if not any(part.isdigit() for part in name.split("."))]
    return names[-1]


class NormKind(NamedTuple):
    """How a norm computes."""

    centred: bool  # it subtracts the mean (LayerNorm)
    offset: float  # what is added to its weight: 1 for Gemma, whose weights are stored as `w - 1`, else 0


@torch.no_grad()
def norm_kind(module: nn.Module) -> NormKind | None:
    """The kind of a module with a weight for each channel, found by trying it; `None` if it is no norm."""
    weight = getattr(module, "weight", None)
    if is_linear(module) or isinstance(module, nn.Embedding) or weight is None or weight.ndim != 1:
        return None
    twin = copy.deepcopy(module).to_empty(device="cpu").float()
    run = partial(type(module).forward, twin)  # without what Accelerate puts around it, which moves the input
    for parameter in twin.parameters():
        parameter.zero_()
    numbers = torch.linspace(-1, 2, weight.numel() * 2, dtype=torch.float32, device="cpu")
    x = 1e4 * (numbers.cos().view(2, -1) + 0.5)  # no epsilon matters beside it
    offset = float(run(x).abs().max() > 1e-6)
    twin.weight.fill_(1 - offset)
    y = run(x)
    if not torch.allclose(run(2 * x), y, atol=1e-3) or torch.allclose(y, x):
        return None
    return NormKind(centred=torch.allclose(run(x + 1e4), y, atol=1e-3), offset=offset)


def stream_norms(model: PreTrainedModel, names: Collection[str]) -> dict[str, NormKind]:
    """Norms whose weights are among these parameters, in the order of the model, by the full name of the module."""
    found = {
        name: module
        for name, module in model.named_modules()
        if f"{name}.weight" in names and getattr(module.weight, "ndim", 0) == 1
    }
    kinds = {cls: norm_kind(module) for cls, module in {type(module): module for module in found.values()}.items()}
    return {name: kinds[type(module)] for name, module in found.items() if kinds[type(module)] is not None}


def scale_(weight: torch.Tensor, kind: NormKind, factor: torch.Tensor | float) -> None:
    """Multiplies what a norm gives by a factor, in place.

    An RMS norm over `H` channels of which only those in `K` are not 0 gives `w x / sqrt(S / H + eps)` with
    `S = sum_K x^2`. Over the `H'` channels of `K` alone it gives `w' x / sqrt(S / H' + eps')`; with
    `eps' = eps H / H'` and `w' = w sqrt(H / H')` that is the same.
    """
    weight.add_(kind.offset).mul_(factor).sub_(kind.offset)


def row_scales(model: PreTrainedModel, small: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What makes up for an epsilon that grows with those of the residual stream, in norms that are not over it.

    One key of the configuration holds the epsilon of all norms. A norm over a head or a latent (`q_norm`,
    `kv_a_layernorm`) gives the same with an epsilon `c^2` times as large if its input is `c` times as large; the map
    in front of it is scaled. `small` is the model with fewer channels; the meta device will do.

    Returns:
        Factors of the rows, shape (rows,), float64, by the full name of the linear map.

    Raises:
        UnsupportedModelError: A norm has no linear map right in front of it, the epsilon of the stream's own norms
            is not in the configuration, or another number in a module follows the hidden size.
    """
    stream, scales = _rms_norms(model, small), {}
    for name, module in model.named_modules():
        twin = small.get_submodule(name)
        before, after = _epsilon(module), _epsilon(twin)
        if name in stream and before is not None and not math.isclose(after, before * stream[name], rel_tol=1e-6):
            raise UnsupportedModelError(
                f"`{name}` has an epsilon of {before:g}, which would have to be {before * stream[name]:g} with fewer "
                f"channels; no key of {type(model.config).__name__} holds it. {_WAY_OUT}"
            )
        if name not in stream and before is not None and before != after:
            scales |= _in_front(model, name, math.sqrt(after / before))
        for key, value in vars(module).items() if module is not model.get_input_embeddings() else ():
            other = getattr(twin, key, None)
            if isinstance(value, float) and "eps" not in key and other != value:
                raise UnsupportedModelError(
                    f"`{name}.{key}` is {value:g} and would be {other} with fewer channels: "
                    f"{type(model).__name__} derives it from the hidden size. {_WAY_OUT}"
                )
    return scales


def _epsilon(module: nn.Module) -> float | None:
    return next((value for key, value in vars(module).items() if "eps" in key and isinstance(value, float)), None)


def _rms_norms(model: PreTrainedModel, small: PreTrainedModel) -> dict[str, float]:
    """RMS norms over the hidden size, and by how much a mean over fewer channels is larger."""
    before, after = dict(model.named_parameters()), dict(small.named_parameters())
    shrunk = {name for name, weight in before.items() if weight.ndim == 1 and weight.shape != after[name].shape}
    norms = {f"{name}.weight": name for name, kind in stream_norms(model, shrunk).items() if not kind.centred}
    return {name: len(before[weight]) / len(after[weight]) for weight, name in norms.items()}


def _in_front(model: PreTrainedModel, norm: str, factor: float) -> dict[str, torch.Tensor]:
    """The linear map whose output a norm reads, by its name: `q_proj` for `q_norm`."""
    parent, _, leaf = norm.rpartition(".")
    stem = leaf.removesuffix("_layernorm").removesuffix("_norm")
    weight = getattr(model.get_submodule(norm), "weight", None)
    for name in (f"{stem}_proj", f"{stem}_proj_with_mqa"):
        producer = getattr(model.get_submodule(parent), name, None)
        if not is_linear(producer):
            continue
        rows = matrix(producer).shape[0]
        factors = torch.ones(rows, dtype=torch.float64)
        factors[: rows if name == f"{stem}_proj" else len(weight)] = factor
        if weight is None or rows % len(weight) == 0 or name != f"{stem}_proj":
            return {f"{parent}.{name}": factors}
    raise UnsupportedModelError(
        f"`{norm}` does not normalise over the hidden size, but shares the epsilon of the norms that do, which grows "
        f"when channels go; no linear map in front of it is known that could make up for that. {_WAY_OUT}"
    )
