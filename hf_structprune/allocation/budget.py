"""Arithmetic that all allocations share: which groups may be cut, how far, and what that removes."""

from __future__ import annotations

import math

from ..alignment import multiple_of
from ..config import PruningConfig
from ..errors import ConfigurationError, RatioError, UnsupportedModelError
from ..model.groups import Group, LayerStructure
from ..model.structure import ModelStructure
from ..plan import Dropped, is_dropped
from ..units import KINDS, WidthKind, kinds_of
from ..units.depth import LAYERS
from ..units.heads import GROUPS, pairs, removed_by_pair


Counts = dict[tuple[int, str], int]


class Budget:
    """The groups that may be cut under a configuration.

    Args:
        structure: Coupled groups of the model.
        config: What may be cut.
        head_counts: Pairs of (KV groups, query heads in each) that a checkpoint can express; `None` allows all.
        dropped: Layers and sublayers that go as a whole, so that nothing of them is left to cut.
        dense: The model before earlier steps, which ratios and rounding refer to; default `structure`.
    """

    def __init__(
        self,
        structure: ModelStructure,
        config: PruningConfig,
        head_counts: set[tuple[int, int]] | None = None,
        dropped: Dropped | None = None,
        dense: ModelStructure | None = None,
    ) -> None:
        self.structure, self.config, self.head_counts = structure, config, head_counts
        self.dropped, self.dense = dropped or {}, dense or structure
        self._multiple, self._wanted = multiple_of(config.align_to), config.kinds(kinds_of(WidthKind))
        active = active_layers(config, len(structure.layers))
        self.layers = [structure.layers[i] for i in active if i not in self.dropped.get(LAYERS, ())]
        self.attentions = [
            layer
            for layer in self.layers
            if layer.attention and not is_dropped(self.dropped, layer.index, GROUPS) and self._expressible(layer)[1:]
        ]
        self.groups = [
            group
            for layer in self.layers
            for group in layer.groups
            if group.kind in self._wanted and not KINDS[group.kind].of_heads
            and not is_dropped(self.dropped, layer.index, group.kind)
        ]  # fmt: skip
        available = set(structure.kinds())
        if not available & set(self._wanted):
            raise UnsupportedModelError(
                f"`units` is {config.units}, but the layers that may be cut have {sorted(available) or 'none'}. "
                f"{'; '.join(structure.notes)}"
            )
        if config.align_to is not None:
            self._check_alignment()

    def from_dense(self) -> Budget:
        """The same for the model before earlier steps."""
        return Budget(self.dense, self.config, self.head_counts, self.dropped)

    def _check_alignment(self) -> None:
        """Refuses an alignment that nothing which can be kept has; says what can."""
        wanted = f"`align_to` is {self.config.align_to!r}, a multiple of {self._multiple}"
        for group in self.groups:
            if self.step(group) > group.size:
                raise ConfigurationError(
                    f"{wanted}, but the {KINDS[group.kind].part} of layer {group.layer} is only {group.size} wide: "
                    "take a smaller one."
                )
        for layer in self.attentions:
            if not self.attention_options(layer):
                size = layer.attention.head_dim
                counts = sorted({kv * rep for kv, rep in self._expressible(layer)})
                widths = ", ".join(f"{count} x {size} = {count * size}" for count in counts)
                raise ConfigurationError(
                    f"{wanted}, but no number of heads that layer {layer.index} can keep has such a width: {widths}. "
                    "Take an `align_to` that divides one of these, or cut other `units`."
                )

    def target(self, ratio: float) -> int:
        """Parameters that are still to go for a share of all parameters; checks that so many can go."""
        total = self.dense.total_parameters
        target = ratio * total - self.gone
        if target > self.removable:
            # Rounded down, so that the ratio that is named can be asked for.
            largest = math.floor((self.gone + self.removable) / total * 10_000) / 10_000
            raise RatioError(
                f"The ratio {ratio:.2%} cannot be reached: {self._where} allow at most {largest:.2%} of all "
                f"parameters. {self._held_back}Ask for less, or allow more `units` or layers."
            )
        return round(target)

    def check(self, target: int) -> int:
        """Parameters that are still to go when others go already; checks that so many can go."""
        target -= self.gone
        if target > self.removable:
            raise RatioError(
                f"{target:,} parameters are left to be taken from heads and neurons, but {self._where} allow at most "
                f"{self.removable:,}. {self._held_back}Ask for less, let more of the others go, or allow more "
                "`units` or layers."
            )
        return target

    @property
    def _where(self) -> str:
        return f"units {', '.join(self._wanted)} in {len(self.layers)} of {len(self.structure.layers)} layers"

    @property
    def _held_back(self) -> str:
        """Which option keeps most of what could go: the step of widths, where one unit would be much less."""
        name = "align_to" if self.config.align_to is not None else "round_to"
        value, step = getattr(self.config, name), max(map(self.step, self.groups), default=1)
        kept = sum(self.least(group) * group.cost for group in self.groups)
        if value is None or step == 1 or kept < self.removable:
            return ""
        return f"`{name}` is {value!r}, so that each MLP keeps at least {step} neurons: take a smaller one. "

    @property
    def gone(self) -> int:
        """Parameters that earlier steps have taken from what may be cut."""
        dense = self.dense.layers
        heads = ((dense[layer.index], layer.attention) for layer in self.attentions)
        widths = ((dense[g.layer].group(g.kind).size - g.size) * g.cost for g in self.groups)
        return sum(removed_by_pair(layer, left.kv_heads, left.rep) for layer, left in heads) + sum(widths)

    @property
    def removable(self) -> int:
        """Parameters of everything that may go."""
        heads = (max(removed_by_pair(layer, *o) for o in self.attention_options(layer)) for layer in self.attentions)
        return sum(heads) + sum((g.size - self.least(g)) * g.cost for g in self.groups)

    def step(self, group: Group) -> int:
        """Kept units of a group are multiples of this."""
        whole = self.dense.layers[group.layer].group(group.kind).whole
        return KINDS[group.kind].multiple(whole, self.config.round_to, self.config.align_to) * group.blocks

    def least(self, group: Group) -> int:
        """The fewest units that may be kept of a group."""
        step = self.step(group)
        return -(-group.least // step) * step

    def largest_width(self, group: Group) -> int:
        """The whole width, or the largest that is aligned."""
        multiple = self._multiple * group.blocks if KINDS[group.kind].aligns else 1
        return group.size // multiple * multiple

    def nearest_width(self, group: Group, wanted: float) -> int:
        """The number of units, of those that a group may keep, that is nearest to this."""
        step = self.step(group)
        return min(max(round(wanted / step) * step, self.least(group)), self.largest_width(group))

    def attention_options(self, layer: LayerStructure) -> list[tuple[int, int]]:
        """Allowed (KV groups, query heads in each) of a layer, those first that keep most."""
        size = layer.attention.head_dim if layer.attention else 0
        return [(kv, rep) for kv, rep in self._expressible(layer) if kv * rep * size % self._multiple == 0]

    def _expressible(self, layer: LayerStructure) -> list[tuple[int, int]]:
        """Pairs that a checkpoint can have, the whole layer first."""
        options = pairs(layer, self.config.units)
        return [o for o in options if o == options[0] or self.head_counts is None or o in self.head_counts]

    @property
    def ranked(self) -> list[Group]:
        """Groups whose units are ranked against those of other groups: all but query heads."""
        return self.groups + [layer.group(GROUPS) for layer in self.attentions]

    def next_count(self, group: Group, below: int) -> int | None:
        """The largest number of units less than this that a ranked group may keep, `None` if there is none."""
        if KINDS[group.kind].of_heads:
            options = self.attention_options(self.structure.layers[group.layer])
            return max((kv for kv, _ in options if kv < below), default=None)
        if below > self.largest_width(group):
            return self.largest_width(group)
        step = self.step(group)
        smaller = (below - 1) // step * step
        return smaller if smaller >= self.least(group) else None


def active_layers(config: PruningConfig, num_layers: int) -> list[int]:
    """Numbers of the layers that may be cut."""
    chosen = range(num_layers) if config.layers is None else config.layers
    chosen = set(chosen if config.layer_range is None else range(*config.layer_range))
    too_high = sorted(layer for layer in chosen if layer >= num_layers)
    if too_high:
        raise ConfigurationError(
            f"Layer {too_high[0]} is asked for, but the model has layers 0 to {num_layers - 1} "
            "(the end of `layer_range` is excluded)."
        )
    chosen &= set(range(config.protect_first, num_layers - config.protect_last))
    if not chosen:
        raise ConfigurationError("No layer is left to cut: check `layers`, `layer_range` and the protected layers.")
    return sorted(chosen)


def spread(total: int, parts: int) -> list[int]:
    """Splits a whole number evenly: `spread(5, 3) == [1, 2, 2]`, larger shares interleaved."""
    return [(i + 1) * total // parts - i * total // parts for i in range(parts)]
