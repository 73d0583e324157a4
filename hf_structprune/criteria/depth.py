"""Criteria for layers and sublayers: what they change in the residual stream, and what their weights say.

How much the loss rises without them is in `stats.losses`.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ..allocation.removal import Unit
from ..config import PruningConfig
from ..errors import ConfigurationError, RatioError
from ..files.writing import write_text
from ..hooks import Silencer
from ..model.measuring import check_numbers, measures
from ..model.store import Store
from ..model.structure import LayerStructure, ModelStructure
from ..progress import tqdm
from ..stats.gradients import weight_changes
from ..stats.seen import Calibration, few_tokens
from ..stats.stream import LayerStream, read_in_turn
from ..units import LAYERS, DepthKind, kinds_of
from .base import Method, Paper


@measures
def layer_similarities(
    model: PreTrainedModel, structure: ModelStructure, tokens: Calibration, *,
    batch_size: int = 8, sublayers: bool = False, store: Store | None = None,
) -> LayerSimilarities:  # fmt: skip
    """Compares the residual stream at all positions, in one pass over the text; the model is left as it is.

    Position `i` is what enters layer `i`; position `L` is what leaves the last layer, before the final norm.

    * Angular distance `arccos(cos(h_i, h_j)) / pi` of the last token of each sequence, averaged over the sequences,
      for every pair of positions (Gromov et al. 2024, arXiv 2403.17887, eq. 8).
    * Block influence `1 - mean cos(h_i, h_(i+1))` over all tokens (ShortGPT, Men et al. 2024, arXiv 2403.03853).

    A sublayer is measured in the same way between the stream before and after it. In between a layer's attention and
    its MLP the stream is what the layer returns if its MLP adds nothing: exact in layers that add one after the
    other, whether or not they scale or norm what they add; layers with both side by side are taken to add the
    attention first. This runs every attention twice.

    Args:
        tokens: Token ids, shape (sequences, length), without padding, or rows with images.
        sublayers: Measure attentions and MLPs too.
        store: Where the weights are; one layer at a time is read.
    """
    store, silencer = store or Store(), None
    if sublayers:
        with read_in_turn(model, structure, store):
            silencer = Silencer(model, structure, few_tokens(tokens))
    stream = LayerStream(model, structure, tokens, batch_size, store)

    def last_tokens() -> torch.Tensor:
        return torch.cat([state[:, -1].flatten(1) for state in stream.hidden]).cpu()

    positions = [last_tokens()]
    cosines: dict[Unit, float] = defaultdict(float)  # summed over all tokens
    angles: dict[Unit, float] = defaultdict(float)  # of the last tokens, summed over the sequences
    for layer in tqdm(structure.layers, desc="Distances"):
        with store.holding(layer.index):
            stream.enter(layer.index)
            for number, before in enumerate(stream.hidden):
                after = stream.outputs(layer.index, number, last=layer.index)
                ends = {LAYERS: (before, after)}
                if silencer is not None:
                    ends.update(_around_sublayers(stream, silencer, layer, number, after))
                for kind, (a, b) in ((kind, (a.flatten(2), b.flatten(2))) for kind, (a, b) in ends.items()):
                    all_tokens = cosine_similarity(a.float(), b.float(), dim=-1).clamp(-1.0, 1.0)
                    cosines[layer.index, kind] += float(all_tokens.sum(dtype=torch.float64))
                    last = cosine_similarity(a[:, -1].double(), b[:, -1].double(), dim=-1)
                    angles[layer.index, kind] += float(angular_distance(last).sum())
                before.copy_(after)
        positions.append(last_tokens())
    return LayerSimilarities(
        _mean_distances(positions),
        {unit: total / len(tokens) for unit, total in angles.items()},
        {unit: 1.0 - total / tokens.numel() for unit, total in cosines.items()},
    )


def angular_distance(cosines: torch.Tensor) -> torch.Tensor:
    """`arccos(cos) / pi`, 0 to 1; rounding beyond [-1, 1] is cut off."""
    return cosines.clamp(-1.0, 1.0).arccos() / math.pi


def _around_sublayers(
    stream: LayerStream, silencer: Silencer, layer: LayerStructure, number: int, after: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The stream before and after each sublayer of a layer, for one batch."""
    attention, mlp = map(layer.sublayer, kinds_of(DepthKind, sublayer=True))
    known = mlp or attention  # with the attention alone, the layer with it is compared with the layer without it
    if known is None:
        return {}
    with silencer.silenced([known]):
        without = stream.outputs(layer.index, number, last=layer.index)
    ends = {known.kind: (without, after)}
    if mlp is not None and attention is not None:
        ends[attention.kind] = stream.hidden[number], without
    return ends


def _mean_distances(positions: list[torch.Tensor]) -> torch.Tensor:
    """Mean angular distances between positions, one sequence at a time; float64, exactly 0 of each to itself."""
    total = torch.zeros(len(positions), len(positions), dtype=torch.float64)
    for sequence in zip(*positions, strict=True):
        unit = nn.functional.normalize(torch.stack(sequence).double(), dim=-1)
        total += angular_distance(unit @ unit.T)
    return (total / len(positions[0])).fill_diagonal_(0.0)


Block = tuple[int, int, float]  # first layer, the layer behind the last, distance


@dataclass
class LayerSimilarities:
    """What `layer_similarities` found.

    Attributes:
        angular: Mean angular distance between the positions `i` and `j` of the residual stream, 0 to 1, shape
            (layers + 1, layers + 1), float64. Position `i` is what enters layer `i`.
        distances: Angular distance between the two ends of each layer, and of each sublayer if asked for.
        influences: Block influence of the same.
    """

    angular: torch.Tensor
    distances: dict[Unit, float]
    influences: dict[Unit, float]

    @property
    def num_layers(self) -> int:
        return len(self.angular) - 1

    def blocks(self, size: int, allowed: Collection[int] | None = None) -> list[Block]:
        """All blocks of `size` neighbouring layers as `(start, end, distance)`; the layers `start` to `end - 1` go.

        Layer 0 is in none of them, as in PruneMe; `allowed` are the layers that may be, default all others.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"The block size is {size!r}; it must be a whole number, 1 or more.")
        allowed = set(range(self.num_layers) if allowed is None else allowed)
        return [
            (start, start + size, float(self.angular[start, start + size]))
            for start in range(1, self.num_layers - size + 1)
            if allowed.issuperset(range(start, start + size))
        ]

    def best_block(self, size: int, allowed: Collection[int] | None = None) -> Block:
        """The block with the least distance, the lowest of equal ones; a `RatioError` says if there is none."""
        blocks = self.blocks(size, allowed)
        if not blocks:
            longest = max((n for n in range(1, size) if self.blocks(n, allowed)), default=0)
            raise RatioError(
                f"{size} neighbouring layers are to go, but at most {longest} can: layer 0 stays, and so do layers "
                "that are protected or not named."
            )
        return min(blocks, key=lambda block: (block[2], block[0]))

    def to_csv(self, path: str | os.PathLike, size: int | None = None) -> None:
        """Writes the distances of blocks as PruneMe does: `block_start,block_end,average_distance`.

        PruneMe reads the last position from Transformers' `hidden_states`, where it stands behind the final norm;
        here it is in front of it, as in the paper. Only rows that end behind the last layer differ by that. `size`:
        only blocks of so many layers, as in PruneMe's file.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(("block_start", "block_end", "average_distance"))
        for n in range(1, self.num_layers) if size is None else (size,):
            writer.writerows(self.blocks(n))
        write_text(path, text.getvalue())


def unit_matrices(model: nn.Module, structure: ModelStructure, unit: Unit) -> dict[str, nn.Parameter]:
    """The weights of the linear maps of a layer or sublayer by full name, routers and stacked experts too."""
    layer, kind = structure.layers[unit[0]], unit[1]
    modules = (layer.name,) if kind == LAYERS else layer.sublayer(kind).modules
    return {
        f"{module}.{name}": parameter
        for module in modules
        for name, parameter in model.get_submodule(module).named_parameters()
        if parameter.ndim >= 2
    }


@torch.no_grad()
def magnitude_scores(
    model: PreTrainedModel, structure: ModelStructure, units: Iterable[Unit], store: Store | None = None
) -> dict[Unit, float]:
    """`sum |w|` over the linear weights of each unit (Shortened-LLM, Kim et al. 2024, arXiv 2402.02834, Mag)."""
    units, scores, store = list(units), {}, store or Store()
    for layer in dict.fromkeys(number for number, _ in units):
        with store.holding(layer):
            members = {unit: unit_matrices(model, structure, unit) for unit in units if unit[0] == layer}
            weights = {name: weight for of_unit in members.values() for name, weight in of_unit.items()}
            totals = {name: float(weight.abs().sum(dtype=torch.float64)) for name, weight in weights.items()}
            scores |= {unit: sum(totals[name] for name in names) for unit, names in members.items()}
    return {unit: scores[unit] for unit in units}


def taylor_scores(
    model: PreTrainedModel, structure: ModelStructure, units: Iterable[Unit], tokens: Calibration,
    config: PruningConfig,
) -> dict[Unit, float]:  # fmt: skip
    """`sum |w g|` over the linear weights of each unit (Shortened-LLM, arXiv 2402.02834, Taylor).

    `g` is the gradient of a batch's mean next-token loss, and the sums of all batches are averaged, as in
    `gradients.taylor_salience`.
    """
    members = {unit: unit_matrices(model, structure, unit) for unit in units}
    weights = {name: weight for of_unit in members.values() for name, weight in of_unit.items()}
    totals = {name: torch.zeros((), dtype=torch.float64) for name in weights}

    def add(name: str, change: torch.Tensor, share: float) -> None:
        totals[name] += share * change.sum(dtype=torch.float64).cpu()

    weight_changes(model, weights, tokens, config, add)
    for name, total in totals.items():
        check_numbers(total, f"The gradients of `{name}`")
    return {unit: float(sum(totals[name] for name in names)) for unit, names in members.items()}


# Those that look at one layer after the other, in one pass of the text or without any.
LAYER_BY_LAYER = ("angular", "block_influence", "magnitude")

METHODS = {
    "angular": Method((Paper("gromov2025unreasonable"),)),
    "block_influence": Method((Paper("men2024shortgpt"),)),
    **{
        name: Method((Paper("kim2024shortened"),), name != "magnitude")
        for name in ("perplexity", "taylor", "magnitude")
    },
    **{name: Method((Paper("song2024sleb"),)) for name in ("greedy", "exchange")},
}
