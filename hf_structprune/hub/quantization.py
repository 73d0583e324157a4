"""The section "Quantised" of a model card: what `quantization.json` says, in words."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..quantization.configuration import QuantizationConfig
from ..text.calibration_config import CalibrationConfig
from .metadata import calibration_in_words
from .origin import LIBRARIES
from .reports import read_versioned
from .snippets import changed_options


QUANTIZATION_NAME = "quantization.json"
SCHEMA_VERSION = 1
_CALIBRATED = ("gptq", "awq", "auto-round")
BEGIN, END = "<!-- quantisation, by hf_structprune -->", "<!-- end of quantisation -->"


def read_quantization(folder: Path) -> dict[str, Any] | None:
    """The `quantization.json` of a folder; `None` where there is none.

    Raises:
        CheckpointError: It cannot be read, or is of another version.
    """
    return read_versioned(folder / QUANTIZATION_NAME, SCHEMA_VERSION)


def card_section(report: dict[str, Any]) -> str:
    """The section "Quantised" in Markdown, between two comments by which it can be found and replaced.

    Args:
        report: The content of `quantization.json`.
    """
    lines = [f"* {name}: {text}" for name, text in _facts(report) if text]
    lines += [f"* {note}" for note in report.get("notes") or []]
    parts = [BEGIN, "## Quantised", _sizes(report), "\n".join(lines)]
    return "\n\n".join([*(part for part in parts if part), f"```bash\n{quantize_command(report)}\n```", END])


def summary(report: dict[str, Any]) -> str:
    """The same in one sentence."""
    return f"Its weights were then quantised to {report['bits']} bits with {report['method']}, see Quantised."


def quantize_command(report: dict[str, Any]) -> str:
    """The command that does the same again."""
    config = QuantizationConfig.from_dict(report["configuration"])
    words = ["hf-structprune", "quantize", report.get("model") or "MODEL", "--output-dir", "quantised"]
    words += ["--method", config.method] if config.method == QuantizationConfig().method else []
    return shlex.join(words + changed_options(config))


def calibration_of(report: dict[str, Any]) -> CalibrationConfig | None:
    """The text that the values were chosen on; `None` for methods that round to the nearest."""
    config = QuantizationConfig.from_dict(report["configuration"])
    return config.calibration if config.method in _CALIBRATED else None


def libraries(report: dict[str, Any]) -> list[str]:
    """The libraries besides Transformers that quantised it and read it."""
    return [name for name in report.get("versions") or {} if name not in ("hf_structprune", *LIBRARIES)]


def _sizes(report: dict[str, Any]) -> str:
    """`"The weights take 155.1 MB; they took 431.9 MB before."`"""
    weights = report.get("weights") or {}
    after, before = weights.get("bytes"), weights.get("bytes_before")
    if not after:
        return ""
    text = f"The weights take {after / 1e6:,.1f} MB"
    return text + (f", {after / before:.0%} of the {before / 1e6:,.1f} MB before." if before else ".")


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    versions, text = report.get("versions") or {}, calibration_of(report)
    return [
        ("Method", _method(report)),
        ("Calibration", "none" if text is None else calibration_in_words(text)),
        ("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
    ]


def _method(report: dict[str, Any]) -> str:
    """`"bitsandbytes, 4 bits, nf4"`, `"gptq, 3 bits, groups of 128 weights"`."""
    config, group = QuantizationConfig.from_dict(report["configuration"]), report.get("group_size")
    words = [config.method, f"{config.bits} bits"]
    if config.method == "bitsandbytes" and config.bits == 4:
        words += [config.four_bit_type, *(["scales quantised too"] if config.double_quant else [])]
    if group:
        words.append("a scale for each row" if group == -1 else f"groups of {group} weights")
    return ", ".join(words)
