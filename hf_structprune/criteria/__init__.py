"""The criteria: one file, one criterion, one small class."""

from __future__ import annotations

from ..config import PruningConfig
from .activation import Activation
from .base import ByKind, ConsumerCriterion, Criterion, Scoring, TensorCriterion
from .magnitude import L1, L2
from .obs import OBS
from .random import Random
from .taylor import Taylor
from .wanda import Wanda
from .wifv import WIFV


BY_NAME: dict[str, type[Criterion]] = {
    "random": Random,
    "l1": L1,
    "l2": L2,
    "taylor": Taylor,
    "wanda": Wanda,
    "wifv": WIFV,
    "activation": Activation,
    "obs": OBS,
}

__all__ = ["BY_NAME", "ConsumerCriterion", "Criterion", "Scoring", "TensorCriterion", "make_criterion"]


def make_criterion(config: PruningConfig) -> Criterion:
    """The criterion that a configuration names, or the criteria of several kinds of units as one."""
    if isinstance(config.criterion, str):
        return BY_NAME[config.criterion](config)
    return ByKind(config, {kind: BY_NAME[name](config) for kind, name in config.criterion.items()})
