"""What stands in a checkpoint folder of this package, read, and the columns of its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from yaml import YAMLError

from ..config import CONFIG_NAME, PruningConfig
from ..errors import CheckpointError, ConfigurationError, HubError, StructPruneError
from ..evaluation.results import RESULTS_NAME, EvaluationResult, Figure
from ..evaluation.table import ResultTable, label_of
from ..files.reading import read_json_object
from ..plan import PLAN_NAME, PruningPlan
from .origin import RECORD
from .words import (
    QUANTIZATION_NAME,
    RECOVERY_NAME,
    config_expression,
    quantisation_section,
    quantisation_summary,
    read_report,
    recovery_section,
    recovery_summary,
)


CARD_NAME, RECIPE_NAME = "README.md", "recipe.yaml"
QUALITY_NAME, WIDTHS_NAME = "quality.png", "pruned_widths.png"
DENSE_RESULTS_NAME, PRUNED_RESULTS_NAME = "evaluation_results_dense.json", "evaluation_results_pruned.json"
# Results of the models that a checkpoint was made from, beside its own.
BEFORE = {
    "dense": DENSE_RESULTS_NAME, "pruned": PRUNED_RESULTS_NAME, "recovered": "evaluation_results_recovered.json",
}  # fmt: skip


class Contents:
    """A pruned, recovered or quantised checkpoint, apart from its weights: what stands in the files of this package.

    Attributes:
        model_config: Its config.json.
        record: What was written into that when it was pruned; empty for checkpoints without it.
        sees: Whether it takes images as well.
        result: What was measured on it; `None` for nothing.
        before: What was measured on the models before it, by their states; `None` for nothing.
        state: `"pruned"`, `"recovered"` or `"quantised"`.
        was_recovered: Whether it was trained after pruning.

    Raises:
        HubError: The folder is no checkpoint of this package; says which file is missing.
        CheckpointError: A file of this package is damaged.
        ConfigurationError: The results in it are those of another model.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise HubError(f"There is no folder {folder}.")
        for needed in ("config.json", CONFIG_NAME, PLAN_NAME):
            if not (folder / needed).is_file():
                raise HubError(
                    f"There is no {needed} in {folder}: it is no checkpoint that hf_structprune has pruned. Other "
                    "checkpoints go to the Hub with `hf upload REPO FOLDER`."
                )
        self.folder, found = folder, _read_files(folder)
        self.config: PruningConfig = found[CONFIG_NAME]
        self.plan: PruningPlan = found[PLAN_NAME]
        self.model_config: dict[str, Any] = found["config.json"]
        self.result: EvaluationResult | None = found.get(RESULTS_NAME)
        self.before: dict[str, EvaluationResult | None] = {state: found.get(name) for state, name in BEFORE.items()}
        self.recovery: dict[str, Any] | None = found.get(RECOVERY_NAME)
        self.quantization: dict[str, Any] | None = found.get(QUANTIZATION_NAME)
        self.record: dict[str, Any] = self.model_config.get(RECORD) or {}
        classes = self.model_config.get("architectures") or []
        self.sees = any(name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() for name in classes)
        trained = self.recovery is not None or (self.result is not None and self.result.state == "recovered")
        self.state = "recovered" if trained else "pruned"
        if self.quantization is not None or "quantization_config" in self.model_config:
            self.state = "quantised"
        self.was_recovered = trained or self.before["recovered"] is not None
        for state, side in [*self.before.items(), (self.state, self.result)]:
            if side is not None:
                self._check_result(RESULTS_NAME if side is self.result else BEFORE[state], side, state)

    def _check_result(self, name: str, result: EvaluationResult, state: str) -> None:
        """Refuses results of a model in another state, or whose parameters are not those of the plan or a report."""
        if result.state != state:
            raise ConfigurationError(f"{name} is of a {result.state} model ({result.model}).")
        counted, expected = result.value("efficiency/parameters"), self.weights_of(state)[0]
        if counted is not None and counted != expected:
            raise ConfigurationError(
                f"{name} was measured on another model: {result.model} has {counted:,.0f} parameters, the plan says "
                f"{expected:,}. Measure again, or take the file away."
            )

    @property
    def measured(self) -> dict[str, EvaluationResult | None]:
        """What was measured, by the states that this checkpoint went through; its own results are under its own."""
        sides = {"dense": self.before["dense"]}
        pruned, recovered = self.before["pruned"], self.before["recovered"]
        if self.state != "pruned" and (pruned is not None or self.recovery is not None or not self.was_recovered):
            sides["pruned"] = pruned
        if self.state == "quantised" and self.was_recovered:
            sides["recovered"] = recovered
        return {**sides, self.state: self.result}

    @property
    def results(self) -> list[EvaluationResult]:
        """What was measured, the dense side first."""
        return [side for side in self.measured.values() if side is not None]

    @property
    def results_files(self) -> list[str]:
        """The names of the files with it, that of this checkpoint first."""
        beside = [BEFORE[state] for state in ("recovered", "pruned", "dense") if self.before[state] is not None]
        return [RESULTS_NAME] * (self.result is not None) + beside

    @property
    def pictures(self) -> list[Path]:
        """Pictures, relative to the folder; quality against size first, then the widths."""
        first = [path for path in (self.folder / QUALITY_NAME, self.folder / WIDTHS_NAME) if path.is_file()]
        others = sorted((self.folder / "pictures").glob("*.png"), key=lambda path: "widths" not in path.name)
        return [path.relative_to(self.folder) for path in (*first, *others)]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Answers to the prompts that all models were given: `prompt`, and under `answers` pairs of state and text."""
        sides = [(side.state, {s["prompt"]: s["text"] for s in side.samples}) for side in self.results if side.samples]
        common = [prompt for prompt in sides[-1][1] if all(prompt in texts for _, texts in sides)] if sides[1:] else []
        return [{"prompt": prompt, "answers": [(state, texts[prompt]) for state, texts in sides]} for prompt in common]

    def weights_of(self, state: str) -> tuple[int, int]:
        """Parameters and bytes of a state: training may have untied embeddings or changed the dtype, quantising packs.

        Parameters of a quantised model are counted as if they were unpacked.
        """
        if state == "dense":
            return self.plan.parameters_before, self.plan.bytes_before
        parameters, size = self.plan.parameters_after, self.plan.bytes_after
        reports = {"pruned": [], "recovered": [self.recovery], "quantised": [self.recovery, self.quantization]}
        for report in filter(None, reports[state]):
            weights = report.get("weights") or {}
            parameters, size = weights.get("parameters", parameters), weights.get("bytes", size)
        return parameters, size

    def columns(self) -> list[EvaluationResult]:
        """The columns of the table: the states that a checkpoint went through, from dense to its own.

        Parameters, bytes and MACs are those of the plan and the reports where they were not measured on all sides.
        """
        packed = "" if self.quantization is None else "; of the quantised model, the bytes of its files"
        columns, measured = [], self.measured
        for state, side in measured.items():
            parameters, size = self.weights_of(state)
            macs = self.plan.macs_before if state == "dense" else self.plan.macs_after
            cache = self.plan.kv_bytes_before if state == "dense" else self.plan.kv_bytes_after
            figures = {} if side is None else side.figures
            for name, value, unit, how in (
                ("kv_cache_bytes_per_token", cache, "B", ", keys and values of all layers"),
                ("macs", macs, "MAC", ", at 1 x 64 tokens"), ("weight_bytes", size, "B", packed),
                ("parameters", parameters, "", ""),
            ):  # fmt: skip
                name, how = f"efficiency/{name}", f"counted from the shapes of the weights{how}"
                if value is not None and not all(
                    other is not None and name in other.figures for other in measured.values()
                ):
                    counted = Figure(name, value, unit, higher_is_better=False, protocol=how)
                    figures = {name: counted, **{key: figure for key, figure in figures.items() if key != name}}
            columns.append(dataclasses.replace(side or EvaluationResult("", state), figures=figures))
        return columns


def protocols(results: list[EvaluationResult]) -> dict[str, list[str]]:
    """How things were measured: names of figures by the words that describe it, each once."""
    found: dict[str, list[str]] = {}
    for result in results:
        for figure in result.figures.values():
            label = label_of(figure).rstrip(" ↑↓")
            words = ", of ".join(filter(None, (figure.protocol, figure.details.get("source"))))
            if figure.protocol and label not in found.setdefault(words, []):
                found[words].append(label)
    return found


def is_pruned(folder: Path | None) -> bool:
    """Whether a folder holds a checkpoint that this package has pruned."""
    return folder is not None and all((folder / name).is_file() for name in (CONFIG_NAME, PLAN_NAME))


def read_text(path: Path) -> str:
    """The text of a file, empty if there is none."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def read_metadata(card: str) -> dict[str, Any]:
    """The metadata of a card, empty if it has none; a `HubError` if they cannot be read."""
    if not card.lstrip().startswith("---"):
        return {}
    try:
        return ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (TypeError, ValueError, YAMLError) as error:
        raise HubError(f"The metadata at the top of the README.md cannot be read: {error}") from error


def check_own_files(folder: Path) -> None:
    """Reads every file of this package in a folder; what is not there is not missed. Errors as of `Contents`."""
    check_card(folder)
    if is_pruned(folder) and (folder / "config.json").is_file():
        Contents(folder)
    else:
        _read_files(folder)


def check_card(folder: Path) -> None:
    """Refuses a card that cannot be read: its texts go over into the one that will replace it."""
    check_file(folder / CARD_NAME, lambda path: read_metadata(read_text(path)))


def check_file(path: Path, read: Callable[[Path], Any]) -> Any:
    """What a file holds; a `CheckpointError` that names it if it cannot be read, whatever the reason."""
    try:
        return read(path)
    except StructPruneError as error:
        what = str(error).replace(str(path), "it", 1).rstrip(".")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        what = f"it is damaged ({error!r})"
    raise CheckpointError(f"{path} cannot be used: {what}. Put it right, or take it away.")


def _read_files(folder: Path) -> dict[str, Any]:
    """What stands in the files of this package by their names, told once as the card does, so that it can be."""

    def read(path: Path) -> Any:
        load, *tellers = _FILES[path.name]
        found = load(path)
        for tell in tellers:
            tell(found)
        return found

    return {name: check_file(folder / name, read) for name in _FILES if (folder / name).is_file()}


_FILES = {
    "config.json": (partial(read_json_object, repeats=True),),
    CONFIG_NAME: (PruningConfig.load, config_expression),
    PLAN_NAME: (PruningPlan.load, PruningPlan.table),
    RECOVERY_NAME: (read_report, recovery_section, recovery_summary),
    QUANTIZATION_NAME: (read_report, quantisation_section, quantisation_summary),
    **dict.fromkeys(
        (RESULTS_NAME, *BEFORE.values()), (EvaluationResult.load, lambda result: ResultTable([result]).to_markdown())
    ),
}
