"""`hf-structprune quantize DIR --method gptq --bits 4 --output-dir OUT`: a model in fewer bits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..errors import ConfigurationError
from ..quantization.configuration import QuantizationConfig
from .arguments import parse
from .common import check_output_dir, results_only_on_stdout, show, speaking


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


def run(argv: Sequence[str]) -> None:
    """Quantises, saves and says how much smaller it is."""
    description = "Quantise a model, pruned or not, and save a checkpoint that from_pretrained loads."
    command, config = parse(argv, "quantize", description, QuantizeArguments, QuantizationConfig)
    if command.output_dir is None:
        raise ConfigurationError("--output-dir is missing.")
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
    what = f"{report['method']}, {report['bits']} bits" + ("" if group is None else f", groups of {group}")
    table = Table(title=what)
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="right" if name else "left")
    before, after = weights["bytes_before"], weights["bytes"]
    table.add_row("weights", f"{before / 1e6:.1f} MB", f"{after / 1e6:.1f} MB", f"{after / before - 1:+.1%}")
    table.add_row("parameters", *[f"{weights['parameters']:,}"] * 2, "")
    return table
