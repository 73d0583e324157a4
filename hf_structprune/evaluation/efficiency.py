"""Size, memory and speed of a model, as figures."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checks import Count, Limits, Number, check_fields
from ..errors import ConfigurationError, UnsupportedModelError
from ..model.measuring import measuring
from .macs import count_macs, count_macs_with_attention
from .memory import cache_growth, peak_memory, weight_bytes
from .results import Figure
from .speed import devices_of, median_figure, time_generation, time_prefill, where


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class EfficiencyConfig:
    """What is run to measure size and speed.

    Args:
        batch_size: Sequences at once.
        length: Tokens of a prompt; multiply-accumulates are counted for `batch_size` x `length`.
        new_tokens: Tokens that are generated after it: exactly so many.
        warmup: Runs before those that count.
        repeats: Runs that count; figures are their medians.
        speed: Whether time and peak memory are measured, and not only size.
        seed: Seed of the random token ids.
    """

    batch_size: Count = 1
    length: Count = 64
    new_tokens: Annotated[int, Limits(2)] = 32
    warmup: Number = 2
    repeats: Count = 5
    speed: bool = True
    seed: Number = 0

    def __post_init__(self) -> None:
        check_fields(self)


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

    A figure that cannot be known is left out, with a warning: `macs` for a model whose structure is not understood,
    `macs_with_attention` for quantised kernels.

    Args:
        model: The model, with all weights in memory.
        config: What to run.

    Raises:
        ConfigurationError: Prompt and new tokens are longer than the model's context.
    """
    config = config or EfficiencyConfig()
    _check_context(model, config)
    ids = _random_ids(model, config)
    figures = _size_figures(model, config, ids)
    return figures + _speed_figures(model, config, ids) if config.speed else figures


def _check_context(model: PreTrainedModel, config: EfficiencyConfig) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = config.length + config.new_tokens if config.speed else config.length
    if context is not None and needed > context:
        raise ConfigurationError(
            f"`length` is {config.length} and `new_tokens` {config.new_tokens}, but the model's context is {context} "
            "tokens: lower one of them."
        )


def _random_ids(model: PreTrainedModel, config: EfficiencyConfig) -> torch.LongTensor:
    """Token ids of shape `(batch_size, length)`, the same on every device."""
    generator = torch.Generator().manual_seed(config.seed)
    vocab = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocab, (config.batch_size, config.length), generator=generator).to(model.device)


def _size_figures(model: PreTrainedModel, config: EfficiencyConfig, ids: torch.LongTensor) -> list[Figure]:
    quantised = getattr(model.config, "quantization_config", None) is not None
    shapes = _dense_shapes(model) if quantised else model
    stored = weight_bytes(model)
    figures = [
        _smaller("parameters", sum(p.numel() for p in shapes.parameters()), "", "true shapes, tied parameters once"),
        _smaller("weight_bytes", sum(stored.values()), "B", "weights as they are saved", by_dtype=stored),
    ]
    run = f"one forward pass of {config.batch_size} x {config.length} tokens"
    counted = {"batch_size": config.batch_size, "length": config.length}
    try:
        macs = count_macs(shapes, config.batch_size, config.length)
        protocol = f"{run}: weights of linear maps and one for each MLP neuron, without attention products"
        figures.append(_smaller("macs", macs, "MAC", protocol, **counted))
    except UnsupportedModelError as error:
        logger.warning(f"efficiency/macs is left out: {error}")
    if quantised:
        logger.warning("efficiency/macs_with_attention is left out: torch does not count quantised kernels.")
    else:
        protocol = f"{run}: all matrix products, attention over the full square (torch's FlopCounterMode / 2)"
        macs = count_macs_with_attention(model, ids)
        figures.append(_smaller("macs_with_attention", macs, "MAC", protocol, **counted))
    growth = cache_growth(model)
    if growth is None:
        logger.warning("efficiency/kv_cache_bytes_per_token is left out: the model has no cache of keys and values.")
        return figures
    protocol = "growth of the model's own cache from one token to two, one sequence"
    figure = _smaller(
        "kv_cache_bytes_per_token", growth.total, "B", protocol, without_windows=growth.without_windows,
        layers=growth.layers, sliding_windows=growth.windows,
    )  # fmt: skip
    return [*figures, figure]


def _smaller(name: str, value: float, unit: str, protocol: str, **details) -> Figure:
    return Figure(f"efficiency/{name}", value, unit, higher_is_better=False, protocol=protocol, details=details)


def _dense_shapes(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model that a quantised one stands for, on the meta device."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def _speed_figures(model: PreTrainedModel, config: EfficiencyConfig, ids: torch.LongTensor) -> list[Figure]:
    runs = config.warmup + config.repeats
    prefill, generation = [], []
    with measuring(model), tqdm(total=runs, desc="Speed", disable=not logging.is_progress_bar_enabled()) as bar:
        for run in range(runs):
            seconds = time_prefill(model, ids), time_generation(model, ids, config.new_tokens)
            if run >= config.warmup:
                prefill.append(seconds[0])
                generation.append(seconds[1])
            bar.update()
        with peak_memory(devices_of(model)) as peak:
            time_generation(model, ids, config.new_tokens)
    prompt = f"batch {config.batch_size}, prompt of {config.length} tokens, {config.new_tokens} new ones"
    what = f"{prompt}, {where(model)}"
    protocol = f"{what}; median of {config.repeats} runs after {config.warmup} to warm up"
    figures = []
    if peak.value is not None:
        protocol_of_peak = f"{peak.method} during one generation: {what}"
        figures.append(_smaller("peak_memory", peak.value, "B", protocol_of_peak, before=peak.before))
    tokens, decoded = config.batch_size * config.length, config.batch_size * (config.new_tokens - 1)
    for name, values, unit in (
        ("time_to_first_token", [g.first_token for g in generation], "s"),
        ("prefill_throughput", [tokens / seconds for seconds in prefill], "tokens/s"),
        ("decode_throughput", [decoded / g.decode for g in generation], "tokens/s"),
    ):
        figures.append(median_figure(f"efficiency/{name}", values, unit, protocol))
    return figures
