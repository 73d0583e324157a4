"""Importance of tokens by the weights of their rows, for comparison with how frequent they are in text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..errors import ConfigurationError
from ..model.groups import Group
from ..stats.gradients import weight_changes
from ..stats.seen import Calibration
from .base import Method
from .widths import Taylor


SEQUENCES = 64  # that gradients beside counts are of


def token_importance(
    model: PreTrainedModel, group: Group, config: PruningConfig, tokens: Callable[[], Calibration]
) -> torch.Tensor:
    """Importance of every row of the embedding by `config.vocabulary_criterion`, shape (rows,), on the CPU.

    Of `"frequency_taylor"` it is the part that looks at the weights.

    Args:
        group: Where the rows are.
        tokens: Loads the calibration text, for criteria that look at it.

    Raises:
        ConfigurationError: The criterion does not look at weights.
    """
    name = config.vocabulary_criterion
    if name not in _CRITERIA:
        raise ConfigurationError(f"The criterion {name!r} does not look at the weights of tokens.")
    return _CRITERIA[name](model, group, config, tokens).cpu()


@torch.no_grad()
def embedding_norm(model: PreTrainedModel, *_) -> torch.Tensor:
    """Norms of the rows of the embedding."""
    return model.get_input_embeddings().weight.detach().float().norm(dim=1)


def taylor(
    model: PreTrainedModel, group: Group, config: PruningConfig, tokens: Callable[[], Calibration]
) -> torch.Tensor:
    """`sum |w g|` over the rows of a token in all tensors (LLM-Pruner, https://huggingface.co/papers/2305.11627).

    `g` is the gradient of the mean next-token loss; several batches are averaged after the absolute value.
    """
    names, total = {part.tensor for part in group.slices}, torch.zeros(group.size, dtype=torch.float64)

    def add(_: str, change: torch.Tensor, share: float) -> None:
        total.add_(change.flatten(1).sum(1).cpu() if change.ndim > 1 else change.cpu(), alpha=share)

    weight_changes(model, {name: model.get_parameter(name) for name in names}, tokens(), config, add)
    return total


def taylor_beside_counts(
    model: PreTrainedModel, group: Group, config: PruningConfig, tokens: Callable[[], Calibration]
) -> torch.Tensor:
    """`taylor` on a few sequences, which is enough where much more text is counted."""
    text = tokens()
    chosen = torch.zeros(len(text), dtype=torch.bool)
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(config.seed))
    chosen[order[:SEQUENCES]] = True  # of all sources, which take turns
    return taylor(model, group, config, lambda: text[chosen])


_CRITERIA = {"embedding_norm": embedding_norm, "taylor": taylor, "frequency_taylor": taylor_beside_counts}
METHODS = {
    "frequency": Method(),
    "frequency_taylor": Method(Taylor.papers),
    "embedding_norm": Method(needs_text=False),
    "taylor": Method(Taylor.papers),
}
