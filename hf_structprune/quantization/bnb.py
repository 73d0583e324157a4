"""bitsandbytes: nf4 or fp4 in blocks of 64 weights, or int8 with a scale a row. https://huggingface.co/papers/2305.14314"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ..loading import load_model
from .backend import Backend, Save, device_of
from .configuration import QuantizationConfig
from .source import Source


# A CPU with bfloat16 instructions repacks 4-bit weights for its kernels, in rows of so many.
_PACKED = 32


class BitsAndBytes(Backend):
    """The weights are rounded while they are loaded.

    They are saved before any forward pass: on a CPU with bfloat16 instructions bitsandbytes repacks 4-bit weights in
    place when they are first used, and `save_pretrained` would write those in a layout that nothing reads.
    """

    packages = libraries = ("bitsandbytes",)
    extra = "bitsandbytes"
    on_device = True

    def group_size(self, config: QuantizationConfig) -> None:
        return None

    def estimate(self, source: Source, config: QuantizationConfig) -> int:
        # A scale (float32) for 64 weights, where scales are not quantised themselves.
        weights = sum(rows * columns for rows, columns in source.linears.values())
        return super().estimate(source, config) + (weights // 16 if config.bits == 4 else 0)

    def memory(self, source: Source, config: QuantizationConfig) -> int:
        """Each weight is rounded as soon as it is read: 176 MB at most for 432 MB of SmolLM2, nf4 or int8."""
        largest = max(p.numel() * p.element_size() for p in source.shapes.parameters())
        return self.estimate(source, config) + largest

    def notes(self, source: Source, config: QuantizationConfig) -> list[str]:
        odd = {columns for _, columns in source.linears.values() if columns % _PACKED}
        if config.bits == 8 or not odd:
            return []
        widths = ", ".join(map(str, sorted(odd)))
        return [
            f"Layers with {widths} inputs, no multiples of {_PACKED}: bitsandbytes' fast kernel of CPUs with AVX512 "
            "and bfloat16 refuses these; load it in float32 there. Other devices do not mind."
        ]

    def run(self, source: Source, config: QuantizationConfig, tokenizer: Any) -> Save:
        model = load_model(
            source.name, dtype=source.shapes.dtype, device_map={"": device_of(config)},
            trust_remote_code=source.trust_remote_code,
            quantization_config=_settings(config, source.shapes.dtype),
        )  # fmt: skip
        return model.save_pretrained


def _settings(config: QuantizationConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    if config.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=config.four_bit_type, bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
