"""Class and configuration of a model with other sizes, and the model they build on the meta device."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, UnsupportedModelError
from .modeling_structprune import per_layer_class
from .per_layer import needs_per_layer_class


# What configuration and model classes raise when they are given numbers that they do not take.
REFUSALS = (StrictDataclassError, ValueError, RuntimeError, TypeError, AttributeError)


@dataclass
class Target:
    """The class and configuration of a model."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: shapes without weights.

        Raises:
            CheckpointError: The class does not take the numbers of the configuration.
        """
        try:
            with torch.device("meta"):
                return self.model_class(copy.deepcopy(self.config))
        except REFUSALS as error:
            raise CheckpointError(f"{error}" or type(error).__name__) from error

    def glance(self) -> PreTrainedModel:
        """What `skeleton` builds, to look at and not to change: the last few are kept, since one model asks often.

        Raises:
            CheckpointError: The class does not take the numbers of the configuration.
        """
        config = self.config
        about = (config._attn_implementation, config._experts_implementation, config.dtype)
        key = (self.model_class, config.to_json_string(use_diff=False), *map(str, about))
        if key not in _glances:
            _glances[key] = self.skeleton()
        _glances.move_to_end(key)
        while len(_glances) > _GLANCES:
            _glances.popitem(last=False)
        return _glances[key]


_GLANCES = 8
_glances: OrderedDict[tuple, PreTrainedModel] = OrderedDict()


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is, on the meta device."""
    return Target(type(model), model.config).skeleton()


def plain_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Values of a configuration without what only says where it came from."""
    return {key: value for key, value in config.to_dict().items() if key not in ("auto_map", "architectures")}


def overrides_of(config: PreTrainedConfig, layer: int) -> dict[str, Any]:
    """What a configuration says of one layer alone."""
    overrides = config._heterogeneity_spec.per_layer_overrides if config.is_heterogeneous else {}
    return dict(overrides.get(layer, {}))


def named_values(config: PreTrainedConfig) -> dict[str, Any]:
    """`plain_values` under all names that the configuration has for them."""
    values = plain_values(config)
    return {**{name: values[key] for name, key in config.attribute_map.items() if key in values}, **values}


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The Transformers class of a model that may be a per-layer one.

    Raises:
        UnsupportedModelError: There is none: the class comes with the checkpoint, or is the user's own.
    """
    for base in type(model).__mro__:
        if base.__module__.startswith("transformers.models"):
            return base
    raise UnsupportedModelError(
        f"{type(model).__name__} is not a class of Transformers: a checkpoint of it needs code that is not saved with "
        "it. If Transformers has a class for this model type, load the model without `trust_remote_code`."
    )


def make_target(model: PreTrainedModel, values: dict[str, Any]) -> Target:
    """Class and configuration of a model with these values.

    A Llama without biases whose numbers of heads or hidden size `LlamaConfig` refuses is written as a Mistral without
    sliding window, which computes the same with the same weights.

    Raises:
        CheckpointError: The configuration class does not take them.
    """
    dense, model_class = model.config, stock_class(model)
    try:
        config = _read(type(dense), values)
    except CheckpointError:
        if type(dense) is not LlamaConfig or dense.attention_bias or dense.mlp_bias:
            raise
        own = ("model_type", "attention_bias", "mlp_bias", "pretraining_tp")
        values = {key: value for key, value in values.items() if key not in own} | {"sliding_window": None}
        model_class, config = MistralForCausalLM, _read(MistralConfig, values)
    config._attn_implementation = dense._attn_implementation
    config._experts_implementation = dense._experts_implementation
    config.dtype = dense.dtype
    return Target(per_layer_class(model_class) if needs_per_layer_class(config) else model_class, config)


def _read(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedConfig:
    """A configuration with these values that can be read when it has been written, infinity too."""
    try:
        config = config_class.from_dict(values)
        written = json.loads(config.to_json_string(use_diff=False))
        config_class.from_dict(config_class._decode_special_floats(written))
        return config
    except REFUSALS as error:
        raise CheckpointError(f"{error}" or type(error).__name__) from error
