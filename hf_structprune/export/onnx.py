"""`export_onnx`: a folder that ONNX Runtime runs, through Transformers' own exporter."""

from __future__ import annotations

import contextlib
import copy
import json
import logging as python_logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import ConfigurationError, ExportError
from ..evaluation.memory import weight_bytes
from ..extras import need
from ..files.folders import check_folder, write_folder
from .genai import GENAI_CONFIG_NAME, genai_config
from .result import Exported
from .source import load_source
from .with_cache import ForwardWithCache


logger = logging.get_logger(__name__)

# Largest difference of logits that counts as equal, in shares of the largest logit.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 3e-2}
_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "fp16": torch.float16, "float16": torch.float16}
_FILENAME = "model.onnx"  # the exporter's name for the one graph


def export_onnx(
    model: str | os.PathLike | PreTrainedModel,
    output: str | os.PathLike,
    *,
    dtype: str = "fp32",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Writes a model as ONNX: one graph for prefill and decoding, with its configuration and tokenizer.

    Batch, tokens and past may have any size; see [`ForwardWithCache`] for inputs and outputs. The folder is written
    all at once, after ONNX Runtime has given the logits of the model on padded batches, with and without a past.

    Args:
        model (`str` or `PreTrainedModel`): A folder, an id of the Hub, or a model. Uniform or per-layer.
        output (`str`): Folder to write.
        dtype (`str`): `fp32` or `fp16`, of weights and arithmetic.
        tokenizer: Tokenizer to put into the folder. Default: the model's own.
        trust_remote_code (`bool`): Run modelling code that comes with the model.

    Returns:
        [`Exported`]: The folder; `details["difference"]` is the largest difference of logits that was seen, in shares
        of the largest logit.

    Raises:
        ConfigurationError: `dtype` or `output` cannot be used.
        ExportError: The model is quantised, Transformers cannot export it, what came out computes something else, or
            there is too little memory.
        CheckpointError: There is too little disk, or weights are missing.
        StructPruneError: The `onnx` extra is not installed.
    """
    need("onnx", "onnxscript", "onnxruntime", extra="onnx")
    _check(model, output, dtype)
    options = {"dtype": _DTYPES[dtype], "trust_remote_code": trust_remote_code or None}
    model, tokenizer = load_source(model, tokenizer, with_tokenizer=False, **options)
    if model.dtype != _DTYPES[dtype] or model.device.type != "cpu":
        model = copy.deepcopy(model).to("cpu", _DTYPES[dtype])
    size = sum(weight_bytes(model).values())
    _check_memory(size)
    forward = ForwardWithCache(model)
    config = genai_config(forward.config, model.generation_config, forward.shapes, _FILENAME)
    details: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch.")}

    def write(folder: Path) -> None:
        _trace(forward).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if isinstance(config, dict):
            (folder / GENAI_CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        details["difference"] = _compare(folder, forward)

    write_folder(output, write, size=size)
    notes = [config] if isinstance(config, str) else []
    return Exported(Path(output), _size(Path(output)), details, notes)


def _check(model: Any, output: str | os.PathLike, dtype: str) -> None:
    if dtype not in _DTYPES:
        raise ConfigurationError(f"`dtype` is {dtype!r}; allowed values are fp32, fp16.")
    check_folder(output)
    same = isinstance(model, (str, os.PathLike)) and Path(output).exists() and Path(model).exists()
    if same and Path(output).samefile(model):
        raise ConfigurationError(f"{output} is the checkpoint itself; choose another folder for its ONNX form.")


def _check_memory(size: int) -> None:
    """Refuses what will not fit beside the model: the graph's own weights while it is written and checked."""
    free = psutil.virtual_memory().available
    if size > free:
        raise ExportError(
            f"The export needs about {size / 1e9:.1f} GB of memory beside the model, but {free / 1e9:.1f} GB are free."
        )


def _trace(forward: ForwardWithCache) -> Any:
    """Transformers' `ExportedModel` with one graph."""
    try:
        from transformers.exporters import OnnxConfig, OnnxExporter
    except ImportError as error:
        raise ExportError(f"Transformers {transformers.__version__} has no exporters; 5.24 has.") from error
    inputs, shapes = forward.sample()
    logger.info(f"Tracing {forward.config.num_hidden_layers} layers, which takes some seconds for each.")
    try:
        with _quiet():
            exported = OnnxExporter().export(forward, inputs, OnnxConfig(dynamic=True, dynamic_shapes=shapes))
    except Exception as error:  # of many kinds, from three libraries
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f"Transformers {transformers.__version__} cannot export a {type(forward.model).__name__} to ONNX: "
            f"{reason[0]}"
        ) from error
    component = exported.components["model"]
    component.metadata.architecture = type(forward.model).__name__
    for graph in component.program.graphs():
        for node in graph:
            node.metadata_props.clear()  # source lines and paths of this machine
    exported.generation_config = forward.model.generation_config
    return exported


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings about operators of packages that are not installed."""
    log = python_logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(python_logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@torch.no_grad()
def _compare(folder: Path, forward: ForwardWithCache) -> float:
    """The largest difference between the logits of ONNX Runtime and of the model, in shares of the largest logit.

    Raises:
        ExportError: They are not equal.
    """
    from transformers.exporters import ExportedModel

    graph = ExportedModel.from_pretrained(folder, device="cpu")
    worst = 0.0
    for batch, padding, prompt, steps in ((1, 0, 1, 2), (3, 2, 7, 2)):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(forward.config.vocab_size, (batch, prompt + steps), generator=generator)
        mask = torch.ones_like(tokens)
        mask[-1, :padding] = 0
        expected = forward.reference(tokens, mask)[mask.bool()].float()
        found = run_graph(graph, forward.past(batch), tokens, mask, prompt)[mask.bool()].float()
        worst = max(worst, ((found - expected).abs().max() / expected.abs().max()).item())
    if not worst <= _TOLERANCES[forward.model.dtype]:
        raise ExportError(
            f"ONNX Runtime gives other logits than the {type(forward.model).__name__} (difference {worst:.1e} of the "
            "largest), so nothing was written. Please report this model."
        )
    return worst


def run_graph(graph: Any, past: dict, tokens: torch.Tensor, mask: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of sequences: of the first tokens at once, then one token at a time with the past of those before.

    Args:
        graph: The exported graph, callable.
        past: An empty past, see [`ForwardWithCache.past`].
        tokens: Token ids, shape (batch, tokens).
        mask: 1 for tokens, 0 for padding.
        prompt: How many tokens the prefill takes.
    """
    logits = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, tokens.shape[1]))]:
        result = graph(input_ids=tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=past)
        past = result["present"]
        logits.append(result["logits"])
    return torch.cat(logits, 1)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{_FILENAME}*"))
