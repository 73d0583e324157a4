"""The adapters of `RecoveryConfig`, as PEFT understands them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from ..errors import ConfigurationError
from .configuration import RecoveryConfig


ALL_LINEAR = "all-linear"  # what PEFT calls every Linear but the head

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


def adapter_config(config: RecoveryConfig, model: PreTrainedModel) -> LoraConfig | None:
    """PEFT's configuration of the adapters; `None` where all weights are trained.

    Raises:
        ConfigurationError: The model has no module of a name, or PEFT does not allow a combination of options.
    """
    if config.trained == "full":
        return None
    from peft import LoraConfig

    targets = list(config.target_modules or [ALL_LINEAR])
    targets = None if targets == [ALL_LINEAR] else targets
    _check_names("target_modules", targets, model)
    _check_names("modules_to_save", config.modules_to_save, model)
    _check_trainable(config.modules_to_save, model)
    try:
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets or ALL_LINEAR,
            modules_to_save=None if config.modules_to_save is None else list(config.modules_to_save),
            init_lora_weights=True if config.init_lora_weights is None else config.init_lora_weights,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
        )
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"PEFT refuses these adapters: {error}") from error


def widen(model: nn.Module) -> None:
    """Makes the modules that are trained whole float32, as PEFT does with adapters but not with these."""
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name and parameter.requires_grad and parameter.itemsize < 4:
            parameter.data = parameter.data.float()


def _check_names(option: str, targets: Sequence[str] | None, model: PreTrainedModel) -> None:
    """PEFT takes the names as ends of module names, and says nothing of one that fits none if others do."""
    names = [name for name, _ in model.named_modules()]
    for target in targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            leaves = sorted({name.rsplit(".", 1)[-1] for name in names if name.endswith(("proj", "fc1", "fc2"))})
            raise ConfigurationError(
                f"`{option}` names {target!r}, of which the model has none; for example {', '.join(leaves)}."
            )


def _check_trainable(whole: Sequence[str] | None, model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if not {name, name.rsplit(".", 1)[-1]}.isdisjoint(whole or ()) and _is_packed(module):
            raise ConfigurationError(
                f"`modules_to_save` names {name!r}, which is quantised and cannot be trained whole: train 'lora', or "
                "leave it out."
            )


def _is_packed(module: nn.Module) -> bool:
    return not all(parameter.is_floating_point() for parameter in module.parameters())
