"""AWQ: weights that meet large inputs are scaled up before all are rounded. https://huggingface.co/papers/2306.00978"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UnsupportedModelError
from .backend import device_of
from .configuration import QuantizationConfig
from .gptq import GptqModelBackend
from .source import Source


# GPTQModel searches for the best clipping of so many outputs at once.
_OUTPUTS = 64


class Awq(GptqModelBackend):
    """AWQ through GPTQModel."""

    extra = "awq"

    def check(self, source: Source, config: QuantizationConfig) -> None:
        super().check(source, config)
        for name, (rows, _) in source.linears.items():
            if rows % _OUTPUTS:
                raise UnsupportedModelError(
                    f"{name} has {rows} outputs, and AWQ takes {_OUTPUTS} at once: prune to widths that are multiples "
                    f"of {_OUTPUTS}, or choose gptq."
                )

    def dtype(self, source: Source) -> torch.dtype:
        # The kernels of AWQ compute in 16 bits only.
        return torch.float16 if source.shapes.dtype == torch.float32 else source.shapes.dtype

    def settings(self, config: QuantizationConfig) -> dict[str, Any]:
        return {**super().settings(config), "quant_method": "awq", "format": "gemm"}

    def kernel(self, config: QuantizationConfig) -> str:
        return "auto" if device_of(config).startswith("cuda") else "awq_torch"
