"""`hf-structprune benchmark MODEL --baseline DENSE`: size, memory and speed, measured in turns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from ..checks import Count
from ..errors import ConfigurationError
from ..evaluation.efficiency import EfficiencyConfig, measure_efficiency, median_figure, time_loading
from ..evaluation.generation import question_protocol
from ..evaluation.results import EvaluationResult, Figure, describe_environment
from ..evaluation.table import ResultTable
from ..files.places import check_place
from .arguments import parse
from .cli import results_only_on_stdout, show
from .models import (
    ModelArguments,
    Subject,
    baseline_output,
    find_baseline,
    find_subject,
    load_for_measuring,
    save_baseline,
)


@dataclass
class BenchmarkArguments:
    """Options of `benchmark`.

    Args:
        baseline (`str`, *optional*): What MODEL is compared with, usually the dense model: a model (id, folder or
            .gguf file), or the JSON of an earlier benchmark.
        rounds (`int`): How often each model is loaded and timed. With a baseline the two take turns, so that what else
            the machine does meets both.
        questions (`str`, *optional*): Folder for the answers to five questions, timed: `questions.csv`, and
            `questions_baseline.csv` for the baseline.
        output (`str`, *optional*): JSON file for the results; the baseline's go beside it, with `_dense` in the name.
        state (`str`, *optional*): `dense`, `pruned`, `recovered` or `quantised`. Default: what the files of MODEL say.
        overwrite (`bool`): Write over results that are there.
    """

    baseline: str | None = None
    rounds: Count = 3
    questions: str | None = None
    output: str | None = None
    state: str | None = None
    overwrite: bool = False


def benchmark_command(argv: Sequence[str]) -> None:
    """Measures, saves and prints."""
    description = "Measure size, memory and speed of MODEL."
    model, command, config = parse(
        argv, "benchmark", description, ModelArguments, BenchmarkArguments, EfficiencyConfig
    )
    output = None if command.output is None else Path(command.output)
    _check(command.output, command.overwrite)
    if command.questions is not None:
        check_place(command.questions)
    with results_only_on_stdout():
        subject = find_subject(model, command.state)
        baseline = None if command.baseline is None else find_baseline(command.baseline, model)
        beside = None if output is None or baseline is None else baseline_output(output, baseline)
        subjects = [*([baseline] if isinstance(baseline, Subject) else []), subject]
        if len(subjects) > 1:
            _check(beside, command.overwrite)
        results = take_turns(subjects, config, command.rounds)
        if command.questions is not None:
            _ask(subjects, results, Path(command.questions))
        if isinstance(baseline, EvaluationResult):
            results.insert(0, baseline)
        if output is not None:
            results[-1].save(output)
        if beside is not None:
            save_baseline(results[0], beside, command.overwrite)
    table = ResultTable(results)
    saved = [] if output is None else [f"Saved to {output}"]
    show(model.json, {**table.to_dict(), "output": command.output}, table.to_rich(), *saved)


def _check(path: str | Path | None, overwrite: bool) -> None:
    if path is None:
        return
    check_place(path, file=True)
    if Path(path).exists() and not overwrite:
        raise ConfigurationError(f"{path} is there; choose another --output or say --overwrite.")


def take_turns_apart(subjects: list[Subject], config: EfficiencyConfig, rounds: int) -> list[EvaluationResult]:
    """`take_turns` in a process of its own: what earlier work has left in memory is in no figure."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(take_turns, subjects, config, rounds).result()


def take_turns(subjects: list[Subject], config: EfficiencyConfig, rounds: int) -> list[EvaluationResult]:
    """Size, memory and speed of each model, loaded and timed one after the other so many rounds.

    Only one of them is in memory at a time.
    """
    figures: list[list[list[Figure]]] = [[] for _ in subjects]
    results = []
    for number in range(rounds if config.speed else 1):
        for subject, found in zip(subjects, figures, strict=True):
            model, _ = load_for_measuring(subject.arguments)
            found.append(measure_efficiency(model, config))
            if number == 0:
                name, state = subject.arguments.model, subject.state
                result = EvaluationResult(name, state, subject.base_model)
                result.environment = describe_environment(model.device)
                result.settings = json.loads(json.dumps({**dataclasses.asdict(config), "rounds": rounds}))
                results.append(result)
            del model
    for subject, result, found in zip(subjects, results, figures, strict=True):
        result.add(*_pool(found))
        if config.speed and subject.arguments.device_map is None:
            result.add(_load_time(subject.arguments))
    return results


def _ask(subjects: list[Subject], results: list[EvaluationResult], folder: Path) -> None:
    """The five-question protocol, with a CSV file for each model; the last one is MODEL."""
    for subject, result in zip(subjects, results, strict=True):
        model, tokenizer = load_for_measuring(subject.arguments)
        asked = question_protocol(model, tokenizer)
        result.add(*asked.figures())
        asked.write_csv(folder / ("questions.csv" if subject is subjects[-1] else "questions_baseline.csv"))
        del model


def _pool(rounds: list[list[Figure]]) -> list[Figure]:
    """Timings of all rounds under one median; what is counted and not timed is the same in each."""
    pooled = []
    for figure in rounds[0]:
        if "values" in figure.details:
            alike = [next(f for f in found if f.name == figure.name) for found in rounds]
            values = [value for one in alike for value in one.details["values"]]
            turns = f"; {len(rounds)} such rounds, the model loaded anew for each" if len(rounds) > 1 else ""
            figure = median_figure(figure.name, values, figure.unit, figure.protocol + turns)
        pooled.append(figure)
    return pooled


def _load_time(arguments: ModelArguments) -> Figure:
    options = {key: value for key, value in arguments.loading_options().items() if key != "device_map"}
    return time_loading(arguments.model, device=arguments.device or "cpu", **options)
