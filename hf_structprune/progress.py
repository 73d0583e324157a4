"""Progress bars: one at a time, so that a bar of what is done inside another is not shown."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm as _tqdm
from transformers.utils import logging


# What `chosen` says; `None` leaves it to Transformers' switch.
_choice: bool | None = None


def enabled() -> bool:
    """Whether bars are shown: what the command line chose, else what `transformers.logging` is told."""
    return logging.is_progress_bar_enabled() if _choice is None else _choice


def only_ours() -> bool:
    """Whether the command line wants nothing of what libraries print beside their results."""
    return _choice is not None


@contextmanager
def chosen(shown: bool) -> Iterator[None]:
    """As long as this is open, our bars are shown or not, and those of Transformers (of loading, saving) are not."""
    global _choice
    before, _choice = _choice, shown
    try:
        with _without_those_of_transformers():
            yield
    finally:
        _choice = before


def hide() -> None:
    """No bar is shown in this process from here on, or until the `chosen` that is open ends."""
    global _choice
    _choice = False
    logging.disable_progress_bar()


def hidden() -> Any:
    """A context in which no bar is shown, neither ours nor Transformers'."""
    return chosen(False)


def above_bars() -> Any:
    """A context in which something is printed: a bar that is open steps aside for it."""
    return _tqdm.external_write_mode()


@contextmanager
def _without_those_of_transformers() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class tqdm(_tqdm):
    """A bar, unless they are switched off or another one of ours is open."""

    _open: weakref.ref[tqdm] | None = None

    def __init__(self, *args: Any, disable: bool = False, **options: Any) -> None:
        other = None if tqdm._open is None else tqdm._open()
        inside = other is not None and not other.disable  # a bar that is closed is disabled
        super().__init__(*args, disable=disable or inside or not enabled(), **options)
        if not self.disable:
            tqdm._open = weakref.ref(self)
