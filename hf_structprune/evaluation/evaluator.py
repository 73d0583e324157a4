"""`evaluate`: runs everything that was asked for on one model, saves after each step and goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import ConfigurationError
from ..evaluation_config import EfficiencyConfig, EvaluationConfig, find_protocol
from ..files.writing import check_place
from ..model.loading import as_tokenizer
from ..model.store import OnDisk
from .answers import measure_answers
from .efficiency import measure_efficiency
from .generation import generate_samples
from .perplexity import EvaluationText, load_text, measure_perplexity
from .results import EvaluationResult, describe_environment, model_fingerprint
from .tasks import check_tasks, run_tasks


logger = logging.get_logger(__name__)

# Keys of `EvaluationResult.settings` besides the fields of the configuration.
COMPLETED, MODEL, TEXTS = "completed", "model_fingerprint", "text_fingerprints"


def load_inputs(config: EvaluationConfig) -> tuple[list[EvaluationText], list[str]]:
    """The texts, and the names of the tasks with suites taken apart; raises if one of them cannot be used."""
    texts = [load_text(spec) for spec in config.texts]
    (name, count), *_ = Counter(text.name for text in texts).most_common(1) or [("", 1)]
    if count > 1:
        raise ConfigurationError(
            f"`texts` are {', '.join(config.texts)}, of which two are called {name!r}: rename a file."
        )
    return texts, check_tasks(config.tasks, config.include_path) if config.tasks else []


def evaluate(
    model: PreTrainedModel, tokenizer: Any, config: EvaluationConfig | None = None, *, name: str,
    state: str = "dense", base_model: str | None = None, output: str | os.PathLike | None = None,
    overwrite: bool = False, store: OnDisk | None = None,
) -> EvaluationResult:  # fmt: skip
    """Measures perplexity on each text, each task, generation, efficiency and sample texts, in this order.

    Everything that can be checked is checked before the first step: texts, tasks with their data, the output. With
    `output`, the result is saved after each step; a call with the same settings on the same model goes on where an
    interrupted one stopped, and measures nothing again.

    Args:
        model, tokenizer: The model, on the device it is to run on, and its tokenizer or where that is.
        config: What to measure. Default: the packaged text, efficiency and samples.
        name: Hub id or folder, for tables and cards.
        state: `"dense"`, `"pruned"`, `"recovered"` or `"quantised"`.
        base_model: What the model was made from, if that is known.
        output: JSON file for the result.
        overwrite: Start anew where `output` is of other settings, of another model or not ours at all.
        store: Where the weights are, of a model that is not in memory (`streaming.load_streamed`). Perplexities are
            the same as in memory, of efficiency there is what shapes tell, and there are no samples.

    Raises:
        StructPruneError: A text or a task cannot be used, or `output` holds something else or cannot be written.
    """
    config, tokenizer = config or EvaluationConfig(), as_tokenizer(tokenizer)
    if store is not None:
        config = _streamed(config)
    if output is not None:
        check_place(output, file=True)
    texts, tasks = load_inputs(config)
    result = EvaluationResult(name, state, base_model, environment=describe_environment(_device(model, store)))
    result.settings = json.loads(json.dumps(config.to_dict()))
    result.settings |= {  # results are published: names, and no paths of this machine
        "texts": [text.name for text in texts],
        "include_path": config.include_path and Path(config.include_path).name,
        TEXTS: {text.name: hashlib.sha256(text.text.encode()).hexdigest()[:16] for text in texts},
        MODEL: _fingerprint(model, store),
        COMPLETED: [],
    }
    steps = [f"perplexity/{text.name}" for text in texts] + [f"tasks/{task}" for task in tasks]
    steps += [step for step in ("generation", "efficiency", "samples") if getattr(config, step)]
    if output is not None and Path(output).exists() and not overwrite:
        result = _continue(EvaluationResult.load(output), result, set(steps), output)
    completed = result.settings[COMPLETED]
    for step in [step for step in steps if step not in completed]:
        measured = _measure(step, model, tokenizer, config, texts, store)
        if step == "samples":
            result.samples = measured
        else:
            result.add(*measured)
        completed.append(step)
        if output is not None:
            result.save(output)
    return result


def _streamed(config: EvaluationConfig) -> EvaluationConfig:
    """What of it can be measured of a model that is read layer by layer; says what is left out.

    Raises:
        ConfigurationError: There are tasks to run, or nothing is left.
    """
    if config.tasks:
        raise ConfigurationError(
            "Tasks (lm-eval) are not run on a streamed model, which would be read anew for every batch: measure "
            "perplexity (`texts`), or run them where the model, or a quantised one, is in memory."
        )
    if config.samples or config.efficiency or config.generation:
        logger.warning(
            "Streamed: no speed and no sample texts are measured, for which every token would read the whole model. "
            "An exported GGUF file in few bits (`export --stream`) may fit in memory."
        )
    return dataclasses.replace(config, samples=False, generation=False)


def _device(model: PreTrainedModel, store: OnDisk | None) -> torch.device | str:
    return model.device if store is None else "cpu"


def _fingerprint(model: PreTrainedModel, store: OnDisk | None) -> str:
    if store is None:
        return model_fingerprint(model)
    with store.reading() as read:
        return model_fingerprint(model, read)


def _measure(
    step: str, model: PreTrainedModel, tokenizer: Any, config: EvaluationConfig, texts: list[EvaluationText],
    store: OnDisk | None = None,
) -> list:  # fmt: skip
    """The figures of a step, or sample texts."""
    kind, _, name = step.partition("/")
    if kind == "perplexity":
        text = next(text for text in texts if text.name == name)
        window = config.window or find_protocol(config.protocol).window_for(model)
        options = {name: getattr(config, name) for name in ("stride", "bos", "max_windows", "batch_size")}
        options |= {"window": window, "store": store}
        return measure_perplexity(model, tokenizer, text, config.protocol, **options).figures(name)
    if kind == "tasks":
        names = ("num_fewshot", "limit", "include_path", "batch_size", "seed")
        return run_tasks(model, tokenizer, [name], **{name: getattr(config, name) for name in names})
    if kind == "generation":
        return measure_answers(model, tokenizer)
    if kind == "efficiency":
        return measure_efficiency(model, EfficiencyConfig(seed=config.seed, speed=store is None))
    return generate_samples(model, tokenizer, seed=config.seed)


def _continue(
    earlier: EvaluationResult, fresh: EvaluationResult, steps: set[str], output: str | os.PathLike
) -> EvaluationResult:
    """What an earlier run has left, if it was one of the same settings on the same model."""
    mine, theirs = dict(fresh.settings), dict(earlier.settings)
    mine.pop(COMPLETED)
    if steps - set(theirs.pop(COMPLETED, None) or []):  # what is added must come from the same place
        for settings, environment in ((mine, fresh.environment), (theirs, earlier.environment)):
            settings |= {key: _without_memory(environment.get(key)) for key in ("versions", "hardware")}
    differing = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    if differing:
        raise ConfigurationError(
            f"{output} holds an evaluation with other settings or of another model ({', '.join(differing)}): give "
            "another --output, or say --overwrite to measure anew."
        )
    earlier.model, earlier.state = fresh.model, fresh.state
    earlier.base_model = fresh.base_model or earlier.base_model
    return earlier


def _without_memory(values: Any) -> Any:
    return {k: v for k, v in values.items() if "memory" not in k} if isinstance(values, dict) else values
