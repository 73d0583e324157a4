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
from ..model.rebuild import check_whole
from ..plan import PLAN_NAME, PruningPlan
from .card import CARD_NAME, card_name, is_ours, read_metadata, read_text, write_card
from .contents import DENSE_RESULTS_NAME, PRUNED_RESULTS_NAME, RECOVERED_RESULTS_NAME, WIDTHS_NAME, Contents
from .origin import Origin
from .reports import (
    QUANTIZATION_NAME,
    RECOVERY_NAME,
    quantisation_section,
    quantisation_summary,
    read_report,
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
        check_file(folder / CARD_NAME, _FILES[CARD_NAME])


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


def _tell_report(path: Path) -> None:
    report = read_report(path)
    of_recovery = path.name == RECOVERY_NAME
    for tell in (recovery_section, recovery_summary) if of_recovery else (quantisation_section, quantisation_summary):
        tell(report)


# Each file is not only read but told as the card tells it, so that whatever a card will need of it is there.
_FILES = {
    "config.json": lambda path: read_json_object(path, repeats=True),
    CONFIG_NAME: lambda path: config_expression(PruningConfig.load(path)),
    PLAN_NAME: lambda path: PruningPlan.load(path).table(),
    RECOVERY_NAME: _tell_report,
    QUANTIZATION_NAME: _tell_report,
    CARD_NAME: lambda path: read_metadata(path.read_text(encoding="utf-8")),
    **dict.fromkeys(
        (RESULTS_NAME, DENSE_RESULTS_NAME, PRUNED_RESULTS_NAME, RECOVERED_RESULTS_NAME),
        lambda path: ResultTable([EvaluationResult.load(path)]).to_markdown(),
    ),
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
    """Writes the card of a checkpoint that was made from another one, `source`.

    It keeps the marked texts and the metadata of the card that it replaces, or else of the other model's. It is
    written into `path`, which will be `folder`, where the card is `previous` now.
    """
    theirs = read_text(source / CARD_NAME)
    replaced = previous or (theirs if is_ours(theirs) else "")
    or_say(lambda: write_card(path, name=card_name(folder, previous), previous=replaced), "The card", folder)


def or_say(write: Callable[[], Any], what: str, folder: Path) -> None:
    """Writes what can be made again later; if that fails, the weights of long work are saved all the same."""
    try:
        write()
    except StructPruneError as error:
        logger.warning(f"{what} was not written: {error} `hf-structprune card {folder.name}` makes the card again.")
