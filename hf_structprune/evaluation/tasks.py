"""Zero-shot and few-shot tasks, run by lm-eval's own API on the model in memory."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..checks import Count, Limit, Number, checked
from ..errors import ConfigurationError
from ..model.measuring import measuring
from .parts import Parts, fingerprint
from .results import Figure
from .task_loading import find_names, load_tasks, quiet, task_manager


if TYPE_CHECKING:
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
    """Checks that tasks can be run, data sets included, before a model is loaded or anything is measured.

    Args:
        tasks: Names of suites, tasks, groups or tags; `*` matches any letters.
        include_path: Folder of YAML files that describe further tasks.

    Returns:
        What `run_tasks` would run: suites and patterns replaced by names that lm-eval knows.

    Raises:
        ConfigurationError: A name is unknown (the message has the nearest ones), or cannot be run on text.
        EvaluationError: lm-eval or a data set is missing; says which task needs which.
    """
    manager = task_manager(include_path)
    names = _names(tasks, manager)
    load_tasks(names, manager)
    return names


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    include_path: str | os.PathLike | None = None,
    batch_size: int = 8,
    seed: int = 42,
) -> list[Figure]:
    """Runs lm-eval tasks on a model in memory, on the device it is on; it gets its modes back.

    Sets the seeds of Python, NumPy and torch. Nothing is taken from lm-eval's caches of requests and answers.

    Args:
        model: The model; layers may differ in width.
        tokenizer: Its tokenizer, which is not changed.
        tasks: Names of suites (`SUITES`), tasks, groups or tags; `*` matches any letters.
        num_fewshot: Examples in the prompt. Default: as the task says, mostly 0. lm-eval keeps tasks at 0 that say so.
        limit: Documents of each task, the leading ones; below 1 a share of them. Default: all.
        include_path: Folder of YAML files that describe further tasks. Their `data_files` are looked for beside the
            YAML file, in the folder above it, and in the working directory.
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
    manager = task_manager(include_path)
    loaded = load_tasks(_names(tasks, manager), manager)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with quiet(), measuring(model):
        results = simple_evaluate(
            # A copy of the tokenizer, because lm-eval gives it a padding token.
            model=HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
            tasks=loaded, num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=True,
            use_cache=None, cache_requests=False, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed,
        )  # fmt: skip
    return _figures(results)


def _names(tasks: str | Sequence[str], manager: Any) -> list[str]:
    names = expand(tasks)
    if not names:
        raise ConfigurationError(f"No task is named; suites are {', '.join(SUITES)}.")
    return find_names(names, manager)


def _figures(results: dict[str, Any]) -> list[Figure]:
    return [figure for name in results["results"] for figure in _figures_of(name, results)]


def _figures_of(name: str, results: dict[str, Any]) -> list[Figure]:
    """The metrics of one task or group; keys of lm-eval are `acc,none` and `acc_stderr,none`."""
    values = results["results"][name]
    members = results.get("group_subtasks", {}).get(name)
    details = {"num_fewshot": results["n-shot"].get(name), "version": results["versions"].get(name)}
    details |= {"samples": values.get("sample_len")}
    if members is None:
        counts = results["n-samples"][name]
        details |= {"samples": counts["effective"], "samples_of_task": counts["original"]}
    else:
        details["tasks"] = list(members)
    figures = []
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value):
            continue
        stderr = values.get(f"{metric}_stderr,{filtered}")
        figures.append(
            Figure(
                f"tasks/{name}/{metric if filtered == 'none' else key}", float(value),
                stderr=float(stderr) if _is_number(stderr) else None,
                higher_is_better=results["higher_is_better"].get(name, {}).get(metric),
                protocol=_protocol(details, results), details={**details, "filter": filtered},
                parts=_parts(name, metric, filtered, float(value), results),
            )
        )  # fmt: skip
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
    return [name] if not members else [leaf for member in members for leaf in _leaves(member, results)]


def _is_number(value: Any) -> bool:
    """Whether a value can be shown: metrics may also be lists, texts (`"N/A"`) or not a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _protocol(details: dict[str, Any], results: dict[str, Any]) -> str:
    shots, samples, total = details["num_fewshot"], details["samples"], details.get("samples_of_task")
    documents = f"{samples:,}" if total in (None, samples) else f"{samples:,} of {total:,}"
    shot = "mixed shots" if shots is None else f"{shots}-shot"
    return f"lm-eval {results['lm_eval_version']}, {shot}, {documents} documents"
