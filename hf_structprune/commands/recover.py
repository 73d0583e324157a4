"""`hf-structprune recover DIR --dataset DATA --output-dir OUT`: trains a pruned model to get its quality back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..recovery.configuration import DistillationConfig, RecoveryConfig
from .arguments import parse
from .cli import make_table, results_only_on_stdout, show, speaking


if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class RecoverArguments:
    """Options of `recover`.

    Args:
        model (`str`): The pruned checkpoint: a folder, or an id of the Hub.
        dataset (list of `str`): Data to train on: chats, instructions or plain text, from a .jsonl, .json or .txt
            file, a folder or a data set of the Hub. Several are mixed.
        split (`str`): Split of data sets that have several.
        output_dir (`str`): Folder for the recovered checkpoint.
        dense (`str`, *optional*): The model before pruning, to tell which share of the loss is back: a model, or its
            perplexity on the watched text. Default: the teacher, if there is one.
        teacher (`str`, *optional*): What `--method distill` learns from. Default: the model that was pruned.
        resume (`bool`): Go on from the last checkpoint of an interrupted training.
        overwrite (`bool`): Replace what is in the folder, and start an interrupted training anew.
        trust_remote_code (`bool`): Run modelling code that comes with the models.
        json (`bool`): Print one JSON object and nothing else on stdout.
    """

    model: str
    dataset: Sequence[str] | None = None
    split: str = "train"
    output_dir: str | None = None
    dense: str | None = None
    teacher: str | None = None
    resume: bool = False
    overwrite: bool = False
    trust_remote_code: bool = False
    json: bool = False


def recover_command(argv: Sequence[str]) -> None:
    """Trains, saves and says how much came back."""
    description = "Train a pruned model to get its quality back: LoRA, QLoRA, all weights or distillation."
    command, config, distillation = parse(
        argv, "recover", description, RecoverArguments, RecoveryConfig, DistillationConfig
    )
    if not command.model:
        raise ConfigurationError("MODEL is missing: the folder of a pruned checkpoint.")
    if not command.dataset:
        raise ConfigurationError("--dataset is missing: a file, a folder or a data set of the Hub to train on.")
    if command.output_dir is None:
        raise ConfigurationError("--output-dir is missing.")
    from ..recovery.recovering import recover

    with results_only_on_stdout(), speaking():
        result = recover(
            command.model, list(command.dataset), command.output_dir, config,
            split=command.split, dense=_dense(command.dense), teacher=command.teacher, distillation=distillation,
            resume=command.resume, overwrite=command.overwrite, trust_remote_code=command.trust_remote_code,
        )  # fmt: skip
    data = {"model": command.model, "output_dir": command.output_dir, **result.report}
    show(command.json, data, curve_table(result.report), f"Saved to {command.output_dir}")


def _dense(given: str | None) -> str | float | None:
    """The dense model, or its perplexity if that is a number."""
    try:
        return given if given is None else float(given)
    except ValueError:
        return given


def curve_table(report: dict[str, Any]) -> Table:
    """The curve of a recovery, a row a measurement."""
    curve = report["curve"]
    dense, pruned = curve["dense"], curve["pruned"]
    rows = [] if dense is None else [("dense", f"{math.exp(dense):.2f}", "")]
    rows.append(("pruned", f"{math.exp(pruned):.2f}", "" if dense is None else "0.0 %"))
    for point in curve["points"]:
        value = point["log_perplexity"]
        back = "" if dense is None or pruned <= dense else f"{(pruned - value) / (pruned - dense):.1%}"
        mark = " (kept)" if point["step"] == report["best_step"] else ""
        rows.append((f"{point['step']}{mark}", f"{math.exp(value):.2f}", back))
    return make_table("Perplexity of text that was not trained on", ("step", "perplexity", "back"), rows, left=())
