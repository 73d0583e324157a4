"""Lets `AutoModelForCausalLM` load per-layer checkpoints without `trust_remote_code` after `import hf_structprune`."""

from __future__ import annotations

import importlib.util
import sys
from functools import wraps
from types import ModuleType


_FACTORY = "transformers.models.auto.auto_factory"


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
        per_layer = model_mapping is MODEL_FOR_CAUSAL_LM_MAPPING and config.is_heterogeneous
        return per_layer_class(model_class) if per_layer else model_class

    factory._get_model_class = get_model_class
