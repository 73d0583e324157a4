"""Runs a student inside its own (wrapped) forward and returns the distillation loss instead of logits.

DDP and FSDP act when their forward is called and gather the weights of the head only there. So the loss is computed
inside it: the model gets a forward that does so when it is given a `Request`, and is as before without one.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ...errors import ConfigurationError
from .blocks import LogitTransform
from .hidden import record_outputs
from .losses import DistillationLoss, StudentHead, Targets, distillation_loss
from .targets import BatchTargets
from .teacher import Lesson, Teacher


@dataclass(frozen=True)
class Request:
    """What a student's forward needs to compute its loss.

    Attributes:
        teacher: Who is followed.
        targets: What counts.
        counts: What the sums over followed and labelled tokens are divided by.
        temperature: `T`.
        label_weight: `w`.
    """

    teacher: Teacher
    targets: BatchTargets
    counts: tuple[Tensor, Tensor]
    temperature: float
    label_weight: float


def add_distillation(model: PreTrainedModel, transform: LogitTransform | None) -> None:
    """Lets `model(**inputs, distillation=Request(...))` return `{"loss", "kl_sum", "label_sum", ...}`.

    Args:
        model: The student, below PEFT.
        transform: What it does to the products of its head, see `find_transform`; `None` if only the model knows.
    """
    original = model.forward

    @functools.wraps(original)  # `generate` and `Trainer` read the signature
    def forward(self, *args: Any, distillation: Request | None = None, **kwargs: Any) -> Any:
        if distillation is None:
            return original(*args, **kwargs)
        if args:
            raise TypeError("With `distillation`, give all inputs by name.")
        return _losses(self, original, transform, distillation, kwargs)

    model.forward = types.MethodType(forward, model)


def _losses(model, original, transform, request: Request, inputs: dict[str, Any]) -> dict[str, Tensor]:
    by_sequence = transform is None or request.teacher.by_sequence
    total: dict[str, Tensor] = {}
    for part, targets in _sequences(inputs, request.targets) if by_sequence else [(inputs, request.targets)]:
        for name, value in _part_losses(model, original, transform, request, part, targets).items():
            total[name] = total[name] + value if name in total else value
    return total


def _part_losses(model, original, transform, request: Request, inputs, targets: BatchTargets) -> dict[str, Tensor]:
    used, terms = targets.used, request.teacher.terms
    lesson = request.teacher.lesson(inputs, used)
    with record_outputs(terms.student_modules(model) if terms else {}) as states:
        outputs = original(**inputs).logits if transform is None else model.base_model(**inputs).last_hidden_state
    if outputs.shape[:2] != used.shape:
        raise ConfigurationError(
            f"The model returned {outputs.shape[1]} positions for {used.shape[1]} tokens. Adapters that add virtual "
            "tokens (prompt tuning, prefix tuning) cannot be distilled: use LoRA."
        )
    losses = dict(vars(_loss(model, transform, outputs[used], lesson, targets, request)))
    if terms:
        followed = targets.followed[used]
        own = {name: state[targets.followed.to(state.device)] for name, state in states.items()}
        other = {name: state[followed.to(state.device)] for name, state in lesson.states.items()}
        for kind, error in terms.errors(own, other).items():
            error = error.to(losses["loss"].device)
            losses["loss"] = losses["loss"] + terms.weights[kind] * error / request.counts[0].clamp(min=1)
            losses[f"{kind}_sum"] = error.detach()
    return {name: value for name, value in losses.items() if value is not None}


def _loss(model, transform, outputs: Tensor, lesson: Lesson, targets: BatchTargets, request) -> DistillationLoss:
    used, head = targets.used, StudentHead()
    if transform is not None:
        module = model.get_output_embeddings()
        head = StudentHead(_whole(module.weight), _whole(getattr(module, "bias", None)), transform)
        outputs = outputs.to(head.weight.device)
    flat = Targets(targets.followed[used], targets.labels[used], *request.counts)
    return distillation_loss(
        outputs, head, lesson.predictions, flat, temperature=request.temperature, label_weight=request.label_weight
    )


def _whole(weight: Tensor | None) -> Tensor | None:
    """FSDP2 shows its shards as DTensors."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _sequences(inputs: dict[str, Any], targets: BatchTargets) -> Iterator[tuple[dict[str, Any], BatchTargets]]:
    count = targets.followed.shape[0]
    for row in range(count):
        part = {k: v[row : row + 1] if _is_batched(v, targets) else v for k, v in inputs.items()}
        yield part, targets.row(row)


def _is_batched(value: Any, targets: BatchTargets) -> bool:
    return isinstance(value, torch.Tensor) and value.shape[:2] == targets.followed.shape
