"""What a kind of unit is. Everything else in the library speaks of kinds through these classes.

Torch is imported where it is needed, so that options can be read without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..model.families import Family
    from ..model.groups import Group, LayerStructure


class Decided(Protocol):
    """What a kind asks of a plan."""

    def keep(self, layer: int, kind: str, default: int) -> int: ...

    def is_dropped(self, layer: int, kind: str) -> bool: ...

    def of_layer(self, layer: int) -> dict[str, Any]: ...


@dataclass
class Reading:
    """A model whose units are looked for.

    Attributes:
        model: The model; the meta device will do.
        family: Where its layers keep their projections.
        layers: What was found in every decoder layer so far, and the layer.
    """

    model: PreTrainedModel
    family: Family
    layers: list[tuple[LayerStructure, nn.Module]]

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config


class UnitKind:
    """A kind of unit: an MLP neuron, a KV group, a decoder layer ...

    Attributes:
        name: As in `PruningConfig.units`.
        label: In tables, plural.
        options: Fields of `PruningConfig` that say how much of it goes, and so ask for it.
        criterion_option: Field of `PruningConfig` that says how it is ranked.
        criteria: Names of the criteria that can rank it.
        without_gradients: What `"auto"` is where gradients of the loss cannot be had.
        sublayer: Which half of a decoder layer holds the units, `"attention"` or `"mlp"`; `None` for neither.
        within: Name of the kind of unit that each of these is a part of.
        aligns: Whether `align_to` wants multiples of their number, as of the inputs of a linear map.
        always_tried: Whether cutting them is tried on a small model first whatever the model type, see `proof`.
        within_experts: Whether they are parts of experts, of which each keeps its own; `keep` says how many in each.
        cached: Whether keys and values of fewer of them are fewer, so that a token takes less in the cache.
        activated: Whether every unit is multiplied once for each token, as neurons are; counted among the MACs.
    """

    name: str = ""
    label: str = ""
    options: tuple[str, ...] = ()
    criterion_option: str = "criterion"
    criteria: tuple[str, ...] = ()
    without_gradients: str = "obs"
    sublayer: str | None = None
    within: str | None = None
    activated: bool = False
    cached: bool = False
    aligns: bool = False
    within_experts: bool = False
    always_tried: bool = False

    def __repr__(self) -> str:
        return self.name

    def told(self, plan: Any) -> str:
        """What went of this kind in a card; empty for nothing, and for widths, which are many."""
        return ""


class WidthKind(UnitKind):
    """Units inside a module of each decoder layer: rows of what computes them, columns of what reads them.

    A new one is found, counted and written by one key of the configuration: give `name`, `label` and `key`.

    Attributes:
        key: Key of the configuration that holds the number of units of a layer.
        step: Kept units are multiples of it, whatever is asked for.
        part: What holds the units, in messages.
        of_heads: Whether the number decides the shape of attention heads, which not every configuration can express.
    """

    criteria = ("random", "l1", "l2", "taylor", "wanda", "wifv", "activation", "obs", "kfac")
    key: str = ""
    step: int = 1
    part: str = "layer"
    of_heads: bool = False

    def find(self, reading: Reading) -> list[str]:
        """Adds the groups of this kind to the layers of a model.

        Returns:
            What is left alone, and why.
        """
        from ..model.probe import grouped

        return grouped(self.name, self.key, reading.model, reading.layers)

    def key_of(self, family: Family) -> str:
        """Key of the configuration that holds the number of units of a layer."""
        return self.key

    def is_in(self, layer: LayerStructure) -> bool:
        """Whether a layer has such units."""
        return layer.group(self.name) is not None

    def is_written(self, layers: Sequence[LayerStructure], plan: Decided) -> bool:
        """Whether a plan changes what the configuration says of these units."""
        return True

    def multiple(self, whole: int, round_to: int | None, align_to: str | int | None) -> int:
        """Kept units of a layer with `whole` of them are multiples of this; options as in `PruningConfig`."""
        return 1

    def has_key(self, family: Family, config: PreTrainedConfig) -> bool:
        """Whether the configuration has that key; else only the per-layer layout can say how many units there are."""
        return True

    def config_keys(self, layer: LayerStructure, family: Family, config: PreTrainedConfig) -> tuple[str, ...]:
        """Keys of the configuration that this kind decides in a layer."""
        return (self.key_of(family),)

    def config_values(
        self, layer: LayerStructure, plan: Decided, family: Family, config: PreTrainedConfig
    ) -> dict[str, Any]:
        """Values of the configuration that describe a layer after a plan."""
        group = layer.group(self.name)
        if group is None or plan.is_dropped(layer.index, self.name):
            return {}
        return {self.key_of(family): plan.keep(layer.index, self.name, group.size)}

    def input_width(self, layer: LayerStructure, plan: Decided) -> tuple[Group, int, int] | None:
        """Group, input features of its reader before and after a plan; `None` where another kind gives them."""
        group = layer.group(self.name)
        if group is None or plan.is_dropped(layer.index, self.name):
            return None
        width = group.reader.index.shape[1]
        return group, group.size * width, plan.keep(layer.index, self.name, group.size) * width


class RoutedKind(WidthKind):
    """Units among which a router chooses for each token: what reads them is a sum, and no one linear map."""

    criterion_option = "expert_criterion"
    criteria = ("reap", "frequency", "router", "l2", "taylor", "random", "loss")

    def input_width(self, layer, plan):
        return None


class DepthKind(UnitKind):
    """A whole decoder layer, or half of it.

    Attributes:
        heading: What goes, in a card.
    """

    heading: str = ""
    criterion_option = "depth_criterion"
    criteria = ("angular", "block_influence", "perplexity", "taylor", "magnitude", "greedy", "exchange")

    def modules(self, family: Family, layer: nn.Module) -> tuple[str, ...]:
        """Names of the modules of a sublayer, the one that gives its output last; none where there is no such one."""
        return ()

    def outputs(self, family: Family) -> list[str]:
        """Names of what may be a sublayer's last linear map."""
        return []

    def told(self, plan):
        layers = ", ".join(map(str, plan.dropped.get(self.name, ())))
        return layers and f"{self.heading} gone, counted from 0: {layers}"


class SharedKind(UnitKind):
    """Units that all layers share: one decision says how many of them the model keeps.

    `model.shared_sizes` says where they are and what a model with fewer is, `refit.shared` how they are cut.

    Attributes:
        reads_text: Whether cutting them looks at calibration text.
    """

    reads_text: bool = True

    def is_of(self, config: PreTrainedConfig) -> bool:
        """Whether models of a configuration have such units at all."""
        return True

    def told(self, plan):
        decision = plan.of_model(self.name)
        return decision and f"{self.label.capitalize()}: {decision.keep:,} instead of {decision.before:,}"

    def sizes(self, size: int, round_to: int | None, align_to: str | int | None) -> list[int]:
        """Numbers of units that a model with `size` of them may keep to reach a ratio; options as in `PruningConfig`.

        Raises:
            ConfigurationError: The options allow none.
        """
        return list(range(1, size + 1))

    def remarks(self, decision: Any) -> list[str]:
        """What is to be said about a decision."""
        return []


class StreamKind(SharedKind):
    """Channels of the residual stream."""

    criterion_option = "hidden_criterion"


class VocabularyKind(SharedKind):
    """Tokens. Which of them stay is decided by the tokenizer, before anything is cut."""

    criterion_option = "vocabulary_criterion"
    without_gradients = "frequency"
    criteria = ("frequency", "frequency_taylor", "embedding_norm", "taylor")
    reads_text = False
