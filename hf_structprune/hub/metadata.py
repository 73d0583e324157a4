"""What a card says to machines: its metadata, `model-index` and `.eval_results/`, and the Hub's rules for them."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    constants,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id

from ..config import PruningConfig
from ..errors import HubError
from ..evaluation.results import EvaluationResult, Figure
from ..library_errors import is_network_error
from ..text.calibration_config import CalibrationConfig
from .origin import TAGS, Origin, base_metadata, is_file
from .reports import dataset_names
from .words import calibration_datasets


# Of the Hub's values (finetune, quantized, merge, adapter), of which a card can have one: the one for weights derived
# from others in full precision, and the one that the Hub itself infers where weights are quantised.
RELATION, QUANTISED_RELATION = "finetune", "quantized"
QUANTISED_TAG = "quantized"
# Metadata that is made anew each time; whatever else a card has is kept.
_MADE_ANEW = ("model-index", "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags", "datasets")


def make_metadata(
    name: str,
    config: PruningConfig,
    origin: Origin | None,
    result: EvaluationResult | None,
    known: dict[str, Any],
    *,
    base_first: bool = False,
    recovery: dict[str, Any] | None = None,
    uses_text: bool = True,
    quantised: bool = False,
    quantised_on: CalibrationConfig | None = None,
) -> ModelCardData:
    """The metadata of a card.

    Args:
        name: Hub id or folder of the pruned model.
        config: What it was pruned with.
        origin: What it was pruned from.
        result: What was measured on it, for `model-index`.
        known: Metadata of the card that this one replaces; what is not made anew here is kept, such as a licence or a
            language set by hand.
        base_first: Take licence and language from the base model even if the replaced card has others.
        recovery: The report of its recovery, whose data sets are named.
        uses_text: Whether calibration text was looked at, see `uses_text`.
        quantised: Whether its weights are quantised.
        quantised_on: The text that they were quantised with, if it took one.
    """
    kept = {key: value for key, value in known.items() if key not in _MADE_ANEW}
    base = base_metadata(origin) if origin is not None else {}
    used = [*(calibration_datasets(config.calibration) if uses_text else ()), *_trained_on(recovery)]
    used += [] if quantised_on is None else calibration_datasets(quantised_on)
    tags = [*TAGS, *([QUANTISED_TAG] if quantised else [])]
    fields: dict[str, Any] = {
        **({**kept, **base} if base_first else {**base, **kept}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys([*tags, *(known.get("tags") or [])])),
        "datasets": list(dict.fromkeys([*used, *(known.get("datasets") or [])])) or None,
    }
    if origin is not None and origin.on_hub:
        fields |= {"base_model": origin.name, "base_model_relation": QUANTISED_RELATION if quantised else RELATION}
    entries = model_index(result) if result is not None else []
    if entries:
        fields |= {"model_name": name.rsplit("/", 1)[-1], "eval_results": entries}
    order = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "base_model")
    return ModelCardData(**{key: fields[key] for key in (*order, *fields) if key in fields})


def _trained_on(recovery: dict[str, Any] | None) -> list[str]:
    """Data sets of the Hub that were trained on; the report names files without their folders, so without a slash."""
    names = [] if recovery is None else dataset_names(recovery)
    return [name for name in names if name.count("/") == 1 and not is_file(name)]


EVAL_RESULTS = ".eval_results"
WRITTEN_BY_US = "# Written by hf_structprune; written again with the model card.\n"


@dataclass(frozen=True)
class Benchmark:
    """A data set of the Hub that a task or a text is taken from.

    Attributes:
        dataset: Its id.
        name: Its name for people.
        config: The configuration that is used, if there are several.
        split: The split that is measured on.
        metric: The metric that counts for the task.
        task_id: Its name in the data set's `eval.yaml`; by default the configuration.
    """

    dataset: str
    name: str
    config: str | None = None
    split: str = "validation"
    metric: str = "acc"
    task_id: str | None = None


TASKS = {
    "boolq": Benchmark("google/boolq", "BoolQ"),
    "piqa": Benchmark("ybisk/piqa", "PIQA", metric="acc_norm"),
    "hellaswag": Benchmark("Rowan/hellaswag", "HellaSwag", metric="acc_norm"),
    "winogrande": Benchmark("allenai/winogrande", "WinoGrande", "winogrande_xl"),
    "arc_easy": Benchmark("allenai/ai2_arc", "ARC (easy)", "ARC-Easy", "test", "acc_norm"),
    "arc_challenge": Benchmark("allenai/ai2_arc", "ARC (challenge)", "ARC-Challenge", "test", "acc_norm"),
    "openbookqa": Benchmark("allenai/openbookqa", "OpenBookQA", "main", "test", "acc_norm"),
    "truthfulqa_mc2": Benchmark("truthfulqa/truthful_qa", "TruthfulQA (mc2)", "multiple_choice"),
    "mmlu": Benchmark("cais/mmlu", "MMLU", "all", "test"),
    "mmlu_pro": Benchmark("TIGER-Lab/MMLU-Pro", "MMLU-Pro", None, "test", "exact_match", "mmlu_pro"),
    "gsm8k": Benchmark("openai/gsm8k", "GSM8K", "main", "test", "exact_match", "gsm8k"),
    "lambada_openai": Benchmark("EleutherAI/lambada_openai", "LAMBADA", "default", "test"),
}
TEXTS = {
    "sample": Benchmark("Salesforce/wikitext", "WikiText-2 (first six articles)", "wikitext-2-raw-v1", "test"),
    "wikitext2": Benchmark("Salesforce/wikitext", "WikiText-2", "wikitext-2-raw-v1", "test"),
    "ptb": Benchmark("ptb-text-only/ptb_text_only", "Penn Treebank", None, "test"),
    "c4": Benchmark("allenai/c4", "C4", "en"),
}


def limit_of(figure: Figure, result: EvaluationResult) -> Any:
    """How many documents a task was cut to; `None` for a full run."""
    samples, total = figure.details.get("samples"), figure.details.get("samples_of_task")
    if total is not None:
        return samples if samples != total else None
    return figure.details.get("limit", result.settings.get("limit"))


def shots_of(figure: Figure, result: EvaluationResult) -> Any:
    """Examples in the prompt of a task; `None` where the task's own number was used and is not known."""
    return figure.details.get("num_fewshot", result.settings.get("num_fewshot"))


def _known_text(name: str, figure: Figure) -> Benchmark | None:
    """The data set behind a text; a file of the same name may hold anything."""
    known = TEXTS.get(name)
    if known is None or name == "sample" or str(figure.details.get("source", "")).startswith(known.dataset):
        return known
    return None


def model_index(result: EvaluationResult) -> list[EvalResult]:
    """Perplexities and task results as the entries of `model-index`.

    The metric's name says how it was measured, for example on how few documents. Infinite values have no entry.
    """
    entries = []
    for figure in result.figures.values():
        kind, _, rest = figure.name.partition("/")
        if not math.isfinite(figure.value) or kind not in ("tasks", "perplexity"):
            continue
        name, metric = (rest, "perplexity") if kind == "perplexity" else rest.rsplit("/", 1)
        known = _known_text(name, figure) if kind == "perplexity" else TASKS.get(name)
        known = known or Benchmark(name, name, split=None)
        arguments, words = {}, metric
        if kind == "tasks":
            shots, limit = shots_of(figure, result), limit_of(figure, result)
            arguments = {k: v for k, v in (("num_few_shot", shots), ("limit", limit)) if v is not None}
            words += f", {shots}-shot" if shots is not None else ""
            words += f", limit {limit}" if limit is not None else ""
        elif figure.protocol:
            words += f", {figure.protocol}"
        entries.append(
            EvalResult(
                task_type="text-generation", task_name="Text Generation", dataset_type=known.dataset,
                dataset_name=known.name, dataset_config=known.config, dataset_split=known.split,
                dataset_args=arguments or None, metric_type=metric, metric_name=words, metric_value=figure.value,
            )
        )  # fmt: skip
    return entries


def eval_results(result: EvaluationResult) -> dict[str, str]:
    """The content of `.eval_results/` by file name: one file for each full run of a known benchmark.

    A file each, so that one which the Hub does not list as a benchmark leaves the others valid. Limited runs are left
    out, and tasks from YAML files of the user's (`include_path`): a leaderboard would compare them with full ones.
    """
    files: dict[str, str] = {}
    if result.settings.get("include_path"):
        return files
    for task, known in TASKS.items():
        figure = result.figures.get(f"tasks/{task}/{known.metric}")
        if figure is None or limit_of(figure, result) is not None or not math.isfinite(figure.value):
            continue
        shots = shots_of(figure, result)
        notes = [known.metric, "" if shots is None else f"{shots}-shot", figure.protocol]
        entry = EvalResultEntry(
            dataset_id=known.dataset, task_id=known.task_id or known.config or "default", value=figure.value,
            date=result.environment.get("date"), notes=", ".join(filter(None, notes)),
        )  # fmt: skip
        files[f"{task}.yaml"] = WRITTEN_BY_US + yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


PROBE_SECONDS = 10.0
RELATIONS = ("finetune", "quantized", "merge", "adapter")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.\-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?|code|multilingual")
_TEXTS = ("library_name", "pipeline_tag", "license_name", "license_link", "base_model_relation")


def violations(metadata: dict[str, Any]) -> list[str]:
    """What the Hub would refuse in the metadata of a model card, one sentence each; empty if it is valid."""
    found = [f"`{k}` must be text, not {metadata[k]!r}" for k in _TEXTS if not isinstance(metadata.get(k, ""), str)]
    for key in ("tags", "datasets", "base_model", "language", "license"):
        found += [f"`{key}` has an entry that is not text: {v!r}" for v in _items(metadata, key) if type(v) is not str]
    if found:
        return found
    for key in ("datasets", "base_model"):
        found += [
            f"`{key}` names {value!r}, which is no id of the Hub"
            for value in _items(metadata, key)
            if not _is_id(value)
        ]
    found += [
        f"`language` is {value!r}; it must be an ISO 639 code such as en"
        for value in _items(metadata, "language")
        if not _LANGUAGE.fullmatch(value)
    ]
    for value in _items(metadata, "license"):
        if not _LICENCE.fullmatch(value):
            found.append(f"`license` is {value!r}; it must be an identifier such as apache-2.0")
        if value == "other" and not ("license_name" in metadata and "license_link" in metadata):
            found.append("`license` is other: `license_name` and `license_link` must say which")
    if metadata.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        found.append(f"`base_model_relation` is {metadata['base_model_relation']!r}; it must be one of {RELATIONS}")
    if not re.fullmatch(r"[a-z0-9\-]+", metadata.get("pipeline_tag", "text-generation")):
        found.append(f"`pipeline_tag` is {metadata['pipeline_tag']!r}; it must be a task such as text-generation")
    return found + _model_index(metadata.get("model-index", []))


def _items(metadata: dict[str, Any], key: str) -> list[Any]:
    value = metadata.get(key) or []
    return value if isinstance(value, list) else [value]


def _is_id(value: str) -> bool:
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


def _model_index(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ["`model-index` must be a list"]
    found = []
    for model in index:
        if not isinstance(model, dict) or not model.get("name") or not isinstance(model.get("results"), list):
            return ["every entry of `model-index` needs `name` and a list of `results`"]
        for number, result in enumerate(model["results"]):
            where = f"result {number} of `model-index`"
            for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
                lacking = [key for key in keys if not (result.get(part) or {}).get(key)]
                found += [f"{where} lacks `{part}.{key}`" for key in lacking]
            metrics = result.get("metrics") or []
            if not metrics or any("type" not in metric or metric.get("value") is None for metric in metrics):
                found.append(f"{where} needs metrics with `type` and `value`")
    return found


def validate_card(path: str | os.PathLike) -> bool:
    """Checks the metadata of a card: here, and by the Hub (`ModelCard.validate`) if one answers.

    Args:
        path: The README.md.

    Returns:
        Whether the Hub was asked; `False` when offline (`HF_HUB_OFFLINE`) and where it cannot be reached.

    Raises:
        HubError: Says what is wrong.
    """
    card = ModelCard.load(path)
    problems = violations(card.data.to_dict())
    if problems:
        raise HubError(f"The metadata of {path} is not valid: {'; '.join(problems)}.")
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)  # `validate` has no time limit of its own
        card.validate()
    except ValueError as error:
        raise HubError(f"The Hub refuses the metadata of {path}: {error}") from error
    except Exception as error:
        if not is_network_error(error):
            raise
        return False
    return True
