"""Lets `AutoModelForCausalLM` load per-layer checkpoints without `trust_remote_code` after `import hf_structprune`."""

from __future__ import annotations

import importlib.util
import sys
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# Keys of which the classes of Transformers themselves read a value for each layer.
_NATIVE = {
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), {"head_dim", "num_key_value_heads"}),
    "dots3_note_text": {
        "head_dim", "num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
        "qk_rope_head_dim", "v_head_dim", "rope_parameters", "sliding_window",
    },
}  # fmt: skip
_FACTORY = "transformers.models.auto.auto_factory"


def native_keys(config: PreTrainedConfig) -> set[str]:
    """Keys of which the class of Transformers itself reads a value for each layer (Gemma 4)."""
    return _NATIVE.get(config.model_type, set())


def needs_per_layer_class(config: PreTrainedConfig) -> bool:
    """Whether a configuration has values of single layers that the class of Transformers does not read."""
    overrides = config._heterogeneity_spec.per_layer_overrides if config.is_heterogeneous else {}
    return bool({key for own in overrides.values() for key in own} - native_keys(config))


def load_per_layer_checkpoints() -> None:
    """Makes the causal language model classes that the auto class picks per-layer ones where the configuration is.

    Transformers reads `per_layer_config` but does not build it yet, so this wraps the one function in which the auto
    classes look a model class up, now or as soon as Transformers is imported.
    """
    if _FACTORY in sys.modules:
        _wrap(sys.modules[_FACTORY])
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport:
    """Import finder that wraps the auto classes' module right after it was loaded, then is gone."""

    def find_spec(self, name, path=None, target=None):
        if name != _FACTORY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            _wrap(module)

        spec.loader.exec_module = exec_module
        return spec


def _wrap(factory: ModuleType) -> None:
    original = factory._get_model_class

    @wraps(original)
    def get_model_class(config, model_mapping):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        from .modeling_structprune import per_layer_class

        model_class = original(config, model_mapping)
        per_layer = model_mapping is MODEL_FOR_CAUSAL_LM_MAPPING and needs_per_layer_class(config)
        return per_layer_class(model_class) if per_layer else model_class

    factory._get_model_class = get_model_class
