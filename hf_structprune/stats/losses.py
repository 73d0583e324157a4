"""How well a model predicts the calibration text without some of its layers and sublayers."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from ..allocation.removal import Removal, Unit
from ..hooks import Silencer
from ..model.measuring import context_length, positions_at_once
from ..model.structure import ModelStructure
from ..progress import tqdm
from ..units import LAYERS, DepthKind, kinds_of
from .seen import Calibration, SeenRows, few_tokens
from .stream import LayerStream


# Sequences of the calibration text that are used: every candidate costs half a forward pass on average. At the default
# length these are 4096 tokens, three times what Shortened-LLM ranks blocks on (10 x 128).
SEQUENCES = 16
# Neighbouring sequences are joined up to so many tokens: which layers can go depends on how much has been read. Of two
# sets of 4 layers of SmolLM2-135M, one was 10 % better in perplexity on sequences of 256 tokens, and 1 % better on the
# same tokens in windows of 2048; on whole articles of WikiText-2 it was 2 % worse.
WINDOW = 2048

Gone = dict[str, set[int]]  # see `Removal.gone`


def joined(tokens: torch.Tensor, context: int | None = None) -> torch.Tensor:
    """Neighbouring sequences joined to windows of at most `WINDOW` tokens, more than half as long, that use the most.

    `context` is the longest window that the model takes. Sequences that do not fill one more window are left out.
    """
    sequences, length = tokens.shape
    most = min(max(1, min(WINDOW, context or WINDOW) // length), sequences)
    together = max(range(most // 2 + 1, most + 1), key=lambda number: (sequences // number * number, number))
    return tokens[: sequences // together * together].reshape(-1, together * length)


class TextLoss:
    """Mean next-token loss (log-perplexity, nats) of the calibration text with parts of the model removed.

    The hidden states in front of a layer do not depend on whether it goes. They are carried along, and only what
    follows a candidate is run again: all single removals of `L` layers cost about `L / 2` forward passes.

    Of the tokens the first `SEQUENCES` are used, see `joined`; of rows with images as many rows, and pictures are not
    predicted. The model, in eval mode, is left as it is.
    """

    def __init__(self, model: PreTrainedModel, structure: ModelStructure, tokens: Calibration, batch_size: int = 8):
        windows = tokens[:SEQUENCES]
        if not isinstance(tokens, SeenRows):
            windows = joined(windows, context_length(model))
            batch_size = max(1, batch_size * tokens.shape[1] // windows.shape[1])
        self.structure = structure
        self._silencer = Silencer(model, structure, few_tokens(windows))
        self._stream = LayerStream(model, structure, windows, batch_size)
        self._entered = self._stream.copy(self._stream.hidden)
        numbers = range(len(self._stream.batches))
        self._positions = sum(int((self._stream.targets(number) >= 0).sum()) for number in numbers)
        self._vocabulary = model.get_input_embeddings().weight.shape[0]

    def of(self, gone: Gone) -> float:
        """The loss with these layers and sublayers removed."""
        self._stream.hidden = self._stream.copy(self._entered)
        return self._loss(0, gone)

    def scan(self, removal: Removal, candidates: list[Unit], description: str) -> tuple[dict[Unit, float], float]:
        """The losses when one candidate goes on top of what has gone, and the loss when none does."""
        gone = removal.gone()
        losses = self._each(gone, {unit: removal.gone([unit]) for unit in candidates}, description)
        return losses, self._loss(max(layer for layer, _ in candidates), gone)

    def put_back(self, removal: Removal, candidates: list[Unit], description: str) -> dict[Unit, float]:
        """The losses when one of those that have gone comes back."""
        return self._each(removal.gone(), {unit: removal.without(unit).gone() for unit in candidates}, description)

    def _each(self, gone: Gone, trials: dict[Unit, Gone], description: str) -> dict[Unit, float]:
        """The loss of each trial; the states in front of its unit, where `gone` holds for all, are computed once."""
        stream, losses = self._stream, {}
        stream.hidden = stream.copy(self._entered)
        last = max(layer for layer, _ in trials)
        with tqdm(total=len(trials), desc=description) as bar:
            for index in range(last + 1):
                stream.enter(index)
                for unit in (unit for unit in trials if unit[0] == index):
                    losses[unit] = self._loss(index, trials[unit])
                    bar.update()
                if index != last and index not in gone[LAYERS]:
                    with self._silenced(index, gone):
                        stream.advance(index)
        return losses

    def _silenced(self, index: int, gone: Gone):
        """Sublayers that are gone from layer `index` on add nothing as long as this is open."""
        layers, kinds = self.structure.layers[index:], kinds_of(DepthKind, sublayer=True)
        layers = [layer for layer in layers if layer.index not in gone[LAYERS]]
        return self._silencer.silenced(one.sublayer(k) for one in layers for k in kinds if one.index in gone[k])

    @torch.no_grad()
    def _loss(self, index: int, gone: Gone) -> float:
        """The loss when the hidden states enter layer `index`; infinite if it is not a number."""
        total = 0.0
        with self._silenced(index, gone):
            for number, batch in enumerate(self._stream.batches):
                states = self._stream.outputs(index, number, skip=gone[LAYERS])
                total += self._batch_loss(states, batch, self._stream.targets(number))
        return total / self._positions if math.isfinite(total) else math.inf

    def _batch_loss(self, states: torch.Tensor, ids: torch.Tensor, following: torch.Tensor) -> float:
        """Summed loss of a batch, a few positions at a time: float32 logits of all would need the most memory."""
        total, chunk = 0.0, max(1, positions_at_once(self._vocabulary) // len(ids))
        for begin in range(0, ids.shape[1] - 1, chunk):
            end = min(begin + chunk, ids.shape[1] - 1)
            logits = self._stream.head(states[:, begin:end], ids[:, begin:end]).float().flatten(0, 1)
            targets = following[:, begin:end].flatten().to(logits.device)
            total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
        return total
