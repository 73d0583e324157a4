"""Experts that go are averaged into those that stay, neuron by neuron, before their tokens go elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..model.experts import Experts, Routing
from ..model.groups import Group, Slice, dropped, tensor_of
from ..stats.processes import Processes
from ..stats.routing import routing_statistics


_SAMPLE = 1024  # tokens on which experts are compared


@torch.no_grad()
def merge_experts(
    model: nn.Module, group: Group, neurons: Group, kept: torch.Tensor, inputs: Iterable[torch.Tensor],
    processes: Processes | None = None,
) -> None:  # fmt: skip
    """Averages every expert that goes into the one that stays and is nearest to it, in place.

    Nearest is the least `||E[f_d(x)] - E[f_s(x)]||` over tokens of the block, and weights are the numbers of tokens
    that experts got: HC-SMoE (Chen et al., 2024, https://huggingface.co/papers/2410.08589). Neurons are paired first,
    by the cosine of everything that belongs to them, see `paired`: their order means nothing.

    Args:
        model: The model, whose experts are all still there.
        group: The group of its experts.
        neurons: The group of the neurons in them.
        kept: Numbers of the experts that stay.
        inputs: Inputs of the block, shape (sequences, length, hidden) for each batch.
        processes: Those that divide the text among them; experts are compared on that of the first.
    """
    processes = processes or Processes()
    experts, inputs = Experts(model, group), list(inputs)
    tokens = routing_statistics(model, group, None, inputs, processes=processes).tokens
    x = experts.run(inputs[0])[1].inputs[:_SAMPLE]
    ones = torch.ones(len(x), 1, device=x.device)
    alone = (Routing(x, torch.full_like(ones, expert, dtype=torch.long), ones, None) for expert in range(group.size))
    means = torch.stack([experts.outputs(expert, routing)[1].mean(0) for expert, routing in enumerate(alone)])
    processes.take_first(means)
    distance = torch.cdist(means, means)
    gone, stay = dropped(group, kept).tolist(), kept.tolist()
    nearest = {expert: min(stay, key=lambda one: float(distance[expert, one])) for expert in gone}
    parts = {part.tensor: part for part in neurons.slices if part.stacked}
    stacked = next(iter(parts.values())).module
    stacks = list(dict.fromkeys(part.tensor for part in group.slices if part.module == stacked))
    for survivor in sorted(set(nearest.values())):
        members = [expert for expert, one in nearest.items() if one == survivor and tokens[expert] > 0]
        order = {expert: paired(_rows(model, parts, neurons, survivor) @ _rows(model, parts, neurons, expert).T)
                 for expert in members}  # fmt: skip
        total = float(tokens[survivor] + sum(tokens[expert] for expert in members))
        for name in stacks if members else ():
            stack = tensor_of(model, name)
            merged = stack[survivor].float() * float(tokens[survivor])
            for expert in members:
                matrix = stack[expert].float()
                if name in parts:
                    matrix = _reordered(matrix, parts[name], neurons, order[expert])
                merged += matrix * float(tokens[expert])
            stack[survivor] = (merged / total).to(stack.dtype)
            processes.take_first(stack[survivor])


def paired(similarity: torch.Tensor) -> torch.Tensor:
    """For each row the column that it is paired with: again and again those go together that are each other's best.

    Args:
        similarity: Shape (n, n).

    Returns:
        A permutation, shape (n,).
    """
    left, result = similarity.double().clone(), torch.full((len(similarity),), -1, device=similarity.device)
    while (open_ := (result < 0).nonzero().squeeze(1)).numel():
        best, back = left.argmax(1), left.argmax(0)
        mutual = open_[back[best[open_]] == open_]
        result[mutual] = best[mutual]
        left[mutual] = -torch.inf
        left[:, best[mutual]] = -torch.inf
    return result


def _local(part: Slice, neurons: Group) -> torch.Tensor:
    """Entries of each neuron in the matrices of the first expert, and so of every one."""
    return part.index[: neurons.whole]


def _rows(model: nn.Module, parts: dict[str, Slice], neurons: Group, expert: int) -> torch.Tensor:
    """Everything that belongs to each neuron of an expert, of length 1; shape (neurons, features)."""
    rows = []
    for name, part in parts.items():
        tensor = tensor_of(model, name)[expert].float().movedim(part.dim - 1, 0)
        rows.append(tensor[_local(part, neurons).to(tensor.device)].flatten(1))
    return nn.functional.normalize(torch.cat(rows, 1), dim=1)


def _reordered(matrix: torch.Tensor, part: Slice, neurons: Group, order: torch.Tensor) -> torch.Tensor:
    """The matrix of an expert with its neurons in another order."""
    index, entries = _local(part, neurons).to(matrix.device), torch.arange(matrix.shape[part.dim - 1])
    entries = entries.to(matrix.device)
    entries[index.flatten()] = index[order].flatten()
    return matrix.index_select(part.dim - 1, entries)
