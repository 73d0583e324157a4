"""Structured pruning for Hugging Face Transformers: models get really smaller, stay dense, and are trained back."""

from importlib import import_module
from typing import TYPE_CHECKING

from .installed import __version__ as __version__
from .model.per_layer import load_per_layer_checkpoints


if TYPE_CHECKING:
    from .config import CalibrationConfig, PruningConfig
    from .errors import StructPruneError
    from .plan import PruningPlan
    from .pruner import StructuredPruner
    from .quantization.configuration import QuantizationConfig
    from .quantization.quantizing import quantize
    from .recovery.callback import LoraRecoveryCallback
    from .recovery.configuration import DistillationConfig, RecoveryConfig
    from .recovery.recovering import recover

__all__ = [
    "CalibrationConfig",
    "DistillationConfig",
    "LoraRecoveryCallback",
    "PruningConfig",
    "PruningPlan",
    "QuantizationConfig",
    "RecoveryConfig",
    "StructPruneError",
    "StructuredPruner",
    "quantize",
    "recover",
]

_MODULES = {
    "CalibrationConfig": ".config",
    "DistillationConfig": ".recovery.configuration",
    "LoraRecoveryCallback": ".recovery.callback",
    "PruningConfig": ".config",
    "PruningPlan": ".plan",
    "QuantizationConfig": ".quantization.configuration",
    "RecoveryConfig": ".recovery.configuration",
    "StructPruneError": ".errors",
    "StructuredPruner": ".pruner",
    "quantize": ".quantization.quantizing",
    "recover": ".recovery.recovering",
}


def __getattr__(name: str):
    # Names are imported when they are first used, so that the command line answers before torch is loaded.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


load_per_layer_checkpoints()
