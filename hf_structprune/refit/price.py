"""What a plan costs: it is carried out layer by layer, held-out text is run through, and all is put back as it was."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import CalibrationConfig, PruningConfig
from ..errors import ConfigurationError
from ..model.store import Store
from ..model.stored import without_bars
from ..model.structure import ModelStructure
from ..plan import PruningPlan
from ..stats.stream import LayerStream
from ..stats.survey import Survey, kl_divergence
from ..units import KINDS, LAYERS
from .layer_by_layer import compress


FIT, HELD_OUT = 32, 16  # sequences
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
    carried out with those of the beginning, and predictions are compared on the others.

    Args:
        model, structure: The model, which is left as it is.
        tokens: Calibration tokens, shape (sequences, length).
        calibration: Where they are from, and how many sequences go through the model at once.

    Attributes:
        fit: The tokens that plans are carried out with.
    """

    def __init__(
        self, model: PreTrainedModel, structure: ModelStructure, tokens: torch.Tensor, calibration: CalibrationConfig
    ) -> None:
        held_out = max(1, min(HELD_OUT, len(tokens) // 3))
        tokens = tokens[: FIT + held_out]
        self.model, self.structure, self.fit = model, structure, tokens[:-held_out]
        self.calibration = calibration
        self._known: dict[str, float] = {}
        self._stream = LayerStream(model, structure, tokens[-held_out:], calibration.batch_size)
        self._entered = self._stream.copy(self._stream.hidden)
        self._dense = [self._stream.finish(0, number, _EVERY) for number in range(len(self._stream.batches))]
        self._count = sum(logits.shape[0] * logits.shape[1] for logits in self._dense)

    def of(self, plan: PruningPlan, config: PruningConfig) -> float:
        """`KL(dense || pruned)` in nats a token on the held-out text, when a plan for the model is carried out.

        Units that the plan does not name are chosen, and what reads them is re-fitted, as `config` says; but heads
        and neurons by `wifv`, which costs less time than `obs` and is nearly as good once readers are re-fitted.

        Raises:
            ConfigurationError: The plan cuts what all layers share.
        """
        if plan.shared:
            raise ConfigurationError(
                f"What it costs to cut the {KINDS[plan.shared[0].kind].label} cannot be predicted, since all layers "
                "change at once: leave `estimate` out."
            )
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
        with without_bars():
            compress(self.model, self.structure, plan, config, lambda: self.fit, Survey(), [], trial)
        gone = {*plan.dropped.get(LAYERS, ()), *trial.passed}
        total = 0.0
        for number, dense in enumerate(self._dense):
            last = stream.outputs(0, number, skip=gone)
            logits = stream.head(last[:, ::_EVERY], stream.batches[number][:, ::_EVERY])
            total += kl_divergence(dense, logits)
        return total / self._count
