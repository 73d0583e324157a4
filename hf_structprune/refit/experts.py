"""Experts, and neurons in them, take over from those that go: last matrices are re-fitted to the block's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..config import PruningConfig
from ..model.experts import Experts, Routing
from ..model.groups import Group
from ..stats.moments import Moments, is_held_out
from ..stats.processes import Processes
from .closed_form import DEFAULT_DAMPING, choose_damping, output_error, refit


FEWEST = 64  # tokens with which the last matrix of an expert is re-fitted at all


@torch.no_grad()
def refit_experts(
    model: nn.Module,
    group: Group,
    inputs: list[torch.Tensor],
    targets: list[torch.Tensor],
    weights: list[torch.Tensor] | None,
    config: PruningConfig,
    kept: torch.Tensor | None = None,
    processes: Processes | None = None,
    first: int = 0,
) -> list[torch.Tensor]:
    """Re-fits `D_e` of one expert after the other, in place, to what is still lacking of the block's outputs.

    With `phi` the weighted inputs of `D_e` over the tokens that the cut router sends to e, and `r` what the block's
    output lacks of its target: `D_e' = D_e + E[r phi^T] (E[phi phi^T] + lam I)^-1`, then `r` is less by
    `(D_e' - D_e) phi`. Experts with most tokens come first. One is left as it is if the re-fit does not lessen the
    error on held-out sequences, or if it gets fewer than `FEWEST` tokens. Columns of neurons that go are set to 0, and
    the others are re-fitted as those of one linear map, see `closed_form.refit`.

    Args:
        model: The model, of which whole experts have been cut already.
        group: The group that they are of.
        inputs: Inputs of the block, shape (sequences, length, hidden) for each batch.
        targets: What it is to put out, float32, same shapes; used up.
        weights: Weights of the tokens, shape (sequences, length) for each batch; `None` for 1.
        config: Damping, and whether to re-fit at all.
        kept: Numbers of the neurons that stay, if the group is one of neurons.
        processes: Those that divide the text among them, and come to the same weights.
        first: Number of the first of these sequences among those of all processes.

    Returns:
        What the block puts out afterwards, float32.
    """
    experts, processes = Experts(model, group), processes or Processes()
    batches, start = [], first
    for x, target in zip(inputs, targets, strict=True):
        output, routing, _ = experts.run(x)
        numbers = torch.arange(start, start + len(x), device=output.device)
        held_out = is_held_out(numbers).repeat_interleave(x.shape[1])
        output = output.to(target.device)
        batches.append(_Batch(routing.kept_at(x.device), held_out, output.float(), target.sub_(output)))
        start += len(x)
    for batch, weight in zip(batches, weights or (), strict=False):
        batch.root = weight.flatten().sqrt()[:, None]
    load = sum(torch.bincount(batch.routing.index.flatten(), minlength=experts.number) for batch in batches).cpu()
    load = torch.cat([load, torch.tensor([sum(len(batch.held_out) for batch in batches)])])[: len(experts.parts)]
    processes.add(load)
    stay = torch.ones(group.size, dtype=torch.bool)
    if kept is not None:
        stay = stay.logical_not_().index_fill_(0, kept.cpu(), True)
    for expert in load.argsort(descending=True, stable=True).tolist():
        columns = None if kept is None else stay[experts.units(expert)].nonzero().squeeze(1)
        enough = config.compensation and load[expert] >= FEWEST
        if enough or kept is not None:
            _refit_one(experts, expert, batches, config.damping, columns, enough, processes)
    if kept is not None:
        return [experts.run(x)[0].float().to(x.device) for x in inputs]
    return [batch.output for batch in batches]


@dataclass
class _Batch:
    """A batch of tokens: where they go, which are held out, what the block gives and what it lacks."""

    routing: Routing
    held_out: torch.Tensor
    output: torch.Tensor
    lack: torch.Tensor
    root: torch.Tensor | None = None  # of the weights of the tokens


def _refit_one(
    experts: Experts,
    expert: int,
    batches: list[_Batch],
    damping: float | None,
    columns: torch.Tensor | None,
    enough: bool,
    processes: Processes,
) -> None:
    """Re-fits `D_e` on columns that stay (`None` for all) if there are `enough` tokens, and zeroes the others."""
    weight = experts.down(expert)
    columns = torch.arange(weight.shape[1]) if columns is None else columns
    columns = columns.to(weight.device)
    best = weight[:, columns].clone()
    if enough:
        best = _fitted(experts, expert, batches, damping, columns, best, processes)
        processes.take_first(best)
    new = torch.zeros_like(weight)
    new[:, columns] = best
    change = (new - weight).float()
    weight.copy_(new)
    for batch in batches:
        tokens, phi, _ = experts.features(expert, batch.routing)
        step, tokens = (phi.float() @ change.T).to(batch.output.device), tokens.to(batch.output.device)
        batch.output.flatten(0, 1).index_add_(0, tokens, step)
        batch.lack.flatten(0, 1).index_add_(0, tokens, -step)


def _fitted(
    experts: Experts,
    expert: int,
    batches: list[_Batch],
    damping: float | None,
    columns: torch.Tensor,
    cut: torch.Tensor,
    processes: Processes,
) -> torch.Tensor:
    """The re-fitted columns of `D_e`, or `cut` if those give the larger error on held-out sequences."""
    weight = experts.down(expert)
    fit, held_out = (Moments.zeros(weight.shape[1], weight.shape[0], weight.device) for _ in range(2))
    for batch in batches:
        tokens, phi, _ = experts.features(expert, batch.routing)
        lack = batch.lack.flatten(0, 1)[tokens.to(batch.lack.device)].to(weight.device)
        if batch.root is not None:
            phi, lack = (phi * batch.root[tokens]).to(phi.dtype), lack * batch.root[tokens]
        for moments, chosen in ((fit, ~batch.held_out[tokens]), (held_out, batch.held_out[tokens])):
            moments.add(phi[chosen], lack[chosen])
    for moments in (fit, held_out):
        moments.gather(processes)
    if damping is None:
        damping = choose_damping(weight.float(), fit, held_out, columns) if held_out.tokens else DEFAULT_DAMPING
    if held_out.tokens:
        trial = refit(weight, fit.gram, columns, damping, fit.target)
        gram = held_out.gram.double()
        errors = [output_error(weight, one, gram, columns, held_out.target) for one in (trial, cut)]
        if errors[0] >= errors[1]:
            return cut
    both = fit + held_out
    return refit(weight, both.gram, columns, damping, both.target).to(weight.dtype)
