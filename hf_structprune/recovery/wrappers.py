"""What stands around a model in training: PEFT, DDP, compilation, sharding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..errors import ConfigurationError


# Initialisations of PEFT that take the adapter's part out of the base weights: the model is base and adapter together.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def without_parallel(model: nn.Module) -> nn.Module:
    """The model without DDP, DeepSpeed's engine and `torch.compile`."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)


def is_peft(model: nn.Module) -> bool:
    """Whether a model without its parallel wrappers is one of PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def underneath(model: nn.Module) -> nn.Module:
    """The Transformers model in training, with its adapters in place; of a sharded one the outermost module."""
    model = without_parallel(model)
    return model if is_sharded(model) or not is_peft(model) else model.get_base_model()


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of the weights (FSDP2)."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def check_trainable(model: nn.Module) -> None:
    """Refuses, before training, what cannot be kept or merged.

    Raises:
        ConfigurationError: Nothing is trained, a prompt is trained, or the weights are split by version 1 of FSDP or
            stage 3 of DeepSpeed.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = without_parallel(model)
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise ConfigurationError(
                f"The adapter {name!r} is a {config.peft_type} prompt, which cannot be merged into the weights: train "
                "LoRA, DoRA or all weights."
            )
    for there, name in (
        (any(hasattr(parameter, "ds_id") for parameter in model.parameters()), "DeepSpeed's ZeRO stage 3"),
        (any(isinstance(module, FullyShardedDataParallel) for module in model.modules()), "version 1 of FSDP"),
    ):
        if there:
            raise ConfigurationError(
                f"The weights are split by {name}, so that the best ones cannot be kept: use ZeRO stage 2, or "
                "`fsdp_version: 2`."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError("No parameter of the model requires gradients, so there is nothing to train.")


@contextlib.contextmanager
def as_before_training(model: nn.Module) -> Iterator[None]:
    """The adapters of a PeftModel switched off, where that gives the pruned model; other models as they are."""
    peft = without_parallel(model)
    if not is_peft(peft) or _changes_base(peft):
        yield
        return
    flags = [(parameter, parameter.requires_grad) for parameter in peft.parameters()]
    try:
        with peft.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:  # PEFT freezes adapters that are switched off, and thaws all of them
            parameter.requires_grad_(flag)


def _changes_base(peft: nn.Module) -> bool:
    configs = [peft.peft_config[name] for name in peft.active_adapters]
    kinds = [str(getattr(config, "init_lora_weights", "")).lower() for config in configs]
    return any(kind.startswith(_CHANGE_BASE) for kind in kinds)


def has_exact_start(model: nn.Module) -> bool:
    """Whether the pruned model can still be measured after training has begun: it is under the adapters."""
    peft = without_parallel(model)
    return is_peft(peft) and not _changes_base(peft)
