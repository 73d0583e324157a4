"""Lines of code for a model card: loading, recovering, quantising and making the model again."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Any

from ..config import PruningConfig
from .origin import IN_MEMORY


# Calibration data that was given in memory: code can only name its place.
_IN_MEMORY = ("texts", "tokens", "fingerprint")
# Options of loading that the commands have, and the dtypes that they know.
COMMAND_OPTIONS = ("dtype", "revision", "subfolder", "variant", "gguf_file", "trust_remote_code")
COMMAND_DTYPES = ("bfloat16", "float16", "float32")
_LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{options})
tokenizer = AutoTokenizer.from_pretrained("{name}")"""


def loading(name: str, per_layer: bool, libraries: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Ways to load a checkpoint, each with a sentence about it.

    Args:
        name: Hub id or folder.
        per_layer: Whether its layers differ in width.
        libraries: What its quantised weights need.
    """
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
    lines = [
        f"hf-structprune quantize {name} --method {method} --bits 4 --output-dir quantised"
        for method in ("bitsandbytes", "gptq")
    ]
    return "\n# or, calibrated:\n".join(lines)


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
        options: What has to be given to `from_pretrained` to load the same weights.
        given: Whether a plan was given instead of what was asked for.
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


def full_configuration(config: PruningConfig) -> str:
    """Everything, as JSON."""
    return json.dumps(config.to_dict(), indent=2)


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
