"""How experts are ranked: by what the router sends them, by what they make of it, by what the loss says."""

from __future__ import annotations

import torch

from ..config import PruningConfig
from ..model.experts import Experts, without_experts
from ..model.groups import tensor_of
from .base import Criterion, Paper, Scoring
from .widths import L2, Random


class ExpertCriterion(Criterion):
    """Base class: `scoring.statistics` is a `RoutingStatistics`.

    Attributes:
        needs_outputs: Looks at what experts put out.
        needs_sample: Runs blocks again on some of their inputs.
    """

    needs_inputs = True
    needs_outputs = False
    needs_sample = False


class Reap(ExpertCriterion):
    """`S_e = (1 / N_e) sum over the N_e tokens t routed to e of g_e(t) ||f_e(t)||`, 0 for an expert without tokens.

    REAP (Lasby et al., 2025, https://huggingface.co/papers/2510.13999, eq. 9); `g` is the weight that the model itself
    uses, renormalised over the chosen experts where it does so.
    """

    needs_outputs = True
    papers = (Paper("lasby2025reap"),)

    def score(self, scoring: Scoring) -> torch.Tensor:
        return scoring.statistics.norms / scoring.statistics.tokens.clamp_min(1)


class Frequency(ExpertCriterion):
    """`S_e = N_e / N`: the share of the tokens that is routed to e."""

    def score(self, scoring: Scoring) -> torch.Tensor:
        return scoring.statistics.tokens / max(scoring.statistics.total, 1)


class Router(ExpertCriterion):
    """`S_e = mean over all tokens of softmax(router(x))_e`, whether e is chosen or not."""

    def score(self, scoring: Scoring) -> torch.Tensor:
        return scoring.statistics.probabilities / max(scoring.statistics.total, 1)


class ExpertNorm(ExpertCriterion):
    """`S_e = ||W_e||_2` over all matrices of an expert."""

    needs_inputs = False

    def score(self, scoring: Scoring) -> torch.Tensor:
        total = torch.zeros(scoring.group.size, dtype=torch.float64)
        for part in scoring.group.slices:
            tensor = tensor_of(scoring.model, part.tensor)
            if tensor.ndim > 2 or part.index.shape[1] > 1:
                per_entry = tensor.float().movedim(part.dim, 0).flatten(1).square().sum(1)
                total += per_entry[part.index.to(tensor.device)].sum(1).double().cpu()
        return total.sqrt()


class ExpertTaylor(ExpertCriterion):
    """`S_e = mean over batches of (dL / dm_e)^2`, where `m_e = 1` multiplies what e puts out; see `gate_salience`."""

    needs_inputs = False
    needs_gradients = True
    papers = (Paper("molchanov2019importance"),)

    def score(self, scoring: Scoring) -> torch.Tensor:
        return scoring.salience[scoring.group.parent, 0]


class ExpertLoss(ExpertCriterion):
    """Greedy removal: each time the expert goes without which the block's output changes least on calibration text.

    The error `sum ||y - y_without||^2` is measured with tokens routed anew. Lu et al., 2024
    (https://huggingface.co/papers/2402.14800) try all subsets by it; greedily it costs `E^2 / 2` runs of the block.
    """

    needs_sample = True
    papers = (Paper("lu2024experts"),)

    def score(self, scoring: Scoring) -> torch.Tensor:
        group, experts, inputs = scoring.group, scoring.statistics.experts, scoring.statistics.inputs
        drop = group.size - group.least if scoring.drop is None else scoring.drop
        dense = [experts.run(x)[0] for x in inputs]
        alive, scores = list(range(group.size)), torch.full((group.size,), float(group.size), dtype=torch.float64)
        quota = [drop // group.blocks] * group.blocks
        for turn in range(drop // group.blocks * group.blocks):
            open_ = [one for one in alive if quota[one // group.whole]]
            gone = min(open_, key=lambda one: self._error(scoring, [e for e in alive if e != one], dense))
            alive.remove(gone)
            quota[gone // group.whole] -= 1
            scores[gone] = turn
        return scores

    def _error(self, scoring: Scoring, kept: list[int], dense: list[torch.Tensor]) -> float:
        group, statistics = scoring.group, scoring.statistics
        with without_experts(scoring.model, [group], {group.key: torch.tensor(kept)}):
            now = [statistics.experts.run(x)[0] for x in statistics.inputs]
        return sum(float((a.float() - b.float()).square().sum()) for a, b in zip(now, dense, strict=True))


class InExperts(Criterion):
    """A criterion of neurons, applied to those of each expert by themselves; `scoring.statistics` is `ExpertInputs`.

    Neurons of an expert that got no token are ranked by their weights, as `L2` does.
    """

    def __init__(self, config: PruningConfig, criterion: Criterion) -> None:
        super().__init__(config)
        self.criterion = criterion
        self.needs_inputs, self.needs_gram = criterion.needs_inputs, criterion.needs_gram
        self.papers = criterion.papers

    def score(self, scoring: Scoring) -> torch.Tensor:
        experts, scores = Experts(scoring.model, scoring.group), []
        for expert in experts.parts:
            group, criterion = experts.neurons(expert), self.criterion
            inputs = scoring.statistics.of(expert) if scoring.statistics else None
            if inputs is not None and not inputs.tokens:
                inputs, criterion = None, L2(self.config)
            drop = scoring.drop and scoring.drop * group.blocks // scoring.group.blocks
            own = Scoring(group, scoring.model, inputs, None, drop, None if expert == experts.number else expert)
            scores.append(criterion.score(own).double().cpu())
        return torch.cat(scores)


BY_NAME: dict[str, type[Criterion]] = {
    "reap": Reap,
    "frequency": Frequency,
    "router": Router,
    "l2": ExpertNorm,
    "taylor": ExpertTaylor,
    "loss": ExpertLoss,
    "random": Random,
}
