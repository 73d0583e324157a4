"""How a model was made and is used, as a card says it: what went, on which text, which papers, lines of code."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import PruningConfig
from ..criteria import Method, Paper
from ..criteria.inputs import SURGEON, WIFV
from ..files.places import can_only_be_a_path
from ..plan import PruningPlan
from ..text.calibration import CalibrationConfig
from ..units import KINDS, DepthKind, UnitKind, WidthKind, kinds_of
from .origin import IN_MEMORY, is_file


def what_went(config: PruningConfig, plan: PruningPlan) -> list[str]:
    """One line for each kind of unit: what went, and by which criterion."""
    lines = []
    if widths := config.kinds(kinds_of(WidthKind)):
        names = {kind: config.criterion_of(kind) for kind in widths}
        names = names if len(set(names.values())) > 1 else {"": names[widths[0]]}
        variants = {kind: f" (`{config.taylor}`)" if name == "taylor" else "" for kind, name in names.items()}
        how = ", ".join(f"{kind} `{name}`{variants[kind]}".strip() for kind, name in names.items())
        lines.append(
            f"Numbers of units: as in a plan that was given; units that it did not name: criterion {how}"
            if plan.given
            else f"Criterion: {how}, allocation: `{config.allocation}`"
        )
    for kind in KINDS.values():
        if told := kind.told(plan):
            lines.append(f"{told} ({_chosen(kind, config, plan)})")
    shares = {kind: count / plan.parameters_before for kind, count in plan.removed.items()}
    if len(shares) > 1:
        lines.append(f"Of all parameters: {', '.join(f'{kind} {share:.1%}' for kind, share in shares.items())}")
    return lines


def _chosen(kind: UnitKind, config: PruningConfig, plan: PruningPlan) -> str:
    if plan.given:
        return "named in a plan that was given"
    by_criterion = _is_ranked(kind, config, plan)
    return f"criterion `{config.criterion_of(kind.name)}`" if by_criterion else "named in the configuration"


def _is_ranked(kind: UnitKind, config: PruningConfig, plan: PruningPlan) -> bool:
    """Whether a criterion decides what goes of a kind."""
    return not isinstance(kind, DepthKind) or config.chooses_depth(plan.ratio_requested)


LM_EVAL = Paper(
    "eval-harness", "The Language Model Evaluation Harness",
    "Gao, Leo and Tow, Jonathan and Abbasi, Baber and Biderman, Stella and others", None, 2024,
    "https://github.com/EleutherAI/lm-evaluation-harness",
)  # fmt: skip


def _methods(config: PruningConfig, plan: PruningPlan) -> list[Method]:
    """Of the criteria that decided something."""
    kinds = [KINDS[name] for name in config.units]
    return [kind.method(config.criterion_of(kind.name)) for kind in kinds if _is_ranked(kind, config, plan)]


def citations(config: PruningConfig, plan: PruningPlan, tasks: bool = False) -> list[str]:
    """BibTeX entries of what a configuration uses; of lm-eval too if its tasks were measured."""
    papers = [paper for method in _methods(config, plan) for paper in method.papers]
    papers += WIFV.papers if config.allocation == "global" else ()
    papers += [SURGEON] if config.compensation else []
    papers += [LM_EVAL] if tasks else []
    return [paper.bibtex for paper in dict.fromkeys(papers)]


_SAMPLE = ["Salesforce/wikitext", "allenai/c4"]


def uses_text(config: PruningConfig, plan: PruningPlan) -> bool:
    """Whether calibration text was looked at: as recorded, or else as the configuration asks for."""
    if plan.calibrated is not None:
        return plan.calibrated
    by_text = config.compensation or config.allocation == "search"
    return by_text or any(method.needs_text for method in _methods(config, plan))


def _sources(calibration: CalibrationConfig) -> list[str]:
    dataset = calibration.dataset
    return [dataset] if isinstance(dataset, str) else list(dataset or [])


def calibration_datasets(calibration: CalibrationConfig) -> list[str]:
    """Data sets of the Hub that were calibrated on."""
    if calibration.fingerprint is not None:
        return []
    sources = _sources(calibration)
    hub = [source for source in sources if not is_file(source) and not can_only_be_a_path(source)]
    return hub if sources else list(_SAMPLE)


def calibration_in_words(calibration: CalibrationConfig) -> str:
    """A calibration text; of local files the name only, since the card is public."""
    size, sources = f"{calibration.num_samples} x {calibration.length} tokens", _sources(calibration)
    if calibration.fingerprint is not None:
        return f"{size}, given in memory (SHA-256 begins with `{calibration.fingerprint}`)"
    if not sources:
        return f"{size} of the sample of hf_structprune: half WikiText-2 (validation), half C4, English"
    hub = calibration_datasets(calibration)
    names = [f"[{s}](https://huggingface.co/datasets/{s})" if s in hub else f"`{Path(s).name}`" for s in sources]
    which = "".join(
        f", {k} `{v}`" for k, v in (("configuration", calibration.name), ("split", calibration.split)) if v
    )
    return f"{size} of {', '.join(names)}{which if hub else ''}"


# Calibration data that was given in memory: code can only name its place.
_IN_MEMORY = ("texts", "tokens", "fingerprint")
# Options of loading that the commands have, and the dtypes that they know.
COMMAND_OPTIONS = ("dtype", "revision", "subfolder", "variant", "gguf_file", "trust_remote_code")
COMMAND_DTYPES = ("bfloat16", "float16", "float32")
_LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{options})
tokenizer = AutoTokenizer.from_pretrained("{name}")"""


def loading(name: str, per_layer: bool, libraries: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Ways to load a checkpoint, each with a sentence about it; `libraries` are what its quantised weights need."""
    plain = _LOAD.format(name=name, options="")
    needs = f"Its quantised weights need `pip install {' '.join(libraries)}`. " if libraries else ""
    if not per_layer:
        other = "nothing of this package" if libraries else "nothing else"
        return [(f"{needs}It is a plain Transformers checkpoint; {other} has to be installed:", plain)]
    return [
        (
            f"{needs}Its layers are not alike, which Transformers reads but does not build by itself yet. With "
            "`pip install hf-structprune`:",
            f"import hf_structprune  # before the model is loaded\n{plain}",
        ),
        (
            "Or without it, by the modelling file that travels with the checkpoint:",
            _LOAD.format(name=name, options=", trust_remote_code=True"),
        ),
    ]


def recovering(name: str, per_layer: bool) -> str:
    """The command that trains an adapter with TRL: on a pruned model, or once more on a recovered one."""
    options = " --trust_remote_code" if per_layer else ""
    return (
        f"trl sft --model_name_or_path {name}{options} --dataset_name YOUR_DATASET \\\n"
        "  --use_peft --lora_r 8 --lora_alpha 16 --lora_target_modules all-linear --output_dir recovered"
    )


def quantising(name: str) -> str:
    """Commands that quantise the model."""
    command = f"hf-structprune quantize {name} --method {{}} --bits 4 --output-dir quantised"
    return f"{command.format('bitsandbytes')}\n# or, calibrated:\n{command.format('gptq')}"


def config_expression(config: PruningConfig) -> str:
    """A Python expression that gives an equal configuration: what differs from the defaults."""
    changed = _changed(config)
    calibration = {k: v for k, v in _changed(config.calibration).items() if k not in _IN_MEMORY}
    parts = [f"{name}={_literal(value)}" for name, value in changed.items()]
    if calibration:
        inner = ", ".join(f"{name}={_literal(value)}" for name, value in calibration.items())
        parts.append(f"calibration=CalibrationConfig({inner})")
    return f"PruningConfig({', '.join(parts)})"


def making_in_python(
    base: str, config: PruningConfig, ratio: float | None, options: dict[str, Any], given: bool = False
) -> str:
    """The lines that make the model again.

    Args:
        base: The base model.
        config: What it was pruned with.
        ratio: What was asked for.
        options: What `from_pretrained` needs to load the same weights.
        given: Whether it was pruned by a plan that was given.
    """
    by_plan = given or (ratio is None and config.needs_ratio)
    names = ["CalibrationConfig"] if "CalibrationConfig(" in config_expression(config) else []
    names += ["PruningConfig", *(["PruningPlan"] if by_plan else []), "StructuredPruner"]
    what = 'PruningPlan.load("pruning_plan.json")' if by_plan else "" if ratio is None else repr(ratio)
    more = "".join(f", {name}={loading_value(value)}" for name, value in options.items())
    return (
        f"from hf_structprune import {', '.join(names)}\n\n"
        f"config = {config_expression(config)}\n"
        f'pruner = StructuredPruner.from_pretrained("{base}", config=config{more})\n'
        f"pruner.prune({what})\n"
        'pruner.save_pretrained("pruned")'
    )


def making_on_the_command_line(
    base: str, config: PruningConfig, ratio: float | None, options: dict[str, Any], given: bool = False
) -> str:
    """The same as one command; empty if the model was loaded in a way that the command line does not know."""
    if not set(options) <= set(COMMAND_OPTIONS) or options.get("dtype", COMMAND_DTYPES[0]) not in COMMAND_DTYPES:
        return ""
    words = ["hf-structprune", "prune", base, "--output-dir", "pruned", *_options(options, "")]
    if given or (ratio is None and config.needs_ratio):
        words += ["--plan", "pruning_plan.json"]
    elif ratio is not None:
        words += ["--ratio", str(ratio)]
    return shlex.join(words + _options(_changed(config), "") + _calibration_options(config))


def changed_options(values: Any) -> list[str]:
    """A configuration as options of the command line: what differs from the defaults, apart from `None`."""
    words = _options({name: value for name, value in _changed(values).items() if value is not None}, "")
    return words + (_calibration_options(values) if hasattr(values, "calibration") else [])


def _calibration_options(config: Any) -> list[str]:
    changed = {name: value for name, value in _changed(config.calibration).items() if name not in _IN_MEMORY}
    return _options(changed, "calibration-")


def _changed(values: Any) -> dict[str, Any]:
    """Fields that differ from the defaults; the calibration apart."""
    default = type(values)()
    return {
        field.name: getattr(values, field.name)
        for field in dataclasses.fields(values)
        if field.name != "calibration" and getattr(values, field.name) != getattr(default, field.name)
    }


def _literal(value: Any) -> str:
    """As code formatters write it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def loading_value(value: Any) -> str:
    """As `_literal`; of what was given in memory code can only name the type."""
    return f"{value[IN_MEMORY]}(...)" if isinstance(value, dict) and IN_MEMORY in value else _literal(value)


def _options(values: dict[str, Any], prefix: str) -> list[str]:
    words: list[str] = []
    for name, value in values.items():
        option = f"--{prefix}{name}".replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, (list, tuple)):
            words += [option, *map(str, value)]
        elif isinstance(value, dict):
            words += [option, *(f"{key}={part}" for key, part in value.items())]
        else:
            words += [option, str(value)]
    return words
