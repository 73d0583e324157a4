"""How many heads and neurons stay in each layer: the budget, and one function for each way to give it out."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

import torch

from ..alignment import multiple_of
from ..config import PruningConfig
from ..errors import ConfigurationError, RatioError, UnsupportedModelError
from ..model.groups import Group, LayerStructure
from ..model.structure import ModelStructure
from ..plan import Dropped, is_dropped
from ..units import GROUPS, KINDS, LAYERS, NEURONS, QUERIES, WidthKind, kinds_of
from ..units.heads import counts_of, pair_of, pairs, removed_by_pair


Counts = dict[tuple[int, str], int]
_CAP = 2 / 3  # of a group; beyond it the quadratic model of the cost is too kind
_LATE = 0.7  # of a group; what the loss rises by beyond it is known less well


class Budget:
    """The groups that may be cut under a configuration.

    Args:
        head_counts: Pairs of (KV groups, query heads in each) that a checkpoint can express; `None` allows all.
        dropped: Layers and sublayers that go as a whole, so that nothing of them is left to cut.
        dense: The model before earlier steps, which ratios and rounding refer to; default `structure`.
    """

    def __init__(
        self, structure: ModelStructure, config: PruningConfig, head_counts: set[tuple[int, int]] | None = None,
        dropped: Dropped | None = None, dense: ModelStructure | None = None,
    ) -> None:  # fmt: skip
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

    def target(self, ratio: float | None, parameters: int | None = None) -> int:
        """What is still to go for a share of all parameters, or for so many; checks that so many can go."""
        total, most = self.dense.total_parameters, self.removable
        target = (ratio * total if parameters is None else parameters) - self.gone
        where = f"units {', '.join(self._wanted)} in {len(self.layers)} of {len(self.structure.layers)} layers"
        if target > most and parameters is None:
            # Rounded down, so that the ratio that is named can be asked for.
            largest = math.floor((self.gone + most) / total * 10_000) / 10_000
            raise RatioError(
                f"The ratio {ratio:.2%} cannot be reached: {where} allow at most {largest:.2%} of all "
                f"parameters. {self._held_back}Ask for less, or allow more `units` or layers."
            )
        if target > most:
            raise RatioError(
                f"{target:,} parameters are left to be taken from heads and neurons, but {where} allow at most "
                f"{most:,}. {self._held_back}Ask for less, let more of the others go, or allow more `units` or layers."
            )
        return round(target)

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
        multiple = KINDS[group.kind].multiple(whole, self.config.round_to, self.config.align_to)
        return math.lcm(multiple * group.blocks, group.step)

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


def allocate(
    budget: Budget, ratio: float | None, target: int | None = None,
    scores: dict[tuple[int, str], torch.Tensor] | None = None,
    sensitivity: dict[tuple[int, str], float] | None = None,
    rises: dict[tuple[int, str], torch.Tensor] | None = None,
) -> Counts:  # fmt: skip
    """Units to keep for every group that is cut, by the allocation that the configuration names.

    Args:
        ratio: Share of all parameters to remove; `None` with ratios by kind.
        target: Parameters to remove from heads and neurons, instead of a ratio.
        scores: Importance of every unit; for the global allocation.
        sensitivity: Cost of cutting each group, see `survey.measure_sensitivity`; for the search.
        rises: By what the loss rises as the units of a group go, one after the other; in the place of `scores`.

    Returns:
        `{(layer, kind): units to keep}`; for query heads the number in each KV group.

    Raises:
        RatioError: More was asked than can go; names the largest possible ratio.
    """
    config = budget.config
    if config.by_kind or config.allocation == "uniform":  # what is measured on the way changes nothing here
        budget = Budget(budget.dense, config, budget.head_counts, budget.dropped)
    if config.by_kind:
        return _by_kind(budget)
    target = budget.target(ratio, target)
    if target == 0 and not budget.gone:
        return {}
    if config.allocation == "uniform":
        return _uniform(budget, target)
    for kind in config.kinds(kinds_of(WidthKind)):
        if KINDS[kind].within is not None:
            raise ConfigurationError(
                f"allocation={config.allocation!r} does not split {KINDS[kind].label}; use units 'mlp_neurons' and "
                "'kv_groups', or 'uniform'."
            )
    if config.allocation == "search":
        return _search(budget, target, sensitivity)
    return _global(budget, target, scores if rises is None else rises, standardised=rises is None)


def _smaller(groups: Iterable[Group], counts: Counts) -> Counts:
    """The counts of groups that do not stay whole."""
    return {group.key: counts[group.key] for group in groups if counts[group.key] < group.size}


def allocate_stated(budget: Budget) -> Counts:
    """The widths that `keep` names, in every layer that may be cut.

    Raises:
        ConfigurationError: A layer has fewer units already, or no checkpoint can have so many.
    """
    counts: Counts = {}
    keep = budget.config.keep
    for layer in budget.attentions:
        shape = layer.attention
        kv_heads = keep.get(GROUPS, shape.kv_heads)
        heads = keep.get(QUERIES, kv_heads * shape.rep)
        options = budget.attention_options(layer)
        if (kv_heads, heads / kv_heads) not in options:
            can = ", ".join(f"{kv} x {rep}" for kv, rep in options)
            raise ConfigurationError(
                f"`keep` is {keep}, which leaves {heads} query heads in {kv_heads} KV groups of layer {layer.index}; "
                f"it has {shape.heads} in {shape.kv_heads}, and what can be kept is (groups x heads in each): {can}."
            )
        counts |= counts_of(layer, kv_heads, heads // kv_heads)
    wanted = {group.key: keep[group.kind] * (group.blocks if group.in_experts else 1) for group in budget.groups}
    for group in budget.groups:
        kind, left, said = KINDS[group.kind], wanted[group.key], f"`keep` is {keep}, but"
        if left > group.size:
            most = f"{group.whole} in each expert" if group.in_experts else group.size
            raise ConfigurationError(f"{said} layer {group.layer} has only {most} {kind.label}.")
        if kind.step > 1 and keep[group.kind] % kind.step:
            raise ConfigurationError(f"{said} {kind.label} can only be a multiple of {kind.step} in each.")
        if left % group.multiple or left < group.least:
            each = f", the same number in each of {group.blocks} parts" if group.blocks > 1 else ""
            each += f", a multiple of {group.step}" if group.step > 1 else ""
            raise ConfigurationError(
                f"{said} layer {group.layer} must keep at least {group.least} {kind.label}{each}."
            )
    return counts | _smaller(budget.groups, wanted)


def _by_kind(budget: Budget) -> Counts:
    """Cuts `attention_ratio` of the heads and `mlp_ratio` of the neurons of every layer that may be cut.

    The rounding is LLM-Pruner's: `dims - int(dims * (1 - ratio))` channels of the KV heads are to go, and as many
    whole KV groups as fit in them do; `int(width * (1 - ratio))` neurons stay (then rounded to `round_to`).
    """
    counts: Counts = {}
    ratio = budget.config.attention_ratio

    def left(heads: int, head_dim: int) -> int:
        dims = heads * head_dim
        return max(1, heads - (dims - int(dims * (1 - ratio))) // head_dim)

    for layer in budget.attentions if ratio else ():
        shape = layer.attention
        kv_heads, rep = shape.kv_heads, shape.rep
        if GROUPS in budget.config.units:
            kv_heads = left(kv_heads, shape.head_dim)
        else:
            rep = left(rep, shape.head_dim)
        # Where a checkpoint cannot express the count, the next larger one that it can; or the largest that is aligned.
        options = budget.attention_options(layer)
        larger = [o for o in options if o[0] >= kv_heads and o[1] >= rep]
        pair = min(larger, key=math.prod) if larger else max(options, key=math.prod)
        counts |= counts_of(layer, *pair)
    ratio = budget.config.mlp_ratio
    groups = [group for group in budget.groups if ratio and group.kind == NEURONS]
    return counts | _smaller(groups, {g.key: budget.nearest_width(g, int(g.size * (1 - ratio))) for g in groups})


def _uniform(budget: Budget, target: int) -> Counts:
    """Cuts every kind by the same share; heads are rounded to whole ones and finer units close what is missing.

    In the per-layer layout layers may differ by one rounding step, so that the target is met to within one unit.
    """
    heads = {layer.index: layer.attention.kv_heads * layer.group(GROUPS).cost for layer in budget.attentions}
    share = target / (_size(budget.groups) + sum(heads.values()))
    # Without finer units to close the gap, or where they cannot go so far, heads have to reach the target.
    kinds = [[g for g in budget.groups if g.kind == kind] for kind in dict.fromkeys(g.kind for g in budget.groups)]
    kinds.sort(key=lambda groups: -groups[0].cost)  # the largest units first
    limits = [sum((g.size - budget.least(g)) * g.cost for g in groups) for groups in kinds]
    counts, removed = {}, 0
    for number, layer in enumerate(budget.attentions):
        # Rounding errors of earlier layers are made up for by later ones, unless all layers must be alike.
        wanted = share * heads[layer.index]
        if budget.groups:
            wanted = max(wanted, (target - sum(limits)) / len(budget.attentions))
        if budget.config.layout == "per_layer":
            wanted = wanted * (number + 1) - removed
        pair = _nearest_pair(layer, budget.attention_options(layer), wanted)
        counts |= counts_of(layer, *pair)
        removed += removed_by_pair(layer, *pair)
    for number, groups in enumerate(kinds):
        left = max(0, target - removed)
        if number < len(kinds) - 1:
            left = min(left, max(share * _size(groups), left - sum(limits[number + 1 :])))
        widths = _widths(budget, groups, left)
        removed += sum((g.size - widths[g.key]) * g.cost for g in groups if g.key in widths)
        counts |= widths
    return counts


def _size(groups: list[Group]) -> int:
    return sum(group.size * group.cost for group in groups)


def _nearest_pair(layer: LayerStructure, options: Iterable[tuple[int, int]], wanted: float) -> tuple[int, int]:
    """The (KV groups, query heads in each) that remove as near as possible to so many parameters."""
    return min(options, key=lambda o: (abs(removed_by_pair(layer, *o) - wanted), -o[0]))


def _widths(budget: Budget, groups: list[Group], target: float) -> Counts:
    """Units to keep in groups of one kind; those that stay whole are left out.

    In the per-layer layout they differ by at most one step, and just enough are the smaller one.
    """
    if target <= 0 and all(budget.largest_width(group) == group.size for group in groups):
        return {}
    share = target / _size(groups)
    if budget.config.layout == "uniform":
        return _smaller(groups, {g.key: budget.nearest_width(g, g.size * (1 - share)) for g in groups})
    counts, removed, lower, saved = {}, 0, {}, 0
    for group in groups:
        step = budget.step(group)
        width = -int(-group.size * (1 - share) // step) * step  # up: less is removed than asked
        counts[group.key] = width = min(width, budget.largest_width(group))
        removed += (group.size - width) * group.cost
        lower[group.key] = max((width - 1) // step * step, budget.least(group))
        saved += (width - lower[group.key]) * group.cost
    mean = saved / len(groups)
    extra = min(max(0, round((target - removed) / mean)), len(groups)) if mean else 0
    for key, one_more in zip(lower, spread(extra, len(groups)), strict=True):
        if one_more:
            counts[key] = lower[key]
    return _smaller(groups, counts)


def _global(
    budget: Budget, target: int, scores: dict[tuple[int, str], torch.Tensor], standardised: bool
) -> Counts:  # fmt: skip
    """Removes the units with the lowest scores of the whole model until the target is met.

    Scores are standardised within each group, `(s - mean) / std`, as FLAP's AL-AM does (An et al., 2023,
    https://huggingface.co/papers/2312.11983), or else say by what the loss rises, and are taken for each parameter
    that goes: then all layers lose as much by their last unit, which is the least loss in all. Widths are
    then rounded, carrying the error from layer to layer.
    """
    removed = _lowest(budget, target, scores, standardised)
    counts: Counts = {}
    left = float(target)
    for layer in budget.attentions:
        group = layer.group(GROUPS)
        wanted = group.size - removed[group.key]
        counts[group.key] = min((kv for kv, _ in budget.attention_options(layer)), key=lambda n: abs(n - wanted))
        left -= (group.size - counts[group.key]) * group.cost
    # What heads took too much or too little is made up for here, evenly.
    error = left - sum(removed[g.key] * g.cost for g in budget.groups)
    for number, group in enumerate(budget.groups):
        ideal = group.size - removed[group.key] - error / (len(budget.groups) - number) / group.cost
        counts[group.key] = budget.nearest_width(group, ideal)
        error -= (group.size - removed[group.key] - counts[group.key]) * group.cost
    return _smaller(budget.ranked, counts)


def _lowest(
    budget: Budget, target: int, scores: dict[tuple[int, str], torch.Tensor], standardised: bool
) -> Counts:  # fmt: skip
    """How many units of each group are among the lowest of the model that hold the target together."""
    entries, groups = [], budget.ranked
    for number, group in enumerate(groups):
        score = scores[group.key].double()
        z = (score - score.mean()) / score.std().clamp_min(1e-30) if standardised else score / group.cost
        limit = group.size - (1 if KINDS[group.kind].of_heads else budget.least(group))
        # Only the lowest may go; the rest of the group is not offered. The last of a group go after all others.
        late = (torch.arange(limit) >= _LATE * group.size) & (not standardised)
        entries.append(torch.stack([z.sort().values[:limit], torch.full((limit,), number), late], dim=1))
    ranked = torch.cat(entries)
    ranked = ranked[ranked[:, 0].argsort(stable=True)]
    ranked = ranked[ranked[:, 2].argsort(stable=True)]
    costs = torch.tensor([float(group.cost) for group in groups])[ranked[:, 1].long()]
    count = int((costs.cumsum(0) - costs / 2 <= target).sum())
    going = ranked[:count, 1].long().bincount(minlength=len(groups))
    return {group.key: int(n) for group, n in zip(groups, going, strict=True)}


def _search(budget: Budget, target: int, sensitivity: dict[tuple[int, str], float]) -> Counts:
    """Minimises the sum of `a * share^2` over the groups under the budget, one rounding step after the other.

    The costs are convex, so that always taking the step with the least rise for each parameter it saves is optimal up
    to the last step. No group loses more than two thirds unless the ratio asks for it.
    """
    groups = budget.ranked
    counts: Counts = {g.key: budget.next_count(g, g.size + 1) for g in groups}
    for cap in (_CAP, 1.0):
        removed = sum((g.size - counts[g.key]) * g.cost for g in groups)
        _take_cheapest(budget, groups, counts, target - removed, sensitivity, cap)
    return _smaller(groups, counts)


def rounded(budget: Budget, counts: Counts, target: int, sensitivity: dict[tuple[int, str], float]) -> Counts:
    """Counts of all ranked groups that take less than `target`, with the cheapest steps taken that are still to go.

    Args:
        sensitivity: Cost of cutting each group, as for the search.
    """
    groups, counts = budget.ranked, dict(counts)
    left = target - sum((group.size - counts[group.key]) * group.cost for group in groups)
    _take_cheapest(budget, groups, counts, left, sensitivity, 1.0)
    return _smaller(groups, counts)


def _take_cheapest(budget: Budget, groups: list[Group], counts: Counts, left: float, sensitivity, cap: float) -> None:
    """Takes steps from the groups until nothing fits the rest of the budget better than leaving it."""
    heap: list[tuple[float, int, int]] = []

    def offer(number: int) -> None:
        group = groups[number]
        now = counts[group.key]
        smaller = budget.next_count(group, now)
        if smaller is None or group.size - smaller > cap * group.size:
            return
        before, after = group.size - now, group.size - smaller
        rise = sensitivity[group.key] * (after**2 - before**2) / group.size**2
        heapq.heappush(heap, (rise / ((now - smaller) * group.cost), number, smaller))

    for number in range(len(groups)):
        offer(number)
    while heap:
        _, number, smaller = heapq.heappop(heap)
        group = groups[number]
        saved = (counts[group.key] - smaller) * group.cost
        if saved / 2 > left:
            continue  # too large a step for what is left; a finer unit may still fit
        counts[group.key] = smaller
        left -= saved
        offer(number)


def next_counts(budget: Budget, goal: Counts, steps_left: int) -> Counts:
    """Counts after the next of the steps that are left: every group goes an equal part of its way to the goal.

    No group gets more units than it has or fewer than its goal, so that steps only tighten and the last one can
    reach the goal whatever the rounding of those before. Neurons are rounded up to whole steps, heads to the nearest
    number that a checkpoint can have.
    """
    if steps_left == 1:
        return goal
    counts: Counts = {}
    for layer in budget.attentions:
        now, (kv_heads, rep) = layer.attention, pair_of(layer, goal)
        between = [o for o in budget.attention_options(layer) if o[0] >= kv_heads and o[1] >= rep]
        wanted = removed_by_pair(layer, kv_heads, rep) / steps_left
        counts |= counts_of(layer, *_nearest_pair(layer, [(now.kv_heads, now.rep), *between], wanted))
    widths: Counts = {}
    for group in budget.groups:
        step, last = budget.step(group), goal.get(group.key, group.size)
        wanted = group.size - (group.size - last) / steps_left
        widths[group.key] = min(max(math.ceil(wanted / step) * step, last), group.size)
    return counts | _smaller(budget.groups, widths)
