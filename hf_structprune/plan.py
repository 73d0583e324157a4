"""`PruningPlan`: how many units of every coupled group stay, which ones, and what that saves."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .decisions import Dropped, GroupPlan, HiddenPlan, is_dropped, normalised
from .errors import ConfigurationError
from .files.reading import read_json_object
from .files.writing import write_text
from .model.structure import CoupledGroup, LayerStructure, ModelStructure
from .units.kinds import WIDTH_UNITS


PLAN_NAME = "pruning_plan.json"
_KIND_NAMES = {
    "kv_groups": "KV groups", "query_heads": "query heads", "mlp_neurons": "MLP neurons", "layers": "decoder layers",
    "attention": "attention sublayers", "mlp": "MLP sublayers", "hidden": "hidden size",
}  # fmt: skip


@dataclass
class PruningPlan:
    """What goes from a model. `print(plan)` shows it as a table.

    Attributes:
        ratio_requested: The share of parameters that was asked for; `None` if ratios by kind were asked for.
        model_type: `config.model_type` of the model it was made for.
        layout: `"uniform"` or `"per_layer"`.
        groups: The decisions.
        parameters_before, parameters_after: All distinct parameters of the model.
        matrix_parameters_before, matrix_parameters_after: Weights that multiply each token.
        neurons_before, neurons_after: MLP neurons a token passes, all layers together.
        bytes_per_parameter: Mean size of a parameter in memory.
        bytes_per_parameter_after: The same after pruning, once that is done; `None` for as before.
        notes: What is left alone, and why.
        dropped: Numbers of the layers (`"layers"`) and of the layers whose `"attention"` or `"mlp"` goes, ascending.
        hidden: The residual stream; `None` if it stays as wide as it is.
        num_layers: Decoder layers before.
        removed: Parameters that go, by kind of unit.
        warnings: Widths that later tools will refuse or run slowly, and what is not quite as if it were zeroed.
        given: Whether it was given to `prune`, so that the configuration there did not decide how much goes.
        calibrated: Whether text was looked at to make it and to carry it out; `None` where that is not recorded.
    """

    ratio_requested: float | None
    model_type: str
    layout: str
    groups: list[GroupPlan]
    parameters_before: int
    parameters_after: int
    matrix_parameters_before: int
    matrix_parameters_after: int
    neurons_before: int
    neurons_after: int
    bytes_per_parameter: float
    notes: list[str] = field(default_factory=list)
    dropped: Dropped = field(default_factory=dict)
    hidden: HiddenPlan | None = None
    num_layers: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    bytes_per_parameter_after: float | None = None
    given: bool = field(default=False, compare=False)
    calibrated: bool | None = None

    @classmethod
    def from_counts(
        cls,
        structure: ModelStructure,
        keep: dict[tuple[int, str], int],
        *,
        model_type: str,
        layout: str,
        ratio_requested: float | None = None,
        bytes_per_parameter: float = 2.0,
        dropped: Dropped | None = None,
        hidden: HiddenPlan | None = None,
        dense: ModelStructure | None = None,
    ) -> PruningPlan:
        """Makes a plan from the number of units to keep.

        Args:
            structure: Coupled groups of the model.
            keep: Units to keep for `(layer, kind)`; groups that are not named stay whole. For query heads this is
                the number in **each surviving KV group**.
            model_type: `config.model_type`.
            layout: `"uniform"` or `"per_layer"`.
            ratio_requested: The ratio that led to these counts.
            bytes_per_parameter: Mean size of a parameter in memory.
            dropped: Layers and sublayers that go, by kind.
            hidden: The decision for the residual stream; `structure` is then that of the model after it.
            dense: Structure before the residual stream was cut; default `structure`.

        Raises:
            ConfigurationError: What is dropped is not there, or nothing would be left.
        """
        dropped, dense = normalised(dropped, structure), dense or structure
        sizes = [_LayerSizes.of(layer, keep, dropped) for layer in structure.layers]
        removed = Counter({"hidden": dense.total_parameters - structure.total_parameters})
        for size in sizes:
            removed.update(size.removed)
        return cls(
            ratio_requested, model_type, layout, [group for size in sizes for group in size.groups],
            dense.total_parameters, dense.total_parameters - removed.total(),
            dense.matrix_parameters, structure.matrix_parameters - sum(size.weights for size in sizes),
            sum(size.neurons_before for size in sizes), sum(size.neurons_after for size in sizes),
            bytes_per_parameter, list(structure.notes), dropped, hidden, len(structure.layers),
            {kind: count for kind, count in removed.items() if count},
        )  # fmt: skip

    def count(self, structure: ModelStructure, size: int) -> None:
        """Takes the figures after pruning from the model that came out, so that they are not a forecast.

        Args:
            structure: Of the pruned model.
            size: Its bytes.
        """
        self.bytes_per_parameter_after = size / structure.total_parameters
        self.parameters_after, self.matrix_parameters_after = structure.total_parameters, structure.matrix_parameters
        self.neurons_after = sum(group.num_units for group in structure.groups if group.kind == "mlp_neurons")

    @property
    def ratio(self) -> float:
        """The share of all parameters that goes."""
        return 1.0 - self.parameters_after / self.parameters_before

    @property
    def bytes_before(self) -> int:
        """Bytes of the weights in the model's dtype."""
        return round(self.parameters_before * self.bytes_per_parameter)

    @property
    def bytes_after(self) -> int:
        return round(self.parameters_after * (self.bytes_per_parameter_after or self.bytes_per_parameter))

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

    def of_layer(self, layer: int) -> dict[str, GroupPlan]:
        """Decisions of one layer by kind."""
        return {group.kind: group for group in self.groups if group.layer == layer}

    def to_dict(self) -> dict[str, Any]:
        """Everything, with derived figures for programs that read it."""
        derived = {n: getattr(self, n) for n in ("ratio", "bytes_before", "bytes_after", "macs_before", "macs_after")}
        return {"version": 1, **dataclasses.asdict(self), **derived}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruningPlan:
        if values.get("version") != 1:
            raise ConfigurationError(f"The plan has version {values.get('version')!r}; this package reads version 1.")
        try:
            # What has a default is newer than the first plans that were written.
            fields = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values or _required(f)}
            fields["groups"] = [GroupPlan(**group) for group in fields["groups"]]
            fields["hidden"] = HiddenPlan(**fields["hidden"]) if fields.get("hidden") else None
            return cls(**fields)
        except (KeyError, TypeError) as error:
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
        table = Table(title=f"Pruning plan: {asked}got {self.ratio:.2%} of all parameters ({self.layout} layout)")
        for column in ("layers", "unit", "before", "after"):
            table.add_column(column, justify="left" if column in ("layers", "unit") else "right")
        for kind in WIDTH_UNITS:
            for layers, before, after in _runs(group for group in self.groups if group.kind == kind):
                table.add_row(layers, _KIND_NAMES[kind], f"{before:,}", f"{after:,}")
        for kind, numbers in self.dropped.items():
            left = self.num_layers - len(numbers)
            name = f"{_KIND_NAMES[kind]}, gone"
            table.add_row(" ".join(map(str, numbers)), name, f"{self.num_layers}", f"{left}")
        if self.hidden is not None:
            table.add_row("all", _KIND_NAMES["hidden"], f"{self.hidden.before:,}", f"{self.hidden.keep:,}")
        if len(self.removed) > 1:
            table.add_section()
            for kind, count in sorted(self.removed.items(), key=lambda item: -item[1]):
                table.add_row("", f"{_KIND_NAMES[kind]}: {count / self.parameters_before:.2%} of the model", "", "")
        table.add_section()
        for name, before, after in (
            ("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}"),
            ("weights, MB", f"{self.bytes_before / 1e6:,.1f}", f"{self.bytes_after / 1e6:,.1f}"),
            ("GMACs, 1 x 64 tokens", f"{self.macs_before / 1e9:,.2f}", f"{self.macs_after / 1e9:,.2f}"),
        ):
            table.add_row("all", name, before, after)
        for note in self.notes:
            table.add_row("", f"note: {note}", "", "")
        for warning in self.warnings:
            table.add_row("", f"warning: {warning}", "", "")
        return table


@dataclass
class _LayerSizes:
    """What a plan takes from one layer."""

    groups: list[GroupPlan]
    removed: Counter[str] = field(default_factory=Counter)
    weights: int = 0
    neurons_before: int = 0
    neurons_after: int = 0

    @classmethod
    def of(cls, layer: LayerStructure, keep: dict[tuple[int, str], int], dropped: Dropped) -> _LayerSizes:
        sizes = cls([])
        counts = {g.kind: keep.get((layer.index, g.kind), _whole(g)) for g in layer.groups}
        for group in layer.groups:
            gone = is_dropped(dropped, layer.index, group.kind)
            if group.kind == "mlp_neurons":
                sizes.neurons_before += group.num_units
                sizes.neurons_after += 0 if gone else counts[group.kind]
            if not gone:
                sizes._cut(group, counts)
        for kind in ("attention", "mlp"):
            if layer.index in dropped.get(kind, ()):
                sizes.removed[kind] += layer.sublayer(kind).parameters
                sizes.weights += layer.sublayer(kind).matrix_parameters
        if layer.index in dropped.get("layers", ()):
            sizes.removed["layers"], sizes.weights = layer.parameters, layer.matrix_parameters
        return sizes

    def _cut(self, group: CoupledGroup, counts: dict[str, int]) -> None:
        left = counts[group.kind]
        if group.kind == "query_heads":
            # Heads that go with whole KV groups are counted there.
            kv_heads = counts["kv_groups"]
            gone, left = kv_heads * (_whole(group) - left), kv_heads * left
        else:
            gone = group.num_units - left
        self.removed[group.kind] += gone * group.unit_parameters
        self.weights += gone * group.unit_matrix_parameters
        if left < group.num_units:
            self.groups.append(GroupPlan(group.layer, group.kind, group.num_units, left))


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _whole(group) -> int:
    return group.num_units // group.blocks


def _runs(groups: Iterable[GroupPlan]) -> list[tuple[str, int, int]]:
    """Joins neighbouring layers with equal counts: `[("4-17", 5632, 3942)]`."""
    runs: list[list[int]] = []
    for group in sorted(groups, key=lambda g: g.layer):
        if runs and runs[-1][1:] == [group.layer - 1, group.num_units, group.keep]:
            runs[-1][1] = group.layer
        else:
            runs.append([group.layer, group.layer, group.num_units, group.keep])
    return [(f"{a}-{b}" if b > a else str(a), before, after) for a, b, before, after in runs]
