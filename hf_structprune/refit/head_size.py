"""Smaller heads: choose pairs of queries and keys, turn the values, cut both, re-fit what reads the values.

Queries and keys lose whole pairs, the same in all layers and heads. What the pairs that stay cannot say any more is
made up for by a factor for each pair of each head, which commutes with the rotation, see `pair_factors`. Values and
the columns of `o_proj` that read them may be written in any basis of each KV head; they lose the directions that
matter least to the outputs, see `value_basis`. Then `o_proj` is re-fitted as for heads that go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..criteria.pairs import PairLosses, pair_losses
from ..errors import ConfigurationError, UnsupportedModelError
from ..model.groups import Group, LayerStructure, matrix, submodule, tensor_of
from ..model.head_size import NORMS, counts, layer_groups, rebuild_heads, smaller_heads, turn_values
from ..model.hidden_size import norm_kind, scale_
from ..model.rotation import rotation_of
from ..model.structure import ModelStructure
from ..model.surgery import entries_gone
from ..plan import PruningPlan
from ..stats.moments import InputStatistics, Moments
from ..stats.survey import Survey
from ..units.heads import rows_of_heads
from .closed_form import DEFAULT_DAMPING, ridge
from .layer_by_layer import compress


States = list[torch.Tensor]
_REFITTED = "attention"  # the criterion whose products `pair_factors` fits


@torch.no_grad()
def cut_head_size(
    model: PreTrainedModel, structure: ModelStructure, keep: int, config: PruningConfig,
    tokens: torch.Tensor | None, kept: torch.Tensor | None = None,
) -> tuple[PreTrainedModel, torch.Tensor]:  # fmt: skip
    """The model with heads of `keep` dimensions; the dense one is taken apart and of no use any more.

    Args:
        keep: Dimensions that stay, less than there are.
        tokens: Shape (sequences, length). `None` will do for `"magnitude"` (or `kept`) without compensation.
        kept: Numbers of the dimensions of queries and keys that stay, whole pairs; nothing is ranked then.

    Returns:
        The smaller model in eval mode, and the numbers of the dimensions that stay, ascending.

    Raises:
        ConfigurationError: `keep` or `kept` do not fit the model, or tokens are needed and there are none.
        UnsupportedModelError: The heads of this model cannot be made smaller.
        CheckpointError: No configuration class takes such heads.
    """
    if config.compensation and tokens is None:
        raise ConfigurationError("Re-fitting needs calibration tokens: give them, or set compensation=False.")
    groups, rotation = layer_groups(model, structure), rotation_of(model)
    size = groups[0].size
    if keep == size:
        raise ConfigurationError(f"The size of a head after pruning is {keep}, the model's own; give a smaller one.")
    smaller_heads(model, structure, keep, kept)  # raises early
    units, losses = rotation.units(size), None
    if kept is None:
        losses = pair_losses(model, structure, units, config, tokens)
        chosen = best_pairs(losses.total, rotation.size // 2, *counts(model, rotation, keep))
        kept = torch.cat([units[number] for number in chosen])
    if config.compensation and (losses is None or config.head_dim_criterion != _REFITTED):
        losses = _losses_if_any(model, structure, units, config, tokens)
    kept = torch.as_tensor(kept).cpu().long().sort().values
    target = smaller_heads(model, structure, keep, kept)
    by_layer = {group.layer: group for group in groups}
    layers = [
        dataclasses.replace(
            layer, groups=[*layer.groups, by_layer[layer.index]] if layer.index in by_layer else layer.groups
        )
        for layer in structure.layers
    ]
    inner = dataclasses.replace(structure, layers=layers)
    plan = PruningPlan.from_counts(
        inner, {group.key: keep for group in groups}, model_type=model.config.model_type, layout="per_layer"
    )
    for decision in plan.groups:
        decision.kept = kept.tolist()
    turns = _Heads(model, structure, groups, units, kept, losses, config)
    compress(model, inner, plan, config.closed_form(), lambda: tokens, Survey(), [], turns=turns)
    return rebuild_heads(model, structure, target, kept), kept


def _losses_if_any(model, structure, units, config, tokens) -> PairLosses | None:
    """What a re-fit of the scores looks at, where the model shows it."""
    try:
        return pair_losses(model, structure, units, dataclasses.replace(config, head_dim_criterion=_REFITTED), tokens)
    except UnsupportedModelError:
        return None


@torch.no_grad()
def mask_heads(
    model: PreTrainedModel, structure: ModelStructure, kept: torch.Tensor, small: PreTrainedModel
) -> Iterator[str]:
    """Does to a model what `cut_head_size` does without text, but with zeros, in place: the reference that it equals.

    Frequencies of the pairs that stay become those of `small`, which are the same but for rounding.

    Yields:
        `"turned"` when the values are in other bases and nothing is zero, then `"masked"`.

    Raises:
        UnsupportedModelError: The frequencies are others.
    """
    groups, rotation = layer_groups(model, structure), rotation_of(model)
    units = rotation.units(groups[0].size)
    turns = _Heads(model, structure, groups, units, kept, None, PruningConfig(compensation=False))
    for group in groups:
        turns.turn(group, None, [])
    yield "turned"
    for (name, dim, _), gone in entries_gone(groups, {group.key: kept for group in groups}).items():
        tensor_of(model, name).index_fill_(dim, gone, 0)
    there = set(kept.tolist())
    pairs = [n for n, unit in enumerate(units[: rotation.size // 2]) if there >= set(unit.tolist())]
    theirs = dict(small.get_submodule(rotation.module).named_buffers())
    for leaf, buffer in model.get_submodule(rotation.module).named_buffers():
        if not torch.allclose(buffer[pairs], theirs[leaf].to(buffer), rtol=1e-6, atol=0):
            raise UnsupportedModelError(f"`{rotation.module}.{leaf}` does not have the frequencies that stay")
        buffer[pairs] = theirs[leaf].to(buffer)
    yield "masked"


class _Heads:
    """What is done to the heads of each layer, see `layer_by_layer.Turns`."""

    def __init__(self, model, structure, groups, units, kept, losses, config) -> None:
        self.model, self.structure, self.config, self.kept, self.units = model, structure, config, kept, units
        self.groups = {group.layer: group for group in groups}
        self.by_head = losses.by_head if losses and config.compensation else {}
        gone = torch.ones(groups[0].size, dtype=torch.bool)
        gone[kept] = False
        self.gone = gone.nonzero().squeeze(1)
        self.order = torch.cat([kept, self.gone])

    def enter(self, layer: LayerStructure) -> None:
        """Zeroes the rows of queries and keys that go, and re-fits the queries that stay."""
        if layer.attention is None:
            return
        names, decoder = self.structure.family.attention, self.model.get_submodule(layer.name)
        inputs = names.inputs if len(names.inputs) == 3 else names.inputs * 3
        factors = self._factors(layer)
        for which, name, index in zip("qk", inputs, rows_of_heads(layer.attention, names.fused), strict=False):
            projection = decoder.get_submodule(name)
            norms = [submodule(decoder, f"{names.parent}.{norm}") for norm in NORMS[which]]
            norm = next((norm for norm in norms if getattr(norm, "weight", None) is not None), None)
            own = factors if which == "q" else None
            if own is not None and norm is not None:
                own = own if norm.weight.numel() == own.numel() else own.mean(0)
                scale_(norm.weight, norm_kind(norm), own.flatten().to(norm.weight))
                own = None
            for tensor in (matrix(projection), getattr(projection, "bias", None)):
                if tensor is None:
                    continue
                if own is not None:
                    by = own.flatten().to(tensor)
                    tensor[index.flatten()] *= by[:, None] if tensor.ndim == 2 else by
                tensor[index[:, self.gone].flatten()] = 0

    def _factors(self, layer: LayerStructure) -> torch.Tensor | None:
        """Of the dimensions of each query head, shape (heads, size)."""
        if layer.index not in self.by_head:
            return None
        products, names = self.by_head[layer.index], self.structure.family.attention
        decoder = self.model.get_submodule(layer.name)
        shared = any(
            getattr(submodule(decoder, f"{names.parent}.{norm}"), "weight", torch.empty(0)).numel()
            == layer.attention.head_dim
            for norm in NORMS["q"]
        )
        products = products.sum(0, keepdim=True).expand_as(products) if shared else products
        there = set(self.kept.tolist())
        numbers = torch.tensor([n for n, unit in enumerate(self.units) if there >= set(unit.tolist())])
        damping = DEFAULT_DAMPING if self.config.damping is None else self.config.damping
        result = torch.ones(layer.attention.heads, layer.attention.head_dim, dtype=torch.float64)
        for head, own in enumerate(products):
            for number, factor in zip(numbers.tolist(), pair_factors(own, numbers, damping).tolist(), strict=True):
                result[head, self.units[number]] = factor
        return result

    def turn(self, group: Group, statistics: InputStatistics | None, inputs: States) -> States:
        """Turns the values of a layer so that those that stay are the best ones, and what is known of them."""
        layer = self.structure.layers[group.layer]
        shape, reader = layer.attention, matrix(self.model.get_submodule(group.reader.module)).double()
        heads, size = shape.heads, shape.head_dim
        if statistics is None or statistics.fit is None:
            blocks = self._products_of_values(layer)
        else:
            gram = statistics.gram.double().view(heads, size, heads, size)
            blocks = torch.stack([gram[head, :, head] for head in range(heads)])
            blocks = blocks.view(shape.kv_heads, shape.rep, size, size).sum(1)
        bases = []
        for number, block in enumerate(blocks):
            own = reader.view(len(reader), heads, size)[:, number * shape.rep : (number + 1) * shape.rep]
            basis = value_basis(block, torch.einsum("ohd,ohe->de", own, own), len(self.kept))
            placed = torch.empty_like(basis)
            placed[:, self.order.to(basis.device)] = basis
            bases.append(placed)
        bases = torch.stack(bases)
        turn_values(self.model, self.structure, group.layer, bases)
        by_head = bases.repeat_interleave(shape.rep, 0)
        if statistics is not None:
            for moments in (statistics.fit, statistics.held_out):
                if moments is not None and moments.tokens:
                    _turn(moments, by_head)
        turned = by_head.to(inputs[0]) if inputs else None
        for x in inputs:
            x.copy_(torch.einsum("...hd,hde->...he", x.unflatten(-1, (heads, size)), turned).flatten(-2))
        return inputs

    def _products_of_values(self, layer: LayerStructure) -> torch.Tensor:
        """`W_v W_v^T` of each KV head: second moments of values of inputs of which all directions are alike."""
        names = self.structure.family.attention
        rows = rows_of_heads(layer.attention, names.fused)[2]
        weight = matrix(self.model.get_submodule(f"{layer.name}.{names.inputs[-1]}")).double()
        own = weight[rows.to(weight.device)]
        return own @ own.transpose(1, 2)


def _turn(moments: Moments, bases: torch.Tensor) -> None:
    """Moments of inputs whose heads are turned, in place."""
    heads, size = bases.shape[:2]
    full = moments.matrix(torch.float64).mul_(moments.tokens).view(heads, size, heads, size)
    full = torch.einsum("hdke,hdf,keg->hfkg", full, bases, bases).reshape(heads * size, heads * size)
    for block in moments.lower:
        end = block.shape[1]
        block.copy_(full[end - len(block) : end, :end])
    if moments.cross is not None:
        cross = moments.cross.double().view(-1, heads, size)
        moments.cross = torch.einsum("ohd,hdf->ohf", cross, bases).flatten(1).to(moments.cross.dtype)


def best_pairs(products: torch.Tensor, pairs: int, keep_pairs: int, keep_others: int) -> list[int]:
    """The units to keep so that the loss of the others, `sum_{i, j gone} G_ij`, is small.

    One after the other the unit goes that adds least; then units that stay are exchanged for ones that went as long as
    that is better.

    Args:
        products: `G`, shape (units, units), of which the first `pairs` units are pairs.
        keep_pairs, keep_others: How many of both stay.

    Returns:
        Numbers of the units that stay, ascending.
    """
    products = products.double().cpu()
    gone = torch.zeros(len(products), dtype=torch.bool)
    for first, last, keep in ((0, pairs, keep_pairs), (pairs, len(products), keep_others)):
        for _ in range(last - first - keep):
            rise = products.diagonal() + 2 * products[:, gone].sum(1)
            rise[gone] = torch.inf
            gone[first + int(rise[first:last].argmin())] = True
    while True:
        # Of every exchange of a unit i that stays for j that went: the change of the loss.
        sums, diagonal = products[:, gone].sum(1), products.diagonal()
        change = (diagonal + 2 * sums)[:, None] + (diagonal - 2 * sums)[None] - 2 * products
        kind = torch.arange(len(products)) < pairs
        change[gone] = change[:, ~gone] = torch.inf
        change[kind[:, None] != kind[None]] = torch.inf
        best = int(change.argmin())
        i, j = divmod(best, len(products))
        if not change[i, j] < -1e-9 * float(diagonal.sum().clamp_min(1e-300)):
            return (~gone).nonzero().squeeze(1).tolist()
        gone[i], gone[j] = True, False


def pair_factors(products: torch.Tensor, kept: torch.Tensor, damping: float) -> torch.Tensor:
    """Factors `a` of the queries of units that stay, which bring the output of a head nearest to that with all units.

    Minimises `|sum_i c_i - sum_{i kept} a_i c_i|^2` over the changes `c_i` with products `G = E[c_i . c_j]` that each
    unit makes (see `criteria.pairs.attention_changes`): `a = 1 + (G_KK + lam I)^-1 G_KP 1`, with the ridge `lam` as
    `damping` times the mean of the diagonal.

    Args:
        products: `G`, shape (units, units).
        kept: Numbers of the units that stay.
    """
    products = products.double()
    others = torch.ones(len(products), dtype=torch.bool)
    others[kept] = False
    left = products[kept][:, kept]
    left.diagonal().add_(ridge(left, damping))
    right = products[kept][:, others].sum(1)
    return 1 + torch.cholesky_solve(right[:, None], torch.linalg.cholesky(left))[:, 0]


def value_basis(moments: torch.Tensor, reader: torch.Tensor, keep: int) -> torch.Tensor:
    """An orthogonal basis of the values of a KV head whose first `keep` directions lose least of the outputs.

    With second moments `C = E[z z^T]` of what the reader gets of a head and `A = W_o^T W_o`, both summed over the
    query heads of the group, `E |W_o z - M R z|^2` is least over all `M` and `R` (keep x size) for
    `R = V^T C^-1/2`, where `V` are the first eigenvectors of `C^1/2 A C^1/2`, that is, by the singular value
    decomposition of `W_o C^1/2` (MoDeGPT, https://huggingface.co/papers/2408.09632, algorithm 3; FLAT-LLM,
    https://huggingface.co/papers/2505.23966, takes eigenvectors of `C`). Rows that span the same space are as good:
    orthonormal ones, which leave the sizes of values as they are. The best `M` is the business of the re-fit.

    Args:
        moments: `C`, shape (size, size).
        reader: `A`, shape (size, size).

    Returns:
        Shape (size, size), float64, the directions as columns.
    """
    moments = moments.double()
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp_min(1e-9 * float(values[-1].clamp_min(1e-300)))
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    best = torch.linalg.eigh(root @ reader.double() @ root).eigenvectors.flip(1)
    return torch.linalg.qr(inverse @ best).Q
