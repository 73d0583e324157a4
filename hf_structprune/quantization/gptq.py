"""GPTQ: columns are rounded one after the other, later ones make up for it. https://huggingface.co/papers/2210.17323"""

from __future__ import annotations

import os
from typing import Any

from ..errors import UnsupportedModelError
from .backend import Backend, Save, device_of
from .calibrating import calibration_rows
from .configuration import QuantizationConfig
from .groups import check_groups
from .source import Source


# Weights are packed into words of so many bits, along the inputs and, for zero points, along the outputs.
_WORD = 32


class GptqModelBackend(Backend):
    """What both methods of GPTQModel share. Transformers loads the result through Optimum and GPTQModel."""

    packages = libraries = ("gptqmodel", "optimum")
    extra = "gptq"

    def check(self, source: Source, config: QuantizationConfig) -> None:
        super().check(source, config)
        check_groups(source, config.group_size)
        for name, shape in source.linears.items():
            if any(width % _WORD for width in shape):
                raise UnsupportedModelError(
                    f"{name} has {shape[0]} outputs and {shape[1]} inputs; GPTQModel packs weights where both are "
                    f"multiples of {_WORD}: choose bitsandbytes, or prune with `PruningConfig(align_to={_WORD})`."
                )
        if source.per_layer:
            raise UnsupportedModelError(
                f"{source.name} has layers of different widths, which GPTQModel builds all alike: quantise it with "
                "bitsandbytes, torchao or auto-round, or prune with `layout='uniform'`."
            )

    def settings(self, config: QuantizationConfig) -> dict[str, Any]:
        """Arguments of GPTQModel's `QuantizeConfig`."""
        return {"bits": config.bits, "group_size": config.group_size, "sym": config.sym}

    def kernel(self, config: QuantizationConfig) -> str:
        """The kernel that packs the weights, by GPTQModel's name."""
        return "auto"

    def run(self, source: Source, config: QuantizationConfig, tokenizer: Any) -> Save:
        _enough_workers()
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

        rows = calibration_rows(source, config, tokenizer)
        model = GPTQModel.load(
            source.name, QuantizeConfig(**self.settings(config), device=device_of(config)),
            trust_remote_code=source.trust_remote_code, dtype=source.shapes.dtype,
        )  # fmt: skip
        model.quantize(
            [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows.tolist()],
            batch_size=config.calibration.batch_size, tokenizer=tokenizer, backend=BACKEND(self.kernel(config)),
        )  # fmt: skip
        return lambda path: model.save(str(path))


def _enough_workers() -> None:
    """GPTQModel 7.6 starts half as many threads as there are cores and wants two: with two cores that fails."""
    if (os.cpu_count() or 1) < 4:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


class Gptq(GptqModelBackend):
    """GPTQ through GPTQModel, on a CPU too."""

    def settings(self, config: QuantizationConfig) -> dict[str, Any]:
        return {**super().settings(config), "quant_method": "gptq", "desc_act": config.desc_act}
