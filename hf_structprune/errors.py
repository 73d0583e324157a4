"""The exceptions of the package: one small hierarchy, every message says what was wrong and what to do."""

from __future__ import annotations

from typing import Any

from .masking import masked


class StructPruneError(Exception):
    """Base class of everything this package raises on purpose. No message of it repeats a secret."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(masked(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigurationError(StructPruneError, ValueError):
    """An option has an unknown or impossible value."""


class UnsupportedModelError(StructPruneError):
    """The model has a structure that cannot be described, so it is not touched."""


class RatioError(ConfigurationError):
    """More was asked to be removed than can be removed."""


class TextError(StructPruneError, ValueError):
    """A text cannot be read: no such file, data set, split or column, no network, or nothing in it."""


class CalibrationError(TextError):
    """The calibration data cannot be used: too little text, wrong column, empty rows."""


class CheckpointError(StructPruneError):
    """A checkpoint cannot be written or read without losing weights."""


class PlaceError(CheckpointError, ConfigurationError):
    """Nothing can be written where it was asked for, or not as much."""


class EvaluationError(StructPruneError):
    """Something cannot be measured here: a task without its data set, a missing extra, a command that failed."""


class ExportError(StructPruneError):
    """A model cannot be written in another format, or not without changing what it computes."""


class HubError(StructPruneError):
    """Something cannot be read from the Hub or written to it."""
