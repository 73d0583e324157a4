"""What a card says to machines: its metadata, `model-index` and `.eval_results/`."""

from __future__ import annotations

import math
import os
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
from huggingface_hub.utils import get_session

from ..errors import HubError
from ..evaluation.results import EvaluationResult, Figure
from ..library_errors import is_network_error
from .contents import Contents
from .origin import TAGS, Origin, base_metadata, is_file
from .words import calibration_datasets, calibration_of, dataset_names, uses_text


# Metadata that is made anew each time; whatever else a card has is kept.
_MADE_ANEW = ("model-index", "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags", "datasets")


def make_metadata(
    name: str, contents: Contents, origin: Origin | None, known: dict[str, Any], base_first: bool = False
) -> ModelCardData:
    """The metadata of a card.

    Args:
        known: Metadata of the card that this one replaces; what is not made anew here is kept, such as a licence or a
            language set by hand.
        base_first: Take licence and language from the base model even if the replaced card has others.
    """
    kept = {key: value for key, value in known.items() if key not in _MADE_ANEW}
    base = base_metadata(origin) if origin is not None else {}
    quantised, recovery, report = contents.state == "quantised", contents.recovery, contents.quantization
    used = calibration_datasets(contents.config.calibration) if uses_text(contents.config, contents.plan) else []
    # Reports name files without their folders, so without a slash.
    used += [d for d in dataset_names(recovery or {}) if d.count("/") == 1 and not is_file(d)]
    quantised_on = calibration_of(report) if report is not None else None
    used += [] if quantised_on is None else calibration_datasets(quantised_on)
    fields: dict[str, Any] = {
        **({**kept, **base} if base_first else {**base, **kept}),
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if contents.sees else "text-generation",
        "tags": list(dict.fromkeys([*TAGS, *(["quantized"] if quantised else []), *(known.get("tags") or [])])),
        "datasets": list(dict.fromkeys([*used, *(known.get("datasets") or [])])) or None,
    }
    if origin is not None and origin.on_hub:
        # A card has one relation: for weights derived from others in full precision, or the one that the Hub itself
        # infers where weights are quantised.
        fields |= {"base_model": origin.name, "base_model_relation": "quantized" if quantised else "finetune"}
    entries = model_index(contents.result) if contents.result is not None else []
    if entries:
        fields |= {"model_name": name.rsplit("/", 1)[-1], "eval_results": entries}
    order = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "base_model")
    return ModelCardData(**{key: fields[key] for key in (*order, *fields) if key in fields})


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


def _shots(figure: Figure, result: EvaluationResult) -> Any:
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
            shots, limit = _shots(figure, result), limit_of(figure, result)
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
        shots = _shots(figure, result)
        notes = [known.metric, "" if shots is None else f"{shots}-shot", figure.protocol]
        entry = EvalResultEntry(
            dataset_id=known.dataset, task_id=known.task_id or known.config or "default", value=figure.value,
            date=result.environment.get("date"), notes=", ".join(filter(None, notes)),
        )  # fmt: skip
        files[f"{task}.yaml"] = WRITTEN_BY_US + yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


_PROBE_SECONDS = 10.0


def validate_card(path: str | os.PathLike) -> bool:
    """Checks the metadata of a card: `model-index` here, all of it by the Hub (`ModelCard.validate`) if one answers.

    Args:
        path: The README.md.

    Returns:
        Whether the Hub was asked; `False` when offline (`HF_HUB_OFFLINE`) and where it cannot be reached.

    Raises:
        HubError: Says what is wrong.
    """
    try:
        card = ModelCard.load(path)
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)  # `validate` has no time limit of its own
        card.validate()
    except (ValueError, yaml.YAMLError) as error:
        raise HubError(f"The metadata of {path} is not valid: {error}") from error
    except Exception as error:
        if not is_network_error(error):
            raise
        return False
    return True
