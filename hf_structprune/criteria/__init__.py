"""The criteria that rank units: a class each, by name in `BY_NAME`, for widths; functions for depth and channels."""

from __future__ import annotations

from ..config import PruningConfig
from .base import ByKind, ConsumerCriterion, Criterion, Method, Paper, Scoring, TensorCriterion
from .inputs import OBS, WIFV, Activation, Wanda
from .weights import L1, L2, Random, Taylor


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

__all__ = [
    "BY_NAME", "ConsumerCriterion", "Criterion", "Method", "Paper", "Scoring", "TensorCriterion", "make_criterion",
]  # fmt: skip


def make_criterion(config: PruningConfig) -> Criterion:
    """The criterion that a configuration names, or the criteria of several kinds of units as one."""
    if isinstance(config.criterion, str):
        return BY_NAME[config.criterion](config)
    return ByKind(config, {kind: BY_NAME[name](config) for kind, name in config.criterion.items()})
