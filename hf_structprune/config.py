"""`PruningConfig`: what to cut and how to choose it."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from .alignment import AlignTo, check_align_to, check_step, multiple_of
from .checks import Count, Described, Limits, Number, OneOf, Ratio, check_choice, check_fields, check_keys
from .errors import ConfigurationError
from .files.reading import read_json_object
from .files.writing import write_text
from .text.calibration_config import CalibrationConfig
from .units.kinds import (
    DEPTH_CRITERIA,
    DEPTH_UNITS,
    HIDDEN_CRITERIA,
    UNITS,
    WIDTH_UNITS,
    check_depth,
    complete_units,
    parse_split,
    split_criterion,
)


CONFIG_NAME = "pruning_config.json"

CRITERIA = ("random", "l1", "l2", "taylor", "wanda", "wifv", "activation", "obs")
TAYLOR_VARIANTS = ("vectorize", "first", "second", "mix")
AGGREGATIONS = ("sum", "mean", "max", "prod", "first", "last")
ALLOCATIONS = ("uniform", "global", "search")
LAYOUTS = ("uniform", "per_layer")
_LayerRange = Annotated[tuple[Number, Number], Described("(start, end), 0 <= start < end, end excluded")]


@dataclass
class PruningConfig:
    """What to cut, how to choose it, and how to make up for it. The defaults are the ones we measured to be best.

    Args:
        units (tuple of `str`, *optional*):
            What may be cut. Widths: `"mlp_neurons"`, `"kv_groups"` (a key/value head with its query heads) and
            `"query_heads"` (the same number in every KV group). Depth: `"layers"` (whole decoder layers),
            `"attention"` and `"mlp"` (one sublayer of a layer). And `"hidden"` (channels of the residual stream).
            Default: the kinds that other options name (`attention_ratio`, `mlp_ratio`, `num_layers`, `keep_first`,
            `hidden_size`, `split`), else `("mlp_neurons",)`.
        criterion (`str`): How units are ranked: `"random"`, `"l1"`, `"l2"`, `"taylor"`, `"wanda"`, `"wifv"`,
            `"activation"` or `"obs"`. With nothing but depth or nothing but `"hidden"` to cut, it may also be one of
            `depth_criterion` or `hidden_criterion` and sets that.
        taylor (`str`): Variant of the Taylor criterion: `"vectorize"`, `"first"`, `"second"` or `"mix"`.
        aggregation (`str`): Joins the scores of the tensors of a group: `"sum"`, `"mean"`, `"max"`, `"prod"`,
            `"first"` (first producer) or `"last"` (the consumer).
        compensation (`bool`): Re-fit the consumers of what is cut on the calibration text.
        error_correction (`float`): The share of the error that earlier cuts have left in the hidden states which every
            re-fit tries to undo on top of its own layer's, 0 to 1; 0 re-fits the cut consumers to their own outputs
            only. Needs compensation and a model whose layers simply add up; other models are re-fitted without it.
        token_weighting (`bool`): Weigh every calibration token in the re-fit (and in `"obs"`) by the inverse square
            of its hidden state's norm: the norm that follows divides by it, so that an error of a large hidden state
            matters less. Without it a few tokens with massive activations rule the fit.
        damping (`float`, *optional*): Ridge of the re-fit, as a multiple of the mean of `diag(E[x x^T])`. `None`
            chooses it for each layer on held-out calibration text.
        allocation (`str`): `"uniform"` cuts the same share of every group of a kind, `"global"` compares the
            standardised scores of all groups, `"search"` measures how much the model's predictions change when each
            group alone is cut and takes most where it costs least.
        layout (`str`): `"uniform"` keeps all layers alike, so that the result is a vanilla checkpoint; `"per_layer"`
            lets widths differ and writes them as Transformers' `per_layer_config`.
        depth_criterion (`str`): How layers and sublayers are ranked: `"angular"` (the contiguous block with the least
            angular distance between its two ends; PruneMe), `"block_influence"` (ShortGPT), `"perplexity"`,
            `"taylor"`, `"magnitude"` (Shortened-LLM), `"greedy"` (drop the one that costs least, measure again; SLEB)
            or `"exchange"` (greedy, then others in their place as long as that is better).
        num_layers (`int`, *optional*): Decoder layers to remove.
        keep_first (`int`, *optional*): Keep so many decoder layers, the first ones, and remove all others.
        hidden_criterion (`str`): How hidden channels are ranked: `"magnitude"`, `"taylor"`, `"activation"` (Minitron),
            or `"pca"`: the stream is turned into its principal components first (SliceGPT, with one rotation for all
            layers), which is exact for models with RMS norms in front of their readers and a head of its own.
        hidden_size (`int`, *optional*): The hidden size after pruning.
        split (`dict` of `str` to `float`, *optional*): The part of the budget of each kind of unit, for example
            `{"layers": 0.5, "mlp_neurons": 0.5}`; on the command line `layers=0.5 mlp_neurons=0.5`. Without it, and
            with layers or sublayers among several kinds, the split with the least measured cost is taken.
        layers (list of `int`, *optional*): The layers that may be cut, by number. With only depth to cut and no
            ratio or number given, exactly these go.
        layer_range (pair of `int`, *optional*): The same as `(start, end)`, **end excluded**: `(4, 18)` is 4 to 17.
        protect_first (`int`), protect_last (`int`): Number of layers left whole at either end.
        attention_ratio (`float`, *optional*), mlp_ratio (`float`, *optional*): Instead of one ratio for the model:
            the share of heads and of neurons that goes in every layer that may be cut. Rounded so that no more heads
            than asked go (as LLM-Pruner does).
        round_to (`int`, *optional*): Kept MLP widths are multiples of this. `None`: a power of two that suits the
            hardware, at most 1/32 of the width and at most 128. `1`: exact ratios.
        align_to (`str` or `int`, *optional*): Widths for what comes after pruning: what is left of MLP widths, of
            query heads times the size of a head, and of the hidden size is a multiple of this number, or of what a
            name stands for: `"gptq-128"`, `"gptq-64"`, `"gptq-32"`; `"awq-..."` with the same sizes; `"gguf-256"`
            (llama.cpp's k-quants), `"gguf-32"`; `"tensor-cores"` (64). Only what is cut can be aligned.
        iterative_steps (`int`): Cut in so many equal steps, with statistics computed again at each.
        gradient_checkpointing (`bool`): Save memory in the backward pass of gradient criteria.
        seed (`int`): Seed of everything random.
        calibration (`CalibrationConfig`): The text.
    """

    units: tuple[Annotated[str, OneOf(UNITS)], ...] | None = None
    criterion: str = "obs"
    taylor: Annotated[str, OneOf(TAYLOR_VARIANTS)] = "first"
    aggregation: Annotated[str, OneOf(AGGREGATIONS)] = "sum"
    compensation: bool = True
    error_correction: Annotated[float, Limits(0, 1)] = 0.5
    token_weighting: bool = True
    damping: Annotated[float, Limits(0, open="least"), Described("a positive number")] | None = None
    allocation: Annotated[str, OneOf(ALLOCATIONS)] = "uniform"
    layout: Annotated[str, OneOf(LAYOUTS)] = "uniform"
    depth_criterion: Annotated[str, OneOf(DEPTH_CRITERIA)] = "exchange"
    num_layers: Count | None = None
    keep_first: Count | None = None
    hidden_criterion: Annotated[str, OneOf(HIDDEN_CRITERIA)] = "activation"
    hidden_size: Count | None = None
    split: dict[str, float] | list[str] | None = None
    layers: list[Number] | None = None
    layer_range: _LayerRange | None = None
    protect_first: Number = 0
    protect_last: Number = 0
    attention_ratio: Ratio | None = None
    mlp_ratio: Ratio | None = None
    round_to: Count | None = None
    align_to: AlignTo | None = None
    iterative_steps: Count = 1
    gradient_checkpointing: bool = False
    seed: Number = 0
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        self.split = parse_split(self.split)
        self._check_units()
        split_criterion(self, CRITERIA)
        check_choice("criterion", self.criterion, CRITERIA)
        self._check_alignment()
        self._check_layers()
        check_depth(self)

    def _check_units(self) -> None:
        self.units = complete_units(self)
        if not self.units:
            raise ConfigurationError(f"`units` is empty; name at least one of {', '.join(UNITS)}.")
        if self.attention_ratio is not None and not {"kv_groups", "query_heads"} & set(self.units):
            raise ConfigurationError(f"`attention_ratio` is given, but `units` is {self.units}: no heads in it.")
        if self.mlp_ratio is not None and "mlp_neurons" not in self.units:
            raise ConfigurationError(f"`mlp_ratio` is given, but `units` is {self.units}: no 'mlp_neurons' in it.")

    def _check_alignment(self) -> None:
        self.align_to = check_align_to(self.align_to)
        check_step(self.round_to, self.align_to)
        multiple = multiple_of(self.align_to)
        if self.hidden_size is not None and self.hidden_size % multiple:
            lower = self.hidden_size // multiple * multiple
            nearest = " or ".join(str(size) for size in (lower, lower + multiple) if size)
            raise ConfigurationError(
                f"`hidden_size` is {self.hidden_size}, which is not a multiple of {multiple} (`align_to` is "
                f"{self.align_to!r}); the nearest that is: {nearest}."
            )

    def _check_layers(self) -> None:
        if self.layers is not None and self.layer_range is not None:
            raise ConfigurationError("`layers` and `layer_range` are both given; give one of them.")
        if self.layer_range is not None and self.layer_range[0] >= self.layer_range[1]:
            raise ConfigurationError(
                f"`layer_range` is {self.layer_range!r}; it must be (start, end), 0 <= start < end, end excluded."
            )
        if self.layout == "uniform":
            chosen = [n for n in ("layers", "layer_range", "protect_first", "protect_last") if getattr(self, n)]
            if chosen and self.kinds(WIDTH_UNITS):
                raise ConfigurationError(
                    f"`{chosen[0]}` leaves some layers whole, so widths differ between layers: set layout='per_layer'."
                )
            if self.allocation != "uniform":
                raise ConfigurationError(
                    f"allocation={self.allocation!r} gives every layer a width of its own: set layout='per_layer'."
                )

    def kinds(self, among: tuple[str, ...]) -> tuple[str, ...]:
        """The units of this configuration that are among these."""
        return tuple(unit for unit in self.units if unit in among)

    @property
    def listed(self) -> bool:
        """Whether `layers` can name exactly what goes: with nothing but depth to cut."""
        return self.layers is not None and not set(self.units) - set(DEPTH_UNITS)

    @property
    def takes_ratio(self) -> bool:
        """Whether something is left to decide by a ratio for the whole model."""
        stated = {"layers"} if self.num_layers is not None or self.keep_first is not None else set()
        stated |= {"hidden"} if self.hidden_size is not None else set()
        return not self.by_kind and bool(set(self.units) - stated)

    @property
    def needs_ratio(self) -> bool:
        """Whether nothing can be decided without a ratio for the whole model."""
        return self.takes_ratio and not self.listed

    def chooses_depth(self, ratio: float | None) -> bool:
        """Whether a criterion decides which layers and sublayers go, when this ratio is asked for."""
        named = self.listed and self.num_layers is None and ratio is None
        return bool(self.kinds(DEPTH_UNITS)) and self.keep_first is None and not named

    @property
    def by_kind(self) -> bool:
        """Whether `attention_ratio` / `mlp_ratio` stand in for one ratio of the whole model."""
        return self.attention_ratio is not None or self.mlp_ratio is not None

    @classmethod
    def llm_pruner(
        cls, ratio: float, *, layer_range: tuple[int, int] | None = None, taylor: str = "first", **kwargs: Any
    ) -> PruningConfig:
        """The settings of LLM-Pruner (Ma et al., 2023, https://huggingface.co/papers/2305.11627), block-wise.

        `ratio` is the share of heads and neurons that goes **in each layer of `layer_range`** (end excluded), not of
        the model; whole KV groups, kept neurons rounded down, one shot, Taylor importance, no re-fit.
        """
        settings: dict[str, Any] = dict(
            criterion="taylor", taylor=taylor, compensation=False, layout="per_layer", round_to=1,
            attention_ratio=ratio, mlp_ratio=ratio, layer_range=layer_range,
            calibration=CalibrationConfig(num_samples=10, length=64, batch_size=10),
        )  # fmt: skip
        return cls(**{**settings, **kwargs})

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["calibration"] = self.calibration.to_dict()
        return json.loads(json.dumps(values))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruningConfig:
        check_keys(cls, values)
        return cls(**values)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the configuration as JSON to a file."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> PruningConfig:
        """Reads a configuration from a JSON file or from a checkpoint folder."""
        path = Path(path)
        path = path / CONFIG_NAME if path.is_dir() else path
        return cls.from_dict(read_json_object(path, ConfigurationError))
