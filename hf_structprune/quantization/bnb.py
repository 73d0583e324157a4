"""bitsandbytes: nf4 or fp4 in blocks of 64 weights, or int8 with a scale a row. https://huggingface.co/papers/2305.14314"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from ..model.loading import load_model
from .backend import Backend, Save, device_of
from .configuration import QuantizationConfig
from .source import Source


# What 4-bit kernels of CPUs want: inputs in blocks of weights that share a scale, outputs in rows packed together.
_BLOCK, _PACKED = 64, 32
_SHOWN = 5


class BitsAndBytes(Backend):
    """The weights are rounded while they are loaded.

    They are saved as they were rounded: `load_model` keeps bitsandbytes from repacking them on a CPU.
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
        inputs = sorted({columns for _, columns in source.linears.values() if columns % _BLOCK})
        outputs = sorted({rows for rows, _ in source.linears.values() if rows % _PACKED})
        if config.bits == 8 or not inputs + outputs:
            return []
        widths = [f"{_listed(inputs)} inputs, no multiples of {_BLOCK}"] if inputs else []
        widths += [f"{_listed(outputs)} outputs, no multiples of {_PACKED}"] if outputs else []
        return [
            f"It has layers with {' and '.join(widths)}. bitsandbytes' 4-bit kernels cannot run these on CPUs with "
            "AVX512-BF16 or AMX (an error at first use), and with plain AVX512 they compute wrong numbers if "
            f"{_BLOCK} does not divide the inputs. This package's commands and "
            "`hf_structprune.model.loading.load_model` compute rightly on every CPU, and other devices have no such "
            "limits, nor have 8 bits. "
            f"`PruningConfig(align_to={_BLOCK})` prunes to widths that run everywhere."
        ]

    def run(self, source: Source, config: QuantizationConfig, tokenizer: Any) -> Save:
        model = load_model(
            source.name, dtype=source.shapes.dtype, device_map={"": device_of(config)},
            trust_remote_code=source.trust_remote_code,
            quantization_config=_settings(config, source.shapes.dtype),
        )  # fmt: skip
        return model.save_pretrained


def _listed(widths: list[int]) -> str:
    return ", ".join(map(str, widths[:_SHOWN])) + (", ..." if len(widths) > _SHOWN else "")


def _settings(config: QuantizationConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    if config.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=config.four_bit_type, bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
