"""Which number format training computes in."""

from __future__ import annotations

import torch

from ..errors import ConfigurationError


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_precision(precision: str) -> str:
    """`"bf16"`, `"fp16"` or `"fp32"`; `"auto"` is bf16 where the hardware multiplies matrices in it, else fp32.

    A CPU without bfloat16 instructions computes in it too, several times slower than in float32.

    Raises:
        ConfigurationError: float16 without an accelerator: its gradients underflow and CPUs are slow in it.
    """
    accelerator = torch.accelerator.is_available()
    if precision == "fp16" and not accelerator:
        raise ConfigurationError("`precision` is 'fp16', which needs an accelerator; choose 'fp32' or 'bf16'.")
    if precision != "auto":
        return precision
    return "bf16" if (_accelerator_has_bf16() if accelerator else _cpu_has_bf16()) else "fp32"


def _accelerator_has_bf16() -> bool:
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_has_bf16() -> bool:
    cpu = torch.cpu
    return any(getattr(cpu, f"_is_{name}_supported", lambda: False)() for name in ("amx_tile", "avx512_bf16"))
