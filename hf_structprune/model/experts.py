"""Blocks of experts: where their tensors are, what each expert computes, and which tokens a router sends it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..errors import CheckpointError, UnsupportedModelError
from .groups import Group, Kept, LayerStructure, Slice, dropped, tensor_of
from .probe import changed_dims, size_in, with_more
from .target import Target, make_target, named_values, plain_values


# Keys of a configuration that hold the number of experts of a layer, and of those that a token is sent to.
_NUMBER = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")  # of each expert
_STEP = 8  # by which that width is changed to see what follows
_DOWN = "down_proj"  # the last matrices of stacked experts
NEVER = -1e30  # a router logit with which an expert is never chosen; finite, since some routers divide by it


def expert_groups(kind: str, model: PreTrainedModel, layers: list[tuple[LayerStructure, nn.Module]]) -> list[str]:
    """Adds the group of experts of each layer, as the class itself shows it when it is built with more of them.

    Everything that grows with their number belongs to them: weights, rows and biases of the router, buffers that
    correct its choice, and the numbers that modules keep of how many there are.

    Args:
        kind: Name of the kind.
        model: The model; the meta device will do.
        layers: What was found in every layer so far, and the layer; get their groups.

    Returns:
        What is left alone, and why.
    """
    values, named = plain_values(model.config), named_values(model.config)
    key = next((key for key in _NUMBER if type(values.get(key)) is int and values[key] > 1), None)
    if key is None:
        return []
    if any(name.endswith("tid2eid") for _, layer in layers for name, _ in layer.named_buffers()):
        return [f"{key}: some layers choose experts by the token ids, and one number holds for all layers, left alone"]
    size, blocks = values[key], int(named.get("n_group") or 1)
    larger = size + blocks
    own, more = Target(type(model), model.config), make_target(model, {**values, key: larger})
    now, other = own.glance(), more.glance()
    grown, counts, notes = _tensors(other), _counts(now, other, size, larger), []
    for structure, layer in layers:
        found: list[tuple[Slice, torch.Tensor]] = []
        for name, tensor in _tensors(layer, f"{structure.name}.").items():
            for dim in changed_dims(tensor.shape, grown.get(name, tensor).shape):
                width = tensor.shape[dim] // size
                if (size * width, larger * width) != (tensor.shape[dim], grown[name].shape[dim]):
                    short = name.removeprefix(f"{structure.name}.")
                    return [f"{key}: `{short}` does not grow with it in whole experts, left alone"]
                found.append((Slice(name, dim, torch.arange(size)[:, None] * width + torch.arange(width)), tensor))
        if not found:
            continue
        stacks = {part.module for part, tensor in found if tensor.ndim > 2 or part.index.shape[1] > 1}
        block = os.path.commonprefix([f"{part.module}." for part, _ in found]).rpartition(".")[0]
        if len(stacks) != 1 or len(block) <= len(structure.name) or block in stacks:
            places = (name.removeprefix(f"{structure.name}.") for name in sorted(stacks) or [block])
            notes.append(f"{key}: the experts in {' and '.join(places)} are not understood, left alone")
            continue
        parameters = [(part, tensor) for part, tensor in found if isinstance(tensor, nn.Parameter)]
        linear = [tensor for part, tensor in parameters if isinstance(now.get_submodule(part.module), nn.Linear)]
        structure.groups.append(
            Group(
                kind, structure.index, size, tuple(part for part, _ in found), None, block, blocks=blocks,
                cost=sum(tensor.numel() // size for _, tensor in parameters),
                matrix_cost=sum(tensor.numel() // size for tensor in linear if tensor.ndim > 1),
                least=_least(named, blocks), key_in_config=key,
                counters=tuple((name, Fraction(1)) for name in counts if name.startswith(f"{block}.")),
                router=next((p.tensor for p, t in parameters if t.ndim == 2 and p.module not in stacks), ""),
            )
        )  # fmt: skip
    return list(dict.fromkeys(notes))


def expert_neuron_groups(
    kind: str, whole: str, model: PreTrainedModel, layers: list[tuple[LayerStructure, nn.Module]]
) -> list[str]:
    """Adds the group of the neurons inside the experts of each layer, as the key of their width shows them.

    Every expert keeps as many, each its own. A shared expert that the same key sizes, `s` times as wide, counts as
    `s` experts more. Unit `e * width + j` is neuron `j` of expert `e`.

    Args:
        kind: Name of the kind.
        whole: Name of the kind of whole experts, whose groups have been found.
        model: The model; the meta device will do.
        layers: What was found in every layer so far, and the layer; get their groups.

    Returns:
        What is left alone, and why.
    """
    notes, routed = [], [(structure, layer) for structure, layer in layers if structure.group(whole) is not None]
    stacks = [_stack(structure.group(whole)).tensor for structure, _ in routed]
    for key in _WIDTH if routed else ():
        if not any(size_in(model.config, structure.index, key) for structure, _ in routed):
            continue
        try:
            grown = _tensors(with_more(model, key, _STEP).glance())
        except CheckpointError as error:
            notes.append(f"{key}: {error}".rstrip(".") + ", left alone")
            continue
        if all(grown[name].shape == tensor_of(model, name).shape for name in stacks):
            continue
        for structure, layer in routed:
            experts, size = structure.group(whole), size_in(model.config, structure.index, key)
            parts = layer.named_modules(prefix=structure.name)
            linear, own = (
                {n for n, part in parts if isinstance(part, nn.Linear)},
                _tensors(layer, f"{structure.name}."),
            )
            try:
                found = _following(experts, own, grown, linear, size or 1)
            except UnsupportedModelError as error:
                notes.append(f"{key}: {error}")
                continue
            active = getattr(model.config, "num_experts_per_tok", None) or 0
            turns = not getattr(model.get_submodule(_stack(experts).module), "is_concatenated", True)
            structure.groups.append(_neurons_in(kind, experts, own, found, size, turns, active, key))
        return list(dict.fromkeys(notes))
    return [*notes, *(f"{stack}: no key of the configuration is its width, left alone" for stack in stacks[:1])]


# A tensor that follows the width of experts: its name, the dimension, and how many times the width that is.
_Following = tuple[str, int, int]


def _following(
    experts: Group, own: dict[str, torch.Tensor], grown: dict[str, torch.Tensor], linear: set[str], size: int
) -> list[_Following]:
    """What follows the width of the experts of a block: their stacks, and the linear maps of a shared one.

    Raises:
        UnsupportedModelError: Something else does too.
    """
    found, stack = [], _stack(experts)
    for name, tensor in own.items():
        for dim in changed_dims(tensor.shape, grown[name].shape):
            times, module = tensor.shape[dim] // size, name.rpartition(".")[0]
            fits = (times * size, times * (size + _STEP)) == (tensor.shape[dim], grown[name].shape[dim])
            known = module == stack.module or module in linear
            if not fits or not known or not name.startswith(f"{experts.parent}."):
                raise UnsupportedModelError(f"`{name}` follows the width of experts and is not understood, left alone")
            found.append((name, dim, times))
    shared = {times for name, _, times in found if name.rpartition(".")[0] != stack.module}
    if len(shared) > 1 or not any(name == stack.tensor and times == 1 for name, _, times in found):
        raise UnsupportedModelError(f"`{stack.module}` is not understood, left alone")
    return found


def _neurons_in(
    kind: str,
    experts: Group,
    own: dict[str, torch.Tensor],
    found: list[_Following],
    size: int,
    by_turns: bool,
    active: int,
    key: str,
) -> Group:
    """The neurons of experts as a group; `by_turns`: rows of gate and up alternate; a token sees `active` experts."""
    number, stack = experts.size, _stack(experts).module
    in_stack = {name: name.rpartition(".")[0] == stack for name, _, _ in found}
    blocks = number + max((times for name, _, times in found if not in_stack[name]), default=0)
    slices, total, active_total = [], 0, 0.0
    for name, dim, times in found:
        index = _entries(blocks, number, size, times, in_stack[name], by_turns)
        slices.append(Slice(name, dim, index, in_stack[name]))
        total += own[name].numel()
        share = active / number * (own[name].ndim == 3) if in_stack[name] else 1
        active_total += own[name].numel() * share
    units = blocks * size
    return Group(
        kind, experts.layer, units, tuple(slices), None, experts.parent, blocks=blocks, cost=total // units,
        matrix_cost=active_total / units, least=blocks, key_in_config=key, router=experts.router,
        in_experts=True,
    )  # fmt: skip


@lru_cache(maxsize=16)  # the same for all layers, and large
def _entries(blocks: int, number: int, size: int, times: int, in_stack: bool, by_turns: bool) -> torch.Tensor:
    """Entries of each neuron in a tensor of all experts, or of the shared one; -1 for the neurons of the other."""
    index, j = torch.full((blocks * size, times if in_stack else 1), -1), torch.arange(size)
    if in_stack:
        rows = j[:, None] * times + torch.arange(times) if by_turns else j[:, None] + torch.arange(times) * size
        index[: number * size] = (torch.arange(number)[:, None, None] * (times * size) + rows).flatten(0, 1)
    else:
        index[number * size :, 0] = torch.arange(times * size)
    return index


def _tensors(module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """Parameters and buffers by full name."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {prefix + name: tensor for name, tensor in found.items()}


def _counts(now: nn.Module, other: nn.Module, size: int, larger: int) -> list[str]:
    """Full names of the attributes of modules that hold the number of experts."""
    return [
        f"{name}.{attribute}"
        for (name, module), (_, twin) in zip(now.named_modules(), other.named_modules(), strict=True)
        for attribute, value in vars(module).items()
        if type(value) is int and (value, vars(twin).get(attribute)) == (size, larger)
    ]


def _least(values: dict[str, Any], blocks: int) -> int:
    """The fewest experts among which every token still finds as many as it is sent to.

    Routers that choose groups first (DeepSeek-V3) look at the best two of each and then choose within `topk_group`.
    """
    chosen = next((values[key] for key in _CHOSEN if values.get(key)), 1)
    chosen = max(chosen) if isinstance(chosen, (list, tuple)) else chosen
    return chosen if blocks == 1 else blocks * max(2, -(-chosen // int(values.get("topk_group") or 1)))


@dataclass
class Routing:
    """Where a router sends the tokens of a batch.

    Attributes:
        inputs: What the experts see of each token, shape (tokens, hidden).
        index: Numbers of its experts, shape (tokens, k).
        weights: Their weights, shape (tokens, k).
        logits: What the router's linear map puts out, shape (tokens, experts); `None` where nobody asks for it.
        scales_inputs: Whether the weights multiply the inputs of experts (Llama 4) and not their outputs.
    """

    inputs: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor | None
    scales_inputs: bool = False

    def kept_at(self, device: torch.device) -> Routing:
        """This with its inputs on a device, and without logits: what may be kept of many batches."""
        return replace(self, inputs=self.inputs.to(device), logits=None)

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the tokens that an expert gets, and their weights; shapes (n,) and (n,)."""
        token, place = (self.index == expert).nonzero(as_tuple=True)
        return token, self.weights[token, place]


class Experts:
    """The experts of a block, one at a time: `f_e(x) = D_e a_e(x) + b_e`, weighted by the router's `g_e`.

    Args:
        model: The model.
        group: The group of its experts, or of the neurons in them.

    Attributes:
        parts: The experts, and behind them the one that all tokens share if its neurons are in the group too.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._model, self._group, self.block = model, group, model.get_submodule(group.parent)
        self._module = model.get_submodule(_stack(group).module)
        self._router = tensor_of(model, group.router)
        self._transposed = getattr(self._module, "is_transposed", True)
        shared = next((part.module for part in group.slices if group.in_experts and not part.stacked), None)
        self._shared = shared and model.get_submodule(shared.rpartition(".")[0])
        self._reader = next((part for part in group.slices if not part.stacked and part.dim == 1), None)
        self.parts = range(self.number + bool(shared))

    @property
    def number(self) -> int:
        return len(self._module.down_proj)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._module.down_proj.device

    @property
    def matrices(self) -> nn.Parameter:
        """All `D_e` of the experts between which the router chooses, as the model stores them, experts first."""
        return self._module.down_proj

    @matrices.setter
    def matrices(self, value: nn.Parameter) -> None:
        self._module.down_proj = value

    def units(self, expert: int) -> slice:
        """Which units of a group of neurons are in an expert; in the shared one all that are left."""
        width = self._group.whole
        return slice(expert * width, None if expert == self.number else (expert + 1) * width)

    def neurons(self, expert: int) -> Group:
        """The neurons of one expert as a group; its slices are of the expert's own matrices."""
        group, units, shared = self._group, self.units(expert), expert == self.number
        slices = []
        for part in (part for part in group.slices if part.stacked != shared):
            first = 0 if shared else expert * tensor_of(self._model, part.tensor).shape[part.dim]
            slices.append(Slice(part.tensor, part.dim - part.stacked, part.index[units] - first))
        readers = (self._reader.tensor if shared else _stack(group).tensor,)
        reader = next(part for part in slices if part.tensor in readers)
        blocks, size = group.blocks - self.number if shared else 1, len(reader.index)
        kind = f"{group.kind} of expert {expert}"  # of which nothing but random numbers depend
        return Group(kind, group.layer, size, tuple(slices), reader, group.parent, blocks=blocks)

    def inner(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """`a_e(x)`: what the down projection reads, shape (n, intermediate)."""
        module = self._module
        gated = hasattr(module, "gate_up_proj")
        name = "gate_up_proj" if gated else "up_proj"
        weight, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
        up = nn.functional.linear(x, weight.T if self._transposed else weight, None if bias is None else bias[expert])
        if not gated:
            return module.act_fn(up)
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(up)
        gate, up = up.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    def down(self, expert: int) -> torch.Tensor:
        """`D_e`, shape (hidden, intermediate), a view."""
        if expert == self.number:
            return tensor_of(self._model, self._reader.tensor)
        weight = self._module.down_proj[expert]
        return weight.T if self._transposed else weight

    def features(self, expert: int, routing: Routing) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens of an expert, the features `phi` with `D_e phi` its weighted outputs, and its weights of them."""
        if expert == self.number:
            inputs = routing.inputs.to(self.device)
            everything = torch.arange(len(inputs), device=self.device)
            return everything, self._shared_inner(inputs), torch.ones_like(everything, dtype=torch.float32)
        tokens, weights = routing.of(expert)
        x, scale = routing.inputs[tokens.to(routing.inputs.device)], weights[:, None].to(routing.inputs.dtype)
        x = x.to(self.device)
        if routing.scales_inputs:
            return tokens, self.inner(expert, x * scale), torch.ones_like(weights)
        return tokens, self.inner(expert, x) * scale, weights

    def _shared_inner(self, x: torch.Tensor) -> torch.Tensor:
        """What the last matrix of the shared expert reads, shape (tokens, width)."""
        seen: list[torch.Tensor] = []
        module = self._model.get_submodule(self._reader.module)
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            self._shared(x)
        finally:
            handle.remove()
        return seen[0]

    def outputs(self, expert: int, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of an expert, and its weighted outputs `g_e f_e(x)` for them in float32."""
        tokens, phi, weights = self.features(expert, routing)
        result = nn.functional.linear(phi, self.down(expert)).float()
        bias = getattr(self._module, f"{_DOWN}_bias", None)
        return tokens, result if bias is None else result + weights[:, None].float() * bias[expert].float()

    def total(self, routing: Routing) -> torch.Tensor:
        """What the experts add up to by these formulas, float32, shape (tokens, hidden)."""
        result = torch.zeros(routing.inputs.shape, device=routing.inputs.device)
        for expert in range(self.number):
            result.index_add_(0, *self.outputs(expert, routing))
        return result

    def masked(self, mask: torch.Tensor) -> torch.utils.hooks.RemovableHandle:
        """Multiplies the weighted outputs of every expert by an entry of a mask, shape (experts,), until removed."""

        def scale(module, args, kwargs):
            if len(args) < 3:
                raise UnsupportedModelError(f"{type(module).__name__} does not get the weights of its experts.")
            x, index, weights = args
            return (x, index, weights * mask.to(weights.device, weights.dtype)[index]), kwargs

        return self._module.register_forward_pre_hook(scale, with_kwargs=True)

    def run(self, x: torch.Tensor) -> tuple[torch.Tensor, Routing, torch.Tensor]:
        """Runs the block on inputs of shape (sequences, length, hidden).

        Returns:
            Its outputs in the same shape, where the tokens went, and the sum of the experts alone, where the experts
            are.
        """
        x = x.to(self.device)
        seen: dict[str, Any] = {}

        def keep(module, args, kwargs, output):
            seen["arguments"], seen["sum"] = (*args, *kwargs.values()), output

        logits = _RouterLogits([(self._router, None)])
        handle = self._module.register_forward_hook(keep, with_kwargs=True)
        try:
            with logits:
                output = self.block(x)
        finally:
            handle.remove()
        output = output[0] if isinstance(output, tuple) else output
        arguments, flat = seen["arguments"], x.reshape(-1, x.shape[-1])
        if len(arguments) >= 3:
            inputs = arguments[0].reshape(-1, arguments[0].shape[-1])
            routing = Routing(inputs, arguments[1], arguments[2], logits.found)
            return output.reshape(x.shape).contiguous(), routing, seen["sum"].reshape(inputs.shape)
        # Every expert sees every token, scaled by its score, which is 0 where it is not chosen.
        top, index = logits.found.topk(self.block.top_k, dim=-1)
        routing = Routing(flat, index, top.float().sigmoid().to(x.dtype), logits.found, True)
        return output.reshape(x.shape).contiguous(), routing, seen["sum"].view(-1, *flat.shape).sum(0)


def _stack(group: Group) -> Slice:
    """Where the last matrices of the experts are."""
    return next(part for part in group.slices if part.tensor.rpartition(".")[2] == _DOWN)


@contextmanager
def without_experts(model: nn.Module, groups: Iterable[Group], kept: Kept) -> Iterator[None]:
    """No router chooses the experts that are not kept: the reference that a cut model has to equal.

    Of neurons in experts, those that are not kept are not read.

    Args:
        model: The model; the tensors that correct a router's choice, or read neurons, change while this is open.
        groups: Groups of the model; of these, those of experts and of neurons in them count.
        kept: Numbers of the units that stay, by `(layer, kind)`; groups that are not named stay whole.
    """
    routers, corrections, readers = [], [], []
    for group in (group for group in groups if group.reader is None and group.key in kept):
        gone, router = dropped(group, kept[group.key]), tensor_of(model, group.router)
        if group.in_experts:
            experts = Experts(model, group)
            stay = torch.ones(group.size, dtype=torch.bool).index_fill_(0, gone, False)
            readers += [(experts.down(expert), stay[experts.units(expert)]) for expert in experts.parts]
            continue
        routers.append((router, gone))
        for part in group.slices:
            tensor = tensor_of(model, part.tensor)
            if tensor is not router and part.module != _stack(group).module:
                corrections.append((tensor, part.dim, gone))
    with torch.no_grad(), ExitStack() as stack:
        for tensor, dim, gone in corrections:
            stack.callback(tensor.copy_, tensor.clone())
            tensor.index_fill_(dim, gone.to(tensor.device), NEVER)
        for down, stay in readers:
            stack.callback(down.copy_, down.clone())
            down[:, ~stay.to(down.device)] = 0
        stack.enter_context(_RouterLogits(routers))
        yield


class _RouterLogits(TorchFunctionMode):
    """Keeps what the linear maps of routers put out while it is open, and may rule out some experts.

    Args:
        routers: Their weights, and the numbers of the experts that are never chosen.
    """

    def __init__(self, routers: list[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        super().__init__()
        self.routers, self.found = routers, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            for own, never in self.routers:
                weight = args[1] if len(args) > 1 else kwargs["weight"]
                # The weight itself, or what a router makes of it in another precision.
                if weight is own or (weight.shape == own.shape and torch.equal(weight, own.to(weight.dtype))):
                    result = result if never is None else result.index_fill(-1, never.to(result.device), NEVER)
                    self.found = result.reshape(-1, result.shape[-1])
        return result
