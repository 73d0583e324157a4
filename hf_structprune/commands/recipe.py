"""`Recipe`: a YAML file that says how a model is pruned, recovered, quantised, measured and published."""

from __future__ import annotations

import dataclasses
import os
import re
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import Ratio, check_fields, checked
from ..config import PruningConfig
from ..errors import ConfigurationError
from ..files.reading import parse_yaml, read_text
from ..quantization.configuration import QuantizationConfig
from ..recovery.configuration import DistillationConfig, RecoveryConfig


if TYPE_CHECKING:
    from ..evaluation.evaluator import EvaluationConfig


RECIPE_NAME = "recipe.yaml"
MODEL_OPTIONS = (
    "model", "dtype", "device", "device_map", "revision", "subfolder", "variant", "gguf_file", "trust_remote_code",
)  # fmt: skip
SECTIONS = ("model", "output_dir", "prune", "recover", "quantize", "evaluate", "push")
# The options of the section `push` with their types.
PUSH_OPTIONS = {
    "repo_id": str | None, "private": bool | None, "revision": str | None, "create_pr": bool,
    "commit_message": str | None,
}  # fmt: skip
PRESETS = {"llm_pruner": PruningConfig.llm_pruner}
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass
class RecoverySection:
    """The section `recover`: the fields of `RecoveryConfig`, those of `DistillationConfig` under `distillation`, and:

    Attributes:
        dataset: What to train on; several sources are mixed.
        split: Split of data sets that have several.
        output_dir: Folder of the recovered checkpoint.
        config: How to train.
        distillation: How to distil.
    """

    dataset: list[str]
    split: str
    output_dir: str
    config: RecoveryConfig
    distillation: DistillationConfig

    def __post_init__(self) -> None:
        check_fields(self)

    def __str__(self) -> str:
        return f"recovered by {self.config.method} on {', '.join(self.dataset)}"


@dataclass
class QuantizationSection:
    """The section `quantize`: the fields of `QuantizationConfig`, and:

    Attributes:
        output_dir: Folder of the quantised checkpoint.
        config: How to quantise.
    """

    output_dir: str
    config: QuantizationConfig

    def __post_init__(self) -> None:
        check_fields(self)

    def __str__(self) -> str:
        return f"quantised to {self.config.bits} bits by {self.config.method}"


@dataclass
class Recipe:
    """What `hf-structprune run FILE` does: prune, recover, quantise, measure all sides, write the cards, push.

    Attributes:
        model: Options of loading, with the model's id or folder under `"model"`.
        output_dir: Folder of the checkpoint.
        ratio: Share of all parameters to remove; `None` if the configuration has ratios by kind.
        pruning: How to prune.
        recovery: How to train the pruned model; `None` for not at all.
        quantization: How to quantise what came out; `None` for not at all.
        evaluation: What to measure on all sides; `None` for nothing.
        dense_results: Where the results of the dense model are kept, so that several recipes can share them.
        push: Arguments of `push_to_hub`; empty if the recipe names no repository.
        text: The file as it was written, variables included.
    """

    model: dict[str, Any]
    output_dir: str
    ratio: float | None
    pruning: PruningConfig
    recovery: RecoverySection | None
    quantization: QuantizationSection | None
    evaluation: EvaluationConfig | None
    dense_results: str | None
    push: dict[str, Any]
    text: str

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
        from ..evaluation.evaluator import EvaluationConfig

        _check_sections(content)
        model = content["model"] if isinstance(content["model"], dict) else {"model": content["model"]}
        _check_options(model, MODEL_OPTIONS, "model")
        model = {**model, "model": checked("model", model.get("model"), str)}
        output_dir = checked("output_dir", content["output_dir"], str)
        ratio, pruning = _pruning(dict(content["prune"]))
        push = content.get("push") or {}
        _check_options(push, list(PUSH_OPTIONS), "push")
        push = {name: checked(name, value, PUSH_OPTIONS[name]) for name, value in push.items()}
        evaluation, dense_results = _given(content, "evaluate"), None
        if evaluation is not None:
            dense_results = checked("dense_results", evaluation.pop("dense_results", None), str | None)
            evaluation = _build(EvaluationConfig, evaluation, "evaluate")
        recovery = _recovery(content)
        recipe = cls(
            model, output_dir, ratio, pruning, recovery, _quantization(content, recovery), evaluation, dense_results,
            push, text,
        )  # fmt: skip
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
    for name in SECTIONS[2:]:
        if not isinstance(content.get(name), (dict, types.NoneType)):
            raise ConfigurationError(f"`{name}` is {content[name]!r}; it must hold `option: value` lines.")


def _pruning(section: dict[str, Any]) -> tuple[float | None, PruningConfig]:
    """The ratio and the configuration; a preset takes the ratio as its own."""
    preset, ratio = section.pop("preset", None), checked("ratio", section.pop("ratio", None), Ratio | None)
    if preset is None:
        return ratio, _build(PruningConfig, section, "prune")
    if preset not in PRESETS:
        raise ConfigurationError(f"`preset` is {preset!r}; allowed values are {', '.join(PRESETS)}.")
    if ratio is None:
        raise ConfigurationError(f"`preset: {preset}` needs a `ratio`.")
    _check_options(section, [field.name for field in dataclasses.fields(PruningConfig)], "prune")
    return None, PRESETS[preset](ratio, **section)


def _given(content: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The options of a section that are not left empty."""
    section = content.get(name)
    return section and {option: value for option, value in section.items() if value is not None}


def _recovery(content: dict[str, Any]) -> RecoverySection | None:
    """The section `recover`, if there is one; the checkpoint goes beside the pruned one unless it says where."""
    if not content.get("recover"):
        return None
    section = _given(content, "recover")
    dataset, folder = section.pop("dataset", None), section.pop("output_dir", f"{content['output_dir']}-recovered")
    split = section.pop("split", "train")
    if not dataset:
        raise ConfigurationError("`recover` needs a `dataset`: a file, a folder or a data set of the Hub.")
    distillation = checked("distillation", section.pop("distillation", None), dict[str, Any] | None) or {}
    distillation = _build(DistillationConfig, distillation, "recover.distillation")
    config = _build(RecoveryConfig, section, "recover")
    return RecoverySection(dataset, split, folder, config, distillation)


def _quantization(content: dict[str, Any], recovery: RecoverySection | None) -> QuantizationSection | None:
    """The section `quantize`, if there is one; the checkpoint goes beside the one that it is made of."""
    if not content.get("quantize"):
        return None
    section = _given(content, "quantize")
    source = content["output_dir"] if recovery is None else recovery.output_dir
    folder = section.pop("output_dir", f"{source}-quantised")
    return QuantizationSection(folder, _build(QuantizationConfig, section, "quantize"))


def _build(cls: type, values: dict[str, Any], section: str) -> Any:
    _check_options(values, [field.name for field in dataclasses.fields(cls)], section)
    return cls(**values)


def _check_options(values: dict[str, Any], known: Sequence[str], section: str) -> None:
    for name in values:
        if name not in known:
            raise ConfigurationError(f"`{name}` is not an option of `{section}`; the options are {', '.join(known)}.")
