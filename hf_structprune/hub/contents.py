"""What stands in a checkpoint folder of this package, read, and the columns of its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
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
    PICTURE_NAME,
    QUANTIZATION_NAME,
    RECOVERY_NAME,
    config_expression,
    quantisation_section,
    quantisation_summary,
    read_report,
    recovery_section,
    recovery_summary,
)


CARD_NAME = "README.md"
DENSE_RESULTS_NAME = "evaluation_results_dense.json"
PRUNED_RESULTS_NAME = "evaluation_results_pruned.json"  # beside a recovered model: before its training
RECOVERED_RESULTS_NAME = "evaluation_results_recovered.json"  # beside a quantised model: before its quantisation
WIDTHS_NAME = "pruned_widths.png"
_COUNTED = "counted from the shapes of the weights"
_PACKED = "of the quantised model, the bytes of its files"


@dataclass(frozen=True)
class Contents:
    """A pruned, recovered or quantised checkpoint, apart from its weights.

    Attributes:
        folder: Where it is.
        config: What it was pruned with.
        plan: What went.
        model_config: Its config.json.
        result, dense, pruned, recovered: What was measured on it, and on the models before it; `None` for nothing.
        recovery, quantization: The reports (recovery.json, quantization.json), if there are such.
    """

    folder: Path
    config: PruningConfig
    plan: PruningPlan
    model_config: dict[str, Any]
    result: EvaluationResult | None
    dense: EvaluationResult | None
    pruned: EvaluationResult | None
    recovered: EvaluationResult | None
    recovery: dict[str, Any] | None
    quantization: dict[str, Any] | None

    @classmethod
    def read(cls, folder: Path) -> Contents:
        """Reads a folder.

        Raises:
            HubError: It is no checkpoint of this package; says which file is missing.
            CheckpointError: A file of this package is damaged.
            ConfigurationError: The results in it are those of another model.
        """
        if not folder.is_dir():
            raise HubError(f"There is no folder {folder}.")
        for needed in ("config.json", CONFIG_NAME, PLAN_NAME):
            if not (folder / needed).is_file():
                raise HubError(
                    f"There is no {needed} in {folder}: it is no checkpoint that hf_structprune has pruned. Other "
                    "checkpoints go to the Hub with `hf upload REPO FOLDER`."
                )
        names = (
            CONFIG_NAME, PLAN_NAME, "config.json", RESULTS_NAME, DENSE_RESULTS_NAME, PRUNED_RESULTS_NAME,
            RECOVERED_RESULTS_NAME, RECOVERY_NAME, QUANTIZATION_NAME,
        )  # fmt: skip
        contents = cls(folder, *(read_own(folder / name) for name in names))
        contents._check_results()
        return contents

    @property
    def record(self) -> dict[str, Any]:
        """What was written into config.json when it was pruned; empty for checkpoints without it."""
        return self.model_config.get(RECORD) or {}

    @property
    def per_layer(self) -> bool:
        """Whether the layers differ in width."""
        return "per_layer_config" in self.model_config

    @property
    def sees(self) -> bool:
        """Whether it takes images as well."""
        classes = self.model_config.get("architectures") or []
        return any(name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() for name in classes)

    @property
    def state(self) -> str:
        """`"pruned"`, `"recovered"` or `"quantised"`."""
        if self.quantization is not None or "quantization_config" in self.model_config:
            return "quantised"
        was_trained = self.recovery is not None or (self.result is not None and self.result.state == "recovered")
        return "recovered" if was_trained else "pruned"

    @property
    def was_recovered(self) -> bool:
        """Whether it was trained after pruning."""
        return self.state == "recovered" or self.recovery is not None or self.recovered is not None

    @property
    def measured(self) -> dict[str, EvaluationResult | None]:
        """What was measured, by the states that this checkpoint went through; its own results are under its own."""
        states: dict[str, EvaluationResult | None] = {"dense": self.dense}
        if self.state != "pruned" and (self.pruned is not None or self.recovery is not None or not self.was_recovered):
            states["pruned"] = self.pruned
        if self.state == "quantised" and self.was_recovered:
            states["recovered"] = self.recovered
        return {**states, self.state: self.result}

    @property
    def results(self) -> list[EvaluationResult]:
        """What was measured, the dense side first."""
        return [side for side in self.measured.values() if side is not None]

    @property
    def results_files(self) -> list[str]:
        """The names of the files with it, that of this checkpoint first."""
        sides = {
            RESULTS_NAME: self.result, RECOVERED_RESULTS_NAME: self.recovered,
            PRUNED_RESULTS_NAME: self.pruned, DENSE_RESULTS_NAME: self.dense,
        }  # fmt: skip
        return [name for name, side in sides.items() if side is not None]

    @property
    def pictures(self) -> list[Path]:
        """Pictures, relative to the folder; that of the widths first."""
        found = [*self.folder.glob(WIDTHS_NAME), *sorted((self.folder / "pictures").glob("*.png"))]
        return [path.relative_to(self.folder) for path in sorted(found, key=lambda path: "widths" not in path.name)]

    @property
    def recovery_picture(self) -> str | None:
        """The file with the curve of the recovery."""
        return PICTURE_NAME if (self.folder / PICTURE_NAME).is_file() else None

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Answers to the prompts that all models were given: `prompt`, and under `answers` pairs of state and text."""
        sides = [(side.state, {s["prompt"]: s["text"] for s in side.samples}) for side in self.results if side.samples]
        if len(sides) < 2:
            return []
        common = [prompt for prompt in sides[-1][1] if all(prompt in texts for _, texts in sides)]
        return [{"prompt": prompt, "answers": [(state, texts[prompt]) for state, texts in sides]} for prompt in common]

    def weights_of(self, state: str) -> tuple[int, int]:
        """Parameters and bytes of a state: training may have untied embeddings or changed the dtype, quantising packs.

        Parameters of a quantised model are counted as if they were unpacked.
        """
        plan = self.plan
        if state == "dense":
            return plan.parameters_before, plan.bytes_before
        parameters, size = plan.parameters_after, plan.bytes_after
        reports = {"pruned": 0, "recovered": 1, "quantised": 2}
        for report in (self.recovery, self.quantization)[: reports[state]]:
            weights = (report or {}).get("weights") or {}
            parameters, size = weights.get("parameters", parameters), weights.get("bytes", size)
        return parameters, size

    def columns(self) -> list[EvaluationResult]:
        """The columns of the table: the states that a checkpoint went through, from dense to its own.

        Parameters, bytes and MACs are those of the plan and the reports where they were not measured on all sides;
        nothing else is added.
        """
        columns = []
        for state, side in self.measured.items():
            side = side or EvaluationResult("", state)
            own = {figure.name: figure for figure in self._counted(state) if not self._on_all_sides(figure.name)}
            rest = {name: figure for name, figure in side.figures.items() if name not in own}
            columns.append(dataclasses.replace(side, figures={**own, **rest}))
        return columns

    def _on_all_sides(self, name: str) -> bool:
        return all(side is not None and name in side.figures for side in self.measured.values())

    def _counted(self, state: str) -> list[Figure]:
        (parameters, size), plan = self.weights_of(state), self.plan
        macs = plan.macs_before if state == "dense" else plan.macs_after
        values = (
            ("parameters", parameters, "", _COUNTED),
            ("weight_bytes", size, "B", _COUNTED if self.quantization is None else f"{_COUNTED}; {_PACKED}"),
            ("macs", macs, "MAC", f"{_COUNTED}, at 1 x 64 tokens"),
        )
        return [
            Figure(f"efficiency/{name}", value, unit, higher_is_better=False, protocol=protocol)
            for name, value, unit, protocol in values
        ]

    def _check_results(self) -> None:
        """Refuses results of a model in another state, or whose parameters are not those of the plan or a report."""
        for suffix, side, state in (
            ("_dense", self.dense, "dense"),
            ("_pruned", self.pruned, "pruned"),
            ("_recovered", self.recovered, "recovered"),
            ("", self.result, self.state),
        ):
            if side is None:
                continue
            if side.state != state:
                raise ConfigurationError(f"evaluation_results{suffix}.json is of a {side.state} model ({side.model}).")
            counted, expected = side.value("efficiency/parameters"), self.weights_of(state)[0]
            if counted is not None and counted != expected:
                raise ConfigurationError(
                    f"evaluation_results{suffix}.json was measured on another model: {side.model} has {counted:,.0f} "
                    f"parameters, the plan says {expected:,}. Measure again, or take the file away."
                )


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
    """The metadata of a card, empty if it has none.

    Raises:
        HubError: It cannot be read.
    """
    if not card.lstrip().startswith("---"):
        return {}
    try:
        return ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (TypeError, ValueError, YAMLError) as error:
        raise HubError(f"The metadata at the top of the README.md cannot be read: {error}") from error


def check_own_files(folder: Path) -> None:
    """Reads every file of this package in a folder; those that are not there are not missed.

    Raises:
        CheckpointError: Names the file that cannot be used, and why.
        ConfigurationError: The results are those of another model.
    """
    for name in _FILES:
        read_own(folder / name)
    if is_pruned(folder) and (folder / "config.json").is_file():
        Contents.read(folder)


def check_card(folder: Path) -> None:
    """Reads the card of a folder whose other files will be replaced: its texts go over into the new one.

    Raises:
        CheckpointError: It cannot be read.
    """
    read_own(folder / CARD_NAME)


def read_own(path: Path) -> Any:
    """What a file of this package holds; `None` where there is none.

    Raises:
        CheckpointError: It cannot be used, and why.
    """
    return check_file(path, _FILES[path.name]) if path.is_file() else None


def check_file(path: Path, read: Callable[[Path], Any]) -> Any:
    """What a file holds.

    Raises:
        CheckpointError: It cannot be read, whatever the reason.
    """
    try:
        return read(path)
    except (StructPruneError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        what = str(error) if isinstance(error, StructPruneError) else f"it is damaged ({error!r})"
    except RecursionError:
        what = "it is damaged (nested too deep)"
    what = f"it{what[len(str(path)) :]}" if what.startswith(str(path)) else what
    raise CheckpointError(f"{path} cannot be used: {what.rstrip('.')}. Put it right, or take it away.")


def _and_tell(read: Callable[[Path], Any], *tellers: Callable[[Any], Any]) -> Callable[[Path], Any]:
    """Reads a file and tells it as the card does, so that whatever a card will need of it is there."""

    def read_and_tell(path: Path) -> Any:
        found = read(path)
        for tell in tellers:
            tell(found)
        return found

    return read_and_tell


_FILES = {
    CARD_NAME: lambda path: read_metadata(path.read_text(encoding="utf-8")),
    "config.json": lambda path: read_json_object(path, repeats=True),
    CONFIG_NAME: _and_tell(PruningConfig.load, config_expression),
    PLAN_NAME: _and_tell(PruningPlan.load, PruningPlan.table),
    RECOVERY_NAME: _and_tell(read_report, recovery_section, recovery_summary),
    QUANTIZATION_NAME: _and_tell(read_report, quantisation_section, quantisation_summary),
    **dict.fromkeys(
        (RESULTS_NAME, DENSE_RESULTS_NAME, PRUNED_RESULTS_NAME, RECOVERED_RESULTS_NAME),
        _and_tell(EvaluationResult.load, lambda result: ResultTable([result]).to_markdown()),
    ),
}
