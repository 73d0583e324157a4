"""`export_onnx`: a folder that ONNX Runtime runs, through Transformers' own exporter."""

from __future__ import annotations

import copy
import inspect
import io
import json
import os
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.export import Dim
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import ConfigurationError, ExportError
from ..files.writing import write_folder, write_text
from ..hardware import DTYPES, memory_left
from ..installed import need
from ..model.target import overrides_of
from ..progress import only_ours
from ..units import KINDS
from ..units.heads import GROUPS
from .common import Exported, load_source, output_folder


logger = logging.get_logger(__name__)

# Largest difference of logits that counts as equal, in shares of the largest logit.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 3e-2}
_FILENAME = "model.onnx"  # the exporter's name for the one graph
Past = dict[str, dict[str, torch.Tensor]]


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
    all at once, after ONNX Runtime has given the logits of the model on padded batches, with and without a past;
    `details["difference"]` is the largest difference of logits seen, in shares of the largest logit.

    Args:
        model: A checkpoint (folder or id of the Hub), or a model. Uniform or per-layer.
        output: Folder to write.
        dtype: `fp32` or `fp16`, of weights and arithmetic.
        tokenizer, trust_remote_code: As in `export_gguf`.

    Raises:
        ConfigurationError: `dtype` or `output` cannot be used.
        ExportError: The model is quantised, Transformers cannot export it, what came out computes something else, or
            there is too little memory.
        CheckpointError: There is too little disk, or weights are missing.
        StructPruneError: The `onnx` extra is not installed.
    """
    need("onnx", "onnxscript", "onnxruntime", extra="onnx")
    wanted = DTYPES.get(dtype.replace("float", "fp"))
    if wanted not in _TOLERANCES:
        raise ConfigurationError(f"`dtype` is {dtype!r}; allowed values are fp32, fp16.")
    output = output_folder(model, output)
    options = {"dtype": wanted, "trust_remote_code": trust_remote_code or None}
    model, tokenizer, _ = load_source(model, tokenizer, with_tokenizer=False, **options)
    if model.dtype != wanted or model.device.type != "cpu":
        model = copy.deepcopy(model).to("cpu", wanted)
    # The graph's own weights, beside the model while it is written and checked.
    size, free = model.get_memory_footprint(), memory_left()
    if size > free:
        raise ExportError(
            f"The export needs about {size / 1e9:.1f} GB of memory beside the model, but {free / 1e9:.1f} GB are free."
        )
    forward = ForwardWithCache(model)
    config = genai_config(forward.config, model.generation_config, forward.shapes)
    details: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch.")}

    def write(folder: Path) -> None:
        _trace(forward).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if isinstance(config, dict):
            write_text(folder / "genai_config.json", json.dumps(config, indent=2) + "\n")
        details["difference"] = _compare(folder, forward)

    write_folder(output, write, size=size)
    size = sum(path.stat().st_size for path in output.glob(f"{_FILENAME}*"))
    return Exported(output, size, details, [config] if isinstance(config, str) else [])


def _trace(forward: ForwardWithCache) -> Any:
    """Transformers' `ExportedModel` with one graph."""
    try:
        from transformers.exporters import OnnxConfig, OnnxExporter
    except ImportError as error:
        raise ExportError(f"Transformers {transformers.__version__} has no exporters; 5.24 has.") from error
    inputs, shapes = forward.sample()
    name = type(forward.model).__name__
    logger.info(f"Tracing {forward.config.num_hidden_layers} layers, which takes some seconds for each.")
    try:
        with redirect_stdout(io.StringIO()) if only_ours() else nullcontext():  # torch tells its steps
            exported = OnnxExporter().export(forward, inputs, OnnxConfig(dynamic=True, dynamic_shapes=shapes))
    except Exception as error:  # of many kinds, from three libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"Transformers {transformers.__version__} cannot export a {name} to ONNX: {reason}"
        raise ExportError(message) from error
    component = exported.components["model"]
    component.metadata.architecture = name
    for graph in component.program.graphs():
        for node in graph:
            node.metadata_props.clear()  # source lines and paths of this machine
    exported.generation_config = forward.model.generation_config
    return exported


@torch.no_grad()
def _compare(folder: Path, forward: ForwardWithCache) -> float:
    """How far ONNX Runtime's logits are from the model's, in shares of the largest; refuses what is not equal."""
    from transformers.exporters import ExportedModel

    graph = ExportedModel.from_pretrained(folder, device="cpu")
    worst = 0.0
    for batch, padding, prompt, steps in ((1, 0, 1, 2), (3, 2, 7, 2)):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(forward.config.vocab_size, (batch, prompt + steps), generator=generator)
        mask = torch.ones_like(tokens)
        mask[-1, :padding] = 0
        expected = forward.logits(tokens, mask, use_cache=False)[mask.bool()].float()
        found = run_graph(graph, forward.past(batch), tokens, mask, prompt)[mask.bool()].float()
        worst = max(worst, ((found - expected).abs().max() / expected.abs().max()).item())
    if not worst <= _TOLERANCES[forward.model.dtype]:
        raise ExportError(
            f"ONNX Runtime gives other logits than the {type(forward.model).__name__} (difference {worst:.1e} of the "
            "largest), so nothing was written. Please report this model."
        )
    return worst


def run_graph(graph: Any, past: Past, tokens: torch.Tensor, mask: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of sequences (batch, tokens): of the first `prompt` tokens at once, then of one at a time.

    The mask is 1 for tokens and 0 for padding; `past` is an empty one, see [`ForwardWithCache.past`].
    """
    logits = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, tokens.shape[1]))]:
        result = graph(input_ids=tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=past)
        past = result["present"]
        logits.append(result["logits"])
    return torch.cat(logits, 1)


class ForwardWithCache(nn.Module):
    """One forward pass, prefill or decoding, of a model in eval mode, whose cache goes in and out as plain tensors.

    In go `input_ids` (batch, tokens), `attention_mask` (batch, past + tokens) and, for each layer with attention,
    `past_key_values.<layer>.key` and `.value` (batch, KV heads of that layer, past, head size). Out come `logits`
    (batch, tokens, vocabulary) and `present.<layer>.key` and `.value`, longer by the tokens. These names are those of
    Optimum, Transformers.js and ONNX Runtime GenAI. An empty past makes it a prefill.

    The position of a token is the number of tokens before it that the mask shows, as in `generate`: batches are padded
    on the left. Layers with a sliding window keep the whole past; their mask hides what is outside of the window.

    Raises:
        ExportError: The model keeps something else than keys and values.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self.config = model, copy.deepcopy(model.config)
        self.config.dtype = model.dtype
        if hasattr(self.config, "auto_map"):  # modelling code, which a graph does not need
            del self.config.auto_map
        names = inspect.signature(model.forward).parameters
        # Transformers 5.24 gave the argument another name.
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._takes_positions = "position_ids" in names
        self.shapes = self._cache_shapes()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past_key_values: Past
    ) -> dict[str, torch.Tensor | Past]:
        """Logits of the tokens, and the cache with them."""
        length = attention_mask.shape[1] - input_ids.shape[1]
        # A layer without attention keeps nothing but the count of the tokens, which Transformers may ask it for.
        count = input_ids.new_zeros((input_ids.shape[0], 1, length, 1), dtype=self.model.dtype)
        absent = {"key": count, "value": count}
        layers = [past_key_values.get(str(i), absent) for i in range(self.config.num_hidden_layers)]
        cache = DynamicCache([(layer["key"], layer["value"]) for layer in layers])
        logits = self.logits(input_ids, attention_mask, **{self._cache_name: cache}, use_cache=True)
        filled = {name: cache.layers[int(name)] for name in past_key_values}
        present = {name: {"key": layer.keys, "value": layer.values} for name, layer in filled.items()}
        return {"logits": logits, "present": present}

    def past(self, batch: int, length: int = 0) -> Past:
        """A past of random keys and values; of none without a length, which begins a sequence."""
        names = ("key", "value")
        shapes = {str(layer): (batch, heads, length, size) for layer, (heads, size) in self.shapes.items()}
        return {i: {name: torch.randn(shape).to(self.model.dtype) for name in names} for i, shape in shapes.items()}

    def sample(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs to trace with, and which of their dimensions vary: batch, tokens and past."""
        batch, tokens, past = 2, 3, 5  # all differ, and none is 0 or 1, which tracing would take for constants
        sizes = {"input_ids": (batch, tokens), "attention_mask": (batch, past + tokens)}
        inputs = {name: torch.ones(size, dtype=torch.long) for name, size in sizes.items()}
        # Not AUTO: a dimension that cannot vary is an error and no silent constant.
        varies = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in sizes}
        layer = {name: {0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for name in ("key", "value")}
        layers = {str(number): layer for number in self.shapes}
        return {**inputs, "past_key_values": self.past(batch, past)}, {**varies, "past_key_values": layers}

    def logits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        """Those of the model itself, with positions as `generate` numbers them."""
        if self._takes_positions:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -input_ids.shape[1] :]
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **options).logits

    @torch.no_grad()
    def _cache_shapes(self) -> dict[int, tuple[int, int]]:
        """KV heads and head size of each layer with attention, as the model writes them into a cache."""
        cache, tokens = DynamicCache(), torch.zeros(1, 2, dtype=torch.long)
        self.logits(tokens, torch.ones_like(tokens), **{self._cache_name: cache}, use_cache=True)
        numbers, attention = range(self.config.num_hidden_layers), KINDS[GROUPS].sublayer
        layers = [i for i in numbers if attention not in overrides_of(self.model.config, i).get("skip", ())]
        if not layers or len(cache.layers) != len(numbers) or any(cache.layers[i].keys.ndim != 4 for i in layers):
            raise ExportError(
                f"{type(self.model).__name__} does not keep keys and values for each of its layers, so its cache "
                "cannot be exported."
            )
        return {i: (cache.layers[i].keys.shape[1], cache.layers[i].keys.shape[3]) for i in layers}


def genai_config(
    config: PreTrainedConfig, generation: GenerationConfig, shapes: dict[int, tuple[int, int]]
) -> dict[str, Any] | str:
    """The content of `genai_config.json`, what ONNX Runtime GenAI has to know; or a sentence that says why not."""
    end = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    context = getattr(config, "max_position_embeddings", None)
    if end is None or context is None:
        missing = "token that ends a text" if end is None else "longest context"
        return f"ONNX Runtime GenAI has to know the {missing}, which the configuration does not say."
    heads, size = next(iter(shapes.values()))  # layers that differ, or have no cache, it finds in the graph
    pad = config.pad_token_id if config.pad_token_id is not None else end
    return {
        "model": {
            "type": "decoder",  # any decoder; the names of inputs and outputs are those it expects
            "eos_token_id": end, "pad_token_id": pad[0] if isinstance(pad, list) else pad,
            "vocab_size": config.vocab_size, "context_length": context,
            "decoder": {
                "filename": _FILENAME, "hidden_size": config.hidden_size, "head_size": size,
                "num_hidden_layers": config.num_hidden_layers, "num_key_value_heads": heads,
            },
        }
    }  # fmt: skip
