"""Which pairs of dimensions of queries and keys matter: over all layers and heads, whose frequencies are one list."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from ..config import PruningConfig
from ..errors import ConfigurationError, UnsupportedModelError
from ..model.groups import matrix
from ..model.structure import ModelStructure
from ..progress import tqdm
from ..stats.gradients import on_device, weight_changes
from ..units.heads import rows_of_heads
from .base import Method, Paper
from .widths import Taylor


_WATCH = "structprune_watch"
_SEQUENCES, _QUERIES = 32, 24  # and positions in each that are looked at
_ENTRIES = 2**22  # numbers held at once for some heads


@dataclass
class PairLosses:
    """What goes with the units of heads: pairs of dimensions, and dimensions that are not rotated.

    Attributes:
        total: Shape (units, units), float64: the loss without the units `S` is `sum_{i, j in S} total_ij`.
        by_head: The same of every query head, shape (heads, units, units), by number of the layer.
    """

    total: torch.Tensor
    by_head: dict[int, torch.Tensor] = field(default_factory=dict)


def pair_losses(
    model: PreTrainedModel, structure: ModelStructure, units: list[torch.Tensor], config: PruningConfig,
    tokens: torch.Tensor | None,
) -> PairLosses:  # fmt: skip
    """The loss that goes with each unit by `config.head_dim_criterion`; heads are looked at wherever there is text.

    Args:
        units: Dimensions of a head that go together.
        tokens: Shape (sequences, length).

    Raises:
        ConfigurationError: The criterion needs tokens and there are none.
        UnsupportedModelError: It looks at queries and keys, which this model keeps to itself.
    """
    name = config.head_dim_criterion
    if name != "magnitude" and tokens is None:
        raise ConfigurationError(f"The criterion {name!r} of head_dim looks at calibration text, and there is none.")
    by_name = {"magnitude": magnitude, "taylor": taylor}
    if name in by_name:
        return PairLosses(by_name[name](model, structure, units, config, tokens).double().diag())
    found = {layer.index: _Head(model, structure, layer, units) for layer in structure.layers if layer.attention}
    by_module = {id(head.module): head for head in found.values()}
    sequences = tokens[torch.linspace(0, len(tokens) - 1, min(_SEQUENCES, len(tokens))).long()]
    with torch.no_grad(), watched(model, lambda module, *seen: by_module[id(module)].add(name, *seen)):
        for row in tqdm(sequences.split(1), desc="Heads"):
            model.base_model(input_ids=on_device(model, row), use_cache=False)
    by_head = {index: head.products for index, head in found.items() if head.products is not None}
    if len(by_head) < len(found):
        raise UnsupportedModelError(
            f"head_dim_criterion={name!r} looks at queries and keys, but {type(model).__name__} does not hand them to "
            "the attention interface of Transformers. Use 'magnitude' or 'taylor', and compensation=False."
        )
    return PairLosses(sum(products.sum(0) for products in by_head.values()), by_head)


class _Head:
    """What is summed up of the heads of one layer."""

    def __init__(self, model, structure, layer, units) -> None:
        names, self.shape, self.units = structure.family.attention, layer.attention, units
        decoder = model.get_submodule(layer.name)
        self.module = decoder.get_submodule(names.parent)
        reader, columns = matrix(decoder.get_submodule(names.output)), rows_of_heads(self.shape, names.fused)[3]
        self.readers = torch.stack([reader[:, own].float().T @ reader[:, own].float() for own in columns])
        self.products: torch.Tensor | None = None

    def add(self, name: str, query, key, value, weights, scaling: float) -> None:
        """Adds a batch; queries, keys and values have the shape (sequences, heads, length, size)."""
        count = len(self.units)
        if self.products is None:
            self.products = torch.zeros(self.shape.heads, count, count, dtype=torch.float64)
        of = torch.zeros(query.shape[-1], count, device=query.device)
        for number, unit in enumerate(self.units):
            of[unit, number] = 1.0
        places = torch.linspace(1, query.shape[2] - 1, min(_QUERIES, query.shape[2] - 1)).long().to(query.device)
        readers = self.readers.to(query.device)
        for q, k, v, p in zip(query.float(), key.float(), value.float(), weights.float(), strict=True):
            k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
            if name == "energy":
                energy = (q.square() @ of).mean(1) * (k.square() @ of).mean(1)
                self.products += energy.double().cpu().diag_embed()
                continue
            q, p = q[:, places], p[:, places]
            some = max(1, _ENTRIES // (q[0].numel() * k.shape[1]))  # heads, for bounded memory
            for heads in torch.arange(len(q), device=q.device).split(some):
                change = attention_changes(q[heads], k[heads], v[heads], p[heads], scaling, of)
                change = change.transpose(1, 2)  # (heads, units, queries, size of values)
                read = change @ readers[heads, None]
                self.products[heads.cpu()] += (read.flatten(2) @ change.flatten(2).mT).double().cpu()


def attention_changes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor, scaling: float, units: torch.Tensor
) -> torch.Tensor:
    """By how much the outputs of heads change to first order when a unit's part of their scores goes.

    `d_i(m, n) = scaling sum_{j in unit i} q_mj k_nj` of rotated queries and keys; with `p = softmax` the output
    `sum_n p_mn v_n` changes by `-sum_n p_mn (d_i(m, n) - sum_l p_ml d_i(m, l)) v_n`. What is the same for all keys
    changes nothing, which products of norms (RAP; MoDeGPT, https://huggingface.co/papers/2408.09632, eq. 8, where the
    energy `|q|^2 |k|^2` ranks columns) do not see. As `q` is the same in all of the sum, that is
    `-scaling sum_{j in unit i} q_mj cov_m(k_j, v)`, the covariance of keys and values under `p_m`.

    Args:
        q, k, v: Shapes (..., queries, size), (..., keys, size), (..., keys, size of values).
        p: Weights of the attention, shape (..., queries, keys).
        units: 1 where a dimension belongs to a unit, shape (size, units).

    Returns:
        The changes without sign, shape (..., queries, units, size of values).
    """
    weighted = k.mT[..., None, :, :] * p[..., None, :]  # (..., queries, size, keys)
    both = (weighted.flatten(-3, -2) @ v).unflatten(-2, weighted.shape[-3:-1])
    covariance = both - (p @ k)[..., None] * (p @ v)[..., None, :]
    return (scaling * units.T * q[..., None, :]) @ covariance


@contextmanager
def watched(model: PreTrainedModel, watch: Callable) -> Iterator[None]:
    """Hands `module, queries, keys, values, weights, scaling` of every attention to `watch` while this is open."""

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if eager is None:
            raise UnsupportedModelError(f"The attention of {type(module).__name__} cannot be looked at.")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = eager(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        watch(module, query, key, value, output[1], scaling)
        return output

    AttentionInterface.register(_WATCH, attention)
    AttentionMaskInterface.register(_WATCH, eager_mask)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(_WATCH)
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def magnitude(model: PreTrainedModel, structure: ModelStructure, units: list[torch.Tensor], *_) -> torch.Tensor:
    """`sum over layers and query heads of |W_q|^2 |W_k|^2` of a unit's rows, each layer relative to its mean."""
    total = torch.zeros(len(units), dtype=torch.float64)
    for layer in (layer for layer in structure.layers if layer.attention):
        q, k = (_of_units(tensor.float().square(), index, units) for tensor, index in _rows(model, structure, layer))
        scores = (q.view(len(k), -1, len(units)).sum(1) * k).sum(0)
        total += (scores / scores.mean().clamp_min(1e-30)).double().cpu()
    return total


def taylor(
    model: PreTrainedModel, structure: ModelStructure, units: list[torch.Tensor], config: PruningConfig,
    tokens: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """`sum |w g|` over the rows of a unit in all queries and keys, `g` being the gradient of the mean loss."""
    total, places = torch.zeros(len(units), dtype=torch.float64), {}
    for layer in (layer for layer in structure.layers if layer.attention):
        names = structure.family.attention
        inputs = names.inputs if len(names.inputs) == 3 else names.inputs * 3
        for name, index in zip(inputs[:2], rows_of_heads(layer.attention, names.fused), strict=False):
            places.setdefault(f"{layer.name}.{name}.weight", []).append(index)

    def add(name: str, change: torch.Tensor, share: float) -> None:
        for index in places[name]:
            total.add_(_of_units(change, index, units).sum(0).double().cpu(), alpha=share)

    weight_changes(model, {name: model.get_parameter(name) for name in places}, tokens, config, add)
    return total


def _rows(model, structure, layer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The matrices of queries and of keys, and the rows of their heads."""
    names, module = structure.family.attention, model.get_submodule(layer.name)
    inputs = names.inputs if len(names.inputs) == 3 else names.inputs * 3
    for name, index in zip(inputs[:2], rows_of_heads(layer.attention, names.fused), strict=False):
        yield matrix(module.get_submodule(name)), index


def _of_units(values: torch.Tensor, index: torch.Tensor, units: list[torch.Tensor]) -> torch.Tensor:
    """Sums over the rows of each unit of each head, shape (heads, units)."""
    rows = values.sum(1)[index.to(values.device)]
    return torch.stack([rows[:, unit].sum(1) for unit in units], 1)


METHODS = {
    "attention": Method((Paper("lin2024modegpt"),)),
    "energy": Method((Paper("lin2024modegpt"),)),
    "magnitude": Method(Taylor.papers, needs_text=False),
    "taylor": Method(Taylor.papers),
}
