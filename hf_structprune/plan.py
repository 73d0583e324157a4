"""`PruningPlan`: how many units of every kind stay, which ones, and what that saves."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import ConfigurationError
from .files.reading import read_json_object
from .files.writing import write_text
from .model.structure import ModelStructure
from .targets.reached import Reached
from .units import GROUPS, HIDDEN, KINDS, LAYERS, DepthKind, SharedKind, WidthKind, kinds_of
from .units.heads import shape_after
from .vocabulary.report import in_words


PLAN_NAME = "pruning_plan.json"
# Numbers of layers by kind of depth: whole layers, and layers that lose one sublayer.
Dropped = dict[str, list[int]]


@dataclass
class Decision:
    """What stays of one kind of unit, in one layer or in the whole model.

    Attributes:
        kind: Kind of unit.
        layer: Number of the decoder layer; `None` for units of the model: layers, sublayers (numbered as the layers
            that they are in), channels of the residual stream.
        before: Units before.
        keep: Units after. For query heads: all heads left in the layer, the loss of whole KV groups included.
        kept: Their numbers in ascending order, once they are chosen.
        seen: Calibration tokens that each of the `before` units got, where a router sends them different ones.
    """

    kind: str
    layer: int | None
    before: int
    keep: int
    kept: list[int] | None = None
    seen: list[int] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigurationError(f"A decision is about the kind {self.kind!r}; there are {', '.join(KINDS)}.")
        kind, where = KINDS[self.kind], "" if self.layer is None else f"Layer {self.layer}: "
        least = 0 if isinstance(kind, DepthKind) and kind.sublayer else 1  # all attentions may go, not all layers
        if not least <= self.keep <= self.before - isinstance(kind, SharedKind):
            raise ConfigurationError(
                f"{where}{self.keep} of {self.before} {self.kind} cannot be kept; at least one must, and not "
                "more than there are."
            )
        if self.kept is None:
            return
        if len(self.kept) != self.keep or sorted(set(self.kept) & set(range(self.before))) != self.kept:
            raise ConfigurationError(
                f"{where}`kept` of {self.kind} must name {self.keep} of {self.before}, ascending."
            )

    @property
    def gone(self) -> list[int]:
        """Numbers of the units that go, once they are chosen."""
        return sorted(set(range(self.before)) - set(self.kept))


def decisions_of(
    groups: Iterable[Decision] = (), dropped: Dropped | None = None, shared: Iterable[Decision] = (), layers: int = 0
) -> list[Decision]:
    """The decisions of a plan in one list: those about units in layers, about depth, about what all layers share."""
    depth = []
    for kind, numbers in (dropped or {}).items():
        left = sorted(set(range(layers)) - set(numbers))
        depth.append(Decision(kind, None, layers, len(left), left))
    return [*groups, *depth, *shared]


def normalised(dropped: Dropped | None, structure: ModelStructure) -> Dropped:
    """Dropped layers and sublayers in one form: ascending, without empty kinds, a layer that loses all is dropped.

    Raises:
        ConfigurationError: A kind or a number is wrong, or nothing would be left.
    """
    kinds, dropped = kinds_of(DepthKind), {kind: set(numbers) for kind, numbers in (dropped or {}).items()}
    for kind, numbers in dropped.items():
        if kind not in kinds or not numbers <= set(range(len(structure.layers))):
            raise ConfigurationError(
                f"`dropped` names {kind} {sorted(numbers)}; the kinds are {', '.join(kinds)} and the layers 0 "
                f"to {len(structure.layers) - 1}."
            )
    layers = dropped.get(LAYERS, set()) | emptied(dropped, structure)
    if len(layers) >= len(structure.layers):
        raise ConfigurationError(f"All {len(structure.layers)} layers are to go; at least one must stay.")
    sublayers = kinds_of(DepthKind, sublayer=True)
    result = {LAYERS: layers, **{kind: dropped.get(kind, set()) - layers for kind in sublayers}}
    for kind in sublayers:
        for number in sorted(result[kind]):
            if structure.layers[number].sublayer(kind) is None:
                raise ConfigurationError(f"Layer {number} has no {kind} that could go alone.")
    return {kind: sorted(numbers) for kind, numbers in result.items() if numbers}


def emptied(dropped: Mapping[str, Collection[int]], structure: ModelStructure) -> set[int]:
    """Layers that lose both sublayers, or the only one that an earlier pruning has left."""
    halves = kinds_of(DepthKind, sublayer=True)
    layers = set.intersection(*(set(dropped.get(kind, ())) for kind in halves))
    for kind in halves:
        for layer in map(structure.layers.__getitem__, dropped.get(kind, ())):
            sublayer = layer.sublayer(kind)
            if sublayer is not None and sublayer.matrix_parameters == layer.matrix_parameters:
                layers.add(layer.index)
    return layers


def is_dropped(dropped: Dropped, layer: int, kind: str) -> bool:
    """Whether the layer goes, or the sublayer with units of this kind."""
    half = KINDS[kind].sublayer if kind in KINDS else None
    return layer in dropped.get(LAYERS, ()) or layer in dropped.get(kind, ()) or layer in dropped.get(half, ())


def removed_by(dropped: Dropped, structure: ModelStructure) -> int:
    """Parameters of dropped layers and sublayers."""
    return sum(part.parameters for _, part in _parts(dropped, structure))


def _parts(dropped: Dropped, structure: ModelStructure) -> Iterable[tuple[str, Any]]:
    """Kind and structure of each layer and sublayer that goes."""
    for kind, numbers in dropped.items():
        for number in numbers:
            layer = structure.layers[number]
            yield kind, layer if kind == LAYERS else layer.sublayer(kind)


@dataclass
class PruningPlan:
    """What goes from a model. `print(plan)` shows it as a table.

    Attributes:
        ratio_requested: The share of parameters that was asked for; `None` if ratios by kind were asked for.
        model_type, layout: `config.model_type` of the model it was made for; `"uniform"` or `"per_layer"`.
        decisions: What stays of every kind of unit that is cut; of others all stays.
        parameters_before, parameters_after: All distinct parameters of the model.
        matrix_parameters_before, matrix_parameters_after: Weights that multiply each token.
        neurons_before, neurons_after: MLP neurons a token passes, all layers together.
        bytes_per_parameter, bytes_per_parameter_after: Mean size of a parameter in memory; after pruning once that is
            done, `None` for as before.
        notes: What is left alone, and why.
        reasons: How it was found what goes, where that was measured or worked out, and what was tried.
        num_layers: Decoder layers before.
        removed: Parameters that go, by kind of unit.
        warnings: Widths that later tools will refuse or run slowly, and what is not quite as if it were zeroed.
        given: Whether it was given to `prune`, so that the configuration there did not decide how much goes.
        calibrated: Whether text was looked at to make it and to carry it out; `None` where that is not recorded.
        vocabulary_report: Of tokens that go: how much of the text in which they were counted the others cover, how
            many more of them held-out text needs, and which scripts lose tokens; see `TokenChoice.report`.
        kv_values_before, kv_values_after: Numbers that one token adds to the cache of keys and values; `None` where it
            is not known what a layer keeps.
        predicted_nats: By how much the model's predictions would change, `KL(dense || pruned)` in nats a token, as
            measured on a part of the calibration text (see `StructuredPruner.plan`): about the rise of the loss.
            `None` where it was not measured.
        reconstructed: Of each layer that was trained after its re-fit (`reconstruct`): its number (`layer`), how many
            `steps` that took, and the squared error of its output on held-out text, relative to the output's square,
            `before` and `after`; equal where the re-fit stays.
        softened: What the norm in front of the head was multiplied by when all was cut (`factor`), and how far the
            model's predictions were from the dense model's `before` and `after`, in nats a token on calibration text;
            `None` where that was not looked at.
        target: What was asked for in other units than a ratio, see `targets.size.SizeTarget`, what is predicted, and
            what came out; `None` where nothing was.
    """

    ratio_requested: float | None
    model_type: str
    layout: str
    decisions: list[Decision]
    parameters_before: int
    parameters_after: int
    matrix_parameters_before: int
    matrix_parameters_after: int
    neurons_before: int
    neurons_after: int
    bytes_per_parameter: float
    notes: list[str] = field(default_factory=list)
    num_layers: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    bytes_per_parameter_after: float | None = None
    given: bool = field(default=False, compare=False)
    calibrated: bool | None = None
    vocabulary_report: dict[str, Any] | None = field(default=None, compare=False)
    kv_values_before: int | None = None
    kv_values_after: int | None = None
    predicted_nats: float | None = field(default=None, compare=False)
    target: Reached | None = field(default=None, compare=False)
    reasons: list[str] = field(default_factory=list, compare=False)
    reconstructed: list[dict[str, Any]] = field(default_factory=list, compare=False)
    softened: dict[str, float] | None = field(default=None, compare=False)

    @property
    def groups(self) -> list[Decision]:
        """The decisions about units in single layers."""
        return [decision for decision in self.decisions if decision.layer is not None]

    @property
    def dropped(self) -> Dropped:
        """Numbers of the layers and of the layers that lose a sublayer, by kind, ascending."""
        depth = kinds_of(DepthKind)
        return {decision.kind: decision.gone for decision in self.decisions if decision.kind in depth}

    @property
    def shared(self) -> list[Decision]:
        """The decisions about units that all layers share, in the order in which they are carried out."""
        return [decision for kind in kinds_of(SharedKind) for decision in [self.of_model(kind)] if decision]

    @property
    def hidden(self) -> Decision | None:
        """The decision about the residual stream; `None` if it stays as wide as it is."""
        return self.of_model(HIDDEN)

    def of_model(self, kind: str) -> Decision | None:
        """The decision about a kind of unit that all layers share; `None` if all of them stay."""
        return next((one for one in self.decisions if one.kind == kind and one.layer is None), None)

    @classmethod
    def from_counts(
        cls, structure: ModelStructure, keep: dict[tuple[int, str], int], *, model_type: str, layout: str,
        ratio_requested: float | None = None, bytes_per_parameter: float = 2.0, dropped: Dropped | None = None,
        hidden: Decision | None = None, dense: ModelStructure | None = None,
        shared: Sequence[tuple[Decision, ModelStructure]] = (),
    ) -> PruningPlan:  # fmt: skip
        """Makes a plan from the number of units to keep.

        Args:
            structure: Coupled groups of the model.
            keep: Units to keep for `(layer, kind)`; groups that are not named stay whole. For query heads this is
                the number in **each surviving KV group**.
            hidden: The decision for the residual stream, where it is the only one about what all layers share.
            dense: The structure before it.
            shared: Decisions about what all layers share, in the order in which they are carried out, each with the
                structure before it; `structure` is that of the model after all of them.

        Raises:
            ConfigurationError: What is dropped is not there, or nothing would be left.
        """
        shared = [(hidden, dense or structure), *shared] if hidden is not None else shared
        dropped, stages = normalised(dropped, structure), [*(before for _, before in shared), structure]
        dense, removed = stages[0], Counter()
        for (decision, before), after in zip(shared, stages[1:], strict=True):
            removed[decision.kind] = before.total_parameters - after.total_parameters
        decisions, weights, neurons_before, neurons_after = [], 0, 0, 0
        for group in structure.groups:
            kind, goes = KINDS[group.kind], is_dropped(dropped, group.layer, group.kind)
            whole = group.whole if kind.within else group.size
            left = keep.get(group.key, whole)
            if kind.activated:
                neurons_before += group.size
                neurons_after += 0 if goes else left
            if goes:
                continue
            holders = 1
            if kind.within:  # units that go with whole holders are counted there
                holders = keep.get((group.layer, kind.within), structure.layers[group.layer].group(kind.within).size)
            gone = holders * (whole - left)
            removed[group.kind] += gone * group.cost
            weights += round(gone * group.matrix_cost)
            if holders * left < group.size:
                decisions.append(Decision(group.kind, group.layer, group.size, holders * left))
        for kind, part in _parts(dropped, structure):
            removed[kind] += part.parameters
            weights += part.matrix_parameters
        decisions = decisions_of(decisions, dropped, [one for one, _ in shared], len(structure.layers))
        plan = cls(
            ratio_requested, model_type, layout, decisions, dense.total_parameters,
            dense.total_parameters - removed.total(), dense.matrix_parameters, structure.matrix_parameters - weights,
            neurons_before, neurons_after, bytes_per_parameter, list(structure.notes), len(structure.layers),
            {kind: count for kind, count in removed.items() if count}, kv_values_before=kv_values(dense),
        )  # fmt: skip
        plan.kv_values_after = kv_values(structure, plan)
        return plan

    def count(self, structure: ModelStructure, size: int) -> None:
        """Takes the figures after pruning from the model that came out, of `size` bytes: no forecast any more."""
        self.bytes_per_parameter_after = size / structure.own_parameters
        self.parameters_after, self.matrix_parameters_after = structure.total_parameters, structure.matrix_parameters
        self.neurons_after = sum(group.size for group in structure.groups if KINDS[group.kind].activated)
        self.kv_values_after = kv_values(structure)

    @property
    def ratio(self) -> float:
        """The share of all parameters that goes."""
        return 1.0 - self.parameters_after / self.parameters_before

    @property
    def predicted_factor(self) -> float | None:
        """What that would multiply the perplexity by."""
        return None if self.predicted_nats is None else math.exp(min(self.predicted_nats, 100))

    @property
    def bytes_before(self) -> int:
        """Bytes of the weights in the model's dtype."""
        return round(self.parameters_before * self.bytes_per_parameter)

    @property
    def bytes_after(self) -> int:
        return round(self.parameters_after * (self.bytes_per_parameter_after or self.bytes_per_parameter))

    @property
    def kv_bytes_before(self) -> int | None:
        """Bytes that one token adds to the cache of keys and values, in the dtype of the weights."""
        return None if self.kv_values_before is None else round(self.kv_values_before * self.bytes_per_parameter)

    @property
    def kv_bytes_after(self) -> int | None:
        each = self.bytes_per_parameter_after or self.bytes_per_parameter
        return None if self.kv_values_after is None else round(self.kv_values_after * each)

    @property
    def macs_before(self) -> int:
        """`macs()` of the dense model at 1 x 64 tokens."""
        return 64 * (self.matrix_parameters_before + self.neurons_before)

    @property
    def macs_after(self) -> int:
        return self.macs()

    def macs(self, batch_size: int = 1, length: int = 64) -> int:
        """Multiply-accumulates of one forward pass after pruning.

        Counted as in the published tables of LLM-Pruner: the weights of every linear map (LM head included) and one
        per activated MLP neuron, for each token. Products between activations (attention scores) are not counted.
        """
        return batch_size * length * (self.matrix_parameters_after + self.neurons_after)

    @property
    def chosen(self) -> bool:
        """Whether the plan says which units stay, not only how many."""
        return all(group.kept is not None for group in self.groups)

    def is_dropped(self, layer: int, kind: str) -> bool:
        """Whether a layer goes, or the sublayer with units of this kind."""
        return is_dropped(self.dropped, layer, kind)

    def keep(self, layer: int, kind: str, default: int) -> int:
        """Units of a kind that stay in a layer."""
        return next((g.keep for g in self.groups if (g.layer, g.kind) == (layer, kind)), default)

    def of_layer(self, layer: int) -> dict[str, Decision]:
        """Decisions of one layer by kind."""
        return {group.kind: group for group in self.groups if group.layer == layer}

    def to_dict(self) -> dict[str, Any]:
        """Everything, with derived figures for programs that read it."""
        names = (
            "ratio",
            "bytes_before",
            "bytes_after",
            "macs_before",
            "macs_after",
            "kv_bytes_before",
            "kv_bytes_after",
        )
        derived = {name: getattr(self, name) for name in names}
        return {"version": 2, **dataclasses.asdict(self), "dropped": self.dropped, **derived}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruningPlan:
        version = values.get("version")
        if version not in (1, 2):
            raise ConfigurationError(f"The plan has version {version!r}; this package reads versions 1 and 2.")
        try:
            decisions = _from_version_1(values) if version == 1 else [Decision(**one) for one in values["decisions"]]
            # What has a default is newer than the first plans that were written.
            fields = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
            fields["target"] = Reached(**fields["target"]) if fields.get("target") else None
            if (softened := fields.get("softened")) is not None:
                fields["softened"] = {name: softened[name] + 0.0 for name in ("factor", "before", "after")}
            return cls(**{**fields, "decisions": decisions})
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"The plan is incomplete or of another kind: {error}.") from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan as JSON to a file."""
        text = json.dumps(self.to_dict(), indent=1)
        # One line for each list of units, not one for each unit.
        text = re.sub(r"\[[\d,\s]+\]", lambda numbers: re.sub(r"\s+", "", numbers[0]), text)
        write_text(path, text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> PruningPlan:
        """Reads a plan from a JSON file or from a checkpoint folder."""
        path = Path(path)
        path = path / PLAN_NAME if path.is_dir() else path
        return cls.from_dict(read_json_object(path, ConfigurationError))

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=100, color_system=None)
        console.print(self.table())
        return console.file.getvalue().rstrip()

    def table(self) -> Table:
        """The plan as a `rich` table: one row for each run of layers that are treated alike."""
        asked = "" if self.ratio_requested is None else f"asked {self.ratio_requested:.2%}, "
        title = f"Pruning plan: {asked}got {self.ratio:.2%} of all parameters ({self.layout} layout)"
        table = Table(title=Text(title, overflow="ignore"))
        for column in ("layers", "unit", "before", "after"):
            table.add_column(column, justify="left" if column in ("layers", "unit") else "right", overflow="fold")
        for kind in kinds_of(WidthKind):
            for layers, before, after in _runs(group for group in self.groups if group.kind == kind):
                table.add_row(layers, KINDS[kind].label, f"{before:,}", f"{after:,}")
        for one in (decision for decision in self.decisions if decision.layer is None):
            depth, label = one.kind in kinds_of(DepthKind), KINDS[one.kind].label
            layers, name = (" ".join(map(str, one.gone)), f"{label}, gone") if depth else ("all", label)
            table.add_row(layers, name, f"{one.before:,}", f"{one.keep:,}")
        if len(self.removed) > 1:
            table.add_section()
            for kind, count in sorted(self.removed.items(), key=lambda item: -item[1]):
                table.add_row("", f"{KINDS[kind].label}: {count / self.parameters_before:.2%} of the model", "", "")
        table.add_section()
        for name, before, after in (
            ("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}"),
            ("weights, MB", f"{self.bytes_before / 1e6:,.1f}", f"{self.bytes_after / 1e6:,.1f}"),
            ("GMACs, 1 x 64 tokens", f"{self.macs_before / 1e9:,.2f}", f"{self.macs_after / 1e9:,.2f}"),
        ):
            table.add_row("all", name, before, after)
        if self.kv_bytes_before and self.kv_bytes_after is not None:
            table.add_row("all", "KV cache, bytes a token", f"{self.kv_bytes_before:,}", f"{self.kv_bytes_after:,}")
        if self.target is not None:
            table.add_row("", f"{self.target}", "", "")
        if self.predicted_nats is not None:
            said = f"predicted loss: +{self.predicted_nats:.3f} nats a token, perplexity x {self.predicted_factor:.2f}"
            table.add_row("", said, "", "")
        for name, lines in (
            ("vocabulary", in_words(self.vocabulary_report)), ("how", self.reasons), ("note", self.notes),
            ("warning", self.warnings),
        ):  # fmt: skip
            for line in lines:
                table.add_row("", f"{name}: {line}", "", "")
        return table


def kv_values(structure: ModelStructure, plan: PruningPlan | None = None) -> int | None:
    """Numbers that one token adds to the cache of keys and values, after a plan if one is given.

    `None` where a layer has attention that is not understood.
    """
    names = structure.family.attention
    if not any(layer.latent for layer in structure.layers) and (names is None or len(names.inputs) not in (1, 3)):
        return None
    total = 0
    for layer in structure.layers:
        shape = layer.attention
        if layer.latent:
            total += 0 if plan and plan.is_dropped(layer.index, GROUPS) else layer.latent
            continue
        if shape is None and any(
            KINDS[sublayer.kind].sublayer == KINDS[GROUPS].sublayer for sublayer in layer.sublayers
        ):
            return None
        if shape is not None and not (plan and plan.is_dropped(layer.index, GROUPS)):
            total += 2 * (shape_after(layer, plan) if plan else shape).kv_width
    return total


def _from_version_1(values: dict[str, Any]) -> list[Decision]:
    """The decisions of version 1, which kept units of layers, dropped layers and the hidden size apart."""
    groups = [Decision(g["kind"], g["layer"], g["num_units"], g["keep"], g.get("kept")) for g in values["groups"]]
    hidden = values.get("hidden")
    shared = [Decision(HIDDEN, None, hidden["before"], hidden["keep"], hidden.get("kept"))] if hidden else []
    return decisions_of(groups, values.get("dropped"), shared, values.get("num_layers", 0))


def _runs(groups: Iterable[Decision]) -> list[tuple[str, int, int]]:
    """Joins neighbouring layers with equal counts: `[("4-17", 5632, 3942)]`."""
    runs: list[list[int]] = []
    for group in sorted(groups, key=lambda g: g.layer):
        if runs and runs[-1][1:] == [group.layer - 1, group.before, group.keep]:
            runs[-1][1] = group.layer
        else:
            runs.append([group.layer, group.layer, group.before, group.keep])
    return [(f"{a}-{b}" if b > a else str(a), before, after) for a, b, before, after in runs]
