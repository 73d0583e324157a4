"""Scores of layers and sublayers from their weights: magnitude and Taylor (Shortened-LLM, Kim et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from ..allocation.removal import Unit
from ..model.measuring import check_numbers
from ..model.structure import ModelStructure
from ..stats.gradients import backward_passes


def unit_matrices(model: nn.Module, structure: ModelStructure, unit: Unit) -> dict[str, nn.Parameter]:
    """The weights of the linear maps of a layer or sublayer by full name, routers and stacked experts too."""
    layer, kind = structure.layers[unit[0]], unit[1]
    modules = (layer.name,) if kind == "layers" else layer.sublayer(kind).modules
    return {
        f"{module}.{name}": parameter
        for module in modules
        for name, parameter in model.get_submodule(module).named_parameters()
        if parameter.ndim >= 2
    }


@torch.no_grad()
def magnitude_scores(model: PreTrainedModel, structure: ModelStructure, units: Iterable[Unit]) -> dict[Unit, float]:
    """`sum |w|` over the linear weights of each unit (arXiv 2402.02834, Mag)."""
    totals: dict[str, float] = {}
    return {
        unit: sum(
            totals.setdefault(name, float(weight.abs().sum(dtype=torch.float64)))
            for name, weight in unit_matrices(model, structure, unit).items()
        )
        for unit in units
    }


def taylor_scores(
    model: PreTrainedModel,
    structure: ModelStructure,
    units: Iterable[Unit],
    tokens: torch.Tensor,
    *,
    batch_size: int = 8,
    gradient_checkpointing: bool = False,
) -> dict[Unit, float]:
    """`sum |w g|` over the linear weights of each unit (arXiv 2402.02834, Taylor).

    `g` is the gradient of a batch's mean next-token loss, and the sums of all batches are averaged, as in
    `gradients.taylor_salience`. Each gradient is reduced to one number as soon as the backward pass has it.

    Args:
        model: A causal language model; it is left as it is.
        structure: Its layers and sublayers.
        units: What to score.
        tokens: Token ids, shape (sequences, length).
        batch_size: Sequences in a backward pass.
        gradient_checkpointing: Recompute activations in the backward pass.
    """
    members = {unit: unit_matrices(model, structure, unit) for unit in units}
    totals = {name: torch.zeros((), dtype=torch.float64) for weights in members.values() for name in weights}
    weights = {name: weight for weights in members.values() for name, weight in weights.items()}

    def around(batch: torch.Tensor, share: float):
        return _reduced(weights, totals, share)

    backward_passes(model, tokens, batch_size, gradient_checkpointing, around)
    for name, total in totals.items():
        check_numbers(total, f"The gradients of `{name}`")
    return {unit: float(sum(totals[name] for name in names)) for unit, names in members.items()}


@contextmanager
def _reduced(weights: dict[str, nn.Parameter], totals: dict[str, torch.Tensor], share: float):
    """Adds `share * sum |w g|` of each weight to its total in the backward pass; no gradient is kept."""
    handles, kept = [], {name: weight.grad for name, weight in weights.items()}
    for name, weight in weights.items():

        def reduce(parameter: torch.Tensor, name: str = name) -> None:
            product = parameter.detach().float() * parameter.grad.float()
            totals[name] += share * product.abs_().sum(dtype=torch.float64).cpu()
            parameter.grad = None

        weight.grad = None
        weight.requires_grad_(True)  # `backward_passes` puts the flags back
        handles.append(weight.register_post_accumulate_grad_hook(reduce))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(False)
            weight.grad = kept[name]
