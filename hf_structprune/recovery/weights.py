"""The weights of a model in training: what is wrapped around them; the best ones on disk and back; adapters merged."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list, extract_model_from_parallel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..errors import CheckpointError, ConfigurationError
from ..files.writing import appearing
from ..model.placement import has_weights
from ..model.rebuild import assemble, with_ties
from ..model.target import Target


BEST_FOLDER, WEIGHTS_NAME = "recovery_best", "weights.safetensors"
# Initialisations of PEFT that take the adapter's part out of the base weights: the model is base and adapter together.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def without_parallel(model: nn.Module) -> nn.Module:
    """The model without DDP, DeepSpeed's engine and `torch.compile`."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def is_peft(model: nn.Module) -> bool:
    """Whether a model without its parallel wrappers is one of PEFT."""
    return hasattr(model, "get_base_model")


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of the weights (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def underneath(model: nn.Module) -> nn.Module:
    """The Transformers model in training, with its adapters in place; of a sharded one the outermost module."""
    model = without_parallel(model)
    return model if is_sharded(model) or not is_peft(model) else model.get_base_model()


def check_trainable(model: nn.Module) -> None:
    """Refuses, before training, what cannot be kept or merged, or learns nothing."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = without_parallel(model)
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise ConfigurationError(
                f"The adapter {name!r} is a {config.peft_type} prompt, which cannot be merged into the weights: train "
                "LoRA, DoRA or all weights."
            )
    zero = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if zero or any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ConfigurationError(
            f"The weights are split by {'ZeRO stage 3 of DeepSpeed' if zero else 'version 1 of FSDP'}, so that the "
            "best ones cannot be kept: use ZeRO stage 2, or `fsdp_version: 2`."
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
    return broadcast_object_list([value])[0]


class BestWeights:
    """One safetensors file in a folder with the parameters that are trained, replaced whenever there is a better one.

    Only the process that `writes` does; the others take part in collecting what is spread over all.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.path, self.writes = folder / WEIGHTS_NAME, writes

    def keep(self, model: nn.Module) -> None:
        """Writes the weights as they are, all at once: an interrupt leaves the earlier ones."""
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
        """Puts the weights of the file back into the same model: the first process reads for all."""
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
                whole, mesh = whole.to(parameter.device_mesh.device_type), parameter.device_mesh
                parameter.copy_(distribute_tensor(whole, mesh, parameter.placements))
                continue
            if weights:
                parameter.copy_(weights[name])
            broadcast(parameter.data)


def copy_file(original: Path, path: Path) -> None:
    """A copy of a file that is only ever replaced; takes no room where the disk knows links."""
    with appearing(path) as temporary:
        try:
            os.link(original, temporary)
        except OSError:
            shutil.copyfile(original, temporary)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    named = without_parallel(model).named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


@torch.no_grad()
def merge_adapter(model: nn.Module, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A plain model whose weights hold the active adapters of another one, which stays as it is.

    PEFT's `merge_and_unload(safe_merge=True)` on a copy. What it cannot do is done around it: an adapter on one side
    of tied embeddings unties them (PEFT would change both), weights of bitsandbytes become plain ones (PEFT would
    quantise the sum again), and the result has neither the forward of TRL nor a trace of quantisation.

    Wrappers of training (DDP, `torch.compile`) are looked through. `dtype` is that of the merging and the result;
    without it each weight keeps that of the base model, of a quantised one the dtype it was loaded in.

    Returns:
        A new model in eval mode that can be saved, trained and adapted again. A plain model is returned itself, unless
        TRL has replaced its `forward` or another dtype is asked for: then a new one shares its tensors.

    Raises:
        CheckpointError: The adapter cannot be put into weights, is broken (NaN), or the weights are not all here.
    """
    model = without_parallel(model)
    base = model.get_base_model() if is_peft(model) else model
    method = quantisation_of(base)
    _check(model, base, method)
    if method is not None:
        dtype = dtype or getattr(base.config, "dtype", None) or torch.get_default_dtype()
    is_plain = not is_peft(model) and method is None
    if is_plain and "forward" not in vars(base) and dtype is None:
        return base
    merged = base if is_plain else _merged(model, dtype)
    target = Target(type(base), copy.deepcopy(base.config))
    if method is not None:
        del target.config.quantization_config
    tensors = {
        name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in merged.state_dict().items()
    }
    tied = getattr(target.skeleton(), "all_tied_weights_keys", None) or {}
    if all(torch.equal(tensors[name], tensors[first]) for name, first in tied.items()):
        tensors |= {name: tensors[first] for name, first in tied.items()}
    else:
        with_ties(target.config, False)
    result = assemble(target, tensors, dict(merged.named_buffers()), base).requires_grad_(True)
    if dtype is not None:
        result.config.dtype = dtype
    if getattr(base, "model_tags", None):
        result.add_model_tags(list(base.model_tags))
    return result


def _merged(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a model with its adapters merged by PEFT and its quantised layers plain."""
    quantised = [module for module in model.modules() if is_quantised(module)]
    memo: dict[int, Any] = {id(module): dequantised(module, dtype) for module in quantised}
    for module in model.modules():  # what a layer was made with: tied adapters keep tensors there that have no copy
        memo |= {id(value): value for name, value in vars(module).items() if name == "kwargs"}
    result, seen = copy.deepcopy(model, memo), set()
    for module in result.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:  # tied: an adapter may change one side
                module._parameters[name] = parameter = nn.Parameter(parameter.clone(), requires_grad=False)
            seen.add(id(parameter))
            if dtype is not None and parameter.is_floating_point() and parameter.itemsize < dtype.itemsize:
                parameter.data = parameter.data.to(dtype)
    if not is_peft(result):
        return result
    from peft.tuners.lora import Linear

    for module in result.modules():  # PEFT has classes of its own around quantised layers
        if type(module).__module__ == "peft.tuners.lora.bnb":
            module.__class__ = Linear
            module.fan_in_fan_out = module.is_target_conv_1d_layer = False
        elif ".bnb" in type(module).__module__:
            raise CheckpointError(f"A {type(module).__name__} of PEFT over a quantised layer cannot be merged.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of embeddings that are no longer tied
            return result.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"The adapter cannot be merged: {error}") from error


def _check(model: nn.Module, base: nn.Module, method: str | None) -> None:
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise CheckpointError(
            f"A {config.peft_type.value} adapter is learned input and no weight, so that it cannot be merged: train "
            "one of LoRA's kind, or save the adapter itself with `model.save_pretrained`."
        )
    if not isinstance(base, PreTrainedModel):
        raise CheckpointError(f"A {type(base).__name__} is no model of Transformers.")
    if method not in (None, "bitsandbytes"):
        raise CheckpointError(
            f"The base model is quantised by {method}, and only bitsandbytes can be undone here. Load the model as it "
            "was before quantisation, put the adapter on it with `PeftModel.from_pretrained`, and merge that."
        )
    if not has_weights(base):
        raise CheckpointError("Weights of the model are offloaded: load it without `device_map` to merge the adapter.")
    if is_sharded(base) or any(hasattr(p, "ds_id") or "_flat_param" in name for name, p in base.named_parameters()):
        raise CheckpointError(
            "The weights are spread over processes (FSDP or ZeRO-3). Save the adapter with `trainer.save_model`, load "
            "the base model in one process, `PeftModel.from_pretrained(base, FOLDER)`, and merge that."
        )


def quantisation_of(model: nn.Module) -> str | None:
    """The quantisation method of a model, such as `"bitsandbytes"`; `None` for a plain one."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return str(getattr(method, "value", method))


def is_quantised(layer: nn.Module) -> bool:
    """Whether a module itself holds a weight of bitsandbytes, in 4 or 8 bits."""
    return type(layer._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params")


@torch.no_grad()
def dequantised(layer: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A plain linear map, in float32 or another dtype, with the numbers that a bitsandbytes one computes with.

    Not by PEFT or Transformers: kernels of some CPUs repack 4-bit weights, which theirs would read wrong.
    """
    if type(layer.weight).__name__ == "Params4bit":
        from ..quantization.four_bit import stored_weight

        values = stored_weight(layer.weight)
    else:
        scales = layer.state.SCB if layer.state.SCB is not None else getattr(layer.weight, "SCB", None)
        if scales is None:
            raise CheckpointError("An 8-bit weight has no scales: its model was not loaded completely.")
        values = layer.weight.to(torch.float32) * (scales.to(layer.weight.device).view(-1, 1) / 127)
    result = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    result.weight = nn.Parameter(values.to(dtype).view(layer.out_features, layer.in_features))
    if layer.bias is not None:
        result.bias = nn.Parameter(layer.bias.detach().to(dtype, copy=True))
    return result
