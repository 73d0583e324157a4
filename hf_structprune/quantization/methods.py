"""The methods that need no more than one class: bitsandbytes, torchao, auto-round; and the list of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from ..model.loading import load_model
from .backend import Backend, Save, Source, calibration_rows, check_groups, device_of, need_accelerator
from .configuration import QuantizationConfig
from .gptq import Awq, Gptq


# What 4-bit kernels of CPUs want: inputs in blocks of weights that share a scale, outputs in rows packed together.
_BLOCK, _PACKED = 64, 32


def _load(source: Source, config: QuantizationConfig, settings: Any) -> PreTrainedModel:
    """The model, rounded by Transformers while it is loaded onto the device."""
    return load_model(
        source.name, dtype=source.shapes.dtype, device_map={"": device_of(config)},
        trust_remote_code=source.trust_remote_code, quantization_config=settings,
    )  # fmt: skip


class BitsAndBytes(Backend):
    """bitsandbytes: nf4 or fp4 in blocks of 64 weights, or int8 with a scale a row.

    https://huggingface.co/papers/2305.14314. The weights are rounded while they are loaded, and saved as they were
    rounded: `load_model` keeps bitsandbytes from repacking them on a CPU.
    """

    packages = libraries = ("bitsandbytes",)
    extra = "bitsandbytes"
    on_device = True

    def group_size(self, config: QuantizationConfig) -> None:
        return None

    def estimate(self, source: Source, config: QuantizationConfig) -> int:
        # A scale (float32) for 64 weights, where scales are not quantised themselves.
        return super().estimate(source, config) + (source.weights // 16 if config.bits == 4 else 0)

    def memory(self, source: Source, config: QuantizationConfig) -> int:
        """Each weight is rounded as soon as it is read: 176 MB at most for 432 MB of SmolLM2, nf4 or int8."""
        largest = max(p.numel() * p.element_size() for p in source.shapes.parameters())
        return self.estimate(source, config) + largest

    def notes(self, source: Source, config: QuantizationConfig) -> list[str]:
        widths = []
        for number, what, multiple in ((1, "inputs", _BLOCK), (0, "outputs", _PACKED)):
            odd = sorted({shape[number] for shape in source.linears.values() if shape[number] % multiple})
            shown = ", ".join([*map(str, odd[:5]), *(["..."] if len(odd) > 5 else [])])
            widths += [f"{shown} {what}, no multiples of {multiple}"] if odd else []
        if config.bits == 8 or not widths:
            return []
        return [
            f"It has layers with {' and '.join(widths)}. bitsandbytes' 4-bit kernels cannot run these on CPUs with "
            "AVX512-BF16 or AMX (an error at first use), and with plain AVX512 they compute wrong numbers if "
            f"{_BLOCK} does not divide the inputs. This package's commands and "
            "`hf_structprune.model.loading.load_model` compute rightly on every CPU, and other devices have no such "
            "limits, nor have 8 bits. "
            f"`PruningConfig(align_to={_BLOCK})` prunes to widths that run everywhere."
        ]

    def run(self, source: Source, config: QuantizationConfig, tokenizer: Any) -> Save:
        settings = {"load_in_8bit": True} if config.bits == 8 else {
            "load_in_4bit": True, "bnb_4bit_quant_type": config.four_bit_type,
            "bnb_4bit_use_double_quant": config.double_quant, "bnb_4bit_compute_dtype": source.shapes.dtype,
        }  # fmt: skip
        return _load(source, config, BitsAndBytesConfig(**settings)).save_pretrained


class TorchAo(Backend):
    """torchao, weight-only: int8 with a scale a row, or int4 in groups. https://huggingface.co/papers/2507.16099

    The weights are rounded while they are loaded, and written as safetensors of their plain parts.
    """

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
        return _load(source, config, TorchAoConfig(kind)).save_pretrained


class AutoRound(Backend):
    """auto-round: rounding up or down is learnt by signed gradients. https://huggingface.co/papers/2309.05516

    In its own format, which Transformers loads where auto-round is installed.
    """

    packages = ("auto_round",)
    libraries = ("auto-round",)
    extra = "auto-round"

    def check(self, source: Source, config: QuantizationConfig) -> None:
        super().check(source, config)
        check_groups(source, config.group_size)

    def run(self, source: Source, config: QuantizationConfig, tokenizer: Any) -> Save:
        from auto_round import AutoRound as Rounding

        rows = calibration_rows(source, config, tokenizer)
        model = load_model(source.name, dtype=source.shapes.dtype, trust_remote_code=source.trust_remote_code)
        rounding = Rounding(
            model, tokenizer, bits=config.bits, group_size=config.group_size, sym=config.sym,
            iters=config.iterations, seed=config.seed, device_map=device_of(config),
            dataset=list(rows.split(config.calibration.batch_size)),
            seqlen=rows.shape[1], nsamples=rows.shape[0], batch_size=config.calibration.batch_size,
        )  # fmt: skip
        rounding.quantize()

        def save(path: Path) -> None:
            rounding.save_quantized(str(path), format="auto_round", inplace=True)

        return save


BACKENDS: dict[str, Backend] = {
    "bitsandbytes": BitsAndBytes(),
    "torchao": TorchAo(),
    "gptq": Gptq(),
    "awq": Awq(),
    "auto-round": AutoRound(),
}
