"""The kinds of units that can be cut, and the checks of the options that only some of them have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from ..checks import Described, Limits, OneOf, checked
from ..errors import ConfigurationError


if TYPE_CHECKING:
    from ..config import PruningConfig

WIDTH_UNITS = ("kv_groups", "query_heads", "mlp_neurons")
SUBLAYER_UNITS = ("attention", "mlp")
DEPTH_UNITS = ("layers", *SUBLAYER_UNITS)
UNITS = (*WIDTH_UNITS, *DEPTH_UNITS, "hidden")
_Part = Annotated[float, Limits(0, open="least"), Described("a positive number")]
_Split = dict[Annotated[str, OneOf(UNITS)], _Part]
DEPTH_CRITERIA = ("angular", "block_influence", "perplexity", "taylor", "magnitude", "greedy", "exchange")
HIDDEN_CRITERIA = ("magnitude", "taylor", "activation", "pca")
# Which kind an option speaks of; it is cut if nothing else is said.
_NAMED_BY = {
    "attention_ratio": "kv_groups", "mlp_ratio": "mlp_neurons", "num_layers": "layers", "keep_first": "layers",
    "hidden_size": "hidden",
}  # fmt: skip


def complete_units(config: PruningConfig) -> tuple[str, ...]:
    """`units` as a tuple; where none are given, those that other options name, else MLP neurons."""
    if config.units is not None:
        return tuple(dict.fromkeys(config.units))
    named = [kind for option, kind in _NAMED_BY.items() if getattr(config, option) is not None]
    return tuple(dict.fromkeys([*named, *(config.split or {})])) or ("mlp_neurons",)


def parse_split(split: Any) -> dict[str, float] | None:
    """`split` as a dictionary; `["layers=0.5", "mlp_neurons=0.5"]` is what the command line gives.

    Raises:
        ConfigurationError: It is of another form, names what is no unit, or its parts are not positive with sum 1.
    """
    if split is None:
        return None
    if isinstance(split, (list, tuple)) and all(isinstance(part, str) and part.count("=") == 1 for part in split):
        kinds = [part.partition("=")[0] for part in split]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ConfigurationError(f"`split` names '{kind}' {kinds.count(kind)} times: {', '.join(split)}.")
        split = dict(part.split("=") for part in split)
    if not isinstance(split, dict) or not split:
        raise ConfigurationError(f"`split` is {split!r}; it must be like {{'layers': 0.5, 'mlp_neurons': 0.5}}.")
    parts = {kind: float(part) for kind, part in checked("split", split, _Split).items()}
    if abs(sum(parts.values()) - 1) > 1e-6:
        raise ConfigurationError(f"`split` is {split!r}; its parts must add up to 1, not {sum(parts.values()):g}.")
    return parts


def split_criterion(config: PruningConfig, width_criteria: tuple[str, ...]) -> None:
    """Lets `criterion` name the criterion of depth or of the hidden size where nothing else is cut.

    Raises:
        ConfigurationError: It is a criterion of what is not cut, or could be meant for two kinds of units.
    """
    values = {
        "depth_criterion": (DEPTH_UNITS, DEPTH_CRITERIA),
        "hidden_criterion": (("hidden",), HIDDEN_CRITERIA),
    }
    fields = [field for field, (_, criteria) in values.items() if config.criterion in criteria]
    alone = [field for field in fields if not set(config.units) - set(values[field][0])]
    if alone:
        setattr(config, alone[0], config.criterion)
        config.criterion = "obs"
    elif fields and (config.criterion not in width_criteria or not config.kinds(WIDTH_UNITS)):
        raise ConfigurationError(
            f"`criterion` is {config.criterion!r}, which does not rank all of {', '.join(config.units)}; it is a "
            f"value of `{'` and of `'.join(fields)}`."
        )
    elif config.criterion != "obs" and not config.kinds(WIDTH_UNITS):
        raise ConfigurationError(
            f"`criterion` is {config.criterion!r}, which ranks heads and neurons, but `units` is {config.units}: set "
            "`depth_criterion` for layers and sublayers, `hidden_criterion` for hidden channels."
        )


def check_depth(config: PruningConfig) -> None:
    """Checks the options of depth and hidden size against the units.

    Raises:
        ConfigurationError: An option needs a kind of unit that is not cut, or two options contradict each other.
    """
    for name in ("num_layers", "keep_first", "hidden_size"):
        value = getattr(config, name)
        if value is None:
            continue
        if _NAMED_BY[name] not in config.units:
            raise ConfigurationError(
                f"`{name}` is given, but `units` is {config.units}: no '{_NAMED_BY[name]}' in it."
            )
    if config.num_layers is not None and config.keep_first is not None:
        raise ConfigurationError("`num_layers` and `keep_first` are both given; give one of them.")
    stated = next((name for name in ("num_layers", "keep_first", "hidden_size") if getattr(config, name)), None)
    if config.split is not None and stated:
        raise ConfigurationError(f"`split` and `{stated}` are both given; give one of them.")
    if (config.num_layers or config.keep_first) and set(config.units) & set(SUBLAYER_UNITS):
        raise ConfigurationError(f"`{stated}` is given, but sublayers are to go as well: use `split` for both.")
    if "hidden" in config.units and len(config.units) > 1 and config.split is None and config.hidden_size is None:
        raise ConfigurationError(
            "`units` names 'hidden' beside others, whose costs are not compared: give `hidden_size`, or a `split` "
            "such as {'hidden': 0.5, 'mlp_neurons': 0.5}."
        )
    for kind in config.split or ():
        if kind not in config.units:
            raise ConfigurationError(f"`split` names '{kind}', but `units` is {config.units}.")
    if config.split is not None and set(config.split) != set(config.units):
        lacking = sorted(set(config.units) - set(config.split))
        raise ConfigurationError(f"`split` does not say how much of the budget {', '.join(lacking)} gets.")
    if config.split is not None and {"kv_groups", "query_heads"} <= set(config.split):
        raise ConfigurationError(
            "`split` names 'kv_groups' and 'query_heads', which hold parts of the same matrices: give one of them."
        )
    if config.split is not None and config.by_kind:
        raise ConfigurationError("`split` and `attention_ratio` or `mlp_ratio` are both given; give one of them.")
    sublayers = [unit for unit in config.units if unit in SUBLAYER_UNITS]
    if sublayers and config.layout == "uniform":
        raise ConfigurationError(
            f"`units` names '{sublayers[0]}': layers that lack a sublayer are not alike. Set layout='per_layer'."
        )
    if set(config.units) & {*DEPTH_UNITS, "hidden"}:
        if config.by_kind:
            raise ConfigurationError("`attention_ratio` and `mlp_ratio` are for heads and neurons alone; use `split`.")
        if config.iterative_steps > 1:
            raise ConfigurationError(
                "`iterative_steps` is for heads and neurons alone: prune layers or the hidden size first, then the "
                "result in steps. 'greedy' measures again after every layer as it is."
            )
