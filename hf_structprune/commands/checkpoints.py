"""`hf-structprune recover`, `quantize`, `export`, `card` and `push`: what is done with a checkpoint after pruning."""

from __future__ import annotations

import importlib
import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from ..checks import OneOf
from ..errors import ConfigurationError, HubError
from ..quantization.configuration import QuantizationConfig
from ..recovery.configuration import DistillationConfig, RecoveryConfig
from .arguments import parse
from .cli import check_output, make_table, results_only_on_stdout, show, speaking
from .models import SourceArguments


if TYPE_CHECKING:
    from rich.table import Table

    from ..export.common import Exported


@dataclass
class RecoverArguments(SourceArguments):
    """Options of `recover`.

    Args:
        dataset (list of `str`): Data to train on: chats, instructions or plain text, from a .jsonl, .json or .txt
            file, a folder or a data set of the Hub. Several are mixed.
        split (`str`): Split of data sets that have several.
        output_dir (`str`): Folder for the recovered checkpoint.
        dense (`str`, *optional*): The model before pruning, to tell which share of the loss is back: a model, or its
            perplexity on the watched text. Default: the teacher, if there is one.
        teacher (`str`, *optional*): What `--method distill` learns from. Default: the model that was pruned.
        resume (`bool`): Go on from the last checkpoint of an interrupted training.
        overwrite (`bool`): Replace what is in the folder, and start an interrupted training anew.
    """

    dataset: Sequence[str] | None = None
    split: str = "train"
    output_dir: str | None = None
    dense: str | None = None
    teacher: str | None = None
    resume: bool = False
    overwrite: bool = False


def recover_command(argv: Sequence[str]) -> None:
    """Trains, saves and says how much came back."""
    description = "Train a pruned model to get its quality back: LoRA, QLoRA, all weights or distillation."
    command, config, distillation = parse(
        argv, "recover", description, RecoverArguments, RecoveryConfig, DistillationConfig
    )
    if not command.dataset:
        raise ConfigurationError("--dataset is missing: a file, a folder or a data set of the Hub to train on.")
    if command.output_dir is None:
        raise ConfigurationError("--output-dir is missing.")
    from ..recovery.recovering import recover

    try:  # its perplexity, if that is a number
        dense = None if command.dense is None else float(command.dense)
    except ValueError:
        dense = command.dense
    with results_only_on_stdout(), speaking():
        result = recover(
            command.model, list(command.dataset), command.output_dir, config,
            split=command.split, dense=dense, teacher=command.teacher, distillation=distillation,
            resume=command.resume, overwrite=command.overwrite, trust_remote_code=command.trust_remote_code,
        )  # fmt: skip
    data = {"model": command.model, "output_dir": command.output_dir, **result.report}
    show(command.json, data, _curve_table(result.report), f"Saved to {command.output_dir}")


def _curve_table(report: dict[str, Any]) -> Table:
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


@dataclass
class QuantizeArguments(SourceArguments):
    """Options of `quantize`.

    Args:
        output_dir (`str`): Folder for the quantised checkpoint.
        overwrite (`bool`): Write to the folder even if it is not empty.
    """

    output_dir: str | None = None
    overwrite: bool = False


def quantize_command(argv: Sequence[str]) -> None:
    """Quantises, saves and says how much smaller it is."""
    description = "Quantise a model, pruned or not, and save a checkpoint that from_pretrained loads."
    command, config = parse(argv, "quantize", description, QuantizeArguments, QuantizationConfig)
    check_output(command.output_dir, command.overwrite)
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
    show(command.json, data, _sizes_table(result.report), *lines)


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


# Each format's module and function: `function(model, output, *, <options>) -> Exported`. Its keyword arguments are
# the options below that the format takes; those that were not given keep the function's own defaults.
FORMATS = {
    "gguf": ("..export.gguf", "export_gguf"),
    "onnx": ("..export.onnx", "export_onnx"),
    "deci": ("..export.deci", "export_deci"),
}
_OF_FORMATS = ("quant", "dtype", "pad", "trust_remote_code")


@dataclass
class ExportArguments(SourceArguments):
    """Options of `export`.

    Args:
        format (`str`): `gguf` (llama.cpp), `onnx` (ONNX Runtime), or `deci` (vLLM, layers that are not alike).
        output (`str`): File or folder to write; what a format needs is said by its error.
        overwrite (`bool`): Replace what is there.
        quant (`str`, *optional*): gguf: type of the weights, such as f16, bf16, f32, q8_0, q4_k_m. Default: f16.
        dtype (`str`, *optional*): onnx: fp32 or fp16, of weights and arithmetic. Default: fp32.
        pad (`bool`): deci: add heads and neurons of zeros where a layer does not fit the format.
    """

    format: Annotated[str, OneOf(tuple(FORMATS))] | None = None
    output: str | None = None
    overwrite: bool = False
    quant: str | None = None
    dtype: str | None = None
    pad: bool = False


def export_command(argv: Sequence[str]) -> None:
    """Exports and says what came out."""
    (command,) = parse(argv, "export", "Write MODEL in the format of another runtime.", ExportArguments)
    if command.format is None:
        raise ConfigurationError("--format is missing.")
    check_output(command.output, command.overwrite, file=True, folders=True)
    module, name = FORMATS[command.format]
    with results_only_on_stdout(), speaking():
        function = getattr(importlib.import_module(module, __package__), name)
        known = inspect.signature(function).parameters
        given = {
            field.name: getattr(command, field.name)
            for field in fields(command)
            if field.name in _OF_FORMATS and getattr(command, field.name) != field.default
        }
        for option in given.keys() - known:
            raise ConfigurationError(f"--{option.replace('_', '-')} is no option of --format {command.format}.")
        result: Exported = function(command.model, command.output, **given)
    data = {
        "model": command.model, "format": command.format, "output": str(result.path), "bytes": result.size,
        **result.details, "notes": result.notes,
    }  # fmt: skip
    show(command.json, data, f"Wrote {result.path}, {result.size / 1e6:.1f} MB.", *result.notes)


@dataclass
class CardArguments:
    """The card.

    Args:
        folder (`str`): The checkpoint.
        name (`str`, *optional*): Id it will have on the Hub, for the lines that load it. Default: the folder's name.
        base_model (`str`, *optional*): Hub id or folder of the model that was pruned. Default: what was recorded.
        overwrite (`bool`): Replace a README.md that was not written by this command.
        json (`bool`): Print one JSON object and nothing else on stdout.
    """

    folder: str
    name: str | None = None
    base_model: str | None = None
    overwrite: bool = False
    json: bool = False


def card_command(argv: Sequence[str]) -> None:
    """Writes the card and says where and how it was checked."""
    description = "Write the model card of the checkpoint in DIR. Text in its marked sections is kept."
    (command,) = parse(argv, "card", description, CardArguments)
    with results_only_on_stdout():
        from ..hub import validate_card, write_card

        path = write_card(
            command.folder, name=command.name, base_model=command.base_model, overwrite=command.overwrite
        )
        if path is None:
            raise HubError(
                f"The README.md in {command.folder} was not written by hf_structprune; say --overwrite to replace it."
            )
        asked = validate_card(path)
    how = "The Hub finds its metadata valid." if asked else "Its metadata was checked here; the Hub was not asked."
    show(command.json, {"card": str(path), "checked_by_hub": asked}, f"Wrote {path}. {how}")


@dataclass
class PushArguments:
    """What goes where. The token is that of `hf auth login` or of the environment variable HF_TOKEN.

    Args:
        folder (`str`): The checkpoint.
        repo_id (`str`): The repository, such as user/name; made if it is not there.
        private (`bool`): Make a new repository private.
        revision (`str`, *optional*): Branch to commit to, made if it is not there. Default: main.
        create_pr (`bool`): Open a pull request instead of committing.
        commit_message (`str`, *optional*): First line of the commit.
        json (`bool`): Print one JSON object and nothing else on stdout.
    """

    folder: str
    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    json: bool = False


def push_command(argv: Sequence[str]) -> None:
    """Pushes and prints the address."""
    (command,) = parse(argv, "push", "Push the checkpoint in DIR to the Hub.", PushArguments)
    with results_only_on_stdout():
        from ..hub import push_folder

        options = {name: getattr(command, name) for name in ("revision", "create_pr", "commit_message")}
        commit = push_folder(command.folder, command.repo_id, private=command.private or None, **options)
    data = {"repo_id": commit.repo_url.repo_id, **{n: getattr(commit, n) for n in ("commit_url", "oid", "pr_url")}}
    show(command.json, data, f"Pushed to {commit.repo_url}: {commit.pr_url or commit.commit_url}")
