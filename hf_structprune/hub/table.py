"""The columns of a model card's table: sizes from the plan, everything else from what was measured."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..evaluation.results import EvaluationResult, Figure
from ..evaluation.table import label_of


if TYPE_CHECKING:
    from .contents import Contents

_PROTOCOL = "counted from the shapes of the weights"
_PACKED = "of the quantised model, the bytes of its files"


def check_results(contents: Contents) -> None:
    """Refuses results of other models: their parameters must be those of the plan, or of a later report.

    Those of a quantised model are counted as if they were unpacked.

    Raises:
        ConfigurationError: They differ, or a side is of a model in the wrong state.
    """
    for suffix, side, state in (
        ("_dense", contents.dense, "dense"),
        ("_pruned", contents.pruned, "pruned"),
        ("_recovered", contents.recovered, "recovered"),
        ("", contents.result, contents.state),
    ):
        if side is None:
            continue
        if side.state != state:
            raise ConfigurationError(f"evaluation_results{suffix}.json is of a {side.state} model ({side.model}).")
        counted, expected = side.value("efficiency/parameters"), weights_of(contents, state)[0]
        if counted is not None and counted != expected:
            raise ConfigurationError(
                f"evaluation_results{suffix}.json was measured on another model: {side.model} has {counted:,.0f} "
                f"parameters, the plan says {expected:,}. Measure again, or take the file away."
            )


def sides(contents: Contents) -> list[EvaluationResult]:
    """The columns of the table: the states that a checkpoint went through, from dense to its own.

    Parameters, bytes and MACs are those of the plan and the reports where they were not measured on all sides;
    nothing else is added.
    """
    found = contents.measured
    columns = []
    for state, side in found.items():
        side = side or EvaluationResult("", state)
        own = {f.name: f for f in _counted(contents, state) if not _measured(f.name, *found.values())}
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


def weights_of(contents: Contents, state: str) -> tuple[int, int]:
    """Parameters and bytes of a state: training may have untied embeddings or changed the dtype, quantising packs."""
    plan = contents.plan
    if state == "dense":
        return plan.parameters_before, plan.bytes_before
    parameters, size = plan.parameters_after, plan.bytes_after
    reports = {
        "pruned": (),
        "recovered": (contents.recovery,),
        "quantised": (contents.recovery, contents.quantization),
    }
    for report in reports[state]:
        weights = (report or {}).get("weights") or {}
        parameters, size = weights.get("parameters", parameters), weights.get("bytes", size)
    return parameters, size


def _counted(contents: Contents, state: str) -> list[Figure]:
    (parameters, size), plan = weights_of(contents, state), contents.plan
    macs = plan.macs_before if state == "dense" else plan.macs_after
    how = _PROTOCOL if contents.quantization is None else f"{_PROTOCOL}; {_PACKED}"
    return [
        Figure("efficiency/parameters", parameters, higher_is_better=False, protocol=_PROTOCOL),
        Figure("efficiency/weight_bytes", size, "B", higher_is_better=False, protocol=how),
        Figure("efficiency/macs", macs, "MAC", higher_is_better=False, protocol=f"{_PROTOCOL}, at 1 x 64 tokens"),
    ]
