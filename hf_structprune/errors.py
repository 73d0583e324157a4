"""The exceptions of the package: one small hierarchy, every message says what was wrong and what to do."""


class StructPruneError(Exception):
    """Base class of everything this package raises on purpose."""


class ConfigurationError(StructPruneError, ValueError):
    """An option has an unknown or impossible value."""


class UnsupportedModelError(StructPruneError):
    """The model has a structure that cannot be described, so it is not touched."""


class RatioError(ConfigurationError):
    """More was asked to be removed than can be removed."""


class CalibrationError(StructPruneError, ValueError):
    """The calibration data cannot be used: too little text, wrong column, empty rows."""


class CheckpointError(StructPruneError):
    """A checkpoint cannot be written or read without losing weights."""


class HubError(StructPruneError):
    """Something cannot be read from the Hub or written to it."""
