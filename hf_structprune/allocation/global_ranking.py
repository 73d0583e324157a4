"""Global allocation: one ranking over all groups of the model."""

from __future__ import annotations

import torch

from ..errors import ConfigurationError
from .budget import Budget, Counts


def allocate_global(budget: Budget, target: int, scores: dict[tuple[int, str], torch.Tensor] | None) -> Counts:
    """Removes the units with the lowest standardised scores of the whole model until the target is met.

    Scores are standardised within each group, `(s - mean) / std`, as FLAP's AL-AM does (An et al., 2023,
    https://huggingface.co/papers/2312.11983); a unit costs the parameters that go with it. Widths are then rounded,
    carrying the rounding error from layer to layer so that the total stays.

    Args:
        budget: The groups that may be cut.
        target: Parameters to remove.
        scores: Importance of every unit by `(layer, kind)`.
    """
    groups = budget.mlps + [layer.group("kv_groups") for layer in budget.attentions]
    if "query_heads" in budget.config.units:
        raise ConfigurationError(
            "allocation='global' does not split query heads; use units 'mlp_neurons' and 'kv_groups', or 'uniform'."
        )
    if scores is None:
        raise ConfigurationError("allocation='global' needs the scores of all units.")
    removed = _lowest(budget, groups, target, scores)
    return _rounded(budget, groups, target, removed)


def _lowest(budget: Budget, groups, target: int, scores) -> dict[tuple[int, str], int]:
    """Units of each group among the lowest of the model."""
    limits = {}
    entries = []
    for number, group in enumerate(groups):
        score = scores[group.layer, group.kind].double()
        z = (score - score.mean()) / score.std().clamp_min(1e-30)
        smallest = budget.smallest_width(group) if group.kind == "mlp_neurons" else 1
        limits[number] = group.num_units - smallest
        # Only the lowest may go; the rest of the group is not offered.
        entries.append(torch.stack([z.sort().values[: limits[number]], torch.full((limits[number],), number)], dim=1))
    ranked = torch.cat(entries)
    ranked = ranked[ranked[:, 0].argsort(stable=True)]
    costs = torch.tensor([float(group.unit_parameters) for group in groups])[ranked[:, 1].long()]
    total = costs.cumsum(0)
    count = int((total - costs / 2 <= target).sum())
    going = ranked[:count, 1].long().bincount(minlength=len(groups))
    return {(g.layer, g.kind): int(n) for g, n in zip(groups, going, strict=True)}


def _rounded(budget: Budget, groups, target: int, removed: dict[tuple[int, str], int]) -> Counts:
    counts: Counts = {}
    carried = float(target)
    for group in groups:
        if group.kind != "mlp_neurons":
            layer = budget.structure.layers[group.layer]
            wanted = group.num_units - removed[group.layer, group.kind]
            kv_heads = min((o[0] for o in budget.attention_options(layer)), key=lambda n: abs(n - wanted))
            counts[group.layer, group.kind] = kv_heads
            carried -= (group.num_units - kv_heads) * group.unit_parameters
    mlps = [g for g in groups if g.kind == "mlp_neurons"]
    exact = sum(removed[g.layer, g.kind] * g.unit_parameters for g in mlps)
    error = carried - exact  # what heads took too much or too little is made up for here, evenly
    for number, group in enumerate(mlps):
        step = budget.step(group)
        share = error / (len(mlps) - number)
        ideal = group.num_units - removed[group.layer, group.kind] - share / group.unit_parameters
        width = min(max(round(ideal / step) * step, budget.smallest_width(group)), budget.largest_width(group))
        counts[group.layer, group.kind] = width
        error -= (group.num_units - removed[group.layer, group.kind] - width) * group.unit_parameters
    whole = {(g.layer, g.kind): g.num_units for g in groups}
    return {key: count for key, count in counts.items() if count < whole[key]}
