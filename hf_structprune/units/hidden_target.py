"""Class and configuration of a model with another hidden size."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, ConfigurationError
from ..model.structure import ModelStructure
from ..model.target import _REFUSED, Target, _stock_class, _target
from ..refit.norms import eps_changes, row_scales


_GROUPED = 8  # values in 16 bytes, in 16-bit formats
# Keys that name the hidden size under another name, where they have its value.
_FOLLOWERS = ("word_embed_proj_dim", "embedding_size", "embed_dim")


def hidden_keys(config: PreTrainedConfig) -> tuple[str, ...]:
    """Keys of a configuration that hold the hidden size."""
    first = getattr(config, "attribute_map", {}).get("hidden_size", "hidden_size")
    others = [key for key in _FOLLOWERS if key != first and getattr(config, key, None) == config.hidden_size]
    return (first, *others)


def shrunk_config_model(model: PreTrainedModel, keep: int, structure: ModelStructure | None = None) -> PreTrainedModel:
    """The model with hidden size `keep` on the meta device: configuration and shapes, no weights.

    Args:
        model: The dense model; the meta device will do.
        keep: The hidden size.
        structure: Its structure, if it is known already.

    Raises:
        ConfigurationError: `keep` is not from 1 to the hidden size.
        CheckpointError: No configuration class takes this hidden size.
    """
    return shrunk_target(model, structure or ModelStructure.of(model), keep).skeleton()


def shrunk_target(model: PreTrainedModel, structure: ModelStructure, keep: int) -> Target:
    """Class and configuration of the model with `keep` channels.

    The epsilon of RMS norms over the hidden size grows by `H / keep`, see `norms.scale_`.

    Raises:
        ConfigurationError: `keep` is not from 1 to the hidden size.
        UnsupportedModelError: What else follows the hidden size or its epsilon cannot be made up for, see
            `norms.row_scales`.
        CheckpointError: No configuration class takes this hidden size.
    """
    check_keep(keep, model.config.hidden_size)
    _check_experts(model, keep)
    try:
        target = sized_target(model, structure, keep)
        small = target.skeleton()
        changes = eps_changes(model, small)
        if changes:
            target = sized_target(model, structure, keep, changes)
            small = target.skeleton()
    except _REFUSED as error:
        raise CheckpointError(f"No {type(model.config).__name__} has hidden size {keep}: {error}") from error
    row_scales(model, small)
    return target


def _check_experts(model: PreTrainedModel, keep: int) -> None:
    """Refuses sizes with which a mixture could not run: its experts are multiplied in groups."""
    stacked = any(parameter.ndim == 3 and ".experts." in name for name, parameter in model.named_parameters())
    if stacked and keep % _GROUPED:
        raise CheckpointError(
            f"Hidden size {keep}: experts are multiplied in groups, whose rows have to be multiples of 16 bytes; "
            f"choose a multiple of {_GROUPED}, such as {max(_GROUPED, keep // _GROUPED * _GROUPED)}."
        )


def check_keep(keep: int, size: int) -> None:
    """Refuses a hidden size that is no integer from 1 to the one there is."""
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 < keep <= size:
        raise ConfigurationError(f"The hidden size after pruning is {keep!r}; it must be an integer from 1 to {size}.")


def sized_target(
    model: PreTrainedModel, structure: ModelStructure, size: int, changes: dict[str, Any] | None = None
) -> Target:
    """Class and configuration with another hidden size and the same heads.

    A `LlamaConfig` takes no hidden size that the number of heads does not divide; it is then written as a Mistral
    without sliding window, which has the same weights and the same logits.

    Args:
        model: The model.
        structure: Its structure, for the size of a head.
        size: The hidden size.
        changes: Other values of the configuration to change.
    """
    config = model.config
    values = config.to_dict()
    for key in ("auto_map", "architectures"):
        values.pop(key, None)
    head_dim = next((layer.attention.head_dim for layer in structure.layers if layer.attention), None)
    head_dim = getattr(config, "head_dim", None) or head_dim
    if head_dim and not isinstance(getattr(type(config), "head_dim", None), property):
        values["head_dim"] = head_dim
    values.update({key: size for key in hidden_keys(config)}, **(changes or {}))
    try:
        return _target(_stock_class(model), type(config), values, model)
    except _REFUSED:
        if type(config) is not LlamaConfig or config.attention_bias or config.mlp_bias:
            raise
    for key in ("model_type", "attention_bias", "mlp_bias", "pretraining_tp"):
        values.pop(key, None)
    return _target(MistralForCausalLM, MistralConfig, {**values, "sliding_window": None}, model)
