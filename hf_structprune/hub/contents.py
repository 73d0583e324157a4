"""What stands in a checkpoint folder of this package, read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configuration import CONFIG_NAME, PruningConfig
from ..errors import HubError
from ..evaluation.results import RESULTS_NAME, EvaluationResult
from ..plan import PLAN_NAME, PruningPlan
from .origin import RECORD
from .table import check_results


DENSE_RESULTS_NAME = "evaluation_results_dense.json"
WIDTHS_NAME = "pruned_widths.png"


@dataclass(frozen=True)
class Contents:
    """A pruned checkpoint, apart from its weights.

    Attributes:
        folder: Where it is.
        config: What it was pruned with.
        plan: What went.
        model_config: Its config.json.
        result: What was measured on it, if anything was.
        dense: What was measured on the dense model, if anything was.
    """

    folder: Path
    config: PruningConfig
    plan: PruningPlan
    model_config: dict[str, Any]
    result: EvaluationResult | None
    dense: EvaluationResult | None

    @classmethod
    def read(cls, folder: Path) -> Contents:
        """Reads a folder.

        Raises:
            HubError: It is no checkpoint of this package.
            ConfigurationError: The results in it are those of another model.
        """
        check_is_ours(folder)
        plan = PruningPlan.load(folder)
        result, dense = _results(folder / RESULTS_NAME), _results(folder / DENSE_RESULTS_NAME)
        check_results(plan, dense, result)
        model_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(folder, PruningConfig.load(folder), plan, model_config, result, dense)

    @property
    def record(self) -> dict[str, Any]:
        """What was written into config.json when it was pruned; empty for checkpoints without it."""
        return self.model_config.get(RECORD) or {}

    @property
    def per_layer(self) -> bool:
        """Whether the layers differ in width."""
        return "per_layer_config" in self.model_config

    @property
    def results(self) -> list[EvaluationResult]:
        """What was measured, the dense side first."""
        return [side for side in (self.dense, self.result) if side is not None]

    @property
    def results_files(self) -> list[str]:
        """The names of the files with it."""
        sides = ((RESULTS_NAME, self.result), (DENSE_RESULTS_NAME, self.dense))
        return [name for name, side in sides if side is not None]

    @property
    def pictures(self) -> list[Path]:
        """Pictures, relative to the folder; that of the widths first."""
        found = [*self.folder.glob(WIDTHS_NAME), *sorted((self.folder / "pictures").glob("*.png"))]
        return [path.relative_to(self.folder) for path in sorted(found, key=lambda path: "widths" not in path.name)]

    @property
    def samples(self) -> list[dict[str, str]]:
        """Answers of both models to the same prompts, side by side: `prompt`, `dense`, `pruned`."""
        if self.dense is None or self.result is None:
            return []
        dense = {sample["prompt"]: sample["text"] for sample in self.dense.samples}
        return [
            {"prompt": sample["prompt"], "dense": dense[sample["prompt"]], "pruned": sample["text"]}
            for sample in self.result.samples
            if sample["prompt"] in dense
        ]


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
