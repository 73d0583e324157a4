"""Following the teacher inside the layers too: hidden states and attention outputs of layers that still match.

    term = 1 / (layers * n_followed) sum over layers and followed tokens of ||h_s - h_t||^2 / ||h_t||^2

Mean squared errors between hidden states of matching layers are used by TinyBERT (Jiao et al., arXiv:1909.10351) and
Minitron (Muralidharan et al., arXiv:2407.14679); DistilBERT (Sanh et al., arXiv:1910.01108) takes their cosine. Here
the error of each token is relative to the teacher's own norm, because a few tokens have norms hundreds of times larger
than the others (Sun et al., Massive Activations, arXiv:2402.17762) and would be all that the mean shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ConfigurationError
from ...model.families import family_of
from ...model.structure import decoder_layers
from ..configuration import DistillationConfig


KINDS = ("hidden", "attention")


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

    def student_modules(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """Modules whose outputs are compared, by the name of their state."""
        return self._modules(model, [(pair[0], pair[0]) for pair in self.pairs])

    def teacher_modules(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """The same in the teacher, under the same names."""
        return self._modules(model, self.pairs)

    def _modules(self, model: PreTrainedModel, pairs: Iterable[tuple[int, int]]) -> dict[str, nn.Module]:
        layers, attention = _layers_of(model)
        return {
            f"{kind}.{name}": layers[index] if kind == "hidden" else layers[index].get_submodule(attention)
            for name, index in pairs
            for kind in self.weights
        }

    def errors(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
        """Relative squared errors by kind, summed over tokens and averaged over layers.

        Args:
            student: States `(n, hidden)` of the followed tokens by name.
            teacher: The same of the teacher.
        """
        sums: dict[str, Tensor] = {}
        for name, state in student.items():
            kind = name.partition(".")[0]
            error = relative_error(state, teacher[name]).sum() / len(self.pairs)
            sums[kind] = sums[kind] + error if kind in sums else error
        return sums


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
    counts = [len(_layers_of(model)[0]) for model in (student, teacher)]
    pairs = match_layers(*counts, config.layer_map)
    if "attention" in weights:
        pairs = _with_attention(pairs, student, teacher)
    return LayerTerms(pairs, weights)


def match_layers(student: int, teacher: int, layer_map: Sequence[int] | None) -> tuple[tuple[int, int], ...]:
    """Which layer of the teacher each layer of the student follows.

    With a map, what it says; without one, the layer of the same number, or only the last one if layers are missing.

    Args:
        student: Layers of the student.
        teacher: Layers of the teacher.
        layer_map: For each layer of the student, the number of the teacher's, from 0.

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

    def hook_of(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
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


def _with_attention(pairs, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """Pairs of layers that both have an attention; some layers may have lost it."""
    sides = [_layers_of(model) for model in (student, teacher)]

    def has(side: int, index: int) -> bool:
        layers, path = sides[side]
        return path is not None and any(name == path for name, _ in layers[index].named_modules())

    kept = tuple((own, other) for own, other in pairs if has(0, own) and has(1, other))
    if not kept:
        raise ConfigurationError(
            f"No attention was found in the matching layers of {type(student).__name__}: set `attention_weight` to 0."
        )
    return kept
