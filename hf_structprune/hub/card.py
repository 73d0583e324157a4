"""The model card of a checkpoint folder, for people and machines: every figure is planned or was measured."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

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
from transformers.utils import logging

from ..errors import HubError
from ..evaluation.results import EvaluationResult, Figure
from ..evaluation.table import ResultTable
from ..files.writing import write_text
from ..library_errors import is_network_error
from ..units import VocabularyKind, kinds_of
from . import words
from .contents import CARD_NAME, RECIPE_NAME, Contents, protocols, read_metadata, read_text
from .origin import TAGS, Origin, attribution, base_metadata, is_file, public_config, read_origin
from .runtimes import other_runtimes
from .words import PICTURE_NAME, calibration_datasets, calibration_of, dataset_names, render, uses_text


logger = logging.get_logger(__name__)


def make_card(
    folder: str | os.PathLike, *, name: str | None = None, base_model: str | os.PathLike | None = None,
    previous: str | None = None, recorded: Origin | None = None,
) -> ModelCard:  # fmt: skip
    """The model card of a checkpoint that this package made.

    Reads what this package has written there: configuration, plan, pictures, and what was measured on it and on the
    models before it. A figure that is in none of these files is not in the card.

    Args:
        folder: The checkpoint.
        name: Hub id under which it will be found, for the lines that load it. Default: that of the card in the folder,
            or the name of the folder.
        base_model: Hub id or folder of the model that was pruned. Default: what the card in the folder says, or what
            was recorded when it was pruned.
        previous: Text of the card this one replaces: its marked sections and metadata that are not ours are kept.
            Default: the `README.md` of the folder.
        recorded: Where the checkpoint comes from. Default: what was recorded in its `config.json`.

    Raises:
        HubError: The folder is no checkpoint of ours.
        CheckpointError: A file of this package in it is damaged.
        ConfigurationError: The results are those of another model.
    """
    previous = read_text(Path(folder) / CARD_NAME) if previous is None else previous
    return _make_card(Contents(Path(folder)), name, base_model, previous, recorded)


def _make_card(
    contents: Contents, name: str | None, base_model: Any, previous: str, recorded: Origin | None
) -> ModelCard:
    known, texts = read_metadata(previous), read_sections(previous)
    name = name or card_name(contents.folder, previous)
    origin = _origin(base_model, known, recorded or read_origin(contents.record))
    data = _metadata(name, contents, origin, known, base_model is not None)
    config, plan, public = contents.config, contents.plan, public_config(contents.config)
    link, base = ("the base model", "BASE_MODEL") if origin is None else (origin.link, origin.name)
    options, columns = {} if origin is None else origin.options, contents.columns()
    first, *others = dict.fromkeys([*SECTIONS, *texts])
    text = render(
        "model_card", say=words, contents=contents, plan=plan, config=config, options=options, name=name, link=link,
        base_name=link if origin is None else base, made_from=(base, public, plan, options), mark=generated_mark(name),
        card_data=data.to_yaml(), metadata=data.to_dict(), attribution=attribution(data.to_dict(), name),
        introduction=section(first, texts), sections=[section(name, texts) for name in others],
        table=ResultTable(columns).to_markdown().rstrip(), protocols=protocols(columns),
        environment=_environment(contents.results), configuration=json.dumps(public.to_dict(), indent=2),
        picture=PICTURE_NAME if (contents.folder / PICTURE_NAME).is_file() else None,
        recipe=RECIPE_NAME if (contents.folder / RECIPE_NAME).is_file() else None,
        runtimes=other_runtimes(contents, name),
    )  # fmt: skip
    return ModelCard(text + "\n")


def write_card(
    folder: str | os.PathLike, *, name: str | None = None, base_model: str | os.PathLike | None = None,
    previous: str | None = None, recorded: Origin | None = None, overwrite: bool = False,
) -> Path | None:  # fmt: skip
    """Writes `README.md` and `.eval_results/*.yaml` into a checkpoint folder.

    A README.md that is not ours (neither generated here nor with marked sections) stays as it is, with a warning,
    unless `overwrite` is true. The other arguments are those of `make_card`.

    Returns:
        The file, or `None` if it was left alone.
    """
    folder = Path(folder)
    previous, contents = read_text(folder / CARD_NAME) if previous is None else previous, Contents(folder)
    ours = not previous.strip() or is_ours(previous)
    card = _make_card(contents, name, base_model, previous if ours else "", recorded)
    _write_eval_results(folder, contents.result)
    if not ours and not overwrite:
        logger.warning(f"The README.md of {folder.name} was not written by hf_structprune and stays as it is.")
        return None
    write_text(folder / CARD_NAME, str(card))
    return folder / CARD_NAME


def card_name(folder: Path, previous: str) -> str:
    """The Hub id that the card in a folder was written for, or else the folder's name."""
    found = _GENERATED.search(previous)
    return found[1] if found and "/" in found[1] else folder.absolute().name


def _origin(base_model: Any, known: dict[str, Any], recorded: Origin | None) -> Origin | None:
    """What was pruned: as given, as the card says (where it may have been corrected by hand), or as recorded."""
    if base_model is not None:
        return Origin.of(base_model).with_options_of(recorded)
    stated = known.get("base_model")
    if isinstance(stated, str) and (recorded is None or stated != recorded.name):
        return Origin(stated, True).with_options_of(recorded)
    return recorded


def _environment(results: list[EvaluationResult]) -> list[str]:
    """Where each side was measured, such as `"AMD EPYC, 2 threads, torch 2.13.0, 2026-01-31"`: equal ones once."""
    lines: dict[str, list[str]] = {}
    for result in results:
        about, hardware = result.environment, result.environment.get("hardware", {})
        words = [hardware.get("device"), f"{hardware['threads']} threads" if hardware.get("threads") else None]
        words += [f"{name} {number}" for name, number in about.get("versions", {}).items()]
        line = ", ".join(filter(None, [*words, (about.get("date") or "").partition("T")[0]]))
        if line:
            lines.setdefault(line, []).append(result.state)
    names = [", the ".join(states[:-1]) + " and the " * bool(states[1:]) + states[-1] for states in lines.values()]
    return [f"Measured on the {states} model with {line}." for states, line in zip(names, lines, strict=True)]


# Text that people put into a generated card stands between markers and survives the next generation.
SECTIONS = ("introduction", "notes")
_SECTION = re.compile(r"<!-- your text: ([\w-]+) -->\n?(.*?)\n?<!-- end of your text: \1 -->", re.DOTALL)
_GENERATED = re.compile(r"<!-- Generated by hf_structprune for (.+?)\. ")


def generated_mark(name: str) -> str:
    """The comment that says that a card is ours, and what to do with it."""
    return (
        f'<!-- Generated by hf_structprune for {name}. Write between the lines marked "your text": what stands there '
        "is kept, all else is written anew. -->"
    )


def is_ours(card: str) -> bool:
    """Whether a card may be written anew: it was generated, or has marked sections that will be kept."""
    return bool(_GENERATED.search(card) or _SECTION.search(card))


def read_sections(card: str) -> dict[str, str]:
    """The marked texts of a card by name."""
    return {name: text for name, text in _SECTION.findall(card)}


def section(name: str, texts: dict[str, str]) -> str:
    """A marked section with its text."""
    text = texts.get(name, "")
    return f"<!-- your text: {name} -->\n{text}{chr(10) if text else ''}<!-- end of your text: {name} -->"


# Metadata that is made anew each time; whatever else a card has is kept.
_MADE_ANEW = ("model-index", "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags", "datasets")


def _metadata(
    name: str, contents: Contents, origin: Origin | None, known: dict[str, Any], base_first: bool
) -> ModelCardData:
    """The metadata of a card; of that of the replaced one, `known`, what is not made anew here is kept.

    Licence and language are those of the base model where that comes first, or else those of the replaced card.
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
    entries = model_index(contents.result, trimmed=_is_trimmed(contents)) if contents.result is not None else []
    if entries:
        fields |= {"model_name": name.rsplit("/", 1)[-1], "eval_results": entries}
    order = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "base_model")
    return ModelCardData(**{key: fields[key] for key in (*order, *fields) if key in fields})


EVAL_RESULTS = ".eval_results"
_WRITTEN_BY_US = "# Written by hf_structprune; written again with the model card.\n"


class Benchmark(NamedTuple):
    """A data set of the Hub that a task or a text is taken from: id, name for people, and what of it is used.

    `metric` is the one that counts for the task, `task_id` its name in the data set's `eval.yaml`, by default the
    configuration.
    """

    dataset: str
    name: str
    config: str | None = None
    split: str | None = "validation"
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


def _how(figure: Figure, result: EvaluationResult) -> dict[str, Any]:
    """Examples in the prompt of a task, if known, and how many documents it was cut to, if it was."""
    details = {**result.settings, **figure.details}
    shots, limit = details.get("num_fewshot"), details.get("limit")
    if (total := details.get("samples_of_task")) is not None:
        limit = details.get("samples") if details.get("samples") != total else None
    return {name: value for name, value in (("num_few_shot", shots), ("limit", limit)) if value is not None}


def _is_trimmed(contents: Contents) -> bool:
    """Whether tokens went, so that perplexities of tokens cannot be compared with those of other models."""
    return any(one.kind in kinds_of(VocabularyKind) for one in contents.plan.shared)


def model_index(result: EvaluationResult, trimmed: bool = False) -> list[EvalResult]:
    """Perplexities and task results as the entries of `model-index`; of a `trimmed` vocabulary those of words.

    The metric's name says how it was measured, for example on how few documents. Infinite values have no entry.
    """
    entries, metric_of_text = [], "word_perplexity" if trimmed else "perplexity"
    for figure in result.figures.values():
        kind, _, rest = figure.name.partition("/")
        if not math.isfinite(figure.value) or kind not in ("tasks", metric_of_text):
            continue
        kind = "perplexity" if kind == metric_of_text else kind
        name, metric = (rest, metric_of_text) if kind == "perplexity" else rest.rsplit("/", 1)
        known = (TEXTS if kind == "perplexity" else TASKS).get(name)
        source = str(figure.details.get("source", ""))
        if known is None or (kind == "perplexity" and name != "sample" and not source.startswith(known.dataset)):
            known = Benchmark(name, name, split=None)  # also a file that is called like a text: it may hold anything
        how = _how(figure, result) if kind == "tasks" else {}
        said = [metric, f"{how['num_few_shot']}-shot" if "num_few_shot" in how else ""]
        said += [f"limit {how['limit']}" if "limit" in how else "", figure.protocol if kind == "perplexity" else ""]
        entries.append(
            EvalResult(
                task_type="text-generation", task_name="Text Generation", dataset_type=known.dataset,
                dataset_name=known.name, dataset_config=known.config, dataset_split=known.split,
                dataset_args=how or None, metric_type=metric, metric_name=", ".join(filter(None, said)),
                metric_value=figure.value,
            )
        )  # fmt: skip
    return entries


def _write_eval_results(folder: Path, result: EvaluationResult | None) -> None:
    """Writes `.eval_results/`: one file for each full run of a known benchmark; those of an earlier result go.

    A file each, so that one which the Hub does not list as a benchmark leaves the others valid. Limited runs are left
    out, and tasks from YAML files of the user's (`include_path`): a leaderboard would compare them with full ones.
    """
    files: dict[str, str] = {}
    for task, known in TASKS.items() if result is not None and not result.settings.get("include_path") else ():
        figure = result.figures.get(f"tasks/{task}/{known.metric}")
        how = {} if figure is None else _how(figure, result)
        if figure is None or "limit" in how or not math.isfinite(figure.value):
            continue
        notes = [known.metric, f"{how['num_few_shot']}-shot" if "num_few_shot" in how else "", figure.protocol]
        entry = EvalResultEntry(
            dataset_id=known.dataset, task_id=known.task_id or known.config or "default", value=figure.value,
            date=result.environment.get("date"), notes=", ".join(filter(None, notes)),
        )  # fmt: skip
        files[f"{task}.yaml"] = _WRITTEN_BY_US + yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    for path in (folder / EVAL_RESULTS).glob("*.yaml"):
        if path.name not in files and path.read_text(encoding="utf-8").startswith(_WRITTEN_BY_US):
            path.unlink()
    for name, content in files.items():
        write_text(folder / EVAL_RESULTS / name, content)


_PROBE_SECONDS = 10.0


def validate_card(path: str | os.PathLike) -> bool:
    """Checks the metadata of a README.md: `model-index` here, all by the Hub (`ModelCard.validate`) if one answers.

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
