"""What a criterion is: a class with one method that gives every unit of a coupled group a score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import PruningConfig
from ..model.groups import Group, Slice, tensor_of
from ..stats.moments import InputStatistics


@dataclass(frozen=True)
class Paper:
    """Where something is from, for model cards: the key of an entry of `data/papers.bib`."""

    key: str

    @property
    def bibtex(self) -> str:
        entries = (Path(__file__).parents[1] / "data" / "papers.bib").read_text(encoding="utf-8").split("\n\n")
        return next(entry.strip() for entry in entries if f"{{{self.key}," in entry)


@dataclass(frozen=True)
class Method:
    """What a model card says of a criterion: what it is from, and whether it looks at calibration text."""

    papers: tuple[Paper, ...] = ()
    needs_text: bool = True


@dataclass
class Scoring:
    """Everything a criterion may look at.

    Attributes:
        group, model: The units to score, and the model, whose weights are read only.
        statistics: For criteria with `needs_inputs`: moments of the reader's inputs, or where tokens are routed.
        salience: For criteria with `needs_gradients`: importance of every row and column, by `(tensor, dim)`.
        drop: How many units will go, where that is known.
        expert: Of stacked experts, the one whose matrices are looked at.
    """

    group: Group
    model: nn.Module
    statistics: Any = None
    salience: dict[tuple[str, int], torch.Tensor] | None = None
    drop: int | None = None
    expert: int | None = None

    def weight(self, part: Slice) -> torch.Tensor:
        """The tensor of a slice with the dimension of the units last, in the model's dtype."""
        tensor = tensor_of(self.model, part.tensor)
        return (tensor if self.expert is None else tensor[self.expert]).movedim(part.dim, -1)


class Criterion:
    """Base class. Higher scores are more important.

    Attributes:
        needs_inputs, needs_gram: Looks at the inputs of the consumer, and at their second moments.
        needs_gradients: Looks at gradients of the loss.
        of_loss: Scores say by what the loss rises, so that those of any two groups can be compared.
        papers: What it is from; model cards cite them.
    """

    papers: tuple[Paper, ...] = ()
    needs_inputs = False
    needs_gram = False
    needs_gradients = False
    of_loss = False

    def __init__(self, config: PruningConfig) -> None:
        self.config = config

    def score(self, scoring: Scoring) -> torch.Tensor:
        """Importance of each unit, shape (num_units,), float32 or float64."""
        raise NotImplementedError


class ByKind(Criterion):
    """Several criteria, each for one kind of unit."""

    def __init__(self, config: PruningConfig, criteria: dict[str, Criterion]) -> None:
        super().__init__(config)
        self.criteria = criteria
        for need in ("needs_inputs", "needs_gram", "needs_gradients"):
            setattr(self, need, any(getattr(criterion, need) for criterion in criteria.values()))
        self.of_loss = all(criterion.of_loss for criterion in criteria.values())

    def score(self, scoring: Scoring) -> torch.Tensor:
        return self.criteria[scoring.group.kind].score(scoring)


class TensorCriterion(Criterion):
    """A criterion that scores the slices of every matrix of the group and joins the matrices."""

    def part_score(self, scoring: Scoring, part: Slice) -> torch.Tensor:
        """Score of each entry along the dimension of the units, shape (features,)."""
        raise NotImplementedError

    def score(self, scoring: Scoring) -> torch.Tensor:
        parts = [p for p in scoring.group.slices if scoring.weight(p).ndim == 2]
        scores = [(self.part_score(scoring, p), p.index) for p in parts]
        channels = [score[index.to(score.device)].double() for score, index in scores]
        return join(channels, self.config.aggregation)


class ConsumerCriterion(Criterion):
    """A criterion that scores the columns of the consumer by what comes in."""

    needs_inputs = True

    def column_score(self, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        """Score of each column; `weight` is the consumer's, shape (out, d), float32."""
        raise NotImplementedError

    def score(self, scoring: Scoring) -> torch.Tensor:
        consumer = scoring.group.reader
        columns = self.column_score(scoring.weight(consumer).float(), scoring.statistics)
        return columns[consumer.index.to(columns.device)].double().sum(1)


def join(channels: list[torch.Tensor], aggregation: str) -> torch.Tensor:
    """Joins the channel scores of the tensors of a group into one score for each unit.

    Tensors whose units are equally wide are joined channel by channel and then summed over the channels of a unit, as
    LLM-Pruner does; with grouped-query attention (a KV group is wider in `q` and `o` than in `k` and `v`) each tensor
    is summed over the channels of a unit first.

    `channels` are one tensor of shape (units, width) for each matrix, producers first, the consumer last.
    """
    if len({c.shape[1] for c in channels}) > 1:
        channels = [c.sum(1, keepdim=True) for c in channels]
    if aggregation in ("first", "last"):
        return channels[0 if aggregation == "first" else -1].sum(1)
    reduce = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "prod": torch.prod}[aggregation]
    return reduce(torch.stack(channels), 0).sum(1)


def best_units(
    scores: torch.Tensor, group: Group, keep: int, alive_blocks: torch.Tensor | None = None
) -> torch.Tensor:
    """Numbers of the `keep` units with the highest scores, ascending; equal scores keep the lower number.

    Of each of `alive_blocks` of the group (query heads: KV groups; default all) equally many stay, of others none.
    """
    scores = scores.detach().cpu().double().view(group.blocks, -1)
    blocks = torch.arange(group.blocks) if alive_blocks is None else alive_blocks.cpu()
    order = scores[blocks].argsort(dim=1, descending=True, stable=True)[:, : keep // len(blocks)]
    return (order + blocks[:, None] * scores.shape[1]).flatten().sort().values
