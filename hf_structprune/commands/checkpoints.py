"""`hf-structprune recover`, `quantize`, `export`, `card` and `push`: what is done with a checkpoint after pruning."""

from __future__ import annotations

import importlib
import inspect
import math
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from ..errors import ConfigurationError, HubError
from ..export.common import Exported
from ..hub import push_folder, validate_card, write_card
from ..hub.card import is_ours
from ..hub.contents import CARD_NAME, read_text
from ..hub.pictures import draw_pictures
from ..installed import is_installed
from ..quantization.configuration import QuantizationConfig
from ..quantization.quantizing import quantize
from ..recovery.configuration import DistillationConfig, RecoveryConfig
from ..recovery.recovering import recover
from .arguments import command
from .cli import check_output, make_table
from .options import CardArguments, ExportArguments, PushArguments, QuantizeArguments, RecoverArguments


@command
def recover_command(
    options: RecoverArguments, config: RecoveryConfig, distillation: DistillationConfig
) -> tuple[Any, ...]:
    """Train a pruned model to get its quality back: LoRA, QLoRA, all weights or distillation."""
    if not options.dataset and config.method != "distill":
        raise ConfigurationError("--dataset is missing: a file, a folder or a data set of the Hub to train on.")
    if options.output_dir is None:
        raise ConfigurationError("--output-dir is missing.")
    try:  # its perplexity, if that is a number
        dense = None if options.dense is None else float(options.dense)
    except ValueError:
        dense = options.dense
    result = recover(
        options.model, list(options.dataset) if options.dataset else None, options.output_dir, config,
        split=options.split, dense=dense, teacher=options.teacher, distillation=distillation,
        resume=options.resume, overwrite=options.overwrite, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    data = {"model": options.model, "output_dir": options.output_dir, **result.report}
    return data, _curve_table(result.report), f"Saved to {options.output_dir}"


def _curve_table(report: dict[str, Any]) -> Table:
    """The curve of a recovery, a row a measurement."""
    curve = report["curve"]
    dense, pruned = curve["dense"], curve["pruned"]
    rows = [] if dense is None else [("dense", f"{math.exp(dense):.2f}", "")]
    rows.append(("pruned", f"{math.exp(pruned):.2f}", "" if dense is None else "0.0%"))
    for point in curve["points"]:
        value = point["log_perplexity"]
        back = "" if dense is None or pruned <= dense else f"{(pruned - value) / (pruned - dense):.1%}"
        mark = " (kept)" if point["step"] == report["best_step"] else ""
        rows.append((f"{point['step']}{mark}", f"{math.exp(value):.2f}", back))
    return make_table("Perplexity of text that was not trained on", ("step", "perplexity", "back"), rows, left=())


@command
def quantize_command(options: QuantizeArguments, config: QuantizationConfig) -> tuple[Any, ...]:
    """Quantise a model, pruned or not, and save a checkpoint that from_pretrained loads."""
    check_output(options.output_dir, options.overwrite)
    started, switches = time.monotonic(), {name: getattr(options, name) for name in ("overwrite", "trust_remote_code")}
    result = quantize(options.model, options.output_dir, config, **switches)
    seconds = round(time.monotonic() - started, 1)
    data = {**result.report, "model": options.model, "output_dir": options.output_dir, "seconds": seconds}
    # Its notes were said before the work, on stderr.
    return data, _sizes_table(result.report), f"Saved to {options.output_dir} after {seconds} s."


def _sizes_table(report: dict[str, Any]) -> Table:
    """Bytes of the weights before and after."""
    group, weights = report["group_size"], report["weights"]
    title = f"{report['method']}, {report['bits']} bits" + ("" if group is None else f", groups of {group}")
    before, after = weights["bytes_before"], weights["bytes"]
    rows = [
        ("weights", f"{before / 1e6:.1f} MB", f"{after / 1e6:.1f} MB", f"{after / before - 1:+.1%}"),
        ("parameters", *[f"{weights['parameters']:,}"] * 2, ""),
    ]
    return make_table(title, ("", "before", "after", "change"), rows, left=("",))


@command
def export_command(options: ExportArguments) -> tuple[Any, ...]:
    """Write MODEL in the format of another runtime."""
    if options.format is None:
        raise ConfigurationError("--format is missing.")
    check_output(options.output, options.overwrite, file=True, folders=True)
    module = importlib.import_module(f"..export.{options.format}", __package__)
    function = getattr(module, f"export_{options.format}")
    names = ("quant", "dtype", "pad", "stream", "trust_remote_code")
    given = {name: getattr(options, name) for name in names if getattr(options, name)}
    for name in given.keys() - inspect.signature(function).parameters:
        raise ConfigurationError(f"--{name.replace('_', '-')} is no option of --format {options.format}.")
    result: Exported = function(options.model, options.output, **given)
    data = {
        "model": options.model, "format": options.format, "output": str(result.path), "bytes": result.size,
        **result.details, "notes": result.notes,
    }  # fmt: skip
    return data, f"Wrote {result.path}, {result.size / 1e6:.1f} MB.", *result.notes


@command
def card_command(options: CardArguments) -> tuple[Any, ...]:
    """Write the model card of the checkpoint in DIR, with pictures if matplotlib is there. Marked texts are kept."""
    folder, card = options.folder, read_text(Path(options.folder) / CARD_NAME)
    if is_installed("matplotlib") and (options.overwrite or not card.strip() or is_ours(card)):
        draw_pictures(folder)
    path = write_card(folder, name=options.name, base_model=options.base_model, overwrite=options.overwrite)
    if path is None:
        raise HubError(f"The README.md in {folder} was not written by hf_structprune; say --overwrite to replace it.")
    asked = validate_card(path)
    how = "The Hub finds its metadata valid." if asked else "Its metadata was checked here; the Hub was not asked."
    return {"card": str(path), "checked_by_hub": asked}, f"Wrote {path}. {how}"


@command
def push_command(options: PushArguments) -> tuple[Any, ...]:
    """Push the checkpoint in DIR to the Hub."""
    chosen = {name: getattr(options, name) for name in ("revision", "create_pr", "commit_message")}
    commit = push_folder(options.folder, options.repo_id, private=options.private or None, **chosen)
    data = {"repo_id": commit.repo_url.repo_id, **{n: getattr(commit, n) for n in ("commit_url", "oid", "pr_url")}}
    return data, f"Pushed to {commit.repo_url}: {commit.pr_url or commit.commit_url}"
