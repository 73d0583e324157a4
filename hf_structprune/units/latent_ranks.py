"""The ranks of multi-head latent attention: directions of what queries, and keys and values, are computed from."""

from __future__ import annotations

from ..errors import ConfigurationError
from .base import SharedKind
from .hidden import Hidden


_KERNELS = 512  # the rank that kernels of servers for cached latents are compiled for (FlashMLA: 512 + 64)


class LatentRanks(SharedKind):
    """A direction of a latent: a row of the map that computes it, a column of those that read it, in every layer.

    Attributes:
        key: Key of the configuration that holds the rank.
        what: What is computed from the latents, in messages.
    """

    key: str = ""
    what: str = ""
    aligns = always_tried = True
    criterion_option = "latent_criterion"
    criteria = ("outputs", "magnitude")
    sizes = Hidden.sizes

    def is_of(self, config):
        return isinstance(config.to_dict().get(self.key), int)

    def check_kept(self, kept):
        """Refuses numbers of units: latents are turned before they are cut, so that directions have none."""
        if kept is not None:
            raise ConfigurationError(
                f"`kept` names units of {self.name}, which are directions that are found when they are cut and have "
                "no numbers: leave it out."
            )


class QueryRanks(LatentRanks):
    """A direction of the latents of queries: rows of `q_a_proj`, columns of `q_b_proj`."""

    name, label = "q_ranks", "rank of query latents"
    key, what = "q_lora_rank", "queries"


class KVRanks(LatentRanks):
    """A direction of the latents of keys and values, which are what is cached: rows of `kv_a_proj`, columns of `kv_b`.

    The part of the key that is rotated is cached beside them and stays.
    """

    name, label = "kv_ranks", "rank of key-value latents"
    key, what = "kv_lora_rank", "keys and values"
    cached = True

    def remarks(self, decision):
        if decision.keep == _KERNELS:
            return []
        return [
            f"latents of {decision.keep} values: Transformers runs them, but kernels of servers for cached latents "
            f"are made for {_KERNELS}, and may refuse others"
        ]


Q_RANKS, KV_RANKS = QueryRanks.name, KVRanks.name
