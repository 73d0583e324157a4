"""From a hidden size to the smaller model: rank the channels, cut them, re-fit what reads and writes the rest."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..criteria.channels import channel_importance
from ..errors import ConfigurationError
from ..model.structure import ModelStructure
from ..refit.channels import refit_channels
from ..refit.rotation import check_rotatable, principal_components, rotated
from .hidden_group import hidden_group
from .hidden_surgery import cut_channels
from .hidden_target import check_keep, shrunk_target


def cut_hidden(
    model: PreTrainedModel,
    structure: ModelStructure,
    keep: int,
    config: PruningConfig,
    tokens: torch.Tensor | None,
    kept: torch.Tensor | None = None,
) -> tuple[PreTrainedModel, torch.Tensor | None]:
    """The model with hidden size `keep`. The dense one stays as it is, so that both are in memory for a while.

    Args:
        model: The dense model.
        structure: Its structure.
        keep: Channels that stay, less than the hidden size.
        config: `hidden_criterion`, `compensation`, `damping`, `error_correction`, `token_weighting` and the batch
            size of the calibration.
        tokens: Calibration tokens, shape (sequences, length). `None` will do for `"magnitude"` (or `kept`) without
            compensation.
        kept: Numbers of the channels that stay, where they are known; nothing is ranked then.

    Returns:
        The smaller model in eval mode, and the numbers of the channels that stay, ascending; `None` with `"pca"`,
        whose channels are combinations of the dense model's.

    Raises:
        ConfigurationError: `keep` or `kept` do not fit the model, or tokens are needed and there are none.
        UnsupportedModelError: The channels of this model cannot be cut alone.
        CheckpointError: No configuration class takes this hidden size.
    """
    size = model.config.hidden_size
    check_keep(keep, size)
    if keep == size:
        raise ConfigurationError(
            f"The hidden size after pruning is {keep}, which is the model's own; give a smaller one."
        )
    if config.compensation and tokens is None:
        raise ConfigurationError("Re-fitting needs calibration tokens: give them, or set compensation=False.")
    group = hidden_group(model, structure)
    target = shrunk_target(model, structure, keep)
    if kept is None and config.hidden_criterion == "pca":
        small = _cut_components(model, structure, group, keep, target, config, tokens)
        return small, None
    if kept is None:
        kept = channel_importance(model, group, config, tokens).topk(keep).indices
    kept = _checked(kept, keep, size)
    small = cut_channels(model, group, kept, target)
    if config.compensation:
        refit_channels(model, small, structure, group, kept, config, tokens)
    return small, kept


def _cut_components(model, structure, group, keep, target, config, tokens) -> PreTrainedModel:
    """Turns the stream into its principal components, of which the first `keep` stay."""
    check_rotatable(model, group)
    if tokens is None:
        raise ConfigurationError("The hidden criterion 'pca' looks at calibration text, and there is none.")
    turned = rotated(model, group, principal_components(model, group, config, tokens))
    kept = torch.arange(keep)
    small = cut_channels(turned, group, kept, target)
    if config.compensation:
        refit_channels(turned, small, structure, group, kept, config, tokens)
    return small


def _checked(kept: torch.Tensor, keep: int, size: int) -> torch.Tensor:
    kept = torch.as_tensor(kept).cpu().long().sort().values
    if len(kept) != keep or len(kept.unique()) != keep or kept[0] < 0 or kept[-1] >= size:
        raise ConfigurationError(
            f"`kept` has {len(kept)} channels; it must name {keep} different ones of 0 to {size - 1}."
        )
    return kept
