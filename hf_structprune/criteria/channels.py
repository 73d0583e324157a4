"""Importance of the channels of the residual stream, over the whole model at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..errors import ConfigurationError
from ..model.groups import Group
from ..model.hidden_size import stream_norms
from ..stats.gradients import run_hooked, weight_changes
from .base import Method, Paper
from .widths import Activation, Taylor


def channel_importance(
    model: PreTrainedModel, group: Group, config: PruningConfig, tokens: torch.Tensor | None
) -> torch.Tensor:
    """Importance of every channel by `config.hidden_criterion`, shape (H,), float64, on the CPU.

    Raises:
        ConfigurationError: The criterion needs tokens and there are none.
    """
    name = config.hidden_criterion
    if name != "magnitude" and tokens is None:
        raise ConfigurationError(f"The hidden criterion {name!r} looks at calibration text, and there is none.")
    return _CRITERIA[name](model, group, config, tokens).double().cpu()


@torch.no_grad()
def magnitude(model: PreTrainedModel, group: Group, *_) -> torch.Tensor:
    """`sum w^2` over the slices of a channel, each tensor divided by the mean of its channels.

    LLM-Pruner (https://huggingface.co/papers/2305.11627) sums the tensors as they are; the embeddings, with a row for
    each token of the vocabulary, then outweigh all layers together.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    for name, dim in group.dims().items():
        scores = _over_channels(model.get_parameter(name).float().square(), dim)
        total += (scores / scores.mean().clamp_min(1e-30)).cpu()
    return total


def taylor(model: PreTrainedModel, group: Group, config: PruningConfig, tokens: torch.Tensor) -> torch.Tensor:
    """`sum |w g|` over the slices of a channel in all tensors (LLM-Pruner, https://huggingface.co/papers/2305.11627).

    `g` is the gradient of the mean next-token loss; several batches are averaged after the absolute value.
    """
    dims, total = group.dims(), torch.zeros(group.size, dtype=torch.float64)

    def add(name: str, change: torch.Tensor, share: float) -> None:
        total.add_(_over_channels(change, dims[name]).cpu(), alpha=share)

    weights = {name: model.get_parameter(name) for name in dims}
    weight_changes(model, weights, tokens, config, add)
    return total


@torch.no_grad()
def activation(model: PreTrainedModel, group: Group, config: PruningConfig, tokens: torch.Tensor) -> torch.Tensor:
    """What the norms of the stream give: mean over a sequence of `|x|`, L2 over sequences, summed over the norms.

    Minitron (Muralidharan et al., 2024, https://huggingface.co/papers/2407.14679, eq. 2).
    """
    squares: dict[str, torch.Tensor] = {}

    def add_to(name: str) -> Callable:
        def add(_, __, output):
            squares[name] = squares.get(name, 0) + output.float().abs().mean(1).square().sum(0)

        return add

    names = stream_norms(model, set(group.dims()))
    run_hooked(model, tokens, config, (model.get_submodule(n).register_forward_hook(add_to(n)) for n in names))
    return sum(square.sqrt().cpu().double() for square in squares.values())


_CRITERIA = {"magnitude": magnitude, "taylor": taylor, "activation": activation}
METHODS = {
    "magnitude": Method(Taylor.papers, needs_text=False),
    "taylor": Method(Taylor.papers),
    "activation": Method(Activation.papers),
    "pca": Method((Paper("ashkboos2024slicegpt"),)),
}


def _over_channels(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums over all dimensions but one, float64."""
    return values.movedim(dim, 0).flatten(1).sum(1).double() if values.ndim > 1 else values.double()
