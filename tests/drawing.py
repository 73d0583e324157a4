"""Random models and configurations for the property test: mostly plain, sometimes impossible, always repeatable."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import families
import torch

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.config import AGGREGATIONS, ALLOCATIONS, EVOLUTION, TAYLOR_VARIANTS
from hf_structprune.units import KINDS, DepthKind, StreamKind, WidthKind, kinds_of, level_criteria


CRITERIA = level_criteria(WidthKind)
DEPTH_CRITERIA = level_criteria(DepthKind)
HIDDEN_CRITERIA = level_criteria(StreamKind)
UNITS = tuple(KINDS)
WIDTH_UNITS = kinds_of(WidthKind)


FAMILIES = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "opt", "falcon", "mixtral")
# Values that no configuration takes, or that only some models do.
IMPOSSIBLE = {
    "criterion": "l3", "layers": [99], "damping": -1.0, "error_correction": 2, "round_to": 0, "align_to": "gguf-31",
    "iterative_steps": 0, "units": ("neurons",), "keep_first": 99, "hidden_size": 4096, "seed": -1,
}  # fmt: skip


@dataclass
class Draw:
    """One case.

    Attributes:
        family: A name of `families`.
        changes: Configuration values of the tiny model.
        dtype: Of its weights.
        options: Of `PruningConfig`, without the calibration text.
        ratio: What `prune` is asked for.
        training: Whether the model is in training mode.
        damaged: Whether one weight is not a number.
        again: Whether the model comes out of a pruning that has left layers of different widths.
    """

    family: str
    changes: dict[str, Any]
    dtype: torch.dtype
    options: dict[str, Any]
    ratio: float | None
    training: bool = False
    damaged: bool = False
    again: bool = False
    seed: int = 0

    def model(self) -> torch.nn.Module:
        model = families.make_model(self.family, self.dtype, self.seed, **self.changes)
        if self.again:
            config = PruningConfig(layout="per_layer", layers=[0], criterion="l2", compensation=False)
            model = StructuredPruner(model, config).prune(0.03)
        if self.damaged:
            with torch.no_grad():
                list(model.parameters())[-1].view(-1)[0] = float("nan")
        return model.train(self.training)


def draw(seed: int) -> Draw:
    """The case with this number; the same on every machine."""
    rng = random.Random(seed)
    family = rng.choice(FAMILIES)
    options = _options(rng)
    if rng.random() < 0.08:
        name = rng.choice(list(IMPOSSIBLE))
        options[name] = IMPOSSIBLE[name]
    ratio = _ratio(rng, options)
    changes = {"tie_word_embeddings": rng.random() < 0.5}
    dtype = torch.bfloat16 if rng.random() < 0.2 and family != "mixtral" else torch.float32
    flags = rng.random() < 0.2, rng.random() < 0.04, rng.random() < 0.1 and family != "mixtral"
    return Draw(family, changes, dtype, options, ratio, *flags, seed)


def _ratio(rng: random.Random, options: dict[str, Any]) -> float | None:
    stated = {"attention_ratio", "mlp_ratio", "num_layers", "keep_first", "hidden_size"} & set(options)
    if rng.random() < 0.05:
        return rng.choice([0.0, 0.97, 1.2])
    if stated and rng.random() < 0.8:
        return None
    # Most of a tiny model is neither heads nor neurons.
    heads_alone = set(options.get("units", UNITS)) <= {"kv_groups", "query_heads"}
    return round(rng.uniform(0.02, 0.1 if heads_alone else 0.3), 3)


def _options(rng: random.Random) -> dict[str, Any]:
    """Options of `PruningConfig` that mostly go together."""
    options: dict[str, Any] = {"layout": rng.choice(["uniform", "per_layer"]), "round_to": rng.choice([1, 1, 2, None])}
    way = rng.choice(["widths"] * 6 + ["by_kind", "layers", "number", "first", "sublayers", "hidden", "mixed"])
    if way == "widths":
        options["units"] = tuple(rng.sample(WIDTH_UNITS, rng.randint(1, 3)))
    elif way == "by_kind":
        options.update({name: rng.choice([0.1, 0.25, 0.5]) for name in ("attention_ratio", "mlp_ratio")})
    elif way == "layers":
        options["units"] = ("layers",)
    elif way == "number":
        options["num_layers"] = rng.randint(1, 2)
    elif way == "first":
        options["keep_first"] = rng.randint(1, 2)
    elif way == "sublayers":
        options["units"] = tuple(rng.sample(["attention", "mlp", "layers"], rng.randint(1, 3)))
    elif way == "hidden":
        options.update({"hidden_size": rng.choice([16, 24])} if rng.random() < 0.5 else {"units": ("hidden",)})
    else:
        kinds = rng.sample(UNITS, 2)
        options["units"] = tuple(kinds)
        options["split"] = dict(zip(kinds, (0.5, 0.5), strict=True)) if rng.random() < 0.7 else None
    widths = way in ("widths", "by_kind")
    if way == "sublayers" and rng.random() < 0.9:
        options["layout"] = "per_layer"
    if widths or rng.random() < 0.05:
        options["criterion"] = rng.choice(CRITERIA)
        options["aggregation"] = rng.choice(AGGREGATIONS)
        options["taylor"] = rng.choice(TAYLOR_VARIANTS)
    if options["layout"] == "per_layer" or rng.random() < 0.05:
        if "query_heads" not in options.get("units", ()) or rng.random() < 0.1:
            options["allocation"] = rng.choice(ALLOCATIONS)
            if options["allocation"] == EVOLUTION:  # it takes minutes by itself
                options["search_evaluations"] = 11
        options.update(rng.choice([{}, {}, {"layers": [0, 2]}, {"layer_range": (1, 3)}, {"protect_first": 1}]))
    if widths:
        options["iterative_steps"] = rng.choice([1, 1, 1, 2, 3])
    if not widths:
        options["depth_criterion"] = rng.choice(DEPTH_CRITERIA)
        options["hidden_criterion"] = rng.choice(HIDDEN_CRITERIA)
    options["compensation"] = rng.random() < 0.5
    if options["compensation"]:
        options["error_correction"] = rng.choice([0.0, 0.5, 1.0])
        options["token_weighting"] = rng.random() < 0.5
        options["damping"] = rng.choice([None, 0.01])
    if rng.random() < 0.1:
        options["align_to"] = rng.choice([4, 8, "gguf-32"])
    options["seed"] = rng.randint(0, 3)
    return options
