"""Weights of bitsandbytes layers as plain floating point numbers, the ones that their forward pass computes with."""

from __future__ import annotations

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
        from ..quantization.stored_weights import stored_weight

        values = stored_weight(layer.weight)
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
