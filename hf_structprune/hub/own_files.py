"""The files of this package beside a checkpoint, read before any work: what is damaged is found when it is first seen.

Every file is not only read but told in the words of the card, so that whatever a card will need of it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import CONFIG_NAME, PruningConfig
from ..errors import CheckpointError, StructPruneError
from ..evaluation.results import RESULTS_NAME, EvaluationResult
from ..evaluation.table import ResultTable
from ..files.json_files import read_json_object
from ..hub import quantization, recovery
from ..plan import PLAN_NAME, PruningPlan
from .card import CARD_NAME, read_metadata
from .carrying import is_pruned
from .contents import DENSE_RESULTS_NAME, PRUNED_RESULTS_NAME, RECOVERED_RESULTS_NAME, Contents
from .origin import RECORD
from .quantization import QUANTIZATION_NAME
from .recovery import RECOVERY_NAME
from .snippets import config_expression


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
    report = recovery.read_report(path.parent)
    recovery.card_section(report)
    recovery.summary(report)


def _tell_quantization(path: Path) -> None:
    report = quantization.read_quantization(path.parent)
    quantization.card_section(report)
    quantization.summary(report)


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
