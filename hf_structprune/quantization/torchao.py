"""torchao, weight-only: int8 with a scale a row, or int4 in groups. https://huggingface.co/papers/2507.16099"""

from __future__ import annotations

from typing import Any

from transformers import TorchAoConfig

from ..model.loading import load_model
from .backend import Backend, Save, device_of, need_accelerator
from .configuration import QuantizationConfig
from .groups import check_groups
from .source import Source


class TorchAo(Backend):
    """The weights are rounded while they are loaded, and written as safetensors of their plain parts."""

    packages = libraries = ("torchao",)
    extra = "torchao"
    on_device = True

    def check(self, source: Source, config: QuantizationConfig) -> None:
        super().check(source, config)
        if config.bits == 4:
            need_accelerator(config, "torchao with 4 bits", "set `bits=8`, or choose bitsandbytes, which has 4 bits")
            check_groups(source, config.group_size, whole_row=False)

    def group_size(self, config: QuantizationConfig) -> int | None:
        return config.group_size if config.bits == 4 else None

    def run(self, source: Source, config: QuantizationConfig, tokenizer: Any) -> Save:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

        kind = Int8WeightOnlyConfig() if config.bits == 8 else Int4WeightOnlyConfig(group_size=config.group_size)
        model = load_model(
            source.name, dtype=source.shapes.dtype, device_map={"": device_of(config)},
            trust_remote_code=source.trust_remote_code, quantization_config=TorchAoConfig(kind),
        )  # fmt: skip
        return model.save_pretrained
