"""`PruningConfig`: what to cut and how to choose it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from .alignment import AlignTo, check_step, multiple_of
from .checks import Count, Described, Limits, Number, OneOf, Ratio, check_choice, check_fields, check_keys, checked
from .errors import ConfigurationError, RatioError
from .files.reading import read_json_object
from .files.writing import write_text
from .text.calibration import CalibrationConfig
from .units import (
    HIDDEN,
    KINDS,
    DepthKind,
    RoutedKind,
    SharedKind,
    StreamKind,
    VocabularyKind,
    WidthKind,
    kinds_of,
    level_criteria,
)
from .units.depth import LAYERS
from .units.head_size import HeadSize
from .units.heads import GROUPS
from .units.latent_ranks import LatentRanks
from .units.vocabulary import VOCABULARY


CONFIG_NAME = "pruning_config.json"

TAYLOR_VARIANTS = ("vectorize", "first", "second", "mix")
AGGREGATIONS = ("sum", "mean", "max", "prod", "first", "last")
ALLOCATIONS = ("uniform", "global", "search", "evolution")
EVOLUTION = "evolution"
LAYOUTS = ("uniform", "per_layer")
_LayerRange = Annotated[tuple[Number, Number], Described("(start, end), 0 <= start < end, end excluded")]
Kind = Annotated[str, OneOf(KINDS)]
AUTO = "auto"
MEASURED = "measured"
_Part = Annotated[float, Limits(0, open="least"), Described("a positive number")]
_RATIOS = ("attention_ratio", "mlp_ratio")
_LEVELS = (DepthKind, StreamKind, HeadSize, LatentRanks, RoutedKind, VocabularyKind)
_CRITERIA = {level: level.criterion_option for level in _LEVELS}


@dataclass
class PruningConfig:
    """What to cut, how to choose it, and how to make up for it. The defaults are the ones we measured to be best.

    Args:
        units (tuple of `str`, *optional*):
            What may be cut. Widths: `"mlp_neurons"`, `"kv_groups"` (a key/value head with its query heads) and
            `"query_heads"` (the same number in every KV group); `"mamba_heads"` (of Mamba 2 mixers); `"experts"`
            (whole ones, with their rows of the router) and `"expert_neurons"` (equally many of every expert). Depth:
            `"layers"` (whole decoder layers), `"attention"` and `"mlp"` (one sublayer of a layer). `"hidden"`
            (channels of the residual stream) and `"head_dim"` (dimensions of all heads); `"q_ranks"` and `"kv_ranks"`
            (directions of the latents of multi-head latent attention). And `"vocabulary"` (tokens: rows of the
            embedding and the LM head; the tokenizer is trimmed with them). Or `"auto"`: MLP neurons (or experts)
            alone, if no more than a third of the neurons go; else heads, neurons, experts and layers in the mixture
            that costs least on this model, by measurement on the calibration text.
            Default: the kinds that other options name (`attention_ratio`, `mlp_ratio`, `num_layers`, `keep_first`,
            `hidden_size`, `split`), else `"auto"`.
        criterion (`str`): How units are ranked: `"random"`, `"l1"`, `"l2"`, `"taylor"`, `"wanda"`, `"wifv"`,
            `"activation"`, `"obs"` or `"kfac"` (as `"obs"`, by what the loss rises by). `"auto"` is `"obs"`, which
            needs no gradients; of what `units="auto"` takes, `"kfac"` where the whole model is in memory. With
            nothing but depth or nothing but `"hidden"` to cut, it may also be one of `depth_criterion` or
            `hidden_criterion` and sets that. Or a criterion for each kind:
            `{"layers": "angular", "kv_groups": "wanda", "mlp_neurons": "obs"}`.
        taylor (`str`): Variant of the Taylor criterion: `"vectorize"`, `"first"`, `"second"` or `"mix"`.
        aggregation (`str`): Joins the scores of the tensors of a group: `"sum"`, `"mean"`, `"max"`, `"prod"`,
            `"first"` (first producer) or `"last"` (the consumer).
        compensation (`bool`): Re-fit the consumers of what is cut on the calibration text.
        error_correction (`float`): The share of the error that earlier cuts have left in the hidden states which every
            re-fit tries to undo on top of its own layer's, 0 to 1; above 0 the norm in front of the head is scaled in
            the end, too, so that predictions are no surer than what is left allows. Needs compensation and a model
            whose layers simply add up; other models are re-fitted without it.
        token_weighting (`bool`): Weigh every calibration token in the re-fit (and in `"obs"`) by the inverse of its
            hidden state's norm, by which the norm that follows divides. Without it a few tokens with massive
            activations rule the fit.
        damping (`float`, *optional*): Ridge of the re-fit, as a multiple of the mean of `diag(E[x x^T])`. `None`
            chooses it for each layer on held-out calibration text.
        reconstruct (`bool`, *optional*): Train each layer after its re-fit, all weights that it has left, for fifty
            steps towards what it should put out; the re-fit stays where that is no better on held-out calibration
            text. The first layers gain most: after three in a row that gain less than 1 %, the others are re-fitted
            alone. Default: where `units` and `criterion` are `"auto"`, the model has no experts, is whole in memory
            and leaves room for it; `False` leaves it out.
        reconstruct_minutes (`float`, *optional*): Reconstruct for so many minutes in all, and all layers, in the
            place of fifty steps each of the first.
        allocation (`str`): `"uniform"` cuts the same share of every group of a kind, `"global"` compares the
            scores of all groups (by `"kfac"`, which `units="auto"` takes, as they are: what the loss rises by for
            each parameter; by other criteria standardised, as FLAP does), `"search"` measures how much the model's
            predictions change when each group alone is cut and takes most where it costs least. `"evolution"` goes on
            from there: groups are re-fitted at about ten widths, and widths, and whole layers if `units` names them,
            are exchanged for as long as `search_minutes` says, or until `search_evaluations` models were measured,
            whenever the predictions of the whole model change less.
        levels (`str`, *optional*): Folder that keeps what `"evolution"` re-fitted and measured: another ratio, and a
            search that was interrupted, go on from it. By default it is made for the one run.
        search_minutes (`float`): For `"evolution"`: minutes that widths are exchanged, after levels were made.
        search_evaluations (`int`, *optional*): For `"evolution"`: models that are measured, whatever time it takes;
            with the same seed this gives the same plan.
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
        head_dim_criterion (`str`): How pairs of dimensions of queries and keys are ranked: `"attention"` (by how much
            the output of the attention changes without them), `"energy"` (of their part of the scores),
            `"magnitude"` or `"taylor"`. Values are turned into the directions that matter most for the output.
        latent_criterion (`str`): How directions of latents are found: `"outputs"` (those without which what reads the
            latents gives most of its outputs on the calibration text), or `"magnitude"` (the same by weights alone).
        expert_criterion (`str`): How experts are ranked: `"reap"` (weight of the router times norm of the output, over
            the tokens that an expert gets), `"frequency"`, `"router"` (mean probability), `"l2"`, `"taylor"`,
            `"random"`, or `"loss"` (each time the one goes without which the block's output changes least).
        vocabulary_criterion (`str`): Which tokens stay: `"frequency"` (those without which text like this gets
            longer; where counts are small, the tokenizer's own order has a part in it), `"frequency_taylor"` (the
            same, with a part for what the loss loses without their rows, by gradients of a few sequences of that
            text), `"embedding_norm"` or `"taylor"`. `"auto"` is `"frequency_taylor"` where gradients can be had, else
            `"frequency"`, and the plan says why.
        vocabulary_text (`str` or list of `str`, *optional*): The text in which tokens are counted: as `dataset` of the
            calibration. Give text of every language, and of every kind, that the model is to write; each source has an
            equal part. Default: all of the calibration's data. With `units="auto"`, tokens go only if it is given: the
            vocabulary and the kind that goes by default are then split by what they cost (`split="measured"`), unless
            `keep={"vocabulary": 32768}` says how many tokens stay.
        vocabulary_tokens (`int`): Tokens of it that are counted at most.
        merge_experts (`bool`): Average every expert that goes into the nearest that stays, instead of dropping it.
        split (`dict` of `str` to `float`, or `"measured"`, *optional*): The part of the budget of each kind of unit,
            for example `{"layers": 0.5, "mlp_neurons": 0.5}`; on the command line `layers=0.5 mlp_neurons=0.5`. With
            `"measured"` every kind is tried alone on copies of the model, and the split is the one that by what they
            cost on held-out text costs least (tokens, hidden channels and heads included). Without it, and
            with layers or sublayers among several kinds, the split with the least measured cost is taken.
        keep (`dict` of `str` to `int`, *optional*): What is to be left of each kind of unit, an exact shape:
            `{"layers": 24, "hidden": 512, "mlp_neurons": 1024, "kv_groups": 3}` (widths are those of each layer;
            query heads count all heads of a layer; `"head_dim": 64` is the size of every head); on the command line
            `layers=24 hidden=512`. A ratio, if one is
            given, is reached by the `units` that it does not name.
        layers (list of `int`, *optional*): The layers that may be cut, by number. With only depth to cut and no
            ratio or number given, exactly these go.
        layer_range (pair of `int`, *optional*): The same as `(start, end)`, **end excluded**: `(4, 18)` is 4 to 17.
        protect_first (`int`): Number of layers left whole at the beginning.
        protect_last (`int`): Number of layers left whole at the end.
        attention_ratio (`float`, *optional*): Instead of one ratio for the model: the share of heads that goes in
            every layer that may be cut. Rounded so that no more than asked go (as LLM-Pruner does).
        mlp_ratio (`float`, *optional*): The same for neurons.
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

    units: tuple[Annotated[str, OneOf(ChainMap({AUTO: None}, KINDS))], ...] | None = None
    criterion: str | dict[Kind, str] | list[str] = AUTO
    taylor: Annotated[str, OneOf(TAYLOR_VARIANTS)] = "first"
    aggregation: Annotated[str, OneOf(AGGREGATIONS)] = "sum"
    compensation: bool = True
    error_correction: Annotated[float, Limits(0, 1)] = 0.5
    token_weighting: bool = True
    damping: Annotated[float, Limits(0, open="least"), Described("a positive number")] | None = None
    reconstruct: bool | None = None
    reconstruct_minutes: Annotated[float, Limits(0), Described("a number of minutes")] | None = None
    allocation: Annotated[str, OneOf(ALLOCATIONS)] = "uniform"
    levels: str | None = None
    search_minutes: Annotated[float, Limits(0), Described("a number of minutes")] = 10.0
    search_evaluations: Number | None = None
    layout: Annotated[str, OneOf(LAYOUTS)] = "uniform"
    depth_criterion: Annotated[str, OneOf(level_criteria(DepthKind))] = "exchange"
    num_layers: Count | None = None
    keep_first: Count | None = None
    hidden_criterion: Annotated[str, OneOf(level_criteria(StreamKind))] = "activation"
    hidden_size: Count | None = None
    head_dim_criterion: Annotated[str, OneOf(level_criteria(HeadSize))] = "attention"
    latent_criterion: Annotated[str, OneOf(level_criteria(LatentRanks))] = "outputs"
    expert_criterion: Annotated[str, OneOf(level_criteria(RoutedKind))] = "reap"
    vocabulary_criterion: Annotated[str, OneOf((AUTO, *level_criteria(VocabularyKind)))] = AUTO
    vocabulary_text: str | list[str] | None = None
    vocabulary_tokens: Count = 50_000_000
    merge_experts: bool = False
    split: dict[str, float] | list[str] | str | None = None
    keep: dict[str, int] | list[str] | None = None
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
        if self.split in (MEASURED, [MEASURED]):  # the command line gives a list
            self.split = MEASURED
        else:
            self.split = _by_unit("split", self.split, _Part, "{'layers': 0.5, 'mlp_neurons': 0.5}, or 'measured'")
        self.keep = _by_unit("keep", self.keep, Count, "{'layers': 24, 'mlp_neurons': 1024}")
        total = sum((self.parts or {"": 1}).values())
        if abs(total - 1) > 1e-6:
            raise ConfigurationError(f"`split` is {self.split!r}; its parts must add up to 1, not {total:g}.")
        if isinstance(self.criterion, list) and len(self.criterion) == 1 and "=" not in self.criterion[0]:
            self.criterion = self.criterion[0]
        if not isinstance(self.criterion, str):
            self.criterion = _by_unit("criterion", self.criterion, None, "{'layers': 'angular', 'mlp_neurons': 'obs'}")
        if self.units is None:  # what other options name
            by_option = [name for name in KINDS if _given(self, *KINDS[name].options)]
            by_criterion = self.criterion if isinstance(self.criterion, dict) else {}
            self.units = (*by_option, *self.parts, *(self.keep or {}), *by_criterion) or (AUTO,)
        self.units = tuple(dict.fromkeys(self.units))
        self.reconstruct = True if self.reconstruct_minutes is not None else self.reconstruct
        if not self.units:
            raise ConfigurationError(f"`units` is empty; name at least one of {', '.join(KINDS)}.")
        if AUTO in self.units and len(self.units) > 1:
            raise ConfigurationError(f"`units` is {self.units}: '{AUTO}' chooses the kinds, so that it stands alone.")
        if self.criterion == AUTO and AUTO not in self.units:
            self.criterion = "obs"
        _share_criteria(self)
        check_step(self.round_to, self.align_to)
        for contradiction in chain(
            _in_layers(self), _in_amounts(self), _in_search(self), _between_kinds(self), _in_refits(self)
        ):
            raise ConfigurationError(contradiction)

    def closed_form(self) -> PruningConfig:
        """The same without reconstruction."""
        return dataclasses.replace(self, reconstruct=False, reconstruct_minutes=None)

    def kinds(self, among: tuple[str, ...]) -> tuple[str, ...]:
        """The units of this configuration that are among these."""
        return tuple(unit for unit in self.units if unit in among)

    @property
    def parts(self) -> dict[str, float]:
        """The part of the budget that each kind is given by `split`; none where nothing, or a measurement, says it."""
        return self.split if isinstance(self.split, dict) else {}

    @property
    def measures_split(self) -> bool:
        """Whether it is measured how the budget is split."""
        return self.split == MEASURED

    def cutting(self, *units: str, **changes: Any) -> PruningConfig:
        """This configuration for some of its kinds; what it says of others is left out, `keep` and `split` too."""
        gone = [kind for name, kind in KINDS.items() if name not in units]
        left_out = {option: None for kind in gone for option in kind.options}
        if not set(units) & set(kinds_of(VocabularyKind)):
            left_out["vocabulary_text"] = None
        if not set(units) & set(kinds_of(RoutedKind)):
            left_out["merge_experts"] = False
        if set(units) <= set(kinds_of(SharedKind)):
            left_out |= {"reconstruct": False, "reconstruct_minutes": None}
        if not set(units) & set(kinds_of(WidthKind)):
            left_out["criterion"] = AUTO
        elif isinstance(self.criterion, dict):
            left_out["criterion"] = {kind: one for kind, one in self.criterion.items() if kind in units} or "obs"
        return dataclasses.replace(self, **{**left_out, "keep": None, "split": None, "units": units, **changes})

    @property
    def listed(self) -> bool:
        """Whether `layers` can name exactly what goes: with nothing but depth to cut."""
        return self.layers is not None and not set(self.units) - set(kinds_of(DepthKind))

    @property
    def takes_ratio(self) -> bool:
        """Whether something is left to decide by a ratio for the whole model."""
        return not self.by_kind and not all(map(self.is_stated, self.units))

    @property
    def stated_options(self) -> list[str]:
        """Names of the options given that say how much goes, in the place of a ratio for the whole model."""
        names = [*dict.fromkeys(option for kind in KINDS.values() for option in kind.options), "keep"]
        return _given(self, *names)

    def is_stated(self, kind: str) -> bool:
        """Whether the configuration says how many units of a kind stay or go (not which share of each layer)."""
        if kind in (self.keep or {}) or kind == AUTO:
            return kind != AUTO
        return not isinstance(KINDS[kind], WidthKind) and bool(_given(self, *KINDS[kind].options))

    def stated_size(self, kind: str) -> int | None:
        """How many units of a kind that all layers share are to be left, if that is asked for."""
        options = (getattr(self, option) for option in KINDS[kind].options)
        return (self.keep or {}).get(kind, next((value for value in options if value is not None), None))

    def criterion_of(self, kind: str) -> str:
        """The criterion that ranks the units of a kind."""
        named = getattr(self, KINDS[kind].criterion_option)
        named = named[kind] if isinstance(named, dict) else named
        return KINDS[kind].without_gradients if named == AUTO else named

    @property
    def needs_ratio(self) -> bool:
        """Whether nothing can be decided without a ratio for the whole model."""
        return self.takes_ratio and not self.listed

    def check_ratio(self, ratio: float | None) -> float | None:
        """A ratio as a number, refused where it is missing, or where the configuration says how much goes.

        Raises:
            ConfigurationError: It is missing, or not needed.
            RatioError: It is no number in [0, 1).
        """
        ratio = checked("ratio", ratio, Ratio | None, RatioError)
        if ratio is None and self.needs_ratio:
            raise ConfigurationError(
                "A ratio is missing: 0.3 removes 30 %. Instead of it `attention_ratio` and `mlp_ratio` say how much "
                "of heads and neurons goes, `num_layers` or `keep_first` how many layers, `hidden_size` how wide "
                "the rest is, `keep` what is to be left of each kind."
            )
        if ratio is not None and not self.takes_ratio:
            stated = ", ".join(f"`{name}`" for name in self.stated_options)
            more = " With `units='auto'` the other units take what is left." if VOCABULARY in (self.keep or ()) else ""
            raise ConfigurationError(
                f"The ratio {ratio!r} is given, and {stated} in the configuration says how much goes: give one or the "
                f"other.{more}"
            )
        return ratio

    def chooses_depth(self, ratio: float | None) -> bool:
        """Whether a criterion decides which layers and sublayers go, when this ratio is asked for."""
        named = self.listed and self.num_layers is None and ratio is None
        return bool(self.kinds(kinds_of(DepthKind))) and self.keep_first is None and not named

    def carries_out(self, asked: PruningConfig) -> bool:
        """Whether this is the configuration that is asked for, or what `units="auto"` in that came to."""
        if AUTO not in asked.units:
            return self == asked
        left = {"units": asked.units, "keep": asked.keep, "depth_criterion": asked.depth_criterion}
        left |= {"criterion": AUTO} if asked.criterion == AUTO else {}
        return dataclasses.replace(self, **left) == asked

    @property
    def by_kind(self) -> bool:
        """Whether `attention_ratio` / `mlp_ratio` stand in for one ratio of the whole model."""
        return bool(_given(self, *_RATIOS))

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


def _by_unit(name: str, values: Any, each: Any, example: str) -> dict[str, Any] | None:
    """A dictionary by kind of unit; `["layers=0.5", "mlp_neurons=0.5"]` is what the command line gives.

    Raises:
        ConfigurationError: It is of another form, names a kind twice, or a value is not like `each`.
    """
    if values is None:
        return None
    if isinstance(values, (list, tuple)) and all(isinstance(part, str) and part.count("=") == 1 for part in values):
        for kind, times in Counter(part.partition("=")[0] for part in values).items():
            if times > 1:
                raise ConfigurationError(f"`{name}` names '{kind}' {times} times: {', '.join(values)}.")
        values = dict(part.split("=") for part in values)
    if not isinstance(values, dict) or not values:
        raise ConfigurationError(f"`{name}` is {values!r}; it must be like {example}.")
    return values if each is None else checked(name, values, dict[Kind, each])


def _share_criteria(config: PruningConfig) -> None:
    """Gives every kind its criterion: `criterion` may name that of depth or of the hidden size, or one for each kind.

    Afterwards `criterion` is about widths alone: one name, or names by kind where they differ.

    Raises:
        ConfigurationError: It is a criterion of what is not cut, or could be meant for two kinds of units.
    """
    name, widths = config.criterion, config.kinds((AUTO, *kinds_of(WidthKind)))
    if name == AUTO:
        return
    widths = [kind for kind in widths if kind == AUTO or KINDS[kind].criterion_option == "criterion"]
    if isinstance(name, dict):
        for contradiction in _not_cut("criterion", name, config):
            raise ConfigurationError(contradiction)
        for kind, one in name.items():
            check_choice(f"criterion of {kind}", one, KINDS[kind].criteria)
        for level, option in _CRITERIA.items():
            chosen = {name[kind] for kind in kinds_of(level) if kind in name}
            if len(chosen) > 1:
                raise ConfigurationError(
                    f"`criterion` is {name!r}: {', '.join(kinds_of(level))} are compared with each other and need "
                    f"one criterion, not {' and '.join(sorted(chosen))}."
                )
            for one in chosen:
                setattr(config, option, one)
        by_kind = {kind: name.get(kind, "obs") for kind in widths}
        config.criterion = by_kind if len(set(by_kind.values())) > 1 else next(iter(by_kind.values()), "obs")
        return
    check_choice(
        "criterion",
        name,
        dict.fromkeys([AUTO, *(n for level in (WidthKind, *_CRITERIA) for n in level_criteria(level))]),
    )
    ranks_widths = name in level_criteria(WidthKind)
    levels = [level for level in _CRITERIA if name in level_criteria(level)]
    levels = [level for level in levels if config.kinds(kinds_of(level)) or not ranks_widths]
    alone = [_CRITERIA[level] for level in levels if set(config.units) <= set(kinds_of(level))]
    if alone:
        setattr(config, alone[0], name)
        config.criterion = "obs"
    elif levels and not (ranks_widths and widths):
        raise ConfigurationError(
            f"`criterion` is {name!r}, which does not rank all of {', '.join(config.units)}; it is a "
            f"value of `{'` and of `'.join(_CRITERIA[level] for level in levels)}`."
        )
    elif name != "obs" and not widths:
        raise ConfigurationError(
            f"`criterion` is {name!r}, which ranks heads and neurons, but `units` is {config.units}: set "
            "`depth_criterion` for layers and sublayers, `hidden_criterion` for hidden channels."
        )


def _given(config: PruningConfig, *options: str) -> list[str]:
    """Those of these options that have a value."""
    return [option for option in options if getattr(config, option) is not None]


def _not_cut(option: str, kinds: Iterable[str] | None, config: PruningConfig) -> Iterator[str]:
    return (
        f"`{option}` names '{kind}', but `units` is {config.units}."
        for kind in kinds or ()
        if kind not in config.units
    )  # fmt: skip


def _in_layers(config: PruningConfig) -> Iterator[str]:
    """What the options that choose layers say against each other, and widths against `align_to`."""
    multiple = multiple_of(config.align_to)
    sizes = {"hidden_size": config.stated_size(HIDDEN)}
    sizes |= {f"keep of {kind}": n for kind, n in (config.keep or {}).items() if KINDS[kind].aligns}
    for name, size in sizes.items():
        if size is not None and size % multiple:
            lower = size // multiple * multiple
            nearest = " or ".join(str(size) for size in (lower, lower + multiple) if size)
            yield (
                f"`{name}` is {size}, which is not a multiple of {multiple} (`align_to` is {config.align_to!r}); "
                f"the nearest that is: {nearest}."
            )
    if config.layer_range is not None and config.layer_range[0] >= config.layer_range[1]:
        yield f"`layer_range` is {config.layer_range!r}; it must be (start, end), 0 <= start < end, end excluded."
    if config.layout == "per_layer":
        return
    chosen = [n for n in ("layers", "layer_range", "protect_first", "protect_last") if getattr(config, n)]
    if chosen and config.kinds((AUTO, *kinds_of(WidthKind))):
        yield f"`{chosen[0]}` leaves some layers whole, so that widths differ between layers: set layout='per_layer'."
    if config.allocation != "uniform":
        others = ", or leave it out: units='auto' compares kinds" if config.allocation == EVOLUTION else ""
        yield f"allocation={config.allocation!r} gives every layer a width of its own: set layout='per_layer'{others}."
    for sublayer in config.kinds(kinds_of(DepthKind, sublayer=True)):
        yield f"`units` names '{sublayer}': layers that lack a sublayer are not alike. Set layout='per_layer'."


def _in_amounts(config: PruningConfig) -> Iterator[str]:
    """Options that say how much of a kind goes need that kind, and no other option that says it too."""
    if config.attention_ratio is not None and not any(
        KINDS[kind].of_heads for kind in config.kinds(kinds_of(WidthKind))
    ):
        yield f"`attention_ratio` is given, but `units` is {config.units}: no heads in it."
    for name, kind in KINDS.items():
        for option in _given(config, *kind.options):
            if name not in config.units and name != GROUPS:
                yield f"`{option}` is given, but `units` is {config.units}: no '{name}' in it."
    stating = [option for kind in config.keep or () for option in KINDS[kind].options]
    sizes = [*KINDS[LAYERS].options, *KINDS[HIDDEN].options]
    exclusive = [("layers", "layer_range"), *(kind.options for kind in KINDS.values())]
    exclusive += [("keep", option) for option in (*stating, *_RATIOS)]
    exclusive += [("split", option) for option in (*sizes, "keep", *_RATIOS)]
    for options in exclusive:
        if len(given := _given(config, *options)) > 1:
            yield f"`{given[0]}` and `{given[1]}` are both given; give one of them."
    kept = set(config.keep or ()) - set(kinds_of(VocabularyKind) if AUTO in config.units else ())
    yield from _not_cut("keep", sorted(kept), config)
    yield from _not_cut("split", config.parts, config)


def _in_search(config: PruningConfig) -> Iterator[str]:
    """What the search over the widths of the whole model asks of other options, and they of it."""
    if config.allocation != EVOLUTION:
        for option in _given(config, "levels", "search_evaluations"):
            yield f"`{option}` is given, but `allocation` is {config.allocation!r}: it belongs to {EVOLUTION!r}."
        return
    if shared := config.kinds(kinds_of(SharedKind)):
        yield f"allocation={EVOLUTION!r} gives out what is in layers: cut {shared[0]!r} first, or afterwards."
    if not config.kinds((AUTO, *kinds_of(WidthKind))):
        yield (
            f"allocation={EVOLUTION!r} gives out heads, neurons and experts, and layers beside them, but `units` "
            f"is {config.units}: leave it out, depth_criterion='exchange' searches over layers."
        )
    for kind in config.kinds(kinds_of(WidthKind)):
        if KINDS[kind].within is not None:
            yield f"allocation={EVOLUTION!r} does not split {KINDS[kind].label}: use 'kv_groups', or 'uniform'."
    given = [*_given(config, *_RATIOS, *KINDS[LAYERS].options, "keep", "split")]
    given += ["iterative_steps"] * (config.iterative_steps > 1) + ["merge_experts"] * bool(config.merge_experts)
    for option in given:
        yield f"`{option}` and allocation={EVOLUTION!r} are both given; give one of them."


def _in_refits(config: PruningConfig) -> Iterator[str]:
    """What reconstruction asks of other options."""
    if not config.reconstruct:
        return
    if not config.compensation:
        yield "`reconstruct` goes on from the re-fit, and `compensation` is False: give one or the other."
    if set(config.units) <= set(kinds_of(SharedKind)):
        yield (
            f"`reconstruct` is given, but `units` is {config.units}, by which all layers change at once and not one "
            "after the other: leave it out."
        )


def _in_measured_split(config: PruningConfig) -> Iterator[str]:
    """What it takes to measure how a budget is split."""
    if len(config.units) < 2:
        yield f"`split` is {MEASURED!r}, and `units` is {config.units}: name the kinds it is to be split between."
    if config.kinds(kinds_of(VocabularyKind)) and config.vocabulary_text is None:
        yield (
            f"`split` is {MEASURED!r} with the vocabulary: what tokens cost is measured on text held out of "
            "`vocabulary_text`. Give it, some million tokens of what the model is to write."
        )
    if config.calibration.image_column is not None:
        yield f"`split` is {MEASURED!r}, which measures losses of text: leave `image_column` out, or give the parts."


def _between_kinds(config: PruningConfig) -> Iterator[str]:
    """What kinds of units, cut together, ask of other options."""
    split, layers = config.parts, _given(config, *KINDS[LAYERS].options)
    if config.measures_split:
        yield from _in_measured_split(config)
    if layers and config.kinds(kinds_of(DepthKind, sublayer=True)):
        yield f"`{layers[0]}` is given, but sublayers are to go as well: use `split` for both, or `keep`."
    lacking = sorted(set(config.units) - set(split))
    if split and lacking:
        yield f"`split` does not say how much of the budget {', '.join(lacking)} gets."
    for kind in config.units if config.split is not None else ():
        if kind in KINDS and KINDS[kind].within in config.units:
            yield (
                f"`split` names '{KINDS[kind].within}' and '{kind}', which hold parts of the same matrices: give one "
                "of them."
            )
    for kind in config.kinds(kinds_of(WidthKind)):
        if (criterion := config.criterion_of(kind)) not in KINDS[kind].criteria:
            yield f"{criterion!r} does not rank {KINDS[kind].label}; these do: {', '.join(KINDS[kind].criteria)}."
    if config.merge_experts and not config.kinds(kinds_of(RoutedKind)):
        yield f"`merge_experts` is given, but `units` is {config.units}: no whole experts go."
    if config.vocabulary_text is not None and not config.kinds((AUTO, *kinds_of(VocabularyKind))):
        yield f"`vocabulary_text` is given, but `units` is {config.units}: no 'vocabulary' in it."
    inside = [kind for kind in config.kinds(tuple(KINDS)) if KINDS[kind].within_experts]
    if inside and config.kinds(kinds_of(RoutedKind)):
        yield f"`units` names '{inside[0]}' beside whole experts: cut the one first, and the other from the result."
    for kind in config.kinds(kinds_of(SharedKind)) if len(config.units) > 1 and config.split is None else ():
        if not config.is_stated(kind):
            option = next(iter(KINDS[kind].options), "keep")
            yield (
                f"`units` names '{kind}' beside others, whose costs are not compared: give `{option}`, a `split` "
                f"such as {{'{kind}': 0.5, 'mlp_neurons': 0.5}}, or split='measured'."
            )
    if set(config.units) <= set(kinds_of(WidthKind)):
        return
    if config.by_kind:
        yield "`attention_ratio` and `mlp_ratio` are for heads and neurons alone; use `split`."
    if config.iterative_steps > 1 and AUTO not in config.units:
        yield (
            "`iterative_steps` is for heads and neurons alone: prune layers or the hidden size first, then the "
            "result in steps. 'greedy' measures again after every layer as it is."
        )
