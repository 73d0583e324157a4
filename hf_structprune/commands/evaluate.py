"""`hf-structprune evaluate MODEL --baseline DENSE`: measures both in the same way and shows them side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import CONFIG_NAME
from ..errors import ConfigurationError
from ..evaluation.evaluator import EvaluationConfig, evaluate
from ..evaluation.results import RESULTS_NAME, EvaluationResult
from ..evaluation.table import ResultTable
from ..files.places import check_place
from ..plan import PLAN_NAME, PruningPlan
from .arguments import parse
from .common import ModelArguments, load_for_measuring, results_only_on_stdout, show
from .subjects import Subject, baseline_output, find_baseline, find_subject, save_baseline


@dataclass
class EvaluateArguments:
    """Options of `evaluate`.

    Args:
        baseline (`str`, *optional*): What MODEL is compared with, usually the dense model: a model to measure in the
            same way (id, folder or .gguf file), or the JSON of an earlier evaluation.
        suite (list of `str`, *optional*): Tasks that studies report together, besides `tasks`: `llm-pruner`,
            `study-a`, `leaderboard`.
        output (`str`, *optional*): JSON file for the results, saved after each step; an interrupted evaluation goes on
            from it. The baseline's go beside it, with `_dense` in the name. Default: `evaluation_results.json` in
            MODEL if that is a folder made by `prune`; else they are only printed.
        state (`str`, *optional*): `dense`, `pruned`, `recovered` or `quantised`. Default: what the files of MODEL say.
        base_model (`str`, *optional*): What MODEL was made from. Default: what its files say, or the baseline.
        pictures (`bool`): Draw pictures (PNG) into a folder `pictures` beside the results.
        overwrite (`bool`): Measure anew what other settings or another model have left in the output.
    """

    baseline: str | None = None
    suite: list[str] | None = None
    output: str | None = None
    state: str | None = None
    base_model: str | None = None
    pictures: bool = False
    overwrite: bool = False


def run(argv: Sequence[str]) -> None:
    """Measures, saves and prints."""
    description = "Measure MODEL: perplexity, tasks, size, memory, speed and sample texts."
    model, command, config = parse(argv, "evaluate", description, ModelArguments, EvaluateArguments, EvaluationConfig)
    config = _with_suites(config, command.suite)
    output = _output(model.model, command)
    with results_only_on_stdout():
        subject = find_subject(model, command.state)
        baseline = None if command.baseline is None else find_baseline(command.baseline, model)
        plan = _plan(model.model) if command.pictures else None
        config.load()  # what is wrong with texts and tasks shows before a model is loaded
        results = _measure(subject, baseline, config, command, output)
        if command.pictures:
            from ..evaluation.pictures import draw_all

            draw_all(results, output.parent / "pictures", plan)
    table = ResultTable(results)
    where = "Not saved: there was no --output." if output is None else f"Saved to {output}"
    show(model.json, {**table.to_dict(), "output": None if output is None else str(output)}, table.to_rich(), where)


def _with_suites(config: EvaluationConfig, suites: list[str] | None) -> EvaluationConfig:
    from ..evaluation.tasks import SUITES

    for name in suites or ():
        if name not in SUITES:
            raise ConfigurationError(f"`suite` is {name!r}; the suites are {', '.join(SUITES)}; tasks go to --tasks.")
    return dataclasses.replace(config, tasks=[*(suites or ()), *config.tasks])


def _output(model: str, command: EvaluateArguments) -> Path | None:
    if command.output is not None:
        check_place(command.output, file=True)
    output = None if command.output is None else Path(command.output)
    if output is None and (Path(model) / CONFIG_NAME).is_file():
        output = Path(model) / RESULTS_NAME
    if output is None and command.pictures:
        raise ConfigurationError("--pictures needs --output: they are saved beside the results.")
    if output is not None:
        check_place(output, file=True)
    return output


def _measure(
    subject: Subject,
    baseline: Subject | EvaluationResult | None,
    config: EvaluationConfig,
    command: EvaluateArguments,
    output: Path | None,
) -> list[EvaluationResult]:
    """The results, those of the baseline first; only one model is in memory at a time."""
    beside = None if output is None or baseline is None else baseline_output(output, baseline)
    if isinstance(baseline, EvaluationResult):
        if beside is not None:
            save_baseline(baseline, beside, command.overwrite)
        first = [baseline]
    elif baseline is not None:
        first = [_evaluate(baseline, config, beside, baseline.base_model, command.overwrite)]
    else:
        first = []
    base = command.base_model or subject.base_model or (first[0].model if first else None)
    return [*first, _evaluate(subject, config, output, base, command.overwrite)]


def _evaluate(
    subject: Subject, config: EvaluationConfig, output: Path | None, base_model: str | None, overwrite: bool
) -> EvaluationResult:
    model, tokenizer = load_for_measuring(subject.arguments)
    folder = Path(subject.arguments.model)
    name = folder.absolute().name if folder.is_dir() else subject.arguments.model  # results are published: no paths
    return evaluate(
        model, tokenizer, config, name=name, state=subject.state, base_model=base_model,
        output=output, overwrite=overwrite,
    )  # fmt: skip


def _plan(model: str) -> PruningPlan | None:
    """The plan of a checkpoint, for the picture of its widths."""
    return PruningPlan.load(model) if (Path(model) / PLAN_NAME).is_file() else None
