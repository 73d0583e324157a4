"""`Recipe`: a YAML file that says how a model is pruned, recovered, quantised, measured and published."""

from __future__ import annotations

import dataclasses
import os
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..checks import Limits, Ratio, check_options, checked, field_types
from ..config import PruningConfig
from ..errors import ConfigurationError
from ..evaluation_config import EvaluationConfig
from ..files.reading import parse_yaml, read_text
from ..quantization.configuration import QuantizationConfig
from ..recovery.configuration import DistillationConfig, RecoveryConfig
from .options import ModelArguments, PushArguments


# The sections, each with the dataclass that its options are the fields of, and the options beside those.
SECTIONS = {
    "model": (ModelArguments, {}),
    "output_dir": (str, {}),
    "minutes": (float, {}),
    "prune": (PruningConfig, {"preset": str | None, "ratio": Ratio | None}),
    "recover": (
        RecoveryConfig,
        {"dataset": list[str], "split": str, "output_dir": str, "distillation": dict[str, Any] | None},
    ),
    "quantize": (QuantizationConfig, {"output_dir": str}),
    "evaluate": (EvaluationConfig, {"dense_results": str | None}),
    "push": (PushArguments, {}),
}
# Fields of the dataclasses that are about one call of a command.
NOT_OPTIONS = {"model": ("json",), "push": ("folder", "json")}
PRESETS = {"llm_pruner": PruningConfig.llm_pruner}
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass
class Step:
    """A section `recover` or `quantize`: its configuration, the folder of what it makes, and the data to train on."""

    config: Any
    output_dir: str
    dataset: list[str] = dataclasses.field(default_factory=list)
    split: str = "train"
    distillation: DistillationConfig | None = None

    def __str__(self) -> str:
        if isinstance(self.config, RecoveryConfig):
            return f"recovered by {self.config.method} on {', '.join(self.dataset) or 'what the dense model writes'}"
        return f"quantised to {self.config.bits} bits by {self.config.method}"


@dataclass
class Recipe:
    """What `hf-structprune run FILE` does: prune, recover, quantise, measure all sides, write the cards, push.

    A step that is `None` is not done. Several recipes may share the file of the dense model's results; `push` are
    arguments of `push_folder`, and `text` is the file as it was written. With `minutes` the recovery takes what
    pruning and measuring leave of them; quantising and timing come on top.
    """

    model: ModelArguments
    output_dir: str
    ratio: float | None
    pruning: PruningConfig
    recovery: Step | None
    quantization: Step | None
    evaluation: EvaluationConfig | None
    dense_results: str
    push: dict[str, Any]
    text: str
    minutes: float | None = None

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recipe:
        """Reads and checks a recipe. `${NAME}` stands for an environment variable, `${NAME:-value}` has a default.

        Raises:
            ConfigurationError: The file is no recipe, a variable is not set, a value is not allowed, or a section or
                option stands twice.
        """
        text = read_text(path, "recipe")
        content = parse_yaml(substitute(text), path)
        try:
            return cls.from_dict(content, text)
        except ConfigurationError as error:
            raise ConfigurationError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, content: dict[str, Any], text: str = "") -> Recipe:
        _check_sections(content)
        if not isinstance(content["model"], dict):
            content = {**content, "model": {"model": content["model"]}}
        model = ModelArguments(**{"model": None, **_section(content, "model")[0]})
        folder = checked("output_dir", content["output_dir"], str)
        pruning, beside = _section(content, "prune")
        ratio, preset = beside.get("ratio"), beside.get("preset")
        if preset is None:
            pruning = PruningConfig(**pruning)
        elif preset not in PRESETS:
            raise ConfigurationError(f"`preset` is {preset!r}; allowed values are {', '.join(PRESETS)}.")
        elif ratio is None:
            raise ConfigurationError(f"`preset: {preset}` needs a `ratio`.")
        else:  # which takes the ratio as its own
            ratio, pruning = None, PRESETS[preset](ratio, **pruning)
        recovery = quantization = evaluation = None
        dense_results = f"{os.path.abspath(folder)}-dense.json"
        # The checkpoint of a section goes beside the one that it is made of, unless it says where.
        if content.get("recover"):
            values, beside = _section(content, "recover")
            if not beside.get("dataset") and values.get("method") != "distill":
                raise ConfigurationError(
                    "`recover` needs a `dataset`: a file, a folder or a data set of the Hub. Only `method: distill` "
                    "can do without."
                )
            distillation = beside.pop("distillation", {})
            _check_options(distillation, DistillationConfig, "recover.distillation")
            beside = {"output_dir": f"{folder}-recovered", **beside}
            recovery = Step(RecoveryConfig(**values), **beside, distillation=DistillationConfig(**distillation))
        if content.get("quantize"):
            values, beside = _section(content, "quantize")
            trained = folder if recovery is None else recovery.output_dir
            quantization = Step(QuantizationConfig(**values), **{"output_dir": f"{trained}-quantised", **beside})
        if content.get("evaluate") is not None:
            values, beside = _section(content, "evaluate")
            evaluation, dense_results = EvaluationConfig(**values), beside.get("dense_results") or dense_results
        kinds = field_types(PushArguments)
        push = {name: checked(name, value, kinds[name]) for name, value in _section(content, "push")[0].items()}
        minutes = checked("minutes", content.get("minutes"), Annotated[float, Limits(0, open="least")] | None)
        if minutes is not None and (recovery is None or recovery.config.minutes is not None):
            raise ConfigurationError(
                "`minutes` are those of the whole recipe, of which the section `recover` takes what is left: it must "
                "be there, without `minutes` of its own."
            )
        recipe = cls(
            model, folder, ratio, pruning, recovery, quantization, evaluation, dense_results, push, text, minutes
        )
        paths = [path.absolute() for path in recipe.folders.values()]
        for path in paths:
            if paths.count(path) > 1:
                raise ConfigurationError(f"Two sections have the `output_dir` {path.name}; give each its own.")
        return recipe

    @property
    def folders(self) -> dict[str, Path]:
        """The folders of the checkpoints by their states, in the order in which they are made."""
        made = {"pruned": self, "recovered": self.recovery, "quantised": self.quantization}
        return {state: Path(step.output_dir) for state, step in made.items() if step is not None}


def substitute(text: str) -> str:
    """Puts in environment variables: `${NAME}`, or `${NAME:-value}` with a default."""

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        if name not in os.environ and default is None:
            raise ConfigurationError(f"The recipe needs the environment variable {name}, which is not set.")
        return os.environ.get(name) or default or ""

    return _VARIABLE.sub(value, text)


def _check_sections(content: Any) -> None:
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"This is a {type(content).__name__}; a recipe has the sections {', '.join(SECTIONS)}."
        )
    for name in content:
        if name not in SECTIONS:
            raise ConfigurationError(f"`{name}` is not a section of a recipe; the sections are {', '.join(SECTIONS)}.")
    for name in ("model", "output_dir", "prune"):
        if not content.get(name):
            raise ConfigurationError(f"The section `{name}` is missing.")
    for name in list(SECTIONS)[3:]:
        if not isinstance(content.get(name), (dict, types.NoneType)):
            raise ConfigurationError(f"`{name}` is {content[name]!r}; it must hold `option: value` lines.")


def _section(content: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a section that are not left empty: those of its dataclass, and those beside it, checked."""
    cls, kinds = SECTIONS[name]
    given = {option: value for option, value in (content.get(name) or {}).items() if value is not None}
    beside = {option: checked(option, given.pop(option), kind) for option, kind in kinds.items() if option in given}
    _check_options(given, cls, name)
    return given, beside


def _check_options(values: dict[str, Any], cls: type, section: str) -> None:
    known = [field.name for field in dataclasses.fields(cls) if field.name not in NOT_OPTIONS.get(section, ())]
    check_options(f"`{section}`", values, known)
