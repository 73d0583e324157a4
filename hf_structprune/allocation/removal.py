"""What can go of the depth of a model, how large it is, and when enough has gone. No weights are looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..config import PruningConfig
from ..errors import UnsupportedModelError
from ..model.structure import ModelStructure
from ..plan import Dropped, emptied, normalised, removed_by
from ..units import LAYERS, DepthKind, kinds_of
from .widths import active_layers


Unit = tuple[int, str]  # number of the layer; "layers" (the whole layer), "attention" or "mlp"


def depth_candidates(structure: ModelStructure, config: PruningConfig, kinds: tuple[str, ...]) -> list[Unit]:
    """The layers and sublayers that may go: lower layers first, within one the whole layer, its attention, its MLP.

    Scores are compared in this order, so that of equal ones the first goes.

    Raises:
        UnsupportedModelError: The layers that may be cut have none of these sublayers.
    """
    units = [
        (index, kind)
        for index in active_layers(config, len(structure.layers))
        for kind in kinds_of(DepthKind)
        if kind in kinds and (kind == LAYERS or structure.layers[index].sublayer(kind) is not None)
    ]
    lacking = [kind for kind in kinds if kind not in {found for _, found in units}]
    if lacking:
        raise UnsupportedModelError(
            f"No layer that may be cut has an {lacking[0]} that could go alone. {'; '.join(structure.notes)}"
        )
    return units


def as_dropped(units: Iterable[Unit], structure: ModelStructure) -> Dropped:
    """Units in the form of a plan's `dropped`."""
    units = list(units)
    return normalised({kind: [n for n, one in units if one == kind] for _, kind in units}, structure)


@dataclass
class Removal:
    """What has gone so far: `units`, in their order, from what is left of the dense model without those `before`."""

    structure: ModelStructure
    units: list[Unit] = field(default_factory=list)
    before: Dropped = field(default_factory=dict)

    def can(self, unit: Unit) -> bool:
        """Whether a unit is still there and a layer stays when it goes."""
        layer, kind = unit
        gone = self.gone()
        if layer in gone[LAYERS] or layer in gone[kind]:
            return False
        return len(self.gone([unit])[LAYERS]) < len(self.structure.layers)

    def gone(self, extra: Iterable[Unit] = ()) -> dict[str, set[int]]:
        """Layers and sublayers that are gone, these units included; a layer that has lost all is a layer."""
        gone = {kind: set(self.before.get(kind, ())) for kind in kinds_of(DepthKind)}
        for layer, kind in (*self.units, *extra):
            gone[kind].add(layer)
        gone[LAYERS] |= emptied(gone, self.structure)
        return {kind: numbers if kind == LAYERS else numbers - gone[LAYERS] for kind, numbers in gone.items()}

    def parameters(self, extra: Iterable[Unit] = ()) -> int:
        """Parameters of everything that has gone since the beginning, these units included."""
        beginning = Removal(self.structure, before=self.before).gone()
        return removed_by(self.gone(extra), self.structure) - removed_by(beginning, self.structure)

    def in_parts(self, candidates: Iterable[Unit]) -> list[Unit]:
        """The units, a layer as its sublayers if they may go alone: so one of them can come back."""
        single, parts = set(candidates), []
        for layer, kind in self.units:
            sublayers = [(layer, sublayer.kind) for sublayer in self.structure.layers[layer].sublayers]
            whole = layer in emptied({name: [layer] for _, name in sublayers}, self.structure)
            parts += sublayers if kind == LAYERS and whole and single.issuperset(sublayers) else [(layer, kind)]
        return list(dict.fromkeys(parts))

    def also(self, unit: Unit) -> Removal:
        """The same and one unit more."""
        return Removal(self.structure, [*self.units, unit], self.before)

    def without(self, unit: Unit) -> Removal:
        """The same but for one unit, which is back."""
        return Removal(self.structure, [one for one in self.units if one != unit], self.before)


@dataclass(frozen=True)
class Amount:
    """How much is to go: so many removals, or parameters, as near as whole units allow; with `most` never more."""

    count: int | None = None
    parameters: int | None = None
    most: bool = False

    def excess(self, removal: Removal) -> int:
        """Units, or parameters, that are gone beyond the amount; negative if some are lacking."""
        return len(removal.units) - self.count if self.count is not None else removal.parameters() - self.parameters

    def distance(self, removal: Removal) -> tuple[int, int]:
        """How far what has gone is away from the amount; of two equally far away the one with less gone is smaller."""
        excess = self.excess(removal)
        return abs(excess), excess

    def nearer(self, more: Removal, fewer: Removal) -> bool:
        """Whether what is more comes nearer to the amount; with `most`, whether it is not too much."""
        return self.excess(more) <= 0 if self.most else self.distance(more) < self.distance(fewer)

    def wants(self, removal: Removal, unit: Unit) -> bool:
        """Whether this unit is to go on top of what has gone."""
        return self.nearer(removal.also(unit), removal)

    def returns(self, removal: Removal) -> list[Unit]:
        """The units whose return leads nearer to the amount."""
        now, gone = self.distance(removal), removal.parameters()
        rests = {unit: removal.without(unit) for unit in removal.units}
        return [unit for unit, rest in rests.items() if self.distance(rest) < now and rest.parameters() < gone]
