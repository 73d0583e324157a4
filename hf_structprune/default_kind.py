"""What goes under `units="auto"` where nothing is measured, and where that is good enough."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

from transformers import PreTrainedModel

from .config import EVOLUTION, PruningConfig
from .criteria import make_criterion
from .errors import RatioError, StructPruneError, UnsupportedModelError
from .model.placement import has_weights
from .model.structure import ModelStructure
from .planner import Planner
from .progress import hidden
from .units import GROUPS, KINDS, LAYERS, NEURONS, QUERIES, WidthKind, kinds_of


ENOUGH = 0.34  # of the MLP neurons, a third and a rounding of widths: where less goes, other kinds are not tried
NO_WEIGHTS = "the weights are not in memory"
_OUTSIDE = 0.3  # of all parameters
_MOST = 0.5  # of a kind: beyond it is looked whether it can reach the ratio


def share_of(kind: str, structure: ModelStructure) -> float:
    """The share of all parameters that units of a kind have."""
    return sum(g.size * g.cost for g in structure.groups if g.kind == kind) / structure.total_parameters


def near(ratio: float) -> float:
    """As far from the ratio that is asked for as is near enough, in shares of the model."""
    return max(0.02, 0.1 * ratio)


class DefaultKind:
    """Kinds of units that can be cut alone on a model, and the one that goes where nothing is measured.

    That is the kind in MLPs (neurons, experts) of which the model has most; where it has none, the largest.

    Args:
        model, structure: What is cut; the meta device will do.
        config: The configuration, with everything else that the user wants.
        proven: Raises `UnsupportedModelError` for kinds that are not shown to be cut right on this model type.

    Attributes:
        left_out: Kinds that are there and cannot be cut, and why.
    """

    def __init__(
        self, model: PreTrainedModel, structure: ModelStructure, config: PruningConfig,
        proven: Callable[[Collection[str]], Any],
    ) -> None:  # fmt: skip
        self.model, self.structure, self.config, self._proven = model, structure, config, proven
        self.left_out: dict[str, str] = {}
        self._able: dict[str, bool] = {}
        sizes = {kind: share_of(kind, structure) for kind in kinds_of(WidthKind) if self._there(kind)}
        if len(structure.layers) > 1:
            sizes[LAYERS] = sum(layer.parameters for layer in structure.layers) / structure.total_parameters
        largest = sorted(sizes, key=sizes.get, reverse=True)
        # KV groups say whether query heads are worth a trial.
        self._by_size = sorted(largest, key=lambda kind: kind == QUERIES)
        first = sorted(self._by_size, key=lambda kind: (not _in_mlp(kind), kind == LAYERS, self.of_heads(kind)))
        self.kind = next(filter(self.able, first), None)
        if self.kind is None:
            raise UnsupportedModelError(f"Nothing of this model can be cut: {'; '.join(self.left_out.values())}")

    def _there(self, kind: str) -> bool:
        return any(group.kind == kind and group.size > group.blocks for group in self.structure.groups)

    @staticmethod
    def of_heads(kind: str) -> bool:
        """Whether a kind goes in steps of heads."""
        return kind != LAYERS and KINDS[kind].of_heads

    def able(self, kind: str) -> bool:
        """Whether a kind can be cut alone."""
        if kind not in self._able:
            if kind != LAYERS and not self._there(kind):
                return False
            try:
                self._proven([kind])
                Planner(self.model, self.structure, dataclasses.replace(self.config, units=(kind,)), _no_text)
            except StructPruneError as error:
                self.left_out[kind] = f"{error}"
            self._able[kind] = kind not in self.left_out
        return self._able[kind]

    def kinds(self) -> tuple[list[str], list[str]]:
        """Kinds that can reach a ratio alone in small steps, the largest first, and coarser ones."""
        there = [kind for kind in self._by_size if self.able(kind)]
        coarse = [kind for kind in there if kind == LAYERS or self.of_heads(kind)]
        return [kind for kind in there if kind not in coarse], coarse

    def share(self, ratio: float, kind: str | None = None) -> float:
        """The share of all units of a kind, this one by default, that go if nothing else does."""
        there = share_of(kind or self.kind, self.structure)
        return ratio / there if there else 1.0

    def enough(self, ratio: float) -> bool:
        """Whether so little of the MLP neurons goes that other kinds need not be tried."""
        return self.kind == NEURONS and self.share(ratio) <= ENOUGH

    def unmeasurable(self) -> str:
        """Why nothing can be measured with this model and configuration; empty where it can."""
        config, criterion = self.config, make_criterion(self.config)
        if criterion.needs_gradients and config.criterion != "kfac":
            return f"the criterion {config.criterion!r} needs gradients"
        if not config.compensation and not criterion.needs_inputs:
            return "this configuration does not look at text"
        if config.allocation == EVOLUTION:
            return f"allocation {EVOLUTION!r} searches over heads and neurons that are named"
        if config.iterative_steps > 1:
            return "each of `iterative_steps` begins with another model"
        if config.calibration.image_column is not None:
            return "rows with images are not run for it"
        return "" if has_weights(self.model) else NO_WEIGHTS

    def fixed(self, ratio: float) -> PruningConfig:
        """The configuration without a measurement: this kind; KV groups too where it cannot reach the ratio alone.

        Where whole experts come nowhere near the ratio, another kind in MLPs that does.
        """
        alone = dataclasses.replace(self.config, units=(self.kind,))
        if self.kind == NEURONS:
            if self.share(ratio) < _MOST:
                return alone
        elif self._off(alone, ratio) > near(ratio):
            finer = [kind for kind in self._by_size if kind != self.kind and _in_mlp(kind) and self.able(kind)]
            others = [dataclasses.replace(self.config, units=(kind,)) for kind in finer]
            alone = next((one for one in others if self._off(one, ratio) <= near(ratio)), alone)
        if self._off(alone, ratio) < math.inf or not self.able(GROUPS):
            return alone
        both = dataclasses.replace(self.config, units=(self.kind, GROUPS))
        return both if self._off(both, ratio) < math.inf else alone  # which says how far it goes

    def _off(self, config: PruningConfig, ratio: float) -> float:
        """How far from the ratio the nearest plan is; infinite where it cannot be reached."""
        config = dataclasses.replace(config, allocation="uniform", levels=None, search_evaluations=None)
        try:
            with hidden():
                return abs(Planner(self.model, self.structure, config, _no_text).plan(ratio).ratio - ratio)
        except RatioError:
            return math.inf

    def outside(self) -> list[str]:
        """What is to be said of a model of which much is not in its layers."""
        share = 1 - sum(layer.parameters for layer in self.structure.layers) / self.structure.total_parameters
        if share < _OUTSIDE:
            return []
        return [
            f"{share:.0%} of the parameters are outside of the layers, where units='auto' does not cut: rows of the "
            "embedding that your text does not use cost far less (give `vocabulary_text`, text like yours)"
        ]


def _in_mlp(kind: str) -> bool:
    return KINDS[kind].sublayer == KINDS[NEURONS].sublayer


def _no_text() -> Any:
    raise AssertionError("no text is looked at to see what there is")
