"""What is left of a training: its report, the curve as a picture, and the recovered checkpoint with its card."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import CheckpointError, ConfigurationError, StructPruneError
from ..evaluation.results import RESULTS_NAME, EvaluationResult
from ..files.writing import check_folder, write_folder, write_text
from ..hub.card import card_name, generated_mark, is_ours
from ..hub.checkpoint import STILL_TRUE, copy_files, or_say, write_card_from
from ..hub.contents import CARD_NAME, PRUNED_RESULTS_NAME, check_card, check_own_files, is_pruned, read_text
from ..hub.older import write_for_older
from ..hub.origin import TAGS
from ..hub.words import PICTURE_NAME, RECOVERY_NAME, recovery_section, render
from ..installed import need
from ..model.loading import load_config
from .measuring import RecoveryCurve, draw_curve
from .weights import is_peft, is_sharded, merge_adapter, underneath, without_parallel


logger = logging.get_logger(__name__)


def check_place(folder: Path, pruned: Path | None) -> None:
    """Refuses, before any work is done, a folder that cannot be written, and a damaged checkpoint to go into it."""
    if pruned is not None:
        check_own_files(pruned)
    check_folder(folder)
    check_card(folder)


def describe_training(
    args: TrainingArguments, state: TrainerState, model: nn.Module, seconds: float
) -> dict[str, Any]:
    """What was trained, and how long; no names of folders."""
    plain = without_parallel(model)
    tokens = [logs["num_tokens"] for logs in state.log_history if "num_tokens" in logs]
    return {
        "steps": state.global_step, "max_steps": state.max_steps, "seconds": round(seconds, 1),
        "tokens": int(tokens[-1] if tokens else state.num_input_tokens_seen) or None,
        "method": str(plain.active_peft_config.peft_type.value).lower() if is_peft(plain) else "full",
        "trainable_parameters": sum(p.numel() for p in plain.parameters() if p.requires_grad),
        "learning_rate": args.learning_rate, "epochs": state.epoch,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "processes": args.world_size,
    }  # fmt: skip


def save_all(
    curve: RecoveryCurve, model: nn.Module, tokenizer: Any, report: dict[str, Any], folder: Path, merged: Path | None
) -> None:
    """Writes report and picture into a folder, and the merged model into another one, if it is given."""
    write_text(folder / RECOVERY_NAME, json.dumps(report, indent=1, allow_nan=False) + "\n")
    picture = None
    try:
        need("matplotlib", extra="report")
    except StructPruneError as error:
        logger.warning(f"The recovery curve is not drawn. {error}")
    else:
        picture = partial(draw_curve, curve, best_step=report["best_step"])
        picture(folder / PICTURE_NAME)
    if merged is not None and is_sharded(model):
        logger.warning(
            "The weights are spread over several processes, so they are not merged here: save them with "
            "`trainer.save_model()` and merge them in one process."
        )
    elif merged is not None:
        plain = merge_adapter(model, dtype=_saved_dtype(model))
        save_recovered(plain, tokenizer, merged, pruned=folder_of(model), report=report, picture=picture)


def folder_of(model: nn.Module) -> Path | None:
    """The pruned checkpoint that a model was loaded from, if it is one of ours."""
    folder = Path(_origin(model))
    return folder if (folder / "pruning_plan.json").is_file() else None


def _origin(model: nn.Module) -> str:
    return str(getattr(underneath(model).config, "_name_or_path", "") or "")


def _saved_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the checkpoint that a model was loaded from, if there is one here: it is saved in that again."""
    name = _origin(model)
    try:
        return load_config(name, local_files_only=True, trust_remote_code=False).dtype if name else None
    except StructPruneError:
        return None


def save_recovered(
    model: PreTrainedModel, tokenizer: Any, folder: Path, *, pruned: Path | None, report: dict[str, Any],
    picture: Callable[[Path], None] | None = None,
) -> None:  # fmt: skip
    """Writes a recovered model as a plain checkpoint, all at once or not at all.

    From the folder of the pruned model come its configuration of pruning, plan and picture of the widths, the results
    of the dense model, and its own results under `evaluation_results_pruned.json`. Nothing that was measured on other
    weights is passed off as measured on these. The card keeps the marked texts and the metadata of the card that it
    replaces, or else of the pruned model's.

    Args:
        model: A plain model, see `merge_adapter`.
        folder: Where the files go; other files in it stay, an earlier checkpoint in it goes.
        pruned: Folder of the pruned checkpoint; without one that this package has made, the card says no more than the
            report does.
        report: The content of `recovery.json`. Parameters and bytes of the model are added under `weights`.
        picture: Draws the curve into a file.

    Raises:
        CheckpointError: The weights are not finite, or writing failed.
    """
    folder = Path(folder)
    pruned = Path(pruned) if pruned is not None and is_pruned(Path(pruned)) else None
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(f"`{name}` has values that are not finite; the model was not saved to be used.")
    before = json.loads(read_text(pruned / "config.json") or "{}") if pruned is not None else {}
    if getattr(model.config, "use_cache", None) is False:  # Trainer switches it off, and generation would stay slow
        model.config.use_cache = before.get("use_cache", True)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    weights = {"parameters": sum(p.numel() for p in model.parameters()), "bytes": size}
    previous = read_text(folder / CARD_NAME)

    def write(path: Path) -> None:
        model.save_pretrained(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        write_for_older(path, model.config)
        write_text(path / RECOVERY_NAME, json.dumps({**report, "weights": weights}, indent=1, allow_nan=False) + "\n")
        if picture is not None:
            or_say(lambda: picture(path / PICTURE_NAME), "The picture of the curve", folder)
        if pruned is None:
            _write_plain_card(path, card_name(folder, previous), previous, report)
            return
        copy_files(pruned, path, STILL_TRUE)
        _copy_results(pruned, path)
        write_card_from(pruned, path, folder, previous)

    write_folder(folder, write, size=size)


def _copy_results(pruned: Path, path: Path) -> None:
    """A model that was recovered once has the results of its pruned state under their second name already."""
    for name in (PRUNED_RESULTS_NAME, RESULTS_NAME):
        with contextlib.suppress(ConfigurationError):
            if (pruned / name).is_file() and EvaluationResult.load(pruned / name).state == "pruned":
                shutil.copyfile(pruned / name, path / PRUNED_RESULTS_NAME)
                return


def _write_plain_card(path: Path, name: str, previous: str, report: dict[str, Any]) -> None:
    """A card for a model that this package has not pruned: how to load it, and the report."""
    if previous.strip() and not is_ours(previous):
        return
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=[TAGS[-1]])
    picture = PICTURE_NAME if (path / PICTURE_NAME).is_file() else None
    per_layer = "per_layer_config" in json.loads(read_text(path / "config.json"))
    parts = [
        f"---\n{data.to_yaml()}\n---",
        generated_mark(name),
        f"# {name}",
        recovery_section(report, picture=picture),
    ]
    parts.append(render("loading", name=name, per_layer=per_layer))
    write_text(path / CARD_NAME, "\n\n".join(parts) + "\n")
