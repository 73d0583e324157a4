"""`merge_adapter`: the plain model that computes what a model with an adapter computes."""

from __future__ import annotations

import copy
import sys

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CheckpointError
from ..model.rebuild import assemble, has_weights
from ..model.target import Target
from .dequantise import dequantised, is_quantised, quantisation_of


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
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model, keep_torch_compile=False)
    _check_adapter(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    method = quantisation_of(base)
    _check_base(base, method)
    adapted = method is not None or any(map(_is_wrapper, base.modules()))
    if not adapted and "forward" not in vars(base) and dtype is None:
        return base
    if method is not None:
        dtype = dtype or getattr(base.config, "dtype", None) or torch.get_default_dtype()
    target = Target(type(base), _plain_config(base))
    walk = _Walk(dtype, copies=adapted)
    walk.go(base, target.skeleton(), "", new=False)
    _untie(target, walk.tensors)
    result = assemble(target, walk.tensors, walk.buffers, base).requires_grad_(True)
    if dtype is not None:
        result.config.dtype = dtype
    if getattr(base, "model_tags", None):
        result.add_model_tags(list(base.model_tags))
    return result


class _Walk:
    """Collects the tensors of a plain model out of one with adapters, in the shape of a skeleton."""

    def __init__(self, dtype: torch.dtype | None, copies: bool) -> None:
        self.dtype, self.copies = dtype, copies
        self.tensors: dict[str, torch.Tensor] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        self._done: dict[int, torch.Tensor] = {}  # what is in two places in the base model stays one tensor

    def go(self, module: nn.Module, skeleton: nn.Module, path: str, new: bool) -> None:
        """Takes what the skeleton has at a path; `new` says that the module was made here and nobody else's."""
        source = _plain(module, path, keep_dtype=self.dtype is None)
        new = new or source is not module
        for name in (name for name, tensor in skeleton._parameters.items() if tensor is not None):
            tensor = getattr(source, name)
            self.tensors[path + name] = tensor.detach().to(self.dtype or tensor.dtype) if new else self._own(tensor)
        for name in (name for name, tensor in skeleton._buffers.items() if tensor is not None):
            self.buffers[path + name] = getattr(source, name).clone()
            if name not in skeleton._non_persistent_buffers_set:
                self.tensors[path + name] = self.buffers[path + name]
        for name, child in skeleton.named_children():
            self.go(getattr(source, name), child, f"{path}{name}.", new)

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._done:
            self._done[id(tensor)] = tensor.detach().to(self.dtype or tensor.dtype, copy=self.copies)
        return self._done[id(tensor)]


def _plain(module: nn.Module, path: str, keep_dtype: bool) -> nn.Module:
    """A module without the wrappers of PEFT and bitsandbytes, with what they compute in its weights."""
    if not _is_wrapper(module):
        return dequantised(module) if is_quantised(module) else module
    base = _innermost(module)
    dtypes = {name: p.dtype for name, p in base.named_parameters()} if keep_dtype else {}
    one = _in_float32(module, base)
    try:
        if hasattr(one, "unload_and_optionally_merge_module"):
            merged = one.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            one.merge(safe_merge=True)
            merged = one.get_base_layer()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"The adapter of {path.rstrip('.')} cannot be merged: {error}") from error
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    return merged


def _in_float32(module: nn.Module, base: nn.Module) -> nn.Module:
    """A copy of an adapted layer in at least float32; over a quantised layer one of PEFT's plain kind."""
    if not is_quantised(base):
        return _wide(_duplicate(module))
    from peft.tuners.lora import Linear, LoraLayer

    if not isinstance(module, LoraLayer):
        raise CheckpointError(f"A {type(module).__name__} over a quantised layer cannot be merged; LoRA and DoRA can.")
    one = copy.copy(module)
    one._modules = {**module._modules, "base_layer": None}
    one._caches = {}
    one = _wide(_duplicate(one))
    one._modules["base_layer"] = dequantised(base)
    one.__class__, one.fan_in_fan_out, one.is_target_conv_1d_layer = Linear, False, False
    return one


def _duplicate(module: nn.Module) -> nn.Module:
    """A deep copy, without what the layer was made with: tied adapters keep tensors there that have none."""
    kept = [vars(part).get("kwargs") for part in module.modules()]
    return copy.deepcopy(module, {id(kwargs): kwargs for kwargs in kept if kwargs is not None})


def _wide(module: nn.Module) -> nn.Module:
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and tensor.itemsize < 4:
            tensor.data = tensor.data.float()
    return module


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


def _plain_config(base: PreTrainedModel):
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
    differ = [name for name, source in tied.items() if not torch.equal(tensors[name], tensors[source])]
    for name, source in tied.items():
        if not differ:
            tensors[name] = tensors[source]
    if differ:
        target.config.tie_word_embeddings = False
        target.config.get_text_config().tie_word_embeddings = False
