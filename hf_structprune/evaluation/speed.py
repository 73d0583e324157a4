"""How fast a model is: prefill, first token, decoding, loading."""

from __future__ import annotations

import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ..checks import Count, checked
from ..errors import EvaluationError
from ..hardware import device_name, synchronize
from .memory import read_weights
from .results import Figure


@dataclass(frozen=True)
class GenerationTime:
    """Seconds of one generation.

    Attributes:
        first_token: From the call to the first new token.
        decode: From the first new token to the last.
    """

    first_token: float
    decode: float


def devices_of(model: PreTrainedModel) -> set[torch.device]:
    """The devices the weights are on."""
    return {parameter.device for parameter in model.parameters()}


def where(model: PreTrainedModel) -> str:
    """Dtype and device in words: `"bfloat16 on cpu (2 threads)"`."""
    device, dtype = model.device, str(model.dtype).removeprefix("torch.")
    return f"{dtype} on {device_name(device)}" + (
        f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    )


@torch.no_grad()
def time_prefill(model: PreTrainedModel, ids: torch.LongTensor) -> float:
    """Seconds of a forward pass over `ids`, shape `(batch, length)`, that fills a cache; logits of the last token."""
    devices = devices_of(model)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    mask = torch.ones_like(ids)
    synchronize(devices)
    start = time.perf_counter()
    model(input_ids=ids, attention_mask=mask, use_cache=True, **last)
    synchronize(devices)
    return time.perf_counter() - start


def time_generation(model: PreTrainedModel, ids: torch.LongTensor, new_tokens: int) -> GenerationTime:
    """Times `model.generate`, greedy, for exactly `new_tokens` tokens after `ids`, shape `(batch, length)`.

    Raises:
        EvaluationError: The model's own `generate` made another number of tokens.
    """
    devices = devices_of(model)
    clock = _TokenClock(devices, new_tokens)
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1, use_cache=True
    )
    synchronize(devices)
    start = time.perf_counter()
    with _own_generation_config(model):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
    if clock.tokens != new_tokens:
        raise EvaluationError(f"{type(model).__name__} generated {clock.tokens} tokens instead of {new_tokens}.")
    return GenerationTime(clock.first - start, clock.last - clock.first)


class _TokenClock(StoppingCriteria):
    """Notes when the first and the last token are there; stops nothing."""

    def __init__(self, devices: set[torch.device], new_tokens: int) -> None:
        self.devices, self.new_tokens = devices, new_tokens
        self.tokens, self.first, self.last = 0, 0.0, 0.0

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        self.tokens += 1
        if self.tokens in (1, self.new_tokens):
            synchronize(self.devices)
            self.first, self.last = self.first or time.perf_counter(), time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextmanager
def _own_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Without the model's generation settings (sampling, stop words, kinds of cache), so that all are timed alike."""
    config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config


def median_figure(name: str, values: list[float], unit: str, protocol: str, **details: Any) -> Figure:
    """The median of repeated measurements, with their spread in the details (`iqr`: third minus first quartile)."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    spread = {"min": min(values), "max": max(values), "iqr": quartiles[2] - quartiles[0], "values": values}
    return Figure(
        name, statistics.median(values), unit, higher_is_better=unit != "s", protocol=protocol,
        details={**spread, **details},
    )  # fmt: skip


def time_loading(
    model: str | os.PathLike, *, dtype: str = "auto", device: str = "cpu", repeats: int = 3, **kwargs: Any
) -> Figure:
    """Seconds that loading a checkpoint takes, in a fresh process, as figure `efficiency/load_time`.

    The process loads it once without counting: that imports the code of the model and brings the files into the
    system's cache. What is counted is building, reading all weights (Transformers maps files into memory and leaves
    reading to the first use) and moving to the device.

    Args:
        model: Folder, or id of a model that is in the cache.
        dtype: Dtype to load in; `"auto"` is the checkpoint's.
        device: Device to move it to.
        repeats: Loads that count; the figure is their median.
        kwargs: Further options of `from_pretrained` that JSON can hold, for example `gguf_file`.

    Raises:
        EvaluationError: It could not be loaded; says why.
    """
    repeats = checked("repeats", repeats, Count)
    options = {"model": os.fspath(model), "dtype": dtype, "device": device, "repeats": repeats, "kwargs": kwargs}
    code = f"import json, sys; from {__name__} import _load; print(json.dumps(_load(**json.loads(sys.argv[1]))))"
    process = subprocess.run(
        [sys.executable, "-c", code, json.dumps(options)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    if process.returncode:
        reason = [f"the process ended with status {process.returncode}", *process.stderr.strip().splitlines()][-1]
        raise EvaluationError(f"{model} could not be loaded: {reason}")
    seconds = json.loads(process.stdout.splitlines()[-1])
    how = f"from_pretrained onto {device} in a fresh process, all weights read"
    protocol = f"{how}; files in the system's cache, median of {repeats}"
    return median_figure("efficiency/load_time", seconds, "s", protocol, device=device, dtype=dtype)


def _load(model: str, dtype: str, device: str, repeats: int, kwargs: dict[str, Any]) -> list[float]:
    from ..model.loading import load_model

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loaded = load_model(model, dtype=dtype, **kwargs).to(device)
        read_weights(loaded)
        synchronize(devices_of(loaded))
        seconds.append(time.perf_counter() - start)
        del loaded
    return seconds[1:]
