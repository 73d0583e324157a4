"""Table and curves of several recoveries of one pruned model, from the files in their folders.

    python benchmarks/recovery_table.py FOLDER ... --picture model_cards/recovery-20.png

Each folder holds `recovery.json` and the results of the dense, the pruned and the recovered model. "% back" is the
share of the lost log-perplexity, `(log pruned - log now) / (log pruned - log dense)`; for tasks, a mark says that the
difference from the pruned model is more than chance, judged as in the package's tables: by pairs of documents where
the results hold them, else by the standard errors.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from hf_structprune.evaluation.pictures import COLOURS, GREY, legend_below, make_panels, save
from hf_structprune.evaluation.results import EvaluationResult, Figure
from hf_structprune.evaluation.table import compare_figures


TASKS = {
    "openbookqa": "acc_norm",
    "winogrande": "acc",
    "hellaswag": "acc_norm",
    "arc_challenge": "acc_norm",
    "boolq": "acc",
}


def read(folder: Path) -> tuple[dict, list[EvaluationResult]]:
    """The report and the results: dense, pruned, recovered."""
    report = json.loads((folder / "recovery.json").read_text(encoding="utf-8"))
    names = ("evaluation_results_dense.json", "evaluation_results_pruned.json", "evaluation_results.json")
    return report, [EvaluationResult.load(folder / name) for name in names]


def name_of(report: dict) -> str:
    """What was done, in two words."""
    config = report["configuration"]
    weights = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}
    if config["method"] != "distill":
        return f"{weights[config['method']]}, labels"
    return f"{weights[config['weights']]}, distilled"


def perplexity_cell(name: str, result: EvaluationResult, dense: EvaluationResult, pruned: EvaluationResult) -> str:
    """`26.1 (41 %)`, the share only for a recovered model."""
    now, start, end = (r.value(name) for r in (result, pruned, dense))
    if result.state != "recovered":
        return f"{now:.1f}"
    return f"{now:.1f} ({100 * math.log(start / now) / math.log(start / end):.0f} %)"


def task_cell(name: str, result: EvaluationResult, pruned: EvaluationResult) -> str:
    """`33.0 ± 4.7`, with a mark where it differs from the pruned model."""
    figure = result.figures[name]
    comparison = compare_figures(figure, pruned.figures[name])
    mark = "" if comparison is None or not comparison.differs else " *"
    return f"{100 * figure.value:.0f} ± {100 * figure.stderr:.1f}{mark}"


def task_figure(result: EvaluationResult, task: str, metric: str) -> Figure:
    """The figure of a task, also of a local copy of it."""
    return next(f for n, f in result.figures.items() if n.startswith(f"tasks/{task}") and n.endswith(f"/{metric}"))


def table(reports: list[dict], columns: list[list[EvaluationResult]]) -> str:
    """Markdown."""
    dense, pruned = columns[0][:2]
    results = [dense, pruned, *(column[2] for column in columns)]
    rows = [["", "dense", "pruned", *map(name_of, reports)], ["---", *["---:"] * len(results)]]
    rows.append(["tokens trained on", "", "", *(f"{r['training']['tokens']:,}" for r in reports)])
    rows.append(["minutes", "", "", *(f"{r['training']['seconds'] / 60:.0f}" for r in reports)])
    for name in (name for name in dense.figures if name.startswith("perplexity/")):
        cells = [perplexity_cell(name, result, dense, pruned) for result in results]
        rows.append([f"perplexity, {name.partition('/')[2]}", *cells])
    for task, metric in TASKS.items():
        name = task_figure(dense, task, metric).name
        rows.append([f"{task}, {metric}, %", *(task_cell(name, result, pruned) for result in results)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(reports: list[dict], path: Path) -> None:
    """The share that is back against the tokens trained on."""
    figure, (axis,) = make_panels(1, 3.4, "Recovery, measured on text that was not trained on")
    for report, colour in zip(reports, COLOURS, strict=False):
        curve, training = report["curve"], report["training"]
        lost = curve["pruned"] - curve["dense"]
        per_step = training["tokens"] / training["steps"] / 1000
        points = [(0, 0.0)] + [
            (p["step"] * per_step, 100 * (curve["pruned"] - p["log_perplexity"]) / lost) for p in curve["points"]
        ]
        axis.plot(
            *zip(*points, strict=True), color=colour, linewidth=2, marker="o", markersize=4, label=name_of(report)
        )
    axis.axhline(0, color=GREY, linewidth=1)
    axis.set_xlabel("thousand tokens trained on")
    axis.set_ylabel("% of the lost log-perplexity back")
    legend_below(axis)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    pairs = [read(folder) for folder in arguments.folders]
    print(table([report for report, _ in pairs], [results for _, results in pairs]))
    if arguments.picture is not None:
        draw([report for report, _ in pairs], arguments.picture)


if __name__ == "__main__":
    main()
