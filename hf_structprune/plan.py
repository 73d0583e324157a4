"""`PruningPlan`: how many units of every coupled group stay, which ones, and what that saves."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .errors import ConfigurationError
from .structure import ModelStructure


PLAN_NAME = "pruning_plan.json"
_KIND_NAMES = {"kv_groups": "KV groups", "query_heads": "query heads", "mlp_neurons": "MLP neurons"}


@dataclass
class GroupPlan:
    """The decision for one coupled group.

    Attributes:
        layer: Number of the decoder layer.
        kind: Kind of unit.
        num_units: Units before.
        keep: Units after. For query heads: all heads left in the layer, the loss of whole KV groups included.
        kept: Their numbers in ascending order, once they are chosen.
    """

    layer: int
    kind: str
    num_units: int
    keep: int
    kept: list[int] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep <= self.num_units:
            raise ConfigurationError(
                f"Layer {self.layer}: {self.keep} of {self.num_units} {self.kind} cannot be kept; at least one must."
            )
        if self.kept is None:
            return
        if len(self.kept) != self.keep or sorted(set(self.kept) & set(range(self.num_units))) != self.kept:
            raise ConfigurationError(
                f"Layer {self.layer}: `kept` of {self.kind} must name {self.keep} of {self.num_units}, ascending."
            )


@dataclass
class HiddenPlan:
    """The decision for the residual stream.

    Attributes:
        before: Hidden size before.
        keep: Hidden size after.
        kept: Numbers of the channels that stay, ascending, once they are chosen.
    """

    before: int
    keep: int
    kept: list[int] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.before:
            raise ConfigurationError(f"A hidden size of {self.keep} is asked for; it must be 1 to {self.before - 1}.")
        if self.kept is not None and sorted(set(self.kept) & set(range(self.before))) != self.kept:
            raise ConfigurationError(f"`kept` of the hidden size must name channels of {self.before}, ascending.")


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
        notes: What is left alone, and why.
        dropped: Numbers of the layers (`"layers"`) and of the layers whose `"attention"` or `"mlp"` goes, ascending.
        hidden: The residual stream; `None` if it stays as wide as it is.
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
    dropped: dict[str, list[int]] = field(default_factory=dict)
    hidden: HiddenPlan | None = None

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
        """
        groups, parameters, weights = [], 0, 0
        neurons_before = neurons_after = 0
        for layer in structure.layers:
            counts = {g.kind: keep.get((layer.index, g.kind), _whole(g)) for g in layer.groups}
            for group in layer.groups:
                left = counts[group.kind]
                if group.kind == "query_heads":
                    # Heads that go with whole KV groups are counted there.
                    kv_heads = counts["kv_groups"]
                    gone, left = kv_heads * (_whole(group) - left), kv_heads * left
                else:
                    gone = group.num_units - left
                parameters += gone * group.unit_parameters
                weights += gone * group.unit_matrix_parameters
                if group.kind == "mlp_neurons":
                    neurons_before, neurons_after = neurons_before + group.num_units, neurons_after + left
                if left < group.num_units:
                    groups.append(GroupPlan(layer.index, group.kind, group.num_units, left))
        return cls(
            ratio_requested, model_type, layout, groups,
            structure.total_parameters, structure.total_parameters - parameters,
            structure.matrix_parameters, structure.matrix_parameters - weights,
            neurons_before, neurons_after, bytes_per_parameter, list(structure.notes),
        )  # fmt: skip

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
        return round(self.parameters_after * self.bytes_per_parameter)

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
            fields = {f.name: values[f.name] for f in dataclasses.fields(cls)}
            return cls(**{**fields, "groups": [GroupPlan(**group) for group in fields["groups"]]})
        except (KeyError, TypeError) as error:
            raise ConfigurationError(f"The plan is incomplete or of another kind: {error}.") from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan as JSON to a file."""
        text = json.dumps(self.to_dict(), indent=1)
        # One line for each list of units, not one for each unit.
        text = re.sub(r"\[[\d,\s]+\]", lambda numbers: re.sub(r"\s+", "", numbers[0]), text)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> PruningPlan:
        """Reads a plan from a JSON file or from a checkpoint folder."""
        path = Path(path)
        path = path / PLAN_NAME if path.is_dir() else path
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{path} is not JSON: {error}") from error

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
        for kind in _KIND_NAMES:
            for layers, before, after in _runs(group for group in self.groups if group.kind == kind):
                table.add_row(layers, _KIND_NAMES[kind], f"{before:,}", f"{after:,}")
        table.add_section()
        for name, before, after in (
            ("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}"),
            ("weights, MB", f"{self.bytes_before / 1e6:,.1f}", f"{self.bytes_after / 1e6:,.1f}"),
            ("GMACs, 1 x 64 tokens", f"{self.macs_before / 1e9:,.2f}", f"{self.macs_after / 1e9:,.2f}"),
        ):
            table.add_row("all", name, before, after)
        for note in self.notes:
            table.add_row("", f"note: {note}", "", "")
        return table


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
