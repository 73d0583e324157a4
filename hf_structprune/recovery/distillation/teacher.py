"""The dense model as a teacher: loaded, checked against the student, asked for predictions, never changed.

Inside the layers a student can follow it too, in hidden states or attention outputs `h` of layers that match:

    term = 1 / (layers * n_followed) sum over layers and followed tokens of ||h_s - h_t||^2 / ||h_t||^2

Such errors are used by TinyBERT (Jiao et al., arXiv:1909.10351) and Minitron (Muralidharan et al., arXiv:2407.14679).
Here they are relative to the teacher's own norm, because a few tokens have norms hundreds of times larger than the
others (Sun et al., Massive Activations, arXiv:2402.17762) and would be all that the mean shows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...errors import CheckpointError, ConfigurationError
from ...hardware import DTYPES
from ...installed import need
from ...model.families import family_of
from ...model.loading import load_config, load_model, load_tokenizer
from ...model.measuring import PROBE_LENGTH, measuring
from ...model.structure import decoder_layers
from ..configuration import DistillationConfig
from .losses import Head, HeadPredictions, LogitTransform, Predictions


logger = logging.get_logger(__name__)

KINDS = ("hidden", "attention")

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
    `None` if none does (a quantised head, or one that does more): then only the model itself can compute its logits. A
    warning says so, because that costs memory.
    """
    weight, base = getattr(model.get_output_embeddings(), "weight", None), model.base_model
    known = weight is not None and weight.is_floating_point() and weight.shape[0] == model.config.vocab_size
    if known and base is not model:
        ids = torch.linspace(0, weight.shape[0] - 1, PROBE_LENGTH).long()[None].to(model.device)
        with measuring(model):
            own = model(input_ids=ids, use_cache=False).logits[0]
            hidden = getattr(base(input_ids=ids, use_cache=False), "last_hidden_state", None)
            fits = hidden is not None and hidden.shape[-1] == weight.shape[-1]
            for transform in _candidates(model.config.get_text_config()) if fits else ():
                mine = head_of(model, transform).logits(hidden[0])
                tolerance = 4 * torch.finfo(own.dtype).eps * mine.abs().max()  # a rounding or two of the largest logit
                if (own.float() - mine).abs().max() <= tolerance:
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


def head_of(model: PreTrainedModel, transform: LogitTransform) -> Head:
    """The head of a model whose transform is known."""
    module = model.get_output_embeddings()
    return Head(module.weight, getattr(module, "bias", None), transform)


class Lesson(NamedTuple):
    """What a teacher says about the positions of a batch that were asked for, in their order.

    Attributes:
        predictions: What comes next.
        states: Hidden states by name, `(n, hidden)`, of the layers that are followed.
    """

    predictions: Predictions
    states: Mapping[str, Tensor] = MappingProxyType({})


class ModelTeacher:
    """A model in memory that is asked for each batch; `cache.CachedTeacher` can take its place.

    It is called in evaluation mode and without gradients, and stays as it is; only its device may change, see `to`.

    Attributes:
        by_sequence: Whether a lesson holds all logits, so that it should be asked for one sequence at a time.
        terms: What it shows of its layers.
    """

    def __init__(self, model: PreTrainedModel, terms: LayerTerms | None = None) -> None:
        self.model, self.terms, self.transform = model, terms, find_transform(model)
        self.by_sequence = self.transform is None

    def to(self, device: torch.device) -> None:
        """Moves the model; one that is quantised or spread over devices stays where it was loaded."""
        if not getattr(self.model, "is_quantized", False) and not hasattr(self.model, "hf_device_map"):
            self.model.to(device)

    @torch.no_grad()
    def lesson(self, inputs: Mapping[str, Tensor], positions: Tensor) -> Lesson:
        """What it predicts at positions `(batch, sequence)` of bool of a batch."""
        device = self.model.device
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items() if k != "labels"}
        given["use_cache"] = False
        taps = self.terms.modules(self.model, 1) if self.terms else {}
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
    """Gets a teacher ready for a student. Under DDP and FSDP each process holds a teacher of its own.

    Args:
        teacher: A model, a folder or a Hub id.
        student: The model that is going to learn, plain or wrapped by PEFT.
        config: Says how to load the teacher, and what is followed inside the layers.
        tokenizer: Of the student. With it, a teacher that comes from a folder or the Hub must have the same one.
        loading: Given to `load_model`: `revision`, `trust_remote_code`, ...

    Raises:
        ConfigurationError: The vocabularies or tokenizers differ, the teacher is the student itself, or a model was
            given in another dtype than the configuration's.
        CheckpointError: The teacher lacks weights.
    """
    student = student.get_base_model() if hasattr(student, "get_base_model") else student
    if isinstance(teacher, PreTrainedModel):
        model = teacher
        _check_given(model, student, config)
    else:
        try:  # tells a teacher that cannot be reached from one without a tokenizer
            load_config(teacher, **loading)
        except CheckpointError as error:
            raise CheckpointError(f"The teacher cannot be used: {error}") from error
        if tokenizer is not None:
            _check_tokenizer(tokenizer, load_tokenizer(teacher, **loading), str(teacher))
        options = {"dtype": DTYPES[config.teacher_dtype]} if config.teacher_dtype in DTYPES else {}
        if config.teacher_dtype == "int8":
            need("bitsandbytes", extra="qlora")
            options = {
                "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
                "device_map": {"": student.device},
            }
        model = load_model(teacher, **{**options, **loading})
    sizes = [model.config.get_text_config().vocab_size for model in (model, student)]
    if sizes[0] != sizes[1]:
        raise ConfigurationError(
            f"The teacher knows {sizes[0]} tokens and the student {sizes[1]}. {CROSS_TOKENIZER} If they do share a "
            "tokenizer and one was padded, use `resize_token_embeddings` on the student first."
        )
    return ModelTeacher(model, layer_terms(student, model, config))


def _check_given(teacher: PreTrainedModel, student: PreTrainedModel, config: DistillationConfig) -> None:
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


@dataclass(frozen=True)
class LayerTerms:
    """What is followed inside the layers.

    Attributes:
        pairs: `(layer of the student, layer of the teacher)`.
        weights: Weight in the loss by kind, `"hidden"` (outputs of layers) or `"attention"` (of their attention);
            kinds without one are not followed.
    """

    pairs: tuple[tuple[int, int], ...]
    weights: dict[str, float]

    def modules(self, model: PreTrainedModel, side: int) -> dict[str, nn.Module]:
        """Modules of the student (side 0) or the teacher (1) whose outputs are compared, by the same names."""
        layers, attention = _layers_of(model)
        paths = {"hidden": "", "attention": attention}
        return {
            f"{kind}.{pair[0]}": layers[pair[side]].get_submodule(paths[kind])
            for pair in self.pairs
            for kind in self.weights
        }

    def errors(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
        """Relative squared errors of states `(n, hidden)` by kind, summed over tokens and averaged over layers."""
        every = {name: relative_error(state, teacher[name]).sum() for name, state in student.items()}
        return {
            kind: sum(error for name, error in every.items() if name.startswith(kind)) / len(self.pairs)
            for kind in self.weights
        }


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """`||h_s - h_t||^2 / ||h_t||^2` of each token `(n, hidden)`, in float32; `(n,)`."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    target = teacher.to(student.device, dtype)
    norm = target.square().sum(-1).clamp(min=torch.finfo(dtype).tiny)
    return (student.to(dtype) - target).square().sum(-1) / norm


def layer_terms(student: PreTrainedModel, teacher: PreTrainedModel, config: DistillationConfig) -> LayerTerms | None:
    """What the configuration wants to be followed, or `None`.

    Raises:
        ConfigurationError: The layers cannot be matched, or what they put out has other sizes.
        UnsupportedModelError: The decoder layers were not found.
    """
    weights = {kind: getattr(config, f"{kind}_weight") for kind in KINDS if getattr(config, f"{kind}_weight")}
    if not weights:
        return None
    sizes = [model.config.get_text_config().hidden_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ConfigurationError(
            f"The hidden states have {sizes[0]} dimensions in the student and {sizes[1]} in the teacher, so that they "
            "cannot be compared: set `hidden_weight` and `attention_weight` to 0."
        )
    sides = [_layers_of(model) for model in (student, teacher)]
    pairs = match_layers(*(len(layers) for layers, _ in sides), config.layer_map)
    if "attention" in weights:  # some layers may have lost theirs
        have = [[path in dict(layer.named_modules()) for layer in layers] for layers, path in sides]
        pairs = tuple((own, other) for own, other in pairs if have[0][own] and have[1][other])
        if not pairs:
            raise ConfigurationError(
                f"No attention was found in the matching layers of {type(student).__name__}: set `attention_weight` "
                "to 0."
            )
    return LayerTerms(pairs, weights)


def match_layers(student: int, teacher: int, layer_map: Sequence[int] | None) -> tuple[tuple[int, int], ...]:
    """Which of the teacher's layers, from 0, each of the student's follows, of so many of both.

    With a map, what it says; without one, the layer of the same number, or only the last one if layers are missing.

    Raises:
        ConfigurationError: The map has not one entry for each layer, or one that does not exist.
    """
    if layer_map is None:
        return tuple((i, i) for i in range(student)) if student == teacher else ((student - 1, teacher - 1),)
    if len(layer_map) != student or not all(0 <= layer < teacher for layer in layer_map):
        raise ConfigurationError(
            f"`layer_map` is {list(layer_map)}; it needs a number from 0 to {teacher - 1} for each of the {student} "
            "layers of the student."
        )
    return tuple(enumerate(layer_map))


@contextmanager
def record_outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Fills a dictionary with the outputs of modules, by name, as they run."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        outputs[name] = output[0] if isinstance(output, tuple) else output

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _layers_of(model: PreTrainedModel) -> tuple[list[nn.Module], str | None]:
    """Decoder layers, and where their attention is."""
    family = family_of(model.config.model_type, getattr(model.config, "base_model_tp_plan", None))
    if family is None:
        raise ConfigurationError(
            f"The layers of model type {model.config.model_type!r} are not known: set `hidden_weight` and "
            "`attention_weight` to 0."
        )
    attention = family.attention.parent if family.attention is not None else None
    return [layer for _, layer in decoder_layers(model, family)], attention
