"""What is known about a model before it is measured: its state, its base, where its results go."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..config import CONFIG_NAME
from ..errors import ConfigurationError
from ..evaluation.results import STATES, EvaluationResult
from ..hub.recovery import RECOVERY_NAME
from .common import ModelArguments, load_config


@dataclass(frozen=True)
class Subject:
    """A model that is to be measured.

    Attributes:
        arguments: How to load it.
        state: `"dense"`, `"pruned"`, `"recovered"` or `"quantised"`.
        base_model: What it was made from, if its configuration says so.
    """

    arguments: ModelArguments
    state: str
    base_model: str | None


def find_subject(arguments: ModelArguments, state: str | None = None) -> Subject:
    """Reads the configuration of a model, and no weights.

    Quantised is what has a quantisation configuration, recovered what comes with a `recovery.json`, and pruned what
    comes with a `pruning_config.json`.

    Args:
        arguments: The model.
        state: What the user says it is.

    Raises:
        StructPruneError: There is no such model.
        ConfigurationError: There is no such state.
    """
    if state is not None and state not in STATES:
        raise ConfigurationError(f"`state` is {state!r}; allowed values are {', '.join(STATES)}.")
    config = load_config(arguments)
    if state is None:
        quantised = getattr(config, "quantization_config", None) is not None and arguments.gguf_file is None
        state = "quantised" if quantised else _state(arguments)
    record = getattr(config, "hf_structprune", None) or {}
    return Subject(arguments, state, record.get("base_model"))


def _state(arguments: ModelArguments) -> str:
    files = ((RECOVERY_NAME, "recovered"), (CONFIG_NAME, "pruned"))
    return next((state for name, state in files if _has_file(arguments, name)), "dense")


def find_baseline(name: str, arguments: ModelArguments) -> Subject | EvaluationResult:
    """What `--baseline` means: the JSON of an earlier evaluation, or a model to measure in the same way.

    Args:
        name: A `.json` file, or the id, folder or `.gguf` file of a model.
        arguments: The model it is compared with; dtype, device and remote code are taken over.
    """
    path = Path(name)
    if path.suffix == ".json":
        return EvaluationResult.load(path)
    changes = {"model": name, "revision": None, "subfolder": None, "gguf_file": None}
    if path.suffix == ".gguf" and path.is_file():
        changes |= {"model": str(path.parent), "gguf_file": path.name}
    return find_subject(dataclasses.replace(arguments, **changes))


def baseline_output(output: Path, baseline: Subject | EvaluationResult) -> Path:
    """Where the results of the baseline go: `results.json` has `results_dense.json` beside it."""
    return output.with_name(f"{output.stem}_{baseline.state}{output.suffix}")


def save_baseline(result: EvaluationResult, path: Path, overwrite: bool) -> None:
    """Puts results that were given as a file beside those of the model, where the model card looks for them.

    Raises:
        ConfigurationError: There are others.
    """
    if path.exists() and not overwrite and EvaluationResult.load(path) != result:
        raise ConfigurationError(f"{path} holds other results than the baseline given: say --overwrite to replace it.")
    result.save(path)


def _has_file(arguments: ModelArguments, name: str) -> bool:
    """Whether a folder or a repository of the Hub has a file."""
    from transformers.utils import cached_file

    places = {"revision": arguments.revision, "subfolder": arguments.subfolder or ""}
    try:
        return cached_file(arguments.model, name, **places) is not None
    except OSError:
        return False
