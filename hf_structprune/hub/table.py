"""The columns of a model card's table: sizes from the plan, everything else from what was measured."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import ConfigurationError
from ..evaluation.formatting import label_of
from ..evaluation.results import EvaluationResult, Figure
from ..plan import PruningPlan


_PROTOCOL = "counted from the shapes of the weights"


def check_results(
    plan: PruningPlan,
    dense: EvaluationResult | None,
    result: EvaluationResult | None,
    pruned: EvaluationResult | None = None,
    recovery: dict[str, Any] | None = None,
) -> None:
    """Refuses results of other models: their parameters must be those of the plan, or of the recovery's report.

    Raises:
        ConfigurationError: They differ, or a side is of a model in the wrong state.
    """
    if dense is not None and dense.state != "dense":
        raise ConfigurationError(f"evaluation_results_dense.json is of a {dense.state} model ({dense.model}).")
    if pruned is not None and pruned.state != "pruned":
        raise ConfigurationError(f"evaluation_results_pruned.json is of a {pruned.state} model ({pruned.model}).")
    if result is not None and result.state in ("dense", *(("pruned",) if recovery else ())):
        raise ConfigurationError(f"evaluation_results.json is of a {result.state} model ({result.model}).")
    for which, side, expected in (
        ("_dense", dense, plan.parameters_before),
        ("_pruned", pruned, plan.parameters_after),
        ("", result, _weights(recovery).get("parameters", plan.parameters_after)),
    ):
        counted = None if side is None or side.state == "quantised" else side.value("efficiency/parameters")
        if counted is not None and counted != expected:
            raise ConfigurationError(
                f"evaluation_results{which}.json was measured on another model: {side.model} has {counted:,.0f} "
                f"parameters, the plan says {expected:,}. Measure again, or take the file away."
            )


def sides(
    plan: PruningPlan,
    dense: EvaluationResult | None,
    result: EvaluationResult | None,
    pruned: EvaluationResult | None = None,
    recovery: dict[str, Any] | None = None,
) -> list[EvaluationResult]:
    """The columns of the table: dense and pruned, or dense, pruned and recovered.

    Parameters, bytes and MACs are those of the plan where they were not measured on all sides; nothing else is added.

    Args:
        plan: What was pruned.
        dense: What was measured on the dense model.
        result: What was measured on this one.
        pruned: What was measured on the pruned model before its recovery.
        recovery: The report of the recovery.
    """
    found = [(dense, "dense", {}), (result, "recovered" if recovery else "pruned", _weights(recovery))]
    if recovery is not None or pruned is not None:
        found.insert(1, (pruned, "pruned", {}))
    columns = []
    for side, state, weights in found:
        side = side or EvaluationResult("", state)
        planned = _of_plan(plan, state != "dense", weights)
        own = {f.name: f for f in planned if not _measured(f.name, *(one for one, _, _ in found))}
        rest = {name: figure for name, figure in side.figures.items() if name not in own}
        columns.append(dataclasses.replace(side, figures={**own, **rest}))
    return columns


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


def _weights(recovery: dict[str, Any] | None) -> dict[str, int]:
    """Parameters and bytes of a recovered model: training may have untied its embeddings, or changed its dtype."""
    return (recovery or {}).get("weights") or {}


def _of_plan(plan: PruningPlan, after: bool, weights: dict[str, int]) -> list[Figure]:
    parameters, size, macs = (
        (plan.parameters_after, plan.bytes_after, plan.macs_after)
        if after
        else (plan.parameters_before, plan.bytes_before, plan.macs_before)
    )
    parameters, size = weights.get("parameters", parameters), weights.get("bytes", size)
    return [
        Figure("efficiency/parameters", parameters, higher_is_better=False, protocol=_PROTOCOL),
        Figure("efficiency/weight_bytes", size, "B", higher_is_better=False, protocol=_PROTOCOL),
        Figure("efficiency/macs", macs, "MAC", higher_is_better=False, protocol=f"{_PROTOCOL}, at 1 x 64 tokens"),
    ]
