"""auto-round: rounding up or down is learnt by signed gradients. https://huggingface.co/papers/2309.05516"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..model.loading import load_model
from .backend import Backend, Save, device_of
from .calibrating import calibration_rows
from .configuration import QuantizationConfig
from .groups import check_groups
from .source import Source


class AutoRound(Backend):
    """auto-round in its own format, which Transformers loads where auto-round is installed."""

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
