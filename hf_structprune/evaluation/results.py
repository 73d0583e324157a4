"""`EvaluationResult`: what was measured on one model, with units, errors and everything needed to measure it again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..checks import OneOf, check_fields
from ..errors import ConfigurationError
from ..files.json_files import read_json_object
from ..files.writing import write_text
from .parts import Parts


SCHEMA_VERSION = 1
STATES = ("dense", "pruned", "recovered", "quantised")
RESULTS_NAME = "evaluation_results.json"


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: Unique in a result, parts joined by slashes: `"perplexity/wikitext2"`, `"tasks/boolq/acc"`,
            `"efficiency/parameters"`.
        value: The number; infinite perplexities are allowed and saved as `null`.
        unit: `""` for a pure number, else `"B"`, `"MAC"`, `"s"`, `"tokens/s"`, ...
        stderr: Standard error of the value, in the same unit; `None` where it is exact or unknown.
        higher_is_better: `None` where neither is meant.
        protocol: How it was measured, in words, for tables and cards.
        details: Whatever else belongs to it (version of a task, shots, samples, spread of repeats).
        parts: The windows or documents it was added up from, for comparisons by pairs; `None` where they are unknown.
    """

    name: str
    value: float
    unit: str = ""
    stderr: float | None = None
    higher_is_better: bool | None = None
    protocol: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    parts: Parts | None = None


@dataclass
class EvaluationResult:
    """All figures of one model, as JSON.

    Attributes:
        model: Hub id or folder that was measured.
        state: `"dense"`, `"pruned"`, `"recovered"` or `"quantised"`.
        base_model: What it was made from, if that is known.
        figures: The measured numbers by their names, in the order they were measured.
        settings: What the evaluation was asked for: tasks, limits, windows, seed.
        environment: Versions, hardware and date.
        samples: Generated texts, each a dictionary with `prompt` and `text`.
    """

    model: str
    state: Annotated[str, OneOf(STATES)] = "dense"
    base_model: str | None = None
    figures: dict[str, Figure] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_fields(self)

    def add(self, *figures: Figure) -> None:
        """Adds figures; one that is there already is replaced."""
        self.figures.update((figure.name, figure) for figure in figures)

    def value(self, name: str) -> float | None:
        """The value of a figure, `None` if it was not measured."""
        return self.figures[name].value if name in self.figures else None

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        content["figures"] = [_to_json(figure) for figure in self.figures.values()]
        return {"schema_version": SCHEMA_VERSION, **content}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> EvaluationResult:
        """Reads what `to_dict` made.

        Raises:
            ConfigurationError: It is of another version, or something else altogether.
        """
        if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
            version = content.get("schema_version") if isinstance(content, dict) else None
            raise ConfigurationError(
                f"These are no evaluation results of version {SCHEMA_VERSION} (`schema_version` is {version!r})."
            )
        values = {name: value for name, value in content.items() if name != "schema_version"}
        try:
            figures = [_from_json(figure) for figure in values.pop("figures")]
            return cls(figures={figure.name: figure for figure in figures}, **values)
        except (KeyError, TypeError) as error:
            raise ConfigurationError(f"The evaluation results are incomplete or of another kind: {error}.") from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes the results as JSON; an interrupt leaves the file as it was."""
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> EvaluationResult:
        """Reads a JSON file, or the `evaluation_results.json` of a checkpoint folder."""
        path = Path(path)
        path = path / RESULTS_NAME if path.is_dir() else path
        if not path.exists():
            raise ConfigurationError(f"There is no {path}; `hf-structprune evaluate` writes one.")
        return cls.from_dict(read_json_object(path, ConfigurationError))


def _to_json(figure: Figure) -> dict[str, Any]:
    content = dataclasses.asdict(figure)
    if not math.isfinite(figure.value):  # JSON has no infinity
        content["value"] = None
    del content["parts"]
    return content if figure.parts is None else {**content, "parts": figure.parts.to_json()}


def _from_json(content: dict[str, Any]) -> Figure:
    parts = content.get("parts")
    figure = Figure(**{**content, "parts": None if parts is None else Parts.from_json(parts)})
    return dataclasses.replace(figure, value=math.inf) if figure.value is None else figure
