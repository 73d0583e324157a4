"""The weights of a model in training: what is wrapped around them; the best ones on disk and back."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import CheckpointError, ConfigurationError
from ..files.writing import appearing


BEST_FOLDER, WEIGHTS_NAME = "recovery_best", "weights.safetensors"
# Initialisations of PEFT that take the adapter's part out of the base weights: the model is base and adapter together.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def without_parallel(model: nn.Module) -> nn.Module:
    """The model without DDP, DeepSpeed's engine and `torch.compile`."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)


def is_peft(model: nn.Module) -> bool:
    """Whether a model without its parallel wrappers is one of PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of the weights (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def underneath(model: nn.Module) -> nn.Module:
    """The Transformers model in training, with its adapters in place; of a sharded one the outermost module."""
    model = without_parallel(model)
    return model if is_sharded(model) or not is_peft(model) else model.get_base_model()


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
    configs = [peft.peft_config[name] for name in peft.active_adapters] if is_peft(peft) else []
    if not configs or any(str(getattr(c, "init_lora_weights", "")).lower().startswith(_CHANGE_BASE) for c in configs):
        yield
        return
    flags = [(parameter, parameter.requires_grad) for parameter in peft.parameters()]
    try:
        with peft.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:  # PEFT freezes adapters that are switched off, and thaws all of them
            parameter.requires_grad_(flag)


def agreed(value: Any) -> Any:
    """The first process's value: all must take the same decisions, and rounding may differ from one to another."""
    if not _several_processes():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class BestWeights:
    """One safetensors file with the parameters that are trained, replaced whenever there is something better.

    Args:
        folder: Where the file is.
        writes: Whether this process writes; the others only take part in collecting what is spread over all.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.path, self.writes = folder / WEIGHTS_NAME, writes

    def keep(self, model: nn.Module) -> None:
        """Writes the weights as they are, all at once: an interrupt leaves the earlier ones.

        Raises:
            CheckpointError: The file cannot be written.
        """
        weights = {}
        for name, parameter in _trained(model).items():
            whole = parameter.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            weights[name] = whole.to("cpu", copy=True).contiguous()
        if self.writes:
            with appearing(self.path) as path:
                save_file(weights, path, {"format": "pt"})

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Puts the weights of the file back into the model: the first process reads them for all.

        Raises:
            CheckpointError: There is no such file, or it is of another model.
        """
        trained, weights = _trained(model), {}
        if self.writes:
            try:
                weights = load_file(self.path)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"The best weights cannot be read from {self.path}: {error}") from error
            if trained.keys() != weights.keys():
                odd = ", ".join(sorted(trained.keys() ^ weights.keys())[:5])
                raise CheckpointError(f"The best weights are of another model: {odd} are in one of the two.")
        for name, parameter in trained.items():
            if isinstance(parameter, DTensor):
                whole = weights[name] if weights else torch.empty(parameter.shape, dtype=parameter.dtype)
                whole = whole.to(parameter.device_mesh.device_type)
                parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
                continue
            if weights:
                parameter.copy_(weights[name])
            if _several_processes():
                torch.distributed.broadcast(parameter.data, 0)


def copy_file(source: Path, path: Path) -> None:
    """A copy of a file that is only ever replaced; takes no room where the disk knows links."""
    with appearing(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    named = without_parallel(model).named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}
