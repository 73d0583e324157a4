"""The before/after table of a model card: sizes from the plan, everything else from what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigurationError
from ..evaluation.results import EvaluationResult, Figure
from ..plan import PruningPlan
from .benchmarks import TASKS, TEXTS, limit_of, shots_of


NOT_MEASURED = "–"
# Figures that the plan knows as well: name, value before, value after.
_PLANNED = {
    "efficiency/parameters": ("parameters_before", "parameters_after"),
    "efficiency/weight_bytes": ("bytes_before", "bytes_after"),
    "efficiency/macs": ("macs_before", "macs_after"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table, as text."""

    name: str
    dense: str
    pruned: str
    ratio: str


def check_results(plan: PruningPlan, dense: EvaluationResult | None, result: EvaluationResult | None) -> None:
    """Refuses results of other models: their parameters must be those of the plan.

    Raises:
        ConfigurationError: They differ, or the dense side is not that of a dense model.
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


def rows(plan: PruningPlan, dense: EvaluationResult | None, result: EvaluationResult | None) -> list[Row]:
    """The table: what was measured on neither side has no row.

    Args:
        plan: Gives parameters, bytes and MACs.
        dense: What was measured on the dense model.
        result: What was measured on this one.
    """
    table = [
        _row("parameters", plan.parameters_before, plan.parameters_after, "{:,.0f}"),
        _row("weights, MB", plan.bytes_before / 1e6, plan.bytes_after / 1e6, "{:,.1f}"),
        _row("GMACs, 1 x 64 tokens", plan.macs_before / 1e9, plan.macs_after / 1e9, "{:,.3f}"),
    ]
    before, after = dense.figures if dense else {}, result.figures if result else {}
    for name in dict.fromkeys([*before, *after]):
        figures = (before.get(name), after.get(name))
        if not _is_planned(name, figures, plan):
            table.append(_figure_row(figures, (dense, result)))
    return table


def protocols(*results: EvaluationResult | None) -> dict[str, list[str]]:
    """How things were measured: names of figures by the words that describe it, each once."""
    found: dict[str, list[str]] = {}
    for result in filter(None, results):
        for figure in result.figures.values():
            if figure.protocol and _label(figure) not in found.setdefault(figure.protocol, []):
                found[figure.protocol].append(_label(figure))
    return found


def _is_planned(name: str, figures: tuple[Figure | None, Figure | None], plan: PruningPlan) -> bool:
    values = [getattr(plan, attribute) for attribute in _PLANNED.get(name, ())]
    return bool(values) and all(f is None or round(f.value) == value for f, value in zip(figures, values, strict=True))


def _figure_row(figures: tuple[Figure | None, Figure | None], results: tuple) -> Row:
    known, of = next((f, r) for f, r in zip(figures, results, strict=True) if f is not None)
    arrow = {True: " ↑", False: " ↓", None: ""}[known.higher_is_better]
    scale, unit = _scale(known, max(abs(f.value) for f in figures if f is not None))
    cells = [NOT_MEASURED if f is None else _cell(f, scale) for f in figures]
    if None in figures or not all(math.isfinite(f.value) for f in figures) or not figures[0].value:
        ratio = NOT_MEASURED
    else:
        ratio = f"{figures[1].value / figures[0].value:.3f}"
    return Row(_label(known, of) + (f", {unit}" if unit else "") + arrow, *cells, ratio)


def _row(name: str, before: float, after: float, form: str) -> Row:
    return Row(name, form.format(before), form.format(after), f"{after / before:.3f}")


def _label(figure: Figure, result: EvaluationResult | None = None) -> str:
    kind, _, rest = figure.name.partition("/")
    words = kind.replace("_", " ")
    if kind == "efficiency":
        return rest.replace("_", " ")
    if kind != "tasks":
        return f"{words}, {TEXTS[rest].name if rest in TEXTS else rest}"
    task, _, metric = rest.rpartition("/")
    label = f"{TASKS[task].name if task in TASKS else task}, {metric}"
    if result is None:
        return label
    shots, limit = shots_of(figure, result), limit_of(figure, result)
    label += f", {shots}-shot" if shots else ""
    return label + (f", limit {limit}" if limit is not None else "")


def _scale(figure: Figure, largest: float) -> tuple[float, str]:
    """What values are divided by, and the unit that is left."""
    names = {"B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")), "MAC": ((1e9, "GMACs"), (1e6, "MMACs"))}
    for size, name in names.get(figure.unit, ()):
        if math.isfinite(largest) and largest >= size:
            return size, name
    return 1.0, figure.unit


def _cell(figure: Figure, scale: float) -> str:
    if not math.isfinite(figure.value):
        return "∞"
    form = "{:.4f}" if figure.name.startswith("tasks/") else "{:,.2f}"
    if scale == 1.0 and float(figure.value).is_integer():
        form = "{:,.0f}"
    elif 0 < abs(figure.value / scale) < 0.1 and not figure.name.startswith("tasks/"):
        form = "{:.4g}"
    text = form.format(figure.value / scale)
    return text if figure.stderr is None else f"{text} ± {form.format(figure.stderr / scale)}"
