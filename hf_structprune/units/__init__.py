"""The kinds of units that can be cut: one file, and one line here, for each.

A kind is found (`find`), counted, written into a configuration (`config_values`), shown in tables and offered as an
option by what its class says; CONTRIBUTING.md tells how to add one.
"""

from __future__ import annotations

from .base import DepthKind, Reading, RoutedKind, SharedKind, StreamKind, UnitKind, VocabularyKind, WidthKind
from .depth import LAYERS, Attention, Layers, Mlp
from .experts import ExpertNeurons, RoutedExperts, SharedNeurons
from .head_size import HEAD_SIZE, HeadSize
from .heads import GROUPS, QUERIES, KVGroups, QueryHeads
from .hidden import HIDDEN, Hidden
from .latent_ranks import KV_RANKS, Q_RANKS, KVRanks, LatentRanks, QueryRanks
from .mamba import MambaHeads
from .neurons import NEURONS, Neurons
from .vocabulary import VOCABULARY, Tokens


__all__ = [
    "GROUPS", "HEAD_SIZE", "HIDDEN", "KINDS", "KV_RANKS", "LAYERS", "NEURONS", "QUERIES", "Q_RANKS", "VOCABULARY",
    "DepthKind", "LatentRanks", "Reading", "RoutedKind", "SharedKind", "StreamKind", "UnitKind", "VocabularyKind",
    "WidthKind", "kinds_of", "level_criteria",
]  # fmt: skip

# In the order of tables and messages; what all layers share is cut in this order, too.
KINDS: dict[str, UnitKind] = {
    kind.name: kind
    for kind in (
        KVGroups(), QueryHeads(), MambaHeads(), Neurons(), RoutedExperts(), ExpertNeurons(), SharedNeurons(), Layers(),
        Attention(), Mlp(), Tokens(), Hidden(), HeadSize(), QueryRanks(), KVRanks(),
    )
}  # fmt: skip


def kinds_of(level: type[UnitKind], *, sublayer: bool | None = None) -> tuple[str, ...]:
    """Names of the kinds of a level: `WidthKind`, `DepthKind` or `SharedKind`.

    With `sublayer` only those that are (not) in one half of a layer.
    """
    found = (kind for kind in KINDS.values() if isinstance(kind, level))
    return tuple(kind.name for kind in found if sublayer is None or (kind.sublayer is not None) == sublayer)


def level_criteria(level: type[UnitKind]) -> tuple[str, ...]:
    """Names of all criteria of the kinds of a level that its option ranks."""
    kinds = (KINDS[name] for name in kinds_of(level))
    own = (kind.criteria for kind in kinds if kind.criterion_option == level.criterion_option)
    return tuple(dict.fromkeys(name for criteria in own for name in criteria))
