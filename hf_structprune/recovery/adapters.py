"""The adapters of `RecoveryConfig`, as PEFT understands them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from .configuration import RecoveryConfig


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

    _check_targets(config.target_modules, model)
    try:
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules="all-linear" if config.target_modules is None else list(config.target_modules),
            init_lora_weights=True if config.init_lora_weights is None else config.init_lora_weights,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
        )
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"PEFT refuses these adapters: {error}") from error


def _check_targets(targets: Sequence[str] | None, model: PreTrainedModel) -> None:
    """PEFT takes the names as ends of module names, and says nothing of one that fits none if others do."""
    names = [name for name, _ in model.named_modules()]
    for target in targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            leaves = sorted({name.rsplit(".", 1)[-1] for name in names if name.endswith(("proj", "fc1", "fc2"))})
            raise ConfigurationError(
                f"`target_modules` names {target!r}, of which the model has none; for example {', '.join(leaves)}."
            )
