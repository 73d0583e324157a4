"""What a card says: what went, on which text, by which papers and commands, and what recovery and quantising did."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..config import AUTO, EVOLUTION, PruningConfig
from ..criteria import Method, Paper, channels, class_of, depth, make_criterion, pairs, tokens
from ..criteria.widths import SURGEON, WIFV
from ..errors import CheckpointError
from ..evaluation.results import EvaluationResult
from ..files.reading import read_json_object
from ..hardware import dtype_of
from ..installed import LIBRARIES
from ..plan import PruningPlan
from ..quantization.configuration import QuantizationConfig
from ..recovery.configuration import DistillationConfig, RecoveryConfig
from ..text.calibration import PACKAGED, CalibrationConfig
from ..units import KINDS, DepthKind, StreamKind, UnitKind, VocabularyKind, WidthKind, kinds_of
from ..units.head_size import HeadSize
from ..units.latent_ranks import LatentRanks
from .origin import IN_MEMORY, is_file, sources_of


def what_went(config: PruningConfig, plan: PruningPlan) -> list[str]:
    """One line for each kind of unit: what went, and by which criterion."""
    lines = []
    if widths := config.kinds(kinds_of(WidthKind)):
        names = {kind: f"`{config.criterion_of(kind)}`" for kind in widths}
        names = names if len(set(names.values())) > 1 else {"": names[widths[0]]}
        how = ", ".join(f"{kind} {name}".strip() for kind, name in names.items())
        how = how.replace("`taylor`", f"`taylor` (`{config.taylor}`)")
        lines.append(
            f"Numbers of units: as in a plan that was given; units that it did not name: criterion {how}"
            if plan.given
            else f"Criterion: {how}, allocation: `{config.allocation}`"
        )
    for kind in KINDS.values():
        if told := kind.told(plan):
            ranked = _is_ranked(kind, config, plan)
            chosen = f"criterion `{config.criterion_of(kind.name)}`" if ranked else "named in the configuration"
            lines.append(f"{told} ({'named in a plan that was given' if plan.given else chosen})")
    shares = [f"{kind} {count / plan.parameters_before:.1%}" for kind, count in plan.removed.items()]
    return lines if len(shares) < 2 else [*lines, f"Of all parameters: {', '.join(shares)}"]


def _is_ranked(kind: UnitKind, config: PruningConfig, plan: PruningPlan) -> bool:
    """Whether a criterion decides what goes of a kind."""
    return not isinstance(kind, DepthKind) or config.chooses_depth(plan.ratio_requested)


# Of directions of latents, by `latent_criterion`.
LATENTS = {
    "outputs": Method((Paper("lin2024modegpt"), *channels.METHODS["pca"].papers)),
    "magnitude": Method(channels.METHODS["pca"].papers, needs_text=False),
}
LM_EVAL, EVOPRESS = Paper("eval-harness"), Paper("sieberling2024evopress")
TEMPERATURE = Paper("guo2017calibration")  # of the norm in front of the head


def _methods(config: PruningConfig, plan: PruningPlan) -> list[Method]:
    """Of the criteria that decided something."""
    ranked = [name for name in config.units if _is_ranked(KINDS[name], config, plan)]
    return [method_of(name, config.criterion_of(name)) for name in ranked]


def method_of(kind: str, criterion: str) -> Method:
    """What a card says of a criterion that ranks units of a kind."""
    levels = (
        (DepthKind, depth.METHODS),
        (StreamKind, channels.METHODS),
        (HeadSize, pairs.METHODS),
        (LatentRanks, LATENTS),
        (VocabularyKind, tokens.METHODS),
    )
    for level, methods in levels:
        if isinstance(KINDS[kind], level):
            return methods[criterion]
    found = class_of(kind, criterion)
    return Method(found.papers, found.needs_inputs or found.needs_gradients)


def citations(config: PruningConfig, plan: PruningPlan, results: Sequence[EvaluationResult]) -> list[str]:
    """BibTeX entries of what a configuration uses; of lm-eval too if its tasks were measured."""
    papers = [paper for method in _methods(config, plan) for paper in method.papers]
    papers += WIFV.papers if config.allocation == "global" and not make_criterion(config).of_loss else ()
    papers += [EVOPRESS] if config.allocation == EVOLUTION else []
    papers += [SURGEON] if config.compensation and uses_text(config, plan) else []
    papers += [TEMPERATURE] if plan.softened is not None and plan.softened["factor"] != 1 else []
    papers += [LM_EVAL] if any(name.startswith("tasks/") for side in results for name in side.figures) else []
    return [paper.bibtex for paper in dict.fromkeys(papers)]


def uses_text(config: PruningConfig, plan: PruningPlan) -> bool:
    """Whether calibration text was looked at: as recorded, or else as the configuration asks for."""
    if plan.calibrated is not None:
        return plan.calibrated
    by_text = config.compensation or config.allocation in ("search", EVOLUTION)
    return by_text or any(method.needs_text for method in _methods(config, plan))


_PACKAGED = (
    "the sample of hf_structprune: half WikiText-2 (validation), half C4, English, and some code; of a model with a "
    "chat template every fourth sequence is of chats of Dolly"
)


def calibration_datasets(calibration: CalibrationConfig) -> list[str]:
    """Data sets of the Hub that were calibrated on."""
    if calibration.fingerprint is not None:
        return []
    sources = sources_of(calibration) or [PACKAGED]
    packaged = ["Salesforce/wikitext", "allenai/c4"] if PACKAGED in sources else []
    return [source for source in sources if source != PACKAGED and not is_file(source)] + packaged


def calibration_in_words(calibration: CalibrationConfig) -> str:
    """A calibration text; of local files the name only, since the card is public."""
    size, sources = f"{calibration.num_samples} x {calibration.length} tokens", sources_of(calibration)
    asked = calibration.dense_questions
    own = f"; every fourth one is of {asked:,} questions at most that the dense model asked itself" if asked else ""
    if calibration.image_column is not None:
        size = f"{calibration.num_samples} rows of text and images"
    if calibration.fingerprint is not None:
        return f"{size}, given in memory (SHA-256 begins with `{calibration.fingerprint}`){own}"
    if not sources or sources == [PACKAGED]:
        return f"{size} of {_PACKAGED}{own}"
    sources, beside = [s for s in sources if s != PACKAGED], PACKAGED in sources
    hub = [s for s in calibration_datasets(calibration) if s in sources]
    names = [f"[{s}](https://huggingface.co/datasets/{s})" if s in hub else f"`{Path(s).name}`" for s in sources]
    names += [f"configuration `{calibration.name}`"] if hub and calibration.name else []
    names += [f"split `{calibration.split}`"] if hub and calibration.split else []
    return f"{size} of {', '.join(names)}" + (f", in turns with {_PACKAGED}" if beside else "") + own


# Options of loading that the commands have.
COMMAND_OPTIONS = ("dtype", "revision", "subfolder", "variant", "gguf_file", "trust_remote_code")


_TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"))
_TEMPLATES.filters["number"] = "{:,}".format
_TEMPLATES.filters["perplexity"] = lambda log: f"{math.exp(min(log, 700.0)):,.2f}"


def render(template: str, **values: Any) -> str:
    """A Markdown text by the template of its name."""
    return _TEMPLATES.get_template(f"{template}.md.jinja").render(**values).strip()


def config_expression(config: PruningConfig) -> str:
    """A Python expression that gives an equal configuration: what differs from the defaults."""
    parts = [f"{name}={_literal(value)}" for name, value in _changed(config).items()]
    inner = ", ".join(f"{name}={_literal(value)}" for name, value in _changed(config.calibration).items())
    parts += [f"calibration=CalibrationConfig({inner})"] if inner else []
    return f"PruningConfig({', '.join(parts)})"


def _by_plan(config: PruningConfig, plan: PruningPlan) -> bool:
    """Whether only the plan itself can make the model again."""
    return plan.given or (plan.ratio_requested is None and config.needs_ratio)


def making_in_python(base: str, config: PruningConfig, plan: PruningPlan, options: dict[str, Any]) -> str:
    """The lines that make the model again; `options` are what `from_pretrained` needs to load the same weights."""
    what = "" if plan.ratio_requested is None else repr(plan.ratio_requested)
    if _by_plan(config, plan):
        what = 'PruningPlan.load("pruning_plan.json")'
    more = "".join(f", {name}={loading_value(value)}" for name, value in options.items())
    code = (
        f"config = {config_expression(config)}\n"
        f'pruner = StructuredPruner.from_pretrained("{base}", config=config{more})\n'
        f'pruner.prune({what})\npruner.save_pretrained("pruned")'
    )
    names = ("CalibrationConfig", "PruningConfig", "PruningPlan", "StructuredPruner")
    return f"from hf_structprune import {', '.join(name for name in names if name in code)}\n\n{code}"


def making_on_the_command_line(base: str, config: PruningConfig, plan: PruningPlan, options: dict[str, Any]) -> str:
    """The same as one command; empty if the model was loaded in a way that the command line does not know."""
    if not set(options) <= set(COMMAND_OPTIONS) or ("dtype" in options and dtype_of(options["dtype"]) is None):
        return ""
    words = ["hf-structprune", "prune", base, "--output-dir", "pruned", *_options(options)]
    if _by_plan(config, plan):
        words += ["--plan", "pruning_plan.json"]
    elif plan.ratio_requested is not None:
        words += ["--ratio", str(plan.ratio_requested)]
    return shlex.join(words + _changed_options(config))


def _changed_options(config: Any) -> list[str]:
    """A configuration as options of the command line: what differs from the defaults, apart from `None`."""
    words = _options(_changed(config))
    return words + (_options(_changed(config.calibration), "calibration-") if hasattr(config, "calibration") else [])


# Told apart, and what was given in memory: code can only name its place.
_NO_OPTIONS = ("calibration", "texts", "tokens", "fingerprint")


def _changed(values: Any) -> dict[str, Any]:
    """Fields that differ from the defaults."""
    names = {field.name for field in dataclasses.fields(values)} - {*_NO_OPTIONS}
    default = type(values)(method=values.method) if isinstance(values, RecoveryConfig) else type(values)()
    if isinstance(values, PruningConfig) and values.criterion == "obs" and AUTO not in values.units:
        names.remove("criterion")  # what 'auto' is where units are named
    return {n: v for n, v in vars(values).items() if n in names and v != getattr(default, n)}


def _literal(value: Any) -> str:
    """As code formatters write it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def loading_value(value: Any) -> str:
    """As `_literal`; of what was given in memory code can only name the type."""
    return f"{value[IN_MEMORY]}(...)" if isinstance(value, dict) and IN_MEMORY in value else _literal(value)


def _options(values: dict[str, Any], prefix: str = "") -> list[str]:
    words: list[str] = []
    for name, value in values.items():
        option = f"--{prefix}{name}".replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, (list, tuple)):
            words += [option, *map(str, value)]
        elif isinstance(value, dict):
            words += [option, *(f"{key}={part}" for key, part in value.items())]
        else:
            words += [option, str(value)]
    return words


RECOVERY_NAME, PICTURE_NAME = "recovery.json", "recovery.png"
QUANTIZATION_NAME = "quantization.json"
SCHEMA_VERSION = 1  # of both
_CALIBRATED = ("gptq", "awq", "auto-round")
_TRAINING = {
    "steps": "{:,} steps", "epochs": "{:.2f} epochs", "batch_size": "batches of {:,}",
    "learning_rate": "learning rate {:g}", "tokens": "{:,} tokens", "trainable_parameters": "{:,} trained parameters",
}  # fmt: skip
_WEIGHTED = ("temperature", "label_weight", "hidden_weight", "attention_weight")


def read_report(path: Path) -> dict[str, Any] | None:
    """The content of `recovery.json` or `quantization.json`; `None` where there is no such file.

    A `CheckpointError` says if it cannot be read, or is of another version.
    """
    if not path.is_file():
        return None
    report = read_json_object(path)
    if report.get("schema_version") != SCHEMA_VERSION:
        found = report.get("schema_version")
        raise CheckpointError(f"{path} is of version {found!r}; this package reads {SCHEMA_VERSION}.")
    return report


def recovery_section(report: dict[str, Any], *, picture: str | None = PICTURE_NAME, command: bool = True) -> str:
    """The section "Recovery" in Markdown, of the content of `recovery.json` and the file with its curve, if any.

    With `command` that which does it again, for pages that do not say how the model was made from the first step on.
    """
    training, told = report.get("training") or {}, report.get("distillation") or {}
    config = RecoveryConfig.from_dict(report["configuration"]) if report.get("configuration") else None
    facts = [words.format(training[key]) for key, words in _TRAINING.items() if training.get(key)]
    if lowered := training.get("lowered"):
        after = f"step{'s' * (len(lowered) > 1)} {' and '.join(map(str, lowered))}"
        facts.append(f"a third of the learning rate after {after}, where it was worse than before training")
    if seconds := training.get("seconds"):
        facts.append(f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes")
    weights = [f"{name.replace('_', ' ')} {told[name]:g}" for name in _WEIGHTED if told.get(name)]
    return render(
        "recovery", picture=picture, config=config, facts=facts, weights=weights,
        datasets=dataset_names(report), versions=_versions(report),
        command=recover_command(report) if command else None,
        **_curve(report),
    )  # fmt: skip


def recovery_summary(report: dict[str, Any]) -> str:
    """What training did, in one sentence."""
    return render("recovery_summary", **_curve(report))


def _curve(report: dict[str, Any]) -> dict[str, Any]:
    """The curve, the log-perplexity of the weights that were kept, and the share of the loss that is back."""
    curve, step = report["curve"], report["best_step"]
    values = {point["step"]: point["log_perplexity"] for point in curve["points"]}
    kept = values.get(step, curve["pruned"] if step == 0 else None)
    return {**curve, "report": report, "kept": kept, "share": report.get("recovered")}


def quantisation_section(report: dict[str, Any], *, command: bool = True) -> str:
    """The section "Quantised" in Markdown, of the content of `quantization.json`; `command` as in Recovery."""
    config, text = QuantizationConfig.from_dict(report["configuration"]), calibration_of(report)
    return render(
        "quantisation", report=report, config=config, weights=dict(report.get("weights") or {}),
        calibration="none" if text is None else calibration_in_words(text), versions=_versions(report),
        command=quantize_command(report) if command else None,
    )  # fmt: skip


def quantisation_summary(report: dict[str, Any]) -> str:
    """What quantising did, in one sentence."""
    return f"Its weights were then quantised to {report['bits']} bits with {report['method']}, see Quantised."


def steps(
    pruning: str, recovery: dict[str, Any] | None, quantization: dict[str, Any] | None, was_recovered: bool
) -> list[str]:
    """The commands that make a checkpoint again, each on what the one before has made; empty if one is not known.

    Args:
        pruning: The first of them.
        recovery, quantization: The reports, where that was done.
        was_recovered: Whether it was trained, be it without a report.
    """
    found, last = [pruning], "pruned"
    if was_recovered:
        found.append(recover_command({**recovery, "model": last}) if recovery else None)
        last = "recovered"
    if quantization is not None:
        found.append(quantize_command({**quantization, "model": last}))
    return found if all(found) else []


def recover_command(report: dict[str, Any]) -> str | None:
    """The command that does the same again; `None` for a training that `hf-structprune recover` did not run.

    The held-out text's dense perplexity is given as the number it was, so that nothing has to be measured again.
    """
    if not report.get("configuration"):
        return None
    config = RecoveryConfig.from_dict(report["configuration"])
    distillation = DistillationConfig.from_dict(report.get("distillation") or {})
    words = ["hf-structprune", "recover", report.get("model") or "PRUNED_MODEL"]
    if report.get("dataset") != []:  # which says that there was none
        words += ["--dataset", *(report.get("dataset") or dataset_names(report) or ["YOUR_DATASET"])]
    words += ["--output-dir", "recovered"]
    words += ["--method", config.method] if config.method != RecoveryConfig().method else []
    if config.method == "distill" and report.get("teacher"):
        words += ["--teacher", report["teacher"]]
    if report["curve"]["dense"] is not None:
        words += ["--dense", f"{math.exp(report['curve']['dense']):.6g}"]
    return shlex.join(words + _changed_options(config) + _changed_options(distillation))


def quantize_command(report: dict[str, Any]) -> str:
    """The command that quantises in the same way again."""
    config = QuantizationConfig.from_dict(report["configuration"])
    words = ["hf-structprune", "quantize", report.get("model") or "MODEL", "--output-dir", "quantised"]
    words += ["--method", config.method] if config.method == QuantizationConfig().method else []
    return shlex.join(words + _changed_options(config))


def dataset_names(report: dict[str, Any]) -> list[str]:
    """Names of the data that was trained on."""
    sources = (report.get("data") or {}).get("sources") or []
    given = (report.get("training") or {}).get("dataset") or []
    return [one["name"] for one in sources] or ([given] if isinstance(given, str) else list(given))


def calibration_of(report: dict[str, Any]) -> CalibrationConfig | None:
    """The text that quantised values were chosen on; `None` for methods that round to the nearest."""
    config = QuantizationConfig.from_dict(report["configuration"])
    return config.calibration if config.method in _CALIBRATED else None


def libraries(report: dict[str, Any]) -> list[str]:
    """The libraries besides Transformers that quantised it and read it."""
    return [name for name in report.get("versions") or {} if name not in ("hf_structprune", *LIBRARIES)]


def _versions(report: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in (report.get("versions") or {}).items())
