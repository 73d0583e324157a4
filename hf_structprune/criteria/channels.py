"""Importance of the channels of the residual stream, over the whole model at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import PruningConfig
from ..errors import ConfigurationError
from ..model.hidden_size import HiddenGroup
from ..model.language_head import has_plain_head, positions_at_once
from ..model.norms import stream_norms
from ..stats.gradients import frozen, on_device
from ..text.calibration import as_batches


def channel_importance(
    model: PreTrainedModel, group: HiddenGroup, config: PruningConfig, tokens: torch.Tensor | None
) -> torch.Tensor:
    """Importance of every channel by `config.hidden_criterion`; higher is more important.

    Args:
        model: The dense model.
        group: Its residual stream.
        config: Criterion, batch size and gradient checkpointing.
        tokens: Calibration tokens, shape (sequences, length); not looked at by `"magnitude"`.

    Returns:
        Shape (H,), float64, on the CPU.

    Raises:
        ConfigurationError: The criterion needs tokens and there are none, or it is not known.
    """
    name = config.hidden_criterion
    if name not in _CRITERIA:
        raise ConfigurationError(f"`hidden_criterion` is {name!r}; allowed values are {', '.join(_CRITERIA)}.")
    if name != "magnitude" and tokens is None:
        raise ConfigurationError(f"The hidden criterion {name!r} looks at calibration text, and there is none.")
    return _CRITERIA[name](model, group, config, tokens).double().cpu()


@torch.no_grad()
def magnitude(model: PreTrainedModel, group: HiddenGroup, *_) -> torch.Tensor:
    """`sum w^2` over the slices of a channel, each tensor divided by the mean of its channels.

    LLM-Pruner (https://huggingface.co/papers/2305.11627) sums the tensors as they are; the embeddings, with a row for
    each token of the vocabulary, then outweigh all layers together.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    for name, dim in group.entries:
        scores = _over_channels(model.get_parameter(name).float().square(), dim)
        total += (scores / scores.mean().clamp_min(1e-30)).cpu()
    return total


def taylor(model: PreTrainedModel, group: HiddenGroup, config: PruningConfig, tokens: torch.Tensor) -> torch.Tensor:
    """`sum |w g|` over the slices of a channel in all tensors (LLM-Pruner, https://huggingface.co/papers/2305.11627).

    `g` is the gradient of the mean next-token loss; several batches are averaged after the absolute value. A gradient
    is reduced and freed as soon as it is complete, so that there are never more than a few.
    """
    dims = {id(model.get_parameter(name)): dim for name, dim in group.entries}
    total = torch.zeros(group.size, dtype=torch.float64)

    def reduce(parameter: nn.Parameter) -> None:
        change = (parameter.detach().float() * parameter.grad.float()).abs_()
        total.add_(_over_channels(change, dims[id(parameter)]).cpu(), alpha=share)
        parameter.grad = None

    batches = as_batches(tokens, config.calibration.batch_size)
    plain = has_plain_head(model, on_device(model, batches[0][:1]))
    parameters = [model.get_parameter(name) for name, _ in group.entries]
    with frozen(model, config.gradient_checkpointing), _reduced(parameters, reduce):
        for batch in tqdm(batches, desc="Gradients", disable=not logging.is_progress_bar_enabled()):
            share = len(batch) / len(tokens)
            _backward(model, on_device(model, batch), plain)
            for parameter in parameters:
                if parameter.grad is not None:  # an untied head, whose gradient was put there by hand
                    reduce(parameter)
    return total


@torch.no_grad()
def activation(
    model: PreTrainedModel, group: HiddenGroup, config: PruningConfig, tokens: torch.Tensor
) -> torch.Tensor:
    """What the norms of the stream give: mean over a sequence of `|x|`, L2 over sequences, summed over the norms.

    Minitron (Muralidharan et al., 2024, https://huggingface.co/papers/2407.14679, eq. 2).
    """
    squares: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable:
        def add(_, __, output):
            squares[name] = squares.get(name, 0) + output.float().abs().mean(1).square().sum(0)

        return add

    norms = stream_norms(model, set(group.dims()))
    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in norms]
    try:
        batches = as_batches(tokens, config.calibration.batch_size)
        for batch in tqdm(batches, desc="Channels", disable=not logging.is_progress_bar_enabled()):
            model.base_model(input_ids=on_device(model, batch), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sum(square.sqrt().cpu().double() for square in squares.values())


_CRITERIA = {"magnitude": magnitude, "taylor": taylor, "activation": activation}


def _over_channels(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums over all dimensions but one, float64."""
    return values.movedim(dim, 0).flatten(1).sum(1).double() if values.ndim > 1 else values.double()


class _reduced:
    """While it is open, these parameters ask for gradients, and each is handed on as soon as its own is complete."""

    def __init__(self, parameters: list[nn.Parameter], reduce: Callable[[nn.Parameter], None]) -> None:
        self.parameters, self.reduce = parameters, reduce

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.handles = [p.register_post_accumulate_grad_hook(self.reduce) for p in self.parameters]

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()
        for parameter in self.parameters:
            parameter.grad = None


def _backward(model: PreTrainedModel, batch: torch.Tensor, plain: bool) -> None:
    """Backward pass of the mean next-token loss of a batch, with a plain head a few positions at a time."""
    if not plain:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        return
    states = model.base_model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    head, targets = model.get_output_embeddings(), batch[:, 1:].flatten()
    chunk = max(1, positions_at_once(head.weight.shape[0]) // 4)
    parts, weight = [], torch.zeros_like(head.weight, dtype=torch.float32)
    for part, target in zip(states.detach().split(chunk), targets.split(chunk), strict=True):
        part = part.requires_grad_(True)
        logits = head(part).float()
        loss = nn.functional.cross_entropy(logits, target.to(logits.device), reduction="sum") / len(targets)
        gradient, of_weight = torch.autograd.grad(loss, (part, head.weight))
        parts.append(gradient)
        weight += of_weight
    # Where the head is tied, the embeddings' part is added to it before it is reduced.
    head.weight.grad = weight.to(head.weight.dtype)
    states.backward(torch.cat(parts))
