"""Mixers of Mamba 2: where the heads are in their tensors, and which keys of the configuration count them.

Of the fused projection `in_proj`, rows are `[gate | x | B | C | dt]`: a head owns rows of its gate and of its `x`, and
one of its step `dt`; `B` and `C` are shared by the heads of a group, as keys and values are by query heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CheckpointError
from .groups import Group, LayerStructure, Slice, is_linear
from .probe import size_in
from .target import make_target, plain_values


_HEADS = ("mamba_num_heads", "mamba_n_heads", "n_mamba_heads", "num_heads")
# What else of a configuration may have to follow, each in some classes: all channels, or those over the hidden size.
_CHANNELS, _EXPANDED = "mamba_d_ssm", ("mamba_expand", "expand")
_KNOWN = ("in_proj", "conv1d", "norm", "out_proj")  # beside what has an entry for each head
_BY_HEAD = ("A_log", "D", "dt_bias")


class Mixer(NamedTuple):
    """A Mamba 2 mixer of a layer.

    Attributes:
        structure: What was found in the layer so far.
        name: Full name of the mixer.
        module: It.
        heads, head_dim, groups: Their number, channels of each, and the groups that share their `B` and `C`.
        shared: Channels of `B` and `C` together.
    """

    structure: LayerStructure
    name: str
    module: nn.Module
    heads: int
    head_dim: int
    groups: int
    shared: int

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def short(self) -> str:
        """Its name in the layer."""
        return self.name.removeprefix(f"{self.structure.name}.")


def mamba_head_groups(kind: str, model: PreTrainedModel, layers: list[tuple[LayerStructure, nn.Module]]) -> list[str]:
    """Adds the group of the heads of each Mamba 2 mixer; every group of heads keeps as many.

    The class is built with more heads to see which keys count them and which attributes of modules follow.

    Args:
        kind: Name of the kind.
        model: The model; the meta device will do.
        layers: What was found in every layer so far, and the layer; get their groups.

    Returns:
        What is left alone, and why.
    """
    key = next((key for key in _HEADS if type(plain_values(model.config).get(key)) is int), None)
    mixers, notes = [], []
    for found in _mixers(layers) if key else ():
        (notes if isinstance(found, str) else mixers).append(found)
    if not mixers:
        return notes
    refused: CheckpointError | None = None
    for along in _ways(model, mixers[0]):
        step = math.lcm(mixers[0].groups, *(one.denominator for one in along.values()))
        try:
            larger = _with_more(model, {key: Fraction(1), **along}, step)
        except CheckpointError as error:
            refused = refused or error
            continue
        grown = [larger.get_submodule(mixer.name) for mixer in mixers]
        if all(_grew(mixer, twin, step) for mixer, twin in zip(mixers, grown, strict=True)):
            break
    else:
        reason = f"no keys of the configuration give it {mixers[0].heads + mixers[0].groups} heads"
        return [*notes, f"{mixers[0].short}: {refused or reason}".rstrip(".") + ", left alone"]
    step = math.lcm(*(one.denominator for one in along.values()))
    for mixer, twin in zip(mixers, grown, strict=True):
        if size_in(model.config, mixer.structure.index, key) != mixer.heads:
            notes.append(f"{mixer.short}: `{key}` is not the number of its heads, left alone")
        else:
            mixer.structure.groups.append(_group(kind, mixer, twin, key, along, step))
    return list(dict.fromkeys(notes))


def _mixers(layers: list[tuple[LayerStructure, nn.Module]]) -> Iterator[Mixer | str]:
    """The mixers of all layers, or why they are left alone."""
    for structure, layer in layers:
        for short, module in layer.named_modules():
            if all(hasattr(module, name) for name in ("conv1d", "n_groups", *_BY_HEAD)) and module.A_log.ndim == 1:
                mixer = _mixer(structure, f"{structure.name}.{short}", module)
                reason = _unknown(mixer)
                yield mixer if reason is None else f"{short}: {reason}, left alone"


def _mixer(structure: LayerStructure, name: str, module: nn.Module) -> Mixer:
    heads, columns = module.A_log.numel(), module.out_proj.weight.shape[1]
    shared = module.conv1d.weight.shape[0] - columns
    return Mixer(structure, name, module, heads, columns // heads, module.n_groups, shared)


def _unknown(mixer: Mixer) -> str | None:
    """What is not as it is known of Mamba 2."""
    module = mixer.module
    for name, parameter in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner not in _KNOWN and leaf not in _BY_HEAD:
            return f"parameter `{name}` is not understood"
        if owner == "norm" and parameter.shape != (mixer.channels,):
            return f"a norm of {parameter.numel()} weights is not understood"
    rows = 2 * mixer.channels + mixer.shared + mixer.heads
    shapes = (module.in_proj.weight.shape[0], module.conv1d.groups, module.D.numel(), module.dt_bias.numel())
    wanted = (rows, mixer.channels + mixer.shared, mixer.heads, mixer.heads)
    known = shapes == wanted and is_linear(module.in_proj) and is_linear(module.out_proj)
    known &= mixer.channels == module.out_proj.weight.shape[1] and mixer.heads % mixer.groups == 0
    return None if known else "the shapes of its projections do not agree"


def _ways(model: PreTrainedModel, mixer: Mixer) -> Iterator[dict[str, Fraction]]:
    """What may have to follow the number of heads in the configuration, by how much for each."""
    yield {}
    values, hidden = plain_values(model.config), model.config.hidden_size
    if type(values.get(_CHANNELS)) is int:
        yield {_CHANNELS: Fraction(mixer.head_dim)}
    for key in _EXPANDED:
        if type(values.get(key)) is int:
            yield {key: Fraction(mixer.head_dim, hidden)}


def _with_more(model: PreTrainedModel, each: dict[str, Fraction], step: int) -> PreTrainedModel:
    """The model on the meta device with so many more heads in every mixer."""
    values = copy.deepcopy(plain_values(model.config))
    for own in (values, *(values.get("per_layer_config") or {}).values()):
        own.update({key: own[key] + int(by * step) for key, by in each.items() if type(own.get(key)) is int})
    return make_target(model, values).glance()


def _grew(mixer: Mixer, twin: nn.Module, step: int) -> bool:
    """Whether a mixer with so many more heads has their channels, and no other ones."""
    channels = (mixer.heads + step) * mixer.head_dim
    shapes = (twin.A_log.numel(), twin.out_proj.weight.shape[1], twin.conv1d.weight.shape[0], twin.n_groups)
    return shapes == (mixer.heads + step, channels, channels + mixer.shared, mixer.groups)


def _group(kind: str, mixer: Mixer, twin: nn.Module, key: str, along: dict[str, Fraction], step: int) -> Group:
    heads = torch.arange(mixer.heads)[:, None]
    channels = heads * mixer.head_dim + torch.arange(mixer.head_dim)
    last = 2 * mixer.channels + mixer.shared
    rows = torch.cat([channels, channels + mixer.channels, heads + last], dim=1)
    index = {"in_proj": rows, "conv1d": channels, "norm": channels, **dict.fromkeys(_BY_HEAD, heads)}
    parts, total = [], 0
    for name, parameter in mixer.module.named_parameters():
        entries = index.get(name.rpartition(".")[0] or name)
        if entries is not None:
            parts.append(Slice(f"{mixer.name}.{name}", 0, entries))
            total += entries.shape[1] * parameter[0].numel()
    for name, buffer in mixer.module.named_buffers(recurse=False):  # scales of the rows (Falcon-H1)
        if buffer.shape[-1:] == mixer.module.in_proj.weight.shape[:1]:
            parts.append(Slice(f"{mixer.name}.{name}", buffer.ndim - 1, rows))
    reader, outputs = Slice(f"{mixer.name}.out_proj.weight", 1, channels), mixer.module.out_proj.weight.shape[0]
    matrices = rows.shape[1] * mixer.module.in_proj.weight.shape[1] + mixer.head_dim * outputs
    normed = any(part.module == f"{mixer.name}.norm" for part in parts)
    return Group(
        kind, mixer.structure.index, mixer.heads, (*parts, reader), reader, mixer.name,
        norms=(f"{mixer.name}.norm",) * normed, blocks=mixer.groups, cost=total + mixer.head_dim * outputs,
        matrix_cost=matrices, least=math.lcm(mixer.groups, step), key_in_config=key,
        keys_along=tuple(along.items()), step=step, counters=_counters(mixer, twin), coupled=normed,
    )  # fmt: skip


def _counters(mixer: Mixer, twin: nn.Module) -> tuple[tuple[str, Fraction], ...]:
    """Attributes of the mixer and of what is in it that follow the number of heads, by how much for each."""
    step, result = twin.A_log.numel() - mixer.heads, []
    for (name, module), (_, other) in zip(mixer.module.named_modules(), twin.named_modules(), strict=True):
        values: dict[str, Any] = vars(other)
        for attribute, value in vars(module).items():
            if type(value) is int and values.get(attribute) != value:
                full = ".".join(filter(None, (mixer.name, name, attribute)))
                result.append((full, Fraction(values[attribute] - value, step)))
    return tuple(result)
