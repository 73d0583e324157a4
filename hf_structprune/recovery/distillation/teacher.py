"""The dense model as a teacher: loaded, checked against the student, asked for predictions, never changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...errors import CheckpointError, ConfigurationError
from ...hardware import DTYPES
from ...model.loading import load_config, load_model, load_tokenizer
from ...model.measuring import PROBE_LENGTH, has_plain_head, measuring
from ..configuration import DistillationConfig
from .layers import LayerTerms, layer_terms, record_outputs
from .losses import Head, HeadPredictions, LogitTransform, Predictions


logger = logging.get_logger(__name__)

CROSS_TOKENIZER = (
    "A teacher with another tokenizer needs TRL's GOLD trainer: see recipes/scripts/distill_cross_tokenizer.py."
)
# Configuration keys of a factor of the logits, and whether it multiplies them. Granite divides by the last one and
# HyperCLOVA X multiplies by it: both are tried.
_SCALES = (("logit_scale", True), ("output_multiplier", True), ("lm_head_multiplier", True),
           ("logits_scaling", False), ("logits_scaling", True))  # fmt: skip


@torch.no_grad()
def find_transform(model: PreTrainedModel) -> LogitTransform | None:
    """How a model's logits follow from its hidden states and the weight of its head.

    The candidates come from the configuration; the one that gives the model's own logits on a few tokens is right.

    Returns:
        The transform, or `None` if none of them does (a quantised head, or one that does more): then only the model
        itself can compute its logits. A warning says so, because that costs memory.
    """
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is not None and weight.is_floating_point() and weight.shape[0] == model.config.vocab_size:
        ids = torch.linspace(0, weight.shape[0] - 1, PROBE_LENGTH).long()[None].to(model.device)
        with measuring(model):
            if has_plain_head(model, ids):
                return LogitTransform()
            for transform in _candidates(model.config.get_text_config()):
                if _agrees(model, ids, transform):
                    return transform
    logger.warning(
        f"{type(model).__name__} computes its logits in a way of its own, so that those of a whole sequence are in "
        "memory at once during distillation."
    )
    return None


def _candidates(config: Any) -> list[LogitTransform]:
    values = [(getattr(config, key, None), multiplies) for key, multiplies in _SCALES]
    scales = [1.0, *(float(value) if multiplies else 1.0 / value for value, multiplies in values if value)]
    softcap = getattr(config, "final_logit_softcapping", None)
    return [LogitTransform(scale, cap) for scale in scales for cap in ([softcap, None] if softcap else [None])]


def _agrees(model: PreTrainedModel, ids: Tensor, transform: LogitTransform) -> bool:
    head = head_of(model, transform)
    hidden = None
    if model.base_model is not model:
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != head.weight.shape[-1]:
        return False
    own, mine = model(input_ids=ids, use_cache=False).logits[0], head.logits(hidden[0])
    tolerance = 4 * torch.finfo(own.dtype).eps * mine.abs().max()  # a rounding or two of the largest logit
    return bool((own.float() - mine).abs().max() <= tolerance)


def head_of(model: PreTrainedModel, transform: LogitTransform) -> Head:
    """The head of a model whose transform is known."""
    module = model.get_output_embeddings()
    return Head(module.weight, getattr(module, "bias", None), transform)


@dataclass(frozen=True)
class Lesson:
    """What a teacher has to say about a batch.

    Attributes:
        predictions: Of the positions that were asked for, in the order of the batch.
        states: Hidden states by name, `(n, hidden)`, of the layers that are followed.
    """

    predictions: Predictions
    states: dict[str, Tensor] = field(default_factory=dict)


class Teacher(Protocol):
    """What a distillation trainer needs of a teacher."""

    by_sequence: bool
    """Whether a lesson holds all logits, so that it should be asked for one sequence at a time."""
    terms: LayerTerms | None
    """What it shows of its layers."""

    def to(self, device: torch.device) -> Teacher:
        """Moves it to the device of the student."""

    def lesson(self, inputs: Mapping[str, Tensor], positions: Tensor) -> Lesson:
        """What it predicts at positions `(batch, sequence)` of bool of a batch."""


class ModelTeacher:
    """A model in memory that is asked for each batch.

    It is called in evaluation mode and without gradients; its parameters, their `requires_grad` and its modes stay as
    they are. Only its device may change, see `to`.
    """

    def __init__(self, model: PreTrainedModel, terms: LayerTerms | None = None) -> None:
        self.model = model
        self.terms = terms
        self.transform = find_transform(model)
        self.by_sequence = self.transform is None

    def to(self, device: torch.device) -> ModelTeacher:
        """Moves the model; one that is quantised or spread over devices stays where it was loaded."""
        if not getattr(self.model, "is_quantized", False) and not hasattr(self.model, "hf_device_map"):
            self.model.to(device)
        return self

    @torch.no_grad()
    def lesson(self, inputs: Mapping[str, Tensor], positions: Tensor) -> Lesson:
        """See `Teacher`."""
        device = self.model.device
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items() if k != "labels"}
        given["use_cache"] = False
        taps = self.terms.teacher_modules(self.model) if self.terms else {}
        with measuring(self.model), record_outputs(taps) as outputs:
            if self.transform is None:
                hidden, head = self.model(**given).logits, Head()
            else:
                hidden = self.model.base_model(**given).last_hidden_state
                head = head_of(self.model, self.transform)
        states = {name: output[positions.to(output.device)] for name, output in outputs.items()}
        hidden = hidden[positions.to(hidden.device)].to(positions.device)
        return Lesson(HeadPredictions(hidden, head.to(positions.device)), states)


def load_teacher(
    teacher: str | os.PathLike | PreTrainedModel,
    student: PreTrainedModel,
    config: DistillationConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **loading: Any,
) -> ModelTeacher:
    """Gets a teacher ready for a student.

    Under DDP and FSDP each process holds a teacher of its own.

    Args:
        teacher: A model, a folder or a Hub id.
        student: The model that is going to learn, plain or wrapped by PEFT.
        config: `teacher_dtype` counts here (`"int8"` loads through bitsandbytes), and what is followed inside the
            layers.
        tokenizer: Of the student. With it, a teacher that comes from a folder or the Hub must have the same one.
        loading: Given to `load_model`: `revision`, `trust_remote_code`, ...

    Raises:
        ConfigurationError: The vocabularies or tokenizers differ, the teacher is the student itself, or a model was
            given in another dtype than the configuration's.
        CheckpointError: The teacher lacks weights.
    """
    student = student.get_base_model() if hasattr(student, "get_base_model") else student
    if isinstance(teacher, PreTrainedModel):
        model = _check_given(teacher, student, config)
    else:
        try:  # tells a teacher that cannot be reached from one without a tokenizer
            load_config(teacher, **loading)
        except CheckpointError as error:
            raise CheckpointError(f"The teacher cannot be used: {error}") from error
        if tokenizer is not None:
            _check_tokenizer(tokenizer, load_tokenizer(teacher, **loading), str(teacher))
        model = load_model(teacher, **{**_loading(config, student.device), **loading})
    sizes = [model.config.get_text_config().vocab_size for model in (model, student)]
    if sizes[0] != sizes[1]:
        raise ConfigurationError(
            f"The teacher knows {sizes[0]} tokens and the student {sizes[1]}. {CROSS_TOKENIZER} If they do share a "
            "tokenizer and one was padded, use `resize_token_embeddings` on the student first."
        )
    return ModelTeacher(model, layer_terms(student, model, config))


def _loading(config: DistillationConfig, device: torch.device) -> dict[str, Any]:
    if config.teacher_dtype == "auto":
        return {}
    if config.teacher_dtype != "int8":
        return {"dtype": DTYPES[config.teacher_dtype]}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "`teacher_dtype` 'int8' needs bitsandbytes: `pip install bitsandbytes`, or choose 'bf16'."
        ) from error
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}


def _check_given(teacher: PreTrainedModel, student: PreTrainedModel, config: DistillationConfig) -> PreTrainedModel:
    own = {parameter.data_ptr() for parameter in student.parameters() if parameter.device.type != "meta"}
    if any(parameter.data_ptr() in own for parameter in teacher.parameters()):
        raise ConfigurationError(
            "The teacher shares weights with the student, so that it would learn too: load it a second time, or give "
            "its folder or Hub id."
        )
    wanted = DTYPES.get(config.teacher_dtype)
    quantised = getattr(teacher, "is_loaded_in_8bit", False)
    if (wanted and teacher.dtype != wanted) or (config.teacher_dtype == "int8" and not quantised):
        raise ConfigurationError(
            f"`teacher_dtype` is {config.teacher_dtype!r}, but the model given is in {teacher.dtype}: set it to "
            "'auto', or give the teacher's folder or Hub id."
        )
    return teacher


def _check_tokenizer(own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase | None, name: str) -> None:
    if other is None:
        raise ConfigurationError(
            f"{name} has no tokenizer, so that it cannot be compared with the student's: save it there, or load the "
            "teacher yourself and give the model."
        )
    mine, theirs = own.get_vocab(), other.get_vocab()
    if mine == theirs:
        return
    token = min((t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)), key=str)
    raise ConfigurationError(
        f"The tokenizers differ: {token!r} is {theirs.get(token, 'unknown')} in {name} and "
        f"{mine.get(token, 'unknown')} in the student's. {CROSS_TOKENIZER}"
    )
