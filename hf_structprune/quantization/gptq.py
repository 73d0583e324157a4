"""GPTQ and AWQ, both through GPTQModel."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..errors import UnsupportedModelError
from ..files.reading import read_json_object
from ..files.writing import write_text
from .backend import Backend, Save, Source, calibration_rows, check_groups, device_of
from .configuration import QuantizationConfig


# Weights are packed into words of so many bits, along the inputs and, for zero points, along the outputs.
_WORD = 32
# GPTQModel searches for the best clipping of so many outputs at once (AWQ).
_OUTPUTS = 64


class GptqModelBackend(Backend):
    """What both methods of GPTQModel share. Transformers loads the result through Optimum and GPTQModel."""

    # Our own wheel puts a folder `optimum` there: only what is in it tells whether Optimum is installed.
    packages, libraries = ("gptqmodel", "optimum.gptq"), ("gptqmodel", "optimum")
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
                "bitsandbytes or torchao, or prune with `layout='uniform'`."
            )

    def settings(self, config: QuantizationConfig) -> dict[str, Any]:
        """Arguments of GPTQModel's `QuantizeConfig`."""
        return {"bits": config.bits, "group_size": config.group_size, "sym": config.sym}

    def kernel(self, config: QuantizationConfig) -> str:
        """The kernel that packs the weights, by GPTQModel's name."""
        return "auto"

    def dtype(self, source: Source) -> torch.dtype:
        """The dtype of what is not quantised."""
        return source.shapes.dtype

    def run(self, source: Source, config: QuantizationConfig, tokenizer: Any) -> Save:
        if (os.cpu_count() or 1) < 4:  # GPTQModel 7.6 starts half as many threads as cores and fails with one
            os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

        rows = calibration_rows(source, config, tokenizer)
        model = GPTQModel.load(
            source.name, QuantizeConfig(**self.settings(config), device=device_of(config)),
            trust_remote_code=source.trust_remote_code, dtype=self.dtype(source),
        )  # fmt: skip
        with _logs_elsewhere():
            model.quantize(
                [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows.tolist()],
                batch_size=config.calibration.batch_size, tokenizer=copy.deepcopy(tokenizer),
                backend=BACKEND(self.kernel(config)),
            )  # fmt: skip

        def save(path: Path) -> None:
            model.save(str(path))
            _restore(path, source, self.dtype(source))

        return save


def _restore(path: Path, source: Source, dtype: torch.dtype) -> None:
    """Puts back what GPTQModel changes: it sets a padding token, and names a temporary folder of this machine."""
    config = copy.deepcopy(source.shapes.config)
    config.dtype = dtype
    config.quantization_config = _without_paths(read_json_object(path / "config.json")["quantization_config"])
    config.save_pretrained(path)
    file = path / "quantize_config.json"
    if file.is_file():
        write_text(file, json.dumps(_without_paths(read_json_object(file)), indent=2) + "\n")
    try:
        GenerationConfig.from_pretrained(source.name).save_pretrained(path)
    except OSError:  # the model has none, and Transformers makes one from its configuration
        (path / "generation_config.json").unlink(missing_ok=True)


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    meta = {key: value for key, value in settings.get("meta", {}).items() if not key.endswith("_path")}
    return {**settings, "meta": meta}


@contextlib.contextmanager
def _logs_elsewhere() -> Iterator[None]:
    """GPTQModel 7.6 writes a folder `logs` where the user happens to be, and has no option against it."""
    from gptqmodel.looper import loop_processor

    before = getattr(loop_processor, "_PROJECT_LOG_DIR", None)
    with tempfile.TemporaryDirectory() as folder:
        loop_processor._PROJECT_LOG_DIR = Path(folder)
        try:
            yield
        finally:
            loop_processor._PROJECT_LOG_DIR = before


class Gptq(GptqModelBackend):
    """GPTQ, on a CPU too: columns are rounded one after the other, and later ones make up for it.

    https://huggingface.co/papers/2210.17323
    """

    def settings(self, config: QuantizationConfig) -> dict[str, Any]:
        return {**super().settings(config), "quant_method": "gptq", "desc_act": config.desc_act}


class Awq(GptqModelBackend):
    """AWQ: weights that meet large inputs are scaled up before all are rounded.

    https://huggingface.co/papers/2306.00978
    """

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
