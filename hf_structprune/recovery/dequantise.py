"""Weights of bitsandbytes layers as plain floating point numbers, the ones that their forward pass computes with."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..errors import CheckpointError


_KINDS = ("Params4bit", "Int8Params")


def quantisation_of(model: nn.Module) -> str | None:
    """The quantisation method of a model, such as `"bitsandbytes"`; `None` for a plain one."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return str(getattr(method, "value", method))


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer holds a weight of bitsandbytes, in 4 or 8 bits."""
    return type(getattr(layer, "weight", None)).__name__ in _KINDS


@torch.no_grad()
def dequantised(layer: nn.Module) -> nn.Linear:
    """A plain linear map in float32 with the weight of a bitsandbytes one, which is not changed.

    Raises:
        CheckpointError: The weight has not been quantised yet, as before its model was moved to a device.
    """
    weight = layer.weight.detach()
    if type(layer.weight).__name__ == "Params4bit":
        values = _from_4bit(layer)
    else:
        scales = layer.state.SCB if layer.state.SCB is not None else getattr(layer.weight, "SCB", None)
        if scales is None:
            raise CheckpointError("An 8-bit weight has no scales: its model was not loaded completely.")
        values = weight.to(torch.float32) * (scales.to(weight.device).view(-1, 1) / 127)
    result = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    result.weight = nn.Parameter(values.to(torch.float32).view(layer.out_features, layer.in_features))
    if layer.bias is not None:
        result.bias = nn.Parameter(layer.bias.detach().to(torch.float32, copy=True))
    return result


def _from_4bit(layer: nn.Module) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    packed, state = layer.weight.data, copy.copy(layer.weight.quant_state)
    if state is None:
        raise CheckpointError("A 4-bit weight has no quantisation state: its model was not loaded completely.")
    if getattr(state, "packing_format_for_cpu", False):
        packed, state = _stored(packed, state)
    return dequantize_4bit(packed, state)


def _stored(packed, state):
    """The layout of storage from that into which a forward pass on a CPU with bfloat16 repacks 4-bit weights.

    bitsandbytes 0.50 has an inverse, but it leaves the scales transposed where they were not quantised themselves, and
    quantises them a second time where they were.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

    scales = state.absmax.T.reshape(-1).float().contiguous()
    state.original_nested = False
    packed, state = unpack(packed, state)
    state.absmax, state.nested = scales, False
    return packed, state
