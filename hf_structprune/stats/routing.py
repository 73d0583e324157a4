"""What the experts of a block do with the calibration text: who gets which tokens, and how much comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..model.experts import Experts, Routing
from ..model.groups import Group
from .gradients import Salience, backward_passes


_SAMPLE = 1024  # tokens on which whole blocks are run again and again


class RoutingStatistics:
    """Sums over the tokens of one block.

    Args:
        experts: The experts of the block.
        outputs: Whether to look at what experts put out, which costs as much as running the block again.
        sample: Whether to keep some inputs.

    Attributes:
        tokens: Tokens that each expert was sent, shape (experts,).
        gates: Sum of their weights `g_e`, shape (experts,).
        norms: Sum of `g_e ||f_e(x)||` over them, shape (experts,).
        probabilities: Sum over all tokens of the softmax of the router's logits, shape (experts,).
        total: Tokens seen by the block.
        inputs: Some of the block's inputs, sequences of shape (1, length, hidden).
    """

    def __init__(self, experts: Experts, outputs: bool = True, sample: bool = False) -> None:
        self.experts, self.looks, self.keeps = experts, outputs, sample
        self.tokens, self.gates, self.norms, self.probabilities = torch.zeros(4, experts.number, dtype=torch.float64)
        self.total, self.inputs = 0, []

    def update(self, x: torch.Tensor, routing: Routing) -> None:
        """Adds a batch of inputs of shape (sequences, length, hidden) and where its tokens went."""
        self.total += len(routing.inputs)
        self.probabilities += routing.logits.float().softmax(-1).double().sum(0).cpu()
        chosen = routing.index.flatten().cpu()
        self.tokens += torch.bincount(chosen, minlength=len(self.tokens))
        self.gates.index_add_(0, chosen, routing.weights.flatten().double().cpu())
        for expert in range(self.experts.number) if self.looks else ():
            _, outputs = self.experts.outputs(expert, routing)
            self.norms[expert] += outputs.norm(dim=-1).double().sum().cpu()
        for sequence in x if self.keeps else ():
            if sum(len(one[0]) for one in self.inputs) < _SAMPLE:
                self.inputs.append(sequence[None].clone())


@torch.no_grad()
def routing_statistics(
    model: nn.Module, group: Group, criterion: Any, inputs: Iterable[torch.Tensor]
) -> RoutingStatistics:
    """What the experts of a group do with inputs of their block, as far as a criterion asks for it."""
    own = getattr(criterion, "criteria", {}).get(group.kind, criterion)
    needs = (getattr(own, need, False) for need in ("needs_outputs", "needs_sample"))
    statistics = RoutingStatistics(Experts(model, group), *needs)
    for x in inputs:
        statistics.update(x, statistics.experts.run(x)[1])
    return statistics


def gate_salience(
    model: nn.Module, groups: Iterable[Group], tokens: torch.Tensor, *, batch_size: int, gradient_checkpointing: bool
) -> Salience:
    """Squared first-order change of the loss when an expert's output goes: `mean over batches of (dL / dm_e)^2`.

    `m_e`, which is 1, multiplies the weights of expert `e` (Molchanov et al., 2019, eq. 8,
    https://huggingface.co/papers/1906.10771, for a gate in place of a channel).

    Args:
        model: A causal language model.
        groups: Groups of experts.
        tokens: Token ids, shape (sequences, length).
        batch_size: Sequences in a backward pass.
        gradient_checkpointing: Recompute activations in the backward pass.

    Returns:
        `{(full name of the block, 0): scores}`, shape (experts,).
    """
    groups = list(groups)
    salience: Salience = {}

    @contextmanager
    def around(batch: torch.Tensor, share: float) -> Iterator[None]:
        masks = {group.parent: torch.ones(group.size, requires_grad=True) for group in groups}
        handles = [Experts(model, group).masked(masks[group.parent]) for group in groups]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for name, mask in masks.items():
            score = mask.grad.double().square() * share if mask.grad is not None else torch.zeros(len(mask)).double()
            salience[name, 0] = salience.get((name, 0), 0) + score

    backward_passes(model, tokens, batch_size, gradient_checkpointing, around)
    return salience
