"""The dense model as a teacher: loaded, checked against the student, asked for predictions, never changed.

Inside the layers a student can follow it too, in hidden states or attention outputs `h` of layers that match:

    term = 1 / (layers * n_followed) sum over layers and followed tokens of ||h_s - h_t||^2 / ||h_t||^2

Such errors are used by TinyBERT (Jiao et al., arXiv:1909.10351) and Minitron (Muralidharan et al., arXiv:2407.14679).
Here they are relative to the teacher's own norm, because a few tokens have norms hundreds of times larger than the
others (Sun et al., Massive Activations, arXiv:2402.17762) and would be all that the mean shows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...errors import CheckpointError, ConfigurationError, PlaceError
from ...evaluation.results import model_fingerprint
from ...files.reading import read_json_object
from ...files.writing import appearing, check_room, write_text
from ...hardware import DTYPES
from ...hooks import first_of, hooked
from ...installed import need
from ...model.families import family_of
from ...model.loading import load_config, load_model, load_tokenizer
from ...model.measuring import PROBE_LENGTH, measuring, positions_at_once
from ...model.structure import decoder_layers
from ...progress import tqdm
from ...vocabulary.aligning import Reader
from ...vocabulary.relating import related
from ..configuration import DistillationConfig
from .fewer_tokens import read_as_dense, split_batch
from .losses import Head, HeadPredictions, LogitTransform, Predictions, TopPredictions, top_predictions


logger = logging.get_logger(__name__)

KINDS = ("hidden", "attention")

CROSS_TOKENIZER = (
    "For a teacher with another tokenizer set `dual_space` (--dual-space), or take TRL's GOLD trainer: see "
    "recipes/scripts/distill_cross_tokenizer.py."
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
    """The head of a model whose transform is known; FSDP2 shows its shards as DTensors."""
    module = model.get_output_embeddings()
    tensors = (module.weight, getattr(module, "bias", None))
    return Head(*(one.full_tensor() if isinstance(one, DTensor) else one for one in tensors), transform)


def run(model: PreTrainedModel, transform: LogitTransform | None, inputs: dict[str, Any], forward: Any = None) -> Any:
    """Last hidden states of a model and its head; where no transform is known, what `forward` gives: logits alone."""
    if transform is None:
        return (forward or model)(**inputs).logits, Head()
    return model.base_model(**inputs).last_hidden_state, head_of(model, transform)


class Lesson(NamedTuple):
    """What a teacher says about the positions of a batch that were asked for, in their order.

    `states` are the hidden states `(n, hidden)`, by name, of the layers that are followed. The student's are at the
    same place of the text where `same_place` `(n,)` of bool is true, or everywhere.
    """

    predictions: Predictions
    states: Mapping[str, Tensor] = MappingProxyType({})
    same_place: Tensor | None = None


class ModelTeacher:
    """A model in memory that is asked for each batch; `CachedTeacher` can take its place.

    It is called in evaluation mode and without gradients, and stays as it is; only its device may change, see `to`.
    `by_sequence` says whether a lesson holds all logits, so that it should be asked for one sequence at a time. With
    `tokens`, of a student with fewer of them, it reads the student's text in its own tokens, see `fewer_tokens`.
    """

    def __init__(self, model: PreTrainedModel, terms: LayerTerms | None = None, tokens: Reader | None = None) -> None:
        self.model, self.terms, self.tokens, self.transform = model, terms, tokens, find_transform(model)
        self.by_sequence = self.transform is None

    def to(self, device: torch.device) -> None:
        """Moves the model; one that is quantised or spread over devices stays where it was loaded."""
        if not getattr(self.model, "is_quantized", False) and not hasattr(self.model, "hf_device_map"):
            self.model.to(device)

    @torch.no_grad()
    def lesson(self, inputs: Mapping[str, Tensor], positions: Tensor) -> Lesson:
        """What it predicts at positions `(batch, sequence)` of bool of a batch."""
        device, own = self.model.device, None
        if self.tokens is not None:
            own = read_as_dense(self.tokens, inputs)
            inputs = own.inputs
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items() if k != "labels"}
        given["use_cache"] = False
        taps = self.terms.modules(self.model, 1) if self.terms else {}
        with measuring(self.model), record_outputs(taps) as outputs:
            hidden, head = run(self.model, self.transform, given)
        if own is None:
            states = {name: output[positions.to(output.device)] for name, output in outputs.items()}
            hidden = hidden[positions.to(hidden.device)].to(positions.device)
            return Lesson(HeadPredictions(hidden, head.to(positions.device)), states)
        places = positions.cpu()
        states = {name: own.at(output, places) for name, output in outputs.items()}
        prefixes, same = (one[places].to(positions.device) for one in (own.prefixes, own.ends))
        tokens, hidden = self.tokens.tokens.to(positions.device), own.at(hidden, places).to(positions.device)
        return Lesson(HeadPredictions(hidden, head.to(positions.device), tokens, prefixes), states, same)


def load_teacher(
    teacher: str | os.PathLike | PreTrainedModel, student: PreTrainedModel, config: DistillationConfig, *,
    tokenizer: PreTrainedTokenizerBase | None = None, **loading: Any,
) -> ModelTeacher:  # fmt: skip
    """A teacher ready for a student, plain or wrapped by PEFT; under DDP and FSDP each process holds one of its own.

    Args:
        teacher: A model, a folder or a Hub id.
        tokenizer: Of the student. With it, a teacher that comes from a folder or the Hub must have the same one, or
            one of which the student's has fewer tokens: it then reads the same text in its own tokens, and what it
            predicts counts for what spells it, see `relating`.
        loading: Given to `load_model`: `revision`, `trust_remote_code`, ...

    Raises:
        ConfigurationError: The vocabularies or tokenizers differ, the teacher is the student itself, or a model was
            given in another dtype than the configuration's.
        CheckpointError: The teacher lacks weights.
    """
    student = student.get_base_model() if hasattr(student, "get_base_model") else student
    model, theirs = load_teacher_model(teacher, student, config, tokenizer is not None, **loading)
    sizes = [model.config.get_text_config().vocab_size for model in (model, student)]
    tokens = None
    if tokenizer is not None and not isinstance(teacher, PreTrainedModel):
        tokens = _tokens(tokenizer, theirs, sizes, str(teacher))
    if sizes[0] != sizes[1] and tokens is None:
        raise ConfigurationError(
            f"The teacher knows {sizes[0]} tokens and the student {sizes[1]}. If the student's are some of the "
            "teacher's, give the teacher by its folder or Hub id, which has its tokenizer too. If they share a "
            "tokenizer and one was padded, use `resize_token_embeddings` on the student first. "
            f"{CROSS_TOKENIZER}"
        )
    return ModelTeacher(model, layer_terms(student, model, config), tokens)


def load_teacher_model(
    teacher: str | os.PathLike | PreTrainedModel, student: PreTrainedModel, config: DistillationConfig,
    with_tokenizer: bool, **loading: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:  # fmt: skip
    """The teacher, in the precision that is wanted, and its tokenizer; `None` of a model in memory, or without one.

    Raises:
        ConfigurationError: It is the student itself, or a model was given in another dtype.
        CheckpointError: It cannot be read.
    """
    if isinstance(teacher, PreTrainedModel):
        _check_given(teacher, student, config)
        return teacher, None
    try:  # tells a teacher that cannot be reached from one without a tokenizer
        load_config(teacher, **loading)
    except CheckpointError as error:
        raise CheckpointError(f"The teacher cannot be used: {error}") from error
    theirs = load_tokenizer(teacher, **loading) if with_tokenizer else None
    options = {"dtype": DTYPES[config.teacher_dtype]} if config.teacher_dtype in DTYPES else {}
    if config.teacher_dtype == "int8":
        need("bitsandbytes", extra="qlora")
        options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": student.device}}
    return load_model(teacher, **{**options, **loading}), theirs


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


def _tokens(
    own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase | None, sizes: list[int], name: str
) -> Reader | None:
    """How the tokens go together, `None` if they are the same; refuses tokenizers that have nothing to do with it."""
    if other is None:
        raise ConfigurationError(
            f"{name} has no tokenizer, so that it cannot be compared with the student's: save it there, or load the "
            "teacher yourself and give the model."
        )
    mine, theirs = own.get_vocab(), other.get_vocab()
    if mine == theirs:
        return None
    if (relation := related(own, other, sizes[1], sizes[0])) is not None:
        return Reader(relation, own, other)
    token = min((t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)), key=str)
    raise ConfigurationError(
        f"The tokenizers differ: {token!r} is {theirs.get(token, 'unknown')} in {name} and "
        f"{mine.get(token, 'unknown')} in the student's. {CROSS_TOKENIZER}"
    )


@dataclass(frozen=True)
class LayerTerms:
    """What is followed inside the layers: pairs `(layer of the student, of the teacher)`, and weights in the loss.

    These are by kind, `"hidden"` (outputs of layers) or `"attention"` (of their attention); others are not followed.
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
    """What the configuration wants to be followed, or `None`; layers must match and put out as many numbers."""
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
        outputs[name] = first_of(output)

    with hooked(module.register_forward_hook(partial(keep, name)) for name, module in modules.items()):
        yield outputs


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


# --------------------------------------------------------------------------------------------------- cache
# A folder holds `cache.json`, what it was made of, and parts: `keys` of the sequences (sequences, 16), their `lengths`
# (sequences), `ids` (tokens, k) and `log_probs` (tokens, k + 1), the rest last.

INDEX_NAME = "cache.json"
LOG_PROB_TYPE = torch.float16
BATCH_TOKENS = 2**12  # that the teacher reads at once while the cache is made, padding included
PART_TOKENS = 2**16  # in a file, at least; an interrupt loses no more


def sequence_key(ids: np.ndarray) -> bytes:
    """The name of a sequence: 16 bytes of a hash of its token ids."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int32).tobytes(), digest_size=16).digest()


class CachedTeacher:
    """A teacher without a model: predictions of sequences of token ids; of each, of all its tokens but the last one.

    Sequences are found by their token ids, so that shuffling, batching and padding do not matter; the examples in a
    padding-free batch count one by one. What there is must be of the same `origin`: fingerprint of the teacher's
    weights, `top_k` and `temperature`.
    """

    by_sequence, terms = False, None

    def __init__(self, folder: str | os.PathLike, origin: dict[str, Any], tokens: Reader | None = None) -> None:
        self.folder, self.origin, self.tokens = Path(folder), {"schema_version": 2, **origin}, tokens
        inside = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        if self.folder.is_file() or (inside and INDEX_NAME not in inside):
            raise ConfigurationError(f"`cache` is {folder}, which holds something else: give an empty or new folder.")
        if not inside:
            write_text(self.folder / INDEX_NAME, json.dumps(self.origin, indent=2) + "\n")
        found = read_json_object(self.folder / INDEX_NAME)
        for name, value in self.origin.items():
            if found.get(name) != value:
                raise ConfigurationError(
                    f"The cache in {folder} was made with {name} {found.get(name)}, and now it is {value}: give "
                    "another folder as `cache`, or delete this one."
                )
        self._places: dict[bytes, tuple[Any, int]] = {}  # file and first row of every sequence
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, "pt")
            keys, lengths = file.get_tensor("keys"), file.get_tensor("lengths")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): delete it, so that it is made anew.") from error
        for key, start in zip(keys, (lengths.cumsum(0) - lengths).tolist(), strict=True):
            self._places[key.numpy().tobytes()] = file, start

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def add(self, predictions: dict[bytes, tuple[Tensor, Tensor]]) -> None:
        """Adds a part: ids `(n, k)` and log-probabilities `(n, k + 1)` of sequences, all at once or not at all."""
        ids, log_probs = zip(*predictions.values(), strict=True)
        content = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(predictions), np.uint8).reshape(-1, 16).copy()),
            "lengths": torch.tensor([len(one) for one in ids]),
            "ids": torch.cat(ids).int(), "log_probs": torch.cat(log_probs).to(LOG_PROB_TYPE),
        }  # fmt: skip
        path = self.folder / f"{len(self._places):09}.safetensors"
        with appearing(path) as temporary:
            save_file(content, temporary)
        self._open(path)

    def lesson(self, inputs: Mapping[str, Tensor], positions: Tensor) -> Lesson:
        """What the teacher predicted at positions `(batch, sequence)` of bool; all sequences must be there."""
        top_k, wanted = self.origin["top_k"], positions.cpu()
        ids, log_probs = [torch.empty(0, top_k, dtype=torch.int32)], [torch.empty(0, top_k + 1)]
        for row, start, tokens in split_batch(inputs):
            here = wanted[row, start : start + len(tokens)].nonzero()[:, 0]
            if not len(here):
                continue
            file, first = self._places.get(sequence_key(tokens), (None, 0))
            if file is None:
                raise ConfigurationError(
                    f"A sequence is not in the cache {self.folder}: it holds the data that the trainer was made with, "
                    "so give data to evaluate on to the trainer at once."
                )
            rows = slice(first, first + len(tokens) - 1)
            ids.append(file.get_slice("ids")[rows][here])
            log_probs.append(file.get_slice("log_probs")[rows][here].float())
        known, values = torch.cat(ids).long(), torch.cat(log_probs).log_softmax(-1)  # rounded: adds up to 1 again
        return Lesson(TopPredictions(values.to(positions.device), known.to(positions.device)))


def cached_teacher(
    teacher: ModelTeacher, datasets: Iterable[Any], config: DistillationConfig, folder: str | os.PathLike
) -> CachedTeacher:
    """Lets a teacher run over the data, or reads what it said before; only what is not there yet is asked for.

    Rows are tokenised: `input_ids`, and `seq_lengths` where a row holds several examples.

    Raises:
        ConfigurationError: There is a cache of another teacher or of other settings in the folder.
        CheckpointError: A file cannot be read, or the disk has too little room.
    """
    top_k = min(config.top_k, teacher.model.config.get_text_config().vocab_size)
    origin = {"teacher": model_fingerprint(teacher.model), "top_k": top_k, "temperature": float(config.temperature)}
    if teacher.tokens is not None:
        top_k = origin["top_k"] = min(top_k, len(teacher.tokens.tokens.dense))
        origin["tokens"] = teacher.tokens.tokens.fingerprint
    sequences = {sequence_key(ids): ids for dataset in datasets for ids in _sequences_of(dataset) if len(ids) > 1}
    cache = CachedTeacher(folder, origin, teacher.tokens)
    missing = [key for key in sequences if key not in cache]
    missing.sort(key=lambda key: (-len(sequences[key]), key))  # little padding
    try:
        check_room(folder, sum(len(sequences[key]) - 1 for key in missing) * (6 * top_k + 2))
    except PlaceError as error:
        raise PlaceError(f"The cache of the teacher: {error} `top_k` is {top_k}; less needs less.") from error
    part: dict[bytes, tuple[Tensor, Tensor]] = {}
    tokens = 1 if teacher.by_sequence else BATCH_TOKENS
    with tqdm(total=len(missing), desc="Teacher", disable=not missing) as progress:
        while missing:
            size = max(1, tokens // len(sequences[missing[0]]))
            batch, missing = missing[:size], missing[size:]
            found = _predict(teacher, [sequences[key] for key in batch], top_k, config.temperature)
            part |= dict(zip(batch, found, strict=True))
            if not missing or sum(len(ids) for ids, _ in part.values()) >= PART_TOKENS:
                cache.add(part)
                part = {}
            progress.update(len(batch))
    return cache


def _sequences_of(dataset: Any) -> Iterator[np.ndarray]:
    columns = getattr(dataset, "column_names", None)
    if not hasattr(dataset, "__len__") or not columns or "input_ids" not in columns:
        raise ConfigurationError("`cache` needs a data set of known length with tokens in it; leave `cache` out.")
    packed = "seq_lengths" in columns
    for row in dataset.select_columns(["input_ids", "seq_lengths"] if packed else ["input_ids"]):
        ids = np.asarray(row["input_ids"], dtype=np.int32)
        yield from np.split(ids, np.cumsum(row["seq_lengths"])[:-1]) if packed else [ids]


@torch.no_grad()
def _predict(
    teacher: ModelTeacher, part: list[np.ndarray], top_k: int, temperature: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Top predictions of each sequence of a batch, a few positions at a time."""
    lengths = torch.tensor([len(tokens) for tokens in part])
    ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(tokens).long() for tokens in part], batch_first=True)
    places = torch.arange(ids.shape[1])
    mask, positions = places < lengths[:, None], places < lengths[:, None] - 1
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    known = teacher.lesson(inputs, positions.to(teacher.model.device)).predictions
    step = positions_at_once(known.head.width(known.hidden))
    rows = (slice(start, start + step) for start in range(0, len(known.hidden), step))
    parts = [top_predictions(known.logits(some), top_k, temperature) for some in rows]
    columns = (torch.cat([getattr(one, name).cpu() for one in parts]) for name in ("ids", "log_probs"))
    return zip(*(column.split((lengths - 1).tolist()) for column in columns), strict=True)
