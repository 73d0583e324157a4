"""Lets `AutoModelForCausalLM` load per-layer checkpoints without `trust_remote_code` after `import hf_structprune`."""

from __future__ import annotations

from functools import wraps

from transformers.models.auto import auto_factory, modeling_auto

from .modeling_structprune import per_layer_class


def load_per_layer_checkpoints() -> None:
    """Makes the causal language model classes that the auto class picks per-layer ones where the configuration is.

    Transformers reads `per_layer_config` but does not build it yet, so this wraps the one function in which the auto
    classes look a model class up. Configurations without it, and all other auto classes, are not touched.
    """
    original = auto_factory._get_model_class
    if getattr(original, "_structprune", False):
        return

    @wraps(original)
    def get_model_class(config, model_mapping):
        model_class = original(config, model_mapping)
        causal = model_mapping is modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
        return per_layer_class(model_class) if causal and config.is_heterogeneous else model_class

    get_model_class._structprune = True
    auto_factory._get_model_class = get_model_class
