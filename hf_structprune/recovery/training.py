"""What a `RecoveryConfig` means to the libraries that train: precision, the student, its adapters, TRL's arguments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from .. import hardware
from ..errors import CheckpointError, ConfigurationError
from ..hardware import DTYPES
from ..installed import need
from ..model.loading import load_config, load_model
from .configuration import RecoveryConfig


if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import SFTConfig

ALL_LINEAR = "all-linear"  # what PEFT calls every Linear but the head
# Optimiser steps between checkpoints, as a share of the training.
_SAVED_SHARE = 0.1


def choose_precision(precision: str) -> str:
    """`"bf16"`, `"fp16"` or `"fp32"`; `"auto"` is bf16 where the hardware multiplies matrices in it, else fp32.

    A CPU without bfloat16 instructions computes in it too, several times slower than in float32.

    Raises:
        ConfigurationError: float16 without an accelerator, where gradients underflow and CPUs are slow; or bfloat16
            on an accelerator that has none.
    """
    accelerator = hardware.has_accelerator()
    if precision == "fp16" and not accelerator:
        raise ConfigurationError("`precision` is 'fp16', which needs an accelerator; choose 'fp32' or 'bf16'.")
    if precision == "bf16" and accelerator and not hardware.trains_in_bf16():
        raise ConfigurationError("`precision` is 'bf16', which the accelerator cannot do; choose 'fp32' or 'fp16'.")
    if precision != "auto":
        return precision
    return "bf16" if (hardware.accelerator_has_bf16() if accelerator else hardware.cpu_has_bf16()) else "fp32"


def load_student(model: Any, config: RecoveryConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The pruned model; weights that are trained are in float32, a frozen base in the precision of the computation."""
    precision = choose_precision(config.precision)
    if config.trained == "qlora":
        return load_quantised(
            model, config.bits, DTYPES[precision], gradient_checkpointing=config.gradient_checkpointing,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    frozen = config.trained == "lora" and precision != "fp16"
    dtype = DTYPES[precision] if frozen else torch.float32
    if isinstance(model, nn.Module):
        return model.to(dtype)
    return load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)


def load_quantised(
    model_id: str | os.PathLike,
    bits: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    *,
    gradient_checkpointing: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model whose linear maps are quantised by bitsandbytes: nf4 with quantised scales (QLoRA), or int8.

    Embeddings and the head are not quantised. Everything is frozen, and what is not quantised goes to float32 (PEFT's
    `prepare_model_for_kbit_training`): put an adapter on it. Do not save it: save the adapter, or what `merge_adapter`
    makes of both.

    Args:
        model_id: Hub id or folder, also of a checkpoint whose layers differ in width.
        bits: 4 or 8.
        dtype: What is computed in, and what `merge_adapter` will give.
        gradient_checkpointing: Compute activations again in the backward pass.
        kwargs: Given to `from_pretrained`.

    Raises:
        StructPruneError: bitsandbytes or PEFT is missing.
        CheckpointError: The checkpoint is quantised already, or lacks weights.
    """
    need("bitsandbytes", "peft", extra="qlora")
    from peft import prepare_model_for_kbit_training

    if getattr(load_config(model_id, **kwargs), "quantization_config", None) is not None:  # and would stay so
        raise CheckpointError(f"{model_id} is quantised already: give the checkpoint as it was before.")
    quantisation = BitsAndBytesConfig(load_in_8bit=True)
    if bits == 4:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    return prepare_model_for_kbit_training(
        load_model(model_id, **{**kwargs, "dtype": dtype, "quantization_config": quantisation}),
        use_gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def adapter_config(config: RecoveryConfig, model: PreTrainedModel) -> LoraConfig | None:
    """PEFT's configuration of the adapters; `None` where all weights are trained.

    Raises:
        ConfigurationError: The model has no module of a name, or PEFT does not allow a combination of options.
    """
    if config.trained == "full":
        return None
    from peft import LoraConfig

    targets, whole = list(config.target_modules or [ALL_LINEAR]), config.modules_to_save
    named = targets != [ALL_LINEAR]
    _check_modules(targets if named else (), whole or (), model)
    try:
        return LoraConfig(
            task_type="CAUSAL_LM", r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout,
            target_modules=targets if named else ALL_LINEAR, modules_to_save=whole,
            init_lora_weights=True if config.init_lora_weights is None else config.init_lora_weights,
            use_dora=config.use_dora, use_rslora=config.use_rslora,
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"PEFT refuses these adapters: {error}") from error


def widen(model: nn.Module) -> None:
    """Makes the modules that are trained whole float32, as PEFT does with adapters but not with these."""
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name and parameter.requires_grad and parameter.itemsize < 4:
            parameter.data = parameter.data.float()


def _check_modules(targets: Sequence[str], whole: Sequence[str], model: PreTrainedModel) -> None:
    """PEFT takes the names as ends of module names, and says nothing of one that fits none if others do."""
    modules = dict(model.named_modules())
    for option, given in (("target_modules", targets), ("modules_to_save", whole)):
        for target in given:
            found = [name for name in modules if f".{name}".endswith(f".{target}")]
            if not found:
                leaves = sorted({name.rsplit(".", 1)[-1] for name in modules if name.endswith(("proj", "fc1", "fc2"))})
                raise ConfigurationError(
                    f"`{option}` names {target!r}, of which the model has none; for example {', '.join(leaves)}."
                )
            packed = [name for name in found if not all(p.is_floating_point() for p in modules[name].parameters())]
            if packed and option == "modules_to_save":
                raise ConfigurationError(
                    f"`modules_to_save` names {packed[0]!r}, which is quantised and cannot be trained whole: train "
                    "'lora', or leave it out."
                )


def training_arguments(config: RecoveryConfig, output_dir: str | os.PathLike) -> SFTConfig:
    """TRL's arguments, with checkpoints in `output_dir`. Rows are tokenised, cut and packed already, see `prepare`.

    Raises:
        ConfigurationError: The batch cannot be shared out evenly among the processes.
    """
    from accelerate import PartialState
    from trl import SFTConfig

    precision = choose_precision(config.precision)
    return SFTConfig(
        output_dir=str(Path(output_dir)), report_to=list(config.report_to or ["none"]),
        learning_rate=config.peak_learning_rate, lr_scheduler_type=config.scheduler, weight_decay=config.weight_decay,
        warmup_steps=config.warmup,  # a share, below 1
        num_train_epochs=config.epochs, max_steps=-1 if config.max_steps is None else config.max_steps,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=accumulation_steps(config, PartialState().num_processes),
        gradient_checkpointing=config.gradient_checkpointing, bf16=precision == "bf16", fp16=precision == "fp16",
        use_cpu=not hardware.has_accelerator(),  # Transformers trains in bfloat16 on a CPU only if told to be there
        max_length=None, packing=False, padding_free=config.packing,  # positions begin anew in every packed example
        save_strategy="steps", save_steps=_SAVED_SHARE if config.save_steps is None else config.save_steps,
        save_total_limit=2,  # the older one is whole while the newer one is written
        eval_strategy="no", seed=config.seed, data_seed=config.seed,
    )  # fmt: skip


def accumulation_steps(config: RecoveryConfig, processes: int) -> int:
    """Forward passes of a device in one optimiser step: `batch_size / (micro_batch_size * processes)`."""
    at_once = config.micro_batch_size * processes
    if config.batch_size % at_once:
        raise ConfigurationError(
            f"`batch_size` is {config.batch_size}, which {processes} processes with `micro_batch_size` "
            f"{config.micro_batch_size} cannot share out: make it a multiple of {at_once}."
        )
    return config.batch_size // at_once
