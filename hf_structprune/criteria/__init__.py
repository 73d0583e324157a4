"""The criteria that rank units: a class each, by name in `BY_NAME`, for widths; functions for depth and channels."""

from __future__ import annotations

from ..config import AUTO, PruningConfig
from ..units import KINDS, RoutedKind, WidthKind, kinds_of
from . import experts
from .base import ByKind, ConsumerCriterion, Criterion, Method, Paper, Scoring, TensorCriterion
from .widths import KFAC, L1, L2, OBS, WIFV, Activation, Random, Taylor, Wanda


BY_NAME: dict[str, type[Criterion]] = {
    "random": Random,
    "l1": L1,
    "l2": L2,
    "taylor": Taylor,
    "wanda": Wanda,
    "wifv": WIFV,
    "activation": Activation,
    "obs": OBS,
    "kfac": KFAC,
}

__all__ = [
    "BY_NAME", "ConsumerCriterion", "Criterion", "Method", "Paper", "Scoring", "TensorCriterion", "class_of",
    "make_criterion",
]  # fmt: skip


def make_criterion(config: PruningConfig) -> Criterion:
    """The criterion that a configuration names, or the criteria of several kinds of units as one."""
    kinds = config.kinds(kinds_of(WidthKind))
    criteria = {kind: class_of(kind, config.criterion_of(kind))(config) for kind in kinds}
    for kind in (kind for kind in criteria if KINDS[kind].within_experts):
        criteria[kind] = experts.InExperts(config, criteria[kind])
    if len({type(criterion) for criterion in criteria.values()}) > 1:
        return ByKind(config, criteria)
    if criteria:
        return next(iter(criteria.values()))
    return BY_NAME["obs" if config.criterion == AUTO else config.criterion](config)


def class_of(kind: str, name: str) -> type[Criterion]:
    """The class of a criterion that ranks units of a kind of widths."""
    return (experts.BY_NAME if isinstance(KINDS[kind], RoutedKind) else BY_NAME)[name]
