"""`merge_adapter`: the plain model that computes what a model with an adapter computes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError
from ..model.rebuild import assemble, has_weights
from ..model.target import Target
from .weights import is_peft, without_parallel


@torch.no_grad()
def merge_adapter(model: nn.Module, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A plain model whose weights hold the active adapters of another one, which stays as it is.

    Every adapted layer is copied, merged by PEFT in float32 and cast back, one after another, so that besides the
    given model there is one other in memory and one layer more. An adapter on one side of tied embeddings unties them:
    the result then has both weights, and `tie_word_embeddings=False`. Weights of bitsandbytes become plain ones.

    Args:
        model: A PeftModel, or a plain model; wrappers of training (DDP, `torch.compile`) are looked through.
        dtype: Of the result. Default: each weight keeps that of the base model; of a quantised one, the dtype it was
            loaded in.

    Returns:
        A new model in eval mode that can be saved, trained and adapted again. A plain model is returned itself, unless
        TRL has replaced its `forward` or another dtype is asked for: then a new one shares its tensors.

    Raises:
        CheckpointError: The adapter cannot be put into weights, is broken (NaN), or the weights are not all here.
    """
    model = without_parallel(model)
    _check_adapter(model)
    base = model.get_base_model() if is_peft(model) else model
    method = quantisation_of(base)
    _check_base(base, method)
    if method is not None:
        dtype = dtype or getattr(base.config, "dtype", None) or torch.get_default_dtype()
    merged = {path: _merged(layer, path, dtype) for path, layer in _changed_layers(base)}
    if not merged and "forward" not in vars(base) and dtype is None:
        return base
    target = Target(type(base), _plain_config(base))
    tensors, buffers = _collect(base, merged, target.skeleton(), dtype)
    _untie(target, tensors)
    result = assemble(target, tensors, buffers, base).requires_grad_(True)
    if dtype is not None:
        result.config.dtype = dtype
    if getattr(base, "model_tags", None):
        result.add_model_tags(list(base.model_tags))
    return result


def _changed_layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that PEFT or bitsandbytes have put in the place of plain ones, by path."""
    for name, child in module.named_children():
        if _is_wrapper(child) or is_quantised(child):
            yield path + name, child
        else:
            yield from _changed_layers(child, f"{path}{name}.")


def _collect(
    base: PreTrainedModel, merged: dict[str, nn.Module], skeleton: PreTrainedModel, dtype: torch.dtype | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors and buffers of the plain model: those of merged layers and, if there are any, copies of the others."""
    tensors, buffers, copies = {}, {}, {}
    for path, module in skeleton.named_modules(remove_duplicate=False):
        owner = next((own for own in merged if f"{path}.".startswith(f"{own}.")), None)
        source = base.get_submodule(path) if owner is None else merged[owner].get_submodule(path[len(owner) + 1 :])
        prefix = f"{path}." if path else ""
        for name in (name for name, tensor in module._parameters.items() if tensor is not None):
            tensor = getattr(source, name)
            if id(tensor) not in copies:  # what is in two places in the base model stays one tensor
                copies[id(tensor)] = tensor.detach().to(dtype or tensor.dtype, copy=bool(merged) and owner is None)
            tensors[prefix + name] = copies[id(tensor)]
        for name in (name for name, tensor in module._buffers.items() if tensor is not None):
            buffers[prefix + name] = getattr(source, name).clone()
            if name not in module._non_persistent_buffers_set:
                tensors[prefix + name] = buffers[prefix + name]
    return tensors, buffers


def _merged(module: nn.Module, path: str, dtype: torch.dtype | None) -> nn.Module:
    """A plain layer that computes what one of PEFT or bitsandbytes does, in a dtype or that of the plain weights."""
    base = _innermost(module)
    dtypes = {} if is_quantised(base) else {name: p.dtype for name, p in base.named_parameters()}
    if _is_wrapper(module):
        one = _in_float32(module, base)
        try:
            if hasattr(one, "unload_and_optionally_merge_module"):
                result = one.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            else:
                one.merge(safe_merge=True)
                result = one.get_base_layer()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise CheckpointError(f"The adapter of {path} cannot be merged: {error}") from error
    else:
        result = dequantised(module)
    for name, parameter in result.named_parameters():
        parameter.data = parameter.data.to(dtype or dtypes.get(name, parameter.dtype))
    return result


def _in_float32(module: nn.Module, base: nn.Module) -> nn.Module:
    """A copy of an adapted layer in at least float32; over a quantised layer one of PEFT's plain kind."""
    if not is_quantised(base):
        return _wide_copy(module)
    from peft.tuners.lora import Linear, LoraLayer

    if not isinstance(module, LoraLayer):
        raise CheckpointError(f"A {type(module).__name__} over a quantised layer cannot be merged; LoRA and DoRA can.")
    one = copy.copy(module)
    one._modules = {**module._modules, "base_layer": None}
    one._caches = {}
    one = _wide_copy(one)
    one._modules["base_layer"] = dequantised(base)
    one.__class__, one.fan_in_fan_out, one.is_target_conv_1d_layer = Linear, False, False
    return one


def _wide_copy(module: nn.Module) -> nn.Module:
    """A deep copy, without what the layer was made with: tied adapters keep tensors there that have none."""
    kept = [vars(part).get("kwargs") for part in module.modules()]
    result = copy.deepcopy(module, {id(kwargs): kwargs for kwargs in kept if kwargs is not None})
    for tensor in (*result.parameters(), *result.buffers()):
        if tensor.is_floating_point() and tensor.itemsize < 4:
            tensor.data = tensor.data.float()
    return result


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT around one of the model's."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _innermost(module: nn.Module) -> nn.Module:
    while _is_wrapper(module):
        module = module.base_layer if hasattr(module, "base_layer") else module.original_module
    return module


def _check_adapter(model: nn.Module) -> None:
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise CheckpointError(
            f"A {config.peft_type.value} adapter is learned input and no weight, so that it cannot be merged: train "
            "one of LoRA's kind, or save the adapter itself with `model.save_pretrained`."
        )


def _check_base(base: nn.Module, method: str | None) -> None:
    if not isinstance(base, PreTrainedModel):
        raise CheckpointError(f"A {type(base).__name__} is no model of Transformers.")
    if method not in (None, "bitsandbytes"):
        raise CheckpointError(
            f"The base model is quantised by {method}, and only bitsandbytes can be undone here. Load the model as it "
            "was before quantisation, put the adapter on it with `PeftModel.from_pretrained`, and merge that."
        )
    if not has_weights(base):
        raise CheckpointError("Weights of the model are offloaded: load it without `device_map` to merge the adapter.")
    for name, parameter in base.named_parameters():
        if hasattr(parameter, "ds_id") or type(parameter).__name__ == "DTensor" or "_flat_param" in name:
            raise CheckpointError(
                f"`{name}` is spread over processes (FSDP or ZeRO-3). Save the adapter with `trainer.save_model`, "
                "load the base model in one process, `PeftModel.from_pretrained(base, FOLDER)`, and merge that."
            )


def _plain_config(base: PreTrainedModel) -> PreTrainedConfig:
    """The configuration without quantisation, and with the cache that Trainer turns off for training."""
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if getattr(config, "use_cache", None) is False:
        config.use_cache = True
    return config


def _untie(target: Target, tensors: dict[str, torch.Tensor]) -> None:
    """Says in the configuration that embeddings are not tied if the tensors differ; else makes them one again."""
    tied = getattr(target.skeleton(), "all_tied_weights_keys", None) or {}
    if all(torch.equal(tensors[name], tensors[source]) for name, source in tied.items()):
        tensors |= {name: tensors[source] for name, source in tied.items()}
    else:
        target.config.tie_word_embeddings = False
        target.config.get_text_config().tie_word_embeddings = False


def quantisation_of(model: nn.Module) -> str | None:
    """The quantisation method of a model, such as `"bitsandbytes"`; `None` for a plain one."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return str(getattr(method, "value", method))


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer holds a weight of bitsandbytes, in 4 or 8 bits."""
    return type(getattr(layer, "weight", None)).__name__ in ("Params4bit", "Int8Params")


@torch.no_grad()
def dequantised(layer: nn.Module) -> nn.Linear:
    """A plain linear map in float32 with the numbers that a bitsandbytes one computes with on every CPU.

    Raises:
        CheckpointError: The weight has not been quantised yet, as before its model was moved to a device.
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
    result.weight = nn.Parameter(values.to(torch.float32).view(layer.out_features, layer.in_features))
    if layer.bias is not None:
        result.bias = nn.Parameter(layer.bias.detach().to(torch.float32, copy=True))
    return result
