"""Rows of text and images as the layers of a text decoder get them from the whole model that sees."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CalibrationError, UnsupportedModelError
from ..hooks import first_of, hooked
from ..model.measuring import check_numbers, context_length, measures
from ..model.structure import ModelStructure
from ..progress import tqdm


# Largest difference of hidden states, relative to their norm, that the rounding of the same sums explains.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_LOW_PRECISION = 2e-2

Arguments = list[tuple[tuple, dict[str, Any]]]  # of each layer, but for hidden states


@dataclass
class SeenRow:
    """One row, a batch of its own.

    Attributes:
        ids: Token ids that the decoder has embeddings for, shape (1, length).
        hidden: What enters the first layer, shape (1, length, H).
        arguments: What else each layer gets: masks, position embeddings.
        added: What the decoder adds behind layers, by their numbers: positions, and values of shape (positions, H).
        pictures: Which positions hold no text, shape (1, length).
    """

    ids: torch.Tensor
    hidden: torch.Tensor
    arguments: Arguments
    added: dict[int, tuple[torch.Tensor, torch.Tensor]]
    pictures: torch.Tensor

    def behind(self, index: int, output: torch.Tensor) -> torch.Tensor:
        """What the next layer gets when layer `index` puts this out."""
        if index not in self.added:
            return output
        positions, values = self.added[index]
        return output.index_add(1, positions, values[None].to(output))

    @property
    def targets(self) -> torch.Tensor:
        """The tokens that follow those before the last, -100 where that is no text; shape (1, length - 1)."""
        return self.ids[:, 1:].masked_fill(self.pictures[:, 1:], -100)


class SeenRows:
    """Rows of different lengths; they stand where token ids of shape (sequences, length) do.

    Args:
        rows: The rows.
        layers: Names of the decoder's layers.
    """

    def __init__(self, rows: Sequence[SeenRow], layers: Sequence[str]) -> None:
        self.rows, self.layers = list(rows), list(layers)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: slice | torch.Tensor) -> SeenRows:
        if isinstance(chosen, slice):
            return SeenRows(self.rows[chosen], self.layers)
        there = zip(self.rows, chosen.tolist(), strict=True)
        return SeenRows([row for row, wanted in there if wanted], self.layers)

    def numel(self) -> int:
        """Positions of all rows."""
        return sum(row.ids.numel() for row in self.rows)


Calibration = torch.Tensor | SeenRows  # token ids of shape (sequences, length), or rows with images


def few_tokens(calibration: Calibration) -> torch.Tensor:
    """Two tokens of the first sequence, shape (1, 2): enough to see in what form modules return something."""
    return calibration.rows[0].ids[:, :2] if isinstance(calibration, SeenRows) else calibration[:1, :2]


class _Stop(Exception):
    """Ends a forward pass behind the last layer."""


@measures
def see(
    model: PreTrainedModel, decoder: PreTrainedModel, structure: ModelStructure, rows: Sequence[dict[str, Any]]
) -> SeenRows:
    """Runs a whole model on rows and keeps what the layers of its text decoder get; neither is changed.

    Args:
        model, decoder, structure: The whole model, its text decoder alone, and the structure of that.
        rows: Arguments of the model, as its processor makes them, a batch of one each.

    Raises:
        CalibrationError: A row is longer than the model's context, or too short to predict a token.
        UnsupportedModelError: The decoder alone, given what its layers get in the whole, does not compute the same;
            or pictures do not come to it in the place of tokens.
    """
    towers, found, tried = structure.towers, [], set()
    inner = [model.get_submodule(towers.place(layer.name)) for layer in structure.layers]
    layers = [decoder.get_submodule(layer.name) for layer in structure.layers]
    device, name, most = model.get_input_embeddings().weight.device, type(model).__name__, context_length(model)
    for number, row in enumerate(tqdm(rows, desc="Seeing")):
        values = {key: _placed(value, device, model.dtype) for key, value in row.items()}
        length = values["input_ids"].shape[1]
        if length < 2 or length > (most or length):
            raise CalibrationError(
                f"Calibration row {number} is {length} tokens long with its pictures; the model takes 2 to "
                f"{most or 'any number'}: leave it out, or shorten it."
            )
        seeing = any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in row.values())
        run = _Run(inner, keep=seeing not in tried)
        try:
            run(model, values)
        except ValueError as error:  # by which models refuse pictures that have no place among the tokens
            raise CalibrationError(f"Calibration row {number} is refused by {name}: {error}") from error
        check_numbers(run.output, f"The hidden states of calibration row {number}")
        ids = values["input_ids"].clamp(0, decoder.get_input_embeddings().weight.shape[0] - 1)
        pictures = (run.inputs[0] != _as_text(decoder, layers[0], ids)).any(-1)
        if seeing != bool(pictures.any()):
            what = "pictures come to it" if seeing else "text comes to it"
            raise UnsupportedModelError(
                f"The text decoder of {name} is not understood: {what} in another way than in the place of tokens, "
                "so that it cannot be calibrated on rows with pictures. Calibrate it on text."
            )
        if run.added and not towers.deep:
            raise UnsupportedModelError(
                f"{name} changes hidden states between the layers of its text decoder in a way that is not known, so "
                "that it cannot be calibrated on rows with pictures. Calibrate it on text."
            )
        if seeing not in tried:
            tried.add(seeing)
            _check_alone(name, layers, run)
        found.append(SeenRow(ids, run.inputs[0], run.arguments, run.added, pictures))
    return SeenRows(found, [layer.name for layer in structure.layers])


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


class _Run:
    """What the layers of a decoder get in a run of the whole model.

    Attributes:
        inputs, outputs: Hidden states that each gets and puts out; without `keep` only what the first gets.
        arguments: What else each gets.
        added: What is added to the hidden states behind layers, as in `SeenRow`.
        output: What the last one puts out.
    """

    def __init__(self, layers: list[nn.Module], keep: bool) -> None:
        self._layers, self._keep = layers, keep
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.arguments: Arguments = []
        self.added: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.output: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, values: dict[str, Any]) -> None:
        handles = [layer.register_forward_pre_hook(self._before, with_kwargs=True) for layer in self._layers]
        handles += [layer.register_forward_hook(self._after) for layer in self._layers]
        with hooked(handles), suppress(_Stop):
            model(**values, use_cache=False)

    def _before(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.output is not None and not torch.equal(hidden, self.output):
            difference = (hidden - self.output)[0]
            positions = difference.abs().amax(-1).nonzero().flatten()
            self.added[len(self.arguments) - 1] = positions, difference[positions]
        if self._keep or not self.inputs:
            self.inputs.append(hidden.clone())  # some decoders add to it in place
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if "attention_mask" in others and others["attention_mask"] is None and _sees_all(layer):
            length = hidden.shape[1]
            others["attention_mask"] = hidden.new_zeros(1, 1, length, length)  # the layer alone looks back only
        self.arguments.append((args[1:], others))

    def _after(self, layer: nn.Module, _: Any, output: Any) -> None:
        self.output = first_of(output).clone()
        if self._keep:
            self.outputs.append(self.output)
        if layer is self._layers[-1]:
            raise _Stop


def _sees_all(layer: nn.Module) -> bool:
    """Whether a layer's attention looks at what follows, where no mask forbids it."""
    return any(getattr(module, "is_causal", True) is False for module in layer.modules())


@torch.no_grad()
def _as_text(decoder: PreTrainedModel, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What enters the first layer where nothing is seen."""
    entering = []

    def stop(_, args, kwargs):
        entering.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    with layer.register_forward_pre_hook(stop, with_kwargs=True), suppress(_Stop):
        decoder.base_model(input_ids=ids, use_cache=False)
    return entering[0]


@torch.no_grad()
def _check_alone(name: str, layers: list[nn.Module], run: _Run) -> None:
    """Refuses a decoder whose layers alone do not put out what they do in the whole model."""
    for index, (layer, hidden, expected) in enumerate(zip(layers, run.inputs, run.outputs, strict=True)):
        args, kwargs = run.arguments[index]
        got = first_of(layer(hidden, *args, **kwargs))
        difference = float((got.double() - expected.double()).norm() / expected.double().norm())
        if not difference <= _TOLERANCE.get(expected.dtype, _LOW_PRECISION):
            raise UnsupportedModelError(
                f"Layer {index} of the text decoder of {name} puts out something else alone than in the whole model "
                f"(by {difference:.2g} of it), so that it cannot be calibrated on rows with pictures. Calibrate it on "
                "text."
            )
