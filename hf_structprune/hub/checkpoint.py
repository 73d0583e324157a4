"""Checkpoints of this package: saved whole, their own files checked, what is still true carried over to the next."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import CONFIG_NAME, PruningConfig
from ..errors import CheckpointError, StructPruneError
from ..evaluation.results import RESULTS_NAME, EvaluationResult
from ..evaluation.table import ResultTable
from ..files.reading import read_json_object
from ..files.writing import check_folder, write_folder
from ..model.half_pruned import check_whole
from ..plan import PLAN_NAME, PruningPlan
from .card import CARD_NAME, generated_for, is_ours, read_metadata, write_card
from .contents import DENSE_RESULTS_NAME, PRUNED_RESULTS_NAME, RECOVERED_RESULTS_NAME, WIDTHS_NAME, Contents
from .origin import RECORD, Origin
from .reports import (
    QUANTIZATION_NAME,
    RECOVERY_NAME,
    quantisation_section,
    quantisation_summary,
    read_quantization,
    read_recovery,
    recovery_section,
    recovery_summary,
)
from .words import config_expression


logger = logging.get_logger(__name__)


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    name: str,
    *,
    config: PruningConfig,
    plan: PruningPlan | None,
    origin: Origin | None,
    **kwargs: Any,
) -> None:
    """Writes a pruned model as a checkpoint, all at once or not at all.

    Args:
        model: The model.
        tokenizer: Its tokenizer, if there is one.
        folder: Where the files go.
        name: What the card calls the model.
        config: What it was pruned with.
        plan: What went; `None` is refused.
        origin: Where it comes from.
        kwargs: Given to the model's `save_pretrained`.
    """
    check_whole(model)
    if plan is None:
        raise StructPruneError("Nothing has been pruned yet: call `prune` before `save_pretrained` or `push_to_hub`.")
    check_folder(folder)
    previous = read_text(folder / CARD_NAME)

    def write(path: Path) -> None:
        model.save_pretrained(path, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        config.save(path / CONFIG_NAME)
        plan.save(path / PLAN_NAME)
        write_card(path, name=name, previous=previous, recorded=origin)

    write_folder(folder, write, size=plan.bytes_after)


def check_own_files(folder: Path) -> None:
    """Reads every file of this package in a folder; those that are not there are not missed.

    Raises:
        CheckpointError: Names the file that cannot be used, and why.
        ConfigurationError: The results are those of another model.
    """
    for name, tell in _FILES.items():
        if (folder / name).is_file():
            check_file(folder / name, tell)
    if is_pruned(folder) and (folder / "config.json").is_file():
        Contents.read(folder)


def check_card(folder: Path) -> None:
    """Reads the card of a folder whose other files will be replaced: its texts go over into the new one.

    Raises:
        CheckpointError: It cannot be read.
    """
    if (folder / CARD_NAME).is_file():
        check_file(folder / CARD_NAME, _tell_card)


def check_file(path: Path, read: Callable[[Path], Any]) -> None:
    """Reads a file.

    Raises:
        CheckpointError: It cannot be read, whatever the reason.
    """
    try:
        read(path)
    except (StructPruneError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        what = str(error) if isinstance(error, StructPruneError) else f"it is damaged ({error!r})"
    except RecursionError:
        what = "it is damaged (nested too deep)"
    else:
        return
    what = f"it{what[len(str(path)) :]}" if what.startswith(str(path)) else what
    raise CheckpointError(f"{path} cannot be used: {what.rstrip('.')}. Put it right, or take it away.")


def _tell_card(path: Path) -> None:
    read_metadata(path.read_text(encoding="utf-8"))


def _tell_model_config(path: Path) -> None:
    read_json_object(path, repeats=True).get(RECORD)


def _tell_config(path: Path) -> None:
    config_expression(PruningConfig.load(path))


def _tell_plan(path: Path) -> None:
    plan = PruningPlan.load(path)
    plan.to_dict()
    str(plan)


def _tell_results(path: Path) -> None:
    ResultTable([EvaluationResult.load(path)]).to_markdown()


def _tell_recovery(path: Path) -> None:
    report = read_recovery(path.parent)
    recovery_section(report)
    recovery_summary(report)


def _tell_quantization(path: Path) -> None:
    report = read_quantization(path.parent)
    quantisation_section(report)
    quantisation_summary(report)


_RESULTS = (RESULTS_NAME, DENSE_RESULTS_NAME, PRUNED_RESULTS_NAME, RECOVERED_RESULTS_NAME)
_FILES = {
    "config.json": _tell_model_config,
    CONFIG_NAME: _tell_config,
    PLAN_NAME: _tell_plan,
    RECOVERY_NAME: _tell_recovery,
    QUANTIZATION_NAME: _tell_quantization,
    CARD_NAME: _tell_card,
    **dict.fromkeys(_RESULTS, _tell_results),
}


# What neither training nor quantising changes: how it was pruned, how wide it is, what the dense model could do.
STILL_TRUE = (CONFIG_NAME, PLAN_NAME, DENSE_RESULTS_NAME, WIDTHS_NAME)


def is_pruned(folder: Path | None) -> bool:
    """Whether a folder holds a checkpoint that this package has pruned."""
    return folder is not None and all((folder / name).is_file() for name in (CONFIG_NAME, PLAN_NAME))


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copies those of the files that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_card_from(source: Path, path: Path, folder: Path, previous: str) -> None:
    """Writes the card of a checkpoint that was made from another one.

    It keeps the marked texts and the metadata of the card that it replaces, or else of the other model's.

    Args:
        source: The other checkpoint.
        path: Where the files are written.
        folder: Where they will be.
        previous: The card that is there now.
    """
    theirs = read_text(source / CARD_NAME)
    replaced = previous or (theirs if is_ours(theirs) else "")
    or_say(lambda: write_card(path, name=card_name(folder, previous), previous=replaced), "The card", folder)


def card_name(folder: Path, previous: str) -> str:
    """The Hub id that the card in the folder was written for, or the folder's name; never that of the other model."""
    earlier = generated_for(previous) or ""
    return earlier if "/" in earlier else folder.absolute().name


def or_say(write: Callable[[], Any], what: str, folder: Path) -> None:
    """Writes what can be made again later; if that fails, the weights of long work are saved all the same."""
    try:
        write()
    except StructPruneError as error:
        logger.warning(f"{what} was not written: {error} `hf-structprune card {folder.name}` makes the card again.")


def read_text(path: Path) -> str:
    """The text of a file, empty if there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""
