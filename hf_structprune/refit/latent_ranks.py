"""Smaller latents: turn each into the directions that matter most to its readers, cut the others, re-fit those.

The text passes the layers one after the other. In each, the norm's weights go into the readers, the latent is turned
(see `latent_basis`), the directions that go are zeroed, and each reader is re-fitted to its own output before
(and, with error correction, to its output in the dense model). All layers are then cut at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..errors import ConfigurationError
from ..model.groups import matrix
from ..model.latent_ranks import Latent, latents, rebuild_ranks, silence, smaller_ranks, turn
from ..model.structure import ModelStructure
from ..progress import tqdm
from ..stats.moments import InputStatistics
from ..stats.stream import LayerStream
from ..units import KINDS
from .reader import consume, refitted, write_columns


_BY_WEIGHTS = "magnitude"
States = list[torch.Tensor]  # one tensor of shape (sequences, length, d) for each batch


@torch.no_grad()
def cut_ranks(
    kind: str, model: PreTrainedModel, structure: ModelStructure, keep: int, config: PruningConfig,
    tokens: torch.Tensor | None, kept: torch.Tensor | None = None,
) -> tuple[PreTrainedModel, None]:  # fmt: skip
    """The model with latents of `keep` directions; the dense one is taken apart and of no use any more.

    Args:
        kind: `"q_ranks"` or `"kv_ranks"`.
        keep: Directions that stay, less than there are.
        tokens: Shape (sequences, length). `None` will do for `"magnitude"` without compensation.
        kept: Has to be `None`.

    Returns:
        The smaller model in eval mode, and `None`: its directions are combinations of the dense model's.

    Raises:
        ConfigurationError: `keep` does not fit the model, or tokens are needed and there are none.
        UnsupportedModelError: The latents of this model cannot be made smaller.
        CheckpointError: No configuration class takes such a rank.
    """
    KINDS[kind].check_kept(kept)
    if config.compensation and tokens is None:
        raise ConfigurationError("Re-fitting needs calibration tokens: give them, or set compensation=False.")
    target, found = smaller_ranks(kind, model, structure, keep), latents(kind, model, structure)
    if keep == found[0].group.size:
        raise ConfigurationError(
            f"The {KINDS[kind].label} after pruning is {keep}, the model's own; give a smaller one."
        )
    if tokens is None and config.latent_criterion != _BY_WEIGHTS:
        raise ConfigurationError("The latent criterion 'outputs' looks at calibration text, and there is none.")
    if tokens is None:
        for latent in found:
            turn(model, latent, _basis_of_weights(model, latent))
    else:
        _Ranks(model, structure, found, keep, config, tokens).run()
    return rebuild_ranks(model, target, found, keep), None


@torch.no_grad()
def mask_ranks(kind: str, model: PreTrainedModel, structure: ModelStructure, keep: int) -> Iterator[str]:
    """Does to a model what `cut_ranks` does by weights alone, but with zeros, in place: the reference that it equals.

    Yields:
        `"turned"` when the latents are in other bases and nothing is zero, then `"masked"`.
    """
    found = latents(kind, model, structure)
    for latent in found:
        turn(model, latent, _basis_of_weights(model, latent))
    yield "turned"
    for latent in found:
        silence(model, latent, keep)
    yield "masked"


def _basis_of_weights(model: PreTrainedModel, latent: Latent) -> torch.Tensor:
    """The basis for inputs of which all directions are alike: `A A^T` in the place of second moments."""
    size = latent.group.size
    turn(model, latent, torch.eye(size))
    writer = matrix(model.get_submodule(latent.writer))[:size].double()
    return latent_basis(writer @ writer.T, _products(model, latent))


def _products(model: PreTrainedModel, latent: Latent) -> torch.Tensor:
    """`B^T B`, summed over what reads a latent."""
    readers = [matrix(model.get_submodule(name)).double() for name in latent.readers]
    return sum(reader.T @ reader for reader in readers)


def latent_basis(moments: torch.Tensor, reader: torch.Tensor) -> torch.Tensor:
    """An orthogonal basis of latents, whose first directions lose least of what reads them; of any number of these.

    With second moments `C = E[z z^T]` of normalised latents and `A = B^T B`, what a map of rank `k` can give best of
    `B z` is `B z'` with `z' = C^1/2 V V^T C^-1/2 z`, where `V` are the first `k` eigenvectors of `C^1/2 A C^1/2`
    (MoDeGPT, https://huggingface.co/papers/2408.09632, algorithm 3). Such `z'` are in the space of `C^1/2 V`, onto
    which latents are projected: it holds no directions that latents do not have, so that little is missing in the mean
    of the norm. (The rows of `V^T C^-1/2` may hold such: they are as good where no norm stands in between.)

    Args:
        moments: `C`, shape (rank, rank).
        reader: `A`, shape (rank, rank).

    Returns:
        Shape (rank, rank), float64, the directions as columns.
    """
    values, vectors = torch.linalg.eigh(moments.double())
    root = vectors * values.clamp_min(1e-9 * float(values[-1].clamp_min(1e-300))).sqrt() @ vectors.T
    best = torch.linalg.eigh(root @ reader.to(root) @ root).eigenvectors.flip(1)
    return torch.linalg.qr(root @ best).Q


class _Ranks:
    """Turns, cuts (by zeros) and re-fits the latents of a model on calibration text, in place."""

    def __init__(self, model, structure, found, keep, config, tokens) -> None:
        self.model, self.layers, self.keep, self.config = model, structure.layers, keep, config
        self.stream = LayerStream(model, structure, tokens, config.calibration.batch_size)
        self.found = {layer.index: [one for one in found if one.group.layer == layer.index] for layer in self.layers}
        correcting = config.compensation and config.error_correction > 0
        self.before: States = self.stream.copy(self.stream.hidden) if correcting else []  # of the dense model

    def run(self) -> None:
        last = max(index for index, own in self.found.items() if own)
        for layer in tqdm(self.layers[: last + 1], desc="Pruning"):
            index, dense = layer.index, {}
            self.stream.enter(index)
            if self.before:
                readers = [name for latent in self.found[index] for name in latent.readers]
                self.before = self.stream.placed(index, self.before)
                dense = self.stream.carry(index, self.before, outputs_of=readers)
            for latent in self.found[index]:
                self._latent(index, latent, dense)
            if index < last:
                self.stream.advance(index)

    def _latent(self, index: int, latent: Latent, dense: dict[str, States]) -> None:
        size, keep, capture = latent.group.size, self.keep, self.stream.capture
        basis = _basis_of_weights(self.model, latent)  # its norm has no weights now
        inputs = {name: capture(index, name) for name in latent.readers}
        if self.config.latent_criterion != _BY_WEIGHTS:
            first = inputs[latent.readers[0]]
            statistics = InputStatistics(size, True, 0, first[0].device)
            for x in first:
                statistics.update(x)
            basis = latent_basis(statistics.gram, _products(self.model, latent))
        turn(self.model, latent, basis)
        silence(self.model, latent, keep)
        for name in latent.readers if self.config.compensation else ():
            self._reader(name, [x @ basis.to(x) for x in inputs[name]], capture(index, name), dense.get(name))

    def _reader(self, name: str, whole: States, left: States, dense: States | None) -> None:
        """Re-fits what reads a latent that is `left` to what it gave for the `whole`."""
        module = self.model.get_submodule(name)
        outputs, size = matrix(module).shape
        statistics, every = InputStatistics(size, True, outputs, left[0].device), torch.arange(size)
        for number, (before, after) in enumerate(zip(whole, left, strict=True)):
            wanted = consume(module, before, every).float()
            if dense is not None:
                wanted += self.config.error_correction * (dense[number].float() - wanted)
            statistics.update(after, wanted - consume(module, after, every).float())
        columns = every[: self.keep]
        write_columns(module, refitted(module, statistics, columns, self.config), columns)
