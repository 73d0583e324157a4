"""Which number format training computes in."""

from __future__ import annotations

import torch

from .. import hardware
from ..errors import ConfigurationError


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
