"""What stands in a checkpoint folder of this package, read, and the columns of its table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import CONFIG_NAME, PruningConfig
from ..errors import ConfigurationError, HubError
from ..evaluation.results import RESULTS_NAME, EvaluationResult, Figure
from ..evaluation.table import label_of
from ..files.reading import read_json_object
from ..plan import PLAN_NAME, PruningPlan
from .origin import RECORD
from .reports import PICTURE_NAME, read_quantization, read_recovery


if TYPE_CHECKING:
    from .contents import Contents

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
            read_recovery(folder), recovered, read_quantization(folder),
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


_PROTOCOL = "counted from the shapes of the weights"
_PACKED = "of the quantised model, the bytes of its files"


def check_results(contents: Contents) -> None:
    """Refuses results of other models: their parameters must be those of the plan, or of a later report.

    Those of a quantised model are counted as if they were unpacked.

    Raises:
        ConfigurationError: They differ, or a side is of a model in the wrong state.
    """
    for suffix, side, state in (
        ("_dense", contents.dense, "dense"),
        ("_pruned", contents.pruned, "pruned"),
        ("_recovered", contents.recovered, "recovered"),
        ("", contents.result, contents.state),
    ):
        if side is None:
            continue
        if side.state != state:
            raise ConfigurationError(f"evaluation_results{suffix}.json is of a {side.state} model ({side.model}).")
        counted, expected = side.value("efficiency/parameters"), weights_of(contents, state)[0]
        if counted is not None and counted != expected:
            raise ConfigurationError(
                f"evaluation_results{suffix}.json was measured on another model: {side.model} has {counted:,.0f} "
                f"parameters, the plan says {expected:,}. Measure again, or take the file away."
            )


def sides(contents: Contents) -> list[EvaluationResult]:
    """The columns of the table: the states that a checkpoint went through, from dense to its own.

    Parameters, bytes and MACs are those of the plan and the reports where they were not measured on all sides;
    nothing else is added.
    """
    found = contents.measured
    columns = []
    for state, side in found.items():
        side = side or EvaluationResult("", state)
        own = {f.name: f for f in _counted(contents, state) if not _measured(f.name, *found.values())}
        rest = {name: figure for name, figure in side.figures.items() if name not in own}
        columns.append(dataclasses.replace(side, figures={**own, **rest}))
    return columns


def protocols(*results: EvaluationResult | None) -> dict[str, list[str]]:
    """How things were measured: names of figures by the words that describe it, each once."""
    found: dict[str, list[str]] = {}
    for result in filter(None, results):
        for figure in result.figures.values():
            label = label_of(figure).rstrip(" ↑↓")
            words = ", of ".join(filter(None, (figure.protocol, figure.details.get("source"))))
            if figure.protocol and label not in found.setdefault(words, []):
                found[words].append(label)
    return found


def _measured(name: str, *results: EvaluationResult | None) -> bool:
    return all(result is not None and name in result.figures for result in results)


def weights_of(contents: Contents, state: str) -> tuple[int, int]:
    """Parameters and bytes of a state: training may have untied embeddings or changed the dtype, quantising packs."""
    plan = contents.plan
    if state == "dense":
        return plan.parameters_before, plan.bytes_before
    parameters, size = plan.parameters_after, plan.bytes_after
    reports = {
        "pruned": (),
        "recovered": (contents.recovery,),
        "quantised": (contents.recovery, contents.quantization),
    }
    for report in reports[state]:
        weights = (report or {}).get("weights") or {}
        parameters, size = weights.get("parameters", parameters), weights.get("bytes", size)
    return parameters, size


def _counted(contents: Contents, state: str) -> list[Figure]:
    (parameters, size), plan = weights_of(contents, state), contents.plan
    macs = plan.macs_before if state == "dense" else plan.macs_after
    how = _PROTOCOL if contents.quantization is None else f"{_PROTOCOL}; {_PACKED}"
    return [
        Figure("efficiency/parameters", parameters, higher_is_better=False, protocol=_PROTOCOL),
        Figure("efficiency/weight_bytes", size, "B", higher_is_better=False, protocol=how),
        Figure("efficiency/macs", macs, "MAC", higher_is_better=False, protocol=f"{_PROTOCOL}, at 1 x 64 tokens"),
    ]
