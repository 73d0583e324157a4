"""`EvaluationResult`: what was measured on one model, with units, errors and everything needed to measure it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..checks import OneOf, check_fields
from ..errors import ConfigurationError
from ..files.reading import read_json_object
from ..files.writing import write_text


MAX_PARTS = 256  # more are merged with their neighbours, so that files of results stay small
FORMS = ("mean", "exp", "bits")
_DIGITS = 9  # significant ones of each sum


@dataclass(frozen=True)
class Parts:
    """The parts of a figure `g(sum(sums) / sum(counts))`, by which it is compared with that of another model.

    Attributes:
        key: Fingerprint of what was measured, in order: two figures are pairs where it is the same.
        sums: One for each window or document: negative log-likelihood in nats, right (1) or wrong (0), a score.
        counts: What each sum is over: predicted tokens, words, bytes, or 1 document.
        form: `g`: `"mean"` is `x`, `"exp"` is `exp(x)`, `"bits"` is `x / ln 2`.
    """

    key: str
    sums: tuple[float, ...]
    counts: tuple[int, ...]
    form: str = "mean"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigurationError(f"`form` is {self.form!r}; allowed values are {', '.join(FORMS)}.")
        whole = len(self.sums) == len(self.counts) and sum(self.counts) > 0
        if not whole or not all(map(math.isfinite, self.sums)):
            raise ConfigurationError("Finite sums, and for each a count, are what parts of a figure are.")

    @classmethod
    def of(
        cls, key: str, sums: Iterable[float], counts: Iterable[int] | None = None, form: str = "mean"
    ) -> Parts | None:
        """The parts as they are stored: rounded to nine digits, and merged with neighbours where there are many.

        Counts are 1 each if not given. `None` if there are no parts, or a sum is not finite.
        """
        sums = [float(value) for value in sums]
        counts = [1] * len(sums) if counts is None else [int(count) for count in counts]
        if not sum(counts) > 0 or not all(map(math.isfinite, sums)):
            return None
        parts = cls(key, tuple(float(f"{value:.{_DIGITS}g}") for value in sums), tuple(counts), form)
        if len(sums) <= MAX_PARTS or parts.are_hits:
            return parts
        edges = [i * len(sums) // MAX_PARTS for i in range(MAX_PARTS + 1)]
        blocks = [slice(*edge) for edge in zip(edges, edges[1:], strict=False)]
        return cls.of(key, [math.fsum(sums[b]) for b in blocks], [sum(counts[b]) for b in blocks], form)

    @property
    def are_hits(self) -> bool:
        """Whether every part is one answer, right or wrong."""
        return self.form == "mean" and set(self.counts) == {1} and set(self.sums) <= {0.0, 1.0}

    @property
    def mean(self) -> float:
        """`sum(sums) / sum(counts)`."""
        return math.fsum(self.sums) / sum(self.counts)

    def value(self, mean: float | None = None) -> float:
        """The figure, or what it would be at another `mean`."""
        mean = self.mean if mean is None else mean
        try:
            return {"mean": lambda x: x, "exp": math.exp, "bits": lambda x: x / math.log(2)}[self.form](mean)
        except OverflowError:
            return math.inf

    def pairs_with(self, other: Parts) -> bool:
        """Whether both are of the same windows or documents in the same order."""
        return (self.key, self.form, self.counts) == (other.key, other.form, other.counts)

    def to_json(self) -> dict[str, Any]:
        """Few bytes that people can still read: answers as hexadecimal digits (the first is the highest bit)."""
        if self.are_hits:
            bits = "".join(str(int(hit)) for hit in self.sums)
            return {"key": self.key, "hits": f"{int(bits, 2):0{-(-len(bits) // 4)}x}", "documents": len(bits)}
        same = len(set(self.counts)) == 1
        return {
            "key": self.key,
            "form": self.form,
            "sums": " ".join(f"{value:.{_DIGITS}g}" for value in self.sums),
            "counts": self.counts[0] if same else " ".join(map(str, self.counts)),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Parts:
        """Reads what `to_json` made; raises a `ConfigurationError` if it is something else."""
        try:
            if "hits" in content:
                hits, documents = content["hits"], content["documents"]
                bits = f"{int(hits, 16):0{4 * len(hits)}b}"[-documents:]
                if -(-documents // 4) != len(hits) or int(bits, 2) != int(hits, 16):
                    raise ValueError(f"{hits!r} are no {documents} answers")
                return cls(content["key"], tuple(map(float, bits)), (1,) * len(bits))
            sums, counts = tuple(map(float, content["sums"].split())), content["counts"]
            counts = (counts,) * len(sums) if isinstance(counts, int) else tuple(map(int, counts.split()))
            return cls(content["key"], sums, counts, content["form"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(f"The parts of a figure are incomplete or of another kind: {error}.") from error


def fingerprint(pieces: Iterable[bytes | str]) -> str:
    """16 hexadecimal digits that say what was measured, in order."""
    digest = hashlib.sha256()
    for piece in pieces:
        piece = piece.encode() if isinstance(piece, str) else piece
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()[:16]


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

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        if not math.isfinite(self.value):  # JSON has no infinity
            content["value"] = None
        del content["parts"]
        return content if self.parts is None else {**content, "parts": self.parts.to_json()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Figure:
        value, parts = content["value"], content.get("parts")
        value = math.inf if value is None else value
        return cls(**{**content, "value": value, "parts": None if parts is None else Parts.from_json(parts)})


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
        content["figures"] = [figure.to_dict() for figure in self.figures.values()]
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
            figures = [Figure.from_dict(figure) for figure in values.pop("figures")]
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
