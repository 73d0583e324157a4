"""`EvaluationResult`: what was measured on one model, with units, errors and everything needed to measure it again."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
from transformers import PreTrainedModel

from ..checks import OneOf, check_fields
from ..errors import ConfigurationError
from ..files.reading import read_json_object
from ..files.writing import write_text
from ..hardware import device_name
from ..installed import versions
from .comparison import Parts


SCHEMA_VERSION = 1
STATES = ("dense", "pruned", "recovered", "quantised")
RESULTS_NAME = "evaluation_results.json"

_SAMPLES = 256  # elements of each parameter
_NOT_THE_MODEL = ("_name_or_path", "_commit_hash", "transformers_version")


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
        content = dict(vars(self))
        content["value"] = self.value if math.isfinite(self.value) else None  # JSON has no infinity
        parts = content.pop("parts")
        return content if parts is None else {**content, "parts": parts.to_json()}

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
        """Adds figures or replaces those of the same names."""
        self.figures.update((figure.name, figure) for figure in figures)

    def value(self, name: str) -> float | None:
        """The value of a figure, `None` if it was not measured."""
        return self.figures[name].value if name in self.figures else None

    def to_dict(self) -> dict[str, Any]:
        content = dict(vars(self))
        content["figures"] = [figure.to_dict() for figure in self.figures.values()]
        return {"schema_version": SCHEMA_VERSION, **content}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> EvaluationResult:
        """Reads what `to_dict` made; raises a `ConfigurationError` if it is of another version or something else."""
        values = dict(content) if isinstance(content, dict) else {}
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ConfigurationError(
                f"These are no evaluation results of version {SCHEMA_VERSION} (`schema_version` is {version!r})."
            )
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
        """Reads a JSON file, or the one of a checkpoint folder."""
        path = Path(path)
        path = path / RESULTS_NAME if path.is_dir() else path
        if not path.exists():
            raise ConfigurationError(f"There is no {path}; `hf-structprune evaluate` writes one.")
        return cls.from_dict(read_json_object(path, ConfigurationError))


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as CSV, under a line of these."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def describe_environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a reader has to know to judge and to repeat a measurement on a device.

    These are `date` (UTC, ISO 8601), `python`, `platform`, `versions` (of packages that are installed) and `hardware`:
    `device` (name of the CPU or GPU), `type` (`"cpu"`, `"cuda"`, ...), `threads` (of torch), `cpu`, `memory` and, of a
    GPU, `device_memory` in bytes.
    """
    device, info = torch.device(device), Path("/proc/cpuinfo")  # Linux tells the name on the chip in a file only
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    cpu = found[1].strip() if found else platform.processor() or platform.machine()
    names = {"cpu": cpu, "cuda": device_name(device)}
    hardware = {
        "device": names.get(device.type, f"{device.type} of {cpu}"), "type": device.type,
        "threads": torch.get_num_threads(), "cpu": cpu, "memory": psutil.virtual_memory().total,
    }  # fmt: skip
    if device.type == "cuda":
        hardware["device_memory"] = torch.cuda.get_device_properties(device).total_memory
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "python": platform.python_version(),
        "platform": platform.platform(), "versions": versions("accelerate", "datasets", "lm_eval"),
        "hardware": hardware,
    }  # fmt: skip


@torch.no_grad()
def model_fingerprint(model: PreTrainedModel, read: Callable[[str], torch.Tensor] | None = None) -> str:
    """16 hexadecimal digits of the configuration and of the names, shapes, dtypes and some elements of all parameters.

    Where a model was loaded from does not count. A change of a single element is likely to be missed; training,
    merging, pruning, rounding and quantising change all of them and are not. On the meta device only shapes count,
    unless there is something that will `read` a parameter by its name.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in list(model.named_parameters()):  # before any is put in the place of another
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        parameter = parameter if read is None else read(name)
        for part in _parts(parameter) if parameter.device.type != "meta" else ():
            step = max(1, part.numel() // _SAMPLES) | 1  # odd, so that it does not stay in one column
            some = part.detach().reshape(-1)[::step].contiguous().cpu()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that one is made of: itself, or what a quantised one of torchao holds, which does little itself."""
    if not type(tensor).__module__.startswith("torchao."):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))
