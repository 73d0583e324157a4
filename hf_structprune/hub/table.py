"""The two sides of a model card's table: sizes from the plan, everything else from what was measured."""

from __future__ import annotations

import dataclasses

from ..errors import ConfigurationError
from ..evaluation.formatting import label_of
from ..evaluation.results import EvaluationResult, Figure
from ..plan import PruningPlan


_PROTOCOL = "counted from the shapes of the weights"


def check_results(plan: PruningPlan, dense: EvaluationResult | None, result: EvaluationResult | None) -> None:
    """Refuses results of other models: their parameters must be those of the plan.

    Raises:
        ConfigurationError: They differ, or a side is of a model in the wrong state.
    """
    if dense is not None and dense.state != "dense":
        raise ConfigurationError(f"evaluation_results_dense.json is of a {dense.state} model ({dense.model}).")
    if result is not None and result.state == "dense":
        raise ConfigurationError(f"evaluation_results.json is of a dense model ({result.model}).")
    for which, side, expected in (("_dense", dense, plan.parameters_before), ("", result, plan.parameters_after)):
        counted = None if side is None or side.state == "quantised" else side.value("efficiency/parameters")
        if counted is not None and counted != expected:
            raise ConfigurationError(
                f"evaluation_results{which}.json was measured on another model: {side.model} has {counted:,.0f} "
                f"parameters, the plan says {expected:,}. Measure again, or take the file away."
            )


def sides(
    plan: PruningPlan, dense: EvaluationResult | None, result: EvaluationResult | None
) -> tuple[EvaluationResult, EvaluationResult]:
    """Both columns of the table.

    Parameters, bytes and MACs are those of the plan where they were not measured on both sides; nothing else is added.

    Args:
        plan: What was pruned.
        dense: What was measured on the dense model.
        result: What was measured on this one.
    """
    columns = []
    for side, state, after in ((dense, "dense", False), (result, "pruned", True)):
        side = side or EvaluationResult("", state)
        own = {f.name: f for f in _of_plan(plan, after) if not _measured(f.name, dense, result)}
        rest = {name: figure for name, figure in side.figures.items() if name not in own}
        columns.append(dataclasses.replace(side, figures={**own, **rest}))
    return columns[0], columns[1]


def protocols(*results: EvaluationResult | None) -> dict[str, list[str]]:
    """How things were measured: names of figures by the words that describe it, each once."""
    found: dict[str, list[str]] = {}
    for result in filter(None, results):
        for figure in result.figures.values():
            label = label_of(figure).rstrip(" ↑↓")
            words = ", of ".join(filter(None, (figure.protocol, figure.details.get("source"))))
            if figure.protocol and label not in found.setdefault(words, []):
                found[words].append(label)
    return found


def _measured(name: str, *results: EvaluationResult | None) -> bool:
    return all(result is not None and name in result.figures for result in results)


def _of_plan(plan: PruningPlan, after: bool) -> list[Figure]:
    parameters, size, macs = (
        (plan.parameters_after, plan.bytes_after, plan.macs_after)
        if after
        else (plan.parameters_before, plan.bytes_before, plan.macs_before)
    )
    return [
        Figure("efficiency/parameters", parameters, higher_is_better=False, protocol=_PROTOCOL),
        Figure("efficiency/weight_bytes", size, "B", higher_is_better=False, protocol=_PROTOCOL),
        Figure("efficiency/macs", macs, "MAC", higher_is_better=False, protocol=f"{_PROTOCOL}, at 1 x 64 tokens"),
    ]
