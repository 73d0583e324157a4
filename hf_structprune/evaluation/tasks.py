"""Zero-shot and few-shot tasks, run by lm-eval's own API on the model in memory."""

from __future__ import annotations

import copy
import difflib
import io
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import set_seed

from ..checks import Count, Limit, Number, checked
from ..errors import ConfigurationError, EvaluationError
from ..installed import need
from ..model.measuring import measuring
from ..progress import enabled
from .comparison import Parts, fingerprint
from .results import Figure


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict
    from transformers import PreTrainedModel

# Tasks that studies report together. Their names come before lm-eval's: its group `leaderboard` (Open LLM Leaderboard
# 2) is reached by the names of its tasks, `leaderboard_*`.
SUITES: dict[str, tuple[str, ...]] = {
    "llm-pruner": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
    "study-a": ("openbookqa", "winogrande", "hellaswag", "arc_challenge", "boolq"),
    "leaderboard": ("arc_challenge", "truthfulqa_mc2", "winogrande", "hellaswag"),
}

# Of log-likelihoods lm-eval notes the sum, for some with the words or bytes that it is over.
_WEIGHTED = ("word_perplexity", "byte_perplexity", "bits_per_byte")
_FORMS = {"perplexity": "exp", "word_perplexity": "exp", "byte_perplexity": "exp", "bits_per_byte": "bits"}


def expand(names: str | Sequence[str]) -> list[str]:
    """Names of suites replaced by their tasks, in order, each task once; other names are left as they are."""
    names = [names] if isinstance(names, str) else names
    return list(dict.fromkeys(task for name in names for task in SUITES.get(name, (name,))))


def check_tasks(tasks: str | Sequence[str], include_path: str | os.PathLike | None = None) -> list[str]:
    """The names of what `run_tasks` would run, after checking that it can be, before a model is loaded.

    Arguments and errors are those of `run_tasks`; what an unknown name may have meant is in the message.
    """
    return [name for name, _ in _load(tasks, include_path)]


def run_tasks(
    model: PreTrainedModel, tokenizer: Any, tasks: str | Sequence[str], *, num_fewshot: int | None = None,
    limit: int | float | None = None, include_path: str | os.PathLike | None = None, batch_size: int = 8,
    seed: int = 42,
) -> list[Figure]:  # fmt: skip
    """Runs lm-eval tasks on a model in memory, on the device it is on; it gets its modes back.

    Sets the seeds of Python, NumPy and torch. Nothing is taken from lm-eval's caches of requests and answers.

    Args:
        model, tokenizer: They are not changed.
        tasks: Names of suites (`SUITES`), tasks, groups or tags; `*` matches any letters.
        num_fewshot: Examples in the prompt. Default: as the task says, mostly 0. Tasks at 0 that say so stay there.
        limit: Documents of each task, the leading ones; below 1 a share of them. Default: all.
        include_path: Folder of YAML files that describe further tasks. Local files that they name are looked for
            beside the YAML file, in the folder above it, and in the working directory.
        batch_size: Sequences that go through the model at once.
        seed: Seed, also of the choice of examples.

    Returns:
        One figure for each numeric metric, `tasks/<task>/<metric>` (`<metric>,<filter>` where the task filters
        answers in several ways), of every task, and of a group where lm-eval itself averages over it.

    Raises:
        ConfigurationError: A number is impossible, a name is unknown, or a task cannot be run on text.
        EvaluationError: lm-eval or a data set is missing; says which task needs which.
    """
    num_fewshot, limit = checked("num_fewshot", num_fewshot, Number | None), checked("limit", limit, Limit | None)
    batch_size = checked("batch_size", batch_size, Count)
    loaded = _load(tasks, include_path)
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    figures: dict[str, Figure] = {}
    with _quiet(), measuring(model):
        # A copy of the tokenizer, because lm-eval gives it a padding token.
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        for _, parts in loaded:
            # As `simple_evaluate` does, which also runs git and pip for a report of the machine that nobody reads.
            set_seed(seed)
            for task in parts["tasks"].values():
                own = task.get_config("num_fewshot")
                if own is None or (own != 0 and num_fewshot is not None):
                    task.set_config(key="num_fewshot", value=num_fewshot or 0)
                task.set_fewshot_seed(seed=seed)
            results = evaluate(lm=lm, task_dict=parts, limit=limit)
            figures |= {figure.name: figure for name in results["results"] for figure in _figures_of(name, results)}
    return list(figures.values())


def task_manager(include_path: str | os.PathLike | None = None) -> TaskManager:
    """lm-eval's index of all tasks, with those of a folder of YAML files; made once, again when a file has changed."""
    need("lm_eval", extra="eval")
    folder = None if include_path is None else Path(include_path).expanduser().resolve()
    if folder is not None and not folder.is_dir():
        raise ConfigurationError(f"`include_path` is {str(include_path)!r}, which is no folder of task YAML files.")
    files = sorted(folder.rglob("*.yaml")) if folder is not None else []
    return _task_manager(folder, tuple((file, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=2)
def _task_manager(folder: Path | None, files: tuple) -> TaskManager:
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=folder)


def find_names(tasks: str | Sequence[str], manager: TaskManager) -> list[str]:
    """Names of tasks, groups and tags; suites and patterns such as `mmlu_*` are replaced by what they stand for."""
    found: dict[str, None] = {}
    for name in expand(tasks):
        matches = manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.6)
            nearest = f"Nearest names: {', '.join(near)}." if near else "No name is like it."
            way = "A task of your own needs `include_path` (--include-path), the folder of its YAML file."
            if manager.include_path:
                local = [one for one in manager.all_tasks if manager.include_path in _folders(one, manager)]
                way = f"Tasks in {manager.include_path}: {', '.join(local) or 'none'}."
            raise ConfigurationError(f"lm-eval knows no task {name!r}. {nearest} {way}")
        found.update(dict.fromkeys(matches))
    if not found:
        raise ConfigurationError(f"No task is named; suites are {', '.join(SUITES)}.")
    return list(found)


def _folders(name: str, manager: TaskManager) -> list[Path]:
    """The folders above the YAML file of a task or group, the nearest first."""
    yaml = manager.task_index[name].yaml_path
    return list(Path(yaml).parents) if yaml else []


def _load(tasks: str | Sequence[str], include_path: str | os.PathLike | None) -> list[tuple[str, TaskDict]]:
    """Names, each with its tasks and groups and their data sets; see `check_tasks` for the errors."""
    manager = task_manager(include_path)
    loaded = [(name, _load_one(name, manager)) for name in find_names(tasks, manager)]
    for name, task in (item for _, parts in loaded for item in parts["tasks"].items()):
        if getattr(task, "MULTIMODAL", False):
            raise ConfigurationError(f"Task {name!r} needs images or sound; a language model of text cannot do it.")
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigurationError(
                f"Task {name!r} runs code that the model has written, which this package does not do: run it with "
                "lm-eval in a sandbox."
            )
    return loaded


def _load_one(name: str, manager: TaskManager) -> TaskDict:
    """A task, group or tag; for its local files, lm-eval is run where they are."""
    start, own, above = Path.cwd(), manager.include_path, _folders(name, manager)
    is_own = own is not None and (own in above or not above)
    folders = [*((above or [own])[:2] if is_own else []), start]
    try:
        for folder in folders[:-1]:
            os.chdir(folder)
            with _quiet(), suppress(FileNotFoundError):
                return manager.load([name])
        os.chdir(start)
        with _quiet():
            return manager.load([name])
    except Exception as error:  # whatever the code of a task raises; network, cache, scripts, missing packages
        raise EvaluationError(
            f"Task {name!r} cannot be loaded: {type(error).__name__}: {error}. Data sets of the Hub need a network "
            "(and HF_HUB_OFFLINE not set); local files of a task in `include_path` (--include-path) are looked for "
            f"from {', '.join(map(str, folders))}."
        ) from error
    finally:
        os.chdir(start)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its log and prints, and without progress bars where ours are off."""
    logger, shown = logging.getLogger("lm_eval"), enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:  # lm-eval has no option that reaches all of its bars
        with redirect_stdout(io.StringIO()), nullcontext() if shown else redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _figures_of(name: str, results: dict[str, Any]) -> list[Figure]:
    """The metrics of one task or group; keys of lm-eval are `acc,none` and `acc_stderr,none`."""
    values, shots = results["results"][name], results["n-shot"].get(name)
    details = {"num_fewshot": shots, "version": results["versions"].get(name)}
    members = results.get("group_subtasks", {}).get(name)
    if members is None:
        counts = results["n-samples"][name]
        details |= {"samples": counts["effective"], "samples_of_task": counts["original"]}
    elif "sample_len" not in values:  # a group without a mean
        return []
    else:
        details |= {"samples": values["sample_len"], "tasks": list(members)}
    samples, total = details["samples"], details.get("samples_of_task")
    documents = f"{samples:,}" if total in (None, samples) else f"{samples:,} of {total:,}"
    shot = "mixed shots" if shots is None else f"{shots}-shot"
    protocol = f"lm-eval {version('lm_eval')}, {shot}, {documents} documents"
    figures = []
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        value = _number(value)
        if not comma or metric.endswith("_stderr") or value is None:
            continue
        better = results["higher_is_better"].get(name, {}).get(metric)
        stderr = _number(values.get(f"{metric}_stderr,{filtered}"))
        label, parts = metric if filtered == "none" else key, _parts(name, metric, filtered, value, results)
        how = {**details, "filter": filtered}
        figures.append(Figure(f"tasks/{name}/{label}", value, "", stderr, better, protocol, how, parts))
    return figures


def _parts(name: str, metric: str, filtered: str, value: float, results: dict[str, Any]) -> Parts | None:
    """What the documents of a task or group add to a metric; `None` where it is no mean over documents."""
    samples = [s for task in _leaves(name, results) for s in results["samples"].get(task, ())]
    samples = [sample for sample in samples if sample["filter"] == filtered]
    if not samples or not all(metric in sample for sample in samples):
        return None
    key = fingerprint(sample[kind] for sample in samples for kind in ("doc_hash", "prompt_hash", "target_hash"))
    sums, counts = [sample[metric] for sample in samples], None
    try:
        if metric in _WEIGHTED:
            sums, counts = zip(*sums, strict=True)
        sums = [-likelihood for likelihood in sums] if metric in _FORMS else sums
        parts = Parts.of(key, sums, counts, _FORMS.get(metric, "mean"))
    except (TypeError, ValueError):  # what lm-eval notes of a document is no number
        return None
    # Other metrics (of all answers at once, of groups whose tasks count alike) are no such mean.
    return parts if parts is not None and math.isclose(parts.value(), value, rel_tol=1e-6, abs_tol=1e-9) else None


def _leaves(name: str, results: dict[str, Any]) -> list[str]:
    """The tasks of a group, those of its groups too; a task itself."""
    members = results.get("group_subtasks", {}).get(name)
    return [leaf for member in members for leaf in _leaves(member, results)] if members else [name]


def _number(value: Any) -> float | None:
    """A value that can be shown: metrics may also be lists, texts (`"N/A"`) or not a number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    return float(value) if is_number else None
