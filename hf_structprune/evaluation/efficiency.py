"""Size, memory and speed of a model, as figures."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.utils import logging

from ..checks import Count, checked
from ..errors import ConfigurationError, EvaluationError, UnsupportedModelError
from ..evaluation_config import EfficiencyConfig
from ..hardware import cuda_devices, device_name, synchronize
from ..model.loading import load_model
from ..model.measuring import context_length, measuring
from ..model.structure import ModelStructure
from ..model.writing import for_text
from ..plan import PruningPlan
from ..progress import tqdm
from .results import Figure


logger = logging.get_logger(__name__)

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_efficiency(model: PreTrainedModel, config: EfficiencyConfig | None = None) -> list[Figure]:
    """Measures size, memory and speed of a model on the device it is on; it gets its modes back.

    Figures, all named `efficiency/...`:

    - `parameters`: distinct parameters by their true shapes, tied ones once; of a quantised model, those of the dense
      one it stands for.
    - `weight_bytes`: bytes of everything that is saved; `by_dtype` in the details.
    - `macs`: multiply-accumulates of a forward pass by the convention of published tables (`count_macs`), and
      `macs_with_attention`: all matrix products, counted by torch (`count_macs_with_attention`).
    - `kv_cache_bytes_per_token`: what one more token of one sequence adds to the cache while no sliding window is
      full; when all are, it is `without_windows` in the details.
    - `peak_memory`: the highest memory during one generation: of the CUDA allocator, or of the whole process, with
      what earlier work left behind. To compare models on a CPU, measure each in a process of its own.
    - `time_to_first_token`: `generate` from the call to the first new token.
    - `prefill_throughput`: prompt tokens a second in a forward pass that fills the cache.
    - `decode_throughput`: new tokens a second after the first, all sequences together.

    What cannot be known is left out with a warning: `macs` if the model's structure is not understood,
    `macs_with_attention` of quantised kernels. Raises a `ConfigurationError` if prompt and new tokens are longer than
    the model's context.
    """
    config = config or EfficiencyConfig()
    context = context_length(model)
    if context is not None and config.length + config.new_tokens * config.speed > context:
        raise ConfigurationError(
            f"`length` is {config.length} and `new_tokens` {config.new_tokens}, but the model's context is {context} "
            "tokens: lower one of them."
        )
    vocab = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(config.seed)  # the same ids on every device
    ids = torch.randint(vocab, (config.batch_size, config.length), generator=generator).to(model.device)
    return _size_figures(model, config, ids) + (_speed_figures(model, config, ids) if config.speed else [])


def _smaller(name: str, value: float, unit: str, protocol: str, **details: Any) -> Figure:
    return Figure(f"efficiency/{name}", value, unit, higher_is_better=False, protocol=protocol, details=details)


def _size_figures(model: PreTrainedModel, config: EfficiencyConfig, ids: torch.LongTensor) -> list[Figure]:
    shapes, quantised = model, getattr(model.config, "quantization_config", None) is not None
    if quantised:  # the dense model that it stands for
        with torch.device("meta"):
            shapes = type(model)(copy.deepcopy(model.config))
    stored, counted = weight_bytes(model), {"batch_size": config.batch_size, "length": config.length}
    figures = [
        _smaller("parameters", sum(p.numel() for p in shapes.parameters()), "", "true shapes, tied parameters once"),
        _smaller("weight_bytes", sum(stored.values()), "B", "weights as they are saved", by_dtype=stored),
    ]
    run = f"one forward pass of {config.batch_size} x {config.length} tokens"
    try:
        how = f"{run}: weights of linear maps and one for each MLP neuron, without attention products"
        figures.append(_smaller("macs", count_macs(shapes, **counted), "MAC", how, **counted))
    except UnsupportedModelError as error:
        logger.warning(f"efficiency/macs is left out: {error}")
    if model.device.type == "meta":
        logger.warning("efficiency/macs_with_attention and kv_cache_bytes_per_token are left out without weights.")
        return figures
    if quantised:
        logger.warning("efficiency/macs_with_attention is left out: torch does not count quantised kernels.")
    else:
        how = f"{run}: all matrix products, attention over the full square (torch's FlopCounterMode / 2)"
        figures.append(_smaller("macs_with_attention", count_macs_with_attention(model, ids), "MAC", how, **counted))
    if growth := cache_growth(model):
        layers, windows = map(list, zip(*growth, strict=True))
        how = "growth of the model's own cache from one token to two, one sequence"
        rest = sum(size for size, window in growth if window is None)
        details = {"without_windows": rest, "layers": layers, "sliding_windows": windows}
        figures.append(_smaller("kv_cache_bytes_per_token", sum(layers), "B", how, **details))
    else:
        logger.warning("efficiency/kv_cache_bytes_per_token is left out: the model has no cache of keys and values.")
    return figures


def _speed_figures(model: PreTrainedModel, config: EfficiencyConfig, ids: torch.LongTensor) -> list[Figure]:
    model = for_text(model)
    with measuring(model):
        times = [
            (time_prefill(model, ids), *time_generation(model, ids, config.new_tokens))
            for _ in tqdm(range(config.warmup + config.repeats), desc="Speed")
        ]
        with peak_memory(devices_of(model)) as peak:
            time_generation(model, ids, config.new_tokens)
    what = f"batch {config.batch_size}, prompt of {config.length} tokens, {config.new_tokens} new ones, {where(model)}"
    protocol = f"{what}; median of {config.repeats} runs after {config.warmup} to warm up"
    prefill, first, decode = np.transpose(times[config.warmup :])
    decoded = config.batch_size * (config.new_tokens - 1)
    figures = [
        median_figure("efficiency/time_to_first_token", first, "s", protocol),
        median_figure("efficiency/prefill_throughput", ids.numel() / prefill, "tokens/s", protocol),
        median_figure("efficiency/decode_throughput", decoded / decode, "tokens/s", protocol),
    ]
    if peak.value is None:
        return figures
    how = f"{peak.method} during one generation: {what}"
    return [_smaller("peak_memory", peak.value, "B", how, before=peak.before), *figures]


def count_macs(model: PreTrainedModel, batch_size: int = 1, length: int = 64) -> int:
    """`batch_size * length * (weights of all linear maps, LM head included + MLP neurons)`, from true shapes.

    The convention of LLM-Pruner's tables, and of `PruningPlan.macs`: one multiply-accumulate for each weight that a
    token passes and one for each activated MLP neuron; products between activations (attention) are not counted. Of
    experts, those count that a token is sent to. Works on the meta device; raises an `UnsupportedModelError` if the
    structure of the model is not understood.
    """
    structure = ModelStructure.of(model)
    plan = PruningPlan.from_counts(structure, {}, model_type=model.config.model_type, layout="per_layer")
    return plan.macs(batch_size, length)


@torch.no_grad()
def count_macs_with_attention(model: PreTrainedModel, ids: torch.LongTensor) -> int:
    """Multiply-accumulates of all matrix products of a forward pass: half the operations torch's own counter counts.

    For a layer of `h` heads of size `d`, attention adds `2 * batch_size * h * d * length ** 2`: scores and weighted
    values over the full square, whatever the mask leaves out. Norms, activations and other element-wise operations
    are not counted. The model runs once, on `ids` of shape `(batch_size, length)`.
    """
    model = for_text(model)
    # Fused attention of the CPU is unknown to the counter; the plain kind consists of products that it knows.
    plain = sdpa_kernel(SDPBackend.MATH)
    # So are products of rows, shape `(n, k)`, with the matrix of their expert: one of `(groups, k, m)`.
    names = (("aten", "_grouped_mm"), ("transformers", "grouped_mm_fallback"))
    grouped = filter(None, (getattr(getattr(torch.ops, space), name, None) for space, name in names))
    mapping = dict.fromkeys(grouped, lambda rows, weights, *_, **__: 2 * rows[0] * rows[1] * weights[-1])
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    own = model.config._attn_implementation
    with ExitStack() as stack:
        if own not in ("eager", "sdpa"):  # kernels from elsewhere
            stack.callback(model.set_attn_implementation, own)
            model.set_attn_implementation("sdpa")
        for context in (measuring(model), plain, counter):
            stack.enter_context(context)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return counter.get_total_flops() // 2


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of everything that is saved with a model, by dtype (`"bfloat16"`); tied tensors count once.

    Quantised weights count as they are stored, with their scales and zero points.
    """
    total: Counter[str] = Counter()
    tensors = {(t.device, _place(t), t.nbytes): t for t in _saved_tensors(model.state_dict().values())}
    for tensor in tensors.values():
        total[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return dict(total)


def _place(tensor: torch.Tensor) -> int:
    """Where it begins; without weights that is nowhere, and only what holds it tells it from others."""
    return tensor.data_ptr() or tensor.untyped_storage()._cdata


def _saved_tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    """The tensors among them, and those inside one of a wrapper class, which knows only the dtype it stands for."""
    for value in values:
        if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
            yield from _saved_tensors(getattr(value, name) for name in value.__tensor_flatten__()[0])
        elif isinstance(value, torch.Tensor):
            yield value


@torch.no_grad()
def cache_growth(model: PreTrainedModel) -> list[tuple[int, int | None]]:
    """Bytes that one more token of one sequence adds to the model's own cache, from one token to two.

    For each layer its bytes, and the length of its sliding window (it stops growing when that is full), `None` where
    it attends to everything; nothing if the model has no cache with keys and values.
    """

    model = for_text(model)

    def held(tokens: int) -> list[tuple[int, int | None]]:
        ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        layers = getattr(getattr(output, "past_key_values", None), "layers", ())
        pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
        sizes = [sum(t.nbytes for t in pair if isinstance(t, torch.Tensor)) for pair in pairs]
        return [(size, getattr(layer, "sliding_window", None)) for size, layer in zip(sizes, layers, strict=True)]

    with measuring(model):
        first, second = held(1), held(2)
    growth = [(after - before, window) for (before, _), (after, window) in zip(first, second, strict=True)]
    return growth if any(size for size, _ in second) else []


@contextmanager
def peak_memory(devices: set[torch.device]) -> Iterator[SimpleNamespace]:
    """Measures the peak of the CUDA allocator over the CUDA devices, or else of the process's resident memory.

    Gives an object with, afterwards, `value`: bytes at the peak of the block, those before it included (`None`:
    unknown), `before`: bytes before it, and `method`: how they were read.
    """
    cuda, reset = cuda_devices(devices), False
    for device in cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    peak = SimpleNamespace(value=None, before=memory_in_use(devices), method="")
    if not cuda:
        with suppress(OSError):  # Linux: the kernel forgets the peak so far
            _CLEAR.write_text("5")
            reset = "VmHWM" in _STATUS.read_text()
    yield peak
    if cuda:
        peak.value = sum(map(torch.cuda.max_memory_allocated, cuda))
        peak.method = "peak of the CUDA allocator (max_memory_allocated, reset before)"
    elif reset:
        peak.value = 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)[1])
        peak.method = "peak resident memory of the process (VmHWM, reset before)"
    elif sys.platform != "win32":
        import resource

        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak.value = size if sys.platform == "darwin" else size * 1024
        peak.method = "peak resident memory of the process (ru_maxrss, since the process started)"


def memory_in_use(devices: set[torch.device]) -> int:
    """Bytes that the CUDA allocator has given out on the CUDA devices, or else the resident memory of the process."""
    cuda = cuda_devices(devices)
    return sum(map(torch.cuda.memory_allocated, cuda)) if cuda else psutil.Process().memory_info().rss


def devices_of(model: PreTrainedModel) -> set[torch.device]:
    """The devices the weights are on."""
    return {parameter.device for parameter in model.parameters()}


def where(model: PreTrainedModel) -> str:
    """Dtype and device in words: `"bfloat16 on cpu (2 threads)"`."""
    threads = f" ({torch.get_num_threads()} threads)" if model.device.type == "cpu" else ""
    return f"{str(model.dtype).removeprefix('torch.')} on {device_name(model.device)}{threads}"


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


def time_generation(model: PreTrainedModel, ids: torch.LongTensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of a greedy `model.generate` to the first of exactly `new_tokens` tokens, and from there to the last.

    `ids` are of shape `(batch, length)`. Raises an `EvaluationError` if the model's own `generate` made another number
    of tokens.
    """
    devices, times = devices_of(model), []

    def clock(input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        if len(times) in (0, new_tokens - 1):
            synchronize(devices)
        times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)  # stops nothing

    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1, use_cache=True
    )
    # The model's own settings (sampling, stop words, kinds of cache) would come in: all are timed alike.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        synchronize(devices)
        start = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
    finally:
        model.generation_config = own
    if len(times) != new_tokens:
        raise EvaluationError(f"{type(model).__name__} generated {len(times)} tokens instead of {new_tokens}.")
    return times[0] - start, times[-1] - times[0]


def median_figure(name: str, values: Sequence[float], unit: str, protocol: str, **details: Any) -> Figure:
    """The median of repeated measurements, with their spread in the details (`iqr`: third minus first quartile)."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    values = [float(value) for value in values]
    details = {"min": min(values), "max": max(values), "iqr": high - low, "values": values, **details}
    return Figure(name, median, unit, higher_is_better=unit != "s", protocol=protocol, details=details)


def time_loading(
    model: str | os.PathLike, *, dtype: str = "auto", device: str = "cpu", repeats: int = 3, **kwargs: Any
) -> Figure:
    """Seconds that loading a checkpoint takes, in a fresh process, as figure `efficiency/load_time`.

    The process loads it once without counting: that imports the code of the model and brings the files into the
    system's cache. What is counted is building, reading all weights (Transformers maps files into memory and leaves
    reading to the first use) and moving to the device. Raises an `EvaluationError` that says why it did not load.

    Args:
        model: Folder, or id of a model that is in the cache.
        dtype, device: What it is loaded in and moved to; `"auto"` is the checkpoint's.
        repeats: Loads that count.
        kwargs: Further options of `from_pretrained` that JSON can hold, for example `gguf_file`.
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
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loaded = load_model(model, dtype=dtype, **kwargs).to(device)
        # Files mapped into memory are read only when they are used: here a byte of every page.
        for tensor in _saved_tensors(loaded.state_dict().values()):
            tensor.contiguous().view(-1).view(torch.uint8)[::4096].sum()
        synchronize(devices_of(loaded))
        seconds.append(time.perf_counter() - start)
        del loaded
    return seconds[1:]
