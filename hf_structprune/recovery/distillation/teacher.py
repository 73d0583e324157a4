"""The dense model as a teacher: loaded, checked against the student, asked for predictions, never changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...errors import CheckpointError, ConfigurationError
from ...model.loading import load_config, load_model, load_tokenizer
from ...model.measuring import measuring
from ..configuration import DistillationConfig
from .heads import find_transform
from .hidden import LayerTerms, layer_terms, record_outputs
from .predictions import HiddenPredictions, LogitPredictions, Predictions


CROSS_TOKENIZER = (
    "A teacher with another tokenizer needs TRL's GOLD trainer: see recipes/scripts/distill_cross_tokenizer.py."
)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
            predictions = self._predict(given, positions.to(device))
        states = {name: output[positions.to(output.device)] for name, output in outputs.items()}
        return Lesson(_moved(predictions, positions.device), states)

    def _predict(self, inputs: dict[str, Any], positions: Tensor) -> Predictions:
        if self.transform is None:
            return LogitPredictions(self.model(**inputs).logits[positions])
        hidden = self.model.base_model(**inputs).last_hidden_state[positions]
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return HiddenPredictions(hidden, head.weight.detach(), None if bias is None else bias.detach(), self.transform)


def _moved(predictions: Predictions, device: torch.device) -> Predictions:
    values = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(predictions).items()}
    return type(predictions)(**values)


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
        _check_found(teacher, loading)
        if tokenizer is not None:
            _check_tokenizer(tokenizer, load_tokenizer(teacher, **loading), str(teacher))
        model = load_model(teacher, **{**_loading(config, student.device), **loading})
    _check_vocabulary(model, student)
    return ModelTeacher(model, layer_terms(student, model, config))


def _check_found(teacher: str | os.PathLike, loading: dict[str, Any]) -> None:
    """Tells a teacher that cannot be reached from one without a tokenizer."""
    try:
        load_config(teacher, **loading)
    except CheckpointError as error:
        raise CheckpointError(f"The teacher cannot be used: {error}") from error


def _loading(config: DistillationConfig, device: torch.device) -> dict[str, Any]:
    if config.teacher_dtype == "auto":
        return {}
    if config.teacher_dtype != "int8":
        return {"dtype": _DTYPES[config.teacher_dtype]}
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
    wanted = _DTYPES.get(config.teacher_dtype)
    quantised = getattr(teacher, "is_loaded_in_8bit", False)
    if (wanted and teacher.dtype != wanted) or (config.teacher_dtype == "int8" and not quantised):
        raise ConfigurationError(
            f"`teacher_dtype` is {config.teacher_dtype!r}, but the model given is in {teacher.dtype}: set it to "
            "'auto', or give the teacher's folder or Hub id."
        )
    return teacher


def _check_vocabulary(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    sizes = [model.config.get_text_config().vocab_size for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ConfigurationError(
            f"The teacher knows {sizes[0]} tokens and the student {sizes[1]}. {CROSS_TOKENIZER} If they do share a "
            "tokenizer and one was padded, use `resize_token_embeddings` on the student first."
        )


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
