"""Training a pruned model to get its quality back: LoRA, all weights, or distillation from the dense model."""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .callback import LoraRecoveryCallback
    from .configuration import DistillationConfig, RecoveryConfig
    from .recovering import RecoveryResult, recover

__all__ = ["DistillationConfig", "LoraRecoveryCallback", "RecoveryConfig", "RecoveryResult", "recover"]

_MODULES = {
    "DistillationConfig": "configuration",
    "LoraRecoveryCallback": "callback",
    "RecoveryConfig": "configuration",
    "RecoveryResult": "recovering",
    "recover": "recovering",
}


def __getattr__(name: str):
    # PEFT and TRL are loaded when they are first needed.
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
