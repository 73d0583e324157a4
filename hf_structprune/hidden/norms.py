"""Norms of the residual stream: what kind they are, and what makes up for the channels they no longer see."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..structure import is_linear


@dataclass(frozen=True)
class NormKind:
    """How a norm computes.

    Attributes:
        centred: Whether it subtracts the mean (LayerNorm).
        offset: What is added to its weight: 1 for Gemma, whose weights are stored as `w - 1`, else 0.
    """

    centred: bool
    offset: float


@torch.no_grad()
def norm_kind(module: nn.Module) -> NormKind | None:
    """The kind of a module with a weight for each channel, found by trying it; `None` if it is no norm."""
    weight = getattr(module, "weight", None)
    if is_linear(module) or isinstance(module, nn.Embedding) or weight is None or weight.ndim != 1:
        return None
    twin = copy.deepcopy(module).to_empty(device="cpu").float()
    for parameter in twin.parameters():
        parameter.zero_()
    x = 1e4 * (torch.linspace(-1, 2, weight.numel() * 2).cos().view(2, -1) + 0.5)  # no epsilon matters beside it
    offset = float(twin(x).abs().max() > 1e-6)
    twin.weight.fill_(1 - offset)
    y = twin(x)
    if not torch.allclose(twin(2 * x), y, atol=1e-3) or torch.allclose(y, x):
        return None
    return NormKind(centred=torch.allclose(twin(x + 1e4), y, atol=1e-3), offset=offset)


def stream_norms(model: PreTrainedModel, names: set[str]) -> dict[str, NormKind]:
    """Norms whose weights are among these parameters, in the order of the model, by the full name of the module."""
    found: dict[str, NormKind] = {}
    kinds: dict[type, NormKind | None] = {}
    for name, module in model.named_modules():
        if f"{name}.weight" in names and getattr(module.weight, "ndim", 0) == 1:
            if type(module) not in kinds:
                kinds[type(module)] = norm_kind(module)
            if kinds[type(module)] is not None:
                found[name] = kinds[type(module)]
    return found


def scale_(weight: torch.Tensor, kind: NormKind, factor: torch.Tensor | float) -> None:
    """Multiplies what a norm gives by a factor, in place.

    An RMS norm over `H` channels of which only those in `K` are not 0 gives `w x / sqrt(S / H + eps)` with
    `S = sum_K x^2`. Over the `H'` channels of `K` alone it gives `w' x / sqrt(S / H' + eps')`; with
    `eps' = eps H / H'` and `w' = w sqrt(H / H')` that is the same.
    """
    weight.add_(kind.offset).mul_(factor).sub_(kind.offset)


def eps_keys(model: PreTrainedModel) -> list[str]:
    """Keys of the configuration that hold the epsilon of the RMS norms over the hidden size; none for LayerNorms.

    Norms over a head (`q_norm`, `k_norm`) may share the key. Their epsilon then grows too, which changes their outputs
    by a share of `eps (H / H' - 1) / (2 mean square)`: for an epsilon of 1e-6, far less than bfloat16 rounds.
    """
    size = model.config.hidden_size
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" not in name.rpartition(".")[2].lower() and "ln" not in name.rpartition(".")[2].lower():
            continue
        if weight is None or weight.shape != (size,):
            continue
        kind = norm_kind(module)
        if kind is None or kind.centred:
            return []
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        values = model.config.to_dict()
        return [key for key in values if "eps" in key and isinstance(eps, float) and values[key] == eps]
    return []
