"""What a plan costs: it is carried out layer by layer, held-out text is run through, and all is put back as it was."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import CalibrationConfig, PruningConfig
from ..criteria.depth import LayerSimilarities, layer_similarities
from ..errors import ConfigurationError
from ..model.store import Store
from ..model.structure import ModelStructure
from ..plan import PruningPlan
from ..progress import hidden
from ..stats.stream import LayerStream
from ..stats.survey import Survey, kl_divergence
from ..units import KINDS, LAYERS
from .closed_form import DEFAULT_DAMPING
from .layer_by_layer import compress


FIT, HELD_OUT = 16, 8  # sequences
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

    def put(self, index: int) -> None:
        self.stream.advance(index)
        self.passed.add(index)


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


class Prices:
    """Measures what plans cost on one model.

    Of the calibration text the first `FIT + HELD_OUT` sequences are used (of less text a third is held out): plans are
    carried out with those of the beginning, and predictions are compared on the others, and on as many of those.

    A re-fit on `n` sequences does too well on these and too badly on others, by about as much, and in proportion to
    `1 / n` (`p / n` for ridge regression with `p` columns; Hastie et al., The Elements of Statistical Learning, 7.4).
    So what one on all `N` would cost lies between: `(1 + n / N) / 2` of what was measured on other text, and the rest
    of what was on the same.

    Args:
        model, structure: The model, which is left as it is.
        tokens: Calibration tokens, shape (sequences, length).
        calibration: Where they are from, and how many sequences go through the model at once.

    Attributes:
        fit: The tokens that plans are carried out with.
        weight: Of what is measured on other text.
    """

    def __init__(
        self, model: PreTrainedModel, structure: ModelStructure, tokens: torch.Tensor, calibration: CalibrationConfig
    ) -> None:
        held_out, number = max(1, min(HELD_OUT, len(tokens) // 3)), len(tokens)
        tokens = tokens[: FIT + held_out]
        self.model, self.structure, self.fit = model, structure, tokens[:-held_out]
        self.calibration, self.weight = calibration, (1 + len(self.fit) / number) / 2
        self._known: dict[str, float] = {}
        self._seen = min(held_out, len(self.fit))  # sequences that are compared and belong to `fit`, the first ones
        self._stream = LayerStream(model, structure, tokens[-held_out - self._seen :], calibration.batch_size)
        self._entered = self._stream.copy(self._stream.hidden)
        self._dense = [self._stream.finish(0, number, _EVERY) for number in range(len(self._stream.batches))]

    @cached_property
    def similarities(self) -> LayerSimilarities:
        """What each layer changes in the hidden states, on the tokens that plans are carried out with."""
        with hidden():
            return layer_similarities(self.model, self.structure, self.fit, batch_size=self.calibration.batch_size)

    def of(self, plan: PruningPlan, config: PruningConfig) -> float:
        """`KL(dense || pruned)` in nats a token, when a plan for the model is carried out with all calibration text.

        Units that the plan does not name are chosen, and what reads them is re-fitted, as `config` says; but heads
        and neurons by `wifv`, which costs less time than `obs` and is nearly as good once readers are re-fitted, and
        with one damping for all layers, unless `config` names another.

        Raises:
            ConfigurationError: The plan cuts what all layers share.
        """
        if plan.shared:
            raise ConfigurationError(
                f"What it costs to cut the {KINDS[plan.shared[0].kind].label} cannot be predicted, since all layers "
                "change at once: leave `estimate` out."
            )
        config = dataclasses.replace(config, damping=config.damping or DEFAULT_DAMPING)
        if any(KINDS[kind].criterion_option == "criterion" for kind in config.units):
            config = dataclasses.replace(config, criterion="wifv")
        key = repr([(one.kind, one.layer, one.keep, one.kept) for one in plan.decisions])
        if key not in self._known:
            self._known[key] = self._measured(copy.deepcopy(plan), config)
        return self._known[key]

    def _measured(self, plan: PruningPlan, config: PruningConfig) -> float:
        if not plan.decisions:
            return 0.0
        stream = self._stream
        stream.hidden = stream.copy(self._entered)
        trial = _Trial(stream)
        with hidden():
            compress(self.model, self.structure, plan, config, lambda: self.fit, Survey(), [], trial)
        gone = {*plan.dropped.get(LAYERS, ()), *trial.passed}
        sequences: list[float] = []
        tokens: list[int] = []
        for number, dense in enumerate(self._dense):
            last = stream.outputs(0, number, skip=gone)
            logits = stream.head(last[:, ::_EVERY], stream.batches[number][:, ::_EVERY])
            sequences += [kl_divergence(p[None], q[None]) for p, q in zip(dense, logits, strict=True)]
            tokens += [one.shape[0] for one in dense]
        same, other = slice(None, self._seen), slice(self._seen, None)
        on_same, on_other = (sum(sequences[part]) / sum(tokens[part]) for part in (same, other))
        return self.weight * on_other + (1 - self.weight) * on_same
