"""What a plan costs: it is carried out layer by layer, held-out text is run through, and all is put back as it was."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import AUTO, CalibrationConfig, PruningConfig
from ..criteria.depth import LayerSimilarities, layer_similarities
from ..errors import ConfigurationError
from ..model.store import Store
from ..model.structure import ModelStructure
from ..plan import PruningPlan
from ..progress import hidden
from ..stats.seen import Calibration
from ..stats.stream import LayerStream
from ..stats.survey import Survey, kl_divergence
from ..units import KINDS, LAYERS
from .closed_form import DEFAULT_DAMPING
from .layer_by_layer import compress


FIT, HELD_OUT = 16, 8  # sequences
_QUICK = "wifv"
_EVERY = 4  # predictions are compared at each so many-th token


class _Trial(Store):
    """Layers are cut for a moment only: held-out text passes each, then its tensors are those of before."""

    cuts = False

    def __init__(self, stream: LayerStream) -> None:
        self.stream = stream
        self.passed: set[int] = set()

    @contextmanager
    def holding(self, part: int | str) -> Iterator[None]:
        layer = self.stream.layers[part] if isinstance(part, int) else nn.Module()
        with untouched(layer):
            yield

    def put(self, part: int | str) -> None:
        self.stream.advance(part)
        self.passed.add(part)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Whatever is done to tensors and attributes of a module and of those in it while this is open is undone.

    Takes the memory of a copy of its parameters.
    """
    copies: dict[int, nn.Parameter] = {}  # a tensor may have several names
    before = []
    for one in module.modules():
        before.append((one, dict(vars(one)), dict(one._parameters), dict(one._buffers)))
        for name, parameter in one._parameters.items():
            if parameter is not None and id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            one._parameters[name] = copies.get(id(parameter))
    try:
        yield
    finally:
        for one, attributes, parameters, buffers in before:
            one._parameters.clear()
            one._parameters.update(parameters)
            one._buffers.clear()
            one._buffers.update(buffers)
            vars(one).clear()
            vars(one).update(attributes)


@dataclass
class Price:
    """What a plan costs, measured on some sequences, and what that says of all calibration text.

    Attributes:
        looks: Nats a token on each sequence that is compared, for each number of sequences that the plan was carried
            out with, the largest last.
        nats: What it costs when it is carried out with all calibration text, in nats a token.
    """

    looks: list[torch.Tensor]
    nats: float

    def over(self, other: Price) -> tuple[float, float]:
        """By how much this is dearer than another price of the same model, and how unsure that is, in nats a token.

        Unsure is twice the standard error of the mean of the differences on the same sequences; and by how much the
        difference changed with the text, if it was measured with more than one length of it.
        """
        differences = [mine - others for mine, others in zip(self.looks, other.looks, strict=True)]
        last = differences[-1]
        unsure = 2 * float(last.std()) / len(last) ** 0.5 if len(last) > 1 else math.inf
        moved = [float((one - last).mean()) for one in differences[:-1]]
        return self.nats - other.nats, max([unsure, *map(abs, moved)])


class Prices:
    """Measures what plans cost on one model.

    Of the calibration text the first `FIT + HELD_OUT` sequences are used (of less text a third is held out): plans are
    carried out with those of the beginning, and predictions are compared on the others, and on as many of those. A
    second look takes more of the text to carry plans out with, and compares on the same sequences.

    A re-fit on `n` sequences does too well on these and too badly on others, by about as much, and in proportion to
    `1 / n` (`p / n` for ridge regression with `p` columns; Hastie et al., The Elements of Statistical Learning, 7.4).
    So what one on all `N` would cost lies between: `(1 + n / N) / 2` of what was measured on other text, and the rest
    of what was on the same. After a second look it is where the line in `1 / n` through both, on other text, is at
    `1 / N`.

    Args:
        model, structure: The model, which is left as it is.
        tokens: Calibration tokens, shape (sequences, length).
        calibration: Where they are from, and how many sequences go through the model at once.

    Attributes:
        sequences: Number of all of them.
        fit: The tokens that plans are carried out with at first.
    """

    def __init__(
        self, model: PreTrainedModel, structure: ModelStructure, tokens: Calibration, calibration: CalibrationConfig
    ) -> None:
        self.sequences, self._held_out = len(tokens), max(1, min(HELD_OUT, len(tokens) // 3))
        self.model, self.structure, self.tokens, self.calibration = model, structure, tokens, calibration
        few = tokens[: FIT + self._held_out]
        self.fit = few[: -self._held_out]
        self._known: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._seen = min(self._held_out, len(self.fit))  # sequences that are compared and belong to `fit`, the last
        self._compared = few[len(self.fit) - self._seen :]

    @cached_property
    def _stream(self) -> LayerStream:
        return LayerStream(self.model, self.structure, self._compared, self.calibration.batch_size)

    @cached_property
    def _entered(self) -> list[torch.Tensor]:
        return self._stream.copy(self._stream.hidden)

    @cached_property
    def _dense(self) -> list[torch.Tensor]:
        entered, self._stream.hidden = self._stream.hidden, self._entered
        found = [self._stream.finish(0, number, _EVERY) for number in range(len(self._stream.batches))]
        self._stream.hidden = entered
        return found

    def _first(self, sequences: int) -> Calibration:
        """So many sequences to carry a plan out with, or as many as there are; none that is held out."""
        numbers = torch.arange(self.sequences)
        apart = (numbers < len(self.fit)) | (numbers >= len(self.fit) + self._held_out)
        return self.tokens[apart & (apart.cumsum(0) <= sequences)]

    @cached_property
    def similarities(self) -> LayerSimilarities:
        """What each layer changes in the hidden states, on the tokens that plans are carried out with."""
        with hidden():
            return layer_similarities(self.model, self.structure, self.fit, batch_size=self.calibration.batch_size)

    def of(self, plan: PruningPlan, config: PruningConfig) -> float:
        """`price(plan, config).nats`, by the longest look that was taken at the plan."""
        known = [sequences for key, sequences in self._known if key == _key(plan)]
        return self.price(plan, config, max(known, default=FIT)).nats

    def price(self, plan: PruningPlan, config: PruningConfig, sequences: int = FIT) -> Price:
        """`KL(dense || pruned)` in nats a token, when a plan for the model is carried out with all calibration text.

        Units that the plan does not name are chosen, and what reads them is re-fitted, as `config` says; but where
        that is by `obs`, heads and neurons are by `wifv`, which costs less time and is nearly as good once readers are
        re-fitted, and with one damping for all layers, unless `config` names another. With more than `FIT` `sequences`
        it is looked at twice: with `FIT` and with as many. Nothing is reconstructed.

        Raises:
            ConfigurationError: The plan cuts what all layers share.
        """
        if plan.shared:
            raise ConfigurationError(
                f"What it costs to cut the {KINDS[plan.shared[0].kind].label} cannot be predicted, since all layers "
                "change at once: leave `estimate` out."
            )
        numbers = [FIT, min(sequences, self.sequences - self._held_out)]
        numbers = [min(FIT, len(self.fit)), *[numbers[1]] * (numbers[1] > FIT)]
        looks = [self._look(plan, config, number) for number in numbers]
        number, (same, other) = numbers[-1], looks[-1]
        if len(looks) == 1:
            weight = (1 + number / self.sequences) / 2
            return Price([other], float(weight * other.mean() + (1 - weight) * same.mean()))
        slope = (looks[0][1] - other) / (1 / numbers[0] - 1 / number)
        others = [look[1] for look in looks]
        return Price(others, max(0.0, float((other + slope * (1 / self.sequences - 1 / number)).mean())))

    def _look(self, plan: PruningPlan, config: PruningConfig, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats a token on each compared sequence that plans are carried out with, and on each other one."""
        config = dataclasses.replace(config.closed_form(), damping=config.damping or DEFAULT_DAMPING)
        by_units = any(KINDS[kind].criterion_option == "criterion" for kind in config.units)
        if by_units and config.criterion in (AUTO, "obs", "kfac"):
            config = dataclasses.replace(config, criterion=_QUICK)
        key = _key(plan), sequences
        if key not in self._known:
            self._known[key] = self._measured(copy.deepcopy(plan), config, self._first(sequences))
        return self._known[key]

    def _measured(
        self, plan: PruningPlan, config: PruningConfig, fit: Calibration
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stream, nats, denses = self._stream, [], self._dense
        stream.hidden = stream.copy(self._entered)
        trial = _Trial(stream)
        if plan.decisions:
            with hidden():
                compress(self.model, self.structure, plan, config, lambda: fit, Survey(), [], trial)
        gone = {*plan.dropped.get(LAYERS, ()), *trial.passed}
        for number, dense in enumerate(denses):
            chosen = stream.positions(number, _EVERY)
            last = stream.outputs(0, number, skip=gone)
            logits = stream.head(last[:, chosen], stream.batches[number][:, chosen])
            nats += [kl_divergence(p[None], q[None]) / len(p) for p, q in zip(dense, logits, strict=True)]
        return torch.tensor(nats[: self._seen]), torch.tensor(nats[self._seen :])


def _key(plan: PruningPlan) -> str:
    return repr([(one.kind, one.layer, one.keep, one.kept) for one in plan.decisions])
