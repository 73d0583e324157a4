"""Arithmetic that all allocations share: which groups may be cut, how far, and what that removes."""

from __future__ import annotations

import math

from ..alignment import multiple_of
from ..checks import Ratio, checked
from ..config import PruningConfig
from ..errors import ConfigurationError, RatioError, UnsupportedModelError
from ..model.groups import Group, LayerStructure
from ..model.structure import ModelStructure
from ..plan import Dropped, is_dropped
from ..units import KINDS, WidthKind, kinds_of
from ..units.depth import LAYERS
from ..units.heads import GROUPS, counts_of, pair_of, pairs, removed_by_pair


Counts = dict[tuple[int, str], int]


class Budget:
    """The groups that may be cut under a configuration.

    Args:
        structure: Coupled groups of the model.
        config: What may be cut.
        head_counts: Pairs of (KV groups, query heads in each) that a checkpoint can express; `None` allows all.
        dropped: Layers and sublayers that go as a whole.
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
        self.dense = dense or structure
        dropped = dropped or {}
        left = [i for i in active_layers(config, len(structure.layers)) if i not in dropped.get(LAYERS, ())]
        self.layers = [structure.layers[index] for index in left]
        self.attentions = [
            layer
            for layer in self.layers
            if layer.attention and not is_dropped(dropped, layer.index, GROUPS) and self._expressible(layer)[1:]
        ]
        self.groups = [
            group
            for layer in self.layers
            for group in layer.groups
            if group.kind in config.units and not KINDS[group.kind].of_heads
            and not is_dropped(dropped, layer.index, group.kind)
        ]  # fmt: skip
        available = {group.kind for layer in structure.layers for group in layer.groups}
        wanted = config.kinds(kinds_of(WidthKind))
        if not available & set(wanted):
            raise UnsupportedModelError(
                f"`units` is {config.units}, but the layers that may be cut have {sorted(available) or 'none'}. "
                f"{'; '.join(structure.notes)}"
            )
        if config.align_to is not None:
            self._check_alignment()

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

    def target(self, ratio: float | None) -> int:
        """Parameters that are still to go for a share of all parameters; checks that so many can go."""
        ratio = checked("ratio", ratio, Ratio, RatioError)
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
        kinds = ", ".join(self.config.kinds(kinds_of(WidthKind)))
        return f"units {kinds} in {len(self.layers)} of {len(self.structure.layers)} layers"

    @property
    def _held_back(self) -> str:
        """Which option keeps most of what could go: the step of widths, where one unit would be much less."""
        kept = sum(self.smallest_width(group) * group.cost for group in self.groups)
        step = max((self.step(group) for group in self.groups), default=1)
        if step == 1 or kept < self.removable:
            return ""
        name = "align_to" if self.config.align_to is not None else "round_to"
        value = getattr(self.config, name)
        if value is None:
            return ""
        return f"`{name}` is {value!r}, so that each MLP keeps at least {step} neurons: take a smaller one. "

    @property
    def gone(self) -> int:
        """Parameters that earlier steps have taken from what may be cut."""
        dense = self.dense.layers
        heads = sum(
            removed_by_pair(dense[layer.index], layer.attention.kv_heads, layer.attention.rep)
            for layer in self.attentions
        )
        widths = ((dense[g.layer].group(g.kind).size - g.size) * g.cost for g in self.groups)
        return heads + sum(widths)

    @property
    def removable(self) -> int:
        """Parameters of everything that may go."""
        heads = sum(
            max(removed_by_pair(layer, *o) for o in self.attention_options(layer)) for layer in self.attentions
        )
        return heads + sum((g.size - self.smallest_width(g)) * g.cost for g in self.groups)

    def step(self, group: Group) -> int:
        """Kept units of a group are multiples of this."""
        whole = self.dense.layers[group.layer].group(group.kind).size
        return KINDS[group.kind].multiple(whole, self.config.round_to, self.config.align_to)

    def smallest_width(self, group: Group) -> int:
        return self.step(group)

    def largest_width(self, group: Group) -> int:
        """The whole width, or the largest that is aligned."""
        multiple = self._multiple if KINDS[group.kind].aligns else 1
        return group.size // multiple * multiple

    @property
    def _multiple(self) -> int:
        return multiple_of(self.config.align_to)

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
        return smaller if smaller >= self.smallest_width(group) else None

    def refuse_parts(self, allocation: str) -> None:
        """Refuses units within others, which some allocations do not split.

        Raises:
            ConfigurationError: Names them.
        """
        for kind in self.config.kinds(kinds_of(WidthKind)):
            if KINDS[kind].within is not None:
                raise ConfigurationError(
                    f"allocation={allocation!r} does not split {KINDS[kind].label}; use units 'mlp_neurons' and "
                    "'kv_groups', or 'uniform'."
                )


def active_layers(config: PruningConfig, num_layers: int) -> list[int]:
    """Numbers of the layers that may be cut."""
    chosen = set(range(num_layers))
    if config.layers is not None:
        chosen = set(config.layers)
    if config.layer_range is not None:
        chosen = set(range(*config.layer_range))
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
    """Splits a whole number evenly: `spread(5, 3) == [2, 1, 2]`, larger shares interleaved."""
    return [(i + 1) * total // parts - i * total // parts for i in range(parts)]


def next_counts(budget: Budget, goal: Counts, steps_left: int) -> Counts:
    """Counts after the next of the steps that are left: every group goes an equal part of its way to the goal.

    No group gets more units than it has or fewer than its goal, so that steps only tighten and the last one can
    reach the goal whatever the rounding of those before. Neurons are rounded up to whole steps, heads to the nearest
    number that a checkpoint can have.

    Args:
        budget: The groups as they are now.
        goal: Units to keep in the end; groups that are not named stay as they are.
        steps_left: The next step included.

    Returns:
        `{(layer, kind): units to keep}`; for query heads the number in each KV group.
    """
    if steps_left == 1:
        return goal
    counts: Counts = {}
    for layer in budget.attentions:
        counts.update(counts_of(layer, *_heads(budget, layer, goal, steps_left)))
    widths = {
        (group.layer, group.kind): (group.size, _width(budget, group, goal, steps_left)) for group in budget.groups
    }
    return counts | {key: width for key, (whole, width) in widths.items() if width < whole}


def _width(budget: Budget, group: Group, goal: Counts, steps_left: int) -> int:
    whole, step = group.size, budget.step(group)
    last = goal.get((group.layer, group.kind), whole)
    wanted = whole - (whole - last) / steps_left
    return min(max(math.ceil(wanted / step) * step, last), whole)


def _heads(budget: Budget, layer: LayerStructure, goal: Counts, steps_left: int) -> tuple[int, int]:
    shape = layer.attention
    kv_heads, rep = pair_of(layer, goal)
    between = [o for o in budget.attention_options(layer) if o[0] >= kv_heads and o[1] >= rep]
    wanted = removed_by_pair(layer, kv_heads, rep) / steps_left
    return min(
        [(shape.kv_heads, shape.rep), *between],
        key=lambda o: (abs(removed_by_pair(layer, *o) - wanted), -o[0]),
    )
