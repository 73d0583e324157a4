"""What the experts of a block do with the calibration text: who gets which tokens, and how much comes of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..model.experts import Experts, Routing
from ..model.groups import Group
from .moments import InputStatistics
from .processes import Processes


_SAMPLE = 1024  # tokens on which whole blocks are run again and again


class RoutingStatistics:
    """Sums over the tokens of one block.

    Args:
        experts: The experts of the block.
        outputs: Whether to look at what experts put out, which costs as much as running the block again.
        sample: Whether to keep some inputs.

    Attributes:
        tokens: Tokens that each expert was sent, shape (experts,).
        norms: Sum of `g_e ||f_e(x)||` over them, shape (experts,).
        probabilities: Sum over all tokens of the softmax of the router's logits, shape (experts,).
        total: Tokens seen by the block.
        inputs: Some of the block's inputs, sequences of shape (1, length, hidden).
    """

    def __init__(self, experts: Experts, outputs: bool = True, sample: bool = False) -> None:
        self.experts, self.looks, self.keeps = experts, outputs, sample
        self.tokens, self.norms, self.probabilities = torch.zeros(3, experts.number, dtype=torch.float64)
        self.total, self.inputs = 0, []

    def update(self, x: torch.Tensor, routing: Routing) -> None:
        """Adds a batch of inputs of shape (sequences, length, hidden) and where its tokens went."""
        self.total += len(routing.inputs)
        self.probabilities += routing.logits.float().softmax(-1).double().sum(0).cpu()
        self.tokens += torch.bincount(routing.index.flatten().cpu(), minlength=len(self.tokens))
        for expert in range(self.experts.number) if self.looks else ():
            _, outputs = self.experts.outputs(expert, routing)
            self.norms[expert] += outputs.norm(dim=-1).double().sum().cpu()
        for sequence in x if self.keeps else ():
            if sum(len(one[0]) for one in self.inputs) < _SAMPLE:
                self.inputs.append(sequence[None].clone())

    def gather(self, processes: Processes) -> None:
        """Adds what other processes have seen; afterwards this is the same on all of them."""
        total = torch.tensor(self.total)
        for tensor in (self.tokens, self.norms, self.probabilities, total):
            processes.add(tensor)
        self.total = int(total)
        if self.keeps:
            each = self.inputs[0].shape[1]
            self.inputs = list(processes.first(torch.cat(self.inputs), min(-(-_SAMPLE // each), self.total // each)))
            self.inputs = [sequence[None] for sequence in self.inputs]


class ExpertInputs:
    """Moments of what the last matrix of each expert of a block reads; one expert's are in memory at a time.

    Args:
        experts: The experts of the block.
        gram: Whether second moments are wanted.
        inputs: Inputs of the block, shape (sequences, length, hidden) for each batch.
        weights: Weights of the tokens in second moments, shape (sequences, length) for each batch; `None` for 1.
        processes: Those that divide the text among them; all of them ask for the same experts, in the same order.

    Attributes:
        tokens: Tokens that each expert got, a shared one all, shape (experts,).
    """

    def __init__(
        self, experts: Experts, gram: bool, inputs: Iterable[torch.Tensor], weights: list[torch.Tensor] | None,
        processes: Processes | None = None,
    ) -> None:  # fmt: skip
        self._experts, self._gram, self._weights = experts, gram, weights
        self._processes = processes or Processes()
        self._routings = [experts.run(x)[1].kept_at(x.device) for x in inputs]
        routed = sum(torch.bincount(one.index.flatten(), minlength=experts.number) for one in self._routings).cpu()
        everything = torch.tensor([sum(len(one.inputs) for one in self._routings)])
        self.tokens = torch.cat([routed, everything])[: len(experts.parts)]
        self._processes.add(self.tokens)

    def of(self, expert: int) -> InputStatistics:
        """The moments of one expert; every batch counts as a sequence."""
        down = self._experts.down(expert)
        statistics = InputStatistics(down.shape[1], self._gram, device=down.device)
        for number, routing in enumerate(self._routings):
            tokens, phi, _ = self._experts.features(expert, routing)
            weights = None if self._weights is None else self._weights[number].flatten()[tokens][None]
            if len(tokens):
                statistics.update(phi[None], weights=weights)
        statistics.gather(self._processes)
        return statistics


@torch.no_grad()
def routing_statistics(
    model: nn.Module,
    group: Group,
    criterion: Any,
    inputs: Iterable[torch.Tensor],
    weights: list[torch.Tensor] | None = None,
    processes: Processes | None = None,
) -> RoutingStatistics | ExpertInputs:
    """What the experts of a group do with inputs of their block, as far as a criterion asks for it.

    Of several `processes` each gives its part of the inputs, and gets what all of them saw.
    """
    own = getattr(criterion, "criteria", {}).get(group.kind, criterion)
    if group.in_experts:
        return ExpertInputs(Experts(model, group), own.needs_gram, inputs, weights, processes)
    needs = (getattr(own, need, False) for need in ("needs_outputs", "needs_sample"))
    statistics = RoutingStatistics(Experts(model, group), *needs)
    for x in inputs:
        statistics.update(x, statistics.experts.run(x)[1])
    if processes is not None and processes.count > 1:
        statistics.gather(processes)
    return statistics
