"""What stands in a checkpoint folder of this package, read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import CONFIG_NAME, PruningConfig
from ..errors import HubError
from ..evaluation.results import RESULTS_NAME, EvaluationResult
from ..files.json_files import read_json_object
from ..plan import PLAN_NAME, PruningPlan
from .origin import RECORD
from .quantization import read_quantization
from .recovery import PICTURE_NAME, read_report
from .table import check_results


DENSE_RESULTS_NAME = "evaluation_results_dense.json"
PRUNED_RESULTS_NAME = "evaluation_results_pruned.json"  # beside a recovered model: before its training
RECOVERED_RESULTS_NAME = "evaluation_results_recovered.json"  # beside a quantised model: before its quantisation
WIDTHS_NAME = "pruned_widths.png"


@dataclass(frozen=True)
class Contents:
    """A pruned, recovered or quantised checkpoint, apart from its weights.

    Attributes:
        folder: Where it is.
        config: What it was pruned with.
        plan: What went.
        model_config: Its config.json.
        result: What was measured on it, if anything was.
        dense: What was measured on the dense model, if anything was.
        pruned: What was measured on the pruned model before it was recovered or quantised, if it was and anything was.
        recovery: The report of its recovery (recovery.json), if there is one.
        recovered: What was measured on the recovered model before it was quantised, if it was and anything was.
        quantization: The report of its quantisation (quantization.json), if there is one.
    """

    folder: Path
    config: PruningConfig
    plan: PruningPlan
    model_config: dict[str, Any]
    result: EvaluationResult | None
    dense: EvaluationResult | None
    pruned: EvaluationResult | None = None
    recovery: dict[str, Any] | None = None
    recovered: EvaluationResult | None = None
    quantization: dict[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> Contents:
        """Reads a folder.

        Raises:
            HubError: It is no checkpoint of this package.
            ConfigurationError: The results in it are those of another model.
        """
        check_is_ours(folder)
        names = (RESULTS_NAME, DENSE_RESULTS_NAME, PRUNED_RESULTS_NAME, RECOVERED_RESULTS_NAME)
        result, dense, pruned, recovered = (_results(folder / name) for name in names)
        contents = cls(
            folder, PruningConfig.load(folder), PruningPlan.load(folder),
            read_json_object(folder / "config.json", repeats=True), result, dense, pruned,
            read_report(folder), recovered, read_quantization(folder),
        )  # fmt: skip
        check_results(contents)
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
        sides = (
            (RESULTS_NAME, self.result), (RECOVERED_RESULTS_NAME, self.recovered),
            (PRUNED_RESULTS_NAME, self.pruned), (DENSE_RESULTS_NAME, self.dense),
        )  # fmt: skip
        return [name for name, side in sides if side is not None]

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


def check_is_ours(folder: Path) -> None:
    """Refuses a folder without the files that every checkpoint of this package has.

    Raises:
        HubError: Says which file is missing.
    """
    if not folder.is_dir():
        raise HubError(f"There is no folder {folder}.")
    for needed in ("config.json", CONFIG_NAME, PLAN_NAME):
        if not (folder / needed).is_file():
            raise HubError(
                f"There is no {needed} in {folder}: it is no checkpoint that hf_structprune has pruned. Other "
                "checkpoints go to the Hub with `hf upload REPO FOLDER`."
            )


def _results(path: Path) -> EvaluationResult | None:
    return EvaluationResult.load(path) if path.is_file() else None
