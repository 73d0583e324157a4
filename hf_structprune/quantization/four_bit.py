"""Makes 4-bit layers of bitsandbytes compute, on every CPU, with the weights that are stored.

bitsandbytes 0.50 has two kernels that do not, and picks them by instruction set:

* With AVX512, `dequantize_4bit` counts the scales of a row from `row * (inputs // 64)`. Blocks of 64 weights go over
  the ends of rows whose length 64 does not divide, so that such rows get scales of other weights.
* With AVX512-BF16, the first forward pass in eval mode repacks the weights in place. That stops at inputs that 64 does
  not divide and at outputs that 32 does not divide, rounds scales to bfloat16, computes in bfloat16 whatever was asked
  for, has no gradients, and what is saved afterwards has other scales.

Here weights are read as the rows of 64 in which they were rounded, and are never repacked: every CPU gives the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError


def compute_as_stored(model: nn.Module) -> list[nn.Module]:
    """Makes 4-bit layers compute with their stored weights on a CPU; on other devices nothing changes.

    Returns:
        The layers that computed otherwise before.
    """
    # PEFT's layer around one of bitsandbytes has the same name.
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and "bitsandbytes." in type(m).__module__]
    for layer in layers:
        layer.__class__ = _stored_class(type(layer))
    return layers


@contextmanager
def as_stored(model: nn.Module) -> Iterator[None]:
    """The same for a while; afterwards the layers are bitsandbytes' own again, and their weights as they were."""
    layers = compute_as_stored(model)
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = type(layer).__base__


@cache
def _stored_class(linear: type[nn.Module]) -> type[nn.Module]:
    """bitsandbytes' class of layers, which is imported only where there are some, with another forward pass."""

    class StoredLinear4bit(linear):
        """A layer of bitsandbytes, saved, moved and adapted as one, that computes with `stored_weight` on a CPU."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.device.type != "cpu":
                return super().forward(x)
            if not self.compute_type_is_set:
                self.set_compute_type(x)
                self.compute_type_is_set = True
            dtype = self.compute_dtype or x.dtype
            output = _Product.apply(x.to(dtype), self.weight)
            if self.bias is not None:
                output = output + self.bias.to(output.dtype)
            return output.to(x.dtype)

    return StoredLinear4bit


class _Product(torch.autograd.Function):
    """`x W^T`. The weight is read again for the backward pass, so that only 4 bits of it are kept."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return nn.functional.linear(x, stored_weight(weight, x.dtype))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (gradient @ stored_weight(ctx.weight, gradient.dtype)).to(ctx.dtype), None


def stored_weight(weight: nn.Parameter, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The numbers that a 4-bit weight stands for, shape `(outputs, inputs)`; the weight is not changed.

    Args:
        weight: Of a layer of bitsandbytes, also one that a forward pass has repacked.
        dtype: Of the result. Default: that of the weight before it was quantised.

    Raises:
        CheckpointError: The weight has not been quantised yet, as before its model was moved to a device.
    """
    from bitsandbytes.functional import dequantize_4bit

    packed, state = weight.data, copy.copy(weight.quant_state)
    if state is None:
        raise CheckpointError("A 4-bit weight has no quantisation state: its model was not loaded completely.")
    if getattr(state, "packing_format_for_cpu", False):
        packed, state = _unpacked(packed, state)
    size, shape = math.prod(state.shape), state.shape
    state.shape = torch.Size((size // state.blocksize, state.blocksize) if size % state.blocksize == 0 else (1, size))
    state.dtype = dtype or state.dtype
    return dequantize_4bit(packed.reshape(-1, 1), state).reshape(shape)


def _unpacked(packed: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """The layout of storage from that into which bitsandbytes repacks.

    Its own inverse leaves the scales transposed where they were not quantised themselves, and quantises them a second
    time where they were.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales = state.absmax.T.reshape(-1).float().contiguous()
    state.original_nested = False
    packed, state = _convert_weight_packed_for_cpu_inverse(packed, state)
    state.absmax, state.nested = scales, False
    return packed, state
