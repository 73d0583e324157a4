"""What a plan took and how it was chosen, in words for the model card."""

from __future__ import annotations

from ..config import PruningConfig
from ..plan import PruningPlan
from ..units.kinds import DEPTH_UNITS, WIDTH_UNITS


_GONE = {"layers": "Decoder layers", "attention": "Attention of layers", "mlp": "MLP of layers"}


def what_went(config: PruningConfig, plan: PruningPlan) -> list[str]:
    """One line for each kind of unit: what went, and by which criterion.

    Args:
        config: How the model was pruned.
        plan: What went.
    """
    lines = []
    if config.kinds(WIDTH_UNITS):
        variant = f" (`{config.taylor}`)" if config.criterion == "taylor" else ""
        how = f"`{config.criterion}`{variant}"
        lines.append(
            f"Numbers of units: as in a plan that was given; units that it did not name: criterion {how}"
            if plan.given
            else f"Criterion: {how}, allocation: `{config.allocation}`"
        )
    by_criterion = config.chooses_depth(plan.ratio_requested)
    chosen = f"criterion `{config.depth_criterion}`" if by_criterion else "named in the configuration"
    chosen = "named in a plan that was given" if plan.given else chosen
    for kind in DEPTH_UNITS:
        if kind in plan.dropped:
            lines.append(f"{_GONE[kind]} gone, counted from 0: {', '.join(map(str, plan.dropped[kind]))} ({chosen})")
    if plan.hidden is not None:
        sizes = f"{plan.hidden.keep} instead of {plan.hidden.before}"
        by = "as in a plan that was given, " if plan.given else ""
        lines.append(f"Hidden size: {sizes} ({by}criterion `{config.hidden_criterion}`)")
    shares = {kind: count / plan.parameters_before for kind, count in plan.removed.items()}
    if len(shares) > 1:
        lines.append(f"Of all parameters: {', '.join(f'{kind} {share:.1%}' for kind, share in shares.items())}")
    return lines
