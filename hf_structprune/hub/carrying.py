"""What of one checkpoint is still true of one made from it: files that go along, and the text of the card."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..config import CONFIG_NAME
from ..errors import StructPruneError
from ..plan import PLAN_NAME
from .card import CARD_NAME, write_card
from .contents import DENSE_RESULTS_NAME, WIDTHS_NAME
from .hand_text import generated_for, is_ours


logger = logging.get_logger(__name__)

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
    theirs = read(source / CARD_NAME)
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


def read(path: Path) -> str:
    """The text of a file, empty if there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""
