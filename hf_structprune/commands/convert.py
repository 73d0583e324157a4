"""`hf-structprune quantize` and `export`: a model in fewer bits, or in the format of another runtime."""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..checks import OneOf
from ..errors import ConfigurationError
from ..quantization.configuration import QuantizationConfig
from .arguments import parse
from .cli import check_output_dir, make_table, results_only_on_stdout, show, speaking


if TYPE_CHECKING:
    from rich.table import Table

    from ..export.common import Exported


@dataclass
class QuantizeArguments:
    """Options of `quantize`.

    Args:
        model (`str`): What is quantised: a folder, or an id of the Hub.
        output_dir (`str`): Folder for the quantised checkpoint.
        overwrite (`bool`): Write to the folder even if it is not empty.
        trust_remote_code (`bool`): Run modelling code that comes with the model.
        json (`bool`): Print one JSON object and nothing else on stdout.
    """

    model: str
    output_dir: str | None = None
    overwrite: bool = False
    trust_remote_code: bool = False
    json: bool = False


def quantize_command(argv: Sequence[str]) -> None:
    """Quantises, saves and says how much smaller it is."""
    description = "Quantise a model, pruned or not, and save a checkpoint that from_pretrained loads."
    command, config = parse(argv, "quantize", description, QuantizeArguments, QuantizationConfig)
    check_output_dir(command.output_dir, command.overwrite)
    from ..quantization.quantizing import quantize

    started = time.monotonic()
    with results_only_on_stdout(), speaking():
        result = quantize(
            command.model, command.output_dir, config,
            overwrite=command.overwrite, trust_remote_code=command.trust_remote_code,
        )  # fmt: skip
    seconds = round(time.monotonic() - started, 1)
    data = {**result.report, "model": command.model, "output_dir": command.output_dir, "seconds": seconds}
    lines = [*result.report["notes"], f"Saved to {command.output_dir} after {seconds} s."]
    show(command.json, data, sizes_table(result.report), *lines)


def sizes_table(report: dict[str, Any]) -> Table:
    """Bytes of the weights before and after."""
    group, weights = report["group_size"], report["weights"]
    title = f"{report['method']}, {report['bits']} bits" + ("" if group is None else f", groups of {group}")
    before, after = weights["bytes_before"], weights["bytes"]
    rows = [
        ("weights", f"{before / 1e6:.1f} MB", f"{after / 1e6:.1f} MB", f"{after / before - 1:+.1%}"),
        ("parameters", *[f"{weights['parameters']:,}"] * 2, ""),
    ]
    return make_table(title, ("", "before", "after", "change"), rows, left=("",))


# Each format's module and function: `function(model, output, *, <options>) -> Exported`. Its keyword arguments are
# the options below that the format takes; those that were not given keep the function's own defaults.
FORMATS = {
    "gguf": ("hf_structprune.export.gguf", "export_gguf"),
    "onnx": ("hf_structprune.export.onnx", "export_onnx"),
    "deci": ("hf_structprune.export.deci", "export_deci"),
}
_OF_THE_COMMAND = ("model", "format", "output", "overwrite", "json")


@dataclass
class ExportArguments:
    """Options of `export`.

    Args:
        model (`str`): The checkpoint: a folder, or an id of the Hub.
        format (`str`): `gguf` (llama.cpp), `onnx` (ONNX Runtime), or `deci` (vLLM, layers that are not alike).
        output (`str`): File or folder to write; what a format needs is said by its error.
        overwrite (`bool`): Replace what is there.
        quant (`str`, *optional*): gguf: type of the weights, such as f16, bf16, f32, q8_0, q4_k_m. Default: f16.
        dtype (`str`, *optional*): onnx: fp32 or fp16, of weights and arithmetic. Default: fp32.
        pad (`bool`): deci: add heads and neurons of zeros where a layer does not fit the format.
        trust_remote_code (`bool`): Run modelling code that comes with the model.
        json (`bool`): Print one JSON object and nothing else on stdout.
    """

    model: str
    format: Annotated[str, OneOf(tuple(FORMATS))] | None = None
    output: str | None = None
    overwrite: bool = False
    quant: str | None = None
    dtype: str | None = None
    pad: bool = False
    trust_remote_code: bool = False
    json: bool = False


def export_command(argv: Sequence[str]) -> None:
    """Exports and says what came out."""
    (command,) = parse(argv, "export", "Write MODEL in the format of another runtime.", ExportArguments)
    _check(command)
    module, name = FORMATS[command.format]
    with results_only_on_stdout(), speaking():
        function = getattr(importlib.import_module(module), name)
        result: Exported = function(command.model, command.output, **_options(command, function))
    data = {
        "model": command.model, "format": command.format, "output": str(result.path), "bytes": result.size,
        **result.details, "notes": result.notes,
    }  # fmt: skip
    show(command.json, data, f"Wrote {result.path}, {result.size / 1e6:.1f} MB.", *result.notes)


def _check(command: ExportArguments) -> None:
    for name in ("format", "output"):
        if getattr(command, name) is None:
            raise ConfigurationError(f"--{name} is missing.")
    path = Path(command.output)
    if (path.is_file() or (path.is_dir() and any(path.iterdir()))) and not command.overwrite:
        raise ConfigurationError(f"{path} exists; choose another --output or say --overwrite.")


def _options(command: ExportArguments, function: Callable) -> dict[str, Any]:
    """The options that were given, as keyword arguments of a format's function; refuses those of other formats."""
    given = {
        field.name: getattr(command, field.name)
        for field in fields(command)
        if field.name not in _OF_THE_COMMAND and getattr(command, field.name) != field.default
    }
    known = inspect.signature(function).parameters
    for name in given:
        if name not in known:
            raise ConfigurationError(f"--{name.replace('_', '-')} is no option of --format {command.format}.")
    return given
